"""The learners against autograd, against each other, and against themselves under other compilers' choices."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tipl_ray.config import Collect, Experiment, Ppo
from tipl_ray.ppo import compiled_learner
from tipl_ray.ppo.compiled_learner import CompiledLearner, has_bfloat16
from tipl_ray.ppo.engines import choose_engine, make_learner
from tipl_ray.ppo.generators import action_noise
from tipl_ray.ppo.learner import Learner, Rollouts
from tipl_ray.ppo.networks import NetworkShape, unflatten
from tipl_ray.ppo.torch_learner import TorchLearner
from tipl_ray.ppo.trials import TrialGroup

PENDULUM = NetworkShape(observation_size=4, action_size=1, policy_hidden=(8, 8), critic_hidden=(64, 64))
ODD = NetworkShape(observation_size=5, action_size=3, policy_hidden=(40, 16), critic_hidden=(24, 72))
CHEETAH = NetworkShape(observation_size=17, action_size=6, policy_hidden=(256, 256), critic_hidden=(64, 64))
POLE = NetworkShape(observation_size=4, action_size=3, policy_hidden=(40, 16), critic_hidden=(24, 72), discrete=True)
STEPS = 256
PPO = Ppo(num_steps=STEPS, num_minibatches=4, entropy_coefficient=0.01)

VARIANTS = {
    "relu": {"activation": "relu"},
    "plain values": {"clip_values": False},
    "dpo": {"drift": "dpo"},
    "all": {"activation": "relu", "clip_values": False, "drift": "dpo", "policy_rate_ratio": 4.0},
}
"""Options of PPO's loss and networks."""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def some_rollouts(shape: NetworkShape, trials: int = 2) -> Rollouts:
    """Rollouts whose ratios and values lie on both sides of the clipping limits."""
    random = np.random.default_rng(0)
    rollouts = Rollouts.empty(trials, STEPS, shape)
    for array in (rollouts.observations_KSO, rollouts.actions_KSA, rollouts.rewards_KS):
        array[:] = random.standard_normal(array.shape)
    if shape.discrete:
        rollouts.actions_KSA[:] = np.eye(shape.action_size)[rollouts.actions_KSA.argmax(axis=2)]
    rollouts.ends_KS[:] = random.random(rollouts.ends_KS.shape) < 0.05
    return rollouts


def some_parameters(shape: NetworkShape, trials: int = 2) -> np.ndarray:
    random = np.random.default_rng(1)
    parameters = np.stack([shape.initial_parameters(random) for _ in range(trials)])
    return parameters + random.normal(0, 0.1, parameters.shape).astype(np.float32)


def prepared(shape: NetworkShape) -> tuple[np.ndarray, Rollouts]:
    parameters, rollouts = some_parameters(shape), some_rollouts(shape)
    TorchLearner(shape, PPO).advantages(parameters, rollouts)
    random = np.random.default_rng(2)
    rollouts.log_probabilities_KS[:] += random.normal(0, 0.3, rollouts.log_probabilities_KS.shape)
    rollouts.values_KS[:] += random.normal(0, 0.3, rollouts.values_KS.shape)
    return parameters, rollouts


def autograd_gradient(
    shape: NetworkShape, parameters: np.ndarray, rollouts: Rollouts, k: int, indices: np.ndarray, ppo: Ppo = PPO
) -> np.ndarray:
    minibatch = [torch.from_numpy(array[k, indices].astype(np.float64))[None] for array in rollouts.samples]
    return (
        TorchLearner(shape, ppo)
        .gradient(torch.from_numpy(parameters[k].astype(np.float64))[None], *minibatch)[0]
        .numpy()
    )


@needs_compiler
@pytest.mark.parametrize("shape", [PENDULUM, ODD, CHEETAH, POLE])
def test_closed_form_gradients_equal_autograd_in_float64(shape: NetworkShape) -> None:
    parameters, rollouts = prepared(shape)
    learner = CompiledLearner(shape, PPO, precision=np.float64)
    for k in range(2):
        indices = np.random.default_rng(k).permutation(STEPS)[: PPO.minibatch_size]
        expected = autograd_gradient(shape, parameters, rollouts, k, indices)
        gradient = learner.gradient(parameters[k].astype(np.float64), rollouts, k, indices)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-13)


@needs_compiler
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_gradients_under_every_option_equal_autograd_in_float64(options: dict[str, Any]) -> None:
    ppo = dataclasses.replace(PPO, **options)
    parameters, rollouts = prepared(ODD)
    indices = np.random.default_rng(0).permutation(STEPS)[: ppo.minibatch_size]
    expected = autograd_gradient(ODD, parameters, rollouts, 1, indices, ppo)
    learner = CompiledLearner(ODD, ppo, precision=np.float64)
    gradient = learner.gradient(parameters[1].astype(np.float64), rollouts, 1, indices)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-13)
    assert np.abs(expected - autograd_gradient(ODD, parameters, rollouts, 1, indices)).max() > 1e-3


@needs_compiler
@pytest.mark.parametrize("shape", [PENDULUM, ODD, CHEETAH, POLE])
def test_float32_gradients_are_as_near_to_float64_as_float32_allows(shape: NetworkShape) -> None:
    parameters, rollouts = prepared(shape)
    indices = np.random.default_rng(7).permutation(STEPS)[: PPO.minibatch_size]
    expected = autograd_gradient(shape, parameters, rollouts, 1, indices)
    gradient = CompiledLearner(shape, PPO).gradient(parameters[1], rollouts, 1, indices)
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


def outcome(learner: Learner, shape: NetworkShape) -> list[np.ndarray]:
    """Actions, advantages and one epoch's update of two trials."""
    parameters, rollouts = some_parameters(shape), some_rollouts(shape)
    actions = np.zeros((3, shape.action_size), dtype=np.float32)
    noise = np.random.default_rng(3).standard_normal(actions.shape).astype(np.float32)
    owners = np.array([1, 0, 1], dtype=np.int32)
    learner.actor(parameters, owners, np.ascontiguousarray(rollouts.observations_KSO[0, :3]), noise, actions)()
    learner.advantages(parameters, rollouts)
    first, second = np.zeros((2, *parameters.shape), dtype=np.float32)
    steps, rates = np.zeros(2, dtype=np.int64), np.array([3e-4, 1e-4])
    permutations = np.array([[np.random.default_rng(k).permutation(STEPS)] for k in range(2)], dtype=np.int32)
    learner.update(parameters, first, second, steps, rates, np.ones(2, dtype=np.int64), rollouts, permutations)
    return [actions, rollouts.log_probabilities_KS, rollouts.advantages_KS, parameters, first, steps]


@needs_compiler
@pytest.mark.parametrize("shape", [PENDULUM, ODD, CHEETAH, POLE])
def test_compiled_and_torch_learners_agree(shape: NetworkShape) -> None:
    results = (outcome(learner, shape) for learner in (CompiledLearner(shape, PPO), TorchLearner(shape, PPO)))
    for compiled, eager in zip(*results, strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=2e-4, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_compiled_and_torch_learners_agree_under_every_option(options: dict[str, Any]) -> None:
    ppo = dataclasses.replace(PPO, **options)
    results = (outcome(learner, ODD) for learner in (CompiledLearner(ODD, ppo), TorchLearner(ODD, ppo)))
    for compiled, eager in zip(*results, strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=2e-4, atol=2e-5)


def test_a_discrete_action_is_the_likeliest_or_by_gumbels_noise_one_of_the_softmaxs() -> None:
    parameters, count = some_parameters(POLE, 1), 20_000
    for learner in learners(PPO, POLE):
        observations = np.repeat(np.array([[1.0, -2.0, 0.5, 3.0]], dtype=np.float32), count, axis=0)
        owners, actions = np.zeros(count, dtype=np.int32), np.zeros((count, 3), dtype=np.float32)
        logits = TorchLearner(POLE, PPO)._mean(torch.from_numpy(parameters), torch.from_numpy(observations[None, :1]))
        learner.actor(parameters, owners, observations, None, actions)()
        np.testing.assert_array_equal(actions, np.eye(3)[[int(logits.argmax())] * count])
        noise = action_noise(np.random.default_rng(0), actions.shape, discrete=True)
        learner.actor(parameters, owners, observations, noise, actions)()
        assert (actions.sum(axis=1) == 1).all()
        np.testing.assert_allclose(actions.mean(axis=0), logits.softmax(2).flatten(), atol=0.015)


def plain_loss(shape: NetworkShape, parameters: torch.Tensor, rollouts: Rollouts, indices: np.ndarray) -> torch.Tensor:
    """CleanRL's loss of a categorical policy, with torch's own modules and distribution."""
    layers = iter(
        torch.split(parameters, [array.size for array in unflatten(parameters.detach().numpy(), shape.layout).values()])
    )

    def network(widths: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            weight, bias = next(layers).reshape(inputs, outputs), next(layers)
            x = torch.nn.functional.linear(x, weight.T, bias)
            x = x if number == len(widths) - 2 else torch.tanh(x)
        return x

    names = ("observations", "actions", "log_probabilities", "values", "advantages", "returns")
    batch = {
        name: torch.from_numpy(array[0, indices].astype(np.float64))
        for name, array in zip(names, rollouts.samples, strict=True)
    }
    policy = torch.distributions.Categorical(
        logits=network((shape.observation_size, *shape.policy_hidden, shape.action_size), batch["observations"])
    )
    values = network((shape.observation_size, *shape.critic_hidden, 1), batch["observations"])[:, 0]
    ratio = (policy.log_prob(batch["actions"].argmax(1)) - batch["log_probabilities"]).exp()
    advantages = (batch["advantages"] - batch["advantages"].mean()) / (batch["advantages"].std() + 1e-8)
    surrogate = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    clipped = batch["values"] + (values - batch["values"]).clamp(-0.2, 0.2)
    value_loss = 0.5 * torch.max((values - batch["returns"]) ** 2, (clipped - batch["returns"]) ** 2).mean()
    return surrogate - PPO.entropy_coefficient * policy.entropy().mean() + PPO.value_coefficient * value_loss


def hold_to_plain_torch(shape: NetworkShape, parameters: np.ndarray, rollouts: Rollouts) -> None:
    """Loss and gradient of the first trial on one minibatch, by every learner."""
    indices = np.random.default_rng(0).permutation(STEPS)[: PPO.minibatch_size]
    whole = torch.from_numpy(parameters[0].astype(np.float64)).requires_grad_()
    loss = plain_loss(shape, whole, rollouts, indices)
    (expected,) = torch.autograd.grad(loss, whole)
    assert expected.abs().max() > 1e-3
    minibatch = [torch.from_numpy(array[0, indices].astype(np.float64))[None] for array in rollouts.samples]
    np.testing.assert_allclose(TorchLearner(shape, PPO).losses(whole[None], *minibatch).item(), loss.item(), rtol=1e-9)
    found = autograd_gradient(shape, parameters, rollouts, 0, indices)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    if shutil.which("g++"):
        compiled = CompiledLearner(shape, PPO, precision=np.float64)
        found = compiled.gradient(parameters[0].astype(np.float64), rollouts, 0, indices)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)


def test_the_loss_and_gradient_of_discrete_actions_are_plain_torchs() -> None:
    hold_to_plain_torch(POLE, *prepared(POLE))


@pytest.mark.parametrize("task", ["CartPole-v1", "Acrobot-v1"])
def test_the_first_updates_loss_and_gradient_on_a_task_are_plain_torchs(task: str) -> None:
    experiment = Experiment(name="choices", ppo=PPO, collect=Collect(task=task, total_env_steps=STEPS, num_trials=2))
    group = TrialGroup(experiment, choose_engine("auto", PPO), [1, 2])
    group._collect_rollouts()
    group.learner.advantages(group.parameters_KN, group.rollouts)
    assert set(group.rollouts.actions_KSA.sum(axis=2).flatten()) == {1.0}
    assert len(np.unique(group.rollouts.actions_KSA.argmax(axis=2))) == group.shape.action_size
    hold_to_plain_torch(group.shape, group.parameters_KN, group.rollouts)


def learners(ppo: Ppo, shape: NetworkShape = ODD) -> list[Learner]:
    return [TorchLearner(shape, ppo), *([CompiledLearner(shape, ppo)] if shutil.which("g++") else [])]


def updated(learner: Learner, epochs: int, rates: np.ndarray, going_on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and Adam's step counts of two trials after some epochs."""
    parameters, rollouts = some_parameters(ODD), some_rollouts(ODD)
    learner.advantages(parameters, rollouts)
    first, second = np.zeros((2, *parameters.shape), dtype=np.float32)
    steps, random = np.zeros(2, dtype=np.int64), np.random.default_rng(0)
    permutations = np.array([[random.permutation(STEPS) for _ in range(epochs)] for _ in range(2)], dtype=np.int32)
    learner.update(parameters, first, second, steps, rates, going_on, rollouts, permutations)
    return parameters, steps


def test_a_rate_ratio_is_a_parameter_group_of_torchs_adam() -> None:
    """One epoch, minibatch by minibatch: gradients by autograd, clipped by torch, stepped by torch's Adam."""
    ppo = dataclasses.replace(PPO, policy_rate_ratio=4.0, num_minibatches=2)
    parameters, rollouts = some_parameters(ODD), some_rollouts(ODD)
    TorchLearner(ODD, ppo).advantages(parameters, rollouts)
    random = np.random.default_rng(0)
    permutation = random.permutation(STEPS)
    policy, critic = (
        torch.from_numpy(part.copy()).requires_grad_() for part in np.split(parameters[0], [ODD.num_policy_weights])
    )
    groups = [{"params": [policy], "lr": 4 * 1e-3}, {"params": [critic], "lr": 1e-3}]
    optimizer = torch.optim.Adam(groups, eps=ppo.adam_epsilon)
    for indices in np.split(permutation, 2):
        whole = torch.cat([policy, critic]).detach().numpy()[None].repeat(2, axis=0)
        gradient = torch.from_numpy(autograd_gradient(ODD, whole, rollouts, 0, indices, ppo)).float()
        policy.grad, critic.grad = gradient.split([len(policy), len(critic)])
        torch.nn.utils.clip_grad_norm_([policy, critic], ppo.max_gradient_norm)
        optimizer.step()
    expected = torch.cat([policy, critic]).detach().numpy()
    for learner in learners(ppo):
        found, _ = updated(learner, 1, np.array([1e-3, 1e-3]), np.ones(2, dtype=np.int64))
        np.testing.assert_allclose(found[0], expected, atol=1e-6)


@pytest.mark.parametrize("target_kl", [1e-5, 1e9])
def test_epochs_end_after_the_one_whose_divergence_is_above_the_target(target_kl: float) -> None:
    ppo, far = dataclasses.replace(PPO, target_kl=target_kl), target_kl > 1
    for learner in learners(ppo):
        going_on = np.array([1, 0])
        found, steps = updated(learner, 3, np.array([1e-3, 1e-3]), going_on)
        assert steps.tolist() == [3 * 4 if far else 4, 0]
        assert going_on.tolist() == [1 if far else 0, 0]
        np.testing.assert_array_equal(found[1], some_parameters(ODD)[1])
        for free in learners(PPO):
            if type(free) is type(learner):
                run, _ = updated(free, 3 if far else 1, np.array([1e-3, 1e-3]), np.ones(2, dtype=np.int64))
                np.testing.assert_array_equal(found[0], run[0])


@pytest.mark.parametrize(("desired_kl", "rates"), [(1e-9, [1e-3 / 1.5**2] * 2), (1e3, [1e-3 * 1.5**2] * 2)])
def test_learning_rates_follow_the_divergence_as_rl_games_has_them(desired_kl: float, rates: list[float]) -> None:
    ppo = dataclasses.replace(PPO, desired_kl=desired_kl, schedule="constant")
    for learner in learners(ppo):
        found = np.array([1e-3, 1e-3])
        updated(learner, 2, found, np.ones(2, dtype=np.int64))
        np.testing.assert_allclose(found, rates, rtol=1e-12)


class StagedLearner(TorchLearner):
    """On the CPU, but with tensors that stay in their place, as a GPU's CUDA graphs want them."""

    def _place(self, name: str, host: torch.Tensor) -> torch.Tensor:
        return self._places.setdefault((name, host.shape), torch.full_like(host, 0))


def test_tensors_that_stay_in_their_place_change_no_bit() -> None:
    staged = StagedLearner(CHEETAH, PPO)
    outcome(staged, CHEETAH)  # the second time, what the first one left there is overwritten
    for ours, expected in zip(outcome(staged, CHEETAH), outcome(TorchLearner(CHEETAH, PPO), CHEETAH), strict=True):
        np.testing.assert_array_equal(ours, expected)


@needs_compiler
def test_compiled_bits_do_not_depend_on_the_vector_width() -> None:
    parameters, rollouts = prepared(CHEETAH)
    indices = np.arange(PPO.minibatch_size)
    native = CompiledLearner(CHEETAH, PPO).gradient(parameters[0], rollouts, 0, indices)
    narrow = CompiledLearner(CHEETAH, PPO, march="x86-64-v3").gradient(parameters[0], rollouts, 0, indices)
    np.testing.assert_array_equal(native, narrow)


@needs_compiler
def test_what_was_compiled_once_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        CompiledLearner(PENDULUM, PPO)
    assert len(list(tmp_path.glob("tipl_ray/*.so"))) == 1


@needs_compiler
def test_the_first_ratio_after_a_rollout_is_exactly_one() -> None:
    """Were one ratio off by a bit, a clipping range of no width would take its sample out of the gradient."""
    parameters, rollouts = some_parameters(PENDULUM), some_rollouts(PENDULUM)
    CompiledLearner(PENDULUM, PPO).advantages(parameters, rollouts)
    indices = np.random.default_rng(4).permutation(STEPS)[: PPO.minibatch_size]
    wide, narrow = (CompiledLearner(PENDULUM, dataclasses.replace(PPO, clip_coefficient=clip)) for clip in (0.2, 1e-12))
    expected = wide.gradient(parameters[0], rollouts, 0, indices)
    np.testing.assert_array_equal(narrow.gradient(parameters[0], rollouts, 0, indices), expected)
    rollouts.log_probabilities_KS[:] += np.float32(1e-6)
    assert (narrow.gradient(parameters[0], rollouts, 0, indices) != expected).any()


def test_an_engine_that_cannot_be_had_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="minibatch size 8 is not a multiple of 16"):
        choose_engine("compiled", Ppo(num_steps=64, num_minibatches=8))
    monkeypatch.setenv("PATH", "")
    assert choose_engine("torch", Ppo()) == "torch"
    with pytest.raises(ValueError, match="g\\+\\+ is not on the PATH"):
        choose_engine("compiled", Ppo())
    assert choose_engine("auto", Ppo()) == "torch"


def test_a_gpu_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU where the trials run, but torch finds none"):
        make_learner(choose_engine("cuda", Ppo()), PENDULUM, Ppo())


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("#!/bin/sh\necho 'cc1plus: error: no such instruction' >&2\nexit 1\n", "no such instruction"),
        ("#!/bin/sh\nexit 4\n", "status 4"),
        ("no program at all\x00", "g\\+\\+ cannot be run"),
    ],
)
def test_a_compiler_that_fails_is_named_and_auto_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, complaint: str
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "g++").write_text(script)
    (tmp_path / "bin" / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert choose_engine("auto", Ppo()) == "torch"
    with pytest.raises(
        ValueError, match=rf"collect\.engine='compiled' is not available: .*{complaint}.*use 'torch'"
    ) as told:
        choose_engine("compiled", Ppo())
    assert "\n" not in str(told.value)


def in_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded by torch, as float64."""
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).double().numpy()


needs_bfloat16 = pytest.mark.skipif(
    shutil.which("g++") is None or not has_bfloat16(), reason="no g++, or no AVX512_BF16"
)
NARROW = dataclasses.replace(PPO, precision="bfloat16")


@needs_bfloat16
@pytest.mark.parametrize("shape", [PENDULUM, ODD, CHEETAH, POLE])
def test_in_bfloat16_the_factors_of_products_are_rounded_and_nothing_else(shape: NetworkShape) -> None:
    """The critic's values, against numpy in float64 with factors that torch has rounded."""
    parameters, rollouts = some_parameters(shape), some_rollouts(shape)
    CompiledLearner(shape, NARROW).advantages(parameters, rollouts)
    found_S, hidden_SE = rollouts.values_KS[0].copy(), rollouts.observations_KSO[0, :-1].astype(np.float64)
    layers = [
        (parameters[0, offset : offset + int(np.prod(sizes))].reshape(sizes))
        for name, sizes, offset in shape.layout
        if name.startswith("critic")
    ]
    for weights_IO, biases_O in zip(layers[::2], layers[1::2], strict=True):
        hidden_SE = in_bfloat16(hidden_SE) @ in_bfloat16(weights_IO) + biases_O
        hidden_SE = np.tanh(hidden_SE) if len(biases_O) > 1 else hidden_SE
    expected_S = hidden_SE[:, 0]
    # A float32 sum may round an activation to the other side: a bfloat16 step of one factor of many.
    np.testing.assert_allclose(found_S, expected_S, atol=2e-3 * np.abs(expected_S).max())
    CompiledLearner(shape, PPO).advantages(parameters, rollouts)
    near, far = (np.abs(found_S - other).max() for other in (expected_S, rollouts.values_KS[0]))
    assert near < 0.2 * far


@needs_bfloat16
@pytest.mark.parametrize("shape", [PENDULUM, ODD, CHEETAH, POLE])
def test_gradients_in_bfloat16_are_as_near_as_bfloat16_allows(shape: NetworkShape) -> None:
    parameters, rollouts = prepared(shape)
    indices = np.random.default_rng(7).permutation(STEPS)[: PPO.minibatch_size]
    expected = autograd_gradient(shape, parameters, rollouts, 1, indices)
    gradient = CompiledLearner(shape, NARROW).gradient(parameters[1], rollouts, 1, indices)
    assert 1e-4 < np.linalg.norm(gradient - expected) / np.linalg.norm(expected) < 0.03


@needs_bfloat16
@pytest.mark.parametrize("size", [16, 48, 64])
def test_minibatches_of_any_size_have_their_gradients_in_bfloat16(size: int) -> None:
    ppo = dataclasses.replace(NARROW, num_steps=4 * size)
    parameters, rollouts = prepared(ODD)
    indices = np.random.default_rng(7).permutation(STEPS)[:size]
    expected = autograd_gradient(ODD, parameters, rollouts, 1, indices)
    gradient = CompiledLearner(ODD, ppo).gradient(parameters[1], rollouts, 1, indices)
    assert np.linalg.norm(gradient - expected) / np.linalg.norm(expected) < 0.03


@needs_compiler
def test_bfloat16_is_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"needs the compiled engine, but collect\.engine='torch'"):
        choose_engine("torch", NARROW)
    monkeypatch.setattr(compiled_learner, "has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="this processor has no AVX512_BF16"):
        choose_engine("auto", NARROW)
    assert choose_engine("auto", PPO) == "compiled"
