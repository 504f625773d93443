"""Analyse the series of a storage, and publish the findings.

<storage>/predictability/<digest>/    report.html, skill.png, path.png, phases.png, *.csv, predictability.sha256
"""

import dataclasses
import shlex
from collections.abc import Sequence

from tipl_ray.checkpoints import figures, report
from tipl_ray.checkpoints.files import CheckpointError
from tipl_ray.checkpoints.predictability import Asking, Findings, ask
from tipl_ray.checkpoints.records import ImportedSeries, without_layers
from tipl_ray.checkpoints.trials import candidates, load_all
from tipl_ray.data.storage import join, publish
from tipl_ray.digest import digest
from tipl_ray.drawing import png
from tipl_ray.predict.saved import load_predictor, predictor_digest

REPORT_FILE, RECORD = "report.html", "predictability.sha256"
DEFAULT = Asking()
"""What is asked where nothing is said."""


def choose_series(storage: str, names: Sequence[str]) -> list[ImportedSeries]:
    """The storage's series, recorded trials and imported ones, of these names or digests; all of them where none is
    named.

    Raises CheckpointError where there is none, where a name is that of several, and as `load_all` does.
    """
    known = candidates(storage)
    if not known:
        raise CheckpointError(
            f"{storage}: there are no trials and no series; record a run or import a folder of checkpoints first"
        )
    chosen = []
    for name in names:
        own = [one for one in known if name in (one.name, one.digest)]
        listed = "; ".join(f"{one.digest} ({one.name}, {one.num_checkpoints} checkpoints)" for one in own or known)
        if len(own) != 1:
            raise CheckpointError(
                f"{storage}: {'several series are' if own else 'no series is'} called {name}; choose one by its "
                f"digest: {listed}"
            )
        chosen += own
    return load_all(storage, list({one.digest: one for one in chosen or known}.values()))


def answer(
    storage: str, names: Sequence[str] = (), asking: Asking = DEFAULT, predictor: str | None = None
) -> tuple[str, Findings]:
    """Analyse series, and publish the page, pictures and tables; their folder, and the findings.

    `predictor` is a folder or URI that `load_predictor` takes. Raises as `choose_series` and `ask` do.
    """
    series = [without_layers(one, asking.leave_out) for one in choose_series(storage, names)]
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
