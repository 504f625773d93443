"""Simulations against gymnasium's own classes, step for step and bit for bit; and tasks from outside the package."""

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv

from tipl_ray.collect.collection import collect
from tipl_ray.collect.group import GroupCollector
from tipl_ray.config import Collect, Experiment, Where
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import digest, identity
from tipl_ray.experiments import load_experiment
from tipl_ray.places import CHECKOUT
from tipl_ray.ppo.gymnasium_tasks import GymnasiumSimulations
from tipl_ray.ppo.mujoco_tasks import InvertedPendulum
from tipl_ray.ppo.simulations import Simulations
from tipl_ray.ppo.tasks import TASKS, find_task

NUM_STEPS = 1000
SLOW = ["Humanoid-v4", "Pusher-v5", "Reacher-v4", "CartPole-v1", "Acrobot-v1", "Pendulum-v1"]
"""Through gymnasium: each of MuJoCo's takes something else of what was derived before the step."""


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


def random_actions(simulations: Simulations, num_steps: int, count: int) -> np.ndarray:
    low, high = simulations.action_low, simulations.action_high
    return generator(0).uniform(low, high, (num_steps, count, len(low))).astype(np.float32)


def as_gymnasiums(simulations: Simulations, action_A: np.ndarray) -> Any:
    return int(action_A.argmax()) if simulations.discrete else action_A


@pytest.mark.parametrize("task", [*sorted(TASKS.own), *SLOW])
def test_simulations_equal_gymnasium_bit_for_bit_resets_included(task: str) -> None:
    seeds = [3, 4, 5]
    simulations = find_task(task)(len(seeds))
    generators = [generator(seed) for seed in seeds]
    originals: list[gymnasium.Env] = [gymnasium.make(task) for _ in seeds]
    for k, (original, seed) in enumerate(zip(originals, seeds, strict=True)):
        np.testing.assert_array_equal(simulations.reset(k, generators[k]), original.reset(seed=seed)[0])
    num_resets = 0
    for actions in random_actions(simulations, NUM_STEPS, len(seeds)):
        simulations.step(actions)
        for k, original in enumerate(originals):
            observation, reward, terminated, truncated, _ = original.step(as_gymnasiums(simulations, actions[k]))
            np.testing.assert_array_equal(simulations.observations_KO[k], observation)
            assert simulations.rewards_K[k] == reward
            assert simulations.terminated_K[k] == terminated
            if terminated or truncated:
                num_resets += 1
                np.testing.assert_array_equal(simulations.reset(k, generators[k]), original.reset()[0])
    assert num_resets >= len(seeds)


@pytest.mark.parametrize("task", [*sorted(TASKS.own), *SLOW])
def test_limits_and_bounds_are_gymnasiums(task: str) -> None:
    simulations, original = find_task(task)(1), gymnasium.make(task)
    assert simulations.max_episode_steps == gymnasium.spec(task).max_episode_steps
    assert simulations.fast == (task in TASKS.own)
    assert simulations.discrete == isinstance(original.action_space, gymnasium.spaces.Discrete)
    if isinstance(original.action_space, gymnasium.spaces.Discrete):
        assert simulations.action_size == original.action_space.n
        return
    assert isinstance(original.action_space, gymnasium.spaces.Box)
    np.testing.assert_array_equal(simulations.action_low, original.action_space.low)
    np.testing.assert_array_equal(simulations.action_high, original.action_space.high)


@pytest.mark.parametrize("task", [*sorted(TASKS.own), *SLOW])
def test_simulations_go_on_from_a_state_and_when_kept(task: str) -> None:
    simulations, resumed = find_task(task)(3), find_task(task)(2)
    for k in range(3):
        simulations.reset(k, generator(k))
    for k in range(2):
        resumed.reset(k, generator(9))
    actions = random_actions(simulations, 80, 3)
    for step in range(20):
        simulations.step(actions[step])
        for k in map(int, np.flatnonzero(simulations.terminated_K)):
            simulations.reset(k, generator(step))
    resumed.state_KS = simulations.state_KS[[2, 0]]
    kept = simulations.keep(np.array([2, 0]))
    np.testing.assert_array_equal(kept.observations_KO, simulations.observations_KO[[2, 0]])
    for step in range(20, 80):
        kept.step(actions[step, :2])
        resumed.step(actions[step, :2])
        np.testing.assert_array_equal(kept.observations_KO, resumed.observations_KO)
        np.testing.assert_array_equal(kept.rewards_K, resumed.rewards_K)
        np.testing.assert_array_equal(kept.terminated_K, resumed.terminated_K)
        for k in map(int, np.flatnonzero(kept.terminated_K)):
            np.testing.assert_array_equal(kept.reset(k, generator(step)), resumed.reset(k, generator(step)))
    np.testing.assert_array_equal(kept.state_KS, resumed.state_KS)


@pytest.mark.parametrize("task", sorted(TASKS.own))
def test_a_simulation_does_not_depend_on_those_beside_it(task: str) -> None:
    lone, many = find_task(task)(1), find_task(task)(19)
    for k in range(19):
        many.reset(k, generator(k))
    lone.reset(0, generator(7))
    for actions in random_actions(many, 50, 19):
        many.step(actions)
        lone.step(actions[7:8])
        np.testing.assert_array_equal(lone.observations_KO[0], many.observations_KO[7])
        assert lone.rewards_K[0] == many.rewards_K[7]


@pytest.mark.parametrize("task", ["InvertedDoublePendulum-v5", "Ant-v5"])
def test_a_reset_leaves_the_observations_beside_it_alone(task: str) -> None:
    simulations = find_task(task)(2)
    for k in range(2):
        simulations.reset(k, generator(k))
    for actions in random_actions(simulations, 20, 2):
        simulations.step(actions)
    kept = simulations.keep(np.array([0, 1]))
    kept.reset(0, generator(2))
    np.testing.assert_array_equal(kept.observations_KO[1], simulations.observations_KO[1])


class UnboundedReacher(ReacherEnv):
    """Reacher whose actions have no bounds."""

    def _set_action_space(self) -> gymnasium.Space:
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        return self.action_space


class TiringReacher(ReacherEnv):
    """Reacher that counts its steps where MuJoCo does not."""

    def reset_model(self) -> np.ndarray:
        self.num_steps = int(self.np_random.integers(1, 100))
        return super().reset_model()

    def step(self, action: np.ndarray) -> tuple:
        self.num_steps += 1
        observation, reward, *rest = super().step(action)
        return observation, reward - self.num_steps, *rest


class ChoosingPendulum(PendulumEnv):
    """A pendulum with two choices of two."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = gymnasium.spaces.MultiDiscrete([2, 2])


class ForgetfulPole(CartPoleEnv):
    """A pole in a wind of which the episode knows nothing."""

    def step(self, action: Any) -> tuple:
        observation, *rest = super().step(action)
        return observation + np.float32(np.random.default_rng().normal()), *rest


class WindyPole(CartPoleEnv):
    """A pole that chooses otherwise now and then, and whose observation has two axes."""

    def __init__(self, gusts: float = 0.0) -> None:
        super().__init__()
        self.gusts = gusts
        box = self.observation_space
        assert isinstance(box, gymnasium.spaces.Box)
        self.observation_space = gymnasium.spaces.Box(box.low.reshape(2, 2), box.high.reshape(2, 2))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        observation, info = super().reset(seed=seed, options=options)
        return observation.reshape(2, 2), info

    def step(self, action: Any) -> tuple:
        turned = self.np_random.uniform() < self.gusts
        observation, *rest = super().step(1 - action if turned else action)
        return observation.reshape(2, 2), *rest


if "OwnReacher-v0" not in gymnasium.registry:  # as it is where this file is imported again by its other name
    for kind in (ChoosingPendulum, ForgetfulPole, WindyPole):
        gymnasium.register(f"{kind.__name__}-v0", f"{kind.__module__}:{kind.__name__}", max_episode_steps=30)
    gymnasium.register("UnboundedReacher-v0", UnboundedReacher, max_episode_steps=50)
    gymnasium.register("TiringReacher-v0", TiringReacher, max_episode_steps=50)
    gymnasium.register("EndlessReacher-v0", ReacherEnv)
    gymnasium.register("OwnReacher-v0", ReacherEnv, max_episode_steps=50)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("FrozenLake-v1", "its observation space Discrete(16) is not a Box"),
        ("ChoosingPendulum-v0", "its action space MultiDiscrete([2 2]) is neither a Box nor Discrete"),
        ("ForgetfulPole-v0", "depends on more than its initial random generator and its actions"),
        ("Hopper-v3", "moved to the gymnasium-robotics project"),
        ("Nonsense-v0", "Environment `Nonsense` doesn't exist"),
        ("Humanoid", "its id has no version; the newest is Humanoid-v5"),
        ("UnboundedReacher-v0", "has no bounds"),
        ("TiringReacher-v0", "depends on more than MuJoCo's data"),
        ("EndlessReacher-v0", "no step limit"),
    ],
)
def test_a_task_that_cannot_run_is_refused_with_the_reason(task: str, reason: str) -> None:
    known = f"collect.task='{task}' is not one of Ant-v4, Ant-v5, HalfCheetah-v4, "
    with pytest.raises(ValueError, match=re.escape(known) + ".*space: .*" + re.escape(reason)):
        find_task(task)


def test_a_registered_task_of_ones_own_runs_through_gymnasium() -> None:
    kind = find_task("OwnReacher-v0")
    assert issubclass(kind, GymnasiumSimulations)
    assert kind.max_episode_steps == 50
    assert find_task("OwnReacher-v0") is kind


def smoke(task: str, storage: Path, **changes: Any) -> Experiment:
    """Two trials of eight iterations."""
    experiment = load_experiment(CHECKOUT / "jobs" / "experiments" / "smoke.toml")
    settings = dataclasses.replace(experiment.collect, task=task, num_trials=2, engine="torch", **changes)
    return dataclasses.replace(experiment, where=Where(storage=str(storage)), collect=settings)


def test_a_task_of_gymnasiums_with_options_goes_on_from_its_commits(tmp_path: Path) -> None:
    stores = []
    for name, gusts, iterations in (("whole", 0.2, 0), ("dropped", 0.2, 4), ("other", 0.3, 0)):
        experiment = smoke("test_tasks:WindyPole-v0", tmp_path / name, task_options={"gusts": gusts})
        early = GroupCollector(experiment, "torch", [1, 2])
        for _ in range(iterations):
            early._run_iteration()
        assert GroupCollector(experiment, "torch", [1, 2]).advance(seconds=600).finished
        stores.append(TrajectoryStore(experiment.storage_path))
    whole, dropped, other = stores
    assert whole.header().config["task_options"] == {"gusts": 0.2}
    assert [name for name, _, _ in whole.header().layout][-1] == "actor.2.bias"
    assert whole.digest() == dropped.digest() != other.digest()


def test_options_are_part_of_a_data_set_where_there_are_any() -> None:
    plain, windy = Collect(task="CartPole-v1"), Collect(task="CartPole-v1", task_options={"sutton_barto_reward": True})
    assert "task_options" not in identity(plain)
    assert digest(plain) != digest(windy)
    assert find_task("CartPole-v1", windy.task_options) is not find_task("CartPole-v1")


def test_options_of_a_fast_task_are_gymnasiums() -> None:
    options: dict[str, Any] = {"reset_noise_scale": 0.0}
    simulations, original = find_task("HalfCheetah-v4", options)(1), gymnasium.make("HalfCheetah-v4", **options)
    assert not simulations.fast
    np.testing.assert_array_equal(simulations.reset(0, generator(1)), original.reset(seed=1)[0])
    np.testing.assert_array_equal(simulations.observations_KO[0, :8], 0.0)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("CartPole-v1", "with collect.task_options={'gravity': 3.7} is not one of .*unexpected keyword .*'gravity'"),
        ("test_tasks:ForgetfulPendulum", "is not a gymnasium task, and only those take options"),
    ],
)
def test_options_that_a_task_does_not_take_are_refused(task: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_task(task, {"gravity": 3.7})


def test_a_class_from_outside_is_collected_and_goes_on_from_its_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(CHECKOUT / "examples" / "recipes" / "task.py", tmp_path / "task_of_ones_own.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    whole, dropped = (smoke("task_of_ones_own:CentredPendulum", tmp_path / name) for name in ("whole", "dropped"))
    kind = find_task(whole.collect.task)
    assert kind.fast
    assert kind.__module__ == "task_of_ones_own"
    GroupCollector(whole, "torch", [1, 2]).advance(seconds=600)
    early = GroupCollector(dropped, "torch", [1, 2])
    for _ in range(4):
        early._run_iteration()
    assert GroupCollector(dropped, "torch", [1, 2]).advance(seconds=600).finished
    stores = [TrajectoryStore(experiment.storage_path) for experiment in (whole, dropped)]
    assert stores[0].header().task == "task_of_ones_own:CentredPendulum"
    assert stores[0].digest() == stores[1].digest()


def test_an_installed_package_gives_its_task_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carts-1.0.dist-info").mkdir()
    (tmp_path / "carts-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: carts\nVersion: 1.0\n")
    entry = "[tipl_ray.tasks]\nCarts-v0 = examples.recipes.task:CentredPendulum\n"
    (tmp_path / "carts-1.0.dist-info" / "entry_points.txt").write_text(entry)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(CHECKOUT)])
    assert find_task("Carts-v0").__name__ == "CentredPendulum"
    with pytest.raises(ValueError, match=r"collect\.task='Carts-v1' is not one of .*, Carts-v0, "):
        find_task("Carts-v1")


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("examples.recipes.task:CentredPendulum", {}),
        ("tests.test_tasks:OwnReacher-v0", {}),
        ("tests.test_tasks:WindyPole-v0", {"gusts": 0.1}),
    ],
)
def test_tasks_from_outside_are_collected_on_rays_actors(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, options: dict[str, float]
) -> None:
    monkeypatch.chdir(CHECKOUT)
    store = collect(smoke(task, tmp_path, total_env_steps=512, task_options=options))
    assert store.header().task == task
    assert store.seeds() == (1, 2)


class ForgetfulPendulum(InvertedPendulum):
    """A pendulum whose reward depends on a count that its state lacks."""

    num_steps = 0

    def judge(self, actions_KA: np.ndarray) -> None:
        super().judge(actions_KA)
        self.num_steps += 1
        self.rewards_K += np.arange(len(self.rewards_K)) * self.num_steps


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Nothing", "test_tasks has no 'Nothing'"),
        ("NUM_STEPS", "1000 is not a subclass of tipl_ray.ppo.simulations.Simulations"),
        ("ReacherEnv", "is not a subclass of tipl_ray.ppo.simulations.Simulations"),
        ("ForgetfulPendulum", "its next step depends on more than state_KS"),
    ],
)
def test_a_class_from_outside_that_cannot_run_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"collect.task='test_tasks:{name}': ") + ".*" + re.escape(reason)):
        find_task(f"test_tasks:{name}")


def test_a_module_that_is_not_there_is_named() -> None:
    for name in ("Pendulum", "Pendulum-v0"):
        with pytest.raises(ValueError, match=f"collect.task='no_such_module:{name}'.*module (named )?'no_such_module'"):
            find_task(f"no_such_module:{name}")
