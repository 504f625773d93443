"""stable-baselines3's trainings, recorded by the callback: what is in their trials, and that a kill changes no byte."""

import copy
import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.errors import UserError
from tipl_ray.record.stable_baselines import RecordPolicy, learn_in_legs, load_policy

ROOT = Path(__file__).resolve().parent.parent
ON = {"n_steps": 32, "policy_kwargs": {"net_arch": [4]}}
OFF = {"learning_starts": 20, "batch_size": 8, "buffer_size": 200, "policy_kwargs": {"net_arch": [4]}}
SETTINGS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "PPO": (PPO, {**ON, "batch_size": 16, "n_epochs": 4}),
    "A2C": (A2C, {**ON, "n_steps": 8}),
    "SAC": (SAC, OFF),
    "TD3": (TD3, OFF),
}
PENDULUM = "Pendulum-v1"
KILLED_STEPS = {"PPO": 96 * 2, "A2C": 100, "SAC": 120, "TD3": 120}


def make(algorithm: str, task: str = PENDULUM, normalised: bool = True, **settings: Any) -> Any:
    torch.set_num_threads(1)
    vector: Any = DummyVecEnv([lambda: Monitor(gymnasium.make(task, max_episode_steps=25))])
    kind, given = SETTINGS[algorithm]
    vector = VecNormalize(vector) if normalised else vector
    # A copy, as their constructors write into what they are given.
    return kind("MlpPolicy", vector, seed=0, device="cpu", **copy.deepcopy({**given, **settings}))


class Killer(BaseCallback):
    """Ends everything at a step."""

    def __init__(self, at: int):
        super().__init__()
        self._at = at

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._at:
            raise KeyboardInterrupt
        return True


def learn(algorithm: str, folder: Path, kill_at: int = 10**9, task: str = PENDULUM, **settings: Any) -> Any:
    every = {"steps_per_snapshot": 10} if algorithm in ("SAC", "TD3") else {}
    record = RecordPolicy(str(folder / "data"), trial=1, snapshots_per_commit=3, **{**every, **settings})
    return learn_in_legs(
        lambda: make(algorithm, task),
        folder / "checkpoints",
        total_timesteps=KILLED_STEPS[algorithm],
        leg_timesteps=60,
        seed=7,
        callback=CallbackList([record, Killer(kill_at)]),
    )


def data(folder: Path) -> TrajectoryStore:
    return TrajectoryStore(str(folder / "data"))


@pytest.mark.parametrize("task", [PENDULUM, "Hopper-v5"])
@pytest.mark.parametrize("algorithm", ["PPO", "SAC", "TD3"])
def test_a_training_that_was_killed_and_went_on_leaves_the_bytes_of_an_undisturbed_one(
    algorithm: str, task: str, tmp_path: Path
) -> None:
    settings = {"epochs_per_snapshot": 2} if algorithm == "PPO" else {}
    whole = learn(algorithm, tmp_path / "undisturbed", task=task, **settings)
    kills = (5, KILLED_STEPS[algorithm] - 25, 10**9)
    for kill_at in kills:
        try:
            resumed = learn(algorithm, tmp_path / "killed", kill_at, task=task, **settings)
        except KeyboardInterrupt:
            continue
    assert data(tmp_path / "killed").digest() == data(tmp_path / "undisturbed").digest()
    assert data(tmp_path / "killed").verify(1).num_snapshots > 10
    for name, tensor in whole.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name])


def test_legs_are_kept_whole_and_alone_and_leave_what_is_the_users(tmp_path: Path) -> None:
    theirs = [tmp_path / "checkpoints" / name for name in ("notes.txt", "2024/thesis.tex")]
    for file in theirs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    learn("A2C", tmp_path)
    assert [file.read_text() for file in theirs] == ["mine", "mine"]
    (checkpoint,) = (file.parent for file in (tmp_path / "checkpoints").glob("*/model.zip"))
    assert int(checkpoint.name) >= KILLED_STEPS["A2C"]
    assert {one.name for one in checkpoint.iterdir()} == {"model.zip", "vec_normalize.pkl"}


@pytest.mark.parametrize("algorithm", ["PPO", "A2C"])
def test_an_on_policy_algorithm_gives_a_snapshot_an_update(algorithm: str, tmp_path: Path) -> None:
    model = make(algorithm)
    model.learn(96, callback=RecordPolicy(str(tmp_path), trial=1))
    store = TrajectoryStore(str(tmp_path))
    trajectory, header, length = store.trajectory(1), store.header(), model.n_steps
    updates = 96 // length
    assert trajectory.steps_T.tolist() == trajectory.env_steps_T.tolist() == [length * i for i in range(updates + 1)]
    assert trajectory.iterations_T.tolist() == list(range(updates + 1))
    assert (header.task, header.config["settings"]["algorithm"]) == (PENDULUM, algorithm)
    assert header.config["settings"]["n_steps"] == length
    assert not [name for name, _, _ in header.layout if "value" in name]
    state = model.policy.state_dict()
    last = np.concatenate([state[name].numpy().ravel() for name, _, _ in header.layout])
    np.testing.assert_array_equal(trajectory.weights_TP[-1], last)
    assert np.isnan(trajectory.episodic_returns_T[0])
    returns = [one["r"] for one in model.ep_info_buffer]
    assert trajectory.episodic_returns_T[-1] == pytest.approx(np.mean(returns))
    np.testing.assert_array_equal(trajectory.observation_means_TO[-1], model.get_env().obs_rms.mean)
    assert trajectory.observation_counts_T[-1] == model.get_env().obs_rms.count
    assert (np.diff(trajectory.weights_TP, axis=0) != 0).any(axis=1).all()


def test_ppos_update_epochs_are_its_phases(tmp_path: Path) -> None:
    model = make("PPO", learning_rate=lambda left: 1e-3 * left)
    model.learn(96, callback=RecordPolicy(str(tmp_path), trial=1, epochs_per_snapshot=2))
    store = TrajectoryStore(str(tmp_path))
    trajectory = store.trajectory(1)
    assert store.header().config["snapshots_per_iteration"] == 2
    assert trajectory.iterations_T.tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert trajectory.epochs_T.tolist() == [0, 2, 4, 2, 4, 2, 4]
    np.testing.assert_allclose(trajectory.learning_rates_T, 1e-3 * np.array([3, 2, 2, 1, 1, 0, 0]) / 3, atol=1e-12)
    # The rate is 0 in the last update, so nothing moves there; in the others something does.
    moved_S = (np.diff(trajectory.weights_TP, axis=0) != 0).any(axis=1)
    assert moved_S.tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("algorithm", ["SAC", "TD3"])
def test_an_off_policy_algorithm_gives_a_snapshot_of_its_actor_every_so_many_steps(
    algorithm: str, tmp_path: Path
) -> None:
    model = make(algorithm, normalised=False)
    model.learn(100, callback=RecordPolicy(str(tmp_path), trial=1, steps_per_snapshot=20))
    store = TrajectoryStore(str(tmp_path))
    assert store.trajectory(1).steps_T.tolist() == [0, 21, 40, 60, 80, 100]
    assert "observation_mean" not in store.header().columns
    assert {name for name, _, _ in store.header().layout} == {name for name, _ in model.policy.actor.named_parameters()}


def test_the_q_network_of_dqn_acts(tmp_path: Path) -> None:
    model = DQN("MlpPolicy", "CartPole-v1", learning_starts=10, device="cpu", policy_kwargs={"net_arch": [4]})
    model.learn(40, callback=RecordPolicy(str(tmp_path), trial=1, steps_per_snapshot=10))
    assert TrajectoryStore(str(tmp_path)).header().layout[0][0] == "q_net.0.weight"


@pytest.mark.parametrize("algorithm", ["PPO", "SAC"])
def test_a_snapshot_goes_back_into_a_model_with_its_observation_statistics(algorithm: str, tmp_path: Path) -> None:
    model = make(algorithm)
    model.learn(96, callback=RecordPolicy(str(tmp_path), trial=1, steps_per_snapshot=32))
    other = make(algorithm)
    load_policy(other, str(tmp_path), trial=1)
    observation = np.array([[0.3, -0.2, 1.0]])
    normalised = [one.get_env().normalize_obs(observation) for one in (model, other)]
    np.testing.assert_array_equal(*normalised)
    actions = [one.predict(normalised[0], deterministic=True)[0] for one in (model, other)]
    np.testing.assert_array_equal(*actions)
    with pytest.raises(
        ValueError, match=r"trial 1 has observation statistics, and the model's environment is not a VecNo"
    ):
        load_policy(make(algorithm, normalised=False), str(tmp_path), trial=1)


def test_a_model_ahead_of_its_trial_is_refused(tmp_path: Path) -> None:
    model = make("PPO")
    model.learn(64, callback=RecordPolicy(str(tmp_path), trial=1))
    model.learn(96, reset_num_timesteps=False)
    with pytest.raises(
        StoreError, match=r"the model has done 160 steps, and the last snapshot of trial 1 is of step 64"
    ):
        model.learn(32, reset_num_timesteps=False, callback=RecordPolicy(str(tmp_path), trial=1))


@pytest.mark.parametrize(
    ("algorithm", "settings", "words"),
    [
        ("A2C", {"epochs_per_snapshot": 2}, r"epochs_per_snapshot=2: A2C has no update epochs; leave it out"),
        ("PPO", {"epochs_per_snapshot": 3}, r"epochs_per_snapshot=3 does not divide n_epochs=4"),
        ("PPO", {"steps_per_snapshot": 0}, r"steps_per_snapshot=0 is below 1"),
        ("PPO", {"steps_per_snapshot": 9, "epochs_per_snapshot": 2}, r"are mutually exclusive; leave one out"),
    ],
)
def test_what_cannot_be_recorded_of_an_algorithm_is_refused(
    algorithm: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        make(algorithm).learn(40, callback=RecordPolicy(str(tmp_path), trial=1, **settings))


def test_an_update_that_may_end_early_has_no_phases(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"target_kl=0\.1 ends updates early, so that iterations have no phases of equal"
    ):
        make("PPO", target_kl=0.1).learn(40, callback=RecordPolicy(str(tmp_path), trial=1, epochs_per_snapshot=2))


def test_without_stable_baselines3_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "tipl_ray.record.stable_baselines")
    with pytest.raises(UserError, match=r"install it: pip install 'tipl_ray\[stable-baselines3\]'"):
        importlib.import_module("tipl_ray.record.stable_baselines")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["PPO", "SAC", "TD3"])
def test_a_training_that_is_killed_by_the_kernel_again_and_again_leaves_the_same_bytes(
    algorithm: str, tmp_path: Path
) -> None:
    learn(algorithm, tmp_path / "undisturbed")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from pathlib import Path; "
        f"import test_record_stable_baselines as t; t.learn({algorithm!r}, Path({str(tmp_path / 'killed')!r}))"
    )
    environment, moments = {**os.environ, "PYTHONPATH": str(ROOT)}, random.Random(0)
    for kill in range(6):
        running = subprocess.Popen([sys.executable, "-c", code], env=environment)
        if kill == 5:
            assert running.wait(timeout=300) == 0
            break
        while running.poll() is None and not (tmp_path / "killed" / "data").exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5))
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert data(tmp_path / "killed").digest() == data(tmp_path / "undisturbed").digest()
