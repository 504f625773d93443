"""Single weights of trials, and windows of them as the model's batches.

Shapes: T snapshots, P policy weights, S of them in a sample, N windows in all, B of them, K displacements of context,
H forward steps, J tensors of the policy.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl_ray.data.rows import Rows
from tipl_ray.data.snapshots import Layout
from tipl_ray.predict.gram import GramBand, Question

SAMPLE = 512
"""Most weights of a trial that a model learns from, since their errors are summed up one by one."""
ROWS_AT_ONCE = 256
"""Snapshots that are read at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightSample:
    """A trial reduced to some of its weights, drawn evenly from all, and to the inner products of all."""

    band: GramBand
    weights_TS: NDArray[np.float32]
    tensors_S: NDArray[np.int64]
    """Which tensor of the layout each belongs to."""
    layout: Layout


class OwnBatch(NamedTuple):
    """Windows of single weights; displacements are in units of a window's scale, the root mean square over all weights
    and displacements of its context."""

    known_BKS: Tensor
    """The context's displacements."""
    weights_BS: Tensor
    """The last known weights, as they are."""
    tensors_BS: Tensor
    """Which tensor of the policy each belongs to."""


def tensor_indices(layout: Layout) -> NDArray[np.int64]:
    """Which tensor each weight belongs to; (P,)."""
    return np.repeat(np.arange(len(layout)), [math.prod(shape) for _, shape, _ in layout])


def sample_weights(weights_TP: Rows, layout: Layout, band: GramBand, seed: int) -> WeightSample:
    """Some of a trial's weights, the same for the same seed; all of them if there are no more than `SAMPLE`."""
    num_snapshots, num_weights = weights_TP.shape
    chosen_S = np.arange(num_weights)
    if num_weights > SAMPLE:
        chosen_S = np.sort(np.random.default_rng((seed, num_weights)).choice(num_weights, SAMPLE, replace=False))
    parts = [
        np.asarray(weights_TP[begin : begin + ROWS_AT_ONCE], np.float32)[:, chosen_S]
        for begin in range(0, num_snapshots, ROWS_AT_ONCE)
    ]
    return WeightSample(
        band=band, weights_TS=np.concatenate(parts), tensors_S=tensor_indices(layout)[chosen_S], layout=layout
    )


class SampleSegments:
    """Every window of some trials' samples, gathered where the model is; numbered as in `WindowSegments`."""

    def __init__(self, samples: Sequence[WeightSample], question: Question, device: torch.device | str = "cpu"):
        self.num_weights = len(tensor_indices(samples[0].layout))
        lengths = [len(sample.weights_TS) for sample in samples]
        starts = [np.arange(question.context, length - question.future) for length in lengths]
        begins = np.cumsum([0, *lengths[:-1]])

        def on_device(array: NDArray) -> Tensor:
            return torch.from_numpy(array).to(device)

        self._weights_RS = on_device(np.concatenate([sample.weights_TS for sample in samples]))
        self._tensors_MS = on_device(np.stack([sample.tensors_S for sample in samples]))
        self._trials_N = on_device(np.repeat(np.arange(len(samples)), [len(some) for some in starts]))
        self._rows_N = on_device(np.concatenate([begin + some for begin, some in zip(begins, starts, strict=True)]))
        self._context_K = torch.arange(-question.context, 1, device=device)
        self._steps_H = torch.tensor(question.steps, device=device)

    def gather(self, windows_B: NDArray[np.int64], scales_B: Tensor) -> tuple[OwnBatch, Tensor]:
        """The windows of these numbers, and what their weights move by at each forward step (B, H, S); `scales_B` are
        mean squared lengths of displacements, of all weights."""
        windows = torch.from_numpy(windows_B).to(self._rows_N.device, non_blocking=True)
        rows_B = self._rows_N[windows]
        known_BKS = self._weights_RS[rows_B[:, None] + self._context_K].diff(dim=1)
        last_BS = self._weights_RS[rows_B]
        moved_BHS = self._weights_RS[rows_B[:, None] + self._steps_H] - last_BS[:, None]
        units_B11 = unit_of(scales_B, self.num_weights)[:, None, None]
        own = OwnBatch(known_BKS / units_B11, last_BS, self._tensors_MS[self._trials_N[windows]])
        return own, moved_BHS / units_B11


def unit_of(scales_B: Tensor, num_weights: int) -> Tensor:
    """Root mean square of a single weight's displacement, from the mean squared length of all weights' displacements;
    (B,)."""
    smallest = torch.finfo(torch.float32).tiny
    return (scales_B / num_weights).sqrt().float().clamp_min(smallest)
