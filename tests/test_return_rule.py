"""The rule for jumps that is tuned for return: what its formula says, and how far a jump may go."""

import dataclasses
import math
import shutil

import numpy as np
import pytest

from tipl_ray.accelerate.group_jumps import GroupJumps, Jumps
from tipl_ray.accelerate.jumps import JumpSettings, allowed_share
from tipl_ray.accelerate.return_rule import ReturnRule, RuleNumbers
from tipl_ray.config import Collect, Experiment, Ppo
from tipl_ray.ppo.trials import TrialGroup
from tipl_ray.predict.baselines import FirstAgain
from tipl_ray.predict.gram import Contexts, Question

ENGINE = "compiled" if shutil.which("g++") else "torch"
QUESTION = Question(context=10, steps=(1,), snapshots_per_iteration=3)
SHORT = Experiment(
    name="short",
    ppo=Ppo(num_steps=128, num_minibatches=4, num_epochs=4, learning_rate=3e-3),
    collect=Collect(total_env_steps=8 * 128, policy_hidden=(8, 8)),
)


def contexts(phases: list[int], progress: list[float], context: int = 10) -> Contexts:
    count = len(phases)
    return Contexts(
        grams_BKK=np.zeros((count, context, context)),
        phases_B=np.array(phases),
        progress_B=np.array(progress),
        learning_rates_B=np.ones(count),
    )


def test_the_rule_counts_the_displacements_that_its_formula_names() -> None:
    """By hand: an iteration has two real displacements and a jump; the context holds it and 2 2/3 before it."""
    numbers = RuleNumbers(2.0, 0.0, 0.5, 1.5, 0.4, 0.2, 0.5)
    (beginning,), (middle,) = ReturnRule.of(QUESTION, numbers).coefficients(contexts([2, 2], [0.0, 0.5]))
    np.testing.assert_allclose(beginning, [0.1, 0.1, 0.2, 0.2, 0.2, 0.4, 0.4, 0.4, 2.0, 0.5])
    np.testing.assert_allclose(middle, [0.075, 0.075, 0.15, 0.15, 0.15, 0.3, 0.3, 0.3, 1.0, 1.0])


def test_where_an_iteration_has_one_displacement_it_is_the_first_and_the_last() -> None:
    numbers = RuleNumbers(first_begin=2.0, last_begin=0.5)
    question = dataclasses.replace(QUESTION, snapshots_per_iteration=2)
    ((coefficients_K,),) = ReturnRule.of(question, numbers).coefficients(contexts([1], [0.0]))
    assert coefficients_K.tolist() == [0.0] * 9 + [2.5]


@pytest.mark.parametrize(("phase", "steps"), [(2, (1,)), (2, (1, 2, 3)), (1, (1, 2)), (0, (1,))])
def test_with_its_first_numbers_it_is_first_again(phase: int, steps: tuple[int, ...]) -> None:
    question = Question(context=10, steps=steps, snapshots_per_iteration=5)
    asked = contexts([phase], [0.3])
    np.testing.assert_allclose(ReturnRule(question).coefficients(asked), FirstAgain(question).coefficients(asked))


def test_the_closed_form_says_the_numbers() -> None:
    assert RuleNumbers(1.0, 0.0, 0.0, 0.0, 0.5, 0.25, 0.9).closed_form() == (
        "(1 - 1 p) first + (0.5 - 0.25 p) past moves, decaying by 0.9"
    )
    assert RuleNumbers(0.0, 0.0).closed_form() == "0"


@pytest.mark.parametrize("limit", [0.01, 1e-12])
def test_a_jump_is_shortened_to_the_divergence_that_is_allowed(limit: float) -> None:
    """The history goes on with what was made of the jump, and not with what was proposed."""
    rule = ReturnRule.of(QUESTION, RuleNumbers(first_begin=8.0, first_end=8.0))
    far, near = (
        TrialGroup(
            SHORT,
            ENGINE,
            [1, 2],
            extension=Jumps(settings=JumpSettings(horizon=1, limit=100, kl_limit=kl), predictor=rule, digest=""),
        )
        for kl in (0.0, limit)
    )
    seen = [one.weights for one in near.initial_snapshots() if one.seed == 1]
    for _ in range(3):
        before = [one.weights for one in near.run_iteration() if one.seed == 1]
        seen += before
        list(far.run_iteration())
        assert far.divergences(far.parameters_KN).min() > limit
        allowed_K = near.divergences(near.parameters_KN)
        if limit > 1e-6:
            assert allowed_K.max() <= 1.001 * limit or np.array_equal(before[-1], before[-2])
    if limit < 1e-6:
        # The epochs themselves lead further than that: nothing is left for a jump.
        np.testing.assert_array_equal(before[-1], before[-2])
    hooks = near.hooks
    assert isinstance(hooks, GroupJumps)
    history = hooks._histories[0][0]
    moved_KP = np.diff(np.stack(seen), axis=0).astype(np.float64)
    np.testing.assert_allclose(history.gram()[-9:, -9:], moved_KP @ moved_KP.T, rtol=1e-3, atol=1e-9)


def test_divergences_and_surrogates_of_the_policy_that_collected_are_nothing() -> None:
    group = TrialGroup(
        dataclasses.replace(SHORT, ppo=dataclasses.replace(SHORT.ppo, learning_rate=1e-30)), ENGINE, [1, 2]
    )
    list(group.run_iteration())
    np.testing.assert_allclose(group.divergences(group.parameters_KN), 0.0, atol=1e-9)
    np.testing.assert_allclose(group.surrogates(group.parameters_KN), 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("here", "there", "share"),
    [
        (0.0, 0.1, 1.0),  # within the limit of 0.2
        (0.0, 0.4, 0.5),
        (0.1, 0.3, 0.5),
        (0.3, 0.5, 0.0),  # beyond it before the jump, and further after
        (0.3, 0.3, 1.0),  # a jump that moves nothing
        (0.3, 0.25, 1.0),  # a jump back
        (0.1, math.inf, 0.0),
        (math.inf, math.inf, 0.0),
        (0.1, math.nan, 0.0),
    ],
)
def test_a_jump_is_shortened_for_what_it_adds_to_the_divergence(here: float, there: float, share: float) -> None:
    assert allowed_share(here, there, limit=0.2) == pytest.approx(share, abs=1e-12)
