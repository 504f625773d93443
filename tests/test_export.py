"""What goes into the data set comes out again, bit for bit: as a module's weights, as a file, as a policy that acts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from test_collection import smoke
from torch import nn

from tipl_ray import Recorder, load_module, policy_module, save_safetensors
from tipl_ray.collect.group import GroupCollector
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.ppo.environments import CLIP, EPSILON
from tipl_ray.ppo.torch_learner import TorchLearner
from tipl_ray.ppo.trials import network_shape


class Mixed(nn.Module):
    """Every kind of tensor that is recorded, tied ones among them, and a frozen one."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.narrow = nn.Linear(4, 3, dtype=torch.bfloat16)
        self.head, self.tied = nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied.weight = self.head.weight
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean.normal_()  # type: ignore[union-attr]
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


STATISTICS: dict[str, Any] = {
    "observation_mean": np.array([0.1, 0.2]),
    "observation_variance": np.array([1.0, 3.0]),
    "observation_count": 7.5,
}


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A storage with three snapshots of different weights."""
    module = Mixed(0)
    with Recorder(module, str(tmp_path / "data"), trial=3, task="toy") as recorder:
        for seed in range(3):
            module.load_state_dict(Mixed(seed).state_dict())
            recorder.record(10 * seed, **STATISTICS)
    return tmp_path / "data"


@pytest.mark.parametrize("snapshot", [0, 1, -1])
def test_a_snapshot_comes_back_into_a_module_bit_for_bit(recorded: Path, snapshot: int) -> None:
    module = Mixed(9)
    read = load_module(module, str(recorded), trial=3, snapshot=snapshot)
    expected = Mixed(snapshot % 3).state_dict()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert module.tied.weight is module.head.weight
    assert (read.step, read.snapshot, read.learning_rate) == (10 * (snapshot % 3), snapshot % 3, None)
    assert read.observation_variance.tolist() == [1.0, 3.0]  # type: ignore[union-attr]


def test_a_snapshot_comes_out_as_a_safetensors_file_with_its_observation_statistics(recorded: Path) -> None:
    path = recorded.parent / "one.safetensors"
    save_safetensors(path, str(recorded), trial=3, snapshot=1)
    state = Mixed(1).state_dict()
    with safetensors.safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert (about["trial"], about["snapshot"], about["step"]) == ("3", "1", "10")
    assert json.loads(about["header"])["task"] == "toy"
    assert {*state} - {*tensors} == {"frozen", "tied.weight", "norm.num_batches_tracked"}
    for name in {*state} & {*tensors}:
        same = torch.view_as_real(state[name]) if state[name].is_complex() else state[name]
        assert tensors[name].dtype == same.dtype
        assert torch.equal(tensors[name], same)
    assert tensors["observation_statistics.mean"].tolist() == [0.1, 0.2]
    assert tensors["observation_statistics.count"].item() == 7.5
    with pytest.raises(ValueError, match=r"one\.safetensors: already exists; choose another name"):
        save_safetensors(path, str(recorded), trial=3)
    with pytest.raises(ValueError, match=r"no such folder, .*none; create it first"):
        save_safetensors(recorded / "none" / "x.safetensors", str(recorded), trial=3)
    assert sorted(one.name for one in recorded.parent.iterdir()) == ["data", "one.safetensors"]


def test_what_does_not_fit_a_trial_is_refused_and_left_as_it_was(recorded: Path) -> None:
    module = Mixed(9)
    before = {name: one.clone() for name, one in module.state_dict().items()}
    other: Any
    for other, words in (
        (
            nn.Linear(4, 3),
            r"phase, narrow\.weight, narrow\.bias and 7 more: trial 3 has them and the module does not; build it",
        ),
        (with_one(head=nn.Linear(3, 2)), r"head\.weight has shape \[2, 3\] in the module and \[3, 3\] in trial 3"),
        (
            with_one(frozen=nn.Parameter(torch.zeros(2))),
            r"trial 3 was recorded on other frozen weights than those of froz",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            load_module(other, str(recorded), trial=3)
    with pytest.raises(ValueError, match=r"snapshot=3 is none of the 3 snapshots of trial 3"):
        load_module(module, str(recorded), trial=3, snapshot=3)
    with pytest.raises(StoreError, match=r"there is no trial 4; there is trial 3"):
        load_module(module, str(recorded), trial=4)
    with pytest.raises(ValueError, match=r"toy: these trials are not of our own PPO, so nothing here builds their"):
        policy_module(str(recorded), trial=3)
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())


def with_one(**parts: Any) -> nn.Module:
    module = Mixed(9)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def test_a_policy_of_our_own_ppo_acts_as_a_module_as_it_does_in_training(tmp_path: Path) -> None:
    for activation in ("tanh", "relu"):
        experiment = smoke(tmp_path / activation)
        experiment = dataclasses.replace(experiment, ppo=dataclasses.replace(experiment.ppo, activation=activation))
        collector = GroupCollector(experiment, "torch", [1])
        collector.advance(seconds=0.01, to_commit=True)
        trajectory = TrajectoryStore(experiment.storage_path).trajectory(1)
        policy = policy_module(experiment.storage_path, trial=1)
        layout, state = TrajectoryStore(experiment.storage_path).header().layout, policy.state_dict()
        flat = torch.cat([state[name].reshape(-1) for name, _, _ in layout])
        assert flat.numpy().tobytes() == trajectory.weights_TP[-1].tobytes()

        observations = np.random.default_rng(0).normal(size=(64, trajectory.observation_means_TO.shape[1])) * 3
        scaled = (observations - trajectory.observation_means_TO[-1]) / np.sqrt(
            trajectory.observation_variances_TO[-1] + EPSILON
        )
        actions = np.zeros((64, 1), np.float32)
        learner = TorchLearner(network_shape(experiment.collect), experiment.ppo)
        weights = np.repeat(trajectory.weights_TP[-1:], 64, axis=0)
        learner.actor(weights, None, scaled.clip(-CLIP, CLIP).astype(np.float32), None, actions)()
        np.testing.assert_allclose(policy(torch.from_numpy(observations)).mean.detach(), actions, rtol=1e-5, atol=1e-7)
