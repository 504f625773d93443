"""Scores of PPO's variants: learning curves, areas under them, and comparisons of variants.

Scores are rliable's (arXiv 2108.13264): interquartile mean over trials, stratified bootstrap intervals, probability of
improvement. Knows learning curves and their variants; runs nothing.

Shapes: S trials (seeds) of a unit, I PPO iterations, R resamples.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from tipl_ray.accelerate.contenders import Unit, is_learned
from tipl_ray.config import Contender
from tipl_ray.data.snapshots import last_known
from tipl_ray.evaluate.metrics import MIN_TRIALS, Resampling, interquartile_mean

SHARES = (80, 90, 95)
"""Percentages of the first variant's final return that the time to is measured."""
SMOOTHED = 5
"""Iterations in the moving average that has to reach a return."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The results of a finished unit."""

    unit: Unit
    returns_SI: NDArray[np.float64]
    """Mean return of the episodes that ended in each iteration, or the last known one if none did. NaN from the
    iteration in which a trial diverged; `comparable` fills these in."""
    env_steps_I: NDArray[np.int64]
    gradient_steps_I: NDArray[np.int64]
    """Gradient steps up to the end of each iteration, summed over replicas, mean over trials."""
    epochs: int
    """Update epochs per iteration, including corrective ones; the maximum if they may end early."""
    cpu_seconds: float
    """CPU time of all trials, including the predictor and writing snapshots."""
    jump_counts: list[int]
    """Jumps taken, dropped by the gate, and refused; empty without jumps."""
    num_diverged: int = 0
    """Trials that diverged (became non-finite) before their last iteration."""

    @property
    def areas_S(self) -> NDArray[np.float64]:
        """Area under each trial's curve of returns, per environment step."""
        return self.returns_SI.mean(axis=1)

    @property
    def finals_S(self) -> NDArray[np.float64]:
        """Mean return of each trial over its last iterations."""
        return self.returns_SI[:, -self._tenth :].mean(axis=1)

    @property
    def num_collapsed(self) -> int:
        """Number of collapsed trials: the final return is below the best mean over as many iterations by more than half
        of that best's absolute value, and by more than half of the rise up to it."""
        window = np.ones(self._tenth) / self._tenth
        held_SJ = np.array([np.convolve(returns_I, window, mode="valid") for returns_I in self.returns_SI])
        best_S = held_SJ.max(axis=1)
        return int((best_S - self.finals_S > 0.5 * np.maximum(np.abs(best_S), best_S - held_SJ[:, 0])).sum())

    def reached(self, target: float) -> int | None:
        """Index of the first iteration whose moving average of the interquartile mean reaches a return, or None."""
        curve_I = interquartile_mean(self.returns_SI.T)
        smooth_I = np.convolve(curve_I, np.ones(SMOOTHED) / SMOOTHED, mode="full")[: len(curve_I)]
        there = np.flatnonzero(smooth_I[SMOOTHED - 1 :] >= target)
        return int(there[0]) + SMOOTHED - 1 if len(there) else None

    @property
    def _tenth(self) -> int:
        return final_iterations(self.returns_SI.shape[1])


def final_iterations(num_iterations: int) -> int:
    """Iterations at a trial's end whose mean return is its final return: a tenth of all, and at least one."""
    return max(1, num_iterations // 10)


def filled(returns_SI: NDArray[np.float64]) -> NDArray[np.float64]:
    """Curves without gaps: the last known return, or before the first known one that one. Raises ValueError for an
    empty curve."""
    known_SI = ~np.isnan(returns_SI)
    if not known_SI.any(axis=1).all():
        raise ValueError("no episode ended in a trial, so its learning curve is empty")
    first_S1 = np.take_along_axis(returns_SI, known_SI.argmax(axis=1)[:, None], axis=1)
    latest_SI = last_known(returns_SI)
    return np.where(np.isnan(latest_SI), first_S1, latest_SI)


def comparable(finished: Sequence[Finished]) -> list[Finished]:
    """Units with complete curves: after a divergence, the lowest return of any of these units on the task, over as many
    steps.

    NaN if none of them has a return.
    """
    whole = []
    for one in finished:
        cell = (one.unit.task, one.unit.env_steps)
        own = [other.returns_SI for other in finished if (other.unit.task, other.unit.env_steps) == cell]
        known = [returns_SI[~np.isnan(returns_SI)] for returns_SI in own]
        worst = min((float(values.min()) for values in known if len(values)), default=np.nan)
        whole.append(dataclasses.replace(one, returns_SI=np.where(np.isnan(one.returns_SI), worst, one.returns_SI)))
    return whole


def best_value(searched: Sequence[Finished]) -> float:
    """The setting that the search chooses for a variant: the best mean rank over the search tasks, ranked by mean area
    under the curve.

    Ties are broken by the area scaled from each task's worst to its best setting, then by the lower value. A setting
    whose trials all diverged ranks last.
    """
    values = sorted({one.unit.value for one in searched})
    ranks, shares = np.zeros(len(values)), np.zeros(len(values))
    for task in dict.fromkeys((one.unit.task, one.unit.env_steps) for one in searched):
        own = comparable([one for one in searched if (one.unit.task, one.unit.env_steps) == task])
        areas = np.array([next(one for one in own if one.unit.value == value).areas_S.mean() for value in values])
        areas = np.where(np.isnan(areas), np.nanmin(areas, initial=0.0), areas)
        ranks += rankdata(-areas)
        shares += (areas - areas.min()) / (np.ptp(areas) or 1.0)
    return min(zip(ranks, -shares, values, strict=True))[2]


def search_rows(searched: Sequence[Finished], chosen: Collection[Unit]) -> list[Row]:
    """Results of the search: one row per task, variant and setting, with areas under the curve over its trials."""
    rows = []
    for task, env_steps, contender in dict.fromkeys(
        (one.unit.task, one.unit.env_steps, one.unit.contender) for one in searched
    ):
        cell = (task, env_steps, contender)
        own = comparable([one for one in searched if (one.unit.task, one.unit.env_steps, one.unit.contender) == cell])
        for one in own:
            rows.append(
                {
                    "task": task,
                    "env_steps": int(one.env_steps_I[-1]),
                    "contender": contender.name,
                    "predictor": predictor_of(contender),
                    "searched": contender.searched,
                    "value": one.unit.value,
                    "seeds": len(one.areas_S),
                    "auc": float(one.areas_S.mean()),
                    "auc_least": float(one.areas_S.min()),
                    "auc_most": float(one.areas_S.max()),
                    "diverged": one.num_diverged,
                    "chosen": one.unit in chosen,
                }
            )
    return rows


def predictor_of(contender: Contender) -> str:
    """Name of the predictor that it jumps with, or `none`."""
    return contender.jump.predictor if contender.jump else "none"


def score(
    finished: Sequence[Finished], trained_on: str, resampling: Resampling, searched_on: Collection[str] = ()
) -> list[Row]:
    """The result table: one row per task and variant, in order; the first variant of a task is its reference.

    `held_out` marks tasks that are not in `searched_on`, if one setting was chosen on those for all tasks; a variant
    with settings of its own for each task has none.

    The interval of a difference resamples the trials of both variants independently; with too few trials there is none.
    `less_plain` compares jumps with the first variant without jumps, other than the reference, and `less_ridge`
    compares TIPL's jumps with ridge's.
    """
    rows = []
    for task, env_steps in dict.fromkeys((one.unit.task, one.unit.env_steps) for one in finished):
        own = [one for one in finished if (one.unit.task, one.unit.env_steps) == (task, env_steps)]
        reference = own[0]
        clear, unknown = _is_clear(reference, resampling), dict.fromkeys(("share", "share_low", "share_high"))
        plain = next((one for one in own[1:] if not one.unit.contender.jump), None)
        ridge = next((one for one in own if predictor_of(one.unit.contender) == "ridge"), None)
        for one in own:
            contender = one.unit.contender
            others = {
                "auc_less_first": reference,
                "auc_less_plain": plain if contender.jump else None,
                "auc_less_ridge": ridge if predictor_of(contender) == "tipl" else None,
            }
            counts = dict(zip(("taken", "gated", "refused"), one.jump_counts or [0, 0, 0], strict=True))
            rows.append(
                {
                    "task": task,
                    "contender": contender.name,
                    "hyperparameters": one.unit.hyperparameters,
                    "predictor": predictor_of(contender),
                    "predictor_trained_on": trained_on if is_learned(contender) else "none",
                    "held_out": bool(searched_on) and task not in searched_on and not contender.per_task,
                    "epochs": one.epochs,
                    "seeds": len(one.returns_SI),
                    "env_steps": int(one.env_steps_I[-1]),
                    **_with_interval("auc", [one.areas_S], resampling),
                    **(_share([one], [reference], resampling) if clear else unknown),
                    **{
                        key: value
                        for name, other in others.items()
                        for key, value in _difference(name, one, other, resampling).items()
                    },
                    **_with_interval("final_return", [one.finals_S], resampling),
                    "gradient_steps": int(one.gradient_steps_I[-1]),
                    **_waited(one, _middle(reference.finals_S)),
                    "seconds": one.cpu_seconds / len(one.returns_SI),
                    "collapsed": one.num_collapsed,
                    "diverged": one.num_diverged,
                    **{f"jumps_{name}": count for name, count in counts.items()},
                }
            )
    return rows


def over_tasks(finished: Sequence[Finished], resampling: Resampling, searched_on: Collection[str] = ()) -> list[Row]:
    """Areas under the curve relative to the first variant's, over tasks: one row per variant for all tasks, and one for
    held-out tasks if there are any.

    Covers only tasks on which the first variant's area is clearly above 0. `better` is the probability that a trial has
    a larger area than a trial of the first variant on the same task, mean over tasks.
    """
    references: dict[tuple[str, int], Finished] = {}
    for one in finished:
        references.setdefault((one.unit.task, one.unit.env_steps), one)
    clear = [key for key, one in references.items() if _is_clear(one, resampling)]
    scopes = {"all tasks": clear, "held-out tasks": [key for key in clear if key[0] not in searched_on]}
    if not searched_on:
        del scopes["held-out tasks"]
    rows = []
    for scope, tasks in scopes.items():
        for name in dict.fromkeys(one.unit.contender.name for one in finished):
            mine = {(one.unit.task, one.unit.env_steps): one for one in finished if one.unit.contender.name == name}
            if scope == "held-out tasks" and any(one.unit.contender.per_task for one in mine.values()):
                continue
            if not tasks or not set(tasks) <= set(mine):
                continue
            own, firsts = [mine[key] for key in tasks], [references[key] for key in tasks]
            steps = [
                one.gradient_steps_I[-1] / first.gradient_steps_I[-1] for one, first in zip(own, firsts, strict=True)
            ]
            rows.append(
                {
                    "scope": scope,
                    "contender": name,
                    "tasks": len(tasks),
                    **_share(own, firsts, resampling),
                    **_better(own, firsts, resampling),
                    "share_of_gradient_steps": float(np.mean(steps)),
                }
            )
    return rows


def _is_clear(first: Finished, resampling: Resampling) -> bool:
    """Whether a first variant's area is clearly above 0, so that others can be divided by it: of too few trials for an
    interval, the area of each."""
    low = _with_interval("auc", [first.areas_S], resampling)["auc_low"]
    return bool((first.areas_S.min() if np.isnan(low) else low) > 0)


def _share(own: Sequence[Finished], firsts: Sequence[Finished], resampling: Resampling) -> Row:
    """Interquartile mean over all runs of all tasks of the area relative to the task's first variant; both are
    resampled."""
    strata = [one.areas_S / _middle(first.areas_S) for one, first in zip(own, firsts, strict=True)]
    drawn = [
        areas_RS / interquartile_mean(firsts_RS)[:, None] for areas_RS, firsts_RS in _drawn(own, firsts, resampling)
    ]
    low, high = _ends(
        [one.areas_S for one in (*own, *firsts)], interquartile_mean(np.concatenate(drawn, axis=1)), resampling
    )
    return {"share": _middle(np.concatenate(strata)), "share_low": low, "share_high": high}


def _better(own: Sequence[Finished], firsts: Sequence[Finished], resampling: Resampling) -> Row:
    """Probability of improvement over the first variant, mean over tasks; ties count half."""

    def probability(areas_RS: NDArray[np.float64], firsts_RS: NDArray[np.float64]) -> NDArray[np.float64]:
        apart = np.sign(areas_RS[:, :, None] - firsts_RS[:, None, :])
        return 0.5 * (1.0 + apart.mean(axis=(1, 2)))

    pairs = [(one.areas_S[None], first.areas_S[None]) for one, first in zip(own, firsts, strict=True)]
    drawn_R = np.mean([probability(*pair) for pair in _drawn(own, firsts, resampling)], axis=0)
    low, high = _ends([one.areas_S for one in (*own, *firsts)], drawn_R, resampling)
    return {
        "better": float(np.mean([probability(*pair) for pair in pairs])),
        "better_low": low,
        "better_high": high,
    }


def _drawn(
    own: Sequence[Finished], firsts: Sequence[Finished], resampling: Resampling
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Resampled areas (R, S) of some units and of their tasks' first ones, each unit's on its own."""
    drawn = []
    for index, (one, first) in enumerate(zip(own, firsts, strict=True)):
        pair = []
        for place, unit in enumerate((one, first)):
            mine = dataclasses.replace(resampling, seed=resampling.seed + 1 + 2 * index + place)
            pair.append(mine.resample(unit.areas_S, statistic=lambda runs: runs))
        drawn.append((pair[0], pair[1]))
    return drawn


def sentences(rows: Sequence[Row], confidence: float) -> list[str]:
    """The findings of the table in sentences, variant by variant, negative ones as plainly as positive ones."""
    lines = []
    for task, env_steps in dict.fromkeys((row["task"], row["env_steps"]) for row in rows):
        own = [row for row in rows if (row["task"], row["env_steps"]) == (task, env_steps)]
        first = own[0]
        for row in own[1:]:
            share = row["gradient_steps"] / (first["gradient_steps"] or math.nan)
            lines.append(
                f"{task}, {env_steps:,} env steps: {row['contender']}, with {share:.0%} of the gradient steps of "
                f"{first['contender']}, has an area under the curve of {row['auc']:.0f} vs. {first['auc']:.0f}: "
                f"{_verdict(row, 'auc_less_first', ('higher', 'lower'))} {_grounds(row, 'auc_less_first', confidence)}."
            )
        plain = [row for row in own if row["predictor"] == "none" and row is not first]
        ridge = [row for row in own if row["predictor"] == "ridge"]
        tipl = [row for row in own if row["predictor"] == "tipl"]
        if ridge and tipl:
            row, apart = tipl[0], tipl[0]["auc_less_ridge"]
            verdict = _verdict(row, "auc_less_ridge", ("better", "worse"))
            decided = verdict in ("better", "worse")
            words = f"is {verdict} than ridge by {abs(apart):.0f}" if decided else f"vs. ridge: {verdict}"
            lines.append(
                f"{task}, {env_steps:,} env steps: TIPL {words} {_grounds(row, 'auc_less_ridge', confidence)}."
            )
        for row in own:
            if row["predictor"] != "none" and plain and row["auc"] <= plain[0]["auc"]:
                verdict = _verdict(row, "auc_less_plain", ("higher", "lower"))
                words = "does not help" if verdict == "lower" else f"shows no benefit, {verdict}"
                lines.append(
                    f"{task}, {env_steps:,} env steps: {row['contender']} {words}: its area is {row['auc']:.0f} vs. "
                    f"{plain[0]['auc']:.0f} for {plain[0]['contender']} without jumps "
                    f"{_grounds(row, 'auc_less_plain', confidence)}."
                )
        lines += [
            f"{task}, {env_steps:,} env steps: {row['diverged']} of {row['seeds']} trials of {row['contender']} "
            "diverged; from then on they are given the lowest return of any trial on the task."
            for row in own
            if row["diverged"]
        ]
    return lines


def sentences_over_tasks(together: Sequence[Row], num_tasks: int) -> list[str]:
    """The findings of `over_tasks` in sentences, one per variant; `num_tasks` is the number of all tasks."""
    lines = []
    if not together or together[0]["tasks"] < num_tasks:
        lines.append(
            "Tasks on which the area of the first variant is not clearly above 0 are compared by differences only."
        )
    return lines + [
        f"Over {row['tasks']} of {num_tasks} tasks ({row['scope']}), {row['contender']}: {row['share']:.3f} of the "
        f"first variant's area{_in_brackets(row, 'share', '.3f')} with "
        f"{row['share_of_gradient_steps']:.0%} of its gradient steps; better with probability "
        f"{row['better']:.2f}{_in_brackets(row, 'better', '.2f')}."
        for row in together
    ]


def _verdict(row: Row, name: str, words: tuple[str, str]) -> str:
    """The word for a difference above or below 0, or that it is not significant."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if np.isnan(low):
        return "too few trials to tell"
    return words[0] if low > 0 else words[1] if high < 0 else "no significant difference"


def _grounds(row: Row, name: str, confidence: float) -> str:
    """The numbers behind a verdict, in brackets."""
    interval = ""
    if not np.isnan(row[f"{name}_low"]):
        interval = f"{confidence:.0%} interval {row[f'{name}_low']:+.0f} to {row[f'{name}_high']:+.0f}, "
    return f"(difference {row[name]:+.0f}, {interval}over {row[f'{name}_trials']} trials)"


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Cells of the result table: chosen setting, areas and final returns with intervals, steps to 90%."""
    return [
        {
            "task": row["task"],
            "env steps": f"{row['env_steps']:,}",
            "variant": row["contender"],
            "chosen": row["hyperparameters"],
            "area under the curve": _bracketed(row, "auc"),
            "vs. first": _bracketed(row, "auc_less_first", "+"),
            "final return": _bracketed(row, "final_return"),
            "gradient steps": f"{row['gradient_steps']:,}",
            "env steps to 90%": f"{row['env_steps_to_90']:,}" if row["env_steps_to_90"] else "not reached",
            "CPU s per trial": f"{row['seconds']:.1f}" if np.isfinite(row["seconds"]) else "not known",
            "collapsed": f"{row['collapsed']} of {row['seeds']}"
            + (f", {row['diverged']} diverged" if row["diverged"] else ""),
        }
        for row in rows
    ]


def _waited(one: Finished, final: float) -> Row:
    """Environment steps, gradient steps and CPU seconds of a trial to shares of a final return; None if never."""
    found: Row = {}
    for share in SHARES:
        # So far below the final return: a share of one that is negative would lie above it.
        at = one.reached(final - (1 - share / 100) * abs(final))
        seconds = one.cpu_seconds / len(one.returns_SI)
        found |= {
            f"env_steps_to_{share}": None if at is None else int(one.env_steps_I[at]),
            f"gradient_steps_to_{share}": None if at is None else int(one.gradient_steps_I[at]),
            f"seconds_to_{share}": None if at is None else seconds * (at + 1) / len(one.env_steps_I),
        }
    return found


def _ends(
    strata: Sequence[NDArray[np.float64]], drawn_R: NDArray[np.float64], resampling: Resampling
) -> tuple[float, float]:
    """The interval of what was resampled from some units' trials; (NaN, NaN) where one of them has fewer than
    MIN_TRIALS."""
    return resampling.ends(drawn_R if min(map(len, strata)) >= MIN_TRIALS else drawn_R[:0])


def _middle(values: NDArray[np.float64]) -> float:
    return float(interquartile_mean(values))


def _with_interval(name: str, strata: Sequence[NDArray[np.float64]], resampling: Resampling) -> Row:
    """The interquartile mean over all runs of all strata, one for each task."""
    low, high = _ends(strata, resampling.resample(*strata), resampling)
    return {name: _middle(np.concatenate(strata)), f"{name}_low": low, f"{name}_high": high}


def _difference(name: str, one: Finished, other: Finished | None, resampling: Resampling) -> Row:
    """Difference of two variants' areas, with the number of trials; None if there is no other variant."""
    if other is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high", f"{name}_trials"))
    numbers = [len(one.areas_S), len(other.areas_S)]
    low, high = np.nan, np.nan
    # Were they alike, all trials of one would still be above all of the other's so often, by luck alone.
    if 2 / math.comb(sum(numbers), numbers[0]) <= 1 - resampling.confidence:
        independent = dataclasses.replace(resampling, seed=resampling.seed + 1)
        low, high = resampling.ends(resampling.resample(one.areas_S) - independent.resample(other.areas_S))
    return {
        name: _middle(one.areas_S) - _middle(other.areas_S),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_trials": f"{numbers[0]}" if numbers[0] == numbers[1] else f"{numbers[0]} and {numbers[1]}",
    }


def _bracketed(row: Row, name: str, sign: str = "") -> str:
    return f"{row[name]:{sign}.0f}{_in_brackets(row, name, f'{sign}.0f')}"


def _in_brackets(row: Row, name: str, style: str) -> str:
    """The interval, after a space; nothing where there is none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if np.isnan(low) else f" [{low:{style}}, {high:{style}}]"
