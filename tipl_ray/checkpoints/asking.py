"""Analyse the series of a storage, and publish the findings.

<storage>/predictability/<digest>/    report.html, skill.png, path.png, phases.png, *.csv, predictability.sha256
"""

import dataclasses
import fnmatch
import shlex
from collections.abc import Sequence

from tipl_ray.checkpoints import figures, report
from tipl_ray.checkpoints.files import CheckpointError
from tipl_ray.checkpoints.predictability import Asking, Findings, ask
from tipl_ray.checkpoints.records import ImportedSeries, without_layers
from tipl_ray.checkpoints.trials import Candidate, candidates, load_all
from tipl_ray.data.storage import join, publish
from tipl_ray.digest import digest
from tipl_ray.drawing import png
from tipl_ray.errors import nearest
from tipl_ray.predict.saved import load_predictor, predictor_digest
from tipl_ray.record.tensors import listed
from tipl_ray.terminal import waiting

REPORT_FILE, RECORD = "report.html", "predictability.sha256"
MOST_SERIES = 6
"""Series that an error lists."""
DEFAULT = Asking()
"""What is asked where nothing is said."""


def choose_series(storage: str, names: Sequence[str], leave_out: Sequence[str] = ()) -> list[ImportedSeries]:
    """The storage's series, recorded trials and imported ones, of these names or digests; all of them where none is
    named.

    Raises CheckpointError where there is none, where a name is that of several, where none is named and their layers,
    without those left out, are not of equal sizes, and as `load_all` does.
    """
    with waiting("ask: reading the storage"):
        known = candidates(storage)
    if not known:
        raise CheckpointError(
            f"{storage}: there are no trials and no series; record a run or import a folder of checkpoints first"
        )
    chosen = [_called(name, known, storage) for name in names]
    if not names:
        _check_alike(known, leave_out, storage)
    return load_all(storage, list({one.digest: one for one in chosen or known}.values()))


def _called(name: str, known: Sequence[Candidate], storage: str) -> Candidate:
    own = [one for one in known if name in (one.name, one.digest)]
    if len(own) == 1:
        return own[0]
    shown = (own or known)[:MOST_SERIES]
    digests = "; ".join(f"{one.digest} ({one.name}, {one.num_checkpoints} checkpoints)" for one in shown)
    more = len(own or known) - len(shown)
    raise CheckpointError(
        f"{storage}: {'several series are' if own else 'no series is'} called {name}"
        f"{'' if own else nearest(name, [one.name for one in known])}; choose one by its digest: {digests}"
        f"{f'; and {more} more' if more else ''}"
    )


def _check_alike(known: Sequence[Candidate], leave_out: Sequence[str], storage: str) -> None:
    """Raises CheckpointError for series whose weights have different layouts: a mean over them says nothing."""
    has_layers = all(one.weights_by_layer for one in known)
    alike: dict[tuple[int, ...], list[Candidate]] = {}
    for one in known:
        left_out = [name for name in one.weights_by_layer if any(fnmatch.fnmatchcase(name, part) for part in leave_out)]
        kept = [weights for name, weights in one.weights_by_layer.items() if name not in left_out]
        layout = tuple(kept) if has_layers else (one.num_weights,)
        alike.setdefault(layout, []).append(one)
    if len(alike) > 1:
        kinds = "; ".join(
            f"{listed([one.name for one in group])} ({group[0].num_weights:,} weights in "
            f"{len(group[0].weights_by_layer) or '?'} layers)"
            for group in list(alike.values())[:MOST_SERIES]
        )
        first = next(iter(alike.values()))
        raise CheckpointError(
            f"{storage}: contains series of {len(alike)} different networks, which are not averaged: {kinds}; name "
            f"those to compare, as in --series {first[0].name}"
        )


def answer(
    storage: str, names: Sequence[str] = (), asking: Asking = DEFAULT, predictor: str | None = None
) -> tuple[str, Findings]:
    """Analyse series, and publish the page, pictures and tables; their folder, and the findings.

    `predictor` is a folder or URI that `load_predictor` takes. Raises as `choose_series` and `ask` do.
    """
    series = [without_layers(one, asking.leave_out) for one in choose_series(storage, names, asking.leave_out)]
    with waiting("ask: comparing forecasts"):
        return _published(storage, series, names, asking, predictor)


def _published(
    storage: str, series: Sequence[ImportedSeries], names: Sequence[str], asking: Asking, predictor: str | None
) -> tuple[str, Findings]:
    tipl = load_predictor(predictor) if predictor is not None else None
    findings = ask(series, asking, tipl)
    pictures = {"skill": png(figures.skill(findings)), "path": png(figures.path(series))}
    if findings.phases:
        pictures["phases"] = png(figures.phases(findings))
    named = digest(
        [one.digest for one in series],
        dataclasses.asdict(asking),
        predictor_digest(predictor) if predictor is not None else None,
    )
    options = [storage, *(["--series", *(one.digest for one in series)] if names else [])]
    options += ["--steps", *map(str, asking.steps)] if asking.steps != DEFAULT.steps else []
    options += ["--context", str(asking.context)] if asking.context is not None else []
    options += ["--per-iteration", str(asking.per_iteration)] if asking.per_iteration is not None else []
    options += ["--leave-out", *map(shlex.quote, asking.leave_out)] if asking.leave_out else []
    options += ["--predictor", predictor] if predictor is not None else []
    html = report.page(series, findings, asking, pictures, f"python jobs/data.py ask {' '.join(options)}")
    folder = join(storage, "predictability", named)
    images = {f"{name}.png": content for name, content in pictures.items()}
    files = {**report.as_tables(findings), **images, REPORT_FILE: html.encode()}
    publish(folder, files, RECORD)
    return folder, findings
