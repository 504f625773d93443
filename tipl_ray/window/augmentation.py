"""Windows joined with others, so that they represent policies that are not in the data.

Shapes: B windows, K displacements of context, F of future, N = K + F, H forward steps, Q phases of a PPO iteration.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tipl_ray.window.windows import WindowBatch

MOST_CONTRAST = 8.0
"""How unequal the parts of a policy that is made of several can be: the deviation of the logarithms of their scales."""


def side_by_side(batch: WindowBatch, steps_H: Sequence[int], num_phases: int, share: float) -> WindowBatch:
    """Join some of a batch's windows with others, and with made-up ones, so that they represent other policies.

    The weights of several policies, each at a scale of its own, are the weights of a larger one, whose displacements'
    inner products are the sum of theirs. Partners are of the same phase. The made-up ones repeat themselves with PPO's
    iterations and otherwise differ in how alike displacements are within one, and from one to the next.
    """
    (size, context), device = batch.grams_BKK.shape[:2], batch.phases_B.device
    made: dict[str, Any] = {"dtype": batch.grams_BKK.dtype, "device": device}
    contrast_B1 = MOST_CONTRAST * torch.rand(size, 1, **made)
    apart_BB = batch.phases_B[:, None] != batch.phases_B
    parts_BB = (contrast_B1 * torch.randn(size, size, **made)).masked_fill(apart_BB, -torch.inf).softmax(dim=1)
    joined_B1 = torch.rand(size, 1, **made) < share
    parts_BB = torch.where(joined_B1, parts_BB, torch.eye(size, **made))
    made_up_BNN = periodic_grams(batch.phases_B, context, max(steps_H), num_phases)
    scales_B1 = torch.where(joined_B1, torch.exp(2.0 * torch.randn(size, 1, **made)), 0.0)
    sums_HF = (torch.arange(max(steps_H), device=device) < torch.as_tensor(steps_H, device=device)[:, None]).float()
    ahead_BHN = sums_HF @ made_up_BNN[:, context:]
    made_up = {
        "grams_BKK": made_up_BNN[:, :context, :context],
        "towards_BHK": ahead_BHN[:, :, :context],
        "moved_BH": (ahead_BHN[:, :, context:] * sums_HF).sum(dim=2),
    }
    joined = {}
    for name, other in made_up.items():
        own = getattr(batch, name)
        joined[name] = (parts_BB @ own.flatten(1) + scales_B1 * other.flatten(1)).view_as(own)
    # Whoever it stands for, a window counts as much as it did.
    return batch._replace(**joined, scales_B=batch.scales_B / (1.0 + scales_B1[:, 0]))


def periodic_grams(phases_B: Tensor, context: int, future: int, num_phases: int) -> Tensor:
    """Gram matrices of displacements whose inner products repeat with PPO's iterations, of mean squared length 1;
    (B, N, N).

    As of policies with very many weights: the inner products are what they are expected to be.
    """
    size, device = len(phases_B), phases_B.device
    made: dict[str, Any] = {"dtype": torch.float32, "device": device}
    alike_B11, memory_B11, carried_B11 = torch.rand(3, size, 1, 1, **made)
    lengths_BQ = torch.exp(0.3 * torch.randn(size, num_phases, **made))
    # Displacement n of the window leads to snapshot n + 1 - K after the start.
    places_BN = phases_B[:, None] + torch.arange(1 - context, 1 + future, device=device) - 1
    iterations_BN, phases_BN = places_BN.div(num_phases, rounding_mode="floor"), places_BN % num_phases
    apart_BNN = (phases_BN[:, :, None] - phases_BN[:, None]).abs()
    between_BNN = (iterations_BN[:, :, None] - iterations_BN[:, None]).abs()
    same_BNN = torch.eye(context + future, **made)
    cosines_BNN = alike_B11 * memory_B11**apart_BNN * (0.5 * carried_B11) ** between_BNN
    cosines_BNN = torch.where(same_BNN > 0, 1.0, cosines_BNN)
    lengths_BN = lengths_BQ.gather(1, phases_BN)
    lengths_BN = lengths_BN / lengths_BQ.square().mean(dim=1, keepdim=True).sqrt()
    return cosines_BNN * lengths_BN[:, :, None] * lengths_BN[:, None]
