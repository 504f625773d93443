"""Skill on the validation trials that can be compared: in weights, over windows that every context length has.

A loss cannot be compared between SVD ranks, for its unit is the basis'; nor a skill between context lengths, where each
leaves out the snapshots before its own first window, for it is there that weights move most.
Knows objectives and Gram bands; the weights themselves are never read, every squared error being exact without them.

Shapes: N trials, T snapshots, B starts of each trial, K tokens of context, D numbers per token, F and H forward steps.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tipl_ray.predict.baselines import CopyLast, Ridge
from tipl_ray.predict.gram import GramBand, Question
from tipl_ray.predict.predictor import Trials

WINDOWS = 512
"""Most windows that are judged, evenly spaced over each validation trial."""


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
        return self.skills(np.stack([ridge.band_errors(band, self.starts_B) for band in self.bands]))

    def skills(self, errors_NBH: NDArray[np.float64]) -> NDArray[np.float64]:
        """Skill of forecasts with these squared errors at the starts of each trial; (H,)."""
        copied = CopyLast(self._question(self.longest))
        moved_H = sum(copied.band_errors(band, self.starts_B).sum(axis=0) for band in self.bands)
        return 1.0 - errors_NBH.sum(axis=1).sum(axis=0) / np.where(moved_H > 0, moved_H, 1.0)

    def _question(self, context: int) -> Question:
        return Question(
            context=context, steps=self.steps, snapshots_per_iteration=self.bands[0].snapshots_per_iteration
        )
