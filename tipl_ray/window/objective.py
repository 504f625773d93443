"""The objective on the basis `window`: exact squared error of the forecast weights, from Gram matrices alone.

Shapes: B windows, K displacements of context, H forward steps.
"""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tipl_ray import config
from tipl_ray.predict.baselines import Ridge
from tipl_ray.predict.gram import GramBand, Question
from tipl_ray.predict.objective import Objective, validation_windows
from tipl_ray.predict.predictor import Trials
from tipl_ray.window.augmentation import side_by_side
from tipl_ray.window.predictor import WindowFloor, WindowTipl
from tipl_ray.window.transformer import WindowTransformer
from tipl_ray.window.windows import WindowBatch, WindowSegments


class WindowObjective(Objective):
    """Squared error of the forecast weights over that of copying the last snapshot, for any model that sees windows.

    The loss is 1 - skill, mean over forward steps: windows count by how far they move, as in the figure that is
    reported. As early windows move a hundred times as far as late ones, they are drawn more often instead of weighed
    more, which is equivalent with less noise.
    """

    def __init__(
        self,
        question: Question,
        train: Sequence[GramBand],
        validation: Sequence[GramBand],
        device: torch.device | str = "cpu",
    ):
        self.question, self.bands, self.device = question, validation, device
        self.segments = WindowSegments(train, question, device)
        self.validation = WindowSegments(validation, question, device)
        # Half of each draw is by share: late windows are still seen, and no window's weight exceeds 2.
        total = self.segments.shares_N.sum() or 1.0
        chances_N = 0.5 * self.segments.shares_N / total + 0.5 / self.segments.num_windows
        self.chances = chances_N.cumsum() / chances_N.sum()
        importances_N = 1.0 / (chances_N * self.segments.num_windows)
        self._importances_N = torch.from_numpy(importances_N).float().to(device)
        self._moved_H = torch.from_numpy(self.segments.moved_H).float().to(device)

    @abc.abstractmethod
    def errors(self, network: nn.Module, windows_B: NDArray[np.int64], *, training: bool) -> tuple[Tensor, WindowBatch]:
        """||w_hat - w||^2 at some windows of the training or the validation trials, in units of the batch's scales
        (B, H), and the batch."""

    def loss(self, network: nn.Module, windows_B: NDArray[np.int64]) -> Tensor:
        """See `Objective.loss`."""
        error_BH, batch = self.errors(network, windows_B, training=True)
        scales_B = batch.scales_B
        weights_B = scales_B.float() * self._importances_N[torch.from_numpy(windows_B).to(scales_B.device)]
        return (error_BH * weights_B[:, None] / self._moved_H).mean()

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """See `Objective.validate`; the loss is 1 - skill, mean over forward steps."""
        self.model.eval()
        error_H, moved_H = (torch.zeros_like(self._moved_H, dtype=torch.float64) for _ in range(2))
        for windows_B in validation_windows(self.validation.num_windows):
            error_BH, batch = self.errors(self.model, windows_B, training=False)
            error_H += (error_BH * batch.scales_B[:, None]).sum(dim=0)
            moved_H += (batch.moved_BH * batch.scales_B[:, None]).sum(dim=0)
        # Where nothing moves, what is left of the loss is the error itself; skill there is none.
        loss = (error_H / torch.where(moved_H > 0, moved_H, 1.0)).mean()
        return loss.item(), 1.0 - (error_H[0] / moved_H[0]).item()


class WindowError(WindowObjective):
    """The objective on the basis `window`; the ridge regression that the model corrects is fitted here."""

    def __init__(
        self,
        size: config.Model,
        question: Question,
        train: Sequence[GramBand],
        validation: Sequence[GramBand],
        device: torch.device | str = "cpu",
        joined: float = 0.0,
    ):
        super().__init__(question, train, validation, device)
        self._joined = joined
        self.model: WindowTransformer = new_model(size, question, train, validation).to(device)

    def errors(self, network: nn.Module, windows_B: NDArray[np.int64], *, training: bool) -> tuple[Tensor, WindowBatch]:
        """See `WindowObjective.errors`."""
        batch = (self.segments if training else self.validation).gather(windows_B)
        if training and self._joined:
            batch = side_by_side(batch, self.question.steps, self.question.snapshots_per_iteration, self._joined)
        coefficients_BHK = network(batch.grams_BKK, batch.phases_B, batch.progress_B, batch.learning_rates_B)
        # The square of a difference, multiplied out: coefficients meet nothing but inner products.
        quadratic_BHK = (coefficients_BHK @ batch.grams_BKK - 2.0 * batch.towards_BHK) * coefficients_BHK
        return quadratic_BHK.sum(dim=2) + batch.moved_BH, batch

    def squared_errors(
        self, model: nn.Module, starts_B: NDArray[np.int64], steps_H: Sequence[int]
    ) -> NDArray[np.float64]:
        """See `Objective.squared_errors`. Raises ValueError for other steps than the model's."""
        assert isinstance(model, WindowTransformer), "the model is of this objective's kind"
        tipl = WindowTipl(dataclasses.replace(self.question, steps=tuple(steps_H)), model, self.device)
        return np.stack([tipl.band_errors(band, starts_B) for band in self.bands])

    def upper_bound(self, starts_B: NDArray[np.int64], steps_H: Sequence[int]) -> NDArray[np.float64]:
        """See `Objective.upper_bound`: the true future, projected on each window's displacements."""
        floor = WindowFloor(dataclasses.replace(self.question, steps=tuple(steps_H)))
        return np.stack([floor.band_errors(band, starts_B) for band in self.bands])


def new_model(
    size: config.Model, question: Question, train: Sequence[GramBand], validation: Sequence[GramBand]
) -> WindowTransformer:
    """An untrained model, which corrects the ridge regression that is fitted on these trials."""
    model = WindowTransformer(size, question.steps, question.snapshots_per_iteration)
    ridge = Ridge(question)
    ridge.fit(Trials(bands=train, weights=tuple), Trials(bands=validation, weights=tuple))
    model.ridge_QHK.copy_(torch.from_numpy(ridge.table_QHK()))
    return model
