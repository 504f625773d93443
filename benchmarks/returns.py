"""Policies evaluated many at once, beside a loop of gymnasium episodes with a policy in torch; same policies and seeds.

Run it by `make bench`, or alone:

    python benchmarks/returns.py [--rounds 5]
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, results_folder, use_one_core  # noqa: E402

from tipl_ray.config import Collect, Experiment  # noqa: E402
from tipl_ray.ppo.engines import choose_engine, make_learner  # noqa: E402
from tipl_ray.ppo.networks import NetworkShape, unflatten  # noqa: E402
from tipl_ray.ppo.returns import policy_returns  # noqa: E402
from tipl_ray.ppo.trials import TrialGroup, network_shape  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402

TASK, NUM_POLICIES, SEEDS = "InvertedPendulum-v4", 24, [101, 102, 103]


def learned_policies(iterations: int) -> tuple[NetworkShape, np.ndarray, np.ndarray, np.ndarray]:
    """Weights (N, P) and observation statistics (N, O) of trials that have learned for some iterations."""
    collect = Collect(task=TASK, policy_hidden=(8, 8), total_env_steps=100_000)
    experiment = Experiment(name="bench", collect=collect)
    group = TrialGroup(experiment, choose_engine("auto", experiment.ppo), list(range(NUM_POLICIES)))
    for _ in range(iterations):
        snapshots = list(group.run_iteration())[-NUM_POLICIES:]
    return (
        network_shape(collect),
        np.stack([snapshot.weights for snapshot in snapshots]),
        np.stack([snapshot.observation_mean for snapshot in snapshots]),
        np.stack([snapshot.observation_variance for snapshot in snapshots]),
    )


def gymnasium_loop(
    shape: NetworkShape, weights_NP: np.ndarray, means_NO: np.ndarray, variances_NO: np.ndarray
) -> np.ndarray:
    """Returns (N, E), episode by episode: gymnasium.make, and a policy of torch's own modules."""
    environment: Any = gymnasium.make(TASK)
    low, high = environment.action_space.low, environment.action_space.high
    returns = np.zeros((len(weights_NP), len(SEEDS)))
    for n, weights in enumerate(weights_NP):
        policy = torch_policy(shape, weights)
        for e, seed in enumerate(SEEDS):
            observation, _ = environment.reset(seed=seed)
            over = False
            while not over:
                normalised = (observation - means_NO[n]) / np.sqrt(variances_NO[n] + 1e-8)
                action = policy(torch.from_numpy(np.clip(normalised.astype(np.float32), -10, 10))).numpy()
                observation, reward, terminated, truncated, _ = environment.step(np.clip(action, low, high))
                returns[n, e] += float(reward)
                over = terminated or truncated
    return returns


def torch_policy(shape: NetworkShape, weights: np.ndarray) -> torch.nn.Sequential:
    """A policy's mean as the module that a reader of CleanRL would write."""
    modules: list[torch.nn.Module] = []
    named = unflatten(weights, shape.policy_layout)
    for layer in range(3):
        weight = torch.from_numpy(named[f"actor.{layer}.weight"].T.copy())
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.copy_(weight)
        linear.bias.copy_(torch.from_numpy(named[f"actor.{layer}.bias"]))
        modules += [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*modules[:-1])


def main() -> None:
    """Measure, print the table, write benchmarks/results/returns.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    use_one_core(arguments.quick)
    shape, weights_NP, means_NO, variances_NO = learned_policies(1 if arguments.quick else 16)
    ppo = Experiment(name="bench").ppo
    learner = make_learner(choose_engine("auto", ppo), shape, ppo)
    subjects: dict[str, Callable[[], np.ndarray]] = {
        "many at once": lambda: policy_returns(TASK, learner, weights_NP, means_NO, variances_NO, SEEDS),
        "gymnasium loop": lambda: gymnasium_loop(shape, weights_NP, means_NO, variances_NO),
    }
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    returns: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for _ in range(rounds):
            for name, subject in subjects.items():
                begin = time.process_time()
                returns[name] = subject()
                seconds[name].append(time.process_time() - begin)
    np.testing.assert_allclose(returns["many at once"], returns["gymnasium loop"])
    env_steps = returns["many at once"].sum()  # one reward a step
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "task": f"{TASK} 8-8",
            "subject": name,
            "metric": f"env steps per second, {NUM_POLICIES} policies x {len(SEEDS)} episodes, one core",
            "value": round(env_steps / median, 1),
            "unit": "1/s",
            "ratio_to_plain": round(medians["gymnasium loop"] / median, 2),
            "rounds": rounds,
        }
        for name, median in medians.items()
    ]
    (results_folder(arguments.quick) / "returns.json").write_text(json.dumps(rows, indent=1) + "\n")
    shown = ("subject", "value", "ratio_to_plain")
    title = f"{NUM_POLICIES} policies x {len(SEEDS)} episodes, {env_steps:,.0f} env steps, equal returns"
    say_rows([{key: str(row[key]) for key in shown} for row in rows], title=title)


if __name__ == "__main__":
    main()
