"""A group of trials against one plain trial, against itself in other groups, and against itself resumed."""

import dataclasses
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from plain_ppo import PlainTrial
from torch import nn

from tipl_ray.config import Collect, Experiment, Ppo
from tipl_ray.ppo.networks import unflatten
from tipl_ray.ppo.trials import TrialGroup

ENGINES = ["torch"] + (["compiled"] if shutil.which("g++") else [])
SMALL = Experiment(
    name="small",
    ppo=Ppo(num_steps=128, num_minibatches=4),
    collect=Collect(total_env_steps=4 * 128, policy_hidden=(8, 8)),
)


def linear(network: nn.Sequential, index: int) -> nn.Linear:
    layer = network[2 * index]
    assert isinstance(layer, nn.Linear)
    return layer


def snapshots_of(group: TrialGroup) -> dict[tuple[int, int], np.ndarray]:
    found = {(s.seed, s.snapshot): s.weights for s in group.initial_snapshots()}
    while not group.finished:
        found |= {(s.seed, s.snapshot): s.weights for s in group.run_iteration()}
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("task", "width", "options"),
    [
        ("InvertedPendulum-v4", 8, {}),
        ("HalfCheetah-v4", 64, {}),
        ("HalfCheetah-v4", 64, {"bootstrap_truncated": True}),
        ("InvertedPendulum-v4", 8, {"target_kl": 1e-3, "clip_values": False, "activation": "relu"}),
    ],
)
def test_one_iteration_equals_a_plain_trial_fed_the_same_noise(
    engine: str, task: str, width: int, options: dict[str, Any]
) -> None:
    """Tolerance: float32 rounding, grown over 320 Adam steps, stays below 1e-3; parameters move by 1e-2.

    The cheetah's contacts are chaotic: a last bit is another rollout within 50 steps. There the plain trial
    takes the group's actions; the pendulum closes the loop on its own.
    """
    torch.set_num_threads(1)
    collect = Collect(task=task, policy_hidden=(width, width), epochs_per_snapshot=10)
    experiment = Experiment(name="one", collect=collect, ppo=Ppo(**options))
    group = TrialGroup(experiment, engine, [5, 6])
    plain_options = {**options, "activation": nn.ReLU if "activation" in options else nn.Tanh}
    plain = PlainTrial(task, (width, width), seed=6, num_iterations=experiment.num_iterations, **plain_options)
    named = unflatten(group.parameters_KN[1], group.shape.layout)
    with torch.no_grad():
        for name, network in (("actor", plain.actor), ("critic", plain.critic)):
            for index in range(3):
                linear(network, index).weight.copy_(torch.from_numpy(named[f"{name}.{index}.weight"].T))
                linear(network, index).bias.copy_(torch.from_numpy(named[f"{name}.{index}.bias"]))
    noise: list[np.ndarray] = []
    permutations: list[np.ndarray] = []
    original_noise, original_permutations = group._noise, group._permutations

    def kept_noise(generator: np.random.Generator) -> np.ndarray:
        noise.append(original_noise(generator))
        return noise[-1]

    def kept_permutations(epochs: int) -> np.ndarray:
        permutations.append(original_permutations(epochs))
        return permutations[-1]

    group._noise = kept_noise  # type: ignore[method-assign]
    group._permutations = kept_permutations  # type: ignore[method-assign]
    start = group.parameters_KN[1].copy()
    for _ in group.run_iteration():
        pass
    actions = group.rollouts.actions_KSA[1] if task.startswith("HalfCheetah") else None
    plain.run_iteration(noise[1], permutations[0][1], actions)
    named = unflatten(group.parameters_KN[1], group.shape.layout)
    assert group.adam_steps_K[1] == plain.epochs_run * 32
    assert (plain.epochs_run < 10) == ("target_kl" in options)
    np.testing.assert_allclose(group.rollouts.rewards_KS[1], plain.rewards.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(group.rollouts.advantages_KS[1], plain.advantages.numpy(), rtol=1e-3, atol=1e-3)
    moved = np.abs(group.parameters_KN[1] - start).max()
    assert moved > 0.01
    for name, network in (("actor", plain.actor), ("critic", plain.critic)):
        for index in range(3):
            weight = linear(network, index).weight.detach().numpy().T
            np.testing.assert_allclose(named[f"{name}.{index}.weight"], weight, atol=1e-3)
    np.testing.assert_allclose(named["log_std"], plain.log_std.detach().numpy()[0], atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 25])
def test_snapshots_do_not_depend_on_the_group(engine: str, group_size: int) -> None:
    alone = snapshots_of(TrialGroup(SMALL, engine, [4, 9]))
    crowd = snapshots_of(TrialGroup(SMALL, engine, [9, *range(20, 19 + group_size)]))
    assert len(alone) == 2 * SMALL.num_snapshots
    for (seed, snapshot), weights in crowd.items():
        if seed == 9:
            np.testing.assert_array_equal(weights, alone[seed, snapshot])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_trial_goes_on_bit_for_bit_in_another_group_at_another_iteration(engine: str) -> None:
    undisturbed = snapshots_of(TrialGroup(SMALL, engine, [1, 2]))
    first = TrialGroup(SMALL, engine, [1, 2])
    list(first.run_iteration())
    early = first.state(1)
    list(first.run_iteration())
    resumed = TrialGroup(SMALL, engine, [3, 2, 1], [None, first.state(2), early])
    for (seed, snapshot), weights in snapshots_of(resumed).items():
        if seed != 3:
            np.testing.assert_array_equal(weights, undisturbed[seed, snapshot])


def test_snapshots_count_iterations_epochs_and_env_steps() -> None:
    group = TrialGroup(SMALL, "torch", [1, 2])
    initial = list(group.initial_snapshots())
    assert [(s.snapshot, s.iteration, s.epoch, s.env_step) for s in initial] == [(0, 0, 0, 0)] * 2
    group_snapshots = [s for s in group.run_iteration() if s.seed == 2] + [
        s for s in group.run_iteration() if s.seed == 2
    ]
    assert [s.snapshot for s in group_snapshots] == list(range(1, 11))
    assert [s.epoch for s in group_snapshots] == [2, 4, 6, 8, 10] * 2
    assert [s.env_step for s in group_snapshots] == [128] * 5 + [256] * 5
    assert [s.learning_rate for s in group_snapshots[::5]] == [3e-4, 3e-4 * 0.75]
    assert group_snapshots[0].episodic_return is not None
    assert group_snapshots[1].episodic_return is None


OPTIONS: dict[str, dict[str, Any]] = {
    "constant": {"schedule": "constant"},
    "adapted": {"schedule": "constant", "desired_kl": 0.008},
    "stopped": {"target_kl": 1e-4},
    "recomputed": {"recompute_advantages": True},
    "bootstrapped": {"bootstrap_truncated": True, "activation": "relu"},
    "zoo's": {"activation": "relu", "initialisation": "uniform", "initial_log_std": -2.0, "clip_values": False},
    "replicas": {"replicas": 2},
    "dpo": {"drift": "dpo", "policy_rate_ratio": 2.0},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_under_every_option_a_resumed_trial_in_another_group_goes_on_bit_for_bit(
    engine: str, options: dict[str, Any]
) -> None:
    experiment = dataclasses.replace(SMALL, ppo=dataclasses.replace(SMALL.ppo, **options))
    undisturbed, plain = (snapshots_of(TrialGroup(one, engine, [1, 2])) for one in (experiment, SMALL))
    first = TrialGroup(experiment, engine, [1, 2])
    list(first.run_iteration())
    early = first.state(1)
    list(first.run_iteration())
    for (seed, snapshot), weights in snapshots_of(
        TrialGroup(experiment, engine, [3, 2, 1], [None, first.state(2), early])
    ).items():
        if seed != 3:
            np.testing.assert_array_equal(weights, undisturbed[seed, snapshot])
    last = experiment.num_snapshots - 1
    assert (undisturbed[1, last] != plain[1, last]).any()


@pytest.mark.parametrize("engine", ENGINES)
def test_snapshots_after_a_stop_repeat_the_last_and_adapted_rates_are_told(engine: str) -> None:
    stopped = dataclasses.replace(SMALL, ppo=dataclasses.replace(SMALL.ppo, target_kl=1e-12))
    ran = [one for one in TrialGroup(stopped, engine, [1, 2]).run_iteration() if one.seed == 1]
    # It stops after the first epoch, halfway to the first snapshot.
    assert all(np.array_equal(one.weights, ran[0].weights) for one in ran)
    options: dict[str, Any] = {"schedule": "constant", "desired_kl": 1e-9}
    adapted = TrialGroup(dataclasses.replace(SMALL, ppo=dataclasses.replace(SMALL.ppo, **options)), engine, [1, 2])
    rates = [next(one.learning_rate for one in list(adapted.run_iteration())) for _ in range(2)]
    assert rates == [3e-4, pytest.approx(max(3e-4 / 1.5**10, 1e-6))]


def test_a_fresh_policy_is_as_the_options_say() -> None:
    options: dict[str, Any] = {"initialisation": "uniform", "initial_log_std": -2.0}
    group = TrialGroup(dataclasses.replace(SMALL, ppo=dataclasses.replace(SMALL.ppo, **options)), "torch", [1, 2])
    named = unflatten(group.parameters_KN, group.shape.layout)
    assert (named["log_std"] == -2.0).all()
    for layer, inputs in (("actor.0", 4), ("actor.2", 8), ("critic.1", 64)):
        for part in ("weight", "bias"):
            largest = np.abs(named[f"{layer}.{part}"]).max() * inputs**0.5
            assert 0.5 < largest <= 1.0, f"{layer}.{part} is not torch's default"


@pytest.mark.parametrize("engine", ENGINES)
def test_replicas_are_averaged_once_an_iteration_and_each_shuffles_on_its_own(engine: str) -> None:
    """Against two groups of one replica, handed the permutations that the replicas drew."""
    replicated = dataclasses.replace(SMALL, ppo=dataclasses.replace(SMALL.ppo, replicas=2))
    group, drawn = TrialGroup(replicated, engine, [1, 2]), []
    original = group._permutations

    def kept(epochs: int) -> np.ndarray:
        drawn.append(original(epochs))
        return drawn[-1]

    group._permutations = kept  # type: ignore[method-assign]
    snapshots = [one.weights for one in group.run_iteration() if one.seed == 1]
    assert not np.array_equal(drawn[0], drawn[1])
    ends, seen = [], []
    for replica in range(2):
        alone, own = TrialGroup(SMALL, engine, [1, 2]), iter(drawn[replica::2])
        alone._permutations = lambda epochs, own=own: next(own)  # type: ignore[method-assign, misc]
        seen.append([one.weights for one in alone.run_iteration() if one.seed == 1])
        ends.append([alone.parameters_KN, alone.first_moments_KN, alone.second_moments_KN])
    assert not np.array_equal(ends[0][0], ends[1][0])
    for mean, first, second in zip(snapshots, *seen, strict=True):
        np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-6, atol=1e-8)
    for one, *pair in zip([group.parameters_KN, group.first_moments_KN, group.second_moments_KN], *ends, strict=True):
        np.testing.assert_allclose(one, (pair[0] + pair[1]) / 2, rtol=1e-6, atol=1e-12)
    assert group.adam_steps_K.tolist() == [40, 40]
    assert group.gradient_steps_K.tolist() == [80, 80]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_steps_are_those_that_adam_made(engine: str) -> None:
    group = TrialGroup(dataclasses.replace(SMALL, ppo=dataclasses.replace(SMALL.ppo, target_kl=1e-12)), engine, [1, 2])
    for iterations in (1, 2):
        list(group.run_iteration())
        # It stops after the first epoch of ten.
        assert group.gradient_steps_K.tolist() == [4 * iterations] * 2
