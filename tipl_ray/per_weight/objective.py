"""The objective on the basis `per-weight`: squared error of the forecast weights, from samples of them.

Shapes: N trials, B windows, H forward steps.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tipl_ray import config
from tipl_ray.per_weight.samples import SampleSegments, WeightSample
from tipl_ray.per_weight.transformer import PerWeightTransformer
from tipl_ray.predict.gram import Question
from tipl_ray.window.objective import WindowObjective, new_model
from tipl_ray.window.windows import WindowBatch


class PerWeightError(WindowObjective):
    """The objective for a model that forecasts single weights.

    Errors are those of each trial's sampled weights, times how many each stands for; exact where a sample is all of
    them.
    """

    def __init__(
        self,
        size: config.Model,
        question: Question,
        train: Sequence[WeightSample],
        validation: Sequence[WeightSample],
        device: torch.device | str = "cpu",
    ):
        bands, validation_bands = ([sample.band for sample in part] for part in (train, validation))
        super().__init__(question, bands, validation_bands, device)
        self._samples = SampleSegments(train, question, device)
        self._validation_samples = SampleSegments(validation, question, device)
        trunk = new_model(size, question, bands, validation_bands)
        self.model: PerWeightTransformer = PerWeightTransformer(trunk, train[0].layout).to(device)

    def errors(self, network: nn.Module, windows_B: NDArray[np.int64], *, training: bool) -> tuple[Tensor, WindowBatch]:
        """See `WindowObjective.errors`."""
        batch = (self.segments if training else self.validation).gather(windows_B)
        samples = self._samples if training else self._validation_samples
        own, moved_BHS = samples.gather(windows_B, batch.scales_B)
        contexts = (batch.grams_BKK, batch.phases_B, batch.progress_B, batch.learning_rates_B)
        return (network(*contexts, own) - moved_BHS).square().mean(dim=2), batch

    @torch.no_grad()
    def squared_errors(
        self, model: nn.Module, starts_B: NDArray[np.int64], steps_H: Sequence[int]
    ) -> NDArray[np.float64]:
        """See `Objective.squared_errors`; an estimate where samples are not all weights. Raises ValueError for other
        steps than the model's."""
        assert isinstance(model, PerWeightTransformer), "the model is of this objective's kind"
        if tuple(steps_H) != self.question.steps:
            raise ValueError(f"the model forecasts steps {self.question.steps}, not {tuple(steps_H)}")
        model.eval()
        errors, first = [], 0
        for band in self.bands:
            error_BH, batch = self.errors(model, first + starts_B - self.question.context, training=False)
            errors.append((error_BH.double() * batch.scales_B[:, None]).cpu().numpy())
            first += band.num_snapshots - self.question.width
        return np.stack(errors)

    def upper_bound(self, starts_B: NDArray[np.int64], steps_H: Sequence[int]) -> NDArray[np.float64]:
        """See `Objective.upper_bound`: no forecast is out of reach, so 0 everywhere."""
        return np.zeros((len(self.bands), len(starts_B), len(steps_H)))
