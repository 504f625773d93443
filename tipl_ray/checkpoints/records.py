"""What a storage keeps of a series of checkpoints: the inner products of its displacements, never its weights.

A series is a folder of checkpoints that was imported, or a recorded trial, whose snapshots are its checkpoints: see
`trials`.

    <storage>/series/<digest>/    series.json, products.safetensors, series.sha256

The folder counts once series.json is there; a killed import leaves none, and begins again. Shapes: see `products`.
"""

import contextlib
import dataclasses
import fnmatch
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from tipl_ray.checkpoints.products import Products, Progress, multiply
from tipl_ray.checkpoints.series import Selection, Series, find_series
from tipl_ray.data.locks import only_one
from tipl_ray.data.storage import Storage, StoreError, file_exists, join, local_folder, publish, read_published
from tipl_ray.terminal import ProgressView, size_text, waiting

SERIES = "series"
ABOUT_FILE, PRODUCTS_FILE, RECORD = "series.json", "products.safetensors", "series.sha256"
WAY_OUT = "delete its folder and import the checkpoints again"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImportedSeries:
    """A series as a storage keeps it."""

    name: str
    """Of the folder that it was read from."""
    folder: str
    digest: str
    """See `series.find_series`; of a trial, that of its data."""
    checkpoints: tuple[str, ...]
    """Names of the T checkpoints."""
    steps: tuple[int, ...]
    """Their numbers."""
    num_weights: int
    num_tensors: int
    num_bytes: int
    """What was read of the files [bytes]."""
    types: dict[str, int]
    """Tensors of the first checkpoint by their type."""
    left_out: dict[str, list[str]]
    """Why -> names of entries and tensors."""
    products: Products
    snapshots_per_iteration: int | None = None
    """Checkpoints per iteration of an algorithm that reuses its data; None where it is not known."""
    learning_rates: tuple[float, ...] | None = None
    """The optimiser's at each checkpoint; None where they are not known."""

    @property
    def num_displacements(self) -> int:
        """S."""
        return len(self.steps) - 1


def import_series(folder: Path, storage: str, selection: Selection) -> tuple[ImportedSeries, bool]:
    """Reduce a folder's checkpoints into a storage, and return whether that was already done.

    Raises CheckpointError as `find_series` and `multiply` do, before anything is written; StoreError where the storage
    cannot be written, or another process imports the same series.
    """
    with waiting(f"{folder.name}: looking at the files"):
        series = find_series(folder, selection)
    place = join(storage, SERIES, series.digest)
    if file_exists(place, ABOUT_FILE):
        return load_series(storage, series.digest), True
    lock = only_one(storage, f"series-{series.digest}", f"importing {folder.name}")
    with _without_empty_folders(storage), lock:
        with ProgressView() as view:

            def report(progress: Progress) -> None:
                view.show([], _told(folder.name, progress))

            products = multiply(series, report)
        imported = _imported(series, products)
        keep(imported, place)
    return imported, False


@contextlib.contextmanager
def _without_empty_folders(storage: str) -> Iterator[None]:
    """Where the block fails, take away the folders that are new since, down to the lock's, if nothing is in them."""
    local = local_folder(storage)
    folders = [] if local is None else [local / "locks", local, *local.parents]
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what another process has begun to use stays
            for folder in new:
                folder.rmdir()
        raise


def load_series(storage: str, digest: str) -> ImportedSeries:
    """An imported series of a storage. Raises StoreError where it is missing or damaged."""
    return load_kept(join(storage, SERIES, digest))


def keep(series: ImportedSeries, place: str) -> None:
    """Write a series into a folder of its own. Raises StoreError where that cannot be."""
    publish(place, _files(series), RECORD)


def load_kept(place: str) -> ImportedSeries:
    """The series in a folder. Raises StoreError where it is missing or damaged."""
    try:
        about = json.loads(read_published(place, ABOUT_FILE, RECORD, WAY_OUT))
        arrays = safetensors.numpy.load(read_published(place, PRODUCTS_FILE, RECORD, WAY_OUT))
        products = Products(
            gram_SS=arrays["gram"],
            groups=tuple(about.pop("groups")),
            weights_G=np.array(about.pop("weights_by_group"), dtype=np.int64),
            grams_GSS=arrays["groups"],
        )
        about |= {name: tuple(about[name]) for name in ("checkpoints", "steps")}
        about |= {name: tuple(about[name]) for name in ("learning_rates",) if about.get(name) is not None}
        return ImportedSeries(**about, products=products)
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise StoreError(f"{Storage(place).show(ABOUT_FILE)}: is not understood: {error}; {WAY_OUT}") from error


def all_series(storage: str) -> list[ImportedSeries]:
    """Imported series of a storage, by name and then number of checkpoints. Raises StoreError for a damaged one."""
    names = [name for name in Storage(storage).folders(SERIES) if file_exists(join(storage, SERIES, name), ABOUT_FILE)]
    found = [load_series(storage, name) for name in names]
    return sorted(found, key=lambda one: (one.name, len(one.steps), one.digest))


def without_layers(series: ImportedSeries, patterns: Sequence[str]) -> ImportedSeries:
    """The series without the layers whose names one of the patterns matches, such as `head` or `layer1.*`.

    Raises ValueError for a pattern that matches none of them, and where nothing would be left.
    """
    products = series.products
    left_out = [any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in products.groups]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in products.groups):
            layers = f"its layers are {', '.join(products.groups)}" if products.groups else "its layers are not known"
            raise ValueError(f"leave_out={pattern!r} matches no layer of {series.name}; {layers}")
    if patterns and all(left_out):
        raise ValueError(f"leave_out={list(patterns)} leaves nothing of {series.name}")
    kept_G = ~np.array(left_out, dtype=bool)
    rest = Products(
        gram_SS=products.grams_GSS[kept_G].sum(axis=0),
        groups=tuple(name for name, out in zip(products.groups, left_out, strict=True) if not out),
        weights_G=products.weights_G[kept_G],
        grams_GSS=products.grams_GSS[kept_G],
    )
    return dataclasses.replace(series, products=rest, num_weights=int(rest.weights_G.sum())) if patterns else series


def _imported(series: Series, products: Products) -> ImportedSeries:
    types = [str(stored[0].dtype).removeprefix("torch.") for stored in series.tensors.values()]
    return ImportedSeries(
        name=series.folder.resolve().name,
        folder=str(series.folder.resolve()),
        digest=series.digest,
        checkpoints=series.names,
        steps=series.steps,
        num_weights=series.num_weights,
        num_tensors=len(series.tensors),
        num_bytes=series.num_bytes,
        types={name: types.count(name) for name in sorted(set(types))},
        left_out={why: list(names) for why, names in series.left_out.items()},
        products=products,
    )


def _files(imported: ImportedSeries) -> dict[str, bytes]:
    products = imported.products
    about: dict[str, Any] = {
        field.name: getattr(imported, field.name) for field in dataclasses.fields(imported) if field.name != "products"
    }
    about |= {"groups": products.groups, "weights_by_group": products.weights_G.tolist()}
    arrays: dict[str, NDArray] = {"gram": products.gram_SS, "groups": products.grams_GSS}
    return {PRODUCTS_FILE: safetensors.numpy.save(arrays), ABOUT_FILE: json.dumps(about, indent=1).encode()}


def _told(name: str, progress: Progress) -> str:
    return (
        f"{name}: slice {progress.slices:,} of {progress.all_slices:,}, {size_text(progress.bytes_read)} of "
        f"{size_text(progress.all_bytes)} read"
    )
