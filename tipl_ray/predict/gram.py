"""Banded Gram matrices: all that the causal basis `window` knows of a trajectory, whatever the number of its weights.

A displacement is the step from one snapshot to the next. A forecast that combines a context's displacements has a
squared error that is a quadratic form in their inner products, so a band of the displacements' Gram matrix is all that
training and judging such forecasts need. Knows one trajectory as an array; knows nothing of trials or predictors.

Shapes: T snapshots, P policy weights, S = T - 1 displacements (the one of index s leads from snapshot s to s + 1),
W width of the band, B windows, K displacements of context, F of future, N = K + F, H forward steps.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tipl_ray import config
from tipl_ray.data.rows import Rows

BLOCK_BYTES = 64 * 2**20
"""Most that is held in float64 of a trajectory at a time."""
ROWS_AT_ONCE = 64
"""Displacements whose inner products are one matrix product; more of them waste more outside the band."""

Array = NDArray[np.floating]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The question to every predictor: the weights at some forward steps, from a context of displacements."""

    context: int
    """Displacements K up to the last snapshot known."""
    steps: tuple[int, ...]
    """Forward steps h, rising."""
    snapshots_per_iteration: int
    """Snapshots per PPO iteration: the number of phases Q."""

    @classmethod
    def of(cls, experiment: config.Experiment) -> Self:
        """The question that an experiment asks."""
        return cls(
            context=experiment.model.context,
            steps=experiment.evaluate.steps,
            snapshots_per_iteration=experiment.snapshots_per_iteration,
        )

    @property
    def future(self) -> int:
        """Displacements F that the furthest step is made of."""
        return max(self.steps)

    @property
    def width(self) -> int:
        """Width of the Gram band that holds every window."""
        return self.context + self.future


class Contexts(NamedTuple):
    """The input of a causal predictor on the basis `window` for B windows; none of it comes after their starts."""

    grams_BKK: NDArray[np.float64]
    """Inner products of the K displacements that end at each start."""
    phases_B: NDArray[np.integer]
    """Snapshots of the PPO iteration before the start; 0 where one has just ended."""
    progress_B: NDArray[np.float64]
    """Share of the trial that has passed, 0 to 1."""
    learning_rates_B: NDArray[np.float64]
    """PPO's learning rate at the start, as a share of the trial's first."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GramBand:
    """Inner products of nearby displacements of one trajectory, and its clocks."""

    products_SW: NDArray[np.float64]
    """<d_s, d_{s+j}> in row s and column j; 0 where the trajectory has ended."""
    learning_rates_T: NDArray[np.float64]
    """PPO's learning rate at each snapshot, as a share of the trial's first."""
    snapshots_per_iteration: int
    """Snapshots per PPO iteration: the number of phases."""

    @property
    def num_snapshots(self) -> int:
        """Snapshots of the trajectory T."""
        return len(self.products_SW) + 1

    def windows(self, starts_B: NDArray[np.integer], context: int, future: int) -> NDArray[np.float64]:
        """Gram matrices of the K displacements up to each start and the F after it; (B, N, N).

        A start is the index of the last snapshot known. Raises ValueError where a window leaves the trajectory or the
        band.
        """
        check_starts(self.num_snapshots, starts_B, context, future)
        if context + future > self.products_SW.shape[1]:
            raise ValueError(
                f"windows of {context} + {future} displacements exceed the band's width {self.products_SW.shape[1]}"
            )
        row_NN, column_NN = band_index(context + future)
        firsts_B11 = np.asarray(starts_B)[:, None, None] - context
        return self.products_SW[firsts_B11 + row_NN, column_NN]

    def contexts(self, starts_B: NDArray[np.integer], context: int) -> Contexts:
        """The input of a causal predictor for the windows that end at these starts. Raises as `windows` does."""
        starts_B = np.asarray(starts_B, np.int64)
        return Contexts(
            grams_BKK=self.windows(starts_B, context, 0),
            phases_B=starts_B % self.snapshots_per_iteration,
            progress_B=starts_B / (self.num_snapshots - 1),
            learning_rates_B=self.learning_rates_T[starts_B],
        )


def make_band(
    weights_TP: Rows, width: int, *, snapshots_per_iteration: int = 1, learning_rates_T: Array | None = None
) -> GramBand:
    """The band of a trajectory, read in parts; float64 throughout. Raises ValueError if a weight is not finite."""
    return GramBand(
        products_SW=banded_products(weights_TP, width),
        learning_rates_T=rate_shares(learning_rates_T, weights_TP.shape[0]),
        snapshots_per_iteration=snapshots_per_iteration,
    )


def rate_shares(learning_rates_T: Array | None, num_snapshots: int) -> NDArray[np.float64]:
    """Learning rates as shares of the first that is not 0, for some rise from there; all 1 where they are not known."""
    if learning_rates_T is None:
        return np.ones(num_snapshots)
    rates_T = np.asarray(learning_rates_T, np.float64)
    return rates_T / (rates_T[0] or next((rate for rate in rates_T if rate), 1.0))


def banded_products(weights_TP: Rows, width: int) -> NDArray[np.float64]:
    """Inner products of displacements less than `width` apart, in blocks of rows and of columns; (S, W)."""
    num_displacements, num_weights = weights_TP.shape[0] - 1, weights_TP.shape[1]
    products_SW = np.zeros((num_displacements, width))
    for first in range(0, num_displacements, ROWS_AT_ONCE):
        some_TP = weights_TP[first : min(first + ROWS_AT_ONCE + width, num_displacements + 1)]
        products_RW = products_SW[first : first + ROWS_AT_ONCE]
        columns = max(1, BLOCK_BYTES // (8 * len(some_TP)))
        for column in range(0, num_weights, columns):
            near_Mp = np.diff(some_TP[:, column : column + columns].astype(np.float64), axis=0)
            near_RM = near_Mp[: len(products_RW)] @ near_Mp.T
            padded_RM = np.pad(near_RM, ((0, 0), (0, len(products_RW) + width - 1 - near_RM.shape[1])))
            # Row r of the band begins r columns to the right: the same memory, seen with rows one entry longer.
            strides = (sum(padded_RM.strides), padded_RM.strides[1])
            products_RW += np.lib.stride_tricks.as_strided(padded_RM, products_RW.shape, strides)
    if not np.isfinite(products_SW).all():
        raise ValueError("weights_TP has entries that are NaN or infinite: so there are no inner products")
    return products_SW


def moved_squares(products_SW: Array, future: int) -> NDArray[np.float64]:
    """Squared distance of each snapshot's weights from those of the next F, from the band alone; (T, F).

    What would be after the last snapshot counts as the last.
    """
    num_displacements = len(products_SW)
    moved_TF = np.zeros((num_displacements + 1, future))
    for step in range(future):
        moved_TF[:, step] = moved_TF[:, max(step - 1, 0)]
        if step >= num_displacements:
            continue
        # One displacement more: its own square, and twice its products with those since the snapshot.
        count = num_displacements - step
        added_S = products_SW[step:, 0].astype(np.float64)
        for first in range(step):
            added_S += 2.0 * products_SW[first : first + count, step - first]
        moved_TF[:count, step] += added_S
    return np.maximum(moved_TF, 0.0)


def band_index(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row, from the window's first on, and column of the band for each entry of a window's Gram matrix; (N, N) each."""
    index_N = np.arange(size)
    return np.minimum.outer(index_N, index_N), np.abs(np.subtract.outer(index_N, index_N))


def future_sums(steps_H: Sequence[int]) -> NDArray[np.float64]:
    """Which future displacements add up to each forward step: ones, then zeros; (H, F)."""
    return (np.arange(max(steps_H)) < np.asarray(steps_H)[:, None]).astype(np.float64)


def squared_errors(grams_BNN: Array, coefficients_BHK: Array, steps_H: Sequence[int]) -> NDArray[np.float64]:
    """||w_hat - w||^2 of forecasts that combine a context's displacements, from the Gram matrix alone; (B, H).

    The true displacement itself is the error of coefficients 0.
    """
    future_BHF = np.broadcast_to(future_sums(steps_H), (len(grams_BNN), len(steps_H), max(steps_H)))
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
