"""Recorded trials as series: of a trial, whoever recorded it, every snapshot is a checkpoint.

    <storage>/grams/<digest>-series/    series.json, products.safetensors, series.sha256

Their inner products are computed once per trial and length, and kept. Knows the data set; knows nothing of what is
asked.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from tipl_ray.checkpoints.files import CheckpointError
from tipl_ray.checkpoints.products import Products, Progress, group_of, multiply_rows
from tipl_ray.checkpoints.records import ABOUT_FILE, ImportedSeries, all_series, keep, load_kept
from tipl_ray.data.commits import TRAJECTORIES
from tipl_ray.data.snapshots import Header
from tipl_ray.data.storage import StoreError, file_exists, join
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.predict.bands import snapshots_per_iteration
from tipl_ray.terminal import ProgressView, size_text

PRODUCTS_FOLDER = "grams"
MOST_BYTES = 2 * 2**30
"""Most that the inner products of all series of a question may take, 8 bytes for each pair of displacements."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A series that a storage has, before its inner products are read or computed."""

    name: str
    digest: str
    num_checkpoints: int
    num_weights: int
    weights_by_layer: Mapping[str, int]
    """Of each layer; empty where they are not known."""
    load: Callable[[], ImportedSeries]


def candidates(storage: str) -> list[Candidate]:
    """Every series of a storage: its trials that did not diverge, `trial-<seed>`, then what was imported.

    Raises StoreError for a damaged one.
    """
    store = TrajectoryStore(storage)
    trials = [_trial(store, seed) for seed in store.sound(store.seeds())]
    return trials + [_imported(one) for one in all_series(storage)]


def load_all(storage: str, chosen: list[Candidate]) -> list[ImportedSeries]:
    """The series themselves. Raises CheckpointError where their inner products would take too much memory."""
    num_bytes = sum(8 * (one.num_checkpoints - 1) ** 2 for one in chosen)
    if num_bytes > MOST_BYTES:
        raise CheckpointError(
            f"{storage}: the inner products of {len(chosen)} series of up to "
            f"{max(one.num_checkpoints for one in chosen):,} checkpoints would take {size_text(num_bytes)}, more than "
            f"{size_text(MOST_BYTES)}; choose fewer of them with --series"
        )
    return [one.load() for one in chosen]


def trial_series(storage: str, seed: int) -> ImportedSeries:
    """A trial as a series. Its products are kept in the storage, and made anew where what is there is damaged.

    Raises StoreError where the data set is damaged or has no such trial.
    """
    store = TrajectoryStore(storage)
    digest, folder = store.digest([seed]), store.files.show(store.trial(seed).folder(TRAJECTORIES))
    place = join(storage, PRODUCTS_FOLDER, f"{digest}-series")
    with contextlib.suppress(StoreError):
        if file_exists(place, ABOUT_FILE):
            return dataclasses.replace(load_kept(place), folder=folder)
    series = _computed(store, seed, digest, folder)
    # Where it cannot be kept, as in a storage that can only be read, it is made again the next time.
    with contextlib.suppress(StoreError):
        keep(series, place)
    return series


def _trial(store: TrajectoryStore, seed: int) -> Candidate:
    header = store.header([seed])
    weights_by_layer: dict[str, int] = {}
    for name, shape, _ in header.layout:
        weights_by_layer[group_of(name)] = weights_by_layer.get(group_of(name), 0) + math.prod(shape)
    return Candidate(
        name=f"trial-{seed}",
        digest=store.digest([seed]),
        num_checkpoints=store.progress(seed).num_snapshots,
        num_weights=header.num_weights,
        weights_by_layer=weights_by_layer,
        load=lambda: trial_series(store.root, seed),
    )


def _imported(series: ImportedSeries) -> Candidate:
    products = series.products
    return Candidate(
        name=series.name,
        digest=series.digest,
        num_checkpoints=len(series.steps),
        num_weights=series.num_weights,
        weights_by_layer=dict(zip(products.groups, products.weights_G.tolist(), strict=True)),
        load=lambda: series,
    )


def _computed(store: TrajectoryStore, seed: int, digest: str, folder: str) -> ImportedSeries:
    header, progress = store.header([seed]), store.progress(seed)
    rates = None
    if "learning_rate" in header.columns:
        rates = tuple(store.trajectory(seed, ("learning_rate",)).learning_rates_T.tolist())
    return ImportedSeries(
        name=f"trial-{seed}",
        folder=folder,
        digest=digest,
        checkpoints=tuple(f"snapshot {index}" for index in range(progress.num_snapshots)),
        steps=_steps(store, seed, header, progress.num_snapshots),
        num_weights=header.num_weights,
        num_tensors=len(header.layout),
        num_bytes=progress.num_bytes,
        types={"float32": len(header.layout)},
        left_out={},
        products=_products(store, seed, header, folder),
        snapshots_per_iteration=_phases(header),
        learning_rates=rates,
    )


def _products(store: TrajectoryStore, seed: int, header: Header, folder: str) -> Products:
    def report(progress: Progress) -> None:
        if progress.all_slices > 1:
            view.show(
                [], f"trial {seed}: {size_text(progress.bytes_read)} of {size_text(progress.all_bytes)} multiplied"
            )

    try:
        with ProgressView() as view:
            view.wait(f"trial {seed}: reading")
            return multiply_rows(store.weights(seed), header.layout, report)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}; verify the trial") from error


def _phases(header: Header) -> int | None:
    """Snapshots per iteration; None where the header does not say."""
    try:
        return snapshots_per_iteration(header)
    except KeyError:
        return None


def _steps(store: TrajectoryStore, seed: int, header: Header, num_snapshots: int) -> tuple[int, ...]:
    """The steps at which snapshots were recorded; their indices where several snapshots share a step, or have none."""
    if "step" in header.columns:
        steps_T = store.trajectory(seed, ("step",)).steps_T
        if (np.diff(steps_T) > 0).all():
            return tuple(steps_T.tolist())
    return tuple(range(num_snapshots))
