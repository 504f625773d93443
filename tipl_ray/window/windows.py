"""Context windows of Gram bands, as the Transformer's batches.

Shapes: N windows in all, B of them, K displacements of context, H forward steps, W width of a band, S displacements of
all trials.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl_ray.predict.gram import GramBand, Question, band_index, squared_errors


class WindowBatch(NamedTuple):
    """Windows of displacements as the model and its loss take them, in units of the scales; see `gram.Contexts`."""

    grams_BKK: Tensor
    """Inner products of the context's displacements."""
    towards_BHK: Tensor
    """Inner products of the true displacement at each forward step with the context's."""
    moved_BH: Tensor
    """Squared length of the true displacement at each forward step."""
    phases_B: Tensor
    progress_B: Tensor
    learning_rates_B: Tensor
    scales_B: Tensor
    """Mean squared length of the context's displacements."""


class WindowSegments:
    """Every window of some trials' Gram bands, gathered where the model is: no loader, no Python per window.

    `moved_H` are the mean squared displacements at each forward step, `shares_N` each window's own as a share of them,
    mean over steps: what a window counts in the skill over all of them. Trials may differ in length.
    """

    def __init__(self, bands: Sequence[GramBand], question: Question, device: torch.device | str = "cpu"):
        self.question = question
        for band in bands:
            if band.num_snapshots <= question.width:
                raise ValueError(
                    f"model.context={question.context} and forward step {question.future} leave no window in the "
                    f"{band.num_snapshots} snapshots of a trial"
                )
        context, steps_H = question.context, np.asarray(question.steps)
        starts = [np.arange(context, band.num_snapshots - question.future) for band in bands]
        contexts = [band.contexts(starts_B, context) for band, starts_B in zip(bands, starts, strict=True)]
        begins = np.cumsum([0, *(len(band.products_SW) for band in bands)])
        moved_NH = np.concatenate([_displacements(*pair, question) for pair in zip(bands, starts, strict=True)])
        mean_H = moved_NH.mean(axis=0)
        self.num_windows = len(moved_NH)
        self.moved_H = np.where(mean_H > 0, mean_H, 1.0)
        self.shares_N = (moved_NH / self.moved_H).mean(axis=1)

        def on_device(array: NDArray) -> Tensor:
            return torch.from_numpy(array).to(device)

        products_SW = np.concatenate([band.products_SW for band in bands])
        self._products_SW, self._sums_SW = on_device(products_SW), on_device(products_SW.cumsum(axis=1))
        self._firsts_N = on_device(np.concatenate([b + s - context for b, s in zip(begins[:-1], starts, strict=True)]))
        self._moved_NH = on_device(moved_NH)
        self._phases_N = on_device(np.concatenate([told.phases_B for told in contexts]))
        self._progress_N = on_device(np.concatenate([told.progress_B for told in contexts])).float()
        self._rates_N = on_device(np.concatenate([told.learning_rates_B for told in contexts])).float()
        self._row_KK, self._column_KK = (on_device(index) for index in band_index(context))
        # The displacement k of the context has those of the future in the columns from K - k on.
        self._before_K = on_device(np.arange(context)[::-1].copy())
        self._until_HK = self._before_K + on_device(steps_H)[:, None]

    def gather(self, windows_B: NDArray[np.int64]) -> WindowBatch:
        """The windows of these numbers, below `num_windows`, trial by trial and in each by their first displacement."""
        windows = torch.from_numpy(windows_B).to(self._firsts_N.device, non_blocking=True)
        firsts_B = self._firsts_N[windows]
        grams_BKK = self._products_SW[firsts_B[:, None, None] + self._row_KK, self._column_KK]
        rows_B1K = firsts_B[:, None, None] + torch.arange(self.question.context, device=firsts_B.device)
        towards_BHK = self._sums_SW[rows_B1K, self._until_HK] - self._sums_SW[rows_B1K, self._before_K]
        scales_B = grams_BKK.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return WindowBatch(
            grams_BKK=(grams_BKK / scales_B[:, None, None]).float(),
            towards_BHK=(towards_BHK / scales_B[:, None, None]).float(),
            moved_BH=(self._moved_NH[windows] / scales_B[:, None]).float(),
            phases_B=self._phases_N[windows],
            progress_B=self._progress_N[windows],
            learning_rates_B=self._rates_N[windows],
            scales_B=scales_B,
        )


def _displacements(band: GramBand, starts_B: NDArray[np.int64], question: Question) -> NDArray[np.float64]:
    """||w_t - w_{t+h}||^2 of some windows at every forward step; (B, H)."""
    nothing_BHK = np.zeros((len(starts_B), len(question.steps), 0))
    return squared_errors(band.windows(starts_B, 0, question.future), nothing_BHK, question.steps)
