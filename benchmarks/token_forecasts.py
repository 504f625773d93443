"""How well the paper's Transformer forecasts when its tokens are one representation or another, all of the same size.

On each of the representations of benchmarks/representations.py the Transformer of the preset `paper-residual` is
trained from three seeds, with the same steps for all: it predicts how each token changes, and the forecast is the last
snapshot and the decoded change. In the row `window` our own Transformer (`causal`) has as many displacements for its
context as the others have numbers per token.

    python benchmarks/token_forecasts.py storage/inverted_pendulum [--sizes 32]

The storage is one of jobs/experiments/inverted_pendulum.toml. Trials are split as there; the skills are those of the
test trials. Writes docs/results/token_forecasts.csv; it takes about an hour of one core for each size.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, publish_table, use_one_core  # noqa: E402
from representations import (  # noqa: E402
    CONTEXT,
    SEEDS,
    STEPS,
    TRAINING_STEPS,
    Code,
    Parts,
    Weights,
    evenly,
    of_all_seeds,
    read_trials,
    representations,
    rows_of,
)

from tipl_ray.config import Experiment  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.paper.objective import NextToken  # noqa: E402
from tipl_ray.paper.predictor import forecast_coordinates  # noqa: E402
from tipl_ray.paper.tokens import Tokens  # noqa: E402
from tipl_ray.paper.transformer import CausalTransformer  # noqa: E402
from tipl_ray.predict.gram import Question, make_band, moved_squares  # noqa: E402
from tipl_ray.predict.predictor import Trial  # noqa: E402
from tipl_ray.predict.representation import TrainingData  # noqa: E402
from tipl_ray.terminal import say, say_rows  # noqa: E402
from tipl_ray.train.training import Training  # noqa: E402
from tipl_ray.window.predictor import WindowTipl  # noqa: E402
from tipl_ray.window.transformer import WindowTransformer  # noqa: E402

Forecaster = Callable[[Weights, NDArray[np.int64]], NDArray[np.floating]]
"""How the weights of a trial (T, P) are said to change from each start to each forward step; (B, H, P)."""


def learning(preset: str, steps: int, seed: int, context: int = CONTEXT) -> Experiment:
    """An experiment in which this preset is trained for some steps."""
    base = load_experiment(ROOT / "jobs" / "experiments" / "inverted_pendulum.toml", preset)
    train = dataclasses.replace(
        base.train, num_steps=steps, steps_per_iteration=min(steps, 250), warmup_steps=100, seed=seed
    )
    if preset == "paper-residual":
        train = dataclasses.replace(train, precision="bfloat16")
    model, evaluate = (
        dataclasses.replace(base.model, context=context),
        dataclasses.replace(base.evaluate, extra_horizons=()),
    )
    return dataclasses.replace(base, train=train, model=model, evaluate=evaluate)


def on_tokens(parts: Parts, code_of: Callable[[Weights], Code], steps: int, seed: int) -> Forecaster:
    """The paper's Transformer on the tokens of a code, as it was when its validation loss was lowest."""

    def tokens_of(trials: Sequence[Weights]) -> Tokens:
        coordinates = np.stack([code_of(one).encode(one) for one in trials]).astype(np.float32)
        moved = [moved_squares(make_band(one, 2).products_SW, 1) for one in trials]
        # A code need not be linear: errors inside and outside of it are no sum, and are measured in weights below.
        return Tokens(
            seeds=tuple(range(len(trials))),
            coordinates_NTD=coordinates,
            singular_values_ND=np.ones((len(trials), coordinates.shape[2])),
            outside_NT=np.zeros(coordinates.shape[:2]),
            moved_NTF=np.stack(moved),
        )

    data = TrainingData(train=tokens_of(parts[0]), validation=tokens_of(parts[1]))
    training = Training(learning("paper-residual", steps, seed), data)
    list(training.iterations())
    objective, model = training.objective, training.best.eval()
    assert isinstance(objective, NextToken)
    assert isinstance(model, CausalTransformer)

    def forecast(trial_TP: Weights, starts_B: NDArray[np.int64]) -> NDArray[np.floating]:
        code = code_of(trial_TP)
        tokens_TD = code.encode(trial_TP).astype(np.float32)
        found_BHD = forecast_coordinates(model, objective.normaliser, tokens_TD, starts_B, STEPS)
        later_BHP = code.decode(found_BHD.reshape(-1, found_BHD.shape[2])).reshape(*found_BHD.shape[:2], -1)
        return later_BHP.astype(np.float64) - code.decode(tokens_TD[starts_B])[:, None]

    return forecast


def on_displacements(parts: Parts, context: int, steps: int, seed: int) -> Forecaster:
    """Our Transformer on the displacements of a context."""
    experiment = learning("causal", steps, seed, context)
    question = Question.of(experiment)

    def band_of(trial_TP: Weights) -> Any:
        return make_band(trial_TP, question.width, snapshots_per_iteration=question.snapshots_per_iteration)

    data = TrainingData(train=[band_of(one) for one in parts[0]], validation=[band_of(one) for one in parts[1]])
    training = Training(experiment, data)
    list(training.iterations())
    model = training.best.eval()
    assert isinstance(model, WindowTransformer)
    tipl, columns = WindowTipl(question, model), [question.steps.index(step) for step in STEPS]

    def forecast(trial_TP: Weights, starts_B: NDArray[np.int64]) -> NDArray[np.floating]:
        found_BHP = tipl.forecast(Trial(weights_TP=trial_TP, band=band_of(trial_TP)), starts_B)[:, columns]
        return found_BHP.astype(np.float64) - trial_TP[starts_B][:, None]

    return forecast


def judged(forecast: Forecaster, trial_TP: Weights, first: int) -> dict[str, NDArray[np.float64]]:
    """Squared errors of one trial's forecasts, and of copying, each summed over starts; (H,)."""
    starts_B = evenly(first, len(trial_TP) - max(STEPS))
    moved_BHP = trial_TP[starts_B[:, None] + np.asarray(STEPS)].astype(np.float64) - trial_TP[starts_B][:, None]
    errors_BH = np.square(forecast(trial_TP, starts_B) - moved_BHP).sum(axis=2)
    return {"skill": errors_BH.sum(axis=0), "moved": np.square(moved_BHP).sum(axis=(0, 2))}


def study(shape: Any, parts: Parts, size: int, steps: tuple[int, int, int]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each representation, with so many steps for autoencoders, the paper's Transformer, and ours."""
    first = max(CONTEXT, size)
    for one in representations(shape, parts, size, steps[0]):
        codes = [one.code_of[seed % len(one.code_of)] for seed in range(SEEDS)]
        forecasters = (on_tokens(one.parts, code_of, steps[1], seed) for seed, code_of in enumerate(codes))
        sums = [[judged(forecast, trial, first) for trial in one.parts[2]] for forecast in forecasters]
        yield rows_of(one.name, size, one.causal, SEEDS, of_all_seeds(sums), ("skill",))
    forecasters = (on_displacements(parts, size, steps[2], seed) for seed in range(SEEDS))
    sums = [[judged(forecast, trial, first) for trial in parts[2]] for forecast in forecasters]
    yield rows_of("window", size, True, SEEDS, of_all_seeds(sums), ("skill",))


def main() -> None:
    """Read the trials, and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("storage", nargs="?", help="folder or URI of the collected trials")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32], help="numbers per token")
    arguments = parser.parse_args()
    use_one_core(arguments.quick)
    shape, parts = read_trials(parser, arguments)
    sizes, steps = ([4], (10, 2, 2)) if arguments.quick else (arguments.sizes, (TRAINING_STEPS, 1_500, 2_500))
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for some in study(shape, parts, size, steps):
            rows += some
            say(f"{some[0]['representation']} {size}: " + ", ".join(f"h {row['step']} {row['skill']}" for row in some))
            publish_table("token_forecasts", rows, arguments.quick)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
