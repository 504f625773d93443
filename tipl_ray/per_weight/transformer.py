"""TIPL for single weights: our causal Transformer, and a small network that corrects its forecast weight by weight.

Shapes: B windows, S weights, K displacements of context, H forward steps, E width.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray.data.snapshots import Layout
from tipl_ray.per_weight.samples import OwnBatch, tensor_indices
from tipl_ray.predict.blocks import DTYPE
from tipl_ray.predict.models import SavedModel
from tipl_ray.window.transformer import WindowTransformer

WIDTH, DEPTH = 64, 2
"""Size of the network that corrects: its width, and hidden layers after the first."""
SMALLEST_MOVE = 1e-3
"""Least size of a weight's displacements, in units of all weights' root mean square."""


class PerWeightTransformer(SavedModel):
    """The Transformer on the basis `window`, and a correction that depends on each weight.

    The Transformer's forecast of a weight is a combination of that weight's displacements, with coefficients that are
    the same for all weights. The correction's inputs are this forecast, the weight's own displacements, its value, the
    tensor that it belongs to, and what the Transformer knows of the window. It is not a combination of displacements,
    so the span of the context does not bound it. It is 0 before any training. Fits policies of one layout.
    """

    def __init__(self, trunk: WindowTransformer, layout: Layout):
        super().__init__()
        size, steps = trunk.size, trunk.steps
        self.layout = tuple((name, tuple(shape), offset) for name, shape, offset in layout)
        self.trunk = trunk
        self.embed_weight = nn.Linear(size.context + len(steps) + 3, WIDTH, dtype=DTYPE)
        self.embed_tensor = nn.Embedding(len(self.layout), WIDTH, dtype=DTYPE)
        self.embed_window = nn.Linear(size.embedding, WIDTH, bias=False, dtype=DTYPE)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=DTYPE) for _ in range(DEPTH))
        self.correct = nn.Linear(WIDTH, len(steps), dtype=DTYPE)
        nn.init.normal_(self.embed_tensor.weight, std=0.02)
        for parameter in (self.correct.weight, self.correct.bias):
            nn.init.zeros_(parameter)

    def forward(
        self, grams_BKK: Tensor, phases_B: Tensor, progress_B: Tensor, learning_rates_B: Tensor, own: OwnBatch
    ) -> Tensor:
        """What each weight moves by at each forward step, in the window's unit; (B, H, S). What comes in: see
        `gram.Contexts`."""
        return self.corrected(*self.encode(grams_BKK, phases_B, progress_B, learning_rates_B), own)

    def encode(
        self, grams_BKK: Tensor, phases_B: Tensor, progress_B: Tensor, learning_rates_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The Transformer's coefficients (B, H, K), and what it knows after the last displacement (B, E)."""
        hidden_BKE = self.trunk.encode(grams_BKK, phases_B, progress_B, learning_rates_B)
        return self.trunk.answer(hidden_BKE, grams_BKK, phases_B), hidden_BKE[:, -1]

    def corrected(self, coefficients_BHK: Tensor, hidden_BE: Tensor, own: OwnBatch) -> Tensor:
        """As `forward`, of what `encode` has found; some of a policy's weights at a time will do."""
        combined_BHS = coefficients_BHK @ own.known_BKS
        size_BS1 = own.known_BKS.square().mean(dim=1).sqrt().clamp_min(SMALLEST_MOVE)[:, :, None]
        relative_BSK = own.known_BKS.transpose(1, 2) / size_BS1
        features = (
            combined_BHS.transpose(1, 2) / size_BS1,
            relative_BSK,
            size_BS1.log(),
            relative_BSK.abs().amax(dim=2, keepdim=True),
            own.weights_BS[:, :, None],
        )
        within_BSE = self.embed_weight(torch.cat(features, dim=2)) + self.embed_tensor(own.tensors_BS)
        within_BSE = functional.gelu(within_BSE + self.embed_window(hidden_BE)[:, None])
        for layer in self.hidden:
            within_BSE = within_BSE + functional.gelu(layer(within_BSE))
        return combined_BHS + (size_BS1 * self.correct(within_BSE)).transpose(1, 2)

    @property
    def num_weights(self) -> int:
        """Weights P of the policies that it fits."""
        return len(tensor_indices(self.layout))

    def described(self) -> dict[str, Any]:
        """See `SavedModel.described`."""
        return {**self.trunk.described(), "layout": self.layout}

    @classmethod
    def described_by(cls, about: Mapping[str, Any]) -> Self:
        """An untrained model of the size given in model.json."""
        return cls(WindowTransformer.described_by(about), about["layout"])
