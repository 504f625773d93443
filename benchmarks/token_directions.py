"""What the errors of the paper's Transformer consist of, by direction of the Temporal SVD.

A token is a snapshot's coordinates in its trial's own singular directions, so a forecast's squared error is the sum of
its errors in each of them and of what lies outside of the basis, which no forecast can change. All are given as shares
of copying's squared error: a forecast with a sum below 1 beats copying the last snapshot. `still` repeats the last
token; its rows say where the weights move.

    python benchmarks/token_directions.py storage/half_cheetah storage/half_cheetah/models/623260335632af55

Takes the last trials of the storage, 102 windows of each, and trained models on the basis `trial` (jobs/train.py with
--preset paper or paper-residual). Writes docs/results/token_directions.csv.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, publish_table, use_one_core  # noqa: E402

from tipl_ray import config  # noqa: E402
from tipl_ray.data.rows import Rows  # noqa: E402
from tipl_ray.data.trajectory_store import TrajectoryStore  # noqa: E402
from tipl_ray.paper.predictor import forecast_coordinates  # noqa: E402
from tipl_ray.paper.temporal_svd import fit_basis  # noqa: E402
from tipl_ray.paper.tokens import Tokens, tokens_of  # noqa: E402
from tipl_ray.paper.transformer import CausalTransformer, Normaliser  # noqa: E402
from tipl_ray.predict.gram import banded_products, moved_squares  # noqa: E402
from tipl_ray.predict.models import load_about  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

STEPS, LONGEST, WINDOWS = (1, 10), 80, 102
GROUPS = ((0, 1), (1, 4), (4, 16), (16, 64), (64, 128))
"""Directions that are summed, from the largest singular value on."""
Model = tuple[str, CausalTransformer, Normaliser]
"""Name, network and normaliser of a trained model."""


def reduced(seed: int, weights_TP: Rows, rank: int) -> tuple[Tokens, NDArray[np.float64]]:
    """A trial's tokens, and copying's squared error at the starts of its windows, summed; (H,)."""
    moved_TF = moved_squares(banded_products(weights_TP, max(STEPS)), max(STEPS))
    tokens = tokens_of(seed, weights_TP, fit_basis(weights_TP, rank), moved_TF)
    return tokens, moved_TF[_starts(len(moved_TF))][:, np.asarray(STEPS) - 1].sum(axis=0)


def _starts(num_snapshots: int) -> NDArray[np.int64]:
    last = num_snapshots - 1 - max(STEPS)
    return np.linspace(LONGEST, last, min(last - LONGEST + 1, WINDOWS)).astype(np.int64)


def errors(tokens: Tokens, model: Model | None, step: int) -> tuple[NDArray[np.float64], float]:
    """Squared errors of a model, or without one of the last token repeated, by direction (D,), and outside the basis;
    summed over windows."""
    coordinates_TD, starts_B = tokens.coordinates_NTD[0], _starts(tokens.coordinates_NTD.shape[1])
    predicted_BD = coordinates_TD[starts_B]
    if model:
        _, network, normaliser = model
        predicted_BD = forecast_coordinates(network, normaliser, coordinates_TD, starts_B, (step,))[:, 0]
    apart_BD = (predicted_BD - coordinates_TD[starts_B + step]) * tokens.singular_values_ND[0]
    return np.square(apart_BD).sum(axis=0), float(tokens.outside_NT[0][starts_B + step].sum())


def study(task: str, trials: Mapping[int, Rows], models: Sequence[Model], rank: int) -> list[dict[str, Any]]:
    """One row per model, forward step and group of directions."""
    whole = [reduced(seed, weights_TP, rank) for seed, weights_TP in trials.items()]
    rows = []
    for model in (None, *models):
        own = rank if model is None else model[1].token_size
        for column, step in enumerate(STEPS):
            parts = [errors(tokens.truncated(own), model, step) for tokens, _ in whole]
            inside_D = np.sum([part[0] for part in parts], axis=0)
            moved = sum(moved_H[column] for _, moved_H in whole)
            shares = {_words(low, high): inside_D[low:high].sum() for low, high in GROUPS if low < own}
            shares |= {"outside": sum(part[1] for part in parts)}
            shares |= {"all": sum(shares.values())}
            rows += [
                {
                    "task": task,
                    "model": model[0] if model else "still",
                    "rank": own,
                    "step": step,
                    "directions": name,
                    "share_of_copying": float(f"{error / moved:.4g}"),
                }
                for name, error in shares.items()
            ]
    return rows


def _words(low: int, high: int) -> str:
    return f"{low + 1} to {high}" if high > low + 1 else str(high)


def loaded(folder: str) -> Model:
    """A trained model on the basis `trial`."""
    about = load_about(folder)
    network = CausalTransformer.load(folder).eval()
    return about["experiment"]["preset"], network, Normaliser.from_table(about["normaliser"])


def walk(seed: int) -> NDArray[np.float32]:
    """A random walk, for a quick run."""
    return np.random.default_rng(seed).normal(size=(200, 60)).cumsum(axis=0).astype(np.float32)


def main() -> None:
    """Read the trials and models, and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("storage", nargs="?", help="folder or URI of collected trials")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders of trained models")
    parser.add_argument("--rank", type=int, default=128, help="SVD rank of the rows without a model (default: 128)")
    parser.add_argument("--trials", type=int, default=5, help="last trials that are read (default: 5)")
    arguments = parser.parse_args()
    use_one_core()
    if arguments.quick:
        size = config.Model(context=5, embedding=8, layers=1, heads=1)
        untrained = (
            "untrained",
            CausalTransformer(size, 16, 200).eval(),
            Normaliser(mean_D=np.zeros(16, np.float32), deviation_D=np.ones(16, np.float32)),
        )
        rows = study("random walk", {1: walk(1), 2: walk(2)}, [untrained], 16)
    elif not arguments.storage:
        parser.error("name a storage")
    else:
        store = TrajectoryStore(arguments.storage)
        seeds = store.seeds()[-arguments.trials :]
        trials = {seed: store.weights(seed) for seed in seeds}
        rows = study(store.header(seeds).task, trials, [loaded(folder) for folder in arguments.models], arguments.rank)
    publish_table("token_directions", rows, arguments.quick)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
