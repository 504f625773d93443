"""The objective on the basis `window`: exact squared error of the forecast weights, from Gram matrices alone.

Shapes: B windows, K displacements of context, H forward steps.
"""

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


class WindowError(Objective):
    """Squared error of the forecast weights over that of copying the last snapshot.

    The loss is 1 - skill, mean over forward steps: windows count by how far they move, as in the figure that is
    reported. As early windows move a hundred times as far as late ones, they are drawn more often instead of weighed
    more, which is equivalent with less noise. The ridge that the model corrects is fitted here.
    """

    def __init__(
        self,
        size: config.Model,
        question: Question,
        train: Sequence[GramBand],
        validation: Sequence[GramBand],
        device: torch.device | str,
        joined: float = 0.0,
    ):
        self._joined, self._bands, self._device = joined, validation, device
        self.segments = WindowSegments(train, question, device)
        self.validation = WindowSegments(validation, question, device)
        # Half of each draw is by share: late windows are still seen, and no window's weight exceeds 2.
        total = self.segments.shares_N.sum() or 1.0
        chances_N = 0.5 * self.segments.shares_N / total + 0.5 / self.segments.num_windows
        self.chances = chances_N.cumsum() / chances_N.sum()
        importances_N = 1.0 / (chances_N * self.segments.num_windows)
        self._importances_N = torch.from_numpy(importances_N).float().to(device)
        model = WindowTransformer(size, question.steps, question.snapshots_per_iteration)
        self._moved_H = torch.from_numpy(self.segments.moved_H).float().to(device)
        ridge = Ridge(question)
        ridge.fit(Trials(bands=train, weights=tuple), Trials(bands=validation, weights=tuple))
        model.ridge_QHK.copy_(torch.from_numpy(ridge.table_QHK()))
        self.model: WindowTransformer = model.to(device)

    def loss(self, network: nn.Module, windows_B: NDArray[np.int64]) -> Tensor:
        """See `Objective.loss`."""
        batch = self.segments.gather(windows_B)
        if self._joined:
            question = self.segments.question
            batch = side_by_side(batch, question.steps, question.snapshots_per_iteration, self._joined)
        error_BH, scales_B = _error(network, batch), batch.scales_B
        weights_B = scales_B.float() * self._importances_N[torch.from_numpy(windows_B).to(scales_B.device)]
        return (error_BH * weights_B[:, None] / self._moved_H).mean()

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """See `Objective.validate`; the loss is 1 - skill, mean over forward steps."""
        self.model.eval()
        error_H, moved_H = (torch.zeros_like(self._moved_H, dtype=torch.float64) for _ in range(2))
        for windows_B in validation_windows(self.validation.num_windows):
            batch = self.validation.gather(windows_B)
            error_H += (_error(self.model, batch) * batch.scales_B[:, None]).sum(dim=0)
            moved_H += (batch.moved_BH * batch.scales_B[:, None]).sum(dim=0)
        # Where nothing moves, what is left of the loss is the error itself; skill there is none.
        loss = (error_H / torch.where(moved_H > 0, moved_H, 1.0)).mean()
        return loss.item(), 1.0 - (error_H[0] / moved_H[0]).item()

    def squared_errors(
        self, model: nn.Module, starts_B: NDArray[np.int64], steps_H: Sequence[int]
    ) -> NDArray[np.float64]:
        """See `Objective.squared_errors`. Raises ValueError for other steps than the model's."""
        assert isinstance(model, WindowTransformer), "the model is of this objective's kind"
        tipl = WindowTipl(dataclasses.replace(self.segments.question, steps=tuple(steps_H)), model, self._device)
        return np.stack([tipl.band_errors(band, starts_B) for band in self._bands])

    def upper_bound(self, starts_B: NDArray[np.int64], steps_H: Sequence[int]) -> NDArray[np.float64]:
        """See `Objective.upper_bound`: the true future, projected on each window's displacements."""
        floor = WindowFloor(dataclasses.replace(self.segments.question, steps=tuple(steps_H)))
        return np.stack([floor.band_errors(band, starts_B) for band in self._bands])


def _error(network: nn.Module, batch: WindowBatch) -> Tensor:
    """||w_hat - w||^2 of the network's forecasts, in units of the batch's scales; (B, H)."""
    coefficients_BHK = network(batch.grams_BKK, batch.phases_B, batch.progress_B, batch.learning_rates_B)
    # The square of a difference, multiplied out: coefficients meet nothing but inner products.
    quadratic_BHK = (coefficients_BHK @ batch.grams_BKK - 2.0 * batch.towards_BHK) * coefficients_BHK
    return quadratic_BHK.sum(dim=2) + batch.moved_BH
