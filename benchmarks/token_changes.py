"""What each change to the paper's Transformer is worth: predicted changes of tokens, how they are decoded, their signs.

`paper-residual` predicts how a token changes; the forecast is the last snapshot's weights and the decoded change
(`added`). Decoded instead is the changed token itself, as in the paper (`decoded`). Both are judged for three models:
as shipped; with a random sign for each direction of each trial's basis, where the preset makes the largest weight of
each positive; and predicting whole tokens, as the paper does. Figures are the skill in weights on the validation
trials, on the windows of the sweeps of rank and context, as the mean over h = 1 to 10 and over seeds; `skill_deviation`
is the root mean square distance of the seeds from that.

    python benchmarks/token_changes.py storage/inverted_pendulum [--experiment inverted_pendulum] [--rank 64]

For HalfCheetah: storage/half_cheetah --experiment half_cheetah --rank 128. Writes docs/results/token_changes_TASK.csv;
it takes a quarter of an hour of one core for the pendulum.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, publish_table, use_one_core  # noqa: E402

from tipl_ray.config import Experiment  # noqa: E402
from tipl_ray.experiments import load_experiment  # noqa: E402
from tipl_ray.paper.objective import NextToken  # noqa: E402
from tipl_ray.paper.predictor import forecast_coordinates  # noqa: E402
from tipl_ray.paper.representation import TrialTokens  # noqa: E402
from tipl_ray.paper.temporal_svd import fit_basis  # noqa: E402
from tipl_ray.paper.tokens import Tokens, tokens_of  # noqa: E402
from tipl_ray.paper.transformer import CausalTransformer  # noqa: E402
from tipl_ray.predict.bands import load_band  # noqa: E402
from tipl_ray.predict.gram import GramBand, Question, make_band, moved_squares  # noqa: E402
from tipl_ray.predict.representation import TrainingData  # noqa: E402
from tipl_ray.sweep.judge import Judge  # noqa: E402
from tipl_ray.terminal import say, say_rows  # noqa: E402
from tipl_ray.train.training import Training  # noqa: E402

LONGEST = 80
"""The longest context of the sweeps: where their windows begin."""
VARIANTS = {"as shipped": (True, False), "random signs": (True, True), "whole tokens": (False, False)}
"""Whether changes are predicted, and whether signs are random."""


def with_random_signs(tokens: Tokens) -> Tokens:
    """The same trials, each in a basis whose directions may point the other way."""
    num_trials, _, rank = tokens.coordinates_NTD.shape
    signs_ND = np.random.default_rng(tokens.seeds[0]).choice(np.array([-1, 1], np.float32), (num_trials, rank))
    return dataclasses.replace(tokens, coordinates_NTD=tokens.coordinates_NTD * signs_ND[:, None])


def skills(experiment: Experiment, data: TrainingData, judge: Judge) -> dict[str, NDArray[np.float64]]:
    """Of one model, by how its tokens become weights; (H,)."""
    training = Training(experiment, data)
    list(training.iterations())
    objective, model, tokens = training.objective, training.best.eval(), data.validation
    assert isinstance(objective, NextToken)
    assert isinstance(model, CausalTransformer)
    errors: dict[str, list[NDArray[np.float64]]] = {"added": [], "decoded": []}
    for trial in range(len(tokens.seeds)):
        coordinates_TD = tokens.coordinates_NTD[trial]
        found_BHD = forecast_coordinates(model, objective.normaliser, coordinates_TD, judge.starts_B, judge.steps)
        for name, own in errors.items():
            own.append(tokens.squared_errors(trial, found_BHD, judge.starts_B, judge.steps, changes=name == "added"))
    return {name: judge.skills(np.stack(own)) for name, own in errors.items()}


def read(experiment: Experiment, storage: str) -> tuple[TrainingData, list[GramBand]]:
    """Training and validation trials as tokens, and the bands of the latter."""
    wide = dataclasses.replace(Question.of(experiment), context=LONGEST)
    representation = TrialTokens(experiment.basis)
    halves = [
        representation.gather([[representation.read(storage, seed, wide) for seed in seeds]])
        for seeds in (experiment.train_seeds, experiment.validation_seeds)
    ]
    bands = [load_band(storage, seed, wide) for seed in experiment.validation_seeds]
    return TrainingData(train=halves[0], validation=halves[1]), bands


def walks(rank: int, steps: int) -> tuple[TrainingData, list[GramBand]]:
    """Random walks in place of trials, for a quick run."""
    random = np.random.default_rng(0)
    trials = [random.normal(size=(150, 30)).cumsum(axis=0).astype(np.float32) for _ in range(5)]
    bands = [make_band(trial, LONGEST + steps) for trial in trials]
    tokens = [
        tokens_of(seed, trial, fit_basis(trial, rank), moved_squares(band.products_SW, steps))
        for seed, (trial, band) in enumerate(zip(trials, bands, strict=True))
    ]
    return TrainingData(train=Tokens.stack(tokens[:3]), validation=Tokens.stack(tokens[3:])), bands[3:]


def main() -> None:
    """Train and judge every variant, and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("storage", nargs="?", help="folder or URI of the collected trials")
    parser.add_argument(
        "--experiment", default="inverted_pendulum", help="whose trials they are (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=64, help="SVD rank (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant (default: %(default)s)")
    arguments = parser.parse_args()
    use_one_core(arguments.quick)
    base = load_experiment(ROOT / "jobs" / "experiments" / f"{arguments.experiment}.toml", "paper-residual")
    rank, num_steps, seeds = (4, 2, 1) if arguments.quick else (arguments.rank, 2_500, arguments.seeds)
    base = dataclasses.replace(
        base,
        basis=dataclasses.replace(base.basis, rank=rank),
        evaluate=dataclasses.replace(base.evaluate, extra_horizons=()),
        train=dataclasses.replace(
            base.train, num_steps=num_steps, steps_per_iteration=min(num_steps, 500), precision="bfloat16"
        ),
    )
    if not arguments.quick and not arguments.storage:
        parser.error("name a storage")
    data, bands = walks(rank, base.evaluate.horizon) if arguments.quick else read(base, arguments.storage)
    judge = Judge(bands=bands, steps=base.evaluate.steps, longest=LONGEST)
    rows: list[dict[str, Any]] = []
    for variant, (residual, random_signs) in VARIANTS.items():
        own = TrainingData(
            train=with_random_signs(data.train) if random_signs else data.train,
            validation=with_random_signs(data.validation) if random_signs else data.validation,
        )
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            model = dataclasses.replace(base.model, residual=residual)
            experiment = dataclasses.replace(base, model=model, train=dataclasses.replace(base.train, seed=seed))
            for name, skill_H in skills(experiment, own, judge).items():
                found.setdefault(name, []).append(float(skill_H.mean()))
        for name, values in found.items():
            rows.append(
                {
                    "task": base.collect.task,
                    "variant": variant,
                    "forecast": name,
                    "rank": rank,
                    "skill": round(float(np.mean(values)), 4),
                    "skill_deviation": round(float(np.std(values)), 4),
                    "seeds": seeds,
                }
            )
            say(f"{variant}, {name}: {rows[-1]['skill']}")
    publish_table(f"token_changes_{arguments.experiment}", rows, arguments.quick)
    say_rows([{key: str(value) for key, value in row.items()} for row in rows])


if __name__ == "__main__":
    main()
