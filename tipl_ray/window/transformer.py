"""Our causal Transformer: inner products of K displacements in, coefficients that combine these out.

All H forward steps are answered at once, and one set of weights serves policies of any size. Knows nothing of trials or
how it is trained.

Shapes: B windows, K tokens of context, H forward steps, Q phases of a PPO iteration, E embedding, R ridge regressions.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import config
from tipl_ray.digest import as_table
from tipl_ray.predict.blocks import DTYPE, Blocks
from tipl_ray.predict.context_ridge import CONTEXT_PENALTIES, ContextRidge, displacement_tokens
from tipl_ray.predict.gram import Question
from tipl_ray.predict.models import SavedModel

CLOCK_SIZE = 4


class WindowTransformer(SavedModel):
    """TIPL on the basis `window`: each displacement of the context is a token, answered with H coefficients.

    A token holds nothing but the displacement's cosines with the context's others and its length against theirs, the
    phase in which it was made and, depending on `size.clock`, the trial's progress: neither the number of weights
    nor their scale. The model weighs two kinds of ridge regression against each other, one that other trials were
    fitted on, by phase, which it is given, and `ContextRidge`, and corrects their coefficients.
    """

    def __init__(self, size: config.Model, steps: tuple[int, ...], num_phases: int):
        super().__init__()
        self.size, self.steps, self.num_phases = size, tuple(steps), num_phases
        self.embed_token = nn.Linear(size.context + 1, size.embedding, dtype=DTYPE)
        self.embed_position = nn.Embedding(size.context, size.embedding, dtype=DTYPE)
        self.embed_phase = nn.Embedding(num_phases, size.embedding, dtype=DTYPE)
        self.embed_clock = nn.Linear(CLOCK_SIZE, size.embedding, bias=False, dtype=DTYPE)
        self.blocks = Blocks(size)
        self.final_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.predict = nn.Linear(size.embedding, len(steps), dtype=DTYPE)
        self.weigh = nn.Linear(size.embedding, len(steps) * (1 + len(CONTEXT_PENALTIES)), dtype=DTYPE)
        self.context_ridge = ContextRidge(size.context, self.steps, num_phases)
        self.register_buffer("ridge_QHK", torch.zeros(num_phases, len(steps), size.context, dtype=DTYPE))
        self.ridge_QHK: Tensor
        nn.init.normal_(self.embed_position.weight, std=0.02)
        nn.init.zeros_(self.predict.bias)
        # The first forecasts are the fitted ridge's own, but for a whisper.
        nn.init.normal_(self.predict.weight, std=0.002)
        nn.init.normal_(self.weigh.weight, std=0.002)
        with torch.no_grad():
            self.weigh.bias.copy_(torch.eye(1 + len(CONTEXT_PENALTIES))[0].repeat(len(steps)))

    def forward(self, grams_BKK: Tensor, phases_B: Tensor, progress_B: Tensor, learning_rates_B: Tensor) -> Tensor:
        """Coefficients of the K displacements in each forward step; (B, H, K). What comes in: see `gram.Contexts`."""
        hidden_BKE = self.encode(grams_BKK, phases_B, progress_B, learning_rates_B)
        return self.answer(hidden_BKE, grams_BKK, phases_B)

    def encode(self, grams_BKK: Tensor, phases_B: Tensor, progress_B: Tensor, learning_rates_B: Tensor) -> Tensor:
        """What it knows after each displacement; (B, K, E)."""
        hidden_BKE = self.embed_token(displacement_tokens(grams_BKK)) + self.embed_position.weight
        if self.size.phase:
            # The last displacement led to the start's phase, the one before it to the phase before.
            ages_K = torch.arange(self.size.context - 1, -1, -1, device=phases_B.device)
            hidden_BKE = hidden_BKE + self.embed_phase((phases_B[:, None] - ages_K) % self.num_phases)
        if self.size.clock != "none":
            clock_B = progress_B if self.size.clock == "progress" else 1.0 - learning_rates_B
            hidden_BKE = hidden_BKE + self.embed_clock(_clock_features(clock_B.float()))[:, None]
        hidden_BKE = functional.dropout(hidden_BKE, self.size.dropout, self.training)
        hidden: Tensor = self.final_norm(self.blocks(hidden_BKE))
        return hidden

    def answer(self, hidden_BKE: Tensor, grams_BKK: Tensor, phases_B: Tensor) -> Tensor:
        """The coefficients that follow from what it knows; (B, H, K)."""
        fitted_BH1K, own_BHRK = self.ridge_QHK[phases_B][:, :, None], self.context_ridge(grams_BKK, CONTEXT_PENALTIES)
        # The last token alone has seen them all.
        shares_BH1R = self.weigh(hidden_BKE[:, -1]).unflatten(-1, (len(self.steps), 1, -1))
        weighed_BHK = (shares_BH1R @ torch.cat((fitted_BH1K, own_BHRK.float()), dim=2)).squeeze(2)
        return weighed_BHK + self.predict(hidden_BKE).transpose(1, 2)

    @property
    def question(self) -> Question:
        """The question that it was trained for."""
        return Question(context=self.size.context, steps=self.steps, snapshots_per_iteration=self.num_phases)

    def check_question(self, question: Question) -> None:
        """Raise ValueError for a question that it was not trained for."""
        if question != self.question:
            raise ValueError(
                f"the model answers for context {self.size.context}, steps {self.steps} and {self.num_phases} phases, "
                f"not for {question}"
            )

    def described(self) -> dict[str, Any]:
        """See `SavedModel.described`."""
        return {"model": as_table(self.size), **{"steps": self.steps, "num_phases": self.num_phases}}

    @classmethod
    def described_by(cls, about: Mapping[str, Any]) -> Self:
        """An untrained model of the size given in model.json."""
        return cls(config.Model(**about["model"]), tuple(about["steps"]), about["num_phases"])


def _clock_features(clock_B: Tensor) -> Tensor:
    """A share of the trial, scaled so that its beginning, where most happens, is resolved finely; (B, CLOCK_SIZE)."""
    return torch.stack((clock_B, clock_B**2, torch.exp(-10 * clock_B), torch.exp(-50 * clock_B)), dim=1)
