"""Trials as tokens (Section 3.2).

A trial is read, reduced and let go before the next: only its tokens stay. Knows nothing of the model; does not import
torch, which tasks that read trials would wait two seconds for.

Shapes: N trials, T snapshots, P policy weights, D numbers per token, B starts, H forward steps, F the furthest of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tipl_ray.data.rows import Rows
from tipl_ray.paper.temporal_svd import FittedBasis

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
    moved_NTF: NDArray[np.float64]
    """Squared distance of each snapshot's weights from those of the next F: see `gram.moved_squares`."""

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
        self,
        trial: int,
        coordinates_BHD: NDArray[np.floating],
        starts_B: NDArray[np.integer],
        steps_H: Sequence[int],
        *,
        changes: bool,
    ) -> NDArray[np.float64]:
        """||w_hat - w||^2 of coordinates that are forecast at forward steps of the trial of this index; (B, H).

        Exact without the weights: inside the basis a coordinate counts with its singular value, and what the true
        weights have outside the basis is orthogonal to it. The forecast weights are the decoded token or, with
        `changes`, the last snapshot's weights and the decoded change of its token.
        """
        return self._inside(trial, coordinates_BHD, starts_B, steps_H) + self.outside(
            trial, starts_B, steps_H, changes=changes
        )

    def outside(
        self, trial: int, starts_B: NDArray[np.integer], steps_H: Sequence[int], *, changes: bool
    ) -> NDArray[np.float64]:
        """The part of `squared_errors` that no forecast changes: what the true weights, or their change since the
        start, have outside the basis; (B, H)."""
        if not changes:
            return self.outside_NT[trial][starts_B[:, None] + np.asarray(steps_H)]
        moved_BH = self.moved_NTF[trial][starts_B[:, None], np.asarray(steps_H) - 1]
        seen_BH = self._inside(trial, self.coordinates_NTD[trial][starts_B, None], starts_B, steps_H)
        return np.maximum(moved_BH - seen_BH, 0.0)

    def _inside(
        self,
        trial: int,
        coordinates_BHD: NDArray[np.floating],
        starts_B: NDArray[np.integer],
        steps_H: Sequence[int],
    ) -> NDArray[np.float64]:
        true_BHD = self.coordinates_NTD[trial][starts_B[:, None] + np.asarray(steps_H)]
        apart_BHD = np.subtract(coordinates_BHD, true_BHD, dtype=np.float64) * self.singular_values_ND[trial]
        return np.square(apart_BHD).sum(axis=-1)


def tokens_of(seed: int, weights_TP: Rows, fitted: FittedBasis, moved_TF: NDArray[np.float64]) -> Tokens:
    """Tokens of one trial whose basis is fitted, and whose snapshots are so far from the next F."""
    num_snapshots = weights_TP.shape[0]
    outside_T = np.zeros(num_snapshots)
    for start in range(0, num_snapshots, SNAPSHOTS_AT_ONCE):
        part = slice(start, start + SNAPSHOTS_AT_ONCE)
        outside_TP = weights_TP[part].astype(np.float64) - fitted.decode(fitted.coordinates_TD[part])
        outside_T[part] = np.square(outside_TP).sum(axis=1)
    return Tokens(
        seeds=(seed,),
        coordinates_NTD=fitted.coordinates_TD[None],
        singular_values_ND=fitted.singular_values_D[None],
        outside_NT=outside_T[None],
        moved_NTF=moved_TF[None],
    )
