"""How predictable a series is: forecasts of its next checkpoints against copying the last one, and its path's shape.

All of it is computed from the displacements' inner products. Nothing is fitted on what it is evaluated on: of several
series, what is fitted is fitted on the others; of a single one, on its first half, and judged on its second.
Of an algorithm that reuses its data, every skill is also given by phase: the place of a start in its iteration.

Shapes: S displacements, K of context, B starts, H forward steps, R ranks.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl_ray.checkpoints.files import CheckpointError
from tipl_ray.checkpoints.records import ImportedSeries
from tipl_ray.evaluate.metrics import MIN_TRIALS, Resampling
from tipl_ray.predict.gram import GramBand, Question, rate_shares, squared_errors
from tipl_ray.predict.predictor import Combination, Trials, every_window
from tipl_ray.registry import PREDICTORS
from tipl_ray.window.predictor import WindowFloor

UNFITTED = ("copy-last", "linear", "window-linear", "rank-1", "rank-1-from-last")
FITTED = ("damped", "dmd", "context-ridge")
"""Predictors with a setting that is chosen by its skill elsewhere."""
LEARNED = "ridge"
"""A regression whose coefficients, by phase, are learned on all other series but one, which chooses its penalty."""
BOUND = "window-floor"
"""The true future, projected on the context's displacements: no forecast, but what any of them could reach."""
STEPS = (1, 2, 5, 10)
FEWEST, MOST = 2, 20
"""Default context, in displacements: a quarter of all, between these."""
RANKS = (1, 2, 3, 5, 10, 20)
SHARES = (0.9, 0.99)
"""Shares of the energy whose ranks are given."""
ALL, SECOND_HALF = "all", "second half"

INTERVALS = Resampling(confidence=0.95, bootstrap=2000, seed=0)
"""Over series."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """The question. Raises ValueError for an impossible one."""

    context: int | None = None
    """Displacements that a forecast knows."""
    steps: tuple[int, ...] = STEPS
    """Checkpoints ahead."""
    per_iteration: int | None = None
    """Checkpoints per iteration of an algorithm that reuses its data, as PPO does; None: what each series says, else
    1."""
    leave_out: tuple[str, ...] = ()
    """Patterns of layers that are left out."""

    def __post_init__(self) -> None:
        if self.context is not None and self.context < FEWEST:
            raise ValueError(f"context={self.context} is below {FEWEST}: a forecast needs two displacements")
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ValueError(f"steps={self.steps} are not rising whole numbers from 1 on")
        if self.per_iteration is not None and self.per_iteration < 1:
            raise ValueError(f"per_iteration={self.per_iteration} is below 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What came out."""

    context: int
    skills: list[Row]
    """One row for each series, predictor, forward step and set of windows."""
    means: list[Row]
    """The same over series, each of which counts as much as any other; with an interval where there are enough."""
    phases: list[Row]
    """The same by phase, on the windows that all predictors share; none where iterations have one checkpoint."""
    paths: list[Row]
    """Of each series: its length, how straight it is, ranks."""
    spectra: list[Row]
    """Of each series and rank: the energy that is kept, and what it would be for a random walk as long."""
    groups: list[Row]
    """Of each series and layer: its share of the movement, how straight and how predictable it is."""


def ask(series: Sequence[ImportedSeries], asking: Asking, tipl: Combination | None = None) -> Findings:
    """Ask all predictors about all series. Raises CheckpointError where one is too short, ValueError where TIPL was
    trained for another number of snapshots per iteration."""
    context = _context(series, asking, tipl)
    width = context + max(asking.steps)
    bands = [_band(one, one.products.gram_SS, width, asking) for one in series]
    rows = [
        {"series": one.name, "digest": one.digest, **row}
        for index, one in enumerate(series)
        for row in _skills(bands[index], _others(series, bands, index), context, asking, tipl)
    ]
    skills, by_phase = ([row for row in rows if ("phase" in row) == has_phase] for has_phase in (False, True))
    means = _means(skills)
    return Findings(
        context=context,
        skills=skills,
        means=means,
        phases=[row for row in _means(by_phase) if row["windows"] == _shared(means)],
        paths=[{"series": one.name, "digest": one.digest, **path(one)} for one in series],
        spectra=[{"series": one.name, "digest": one.digest, **row} for one in series for row in spectrum(one)],
        groups=[
            {"series": one.name, "digest": one.digest, **row}
            for one in series
            for row in _groups(one, context, asking, _shared(means))
        ],
    )


def shared_windows(findings: Findings) -> str:
    """The windows that all predictors were evaluated on."""
    return _shared(findings.means)


def _shared(means: Sequence[Row]) -> str:
    return SECOND_HALF if any(row["fitted_on"] == "first half" for row in means) else ALL


def path(series: ImportedSeries) -> Row:
    """How far a series goes and how straight: 1 is a line; a random walk of S steps has about 1 / sqrt(S)."""
    gram_SS = series.products.gram_SS
    lengths_S, own_S, walk_S = np.sqrt(np.diag(gram_SS)), energies(gram_SS), random_walk(len(gram_SS))
    return {
        "checkpoints": len(series.steps),
        "weights": series.num_weights,
        "path_length": float(lengths_S.sum()),
        **_straightness(gram_SS),
        "straightness_random_walk": float(len(gram_SS) ** -0.5),
        **{f"rank_{100 * share:.0f}": _rank(own_S, share) for share in SHARES},
        **{f"rank_{100 * share:.0f}_random_walk": _rank(walk_S, share) for share in SHARES},
        "even_steps": len(set(np.diff(series.steps).tolist())) == 1,
    }


def spectrum(series: ImportedSeries) -> list[Row]:
    """Energy kept by an SVD of each rank: of the path, as differences from the first checkpoint, and of the
    displacements."""
    gram_SS = series.products.gram_SS
    columns = {
        "path": energies(gram_SS),
        "random_walk": random_walk(len(gram_SS)),
        "displacements": _shares(np.linalg.eigvalsh(gram_SS)),
    }
    ranks = [rank for rank in RANKS if rank <= len(gram_SS)]
    return [{"rank": rank, **{name: float(shares[rank - 1]) for name, shares in columns.items()}} for rank in ranks]


def energies(gram_SS: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the squared differences from the first checkpoint that an SVD of rank 1, 2, ... keeps; (S,)."""
    # Difference s is the sum of the displacements up to s.
    sums_SS = np.tril(np.ones_like(gram_SS))
    return _shares(np.linalg.eigvalsh(sums_SS @ gram_SS @ sums_SS.T))


@functools.cache
def random_walk(num_displacements: int) -> NDArray[np.float64]:
    """`energies` of a random walk of so many steps in as many dimensions; (S,)."""
    return energies(np.eye(num_displacements))


def _shares(values_S: NDArray[np.floating]) -> NDArray[np.float64]:
    falling_S = np.maximum(values_S[::-1], 0.0)
    return falling_S.cumsum() / (falling_S.sum() or np.nan)


def _rank(shares_S: NDArray[np.float64], share: float) -> int | None:
    return int(np.argmax(shares_S >= share)) + 1 if np.isfinite(shares_S).all() else None


def _straightness(gram_SS: NDArray[np.float64]) -> Row:
    lengths_S = np.sqrt(np.diag(gram_SS))
    moved_S = lengths_S[:-1] * lengths_S[1:]
    cosines_S = np.diag(gram_SS, 1)[moved_S > 0] / moved_S[moved_S > 0]
    net, length = float(np.sqrt(max(gram_SS.sum(), 0.0))), float(lengths_S.sum())
    return {
        "net_displacement": net,
        "straightness": net / length if length else None,
        "mean_cosine": float(cosines_S.mean()) if len(cosines_S) else None,
    }


def phases_of(series: ImportedSeries, asking: Asking) -> int:
    """Checkpoints per iteration: as asked, else as the series says, else 1."""
    return asking.per_iteration or series.snapshots_per_iteration or 1


def _band(series: ImportedSeries, gram_SS: NDArray[np.float64], width: int, asking: Asking) -> GramBand:
    """A band of the series, or of a layer of it. A learning rate that is not known is taken to be constant."""
    size = len(gram_SS)
    products_SW = np.zeros((size, min(size, width)))
    for column in range(products_SW.shape[1]):
        products_SW[: size - column, column] = np.diag(gram_SS, column)
    rates_T = None if series.learning_rates is None else np.array(series.learning_rates)
    return GramBand(
        products_SW=products_SW,
        learning_rates_T=rate_shares(rates_T, size + 1),
        snapshots_per_iteration=phases_of(series, asking),
    )


def _part(band: GramBand, stop: int) -> GramBand:
    """The first displacements of a band."""
    products_SW = band.products_SW[:stop].copy()
    products_SW[np.add.outer(np.arange(stop), np.arange(products_SW.shape[1])) >= stop] = 0.0
    return GramBand(
        products_SW=products_SW,
        learning_rates_T=band.learning_rates_T[: stop + 1],
        snapshots_per_iteration=band.snapshots_per_iteration,
    )


def _context(series: Sequence[ImportedSeries], asking: Asking, tipl: Combination | None) -> int:
    shortest = min(series, key=lambda one: one.num_displacements)
    available = shortest.num_displacements - asking.steps[0]
    context = asking.context or min(MOST, max(FEWEST, shortest.num_displacements // 4))
    if tipl is not None:
        own, phases = tipl.question.context, tipl.question.snapshots_per_iteration
        if asking.context not in (None, own):
            raise ValueError(f"context={asking.context}, but the predictor was trained on {own}; leave --context out")
        if other := next((one for one in series if phases_of(one, asking) not in (1, phases)), None):
            raise ValueError(
                f"{other.name}: per_iteration={phases_of(other, asking)}, but the predictor was trained on {phases} "
                "snapshots per iteration; --per-iteration 1 leaves the phases out"
            )
        context = own
    if context > available:
        ahead = asking.steps[0]
        way_out = _shorter(shortest.num_displacements, context, ahead, can_choose=tipl is None)
        raise CheckpointError(
            f"{shortest.name}: {len(shortest.steps)} checkpoints are too few to judge a forecast {ahead} ahead from a "
            f"context of {context} displacements, which takes {context + ahead + 1}{way_out}"
        )
    return context


def _shorter(num_displacements: int, context: int, ahead: int, *, can_choose: bool) -> str:
    """What to ask instead of a series that is too short for a forecast so far ahead from a context of this length."""
    ways = []
    if ahead > 1 and num_displacements > context:
        ways.append(f"--steps up to {num_displacements - context}")
    if can_choose and (most := num_displacements - ahead) >= FEWEST:
        ways.append(f"--context {'up to ' * (most > FEWEST)}{most}")
    return f"; use {' or '.join(ways)}" if ways else "; save checkpoints more often"


def _others(series: Sequence[ImportedSeries], bands: Sequence[GramBand], index: int) -> list[GramBand]:
    """Bands of the series from other folders: another selection of the same folder is the same run."""
    return [band for one, band in zip(series, bands, strict=True) if one.folder != series[index].folder]


def _skills(
    band: GramBand, others: Sequence[GramBand], context: int, asking: Asking, tipl: Combination | None
) -> Iterator[Row]:
    size = len(band.products_SW)
    half = size // 2
    fitting = list(others) or [_part(band, half)]
    for step in (step for step in asking.steps if context + step <= size):
        question = Question(context=context, steps=(step,), snapshots_per_iteration=band.snapshots_per_iteration)
        asked = [(PREDICTORS.load(name)(question), "nothing") for name in UNFITTED]
        if tipl is not None and step in tipl.question.steps:
            asked.append((tipl, "its own data"))
        asked += [(one, "other series" if others else "first half") for one in _fitted(question, fitting)]
        asked += [(one, "other series") for one in _learned(question, others)]
        everywhere_B = np.arange(context, size - step + 1)
        late_B = everywhere_B[everywhere_B >= half]
        for predictor, fitted_on in asked:
            if fitted_on != "first half":
                yield from _rows(predictor, band, everywhere_B, step, fitted_on, ALL)
            if not others and len(late_B):
                yield from _rows(predictor, band, late_B, step, fitted_on, SECOND_HALF)
        for starts_B, windows in ((everywhere_B, ALL), *([] if others else [(late_B, SECOND_HALF)])):
            if len(starts_B):
                floor_B = WindowFloor(question).band_errors(band, starts_B)[:, 0]
                yield _line(BOUND, floor_B, _moved(band, starts_B, step), step, "the future", windows)


def _fitted(question: Question, bands: Sequence[GramBand]) -> list[Combination]:
    """What can be fitted on these bands: nothing where they have no window of the question."""
    usable = [band for band, starts_B in every_window(bands, question) if len(starts_B)]
    predictors = [PREDICTORS.load(name)(question) for name in FITTED] if usable else []
    for predictor in predictors:
        predictor.fit(Trials(bands=usable, weights=tuple), Trials(bands=usable, weights=tuple))
    return predictors


def _learned(question: Question, bands: Sequence[GramBand]) -> list[Combination]:
    """What is learned on some bands and validated on the last: nothing where there are less than two."""
    usable = [band for band, starts_B in every_window(bands, question) if len(starts_B)]
    if len(usable) < 2:
        return []
    ridge = PREDICTORS.load(LEARNED)(question)
    ridge.fit(Trials(bands=usable[:-1], weights=tuple), Trials(bands=usable[-1:], weights=tuple))
    return [ridge]


def _rows(
    predictor: Combination, band: GramBand, starts_B: NDArray[np.int64], step: int, fitted_on: str, windows: str
) -> Iterator[Row]:
    """The row of all starts, then that of each phase where there are several."""
    yield _row(predictor, band, starts_B, step, fitted_on, windows)
    phases_B, num_phases = starts_B % band.snapshots_per_iteration, band.snapshots_per_iteration
    for phase in range(num_phases) if num_phases > 1 else ():
        if len(own_B := starts_B[phases_B == phase]):
            yield {**_row(predictor, band, own_B, step, fitted_on, windows), "phase": phase}


def _row(
    predictor: Combination, band: GramBand, starts_B: NDArray[np.int64], step: int, fitted_on: str, windows: str
) -> Row:
    question = predictor.question
    contexts = band.contexts(starts_B, question.context)
    coefficients_BK = predictor.coefficients(contexts)[:, question.steps.index(step)]
    grams_BNN = band.windows(starts_B, question.context, step)
    errors_B = squared_errors(grams_BNN, coefficients_BK[:, None], (step,))[:, 0]
    return _line(predictor.name, errors_B, _moved(band, starts_B, step), step, fitted_on, windows)


def _moved(band: GramBand, starts_B: NDArray[np.int64], step: int) -> NDArray[np.float64]:
    """Squared error of copying the last checkpoint; (B,)."""
    return np.maximum(band.windows(starts_B, 0, step).sum(axis=(1, 2)), 0.0)


def _line(
    name: str, errors_B: NDArray[np.float64], moved_B: NDArray[np.float64], step: int, fitted_on: str, windows: str
) -> Row:
    moved = float(moved_B.sum())
    return {
        "predictor": name,
        "step": step,
        "windows": windows,
        "num_windows": len(errors_B),
        "fitted_on": fitted_on,
        "skill": 1.0 - float(errors_B.sum()) / moved if moved > 0 else None,
    }


def _means(skills: Sequence[Row]) -> list[Row]:
    """Over series, by everything else; by phase where the rows have one."""
    keys = [name for name in ("predictor", "step", "phase", "windows", "fitted_on") if name in (skills or [{}])[0]]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in skills:
        groups.setdefault(tuple(row[name] for name in keys), []).append(row)
    rows = []
    for values, own in groups.items():
        known_N = np.array([row["skill"] for row in own if row["skill"] is not None])
        low, high = (
            INTERVALS.ends(INTERVALS.resample(known_N, statistic=lambda runs: runs.mean(axis=-1)), len(known_N))
            if len(known_N) >= MIN_TRIALS
            else (None, None)
        )
        rows.append(
            {
                **dict(zip(keys, values, strict=True)),
                "skill": float(known_N.mean()) if len(known_N) else None,
                "skill_low": low,
                "skill_high": high,
                "num_series": len(known_N),
                "num_windows": sum(row["num_windows"] for row in own),
            }
        )
    return rows


def _groups(series: ImportedSeries, context: int, asking: Asking, windows: str) -> Iterator[Row]:
    """Layers that move, in the series' order, one step ahead by predictors that need no fitting, on these windows."""
    products, step = series.products, asking.steps[0]
    whole = float(np.trace(products.gram_SS))
    question = Question(context=context, steps=(step,), snapshots_per_iteration=phases_of(series, asking))
    predictors = [PREDICTORS.load(name)(question) for name in UNFITTED[1:]]
    for name, num_weights, gram_SS in zip(products.groups, products.weights_G, products.grams_GSS, strict=True):
        moved = float(np.trace(gram_SS))
        if not moved > 0:
            continue
        band = _band(series, gram_SS, context + step, asking)
        first = max(context, len(gram_SS) // 2) if windows == SECOND_HALF else context
        starts_B = np.arange(first, len(gram_SS) - step + 1)
        rows = [_row(predictor, band, starts_B, step, "nothing", windows) for predictor in predictors]
        yield {
            "group": name,
            "weights": int(num_weights),
            "share_of_movement": moved / whole,
            **_straightness(gram_SS),
            "energy_rank_1": float(energies(gram_SS)[0]),
            **{f"skill_{row['predictor']}": row["skill"] for row in rows},
        }
