"""Training of `GainTransformer` on forks, and how well it predicts gains.

A branch's gain is its return minus the mean over its fork's branches, in units of the standard deviation of such gains
in its cell. So all tasks have equal weight, whatever their returns, and a fork's luck cancels out.

Shapes: F forks, N branches in all, B of a batch, K displacements of context, C = 3 changes.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
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
    stages_F: NDArray[np.float64]
    """Fraction of the trial that was done."""

    def of(self, branches: NDArray[np.int64]) -> tuple[Seen, Tensor, Tensor]:
        """Inputs, changes and gains of some branches."""
        index = torch.from_numpy(branches)
        forks_B = self.fork_N[index]
        return Seen(*(part[forks_B] for part in self.seen)), self.changes_NC[index], self.gains_N[index]

    def branches_of(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """The branches of trials with these seeds."""
        mine_F = np.isin(self.seeds_F, np.asarray(seeds))
        return np.flatnonzero(mine_F[self.fork_N.numpy()])


def make_forks(table: pa.Table, spread: Sequence[float], context: int) -> Forks:
    """The rows of `forks.SCHEMA` as tensors; forks with a branch without returns are left out.

    Raises ValueError if no fork is left.
    """
    forks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        forks.setdefault(tuple(row[name] for name in KEY), []).append(row)
    whole = {
        key: sorted(rows, key=lambda row: row["branch"])
        for key, rows in forks.items()
        if all(np.isfinite(row["returns"]).any() for row in rows)
    }
    if not whole:
        raise ValueError("the table has no fork in which every branch has a return")
    scores = [np.array([_followed(np.asarray(row["returns"])) for row in rows]) for rows in whole.values()]
    gains = [score_B - score_B.mean() for score_B in scores]
    cells = [key[:3] for key in whole]
    for cell in set(cells):
        mine = [index for index, other in enumerate(cells) if other == cell]
        deviation = float(np.concatenate([gains[index] for index in mine]).std()) or 1.0
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
        stages_F=column("progress", np.float64).numpy(),
    )


def _followed(returns_I: NDArray[np.float64]) -> float:
    """Mean return over a branch's iterations, with gaps filled by `filled`."""
    return float(filled(returns_I[None])[0].mean())


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
        _loss(model, *forks.of(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % VALIDATED_EVERY == 0 and (loss := gain_loss(model, forks, validation)) < lowest:
            best, lowest = copy.deepcopy(model.state_dict()), loss
    model.load_state_dict(best)
    return model.eval()


def _loss(model: GainTransformer, seen: Seen, changes_BC: Tensor, gains_B: Tensor) -> Tensor:
    told = functional.mse_loss(model(seen, changes_BC), gains_B)
    return told + functional.mse_loss(model.change_for(seen, gains_B), changes_BC) / CHANGES


@torch.inference_mode()
def gain_loss(model: GainTransformer, forks: Forks, branches: NDArray[np.int64]) -> float:
    """Mean loss over some branches."""
    model.eval()
    return float(_loss(model, *forks.of(branches)))


@torch.inference_mode()
def predicted_gains(model: GainTransformer, forks: Forks, branches: NDArray[np.int64]) -> NDArray[np.float64]:
    """The model's predicted gains of some branches."""
    seen, changes_BC, _ = forks.of(branches)
    gains: NDArray[np.float64] = model.eval()(seen, changes_BC).double().numpy()
    return gains


def constant_gains(forks: Forks, training: NDArray[np.int64], branches: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gains predicted by one parabola for all forks: least squares on changes and their products."""

    def features(changes_NC: NDArray[np.float32]) -> NDArray[np.float64]:
        pairs = [changes_NC[:, i] * changes_NC[:, j] for i in range(CHANGES) for j in range(i, CHANGES)]
        return np.column_stack([changes_NC, *pairs]).astype(np.float64)

    _, changes_TC, gains_T = forks.of(training)
    solution, *_ = np.linalg.lstsq(features(changes_TC.numpy()), gains_T.double().numpy(), rcond=None)
    answer: NDArray[np.float64] = features(forks.of(branches)[1].numpy()) @ solution
    return answer


def spearman(predicted_N: NDArray[np.float64], true_N: NDArray[np.float64]) -> float:
    """Spearman's rank correlation; NaN if one of them is constant."""
    if np.ptp(predicted_N) == 0 or np.ptp(true_N) == 0:
        return float("nan")
    return float(spearmanr(predicted_N, true_N).statistic)


def correlation(
    predicted_N: NDArray[np.float64], forks: Forks, branches: NDArray[np.int64], resampling: Resampling
) -> dict[str, float]:
    """Spearman correlation of predicted and true gains of some branches, with a bootstrap interval over forks."""
    true_N, fork_N = forks.gains_N[torch.from_numpy(branches)].double().numpy(), forks.fork_N.numpy()[branches]
    random, groups = np.random.default_rng(resampling.seed), [np.flatnonzero(fork_N == f) for f in np.unique(fork_N)]
    drawn = []
    for _ in range(resampling.bootstrap):
        picked = np.concatenate([groups[i] for i in random.integers(len(groups), size=len(groups))])
        drawn.append(spearman(predicted_N[picked], true_N[picked]))
    low, high = resampling.ends(np.array([value for value in drawn if np.isfinite(value)]))
    return {"spearman": spearman(predicted_N, true_N), "low": low, "high": high, "forks": float(len(groups))}
