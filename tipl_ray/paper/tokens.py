"""Trials as tokens (Section 3.2), and their context windows (Section 3.3) as the Transformer's batches.

A trial is read, reduced and let go before the next: only its tokens stay. Knows nothing of the model beyond its context
length, nor of how it is trained.

Shapes: N trials, T snapshots, P policy weights, D numbers per token, B windows, K tokens of context; S snapshots of all
trials.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl_ray.data.rows import Rows
from tipl_ray.paper.temporal_svd import FittedBasis
from tipl_ray.paper.transformer import Normaliser
from tipl_ray.predict.objective import draw_windows

SNAPSHOTS_AT_ONCE = 64
"""Snapshots that are decoded at a time when the basis is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """Whole trials in their bases, and what it takes to judge a forecast in weights without the weights."""

    seeds: tuple[int, ...]
    """The N trials."""
    coordinates_NTD: NDArray[np.float32]
    """Each trial's coordinates in its own basis, not normalised."""
    singular_values_ND: NDArray[np.float64]
    """Weights per unit of a coordinate."""
    outside_NT: NDArray[np.float64]
    """Squared distance of each snapshot's weights from its basis."""
    displacement_NT: NDArray[np.float64]
    """Squared distance of each snapshot's weights from those of the snapshot before; 0 for the first."""

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """One stack of several. Raises ValueError if their trials differ in snapshots or token size."""
        shapes = {part.seeds[0]: part.coordinates_NTD.shape[1:] for part in parts}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"trial {seed}: {shape[0]} x {shape[1]}" for seed, shape in shapes.items())
            raise ValueError(f"trials differ in snapshots x token size: {listed}")
        arrays = [field.name for field in dataclasses.fields(cls) if field.name != "seeds"]
        return cls(
            seeds=tuple(seed for part in parts for seed in part.seeds),
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
        )

    def truncated(self, rank: int) -> "Tokens":
        """The same trials in the leading part of their bases, as if they had been reduced to that SVD rank.

        What is left out is orthogonal to what stays, so its square adds to that of what was outside before.
        """
        left_out_NTd = self.coordinates_NTD[..., rank:] * self.singular_values_ND[:, None, rank:]
        return dataclasses.replace(
            self,
            coordinates_NTD=self.coordinates_NTD[..., :rank],
            singular_values_ND=self.singular_values_ND[:, :rank],
            outside_NT=self.outside_NT + np.square(left_out_NTd).sum(axis=-1),
        )

    def squared_errors(
        self, trial: int, coordinates_BHD: NDArray[np.floating], snapshots_BH: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """||w_hat - w||^2 of coordinates that are forecast for some snapshots of the trial of this index; (B, H).

        Exact without the weights: inside the basis a coordinate counts with its singular value, and what the true
        weights have outside the basis is orthogonal to it.
        """
        apart_BHD = coordinates_BHD - self.coordinates_NTD[trial][snapshots_BH]
        inside_BH = np.square(apart_BHD * self.singular_values_ND[trial]).sum(axis=-1)
        return inside_BH + self.outside_NT[trial][snapshots_BH]


def tokens_of(seed: int, weights_TP: Rows, fitted: FittedBasis) -> Tokens:
    """Tokens of one trial whose basis is fitted."""
    num_snapshots = weights_TP.shape[0]
    outside_T, displacement_T = np.zeros(num_snapshots), np.zeros(num_snapshots)
    for start in range(0, num_snapshots, SNAPSHOTS_AT_ONCE):
        part, before = slice(start, start + SNAPSHOTS_AT_ONCE), min(start, 1)
        some_TP = weights_TP[start - before : part.stop].astype(np.float64)
        displacement_T[start + 1 - before : part.stop] = np.square(np.diff(some_TP, axis=0)).sum(axis=1)
        outside_TP = some_TP[before:] - fitted.decode(fitted.coordinates_TD[part])
        outside_T[part] = np.square(outside_TP).sum(axis=1)
    return Tokens(
        seeds=(seed,),
        coordinates_NTD=fitted.coordinates_TD[None],
        singular_values_ND=fitted.singular_values_D[None],
        outside_NT=outside_T[None],
        displacement_NT=displacement_T[None],
    )


class Batch(NamedTuple):
    """Windows as the model takes them, normalised."""

    tokens_BKD: Tensor
    snapshots_BK: Tensor
    """Index of each token's snapshot in its trajectory."""
    targets_BKD: Tensor
    """The token of each one's next snapshot."""


class Segments:
    """Every context window of some trials, gathered where the model is: no loader, no Python per window."""

    def __init__(self, tokens: Tokens, normaliser: Normaliser, context: int, device: torch.device | str = "cpu"):
        num_trials, self.num_snapshots, self.token_size = tokens.coordinates_NTD.shape
        self.context, self.windows_per_trial = context, self.num_snapshots - context
        if self.windows_per_trial < 1:
            raise ValueError(
                f"model.context={context} leaves no window with a next snapshot in the {self.num_snapshots} snapshots "
                "of a trial"
            )
        self.num_windows = num_trials * self.windows_per_trial
        self._tokens_SD = torch.from_numpy(normaliser.normalise(tokens.coordinates_NTD)).to(device).flatten(0, 1)
        self._offsets_K = torch.arange(context, device=device)

    def gather(self, windows_B: NDArray[np.int64]) -> Batch:
        """The windows of these numbers, below `num_windows`, trial by trial and in each by their first snapshot."""
        trials_B, firsts_B = self._locate(windows_B)
        snapshots_BK = firsts_B[:, None] + self._offsets_K
        rows_BK = trials_B[:, None] * self.num_snapshots + snapshots_BK
        return Batch(self._tokens_SD[rows_BK], snapshots_BK, self._tokens_SD[rows_BK + 1])

    def batch(self, step: int, batch_size: int, seed: int, rank: int = 0, num_workers: int = 1) -> Batch:
        """One worker's share of a step's global batch, a pure function of the arguments: see `draw_windows`."""
        return self.gather(draw_windows(self.num_windows, step, batch_size, seed, rank, num_workers))

    def ends(self, windows_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Index of each window's trial, and of its last snapshot in that."""
        trials_B = windows_B // self.windows_per_trial
        return trials_B, windows_B - trials_B * self.windows_per_trial + self.context - 1

    def change_D(self) -> Tensor:
        """Root mean square of what one snapshot changes each normalised number of a token by; 1 where nothing does."""
        tokens_NTD = self._tokens_SD.unflatten(0, (-1, self.num_snapshots))
        change_D = tokens_NTD.diff(dim=1).square().mean(dim=(0, 1)).sqrt()
        return torch.where(change_D > 0, change_D, 1.0)

    def _locate(self, windows_B: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(windows_B).to(self._offsets_K.device, non_blocking=True)
        trials_B = windows // self.windows_per_trial
        return trials_B, windows - trials_B * self.windows_per_trial
