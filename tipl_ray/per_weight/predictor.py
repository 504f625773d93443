"""TIPL on the basis `per-weight`.

Shapes: P policy weights, B starts, K displacements of context, H forward steps.
"""

import dataclasses

import numpy as np
import torch

from tipl_ray.per_weight.samples import OwnBatch, tensor_indices, unit_of
from tipl_ray.per_weight.transformer import PerWeightTransformer
from tipl_ray.predict.gram import Question
from tipl_ray.predict.predictor import Predictor, Starts, Trial, Weights
from tipl_ray.window.windows import WindowBatch

WEIGHTS_AT_ONCE = 2**12
"""Most weights, summed over windows, that are forecast at a time: their features stay in the processor's cache."""


class PerWeightTipl(Predictor):
    """The Transformer's combination of displacements, corrected weight by weight; causal."""

    name, basis = "tipl", "per-weight"

    def __init__(self, question: Question, model: PerWeightTransformer, device: torch.device | str = "cpu"):
        super().__init__(question)
        trunk = model.trunk
        if (trunk.size.context, trunk.steps, trunk.num_phases) != dataclasses.astuple(question):
            raise ValueError(
                f"the model answers for context {trunk.size.context}, steps {trunk.steps} and {trunk.num_phases} "
                f"phases, not for {question}"
            )
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
        context = self.question.context
        contexts = trial.band.contexts(starts_B, context)
        scales_B = np.diagonal(contexts.grams_BKK, axis1=1, axis2=2).mean(axis=1)
        scales = torch.from_numpy(scales_B.clip(np.finfo(np.float32).tiny)).to(self.device)

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.asarray(array)).to(self.device)

        nothing = torch.empty(0, device=self.device)
        batch = WindowBatch(
            grams_BKK=(on_device(contexts.grams_BKK) / scales[:, None, None]).float(),
            towards_BHK=nothing,
            moved_BH=nothing,
            phases_B=on_device(contexts.phases_B),
            progress_B=on_device(contexts.progress_B).float(),
            learning_rates_B=on_device(contexts.learning_rates_B).float(),
            scales_B=scales,
        )
        known_BKP = trial.weights_TP[starts_B[:, None] + np.arange(-context, 1)]
        found, units_B11 = self.model.encode(batch), unit_of(scales, known_BKP.shape[2])[:, None, None]
        forecasts = []
        for begin in range(0, known_BKP.shape[2], WEIGHTS_AT_ONCE):
            some_BKS = on_device(known_BKP[:, :, begin : begin + WEIGHTS_AT_ONCE])
            own = OwnBatch(
                known_BKS=some_BKS.diff(dim=1) / units_B11,
                weights_BS=some_BKS[:, -1],
                tensors_BS=self._tensors_P[begin : begin + WEIGHTS_AT_ONCE].expand(len(starts_B), -1),
            )
            moved_BHS = self.model.corrected(*found, own) * units_B11
            forecasts.append((some_BKS[:, -1:] + moved_BHS).cpu().numpy())
        return np.concatenate(forecasts, axis=2)
