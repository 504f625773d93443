"""Gram bands of a data set's trials, computed once and kept in its storage."""

import contextlib
import io

import numpy as np
from numpy.typing import NDArray

from tipl_ray.data.snapshots import Header
from tipl_ray.data.storage import StoreError, file_exists, join, publish, read_published
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.predict.gram import GramBand, Question, banded_products, rate_shares


def load_band(storage: str, seed: int, question: Question) -> GramBand:
    """The Gram band of a trial, wide enough for the question's windows.

    Learning rates that the trial does not know are taken for constant. Computed once per data set and width: the
    products are kept in <storage>/grams, and computed again where the file there is damaged. Raises StoreError
    where the data set is damaged.
    """
    store = TrajectoryStore(storage)
    header = store.header([seed])
    folder, name = join(storage, "grams"), f"{store.digest([seed])}-{question.width}"
    weights_TP = store.weights(seed)
    rates_T = None
    if "learning_rate" in header.columns:
        rates_T = store.trajectory(seed, columns=("learning_rate",)).learning_rates_T
    products_SW = _kept_products(folder, name, (weights_TP.shape[0] - 1, question.width))
    if products_SW is None:
        products_SW = banded_products(weights_TP, question.width)
        content = io.BytesIO()
        np.save(content, products_SW, allow_pickle=False)
        # Where it cannot be kept, as in a storage that can only be read, it is made again the next time.
        with contextlib.suppress(StoreError):
            publish(folder, {f"{name}.npy": content.getvalue()}, f"{name}.sha256")
    return GramBand(
        products_SW=products_SW,
        learning_rates_T=rate_shares(rates_T, weights_TP.shape[0]),
        snapshots_per_iteration=question.snapshots_per_iteration,
    )


def snapshots_per_iteration(header: Header) -> int:
    """Snapshots per iteration of a data set's trials, those after jumps and outer steps included; 1 where there are no
    phases.

    Raises KeyError naming what is missing in the header.
    """
    made = header.config
    if "snapshots_per_iteration" in made:
        return made["snapshots_per_iteration"]
    run = made["ppo"]["num_epochs"] // made["epochs_per_snapshot"]
    return run + (made["jump"]["horizon"] if "jump" in made else 0) + ("outer" in made)


def _kept_products(folder: str, name: str, shape: tuple[int, int]) -> NDArray[np.float64] | None:
    """The products that `load_band` kept; None where there are none, or others."""
    try:
        if not file_exists(folder, f"{name}.sha256"):
            return None
        content = read_published(folder, f"{name}.npy", f"{name}.sha256", "it is computed again")
        products_SW = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (StoreError, ValueError):
        return None
    whole = products_SW.shape == shape and products_SW.dtype == np.float64 and np.isfinite(products_SW).all()
    return products_SW if whole else None
