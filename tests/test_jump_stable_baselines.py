"""Jumps as a callback of stable-baselines3: where they lead, what they leave alone, and how far they go."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback

from tipl_ray.accelerate.return_rule import ReturnRule, RuleNumbers
from tipl_ray.accelerate.stable_baselines import JumpPolicy
from tipl_ray.predict.gram import Question
from tipl_ray.predict.saved import save_predictor

STEPS = 64


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def rule(folder: Path, kl_limit: float = 0.0, **numbers: float) -> str:
    question = Question(context=10, steps=(1,), snapshots_per_iteration=3)
    nothing = {"first_begin": 0.0, "first_end": 0.0}
    save_predictor(ReturnRule.of(question, RuleNumbers(**(nothing | numbers)), kl_limit), str(folder), {})
    return str(folder)


def train(callback: BaseCallback | None, task: str = "Pendulum-v1", iterations: int = 3, n_epochs: int = 4) -> Any:
    model = PPO(
        "MlpPolicy",
        gymnasium.make(task),
        n_steps=STEPS,
        batch_size=16,
        n_epochs=n_epochs,
        seed=1,
        device="cpu",
        policy_kwargs={"net_arch": [8]},
    )
    return model.learn(iterations * STEPS, callback=callback)


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in model.policy.named_parameters()}


@pytest.mark.parametrize("task", ["Pendulum-v1", "CartPole-v1"])
def test_a_jump_of_no_length_changes_no_bit(task: str, tmp_path: Path) -> None:
    jumping = JumpPolicy(rule(tmp_path))
    ours, theirs = weights(train(jumping, task)), weights(train(None, task))
    assert jumping.jumps is not None
    assert jumping.jumps.taken == 3
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_the_policy_goes_on_by_the_first_displacement_and_the_critic_stays(tmp_path: Path) -> None:
    """The displacement of the first two epochs, from trainings of 0, 2 and 4 epochs on the same rollout."""
    twice = rule(tmp_path, first_begin=2.0, first_end=2.0)
    jumped, plain = (weights(train(one, iterations=1)) for one in (JumpPolicy(twice), None))
    before = weights(train(None, iterations=0))
    # Two epochs of the same minibatches: the permutations are drawn one after the other.
    half = weights(train(None, iterations=1, n_epochs=2))
    acting = [name for name in plain if name == "log_std" or "policy_net" in name or "action_net" in name]
    assert len(acting) == 5
    for name, value in plain.items():
        expected = value + 2.0 * (half[name] - before[name]) if name in acting else value
        np.testing.assert_allclose(jumped[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_jump_is_shortened_to_the_divergence_that_is_allowed(tmp_path: Path) -> None:
    class Watched(JumpPolicy):
        def _after_epochs(self, epoch: int) -> None:
            super()._after_epochs(epoch)
            if epoch == 4:
                after.append(self._divergence())

    after: list[float] = []
    far = {"first_begin": 3.0, "first_end": 3.0}
    train(Watched(rule(tmp_path / "far", **far)), iterations=1)
    train(Watched(rule(tmp_path / "near", kl_limit=0.5 * after[0], **far)), iterations=1)
    assert 0 < after[1] <= 0.5 * after[0]


def test_a_model_without_whole_snapshots_of_update_epochs_is_refused(tmp_path: Path) -> None:
    folder = rule(tmp_path)
    with pytest.raises(ValueError, match="epochs_per_snapshot=2 does not divide n_epochs=3"):
        train(JumpPolicy(folder), n_epochs=3)
    model = A2C("MlpPolicy", gymnasium.make("Pendulum-v1"), device="cpu")
    with pytest.raises(ValueError, match="A2C has no update epochs"):
        model.learn(10, callback=JumpPolicy(folder))


def test_what_cannot_jump_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match=r"first-agian-v1: no such folder.*did you mean first-again-v1\?"):
        JumpPolicy("first-agian-v1")
    with pytest.raises(ValueError, match="epochs_per_snapshot=0 is not a whole number from 1 on"):
        JumpPolicy(epochs_per_snapshot=0)
