"""TIPL on the basis `per-weight`.

Shapes: P policy weights, B starts, K displacements of context, H forward steps.
"""

import numpy as np
import torch

from tipl_ray.per_weight.samples import OwnBatch, tensor_indices, unit_of
from tipl_ray.per_weight.transformer import PerWeightTransformer
from tipl_ray.predict.gram import Question
from tipl_ray.predict.predictor import Predictor, Starts, Trial, Weights

WEIGHTS_AT_ONCE = 2**12
"""Most weights, summed over windows, that are forecast at a time: their features stay in the processor's cache."""


class PerWeightTipl(Predictor):
    """The Transformer's combination of displacements, corrected weight by weight; causal."""

    name, basis = "tipl", "per-weight"

    def __init__(self, question: Question, model: PerWeightTransformer, device: torch.device | str = "cpu"):
        super().__init__(question)
        model.trunk.check_question(question)
        self.model, self.device = model.to(device).eval(), device
        self._tensors_P = torch.from_numpy(tensor_indices(model.layout)).to(device)

    @torch.inference_mode()
    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """See `Predictor.forecast`. Raises ValueError for policies of another size than the model's."""
        num_weights = trial.weights_TP.shape[1]
        if num_weights != self.model.num_weights:
            raise ValueError(
                f"the model forecasts policies of {self.model.num_weights:,} weights, not of {num_weights:,}; train "
                "one on this data set"
            )
        starts_B, size = np.asarray(starts_B), max(1, WEIGHTS_AT_ONCE // num_weights)
        forecast_BHP = np.empty((len(starts_B), len(self.question.steps), num_weights), np.float32)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for begin in range(0, len(starts_B), size):
                forecast_BHP[begin : begin + size] = self._some(trial, starts_B[begin : begin + size])
        return forecast_BHP

    def _some(self, trial: Trial, starts_B: Starts) -> Weights:
        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.asarray(array)).to(self.device)

        context, num_weights = self.question.context, trial.weights_TP.shape[1]
        contexts = trial.band.contexts(starts_B, context)
        found = self.model.encode(*map(on_device, contexts))
        scales_B = np.diagonal(contexts.grams_BKK, axis1=1, axis2=2).mean(axis=1)
        units_B11 = unit_of(on_device(scales_B), num_weights)[:, None, None]
        known_BKP = trial.weights_TP[starts_B[:, None] + np.arange(-context, 1)]
        forecasts = []
        for begin in range(0, num_weights, WEIGHTS_AT_ONCE):
            some_BKS = on_device(known_BKP[:, :, begin : begin + WEIGHTS_AT_ONCE])
            own = OwnBatch(
                known_BKS=some_BKS.diff(dim=1) / units_B11,
                weights_BS=some_BKS[:, -1],
                tensors_BS=self._tensors_P[begin : begin + WEIGHTS_AT_ONCE].expand(len(starts_B), -1),
            )
            moved_BHS = self.model.corrected(*found, own) * units_B11
            forecasts.append((some_BKS[:, -1:] + moved_BHS).cpu().numpy())
        return np.concatenate(forecasts, axis=2)
