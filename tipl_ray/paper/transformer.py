"""The paper's causal Transformer (Section 3.3): tokens of K snapshots in, the token of each one's next snapshot out.

Of the size and shape of Decision Transformer's for gym, with one token per snapshot and no Tanh on the prediction.
Knows tokens and indices, and nothing of trials or how it is trained.

Shapes: B windows, K tokens of context, H forward steps, D numbers per token, E embedding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import config
from tipl_ray.digest import as_table
from tipl_ray.predict.blocks import DTYPE, Blocks, initialise
from tipl_ray.predict.models import SavedModel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Normaliser:
    """Mean and standard deviation of each of a token's D numbers, over the training trials."""

    mean_D: NDArray[np.float32]
    deviation_D: NDArray[np.float32]

    @classmethod
    def fit(cls, coordinates_NTD: NDArray[np.float32]) -> Self:
        """Statistics over N trials; a number that never changes keeps the deviation 1, so that nothing divides by 0."""
        mean_D = coordinates_NTD.mean(axis=(0, 1), dtype=np.float64)
        deviation_D = coordinates_NTD.std(axis=(0, 1), dtype=np.float64)
        deviation_D[deviation_D <= 1e-7 * np.abs(mean_D)] = 1.0
        return cls(mean_D=mean_D.astype(np.float32), deviation_D=deviation_D.astype(np.float32))

    def normalise(self, coordinates: NDArray[np.float32]) -> NDArray[np.float32]:
        """Tokens as the model sees them: mean 0, deviation 1; (..., D)."""
        return (coordinates - self.mean_D) / self.deviation_D

    def restore(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Coordinates of tokens, the inverse of `normalise`; (..., D)."""
        return tokens * self.deviation_D + self.mean_D

    def as_table(self) -> dict[str, list[float]]:
        """Plain JSON types, exact."""
        return {"mean": self.mean_D.tolist(), "deviation": self.deviation_D.tolist()}

    @classmethod
    def from_table(cls, table: dict[str, list[float]]) -> Self:
        """The normaliser that `as_table` wrote down."""
        return cls(mean_D=np.asarray(table["mean"], np.float32), deviation_D=np.asarray(table["deviation"], np.float32))


class CausalTransformer(SavedModel):
    """The causal Transformer (Section 3.3) for tokens of D numbers and trajectories of up to `max_snapshots`."""

    change_D: Tensor
    """Of a residual model: root mean square of what one snapshot changes each number of a token by."""

    def __init__(self, size: config.Model, token_size: int, max_snapshots: int):
        super().__init__()
        self.size, self.token_size, self.max_snapshots = size, token_size, max_snapshots
        self.embed_token = nn.Linear(token_size * (2 if size.residual else 1), size.embedding, dtype=DTYPE)
        self.embed_snapshot = nn.Embedding(max_snapshots, size.embedding, dtype=DTYPE)
        self.embedding_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.blocks = Blocks(size)
        self.final_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.predict = nn.Linear(size.embedding, token_size, dtype=DTYPE)
        self.apply(initialise)
        if size.residual:
            self.register_buffer("change_D", torch.ones(token_size, dtype=DTYPE))
            # At the start nothing changes, which is the baseline that has to be beaten.
            nn.init.zeros_(self.predict.weight)

    def forward(self, tokens_BKD: Tensor, snapshots_BK: Tensor) -> Tensor:
        """Predicted token of each position's next snapshot, from that position and those before; (B, K, D).

        `snapshots_BK` are the snapshots' indices in their trajectory, int64, below `max_snapshots`. Of a window's first
        token the change is not known, and 0.
        """
        shown_BKD = tokens_BKD
        if self.size.residual:
            changes_BKD = torch.diff(tokens_BKD, dim=1, prepend=tokens_BKD[:, :1]) / self.change_D
            shown_BKD = torch.cat((tokens_BKD, changes_BKD), dim=2)
        embedded_BKE = self.embed_token(shown_BKD) + self.embed_snapshot(snapshots_BK)
        hidden_BKE = functional.dropout(self.embedding_norm(embedded_BKE), self.size.dropout, self.training)
        predicted_BKD = self.predict(self.final_norm(self.blocks(hidden_BKE)))
        return tokens_BKD + self.change_D * predicted_BKD if self.size.residual else predicted_BKD

    @torch.no_grad()
    def forecast(self, tokens_BKD: Tensor, snapshots_BK: Tensor, horizon: int) -> Tensor:
        """Tokens of the next H snapshots, each predicted from the last K known or predicted so far; (B, H, D)."""
        assert not self.training, "a forecast in training mode would be dropped out"
        predicted = []
        for _ in range(horizon):
            next_B1D = self(tokens_BKD, snapshots_BK)[:, -1:]
            predicted.append(next_B1D)
            tokens_BKD = torch.cat((tokens_BKD, next_B1D), dim=1)[:, -self.size.context :]
            next_B1 = (snapshots_BK[:, -1:] + 1).clamp(max=self.max_snapshots - 1)
            snapshots_BK = torch.cat((snapshots_BK, next_B1), dim=1)[:, -self.size.context :]
        return torch.cat(predicted, dim=1)

    def described(self) -> dict[str, Any]:
        """See `SavedModel.described`."""
        return {"model": as_table(self.size), **{"token_size": self.token_size, "max_snapshots": self.max_snapshots}}

    @classmethod
    def described_by(cls, about: Mapping[str, Any]) -> Self:
        """An untrained model of the size given in model.json."""
        return cls(config.Model(**about["model"]), about["token_size"], about["max_snapshots"])
