"""The paper's objective (Section 3.3): squared error of every position's next token.

Shapes: B windows, K tokens of context, D numbers per token.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import config
from tipl_ray.paper.tokens import Segments, Tokens
from tipl_ray.paper.transformer import CausalTransformer, Normaliser
from tipl_ray.predict.objective import Objective, validation_windows


class NextToken(Objective):
    """The paper's: mean squared error of normalised tokens, at every position of a window."""

    def __init__(self, size: config.Model, train: Tokens, validation: Tokens, device: torch.device | str):
        self.normaliser = Normaliser.fit(train.coordinates_NTD)
        self.segments = Segments(train, self.normaliser, size.context, device)
        self.validation = Segments(validation, self.normaliser, size.context, device)
        self.chances = self.segments.num_windows
        self.model: CausalTransformer = CausalTransformer(
            size, self.segments.token_size, self.segments.num_snapshots
        ).to(device)

    def loss(self, network: nn.Module, windows_B: NDArray[np.int64]) -> Tensor:
        """See `Objective.loss`."""
        batch = self.segments.gather(windows_B)
        return functional.mse_loss(network(batch.tokens_BKD, batch.snapshots_BK), batch.targets_BKD)

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """See `Objective.validate`; the skill is that after whole contexts."""
        self.model.eval()
        loss, error, displacement, count = 0.0, 0.0, 0.0, 0
        for windows_B in validation_windows(self.validation.num_windows):
            batch = self.validation.gather(windows_B)
            predicted_BKD = self.model(batch.tokens_BKD, batch.snapshots_BK)
            loss += functional.mse_loss(predicted_BKD, batch.targets_BKD).item() * len(windows_B)
            error_B, displacement_B = self.validation.one_step_errors(windows_B, predicted_BKD[:, -1])
            error += error_B.sum().item()
            displacement += displacement_B.sum().item()
            count += len(windows_B)
        return loss / count, 1.0 - error / displacement if displacement else float("nan")

    def about(self) -> dict[str, Any]:
        """See `Objective.about`."""
        return {"normaliser": self.normaliser.as_table()}
