"""The flat vectors of actor and critic."""

import numpy as np

from tipl_ray.ppo.networks import NetworkShape, unflatten

PENDULUM = NetworkShape(observation_size=4, action_size=1, policy_hidden=(8, 8), critic_hidden=(64, 64))
CHEETAH = NetworkShape(observation_size=17, action_size=6, policy_hidden=(256, 256), critic_hidden=(64, 64))


def test_policies_have_the_papers_numbers_of_weights() -> None:
    assert PENDULUM.num_policy_weights == 122
    assert CHEETAH.num_policy_weights == 71_948


def test_layouts_cover_the_vector_without_gap_or_overlap() -> None:
    for shape in (PENDULUM, CHEETAH):
        covered = np.zeros(shape.num_parameters, dtype=int)
        for view in unflatten(covered, shape.layout).values():
            view += 1
        assert (covered == 1).all()
        assert shape.policy_layout == shape.layout[: len(shape.policy_layout)]


def test_initial_weights_are_orthogonal_with_cleanrls_gains() -> None:
    named = unflatten(CHEETAH.initial_parameters(np.random.default_rng(0)), CHEETAH.layout)
    gains = {"actor.0": 2**0.5, "actor.1": 2**0.5, "actor.2": 0.01, "critic.1": 2**0.5, "critic.2": 1.0}
    for name, gain in gains.items():
        singular_values = np.linalg.svd(named[f"{name}.weight"], compute_uv=False)
        np.testing.assert_allclose(singular_values, gain, rtol=1e-5)
    assert not any(array.any() for name, array in named.items() if "bias" in name or name == "log_std")
