"""Banded Gram matrices: what the causal basis `window` knows of a trajectory, whatever the number of its weights.

A displacement is the step from one snapshot to the next. A forecast that combines a context's displacements has a
squared error that is a quadratic form in their inner products, so a band of the displacements' Gram matrix is all that
training and judging such forecasts need. Knows one trajectory as an array; knows nothing of trials or predictors.

Shapes: T snapshots, P policy weights, S = T - 1 displacements (the one of index s leads from snapshot s to s + 1),
W width of the band, B windows, K displacements of context, F displacements of future, N = K + F, H forward steps.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 64 * 2**20
"""Most that is held in float64 of a trajectory at a time."""
ROWS_AT_ONCE = 64
"""Displacements whose inner products are one matrix product; more waste products outside the band."""

Array = NDArray[np.floating]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GramBand:
    """Inner products of the displacements of one trajectory that lie near each other."""

    products_SW: NDArray[np.float64]
    """<d_s, d_{s+j}> in row s and column j; 0 where the trajectory has ended."""

    @property
    def num_snapshots(self) -> int:
        return len(self.products_SW) + 1

    def windows(self, starts_B: NDArray[np.integer], context: int, future: int) -> NDArray[np.float64]:
        """Gram matrices of the K displacements up to each start and the F after it; (B, N, N).

        A start is the index of the last snapshot known. Raises ValueError where a window leaves the trajectory or the
        band.
        """
        check_starts(self.num_snapshots, starts_B, context, future)
        size = context + future
        if size > self.products_SW.shape[1]:
            raise ValueError(f"windows of {size} displacements exceed the band's width {self.products_SW.shape[1]}")
        first_NN, offset_NN = band_index(size)
        firsts_B11 = np.asarray(starts_B)[:, None, None] - context
        return self.products_SW[firsts_B11 + first_NN, offset_NN]


def gram_band(weights_TP: Array, width: int) -> GramBand:
    """The band of a trajectory, read once, in blocks of columns; float64 throughout.

    Raises ValueError if a weight is not finite.
    """
    num_displacements = len(weights_TP) - 1
    products_SW = np.zeros((num_displacements, width))
    step = max(1, BLOCK_BYTES // (8 * len(weights_TP)))
    for column in range(0, weights_TP.shape[1], step):
        displacements_Sp = np.diff(weights_TP[:, column : column + step].astype(np.float64), axis=0)
        for first in range(0, num_displacements, ROWS_AT_ONCE):
            rows_Rp = displacements_Sp[first : first + ROWS_AT_ONCE]
            near_RM = rows_Rp @ displacements_Sp[first : first + ROWS_AT_ONCE + width - 1].T
            padded_RM = np.pad(near_RM, ((0, 0), (0, len(rows_Rp) + width - 1 - near_RM.shape[1])))
            # Row r of the band starts r columns to the right: a view whose rows are one entry longer than the array's.
            step_r, step_m = padded_RM.strides
            shape = (len(rows_Rp), width)
            products_SW[first : first + len(rows_Rp)] += np.lib.stride_tricks.as_strided(
                padded_RM, shape, (step_r + step_m, step_m)
            )
    if not np.isfinite(products_SW).all():
        raise ValueError("weights_TP has entries that are NaN or infinite: there are no inner products of them")
    return GramBand(products_SW=products_SW)


def band_index(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row (beyond the window's first) and column of the band for each entry of a window's Gram matrix; (N, N) each."""
    index_N = np.arange(size)
    return np.minimum.outer(index_N, index_N), np.abs(np.subtract.outer(index_N, index_N))


def futures(steps_H: Sequence[int]) -> NDArray[np.float64]:
    """The sums of future displacements that forward steps are made of: ones up to each step; (H, F)."""
    return (np.arange(max(steps_H)) < np.asarray(steps_H)[:, None]).astype(np.float64)


def squared_errors(grams_BNN: Array, coefficients_BHK: Array, steps_H: Sequence[int]) -> NDArray[np.float64]:
    """||w_hat - w||^2 of forecasts that combine a context's displacements, from the Gram matrix alone; (B, H)."""
    future_BHF = np.broadcast_to(futures(steps_H), (len(grams_BNN), len(steps_H), max(steps_H)))
    apart_BHN = np.concatenate([-coefficients_BHK, future_BHF], axis=2)
    # Rounding may leave a perfect forecast a hair below zero.
    return np.maximum(np.einsum("bhn,bhn->bh", apart_BHN @ grams_BNN, apart_BHN), 0.0)


def check_starts(num_snapshots: int, starts_B: NDArray[np.integer], before: int, after: int) -> None:
    """Raise ValueError for a start without so many snapshots before it, or after it."""
    first, last = before, num_snapshots - 1 - after
    outside = [int(start) for start in starts_B if not first <= start <= last]
    if outside:
        raise ValueError(
            f"start={outside[0]} is not between {first} and {last}: {before} snapshots are needed before it and "
            f"{after} after it, of {num_snapshots}"
        )
