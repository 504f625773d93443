"""Training of `GainTransformer` on forks, and how well it predicts gains.

A branch's gain is its return minus the mean over its fork's branches, in units of the standard deviation of such gains
in its cell's training trials. So all tasks have equal weight, whatever their returns, and a fork's luck cancels out.
What a model says of a branch is centred likewise: a parabola is 0 at no change, its mean over a fork's branches is not.

Shapes: F forks, N branches in all, B of a batch, K displacements of context, C = 3 changes.
"""

import copy
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from tipl_ray import config
from tipl_ray.accelerate.scores import filled
from tipl_ray.evaluate.metrics import Resampling
from tipl_ray.improve.gain_model import CHANGES, EXTRA_SIZE, GainTransformer, Seen, Sight

KEY = ("task", "regime", "value", "seed", "iteration")
"""Columns that name a fork."""
FURTHEST_GAIN = 3.0
"""Gains are clipped to this many standard deviations, so that single collapsed branches do not dominate."""
VALIDATED_EVERY = 50
"""Steps between two evaluations of the validation loss; the weights with the lowest loss are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Forks:
    """Forks as tensors: the model's inputs at each fork, and the fork, change and gain of each branch."""

    seen: Seen
    """Inputs at F forks."""
    fork_N: Tensor
    changes_NC: Tensor
    """In units of the standard deviations with which they were drawn."""
    gains_N: Tensor
    seeds_F: NDArray[np.int64]
    trials_F: NDArray[np.int64]
    """Which trial was forked: a number of its own for each seed of each cell."""
    stages_F: NDArray[np.float64]
    """Fraction of the trial that was done."""

    @functools.cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means of the changes (F, C) and of their products (F, C, C) over each fork's branches."""
        counts_F = torch.bincount(self.fork_N, minlength=len(self.seeds_F))
        sums_FC = torch.zeros(len(counts_F), CHANGES).index_add_(0, self.fork_N, self.changes_NC)
        products_NCC = self.changes_NC[:, :, None] * self.changes_NC[:, None, :]
        sums_FCC = torch.zeros(len(counts_F), CHANGES, CHANGES).index_add_(0, self.fork_N, products_NCC)
        return sums_FC / counts_F[:, None], sums_FCC / counts_F[:, None, None]

    def of(self, branches: NDArray[np.int64]) -> tuple[Seen, Tensor, Tensor]:
        """Inputs, changes and gains of some branches."""
        index = torch.from_numpy(branches)
        forks_B = self.fork_N[index]
        return Seen(*(part[forks_B] for part in self.seen)), self.changes_NC[index], self.gains_N[index]

    def predicted_by(self, model: GainTransformer, branches: NDArray[np.int64]) -> Tensor:
        """A model's gains (B,) of some branches, less their mean over each one's fork."""
        seen, changes_BC, _ = self.of(branches)
        means_FC, products_FCC = self.moments
        forks_B = self.fork_N[torch.from_numpy(branches)]
        gains_B: Tensor = model(seen, changes_BC, (means_FC[forks_B], products_FCC[forks_B]))
        return gains_B

    def branches_of(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """The branches of trials with these seeds."""
        mine_F = np.isin(self.seeds_F, np.asarray(seeds))
        return np.flatnonzero(mine_F[self.fork_N.numpy()])


def make_forks(table: pa.Table, spread: Sequence[float], context: int, training: Collection[int]) -> Forks:
    """The rows of `forks.SCHEMA` as tensors; forks with a branch without returns are left out.

    Gains are scaled by the trials with the seeds that train. Iterations after a divergence count as the lowest return
    of the branch's cell. Raises ValueError if no fork is left.
    """
    forks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        forks.setdefault(tuple(row[name] for name in KEY), []).append(row)
    whole = {
        key: sorted(rows, key=lambda row: row["branch"])
        for key, rows in forks.items()
        if not any(np.isnan(row["returns"]).all() for row in rows)
    }
    if not whole:
        raise ValueError("the table has no fork in which every branch has a return")
    keys, rows_of = list(whole), list(whole.values())
    cells = [key[:3] for key in keys]
    gains: list[NDArray[np.float64]] = [np.empty(0)] * len(whole)
    for cell in set(cells):
        mine = [index for index, other in enumerate(cells) if other == cell]
        branches = {index: [np.asarray(row["returns"]) for row in rows_of[index]] for index in mine}
        known = np.concatenate([returns_I for some in branches.values() for returns_I in some])
        lowest = float(np.min(known[np.isfinite(known)])) if np.isfinite(known).any() else 0.0
        for index, some in branches.items():
            score_B = np.array([_followed(returns_I, lowest) for returns_I in some])
            gains[index] = score_B - score_B.mean()
        learned = [gains[index] for index in mine if keys[index][3] in training]
        deviation = (float(np.concatenate(learned).std()) if learned else 0.0) or 1.0
        for index in mine:
            gains[index] = np.clip(gains[index] / deviation, -FURTHEST_GAIN, FURTHEST_GAIN)
    firsts = [rows[0] for rows in whole.values()]
    counts = [[[row[name] for name in ("first", "last", "past")] for row in rows] for rows in whole.values()]
    changes = [(np.array(counts_BC) - counts_BC[0]) / np.asarray(spread) for counts_BC in counts]

    def column(name: str, kind: Any) -> Tensor:
        return torch.from_numpy(np.array([row[name] for row in firsts], dtype=kind))

    return Forks(
        seen=Seen(
            grams_BKK=column("gram", np.float64).reshape(len(firsts), context, context),
            recorded_B=column("recorded", np.int64),
            per_iteration_B=column("per_iteration", np.int64),
            progress_B=column("progress", np.float64),
            learning_rates_B=column("learning_rate", np.float64),
            extras_BX=torch.from_numpy(np.array([_extras(row) for row in firsts], dtype=np.float32)),
        ),
        fork_N=torch.from_numpy(np.repeat(np.arange(len(firsts)), [len(rows) for rows in whole.values()])),
        changes_NC=torch.from_numpy(np.concatenate(changes).astype(np.float32)),
        gains_N=torch.from_numpy(np.concatenate(gains).astype(np.float32)),
        seeds_F=column("seed", np.int64).numpy(),
        trials_F=np.unique([repr(key[:4]) for key in whole], return_inverse=True)[1],
        stages_F=column("progress", np.float64).numpy(),
    )


def _followed(returns_I: NDArray[np.float64], lowest: float) -> float:
    """Mean return over a branch's iterations, with gaps filled by `filled`, and the lowest from a divergence on.

    A branch that diverged before an episode ended has the lowest throughout.
    """
    over_I = np.isneginf(returns_I)
    known_I = np.where(over_I, np.nan, returns_I)
    filled_I = filled(known_I[None])[0] if np.isfinite(known_I).any() else np.full_like(known_I, lowest)
    return float(np.where(over_I, lowest, filled_I).mean())


def _extras(row: Mapping[str, Any]) -> list[float]:
    """Inputs that only the PPO engine has, scaled to about 1."""
    before = np.asarray(row["returns_before"])
    known = before[np.isfinite(before)]
    rise = (known[-1] - known.min()) / (abs(known.mean()) + 1.0) if len(known) else 0.0
    told = [np.log10(max(row["divergence"], 1e-6)) + 2.0, 10.0 * row["surrogate"], row["log_std"], rise]
    assert len(told) == EXTRA_SIZE
    return [float(value) for value in told]


def train_gain_model(
    forks: Forks,
    training: NDArray[np.int64],
    validation: NDArray[np.int64],
    *,
    size: config.Model,
    sight: Sight,
    num_steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> GainTransformer:
    """A model trained on some branches, with the weights that have the lowest loss on the validation branches."""
    torch.manual_seed(seed)
    model, random = GainTransformer(size, sight), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    best, lowest = copy.deepcopy(model.state_dict()), gain_loss(model, forks, validation)
    for step in range(1, num_steps + 1):
        batch = random.choice(training, size=min(batch_size, len(training)), replace=False)
        model.train()
        optimizer.zero_grad()
        _loss(model, forks, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        validated = step % VALIDATED_EVERY == 0 or step == num_steps
        if validated and (loss := gain_loss(model, forks, validation)) < lowest:
            best, lowest = copy.deepcopy(model.state_dict()), loss
    model.load_state_dict(best)
    return model.eval()


def _loss(model: GainTransformer, forks: Forks, branches: NDArray[np.int64]) -> Tensor:
    seen, changes_BC, gains_B = forks.of(branches)
    told = functional.mse_loss(forks.predicted_by(model, branches), gains_B)
    return told + functional.mse_loss(model.change_for(seen, gains_B), changes_BC) / CHANGES


@torch.inference_mode()
def gain_loss(model: GainTransformer, forks: Forks, branches: NDArray[np.int64]) -> float:
    """Mean squared error of the predicted gains of some branches."""
    return float(functional.mse_loss(forks.predicted_by(model.eval(), branches), forks.of(branches)[2]))


@torch.inference_mode()
def predicted_gains(model: GainTransformer, forks: Forks, branches: NDArray[np.int64]) -> NDArray[np.float64]:
    """The model's predicted gains of some branches."""
    gains: NDArray[np.float64] = forks.predicted_by(model.eval(), branches).double().numpy()
    return gains


def constant_gains(forks: Forks, training: NDArray[np.int64], branches: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gains predicted by one parabola for all forks: least squares on changes and their products, less their means."""
    means_FC, products_FCC = forks.moments
    upper = torch.triu_indices(CHANGES, CHANGES)

    def features(some: NDArray[np.int64]) -> NDArray[np.float64]:
        changes_BC, forks_B = forks.changes_NC[torch.from_numpy(some)], forks.fork_N[torch.from_numpy(some)]
        apart_BCC = changes_BC[:, :, None] * changes_BC[:, None, :] - products_FCC[forks_B]
        return torch.cat([changes_BC - means_FC[forks_B], apart_BCC[:, upper[0], upper[1]]], dim=1).double().numpy()

    solution, *_ = np.linalg.lstsq(features(training), forks.of(training)[2].double().numpy(), rcond=None)
    answer: NDArray[np.float64] = features(branches) @ solution
    return answer


def spearman(predicted_N: NDArray[np.float64], true_N: NDArray[np.float64]) -> float:
    """Spearman's rank correlation; NaN if one of them is constant."""
    if np.ptp(predicted_N) == 0 or np.ptp(true_N) == 0:
        return float("nan")
    return float(spearmanr(predicted_N, true_N).statistic)


def correlation(
    predicted_N: NDArray[np.float64], forks: Forks, branches: NDArray[np.int64], resampling: Resampling
) -> dict[str, float]:
    """Spearman correlation of predicted and true gains of some branches, with a bootstrap interval over trials: forks
    of one trial resemble each other."""
    true_N, fork_N = forks.gains_N[torch.from_numpy(branches)].double().numpy(), forks.fork_N.numpy()[branches]
    trials_N, random = forks.trials_F[fork_N], np.random.default_rng(resampling.seed)
    groups = [np.flatnonzero(trials_N == trial) for trial in np.unique(trials_N)]
    drawn = []
    for _ in range(resampling.bootstrap):
        picked = np.concatenate([groups[i] for i in random.integers(len(groups), size=len(groups))])
        drawn.append(spearman(predicted_N[picked], true_N[picked]))
    low, high = resampling.ends(np.array([value for value in drawn if np.isfinite(value)]))
    return {"spearman": spearman(predicted_N, true_N), "low": low, "high": high, "forks": float(len(np.unique(fork_N)))}
