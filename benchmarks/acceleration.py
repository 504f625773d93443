"""What jumps save of a PPO iteration and what the predictor takes, on one core.

Every subject runs one iteration per round and the rounds alternate; the table shows medians over rounds of the CPU time
of the one thread that works, so that what else runs on the machine counts little. The predictors are a ridge of fixed
coefficients and the preset `causal`'s Transformer as it begins: how long they take does not depend on what they have
learned.

    python benchmarks/acceleration.py [--rounds 9]
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, results_folder, use_one_core  # noqa: E402

from tipl_ray.accelerate.group_jumps import GroupJumps, Jumps  # noqa: E402
from tipl_ray.accelerate.jumps import JumpSettings  # noqa: E402
from tipl_ray.config import Collect, Experiment, Model, Ppo  # noqa: E402
from tipl_ray.experiments import PRESETS  # noqa: E402
from tipl_ray.ppo.algorithms import NOTHING  # noqa: E402
from tipl_ray.ppo.engines import choose_engine  # noqa: E402
from tipl_ray.ppo.trials import TrialGroup  # noqa: E402
from tipl_ray.predict.baselines import Ridge  # noqa: E402
from tipl_ray.predict.gram import Question  # noqa: E402
from tipl_ray.predict.saved import save_predictor  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402
from tipl_ray.window.transformer import WindowTransformer  # noqa: E402

SHAPES = (("InvertedPendulum-v4", 8, 10), ("HalfCheetah-v4", 64, 10), ("HalfCheetah-v4", 256, 10))
"""Task, width of the policy's hidden layers, trials of one actor."""
WARM_UP = 5
"""Iterations until every context is full."""


def predictors(folder: str) -> dict[str, str]:
    """Folders of a ridge and a Transformer that carry the last displacement on."""
    question = Question(context=20, steps=tuple(range(1, 11)), snapshots_per_iteration=5)
    ridge = Ridge(question)
    coefficients_QHK = np.zeros((5, 10, 20))
    coefficients_QHK[:, :, -5:] = 0.02 * np.arange(1, 11)[:, None]
    ridge.fitted = {"coefficients_QHK": coefficients_QHK}
    save_predictor(ridge, f"{folder}/ridge", {})
    torch.manual_seed(0)
    model = WindowTransformer(Model(**PRESETS["causal"]["model"]), question.steps, 5)
    model.ridge_QHK.copy_(torch.from_numpy(coefficients_QHK))
    model.save(f"{folder}/tipl", {"basis": {"kind": "window"}})
    return {name: f"{folder}/{name}" for name in ("ridge", "tipl")}


class Subject:
    """A group of trials whose update and jump are timed."""

    def __init__(self, name: str, task: str, width: int, trials: int, epochs: int, predictor: str | None):
        self.name = name
        experiment = Experiment(
            name="bench",
            collect=Collect(task=task, policy_hidden=(width, width)),
            ppo=Ppo(num_epochs=epochs),
        )
        engine, seeds = choose_engine("auto", experiment.ppo), list(range(1, trials + 1))
        extension = Jumps.load(predictor, JumpSettings()) if predictor else NOTHING
        self.group = TrialGroup(experiment, engine, seeds, extension=extension)
        self.seconds = {"update": 0.0, "jump": 0.0}
        self._time(self.group.learner, "update", "update")
        if isinstance(self.group.hooks, GroupJumps):
            for method in ("record", "propose", "carry_on"):
                self._time(self.group.hooks, method, "jump")

    def _time(self, owner: Any, method: str, part: str) -> None:
        inner: Callable = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            begin = time.thread_time()
            answer = inner(*arguments)
            self.seconds[part] += time.thread_time() - begin
            return answer

        setattr(owner, method, timed)

    def run(self) -> dict[str, float]:
        """Seconds of one iteration, and of its update and its jump."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        begin = time.thread_time()
        for _ in self.group.run_iteration():
            pass
        return {"iteration": time.thread_time() - begin, **self.seconds}


def main() -> None:
    """Measure, print and write down."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds")
    arguments = parser.parse_args()
    shapes, num_rounds = (SHAPES[:1], 1) if arguments.quick else (SHAPES, arguments.rounds)
    use_one_core(arguments.quick)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folders = predictors(folder)
        for task, width, trials in shapes:
            shape = (task, width, trials)
            subjects = [Subject(f"{epochs} epochs", *shape, epochs, None) for epochs in (10, 4)]
            subjects += [Subject(f"4 epochs, jumps by {name}", *shape, 4, folders[name]) for name in folders]
            for _ in range(WARM_UP):
                for subject in subjects:
                    subject.run()
            rounds = [[subject.run() for subject in subjects] for _ in range(num_rounds)]
            first: dict[str, float] = {}
            for index, subject in enumerate(subjects):
                seconds = {part: statistics.median(round[index][part] for round in rounds) for part in rounds[0][0]}
                first = first or seconds
                rows.append(
                    {
                        "task": f"{task} {width}-{width}",
                        "subject": subject.name,
                        "iteration, ms a trial": round(1e3 * seconds["iteration"] / trials, 3),
                        "update, ms a trial": round(1e3 * seconds["update"] / trials, 3),
                        "jump, ms a trial": round(1e3 * seconds["jump"] / trials, 3),
                        "update less": f"{1 - seconds['update'] / first['update']:.1%}",
                        "jump's share": f"{seconds['jump'] / seconds['iteration']:.1%}",
                    }
                )
    say_rows([{name: str(value) for name, value in row.items()} for row in rows])
    (results_folder(arguments.quick) / "acceleration.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
