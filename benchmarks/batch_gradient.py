"""How much more can be forecast by someone who also knows the batch? The weights do not contain the fresh rollout.

When a PPO iteration has just ended, the next displacements depend on a rollout that is not part of the trajectory. Here
ridge regression forecasts them from the context's displacements alone, and with up to three more vectors: the policy
gradient of the fresh rollout, taken at the weights that it was collected with; that gradient divided by the root of
Adam's second moments, as Adam would; and Adam's first moments, divided in the same way. Each is scaled to the mean
length of the context's displacements. One set of coefficients per phase and forward step, fitted on some trials, with a
penalty chosen on others and judged on a third group.

    python benchmarks/batch_gradient.py [--tasks InvertedPendulum-v4/8-8@200000 HalfCheetah-v4/64-64@300000]

Writes docs/results/batch_gradient.csv and docs/pictures/batch_gradient.png.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, publish_table, results_folder, use_one_core  # noqa: E402

from tipl_ray.config import Collect, Experiment, RunTask  # noqa: E402
from tipl_ray.drawing import as_shipped, dress, labelled, legend_below, new_figure, png  # noqa: E402
from tipl_ray.evaluate.metrics import Resampling  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402
from tipl_ray.ppo.trials import TrialGroup  # noqa: E402
from tipl_ray.predict.baselines import RIDGE_PENALTIES, Moments  # noqa: E402
from tipl_ray.predict.gram import future_sums  # noqa: E402
from tipl_ray.terminal import say, say_rows  # noqa: E402

TASKS = ("InvertedPendulum-v4/8-8@200000", "HalfCheetah-v4/64-64@300000")
CONTEXT, STEPS = 20, (1, 5, 10)
TRAINING, VALIDATION, TEST = 10, 3, 10
FIRST_SEED = 3_001
BETAS, EPSILON = (0.9, 0.999), 1e-5
EXTRAS = ("gradient", "scaled gradient", "momentum")
INPUTS: dict[str, tuple[str, ...]] = {
    "displacements": (),
    "+ gradient": ("gradient",),
    "+ gradient / root of Adam's second moments": ("scaled gradient",),
    "+ Adam's first moments": ("momentum",),
    "+ all three": EXTRAS,
}
"""What the regression is given besides the context's displacements, by the name in the table."""
COLOURS = dict(zip(INPUTS, ("#777777", "#56b4e9", "#0072b2", "#e69f00", "#d55e00"), strict=True))

Array = NDArray[np.floating]


class WithBatch(TrialGroup):
    """PPO that keeps what the batch says, at the beginning of each iteration's first update."""

    def update(self, learning_rates_K: np.ndarray, epochs: int) -> None:
        """See TrialGroup."""
        if len(self.batch) < self.iterations_K.max():
            self.batch.append(self._directions())
        super().update(learning_rates_K, epochs)

    def _allocate(self) -> None:
        super()._allocate()
        self.batch: list[NDArray[np.float32]] = []
        """One entry per iteration: the three directions of each trial, (K, 3, P)."""

    def _directions(self) -> NDArray[np.float32]:
        num_weights, samples = self.shape.num_policy_weights, np.arange(self.ppo.num_steps)
        gradient_KP = -np.stack(
            [
                self.learner.gradient(self.parameters_KN[k], self.rollouts, k, samples)[:num_weights]  # type: ignore[attr-defined]
                for k in range(len(self))
            ]
        )
        steps_K1 = np.maximum(self.adam_steps_K, 1)[:, None]
        second_KP = self.second_moments_KN[:, :num_weights] / (1 - BETAS[1] ** steps_K1)
        root_KP = np.sqrt(np.where(self.adam_steps_K[:, None] > 0, second_KP, np.square(gradient_KP))) + EPSILON
        momentum_KP = -self.first_moments_KN[:, :num_weights]
        return np.stack([gradient_KP, gradient_KP / root_KP, momentum_KP / root_KP], axis=1).astype(np.float32)


def run_trials(task: RunTask, seeds: Sequence[int], steps: int) -> tuple[Array, Array]:
    """Weights of all trials (K, T, P), and what the batch of each iteration says (K, I, 3, P)."""
    collect = Collect(
        task=task.task, policy_hidden=task.policy_hidden or (64, 64), total_env_steps=steps, num_trials=len(seeds)
    )
    experiment = Experiment(name="batch", collect=collect)
    group = WithBatch(experiment, choose_engine("compiled", experiment.ppo), list(seeds))
    weights: dict[int, list[Array]] = {seed: [] for seed in seeds}
    for snapshot in group.initial_snapshots():
        weights[snapshot.seed].append(snapshot.weights)
    batches = []
    while not group.finished:
        for snapshot in group.run_iteration():
            weights[snapshot.seed].append(snapshot.weights)
        batches.append(group.batch[-1])
    return np.stack([np.stack(weights[seed]) for seed in seeds]), np.stack(batches, axis=1)


def windows(weights_TP: Array, batches_IEP: Array, phase: int, phases: int) -> Iterator[tuple[Array, Array]]:
    """Each window of one phase: its known vectors (K + 3, P), and the displacements ahead (F, P)."""
    moves_SP = np.diff(weights_TP.astype(np.float64), axis=0)
    for start in range(phases * (CONTEXT // phases) + phase, len(moves_SP) - max(STEPS) + 1, phases):
        context_KP = moves_SP[start - CONTEXT : start]
        batch_EP = batches_IEP[start // phases].astype(np.float64)
        length = np.linalg.norm(context_KP, axis=1).mean()
        batch_EP = batch_EP * (length / np.maximum(np.linalg.norm(batch_EP, axis=1, keepdims=True), 1e-30))
        yield np.concatenate([context_KP, batch_EP]), moves_SP[start : start + max(STEPS)]


def moments(trials: Sequence[tuple[Array, Array]], phases: int) -> Moments:
    """Sums over every window of some trials, by phase, with all extra vectors."""
    sums_HF, width = future_sums(STEPS), CONTEXT + len(EXTRAS)
    known_QNN, towards_QHN = np.zeros((phases, width, width)), np.zeros((phases, len(STEPS), width))
    moved_QH = np.zeros((phases, len(STEPS)))
    for weights_TP, batches_IEP in trials:
        for phase in range(phases):
            for known_NP, ahead_FP in windows(weights_TP, batches_IEP, phase, phases):
                truth_HP = sums_HF @ ahead_FP
                known_QNN[phase] += known_NP @ known_NP.T
                towards_QHN[phase] += truth_HP @ known_NP.T
                moved_QH[phase] += np.square(truth_HP).sum(axis=1)
    return Moments(known_QKK=known_QNN, towards_QHK=towards_QHN, moved_QH=moved_QH)


def part(whole: Moments, kept: NDArray[np.integer]) -> Moments:
    """The same sums with some of the known vectors."""
    return Moments(
        known_QKK=whole.known_QKK[:, kept][:, :, kept],
        towards_QHK=whole.towards_QHK[:, :, kept],
        moved_QH=whole.moved_QH,
    )


def errors(coefficients_QHN: Array, judged: Moments) -> Array:
    """Squared errors, summed over windows; (Q, H)."""
    quadratic_QHN = coefficients_QHN @ judged.known_QKK - 2.0 * judged.towards_QHK
    return np.einsum("qhn,qhn->qh", quadratic_QHN, coefficients_QHN) + judged.moved_QH


def study(name: str, quick: bool) -> list[dict[str, Any]]:
    """One row per phase, forward step and set of inputs of a task."""
    task = RunTask.read(name, "--tasks")
    counts = (2, 1, 3) if quick else (TRAINING, VALIDATION, TEST)
    steps = 30_000 if quick else task.env_steps or 300_000
    weights_KTP, batches_KIEP = run_trials(task, range(FIRST_SEED, FIRST_SEED + sum(counts)), steps)
    phases = (weights_KTP.shape[1] - 1) // batches_KIEP.shape[1]
    trials = list(zip(weights_KTP, batches_KIEP, strict=True))
    training = moments(trials[: counts[0]], phases)
    validation = moments(trials[counts[0] : sum(counts[:2])], phases)
    tests = [moments([one], phases) for one in trials[sum(counts[:2]) :]]
    resampling, rows = Resampling(confidence=0.95, bootstrap=10_000, seed=0), []
    for inputs, extras in INPUTS.items():
        kept = np.r_[:CONTEXT, [CONTEXT + EXTRAS.index(one) for one in extras]].astype(int)
        tables = [part(training, kept).ridge(penalty) for penalty in RIDGE_PENALTIES]
        best_QHN = max(tables, key=part(validation, kept).mean_skill)
        found_NQH = np.stack([errors(best_QHN, part(one, kept)) for one in tests])
        moved_NQH = np.stack([one.moved_QH for one in tests])
        for phase in range(phases):
            for column, step in enumerate(STEPS):
                found_N, moved_N = found_NQH[:, phase, column], moved_NQH[:, phase, column]
                low, high = resampling.interval(np.arange(len(tests)), found_N, moved_N)
                rows.append(
                    {
                        "task": name,
                        "phase": phase,
                        "inputs": inputs,
                        "step": step,
                        "skill": round(1 - found_N.sum() / moved_N.sum(), 4),
                        "skill_low": round(1 - high, 4),
                        "skill_high": round(1 - low, 4),
                        "trials": len(tests),
                    }
                )
    say(f"{name}: {sum(counts)} trials of {weights_KTP.shape[1]:,} snapshots of {weights_KTP.shape[2]:,} weights")
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> bytes:
    """Skill one snapshot ahead by phase, a panel per task and a line per set of inputs."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with as_shipped():
        figure, panels = new_figure(len(tasks), width=11, height=4.2)
        for panel, task in zip(panels, tasks, strict=True):
            for inputs, colour in COLOURS.items():
                own = [row for row in rows if (row["task"], row["inputs"], row["step"]) == (task, inputs, STEPS[0])]
                phases = [row["phase"] for row in own]
                low, high = ([row[end] for row in own] for end in ("skill_low", "skill_high"))
                panel.fill_between(phases, low, high, color=colour, alpha=0.15)
                panel.plot(phases, [row["skill"] for row in own], "o-", color=colour, label=inputs)
            panel.set_xticks(phases)
            dress(
                panel, task.partition("@")[0], "snapshots into the iteration (0: it has just ended)", "skill, 1 ahead"
            )
        legend_below(figure, labelled(panels[0]))
        return png(figure)


def main() -> None:
    """Run the trials and the regressions, then write table and picture."""
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="TASK/WIDTH-WIDTH@STEPS (default: %(default)s)")
    arguments = parser.parse_args()
    use_one_core(arguments.quick)
    folder = results_folder(arguments.quick)
    rows = [row for name in arguments.tasks for row in study(name, arguments.quick)]
    publish_table("batch_gradient", rows, arguments.quick)
    picture = folder / "batch_gradient.png"
    picture.write_bytes(draw(rows))
    if not arguments.quick:
        shutil.move(picture, ROOT / "docs" / "pictures" / picture.name)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows if row["phase"] in (0, 1)])


if __name__ == "__main__":
    main()
