"""Contenders: PPO with fewer update epochs, with and without jumps, and how their learning curves are scored.

Knows what a contender is, which experiment it runs and what its curves say; runs nothing. Scores are rliable's
(arXiv 2108.13264): interquartile mean over trials, stratified bootstrap intervals.

Shapes: S trials (seeds) of a unit, I PPO iterations.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tipl_ray.accelerate.group_jumps import Jumps
from tipl_ray.accelerate.jumps import JumpSettings
from tipl_ray.config import Collect, Experiment
from tipl_ray.data.storage import join
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table, digest, identity
from tipl_ray.evaluate.metrics import Resampling, interquartile_mean
from tipl_ray.predict.bands import load_band
from tipl_ray.predict.gram import Question
from tipl_ray.predict.predictor import Combination, Predictor, Trials
from tipl_ray.predict.saved import combinations, save_predictor
from tipl_ray.registry import PREDICTORS

SHARES = (80, 90, 95)
"""Percents of the first contender's final return that are waited for."""
SMOOTHED = 5
"""Iterations that the curve is averaged over before it counts as having reached a return."""
FINAL_SHARE = 10
"""The final return is the mean over the last iterations, one in so many."""
TIPL = "tipl"

Row = dict[str, Any]


def collection_identity(collect: Collect) -> dict[str, Any]:
    """`identity`, with what earlier versions had in the digests of units and accelerations too."""
    return identity(collect) | {"trials_per_actor": 0, "physics_threads": 1}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A way to run PPO's updates."""

    name: str
    num_epochs: int
    predictor: str | None = None
    damping: float = 1.0
    networks: Literal["policy", "both"] = "policy"
    moments: Literal["kept", "reset"] = "kept"
    gate: bool = False

    @classmethod
    def parse(cls, name: str) -> "Contender":
        """The contender of a name such as `10`, `4+ridge` or `4+tipl:gate,x0.5`. Raises ValueError for another."""
        plan, _, options = name.partition(":")
        epochs, plus, predictor = plan.partition("+")
        known = [*combinations(), TIPL]
        if not epochs.isdecimal() or (plus and predictor not in known) or (options and not predictor):
            raise ValueError(
                f"accelerate.contenders: {name!r} is not EPOCHS or EPOCHS+PREDICTOR[:OPTION,...] with a predictor of "
                f"{known}"
            )
        made = cls(name=name, num_epochs=int(epochs), predictor=predictor or None)
        for option in filter(None, options.split(",")):
            if option == "gate":
                made = dataclasses.replace(made, gate=True)
            elif option == "reset":
                made = dataclasses.replace(made, moments="reset")
            elif option == "both":
                made = dataclasses.replace(made, networks="both")
            elif option.startswith("x") and option[1:].replace(".", "", 1).isdecimal():
                made = dataclasses.replace(made, damping=float(option[1:]))
            else:
                raise ValueError(f"accelerate.contenders: {name!r}: {option!r} is not gate, reset, both or xDAMPING")
        return made

    @property
    def learned(self) -> bool:
        """Whether its predictor was fitted on anything: some are rules."""
        if self.predictor in (None, TIPL):
            return self.predictor is not None
        return PREDICTORS.load(self.predictor).fit is not Predictor.fit

    def jump_settings(self, source: Experiment) -> JumpSettings:
        """How it jumps, if it does. Raises ValueError where no whole snapshots are left to predict."""
        skipped, size = source.ppo.num_epochs - self.num_epochs, source.collect.epochs_per_snapshot
        if skipped < size or skipped % size or self.num_epochs % size:
            raise ValueError(
                f"accelerate.contenders: {self.name!r} leaves {skipped} of {source.ppo.num_epochs} epochs to a "
                f"predictor of snapshots that are {size} epochs apart"
            )
        return JumpSettings(
            horizon=skipped // size,
            damping=self.damping,
            networks=self.networks,
            moments=self.moments,
            gate=self.gate,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A predictor at hand."""

    predictor: Combination
    digest: str
    """Of what its answers depend on."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A contender on all seeds of one kind, at one learning rate: what runs as one stack."""

    task: str
    env_steps: int
    contender: Contender
    learning_rate: float
    search: bool
    """Whether it runs the seeds that choose the learning rate, and not those that are reported."""

    def jumps(self, source: Experiment, predictors: Mapping[str, Fitted]) -> Jumps | None:
        """Its jumps. Raises ValueError where no whole snapshots are left to predict."""
        if self.contender.predictor is None:
            return None
        fitted = predictors[self.contender.predictor]
        settings = self.contender.jump_settings(source)
        return Jumps(settings=settings, predictor=fitted.predictor, digest=fitted.digest)

    def experiment(self, experiment: Experiment, jumps: Jumps | None) -> Experiment:
        """What it runs, in a storage of its own below the experiment's, named after nothing that says where it is."""
        settings, contender = experiment.accelerate, self.contender
        collect = dataclasses.replace(experiment.collect, task=self.task, total_env_steps=self.env_steps)
        if self.search:
            seeds = {"first_seed": settings.search_first_seed, "num_trials": settings.search_trials}
            collect = dataclasses.replace(collect, **seeds)  # type: ignore[arg-type]  # mypy: of all fields' types
        if contender.num_epochs % collect.epochs_per_snapshot:
            raise ValueError(
                f"collect.epochs_per_snapshot={collect.epochs_per_snapshot} does not divide the epochs of "
                f"accelerate.contenders {contender.name!r}"
            )
        ppo = dataclasses.replace(experiment.ppo, num_epochs=contender.num_epochs, learning_rate=self.learning_rate)
        made = dataclasses.replace(experiment, collect=collect, ppo=ppo)
        name = digest(*unit_table(made, jumps).values())
        return made.at(join(experiment.storage_path, "units", name))


def unit_table(experiment: Experiment, jumps: Jumps | None) -> dict[str, dict[str, Any]]:
    """What a unit's learning curves depend on; of its predictor the digest, and None where nothing jumps."""
    jump = jumps.header["jump"] if jumps else as_table(JumpSettings()) | {"predictor": None}
    return {"collect": collection_identity(experiment.collect), "ppo": identity(experiment.ppo), "jump": jump}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What is kept of a unit that has run."""

    unit: Unit
    returns_SI: NDArray[np.float64]
    """Mean return of the episodes that ended in each iteration; the last known where none did. NaN from where a trial
    diverged on: `comparable` says what that counts as."""
    env_steps_I: NDArray[np.int64]
    gradient_steps_I: NDArray[np.int64]
    """Adam steps up to the end of each iteration."""
    cpu_seconds: float
    """CPU time of all trials, predictor and writing of snapshots included."""
    jump_counts: list[int]
    """Jumps taken, dropped by the gate, and refused; empty without jumps."""
    num_diverged: int = 0
    """Trials that stopped being finite before their last iteration."""

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
        """Trials whose final return is below the best that they held over as many iterations by more than half of its
        size, and by more than half of what they had risen."""
        window = np.ones(self._tenth) / self._tenth
        held_SJ = np.array([np.convolve(returns_I, window, mode="valid") for returns_I in self.returns_SI])
        best_S = held_SJ.max(axis=1)
        return int((best_S - self.finals_S > 0.5 * np.maximum(np.abs(best_S), best_S - held_SJ[:, 0])).sum())

    def reached(self, target: float) -> int | None:
        """Iteration at whose end the interquartile mean, averaged over the last few iterations, first is there."""
        curve_I = interquartile_mean(self.returns_SI.T)
        smooth_I = np.convolve(curve_I, np.ones(SMOOTHED) / SMOOTHED, mode="full")[: len(curve_I)]
        there = np.flatnonzero(smooth_I[SMOOTHED - 1 :] >= target)
        return int(there[0]) + SMOOTHED - 1 if len(there) else None

    @property
    def _tenth(self) -> int:
        return max(1, self.returns_SI.shape[1] // FINAL_SHARE)


def filled(returns_SI: NDArray[np.float64]) -> NDArray[np.float64]:
    """Curves without gaps: the last known return, before the first the first. Raises ValueError for an empty one."""
    result_SI = returns_SI.copy()
    for returns_I in result_SI:
        known = np.flatnonzero(~np.isnan(returns_I))
        if not len(known):
            raise ValueError("no episode ended in a trial: its learning curve is empty")
        latest_I = np.searchsorted(known, np.arange(len(returns_I)), side="right") - 1
        returns_I[:] = returns_I[known[np.maximum(latest_I, 0)]]
    return result_SI


def comparable(finished: Sequence[Finished]) -> list[Finished]:
    """Units with whole curves: from where a trial diverged on, the lowest return that any of them had on its task.

    NaN where none of them had any.
    """
    whole = []
    for one in finished:
        own = [other.returns_SI for other in finished if other.unit.task == one.unit.task]
        known = [returns_SI[~np.isnan(returns_SI)] for returns_SI in own]
        worst = min((float(values.min()) for values in known if len(values)), default=np.nan)
        whole.append(dataclasses.replace(one, returns_SI=np.where(np.isnan(one.returns_SI), worst, one.returns_SI)))
    return whole


def jump_question(source: Experiment, horizon: int) -> Question:
    """What predictors of another experiment's snapshots are asked in a jump over `horizon` of them."""
    return Question(
        context=source.model.context,
        steps=tuple(range(1, horizon + 1)),
        snapshots_per_iteration=source.snapshots_per_iteration,
    )


def save_rules(question: Question, names: Sequence[str], folder: str) -> None:
    """Write predictors that learn nothing. One folder each, for `saved.load_predictor`."""
    for name in names:
        save_predictor(PREDICTORS.load(name)(question), join(folder, name), {})


def fit_and_save(source: Experiment, horizon: int, names: Sequence[str], folder: str) -> None:
    """Fit predictors on the training trials of another experiment, their settings on its validation trials.

    Its test trials are not opened, and trials that diverged are left out. One folder each, for
    `saved.load_predictor`.
    """
    question, store = jump_question(source, horizon), TrajectoryStore(source.storage_path)
    training, validation = (
        Trials(bands=[load_band(source.storage_path, seed, question) for seed in seeds], weights=lambda: [])
        for seeds in map(store.sound, (source.train_seeds, source.validation_seeds))
    )
    about = {"trained_on": source.collect.task, "data": store.digest(source.train_seeds)}
    for name in names:
        predictor = PREDICTORS.load(name)(question)
        predictor.fit(training, validation)
        save_predictor(predictor, join(folder, name), about)


def best_learning_rate(searched: Sequence[Finished]) -> float:
    """The one whose trials of the search have the largest mean area under the curve; the lowest, if all diverged."""
    return max(comparable(searched), key=lambda one: np.nan_to_num(one.areas_S.mean(), nan=-np.inf)).unit.learning_rate


def search_rows(searched: Sequence[Finished]) -> list[Row]:
    """What the search saw: one row per task, contender and learning rate, areas under the curve over its trials."""
    rows = []
    for task, env_steps, contender in dict.fromkeys(
        (one.unit.task, one.unit.env_steps, one.unit.contender) for one in searched
    ):
        cell = (task, env_steps, contender)
        own = comparable([one for one in searched if (one.unit.task, one.unit.env_steps, one.unit.contender) == cell])
        best = best_learning_rate(own)
        for one in own:
            rows.append(
                {
                    "task": task,
                    "env_steps": int(one.env_steps_I[-1]),
                    "contender": contender.name,
                    "predictor": contender.predictor or "none",
                    "learning_rate": one.unit.learning_rate,
                    "seeds": len(one.areas_S),
                    "auc": float(one.areas_S.mean()),
                    "auc_least": float(one.areas_S.min()),
                    "auc_most": float(one.areas_S.max()),
                    "diverged": one.num_diverged,
                    "chosen": one.unit.learning_rate == best,
                }
            )
    return rows


def score(finished: Sequence[Finished], trained_on: str, resampling: Resampling) -> list[Row]:
    """The result table: one row per task and contender, in their order; the first contender of a task is its reference.

    A difference's interval resamples both contenders' trials on their own; with too few trials to tell anything there
    is none. `less_plain` compares jumps with the first contender without, `less_ridge` TIPL's with the ridge's.
    """
    rows = []
    for task, env_steps in dict.fromkeys((one.unit.task, one.unit.env_steps) for one in finished):
        own = [one for one in finished if (one.unit.task, one.unit.env_steps) == (task, env_steps)]
        reference = own[0]
        plain = next((one for one in own[1:] if one.unit.contender.predictor is None), None)
        ridge = next((one for one in own if one.unit.contender.name.endswith("+ridge")), None)
        for one in own:
            contender = one.unit.contender
            others = {
                "auc_less_first": reference,
                "auc_less_plain": plain if contender.predictor else None,
                "auc_less_ridge": ridge if contender.name.endswith("+tipl") else None,
            }
            counts = dict(zip(("taken", "gated", "refused"), one.jump_counts or [0, 0, 0], strict=True))
            rows.append(
                {
                    "task": task,
                    "contender": contender.name,
                    "predictor": contender.predictor or "none",
                    "predictor_trained_on": trained_on if contender.learned else "none",
                    "epochs": contender.num_epochs,
                    "learning_rate": one.unit.learning_rate,
                    "seeds": len(one.returns_SI),
                    "env_steps": int(one.env_steps_I[-1]),
                    **_with_interval("auc", [one.areas_S], resampling),
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


def over_tasks(finished: Sequence[Finished], resampling: Resampling) -> list[Row]:
    """Area under the curve as a share of each task's first contender's, over all tasks at once; one row a contender.

    Over the tasks alone where the first contender's area is clearly above 0: of another there are no shares.
    """
    references: dict[tuple[str, int], Finished] = {}
    for one in finished:
        references.setdefault((one.unit.task, one.unit.env_steps), one)
    tasks = [key for key, one in references.items() if _with_interval("auc", [one.areas_S], resampling)["auc_low"] > 0]
    names = dict.fromkeys(one.unit.contender.name for one in finished)
    rows = []
    for name in names:
        strata = []
        for key in tasks:
            own = [one for one in finished if (one.unit.task, one.unit.env_steps) == key]
            strata += [one.areas_S / _middle(own[0].areas_S) for one in own if one.unit.contender.name == name]
        if tasks and len(strata) == len(tasks):
            rows.append({"contender": name, "tasks": len(tasks), **_with_interval("share", strata, resampling)})
    return rows


def sentences(rows: Sequence[Row], confidence: float) -> list[str]:
    """What the table says, contender by contender, where it does not help as plainly as where it does."""
    lines = []
    for task, env_steps in dict.fromkeys((row["task"], row["env_steps"]) for row in rows):
        own = [row for row in rows if (row["task"], row["env_steps"]) == (task, env_steps)]
        first = own[0]
        for row in own[1:]:
            share = row["gradient_steps"] / first["gradient_steps"]
            lines.append(
                f"{task}, {env_steps:,} env steps: {row['contender']} with {share:.0%} of the gradient steps of "
                f"{first['contender']} has an area under the curve of {row['auc']:.0f} against {first['auc']:.0f}, "
                f"{_verdict(row, 'auc_less_first', ('more', 'less'))} {_grounds(row, 'auc_less_first', confidence)}."
            )
        plain = [row for row in own if row["predictor"] == "none" and row is not first]
        ridge = [row for row in own if row["contender"].endswith("+ridge")]
        tipl = [row for row in own if row["contender"].endswith("+tipl")]
        if ridge and tipl:
            row, apart = tipl[0], tipl[0]["auc_less_ridge"]
            verdict = _verdict(row, "auc_less_ridge", ("better", "worse"))
            decided = verdict in ("better", "worse")
            words = f"is {verdict} than the ridge, by {abs(apart):.0f}" if decided else f"against the ridge: {verdict}"
            lines.append(
                f"{task}, {env_steps:,} env steps: TIPL {words} {_grounds(row, 'auc_less_ridge', confidence)}."
            )
        for row in own:
            if row["predictor"] != "none" and plain and row["auc"] <= plain[0]["auc"]:
                verdict = _verdict(row, "auc_less_plain", ("more", "less"))
                words = "does not help" if verdict == "less" else f"shows no help, {verdict}"
                lines.append(
                    f"{task}, {env_steps:,} env steps: {row['contender']} {words}: without jumps "
                    f"{plain[0]['contender']} has {plain[0]['auc']:.0f}, with them {row['auc']:.0f} "
                    f"{_grounds(row, 'auc_less_plain', confidence)}."
                )
        lines += [
            f"{task}, {env_steps:,} env steps: {row['diverged']} of {row['seeds']} trials of {row['contender']} "
            "diverged; from there on they count as the lowest return of any trial on the task."
            for row in own
            if row["diverged"]
        ]
    return lines


def sentences_over_tasks(together: Sequence[Row], num_tasks: int) -> list[str]:
    """What `over_tasks` found, a sentence for each contender, of so many tasks in all."""
    lines = []
    if not together or together[0]["tasks"] < num_tasks:
        lines.append(
            "Tasks where the area of the first contender is not clearly above 0 are compared by differences alone."
        )
    return lines + [
        f"Over {row['tasks']} of {num_tasks} tasks, {row['contender']}: {row['share']:.3f} of the first contender's "
        f"area [{row['share_low']:.3f}, {row['share_high']:.3f}]."
        for row in together
    ]


def _verdict(row: Row, name: str, words: tuple[str, str]) -> str:
    """Words for a difference above and below 0, where it is told apart from 0."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if np.isnan(low):
        return "too few trials to tell"
    return words[0] if low > 0 else words[1] if high < 0 else "no significant difference"


def _grounds(row: Row, name: str, confidence: float) -> str:
    """What a verdict rests on."""
    interval = ""
    if not np.isnan(row[f"{name}_low"]):
        interval = f"{confidence:.0%} interval {row[f'{name}_low']:+.0f} to {row[f'{name}_high']:+.0f}, "
    return f"(difference {row[name]:+.0f}, {interval}over {row[f'{name}_trials']} trials)"


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Cells of the result table: what was chosen, areas and final returns with intervals, steps to 90%."""
    return [
        {
            "task": row["task"],
            "env steps": f"{row['env_steps']:,}",
            "contender": row["contender"],
            "learning rate": f"{row['learning_rate']:g}",
            "area under the curve": _bracketed(row, "auc"),
            "less the first": _bracketed(row, "auc_less_first", "+"),
            "final return": _bracketed(row, "final_return"),
            "gradient steps": f"{row['gradient_steps']:,}",
            "env steps to 90%": f"{row['env_steps_to_90']:,}" if row["env_steps_to_90"] else "not reached",
            "CPU s a trial": f"{row['seconds']:.1f}",
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


def _middle(values: NDArray[np.float64]) -> float:
    return float(interquartile_mean(values))


def _with_interval(name: str, strata: Sequence[NDArray[np.float64]], resampling: Resampling) -> Row:
    """The interquartile mean over all runs of all strata, one for each task."""
    low, high = resampling.ends(resampling.resample(*strata))
    return {name: _middle(np.concatenate(strata)), f"{name}_low": low, f"{name}_high": high}


def _difference(name: str, one: Finished, other: Finished | None, resampling: Resampling) -> Row:
    """Of two contenders' areas, with the trials that it rests on; None where there is no other."""
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
    if np.isnan(row[f"{name}_low"]):
        return f"{row[name]:{sign}.0f}"
    return f"{row[name]:{sign}.0f} [{row[f'{name}_low']:{sign}.0f}, {row[f'{name}_high']:{sign}.0f}]"
