"""Skill on the validation trials that can be compared: in weights, over windows that every context length has.

A loss cannot be compared between SVD ranks, for its unit is the basis'; nor a skill between context lengths, where each
leaves out the snapshots before its own first window, for it is there that weights move most.
Knows objectives and Gram bands; the weights themselves are never read, every squared error being exact without them.

Shapes: N trials, T snapshots, B starts of each trial, K tokens of context, D numbers per token, F and H forward steps.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tipl_ray.paper.tokens import Tokens
from tipl_ray.paper.transformer import CausalTransformer, Normaliser
from tipl_ray.predict.baselines import CopyLast, Ridge
from tipl_ray.predict.gram import GramBand, Question
from tipl_ray.predict.predictor import Trials
from tipl_ray.window.predictor import WindowFloor, WindowTipl
from tipl_ray.window.transformer import WindowTransformer

WINDOWS = 512
"""Most windows that are judged, evenly spaced over each validation trial."""
WINDOWS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judge:
    """Some windows of the validation trials, and how far their weights move."""

    bands: Sequence[GramBand]
    """Of the validation trials; wide enough for the longest context."""
    steps: tuple[int, ...]
    """Forward steps H."""
    longest: int
    """Longest context that is compared: the first start."""

    @property
    def starts_B(self) -> NDArray[np.int64]:
        """The last known snapshot of each window; the same in every trial."""
        last = min(band.num_snapshots for band in self.bands) - 1 - max(self.steps)
        num_windows = min(last - self.longest + 1, max(1, WINDOWS // len(self.bands)))
        return np.linspace(self.longest, last, num_windows).astype(np.int64)

    def ridge(self, training: Sequence[GramBand], context: int) -> NDArray[np.float64]:
        """Skill of the phase-aware ridge with this context, fitted on the training trials; (H,)."""
        question = self._question(context)
        ridge = Ridge(question)
        ridge.fit(Trials(bands=training, weights=tuple), Trials(bands=self.bands, weights=tuple))
        return self._skills(sum(ridge.band_errors(band, self.starts_B).sum(axis=0) for band in self.bands))

    def window_floor(self, context: int) -> NDArray[np.float64]:
        """Skill of the true future, projected on each window's displacements: no model with this context has more."""
        floor = WindowFloor(self._question(context))
        return self._skills(sum(floor.band_errors(band, self.starts_B).sum(axis=0) for band in self.bands))

    def token_floor(self, tokens: Tokens) -> NDArray[np.float64]:
        """Skill of the true future, projected on the trials' bases: no model of this SVD rank has more; (H,)."""
        future_BH = self.starts_B[:, None] + np.asarray(self.steps)
        return self._skills(sum(outside_T[future_BH].sum(axis=0) for outside_T in tokens.outside_NT))

    def window_model(self, model: WindowTransformer, device: torch.device | str = "cpu") -> NDArray[np.float64]:
        """Skill of a model on the basis `window`; (H,)."""
        tipl = WindowTipl(self._question(model.size.context), model, device)
        return self._skills(sum(tipl.band_errors(band, self.starts_B).sum(axis=0) for band in self.bands))

    def token_model(
        self, model: CausalTransformer, normaliser: Normaliser, tokens: Tokens, device: torch.device | str = "cpu"
    ) -> NDArray[np.float64]:
        """Skill of the paper's model, one token after the other; (H,). `tokens` are the validation trials'."""
        model.eval()
        steps_H, offsets_K = np.asarray(self.steps), np.arange(1 - model.size.context, 1)
        error_H = np.zeros(len(steps_H))
        for trial, coordinates_TD in enumerate(tokens.coordinates_NTD):
            tokens_TD = normaliser.normalise(coordinates_TD)
            scales_D = tokens.singular_values_ND[trial] * normaliser.deviation_D
            for begin in range(0, len(self.starts_B), WINDOWS_AT_ONCE):
                starts_B = self.starts_B[begin : begin + WINDOWS_AT_ONCE]
                snapshots_BK, future_BH = starts_B[:, None] + offsets_K, starts_B[:, None] + steps_H
                predicted_BFD = model.forecast(
                    torch.from_numpy(tokens_TD[snapshots_BK]).to(device),
                    torch.from_numpy(snapshots_BK).to(device),
                    max(self.steps),
                )
                predicted_BHD = predicted_BFD[:, steps_H - 1].cpu().numpy()
                inside_BHD = (predicted_BHD - tokens_TD[future_BH]) * scales_D
                error_H += (np.square(inside_BHD).sum(axis=2) + tokens.outside_NT[trial][future_BH]).sum(axis=0)
        return self._skills(error_H)

    def _question(self, context: int) -> Question:
        return Question(
            context=context, steps=self.steps, snapshots_per_iteration=self.bands[0].snapshots_per_iteration
        )

    def _skills(self, error_H: NDArray[np.float64]) -> NDArray[np.float64]:
        copied = CopyLast(self._question(self.longest))
        moved_H = sum(copied.band_errors(band, self.starts_B).sum(axis=0) for band in self.bands)
        return 1.0 - error_H / np.where(moved_H > 0, moved_H, 1.0)
