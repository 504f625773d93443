"""TIPL for return: predicts from the trajectory what changes to a rule's jumps are worth.

The same causal Transformer over the displacements of a context; neither network size nor weight scale is an input. Its
outputs are residuals on a rule, 0 at initialisation: a concave parabola over changes to the rule's weights of the first
displacement, the last displacement and past moves, whose maximum is the change to make; and the change that goes with a
given gain, in the way that a Decision Transformer is conditioned on return.

Shapes: B forks, K tokens of context, E embedding, C = 3 changes: of first, last and past.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tipl_ray import config
from tipl_ray.digest import as_table
from tipl_ray.predict.blocks import DTYPE, Blocks, initialise
from tipl_ray.predict.context_ridge import displacement_tokens
from tipl_ray.predict.models import SavedModel

CHANGES = 3
CLOCK_SIZE, PLACE_SIZE, EXTRA_SIZE = 5, 4, 4
FURTHEST = 1.5
"""Limit on the model's changes, in units of the changes that it was trained on."""


class Seen(NamedTuple):
    """The model's inputs at an iteration's jump."""

    grams_BKK: Tensor
    """Inner products of the K displacements before the jump, oldest first."""
    recorded_B: Tensor
    """How many of them belong to this iteration."""
    per_iteration_B: Tensor
    """Displacements per iteration, including its jump."""
    progress_B: Tensor
    """Fraction of the trial that is done, 0 to 1."""
    learning_rates_B: Tensor
    """PPO's learning rate, as a fraction of the trial's first."""
    extras_BX: Tensor
    """Inputs that only the PPO engine has: log10 of the approximate KL divergence, the surrogate objective, mean
    log-std, and the recent rise of returns; 0 if unknown."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """A model's inputs; ablations leave some out."""

    trajectory: bool = True
    """Lengths and angles of the displacements; without them only progress and learning rate."""
    extras: bool = False
    """KL divergence, surrogate objective, log-std and returns, which only the PPO engine has."""


class GainTransformer(SavedModel):
    """Outputs of the last token: a parabola over changes, and the change that goes with a gain."""

    def __init__(self, size: config.Model, sight: Sight | None = None):
        super().__init__()
        self.size, self.sight = size, sight or Sight()
        self.embed_token = nn.Linear(size.context + 1, size.embedding, dtype=DTYPE)
        self.embed_position = nn.Embedding(size.context, size.embedding, dtype=DTYPE)
        self.embed_place = nn.Linear(PLACE_SIZE, size.embedding, bias=False, dtype=DTYPE)
        self.embed_clock = nn.Linear(CLOCK_SIZE, size.embedding, bias=False, dtype=DTYPE)
        self.embed_extras = nn.Linear(EXTRA_SIZE, size.embedding, bias=False, dtype=DTYPE)
        self.embed_gain = nn.Linear(1, size.embedding, bias=False, dtype=DTYPE)
        self.blocks = Blocks(size)
        self.final_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.slope = nn.Linear(size.embedding, CHANGES, dtype=DTYPE)
        self.bend = nn.Linear(size.embedding, CHANGES * (CHANGES + 1) // 2, dtype=DTYPE)
        self.change = nn.Linear(size.embedding, CHANGES, dtype=DTYPE)
        self.apply(initialise)
        for head in (self.slope, self.change):
            nn.init.zeros_(head.weight)

    def trunk(self, seen: Seen, gains_B: Tensor | None = None) -> Tensor:
        """Hidden state of the last token; (B, E)."""
        tokens_BKD = displacement_tokens(seen.grams_BKK)
        if not self.sight.trajectory:
            tokens_BKD = torch.zeros_like(tokens_BKD)
        hidden_BKE = self.embed_token(tokens_BKD) + self.embed_position.weight
        hidden_BKE = hidden_BKE + self.embed_place(_places(seen, self.size.context))
        hidden_BKE = hidden_BKE + self.embed_clock(_clock(seen))[:, None]
        if self.sight.extras:
            hidden_BKE = hidden_BKE + self.embed_extras(seen.extras_BX.float())[:, None]
        if gains_B is not None:
            hidden_BKE = hidden_BKE + self.embed_gain(gains_B[:, None].float())[:, None]
        last_BE: Tensor = self.final_norm(self.blocks(hidden_BKE))[:, -1]
        return last_BE

    def parabola(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Slope (B, C) and positive definite curvature (B, C, C) of the gain over changes."""
        last_BE = self.trunk(seen)
        factor_BCC = last_BE.new_zeros(len(last_BE), CHANGES, CHANGES)
        rows, columns = torch.tril_indices(CHANGES, CHANGES)
        factor_BCC[:, rows, columns] = 0.3 * self.bend(last_BE)
        eye_CC = torch.eye(CHANGES, dtype=last_BE.dtype, device=last_BE.device)
        return self.slope(last_BE), factor_BCC @ factor_BCC.transpose(1, 2) + 0.05 * eye_CC

    def forward(self, seen: Seen, changes_BC: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Predicted gain (B,) of changes, in the units of the training data: over no change or, with `moments`, over
        the mean of some. Moments are those changes' mean (B, C) and that of their products (B, C, C)."""
        slope_BC, bend_BCC = self.parabola(seen)
        products_BCC = changes_BC[:, :, None] * changes_BC[:, None, :]
        if moments:
            changes_BC, products_BCC = changes_BC - moments[0], products_BCC - moments[1]
        return (slope_BC * changes_BC).sum(dim=1) - 0.5 * (bend_BCC * products_BCC).sum(dim=(1, 2))

    def best_change(self, seen: Seen) -> Tensor:
        """The maximum of the parabola (B, C), limited to `FURTHEST`."""
        slope_BC, bend_BCC = self.parabola(seen)
        return _limited(torch.linalg.solve(bend_BCC, slope_BC[:, :, None])[:, :, 0])

    def change_for(self, seen: Seen, gains_B: Tensor) -> Tensor:
        """The change (B, C) that goes with a gain."""
        return self.change(self.trunk(seen, gains_B))

    def described(self) -> dict[str, Any]:
        """See `SavedModel.described`."""
        return {"model": as_table(self.size), "sight": dataclasses.asdict(self.sight)}

    @classmethod
    def described_by(cls, about: Mapping[str, Any]) -> Self:
        """An untrained model of the size in model.json."""
        return cls(config.Model(**about["model"]), Sight(**about["sight"]))


def _limited(changes_BC: Tensor) -> Tensor:
    longest_B1 = changes_BC.abs().amax(dim=1, keepdim=True)
    return changes_BC * (FURTHEST / longest_B1.clamp_min(FURTHEST))


def _places(seen: Seen, context: int) -> Tensor:
    """Where in its iteration each displacement was made: its share, and whether it was the first, the last before the
    jump, or a jump; (B, K, PLACE_SIZE)."""
    ages_K = torch.arange(context - 1, -1, -1, device=seen.recorded_B.device)
    per_B1 = seen.per_iteration_B[:, None]
    index_BK = (seen.recorded_B[:, None] - 1 - ages_K) % per_B1
    last_BK = index_BK == per_B1 - 2
    marks = (index_BK / per_B1, index_BK == 0, last_BK, index_BK == per_B1 - 1)
    return torch.stack([mark.float() for mark in marks], dim=2)


def _clock(seen: Seen) -> Tensor:
    """How far the trial has come, and what an iteration is; (B, CLOCK_SIZE)."""
    progress_B, rates_B = seen.progress_B.float(), seen.learning_rates_B.float()
    parts = (progress_B, progress_B**2, torch.exp(-10 * progress_B), rates_B, seen.recorded_B.float().log())
    return torch.stack(parts, dim=1)
