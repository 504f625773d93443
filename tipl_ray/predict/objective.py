"""What a model is trained for, whatever it is: its loss on a batch of windows, and its validation.

Knows nothing of optimisers, workers or checkpoints. Shapes: N trials, B windows, H forward steps.
"""

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tipl_ray.predict.models import SavedModel


def draw_windows(
    chances: int | NDArray[np.float64], step: int, batch_size: int, seed: int, rank: int = 0, num_workers: int = 1
) -> NDArray[np.int64]:
    """One worker's share of the windows that a step trains on, drawn with replacement.

    `chances` are the number of windows, all of them as likely, or the window's probabilities, summed up to each. The
    step is the counter of a counter-based generator: no state to save, and the union over the workers is the same
    global batch whatever their number, which must divide the batch size.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    if isinstance(chances, int):
        return generator.integers(chances, size=batch_size)[rank::num_workers]
    return np.searchsorted(chances, generator.random(batch_size), side="right")[rank::num_workers]


VALIDATION_WINDOWS = 4096
"""Most windows that a validation takes, evenly spaced over the validation trials."""

VALIDATION_BATCH = 256


class Objective(abc.ABC):
    """A model and what it is trained for."""

    model: SavedModel
    chances: int | NDArray[np.float64]
    """How windows of the training trials are drawn: see `draw_windows`."""

    @abc.abstractmethod
    def loss(self, network: nn.Module, windows_B: NDArray[np.int64]) -> Tensor:
        """Mean over some of the training trials' windows; `network` is the model, or its shell over many workers."""

    @abc.abstractmethod
    def validate(self) -> tuple[float, float]:
        """The validation trials' loss, which chooses the best model, and the one-step skill in weights.

        The skill can be compared between bases. It is NaN for trajectories that do not move.
        """

    def about(self) -> dict[str, Any]:
        """What is needed besides the model's weights to use it, as JSON."""
        return {}

    def beside(self) -> dict[str, bytes]:
        """Further files of the model."""
        return {}

    @abc.abstractmethod
    def squared_errors(
        self, model: nn.Module, starts_B: NDArray[np.int64], steps_H: Sequence[int]
    ) -> NDArray[np.float64]:
        """||w_hat - w||^2 of a model of this kind, such as the best so far, at some windows of each validation trial;
        exact, without their weights; (N, B, H)."""

    @abc.abstractmethod
    def upper_bound(self, starts_B: NDArray[np.int64], steps_H: Sequence[int]) -> NDArray[np.float64]:
        """The same of the true future, as well as the representation can express it: no model does better."""

    def standing_still(self, starts_B: NDArray[np.int64], steps_H: Sequence[int]) -> NDArray[np.float64] | None:
        """The same of a model that predicts no change: what the representation alone is worth. None where that is
        copying the last snapshot."""
        return None


def validation_windows(num_windows: int) -> Iterator[NDArray[np.int64]]:
    """The windows that a validation takes, evenly spaced, in batches."""
    windows = np.linspace(0, num_windows - 1, min(num_windows, VALIDATION_WINDOWS)).astype(np.int64)
    for begin in range(0, len(windows), VALIDATION_BATCH):
        yield windows[begin : begin + VALIDATION_BATCH]
