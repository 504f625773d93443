"""The paper's objective (Section 3.3): squared error of every position's next token.

Shapes: N trials, B windows, K tokens of context, H forward steps, D numbers per token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import config
from tipl_ray.paper.predictor import token_errors
from tipl_ray.paper.segments import Segments
from tipl_ray.paper.temporal_svd import BASIS_FILE
from tipl_ray.paper.tokens import Tokens
from tipl_ray.paper.transformer import CausalTransformer, Normaliser
from tipl_ray.predict.objective import Objective, validation_windows
from tipl_ray.predict.representation import TrainingData


class NextToken(Objective):
    """The paper's: mean squared error of normalised tokens, at every position of a window; of a residual model in units
    of what one snapshot changes each number of a token by."""

    def __init__(self, size: config.Model, data: TrainingData, device: torch.device | str = "cpu"):
        self.normaliser = Normaliser.fit(data.train.coordinates_NTD)
        self.segments = Segments(data.train, self.normaliser, size.context, device)
        self.validation = Segments(data.validation, self.normaliser, size.context, device)
        self.chances = self.segments.num_windows
        self.model: CausalTransformer = CausalTransformer(
            size, self.segments.token_size, self.segments.num_snapshots
        ).to(device)
        if size.residual:
            self.model.change_D.copy_(self.segments.change_D())
        self._tokens: Tokens = data.validation
        self._shared, self._device = data.shared, device

    def loss(self, network: nn.Module, windows_B: NDArray[np.int64]) -> Tensor:
        """See `Objective.loss`."""
        batch = self.segments.gather(windows_B)
        return self._loss(network(batch.tokens_BKD, batch.snapshots_BK), batch.targets_BKD)

    def _loss(self, predicted_BKD: Tensor, targets_BKD: Tensor) -> Tensor:
        if self.model.size.residual:
            return (predicted_BKD - targets_BKD).div(self.model.change_D).square().mean()
        return functional.mse_loss(predicted_BKD, targets_BKD)

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """See `Objective.validate`; the skill is that after whole contexts."""
        self.model.eval()
        loss, error, displacement, count = 0.0, 0.0, 0.0, 0
        for windows_B in validation_windows(self.validation.num_windows):
            batch = self.validation.gather(windows_B)
            predicted_BKD = self.model(batch.tokens_BKD, batch.snapshots_BK)
            loss += self._loss(predicted_BKD, batch.targets_BKD).item() * len(windows_B)
            coordinates_BHD = self.normaliser.restore(predicted_BKD[:, -1:].cpu().numpy())
            trials_B, ends_B = self.validation.ends(windows_B)
            for trial in np.unique(trials_B):
                own_B = trials_B == trial
                error += self._tokens.squared_errors(
                    trial, coordinates_BHD[own_B], ends_B[own_B], (1,), changes=self.model.size.residual
                ).sum()
            displacement += self._tokens.moved_NTF[trials_B, ends_B, 0].sum()
            count += len(windows_B)
        return loss / count, float(1.0 - error / displacement) if displacement else float("nan")

    def squared_errors(
        self, model: nn.Module, starts_B: NDArray[np.int64], steps_H: Sequence[int]
    ) -> NDArray[np.float64]:
        """See `Objective.squared_errors`."""
        assert isinstance(model, CausalTransformer), "the model is of this objective's kind"
        model.eval()
        return np.stack(
            [
                token_errors(model, self.normaliser, self._tokens, trial, starts_B, steps_H, self._device)
                for trial in range(len(self._tokens.seeds))
            ]
        )

    def upper_bound(self, starts_B: NDArray[np.int64], steps_H: Sequence[int]) -> NDArray[np.float64]:
        """See `Objective.upper_bound`: the true future, projected on each trial's basis."""
        return np.stack(
            [
                self._tokens.outside(trial, starts_B, steps_H, changes=self.model.size.residual)
                for trial in range(len(self._tokens.seeds))
            ]
        )

    def standing_still(self, starts_B: NDArray[np.int64], steps_H: Sequence[int]) -> NDArray[np.float64] | None:
        """See `Objective.standing_still`: the last token, decoded in a basis that may know more than that snapshot."""
        if self.model.size.residual:
            return None
        last_NB1D = self._tokens.coordinates_NTD[:, starts_B, None]
        return np.stack(
            [
                self._tokens.squared_errors(trial, last_B1D, starts_B, steps_H, changes=False)
                for trial, last_B1D in enumerate(last_NB1D)
            ]
        )

    def about(self) -> dict[str, Any]:
        """See `Objective.about`."""
        return {"normaliser": self.normaliser.as_table()}

    def beside(self) -> dict[str, bytes]:
        """See `Objective.beside`: the basis, where the trials share one."""
        return {BASIS_FILE: self._shared.to_bytes()} if self._shared else {}
