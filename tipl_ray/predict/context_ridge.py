"""Ridge regression that is fitted on nothing but the context at hand.

Shapes: B windows, K displacements of context, H forward steps, F of them one by one, R ridge regressions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tipl_ray.predict.blocks import DTYPE

SMALLEST_SQUARE = 1e-30
"""Squared length below which a displacement has no direction."""

MOST_LOG_LENGTH = 8.0
"""Limit on a token's log length, since a displacement may be 0."""

CONTEXT_PENALTIES = (0.1, 0.3, 1.0, 3.0)
"""Penalties of the ridge regressions on the context itself that a model weighs, in units of its mean squared length."""


def lengths_and_cosines(grams_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of displacements, and cosines between them; (B, K) and (B, K, K)."""
    lengths_BK = grams_BKK.diagonal(dim1=1, dim2=2).clamp_min(SMALLEST_SQUARE).sqrt()
    return lengths_BK, grams_BKK / (lengths_BK[:, :, None] * lengths_BK[:, None])


def displacement_tokens(grams_BKK: Tensor) -> Tensor:
    """What a Transformer sees of each displacement: its cosines with all of them, and its length beside their mean one,
    as a logarithm; (B, K, K + 1)."""
    lengths_BK, cosines_BKK = lengths_and_cosines(grams_BKK)
    logs_BK = lengths_BK.log()
    relative_BK = (logs_BK - logs_BK.mean(dim=1, keepdim=True)).clamp(-MOST_LOG_LENGTH, MOST_LOG_LENGTH)
    return torch.cat((cosines_BKK, relative_BK[:, :, None]), dim=2).float()


class ContextRidge(nn.Module):
    """Ridge regression that is fitted on nothing but the context at hand, by the period of PPO's iterations.

    The cosine of a future displacement with one of the context is taken to be what it was one, two, ... iterations
    before, mean over those in the context, and its length likewise. Cosines of which the context has none are 0.
    """

    def __init__(self, context: int, steps: tuple[int, ...], num_phases: int):
        super().__init__()
        # The context knows no cosine between displacements further apart than it is long.
        future = min(max(steps), context)
        before_FK, before_FKKK = _same_phase(context, future, num_phases)
        for name, tensor in (
            # Of float64, as a single context is: to turn them into it would cost more than to use them.
            ("_before_KF", before_FK.T.double()),
            ("_before_NM", before_FKKK.flatten(2).flatten(0, 1).T.double().contiguous()),
            ("_last_H", torch.tensor(steps, device="cpu").clamp(max=future) - 1),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self._before_KF: Tensor
        self._before_NM: Tensor
        self._last_H: Tensor

    def forward(self, grams_BKK: Tensor, penalties_R: Sequence[float]) -> Tensor:
        """Coefficients of the K displacements in each forward step for each of R penalties; (B, H, R, K).

        Penalties are in units of the displacements' mean squared length.
        """
        lengths_BK, cosines_BKK = lengths_and_cosines(grams_BKK)
        context = grams_BKK.shape[1]
        ahead_BF = lengths_BK @ self._before_KF.to(lengths_BK.dtype)
        means_BFK = (cosines_BKK.flatten(1) @ self._before_NM.to(lengths_BK.dtype)).unflatten(1, (-1, context))
        towards_BHK = (means_BFK * ahead_BF[:, :, None] * lengths_BK[:, None]).cumsum(dim=1)[:, self._last_H]
        identity_KK = torch.eye(context, dtype=grams_BKK.dtype, device=grams_BKK.device)
        penalties = torch.as_tensor(penalties_R, dtype=grams_BKK.dtype, device=grams_BKK.device)
        penalties_BR = penalties * lengths_BK.square().mean(dim=1, keepdim=True)
        matrix_BRKK = grams_BKK[:, None] + penalties_BR[:, :, None, None] * identity_KK
        return torch.linalg.solve(matrix_BRKK, towards_BHK.transpose(1, 2)[:, None]).permute(0, 3, 1, 2)


def _same_phase(context: int, future: int, num_phases: int) -> tuple[Tensor, Tensor]:
    """Means over whole iterations back: of a future displacement (F, K), of its pair with a known one (F, K, K, K).

    Displacements are numbered from the context's first on, so those of the future begin at K.
    """
    singles_FK = torch.zeros(future, context, dtype=DTYPE, device="cpu")
    pairs_FKKK = torch.zeros(future, context, context, context, dtype=DTYPE, device="cpu")
    for ahead in range(future):
        own = [index for index in range(context) if (context + ahead - index) % num_phases == 0]
        singles_FK[ahead, own] = 1.0 / max(1, len(own))
        for known in range(context):
            shifts = range(num_phases, known + 1, num_phases)
            found = [(context + ahead - shift, known - shift) for shift in shifts if ahead < shift]
            for later, earlier in found:
                pairs_FKKK[ahead, known, later, earlier] = 1.0 / len(found)
    return singles_FK, pairs_FKKK
