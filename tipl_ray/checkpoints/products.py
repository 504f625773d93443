"""Inner products of a series' displacements, a slice of the parameters at a time across all checkpoints.

Never more than a few slices are in memory, whatever the number of parameters: each of a few threads reads one and
computes its products. These are added up in the slices' order, so that they do not depend on the number of threads.
Of a recorded trial, a snapshot is read as a whole, so its slices are wide and its parts are read once for each.
Knows tensors in files and flat weights; knows nothing of what the products are for.

Shapes: T checkpoints, S = T - 1 displacements, p values of a slice, G groups of tensors.
"""

import dataclasses
import itertools
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl_ray.checkpoints.files import CheckpointError, StoredTensor
from tipl_ray.checkpoints.series import UNMATCHED, Series, leave_out
from tipl_ray.data.rows import Rows
from tipl_ray.predict.blocks import one_thread

SLICE_BYTES = 16 * 2**20
"""Most that is held in float32 of all checkpoints at a time; what is computed of it takes about as much again. Larger
ones are slower: the memory of each is new to the process, where that of smaller ones is used again."""
WIDE_BYTES = 256 * 2**20
"""The same of a recorded trial, whose snapshots are read as a whole for every slice of them."""
COLUMNS_AT_ONCE = 4096
"""Values whose products are summed in float32; such sums are added up in float64."""
MOST_THREADS = 8
"""Threads that read and compute at the same time, where there are as many cores."""
GROUPS_BYTES = 64 * 2**20
"""Most that the products by group may take; where they would take more there is none but the whole."""
RUNNING, STATISTICS = "running statistics", ("running_mean", "running_var")
"""The group of normalisation layers' buffers, which follow the data and no gradient, and how they are called."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Products:
    """Gram matrices of a series' displacements."""

    gram_SS: NDArray[np.float64]
    groups: tuple[str, ...]
    """Names of the groups, the first tensor's first; none where there would be too many."""
    weights_G: NDArray[np.int64]
    """Weights of each."""
    grams_GSS: NDArray[np.float64]
    """They add up to the whole."""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far it is."""

    slices: int
    all_slices: int
    bytes_read: int
    all_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Slice:
    name: str
    start: int
    stop: int


class _Sums:
    """Products of slices, added up for the whole and for every group."""

    def __init__(self, names: Iterable[str], size: int):
        groups = list(dict.fromkeys(map(group_of, names)))
        if len(groups) * 8 * size**2 > GROUPS_BYTES:
            groups = []
        self._grams = {name: np.zeros((size, size)) for name in groups}
        self._weights = dict.fromkeys(groups, 0)
        self._gram_SS = np.zeros((size, size))

    def add(self, name: str, num_weights: int, products_SS: NDArray[np.float64]) -> None:
        """Count in the products of some weights of a tensor."""
        self._gram_SS += products_SS
        if self._grams:
            self._grams[group_of(name)] += products_SS
            self._weights[group_of(name)] += num_weights

    def products(self) -> Products:
        """What they add up to."""
        size = len(self._gram_SS)
        return Products(
            gram_SS=self._gram_SS,
            groups=tuple(self._grams),
            weights_G=np.array(list(self._weights.values()), dtype=np.int64),
            grams_GSS=np.array(list(self._grams.values())).reshape(-1, size, size),
        )


def group_of(name: str) -> str:
    """The layer that a tensor is of: its name up to its first number, or without its last part. The running statistics
    of all layers are a group of their own.

    >>> group_of("model.layers.7.mlp.up_proj.weight"), group_of("model.embed_tokens.weight"), group_of("log_std")
    ('model.layers.7', 'model.embed_tokens', 'log_std')
    >>> group_of("layer1.0.bn1.running_var")
    'running statistics'
    """
    parts = name.split(".")
    if parts[-1] in STATISTICS:
        return RUNNING
    for index, part in enumerate(parts):
        if re.fullmatch(r"\d+", part):
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def multiply(series: Series, report: Callable[[Progress], None] = lambda progress: None) -> Products:
    """The Gram matrices of a series. Raises CheckpointError for weights that are NaN or infinite, with their place."""
    sums = _Sums(series.tensors, len(series.names) - 1)
    slices = list(_slices(series))
    bytes_read = 0
    for done, (part, products_SS, num_bytes) in enumerate(_in_parallel(series, slices), 1):
        sums.add(part.name, part.stop - part.start, products_SS)
        bytes_read += num_bytes
        report(Progress(done, len(slices), bytes_read, series.num_bytes))
    return sums.products()


def multiply_rows(
    weights_TP: Rows,
    layout: Sequence[tuple[str, tuple[int, ...], int]],
    report: Callable[[Progress], None] = lambda progress: None,
) -> Products:
    """The Gram matrices of flat weights (T, P), whose tensors are (name, shape, offset).

    Raises CheckpointError for weights that are NaN or infinite.
    """
    num_snapshots, num_weights = weights_TP.shape
    sums = _Sums([name for name, _, _ in layout], num_snapshots - 1)
    columns, narrow = (_columns(num_snapshots, num_bytes) for num_bytes in (WIDE_BYTES, SLICE_BYTES))
    lefts = range(0, num_weights, columns)
    for done, left in enumerate(lefts, 1):
        wide_Tp = torch.from_numpy(np.asarray(weights_TP[:, left : left + columns]))
        with one_thread():
            for name, shape, offset in layout:
                first, last = max(offset, left), min(offset + math.prod(shape), left + wide_Tp.shape[1])
                for start in range(first, last, narrow):
                    stop = min(start + narrow, last)
                    products_SS = _multiplied(wide_Tp[:, start - left : stop - left])
                    if products_SS is None:
                        raise CheckpointError(f"{name} has weights that are NaN or infinite")
                    sums.add(name, stop - start, products_SS)
        report(
            Progress(done, len(lefts), 4 * num_snapshots * (left + wide_Tp.shape[1]), 4 * num_snapshots * num_weights)
        )
    return sums.products()


def _columns(num_rows: int, num_bytes: int) -> int:
    """Values of each of so many rows that take so many bytes of float32, in whole blocks."""
    return max(COLUMNS_AT_ONCE, num_bytes // (4 * num_rows) // COLUMNS_AT_ONCE * COLUMNS_AT_ONCE)


def _slices(series: Series) -> Iterator[_Slice]:
    longest = _columns(len(series.names), SLICE_BYTES)
    for name, stored in series.tensors.items():
        for start in range(0, stored[0].num_values, longest):
            yield _Slice(name, start, min(start + longest, stored[0].num_values))


def _in_parallel(series: Series, slices: Sequence[_Slice]) -> Iterator[tuple[_Slice, NDArray[np.float64], int]]:
    """Each slice with its products (S, S) and the bytes that were read for it, in order."""

    def reduce(part: _Slice) -> tuple[_Slice, NDArray[np.float64], int]:
        values = [stored.read(part.start, part.stop) for stored in series.tensors[part.name]]
        products_SS = _products(values)
        if products_SS is None:
            raise _not_finite(series, part, values)
        return part, products_SS, sum(value.nbytes for value in values)

    num_threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    waiting = iter(slices)
    # torch's own threads wait for each other by spinning, on a busy machine for twenty times as long as the work takes.
    with one_thread(), ThreadPoolExecutor(num_threads) as pool:
        under_way = deque(pool.submit(reduce, part) for part in itertools.islice(waiting, num_threads + 1))
        try:
            while under_way:
                yield under_way.popleft().result()
                under_way.extend(pool.submit(reduce, part) for part in itertools.islice(waiting, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _products(values: Sequence[Tensor]) -> NDArray[np.float64] | None:
    """Inner products (S, S) of the displacements from each of T tensors to the next; None where one is not finite."""
    wide = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    values_Tp = torch.empty(len(values), len(values[0]), dtype=wide)
    for row_p, value in zip(values_Tp, values, strict=True):
        row_p.copy_(value)
    return _multiplied(values_Tp)


def _multiplied(values_Tp: Tensor) -> NDArray[np.float64] | None:
    """Inner products (S, S) of the displacements from each row to the next; None where one is not finite."""
    moved_Sp = values_Tp.diff(dim=0)
    products_SS = _summed(moved_Sp.float())
    if not torch.isfinite(products_SS).all():
        if not torch.isfinite(values_Tp).all():
            return None
        # Squares beyond what float32 holds.
        products_SS = moved_Sp.double() @ moved_Sp.double().T
    return products_SS.numpy()


def _summed(moved_Sp: Tensor) -> Tensor:
    whole = moved_Sp.shape[1] // COLUMNS_AT_ONCE * COLUMNS_AT_ONCE
    blocks_NSc = moved_Sp[:, :whole].unflatten(1, (-1, COLUMNS_AT_ONCE)).transpose(0, 1)
    rest_Sc = moved_Sp[:, whole:]
    products_SS = (rest_Sc @ rest_Sc.T).double()
    if len(blocks_NSc):
        products_SS += torch.bmm(blocks_NSc, blocks_NSc.transpose(1, 2)).double().sum(dim=0)
    return products_SS


def _not_finite(series: Series, part: _Slice, values: Sequence[Tensor]) -> CheckpointError:
    bad = [name for name, value in zip(series.names, values, strict=True) if not value.isfinite().all()]
    stored: StoredTensor = series.tensors[part.name][series.names.index(bad[0])]
    steps, unmatched = dict(zip(series.names, series.steps, strict=True)), series.left_out.get(UNMATCHED, ())
    return CheckpointError(
        f"{stored.path}: {part.name} has weights that are NaN or infinite; {leave_out(bad, steps, unmatched)}"
    )
