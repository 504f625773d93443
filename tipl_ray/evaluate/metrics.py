"""WPE, skill and REPW (Section 4), and how sure of them one may be.

Knows the evaluation's result table, as a dictionary of equally long numpy columns, and nothing of how it was made.
One row is one forecast: a trial, the start of a window, a predictor and a forward step h. The rows that a function is
given are taken as one group; `by` cuts a table into groups.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import special

from tipl_ray.config import Evaluate

Table = dict[str, NDArray]
Row = Mapping[str, Any]
"""A line of a summary."""
Statistic = Callable[[NDArray], NDArray]
"""A function that reduces the last axis, as a mean does."""

GROUP = ("task", "predictor", "basis", "causal", "step")
"""Columns whose values identify a summary row."""
MIN_TRIALS = 3
"""Fewest trials that an interval is made of: of two, a bootstrap knows no more than the two."""


def interquartile_mean(values: NDArray) -> NDArray[np.float64]:
    """Mean of the middle half of runs along the last axis, as rliable has it (arXiv 2108.13264): a quarter of the
    runs, rounded down, is left out at each end. NaN of no runs, and where one of them is NaN."""
    cut = values.shape[-1] // 4
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    middle = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)
    return np.where(np.isnan(values).any(axis=-1), np.nan, middle)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Resampling:
    """The bootstrap behind every interval: runs are drawn again, with replacement, as many as there are."""

    confidence: float
    """Level of the intervals."""
    bootstrap: int
    """Resamples behind each."""
    seed: int

    @classmethod
    def of(cls, settings: Evaluate) -> "Resampling":
        """As an evaluation's settings ask for it."""
        return cls(confidence=settings.confidence, bootstrap=settings.bootstrap, seed=settings.seed)

    def resample(self, *strata: NDArray, statistic: Statistic = interquartile_mean) -> NDArray[np.float64]:
        """A statistic over all runs, under resampling of runs within each stratum; (..., bootstrap).

        A stratum's runs, such as those of one task, are along its last axis, which the statistic reduces. This is
        rliable's stratified bootstrap (arXiv 2108.13264).
        """
        random, sizes = np.random.default_rng(self.seed), [runs.shape[-1] for runs in strata]
        picks = [random.integers(size, size=(self.bootstrap, size)) for size in sizes]
        drawn = [np.take(runs, picked, axis=-1) for runs, picked in zip(strata, picks, strict=True)]
        return statistic(np.concatenate(drawn, axis=-1))

    def ends(self, statistics: NDArray[np.float64], runs: int | None = None) -> tuple[float, float]:
        """Percentile interval of resampled statistics; (NaN, NaN) without any.

        With the number n of independent runs behind them it is the expanded percentile interval (Hesterberg 2015, "What
        Teachers Should Know About the Bootstrap", section 5.3): of few runs the bootstrap's spread is too small by the
        root of (n - 1) / n and its tails are a normal's rather than Student's, so its quantiles are moved outwards.
        """
        if not len(statistics):
            return np.nan, np.nan
        tail = (1.0 - self.confidence) / 2.0
        if runs is not None:
            tail = float(special.ndtr(np.sqrt(runs / (runs - 1)) * special.stdtrit(runs - 1, tail)))
        low, high = np.quantile(statistics, (tail, 1.0 - tail))
        return float(low), float(high)

    def interval(self, trials: NDArray, numerators: NDArray, denominators: NDArray) -> tuple[float, float]:
        """Expanded percentile interval of sum(numerators) / sum(denominators), resampling trials and not windows.

        One entry of each array per window. Windows of a trial resemble each other, so only trials count as independent:
        of fewer than MIN_TRIALS the interval is (NaN, NaN), as where an entry is not finite. Resamples whose
        denominators sum to 0 are left out.
        """
        _, group = np.unique(trials, return_inverse=True)
        num_trials = int(group.max(initial=-1)) + 1
        if num_trials < MIN_TRIALS or not (np.isfinite(numerators).all() and np.isfinite(denominators).all()):
            return np.nan, np.nan
        sums_2N = np.stack([np.bincount(group, weights=weights) for weights in (numerators, denominators)])
        numerators_R, denominators_R = self.resample(sums_2N, statistic=lambda runs: runs.sum(axis=-1))
        valid_R = denominators_R != 0
        return self.ends(numerators_R[valid_R] / denominators_R[valid_R], num_trials)

    def band(self, curves_NG: NDArray, statistic: Statistic = interquartile_mean) -> NDArray[np.float64]:
        """Interval of a statistic over N curves at each of G points; (2, G)."""
        return np.array([self.ends(self.resample(runs_N, statistic=statistic)) for runs_N in curves_NG.T]).T


def by(table: Table, *columns: str) -> Iterator[tuple[tuple, Table]]:
    """Cut a table into the groups of equal values in some columns, in the values' order: (values, rows)."""
    if not len(table[columns[0]]):
        return
    coded = [_coded(table[column]) for column in columns]
    groups = np.ravel_multi_index([codes for _, codes in coded], [len(unique) for unique, _ in coded])
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        values = tuple(np.asarray(table[column][rows[0]]).item() for column in columns)
        yield values, {name: column[rows] for name, column in table.items()}


def _coded(column: NDArray) -> tuple[NDArray, NDArray]:
    """Values of a column, ascending, and each row's index among them; numpy alone sorts strings a hundred times
    slower."""
    if column.dtype.kind not in "OU":
        return np.unique(column, return_inverse=True)
    encoded = pa.array(column).dictionary_encode()
    values, indices = np.unique(encoded.dictionary.to_numpy(zero_copy_only=False), return_inverse=True)
    return values, indices[encoded.indices.to_numpy()]


def wpe(table: Table) -> float:
    """WPE (Section 4): squared error per weight, mean over windows."""
    return _ratio((table["squared_error"] / table["num_weights"]).sum(), len(table["squared_error"]))


def skill(table: Table) -> float:
    """1 - squared error / squared error of copying the last snapshot: 1 is perfect, 0 is copying; NaN for 0 / 0."""
    return 1.0 - _ratio(table["squared_error"].sum(), table["displacement_squared"].sum())


def repw(table: Table) -> float:
    """REPW (Section 4): absolute difference of mean returns, mean over the windows whose policies were run."""
    return _mean(np.abs(_return_error(table)))


def repw_signed(table: Table) -> float:
    """As `repw`, with the difference's sign: positive where predicted policies return more than the true ones."""
    return _mean(_return_error(table))


def noise_floor(table: Table) -> float:
    """REPW of the true policy against itself on other evaluation seeds: what a perfect forecast would still show."""
    return _mean(np.abs(table["return_true"] - table["return_true_again"]))


def beats_last(table: Table) -> float:
    """Share of the windows run in which the predicted policy returns more than the context's last; ties count half."""
    difference = table["return_predicted"] - table["return_last"]
    return _mean(np.where(np.isnan(difference), np.nan, 0.5 * (1.0 + np.sign(difference))))


def summarise(table: Table, resampling: Resampling, trained_on: str) -> list[dict]:
    """One row per task, predictor, basis and step: every figure with its interval over trials.

    A predictor of several seeds is judged by the mean over them, and `skill_over_seeds` is their standard deviation.
    """
    rows = []
    for values, group in by(table, *GROUP):
        task, *line = values
        errors, trials = np.abs(_return_error(group)), group["trial"]
        run = ~np.isnan(errors)
        seeds = [skill(part) for _, part in by(group, "predictor_seed")]
        repw_low, repw_high = resampling.interval(trials[run], errors[run], np.ones(run.sum()))
        rows.append(
            {
                "task": task,
                "trained_on": trained_on,
                **dict(zip(GROUP[1:], line, strict=True)),
                **_skill_with_interval(group, resampling),
                "wpe": wpe(group),
                "repw": repw(group),
                "repw_low": repw_low,
                "repw_high": repw_high,
                "repw_signed": repw_signed(group),
                "repw_noise_floor": noise_floor(group),
                "beats_last": beats_last(group),
                "returns_spread": _spread(group, "return_predicted"),
                "returns_spread_true": _spread(group, "return_true"),
                "distance": _mean(group["distance_predicted"]),
                "distance_true": _mean(group["distance_true"]),
                "seeds": len(seeds),
                "skill_over_seeds": _deviation(np.array(seeds), ddof=1),
                "windows": len(trials) // len(seeds),
                "trials": len(np.unique(trials)),
            }
        )
    return rows


def group_skills(table: Table, resampling: Resampling) -> list[dict]:
    """Skill with its interval, first per phase, then per third of training, for every predictor, basis and step."""
    return [
        {
            "group": column,
            **dict(zip((*GROUP, "value"), values, strict=True)),
            **_skill_with_interval(group, resampling),
            "windows": len(group["trial"]),
            "displacement_squared": float(group["displacement_squared"].sum()),
            "trials": len(np.unique(group["trial"])),
        }
        for column in ("phase", "third")
        for values, group in by(table, *GROUP, column)
    ]


def trial_skills(table: Table) -> list[dict]:
    """Skill of each trial, for every predictor, basis and step, with the sums of squares that it is made of."""
    return [
        {
            **dict(zip((*GROUP, "trial"), values, strict=True)),
            "skill": skill(group),
            "squared_error": float(group["squared_error"].sum()),
            "displacement_squared": float(group["displacement_squared"].sum()),
            "windows": len(group["trial"]),
        }
        for values, group in by(table, *GROUP, "trial")
    ]


def compare(table: Table, predictor: str, resampling: Resampling) -> list[dict]:
    """One predictor's skill less each other's, per step, overall and by phase and third, on the same windows.

    The interval is that of the difference itself: trials are resampled for both predictors at once.
    """
    rows = []
    for group, columns in (("all", ()), ("phase", ("phase",)), ("third", ("third",))):
        parts = [(values, part) for values, part in by(table, "task", "step", *columns)]
        for (task, step, *value), part in parts:
            own = _errors_by_window(part, predictor)
            for other in sorted(set(part["predictor"].tolist()) - {predictor}):
                theirs = _errors_by_window(part, other)
                low, high = resampling.interval(own["trial"], theirs["error"] - own["error"], own["displacement"])
                difference = _ratio((theirs["error"] - own["error"]).sum(), own["displacement"].sum())
                rows.append(
                    {
                        "task": task,
                        "group": group,
                        "value": value[0] if value else -1,
                        "predictor": predictor,
                        "against": other,
                        "step": step,
                        "skill_difference": difference,
                        "difference_low": low,
                        "difference_high": high,
                        "trials": len(np.unique(own["trial"])),
                    }
                )
    return rows


def number(row: Row, key: str) -> float:
    """A row's figure; NaN where there is none."""
    value = row.get(key)
    return math.nan if value is None or value == "" else float(value)


def numbers(rows: Sequence[Row], key: str) -> NDArray[np.float64]:
    """The figure of every row."""
    return np.array([number(row, key) for row in rows], dtype=np.float64)


def _errors_by_window(table: Table, predictor: str) -> Table:
    """Mean over the predictor's seeds, window by window."""
    rows = np.flatnonzero(table["predictor"] == predictor)
    rows = rows[np.lexsort((table["predictor_seed"][rows], table["start"][rows], table["trial"][rows]))]
    num_seeds = len(np.unique(table["predictor_seed"][rows]))
    columns = {"trial": "trial", "error": "squared_error", "displacement": "displacement_squared"}
    return {name: table[column][rows].reshape(-1, num_seeds).mean(axis=1) for name, column in columns.items()}


def _skill_with_interval(table: Table, resampling: Resampling) -> dict[str, float]:
    low, high = resampling.interval(table["trial"], table["squared_error"], table["displacement_squared"])
    return {"skill": skill(table), "skill_low": 1.0 - high, "skill_high": 1.0 - low}


def _spread(table: Table, column: str) -> float:
    """Standard deviation over the windows run; were it far less than the true policies', modes would have collapsed."""
    return _deviation(table[column][~np.isnan(table[column])], ddof=0)


def _deviation(values: NDArray, ddof: int) -> float:
    """Standard deviation; NaN of too few values, or where one is not finite."""
    return float(np.std(values, ddof=ddof)) if len(values) > ddof and np.isfinite(values).all() else np.nan


def _return_error(table: Table) -> NDArray:
    return table["return_predicted"] - table["return_true"]


def _mean(values: NDArray) -> float:
    known = values[~np.isnan(values)]
    return _ratio(known.sum(), len(known))


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float("nan")
