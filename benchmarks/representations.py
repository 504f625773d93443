"""How much of a policy's future can D numbers express? Upper bounds of the skill, by representation and token size.

Five representations of a snapshot at equal token sizes: a Temporal SVD of the trial's own trajectory (the paper's,
which knows the future), one SVD shared by all training trials, the same after the trials' neurons were matched to those
of one of them (permutations and signs, as in Git Re-Basin, arXiv 2209.04836), an autoencoder, and the displacements in
the context (our basis `window`).

The bound is the skill of the true future, written as D numbers and read again. It has two columns: of the snapshot
itself (`whole`), and of its change, added to the last snapshot (`change`), which is what a residual model predicts. The
autoencoder is trained twice, for each of the two. No predictor on a representation has more skill than its bound.

    python benchmarks/representations.py storage/inverted_pendulum [--sizes 4 8 16 32]

The storage is one of jobs/experiments/inverted_pendulum.toml. Trials are split as there. Writes
docs/results/representations.csv; it takes about a quarter of an hour of one core.
"""

import copy
import dataclasses
import itertools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, publish_table, use_one_core  # noqa: E402

from tipl_ray.data.trajectory_store import TrajectoryStore  # noqa: E402
from tipl_ray.evaluate.metrics import Resampling  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.paper.temporal_svd import FittedBasis, fit_basis, fit_shared_basis  # noqa: E402
from tipl_ray.ppo.networks import NetworkShape, unflatten  # noqa: E402
from tipl_ray.ppo.trials import network_shape  # noqa: E402
from tipl_ray.terminal import say, say_rows  # noqa: E402

STEPS, CONTEXT, SEEDS = (1, 5, 10), 20, 3
WINDOWS = 400
"""Most windows of each test trial that are judged where each takes time."""
RESTARTS, SWEEPS = 20, 30
"""Random beginnings of a matching, and its alternations at most."""
HIDDEN = (256, 128)
"""Layers of the encoder; the decoder's are the same backwards."""
TRAINING_STEPS, BATCH, LEARNING_RATE, VALIDATED_EVERY = 4_000, 512, 1e-3, 250

Weights = NDArray[np.float32]
Parts = Sequence[Sequence[Weights]]
"""The trials that train, those that choose and those that test, each (T, P)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Snapshots as tokens of D numbers, and back."""

    encode: Callable[[Weights], Weights]
    """(T, P) to (T, D)."""
    decode: Callable[[Weights], Weights]
    """(T, D) to (T, P)."""

    def reread(self, weights_TP: Weights) -> Weights:
        """Snapshots as they are when they have been written as tokens and read again."""
        return self.decode(self.encode(weights_TP))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Representation:
    """One way to write snapshots as tokens, fitted on the trials that train, once per seed."""

    name: str
    causal: bool
    """Whether a token depends on nothing of its trial that comes later."""
    parts: Parts
    """The trials as they are written: with their neurons matched, where they are."""
    code_of: Sequence[Callable[[Weights], Code]]
    """The code of any trial; one for each seed."""


class Matching:
    """The neurons of one policy, in the order and with the signs that bring it closest to another.

    tanh is odd: a neuron whose incoming and outgoing weights change their signs computes the same function. Alternates
    between the two hidden layers, each matched exactly while the other stays, from several random beginnings.
    """

    def __init__(self, shape: NetworkShape, weights_P: Weights, reference_P: Weights, seed: int = 0):
        mine, theirs = (unflatten(one.astype(np.float64), shape.policy_layout) for one in (weights_P, reference_P))
        random, most = np.random.default_rng(seed), -np.inf
        for restart in range(RESTARTS):
            second = np.eye(shape.policy_hidden[1])
            if restart:
                second = second[random.permutation(len(second))] * random.choice([-1.0, 1.0], len(second))
            before = -np.inf
            for _ in range(SWEEPS):
                first, _ = _matched(
                    mine["actor.0.weight"].T @ theirs["actor.0.weight"]
                    + np.outer(mine["actor.0.bias"], theirs["actor.0.bias"])
                    + mine["actor.1.weight"] @ second @ theirs["actor.1.weight"].T
                )
                second, total = _matched(
                    mine["actor.1.weight"].T @ first @ theirs["actor.1.weight"]
                    + np.outer(mine["actor.1.bias"], theirs["actor.1.bias"])
                    + mine["actor.2.weight"] @ theirs["actor.2.weight"].T
                )
                total += np.sum(first * (mine["actor.0.weight"].T @ theirs["actor.0.weight"]))
                total += mine["actor.0.bias"] @ first @ theirs["actor.0.bias"]
                if total <= before + 1e-12:
                    break
                before = total
            if before > most:
                most, self._first, self._second = before, first, second
        self._layout = shape.policy_layout

    def apply(self, weights_TP: Weights) -> Weights:
        """Snapshots with their neurons in the new order; the policies that they are stay the same functions."""
        out = weights_TP.astype(np.float64)
        named = unflatten(out, self._layout)
        named["actor.0.weight"][:] = named["actor.0.weight"] @ self._first
        named["actor.0.bias"][:] = named["actor.0.bias"] @ self._first
        named["actor.1.weight"][:] = self._first.T @ named["actor.1.weight"] @ self._second
        named["actor.1.bias"][:] = named["actor.1.bias"] @ self._second
        named["actor.2.weight"][:] = self._second.T @ named["actor.2.weight"]
        return out.astype(np.float32)


def _matched(likeness: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The signed permutation that maximises the sum of the entries it takes, and that sum."""
    rows, columns = linear_sum_assignment(np.abs(likeness), maximize=True)
    matching = np.zeros_like(likeness)
    matching[rows, columns] = np.where(likeness[rows, columns] < 0, -1.0, 1.0)
    return matching, float(np.sum(matching * likeness))


class Autoencoder(nn.Module):
    """Snapshots to D numbers and back."""

    mean_P: torch.Tensor

    def __init__(self, num_weights: int, size: int, mean_P: Weights, scale: float):
        super().__init__()
        self.register_buffer("mean_P", torch.from_numpy(mean_P))
        self.scale = scale
        self.encoder, self.decoder = _layers([num_weights, *HIDDEN, size]), _layers([size, *HIDDEN[::-1], num_weights])

    def encode(self, weights_BP: torch.Tensor) -> torch.Tensor:
        """The snapshots' tokens; (B, D)."""
        return self.encoder((weights_BP - self.mean_P) / self.scale)

    def decode(self, tokens_BD: torch.Tensor) -> torch.Tensor:
        """The tokens' snapshots; (B, P)."""
        return self.decoder(tokens_BD) * self.scale + self.mean_P

    def forward(self, weights_BP: torch.Tensor) -> torch.Tensor:
        """The snapshots, written and read again."""
        return self.decode(self.encode(weights_BP))


def _layers(widths: Sequence[int]) -> nn.Sequential:
    modules = [module for pair in itertools.pairwise(widths) for module in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*modules[:-1])


def train_autoencoder(
    training: Sequence[Weights], validation: Sequence[Weights], size: int, seed: int, *, of_changes: bool, steps: int
) -> Code:
    """An autoencoder of snapshots or, `of_changes`, one whose decoded changes are close to the true ones.

    The state with the lowest error on the validation trials is kept.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    train_NTP, valid_NTP = torch.from_numpy(np.stack(training)), torch.from_numpy(np.stack(validation))
    every_SP = np.concatenate(training)
    mean_P = every_SP.mean(axis=0)
    model = Autoencoder(every_SP.shape[1], size, mean_P, float((every_SP - mean_P).std()))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    unit = float(train_NTP.diff(dim=1).square().mean()) if of_changes else model.scale**2

    def loss_of(trials_NTP: torch.Tensor, drawing: np.random.Generator) -> torch.Tensor:
        trials_B = drawing.integers(len(trials_NTP), size=BATCH)
        ahead_B = drawing.integers(1, max(STEPS) + 1, size=BATCH)
        starts_B = drawing.integers(trials_NTP.shape[1] - max(STEPS), size=BATCH)
        later_BP = trials_NTP[trials_B, starts_B + ahead_B]
        if not of_changes:
            return (model(later_BP) - later_BP).square().mean() / unit
        now_BP = trials_NTP[trials_B, starts_B]
        return (model(later_BP) - model(now_BP) - (later_BP - now_BP)).square().mean() / unit

    best, kept = np.inf, copy.deepcopy(model.state_dict())
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(train_NTP, random).backward()
        optimizer.step()
        schedule.step()
        if step % VALIDATED_EVERY == 0 or step == steps:
            with torch.no_grad():
                found = float(np.mean([loss_of(valid_NTP, np.random.default_rng(index)).item() for index in range(8)]))
            if found < best:
                best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    model.requires_grad_(requires_grad=False)
    return Code(
        encode=lambda weights_TP: model.encode(torch.from_numpy(weights_TP)).numpy(),
        decode=lambda tokens_TD: model.decode(torch.from_numpy(tokens_TD)).numpy(),
    )


def of_basis(fitted: FittedBasis) -> Code:
    """A linear basis as a code."""
    return Code(encode=fitted.encode, decode=fitted.decode)


def representations(shape: NetworkShape, parts: Parts, size: int, steps: int) -> Iterator[Representation]:
    """All that write a snapshot as a token of this size, one after the other; autoencoders train for some steps."""

    def same(code: Code) -> Callable[[Weights], Code]:
        return lambda _: code

    training, validation, _ = parts
    own = [lambda trial_TP: of_basis(fit_basis(trial_TP, size))]
    yield Representation(name="trial", causal=False, parts=parts, code_of=own)
    shared = [same(of_basis(fit_shared_basis(training, size)))]
    yield Representation(name="shared", causal=True, parts=parts, code_of=shared)
    for name, row, causal in (("matched at the first snapshot", 0, True), ("matched at the last", -1, False)):
        # A matching keeps all distances, so errors may be measured where the basis is.
        matched = [[Matching(shape, one[row], training[0][row]).apply(one) for one in trials] for trials in parts]
        code = same(of_basis(fit_shared_basis(matched[0], size)))
        yield Representation(name=f"shared, {name}", causal=causal, parts=matched, code_of=[code])
    for name, of_changes in (("autoencoder", False), ("autoencoder of changes", True)):
        codes = [
            same(train_autoencoder(training, validation, size, seed, of_changes=of_changes, steps=steps))
            for seed in range(SEEDS)
        ]
        yield Representation(name=name, causal=True, parts=parts, code_of=codes)


def error_sums(trial_TP: Weights, code: Code) -> dict[str, NDArray[np.float64]]:
    """Squared errors of one trial, summed over starts, by column and step (H,); and of copying."""
    read_TP = code.reread(trial_TP).astype(np.float64)
    last = len(trial_TP) - max(STEPS)
    found: dict[str, list[float]] = {"whole": [], "change": [], "moved": []}
    for step in STEPS:
        now, later = slice(CONTEXT, last), slice(CONTEXT + step, last + step)
        moved_BP = trial_TP[later].astype(np.float64) - trial_TP[now]
        found["moved"].append(np.square(moved_BP).sum())
        found["whole"].append(np.square(read_TP[later] - trial_TP[later]).sum())
        found["change"].append(np.square(read_TP[later] - read_TP[now] - moved_BP).sum())
    return {name: np.array(values) for name, values in found.items()}


def evenly(first: int, end: int) -> NDArray[np.int64]:
    """At most WINDOWS starts of a trial, over all of it and over all phases of an iteration."""
    every = np.arange(first, end)
    # Not every fifth: five snapshots make an iteration, and forecasts differ by its phases.
    return every[np.linspace(0, len(every) - 1, min(len(every), WINDOWS)).astype(int)]


def window_sums(trial_TP: Weights, size: int) -> dict[str, NDArray[np.float64]]:
    """The same for the change's projection onto the last displacements, as many as there are at a trial's beginning; a
    whole snapshot is nothing that they hold."""
    moves_TP = np.diff(trial_TP.astype(np.float64), axis=0)
    error, moved = np.zeros(len(STEPS)), np.zeros(len(STEPS))
    for start in evenly(CONTEXT, len(trial_TP) - max(STEPS)):
        basis_PK, _ = np.linalg.qr(moves_TP[max(0, start - size) : start].T)
        for column, step in enumerate(STEPS):
            change_P = trial_TP[start + step].astype(np.float64) - trial_TP[start]
            moved[column] += change_P @ change_P
            error[column] += np.square(change_P - basis_PK @ (basis_PK.T @ change_P)).sum()
    return {"whole": np.full(len(STEPS), np.nan), "change": error, "moved": moved}


def rows_of(
    name: str,
    size: int,
    causal: bool,
    seeds: int,
    sums: Sequence[Mapping[str, Any]],
    columns: Sequence[str] = ("whole", "change"),
) -> list[dict[str, Any]]:
    """One row per step, from the sums of the test trials; of several seeds, trial by trial, all of their sums."""
    resampling, rows = Resampling(confidence=0.95, bootstrap=10_000, seed=0), []
    for index, step in enumerate(STEPS):
        row: dict[str, Any] = {"representation": name, "size": size, "causal": causal, "step": step}
        for column in columns:
            error_N, moved_N = (np.array([one[key][index] for one in sums]) for key in (column, "moved"))
            low, high = resampling.interval(np.arange(len(sums)), error_N, moved_N)
            ends = (1 - error_N.sum() / moved_N.sum(), 1 - high, 1 - low)
            row |= dict(
                zip((column, f"{column}_low", f"{column}_high"), (round(float(end), 4) for end in ends), strict=True)
            )
        rows.append(row | {"trials": len(sums), "seeds": seeds})
    return rows


def of_all_seeds(by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The sums of each trial over all seeds."""
    return [{key: sum(one[key] for one in trial) for key in trial[0]} for trial in zip(*by_seed, strict=True)]


def study(shape: NetworkShape, parts: Parts, sizes: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """All rows, from the trials of the three parts."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for one in representations(shape, parts, size, steps):
            by_seed = [[error_sums(trial, code_of(trial)) for trial in one.parts[2]] for code_of in one.code_of]
            rows += rows_of(one.name, size, one.causal, len(by_seed), of_all_seeds(by_seed))
            say(f"{one.name} {size}: " + ", ".join(f"h {row['step']} {row['change']}" for row in rows[-len(STEPS) :]))
        rows += rows_of("window", size, True, 1, [window_sums(trial, size) for trial in parts[2]])
    return rows


def read_trials(parser: ArgumentParser, arguments: Namespace) -> tuple[NetworkShape, Parts]:
    """The trials of the storage on the command line, split as in their experiment; random walks for a quick run."""
    experiment = load_experiment(ROOT / "jobs" / "experiments" / "inverted_pendulum.toml")
    shape = network_shape(experiment.collect)
    if arguments.quick:
        random = np.random.default_rng(0)
        walks = [random.normal(size=(60, shape.num_policy_weights)).cumsum(axis=0) for _ in range(7)]
        trials = [walk.astype(np.float32) for walk in walks]
        return shape, (trials[:3], trials[3:5], trials[5:])
    if not arguments.storage:
        parser.error("name a storage")
    store = TrajectoryStore(arguments.storage)
    parts = experiment.split.cut(experiment.collect.seeds)
    return shape, [[store.weights(seed)[:] for seed in seeds] for seeds in parts]


def main() -> None:
    """Read the trials, and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("storage", nargs="?", help="folder or URI of the collected trials")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32], help="numbers per token")
    arguments = parser.parse_args()
    use_one_core(arguments.quick)
    shape, parts = read_trials(parser, arguments)
    sizes, steps = ([2, 4], 10) if arguments.quick else (arguments.sizes, TRAINING_STEPS)
    rows = study(shape, parts, sizes, steps)
    publish_table("representations", rows, arguments.quick)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
