"""Context windows of tokens (Section 3.3), as the Transformer's batches.

Knows nothing of the model beyond its context length, nor of how it is trained.

Shapes: N trials, T snapshots, D numbers per token, B windows, K tokens of context; S snapshots of all trials.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl_ray.paper.tokens import Tokens
from tipl_ray.paper.transformer import Normaliser


class Batch(NamedTuple):
    """Windows as the model takes them, normalised."""

    tokens_BKD: Tensor
    snapshots_BK: Tensor
    """Index of each token's snapshot in its trajectory."""
    targets_BKD: Tensor
    """The token of each one's next snapshot."""


class Segments:
    """Every context window of some trials, gathered where the model is: no loader, no Python per window."""

    def __init__(self, tokens: Tokens, normaliser: Normaliser, context: int, device: torch.device | str = "cpu"):
        num_trials, self.num_snapshots, self.token_size = tokens.coordinates_NTD.shape
        self.context, self.windows_per_trial = context, self.num_snapshots - context
        if self.windows_per_trial < 1:
            raise ValueError(
                f"model.context={context} leaves no window with a next snapshot in the {self.num_snapshots} snapshots "
                "of a trial"
            )
        self.num_windows = num_trials * self.windows_per_trial
        self._tokens_SD = torch.from_numpy(normaliser.normalise(tokens.coordinates_NTD)).to(device).flatten(0, 1)
        self._offsets_K = torch.arange(context, device=device)

    def gather(self, windows_B: NDArray[np.int64]) -> Batch:
        """The windows of these numbers, below `num_windows`, trial by trial and in each by their first snapshot."""
        trials_B, firsts_B = self._locate(windows_B)
        snapshots_BK = firsts_B[:, None] + self._offsets_K
        rows_BK = trials_B[:, None] * self.num_snapshots + snapshots_BK
        return Batch(self._tokens_SD[rows_BK], snapshots_BK, self._tokens_SD[rows_BK + 1])

    def ends(self, windows_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Index of each window's trial, and of its last snapshot in that."""
        trials_B = windows_B // self.windows_per_trial
        return trials_B, windows_B - trials_B * self.windows_per_trial + self.context - 1

    def change_D(self) -> Tensor:
        """Root mean square of what one snapshot changes each normalised number of a token by; 1 where nothing does."""
        tokens_NTD = self._tokens_SD.unflatten(0, (-1, self.num_snapshots))
        change_D = tokens_NTD.diff(dim=1).square().mean(dim=(0, 1)).sqrt()
        return torch.where(change_D > 0, change_D, 1.0)

    def _locate(self, windows_B: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(windows_B).to(self._offsets_K.device, non_blocking=True)
        trials_B = windows // self.windows_per_trial
        return trials_B, windows - trials_B * self.windows_per_trial
