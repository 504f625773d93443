"""Recorded policies that act: flat weights of our own trials, or of stable-baselines3's, as a function of observations.

What is run is the mean or the likeliest action, with the observation statistics of the snapshot. Knows weights and
action spaces; knows nothing of episodes or videos.

Shapes: P weights, O observation values, A action values.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from numpy.typing import NDArray

from tipl_ray.data.snapshots import Header, PartialSnapshot
from tipl_ray.ppo.environments import CLIP, EPSILON

Array = NDArray[np.floating]
Act = Callable[[Any], Any]
"""From an observation, as an environment gives it, to an action that it takes."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0.0)}
ALGORITHMS = {"PPO": "tanh", "A2C": "tanh", "SAC": "relu", "TD3": "relu", "DDPG": "relu", "DQN": "relu"}
"""stable-baselines3's algorithms whose policies can be run, and the activation of their networks by default."""
SQUASHED = ("SAC", "TD3", "DDPG")
"""Those whose actions are a tanh, scaled to the action space."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Layers with an activation between them, over normalised observations."""

    layers: list[tuple[Array, Array]]
    """(weights (inputs, outputs), biases (outputs,))"""
    activation: str
    squashed: bool = False
    mean_O: Array | None = None
    scale_O: Array | None = None
    clip: float = CLIP

    def __call__(self, observation_O: Array) -> Array:
        """The outputs: means of actions, logits, or values."""
        x: Array = np.asarray(observation_O, np.float64).ravel()
        if self.mean_O is not None and self.scale_O is not None:
            x = np.clip((x - self.mean_O) / self.scale_O, -self.clip, self.clip)
        x = x.astype(np.float32)
        for index, (weights, biases) in enumerate(self.layers):
            x = x @ weights + biases
            if index < len(self.layers) - 1:
                x = ACTIVATIONS[self.activation](x)
        return np.tanh(x) if self.squashed else x


def acting(header: Header, snapshot: PartialSnapshot, actions: Space, observations: Space) -> Act:
    """What a snapshot does in an environment of these spaces.

    Raises ValueError for a trial whose policy is not known, and for spaces that it does not fit.
    """
    network = policy_network(header, snapshot)
    inputs, outputs = network.layers[0][0].shape[0], network.layers[-1][1].size
    if not isinstance(observations, Box) or math.prod(observations.shape) != inputs:
        raise ValueError(
            f"{header.task}: its observation space is {observations}, but the policy reads {inputs} values"
        )
    wanted = actions.n if isinstance(actions, Discrete) else math.prod(actions.shape or ())
    if not isinstance(actions, Box | Discrete) or wanted != outputs:
        raise ValueError(f"{header.task}: its action space is {actions}, but the policy has {outputs} outputs")

    def act(observation: Any) -> Any:
        output_A = network(observation)
        if isinstance(actions, Discrete):
            return int(actions.start + output_A.argmax())
        low, high = actions.low.ravel(), actions.high.ravel()
        action_A = low + (output_A + 1) / 2 * (high - low) if network.squashed else np.clip(output_A, low, high)
        return action_A.astype(actions.dtype).reshape(actions.shape)

    return act


def policy_network(header: Header, snapshot: PartialSnapshot) -> Network:
    """The network of a snapshot. Raises ValueError for a trial whose policy is not known."""
    arrays = {
        name: snapshot.weights[offset : offset + math.prod(shape)].reshape(shape)
        for name, shape, offset in header.layout
        if not name.startswith("log_std")
    }
    settings = header.config.get("settings", {})
    statistics: dict[str, Any] = {}
    if snapshot.observation_mean is not None and snapshot.observation_variance is not None:
        scale_O = np.sqrt(snapshot.observation_variance + settings.get("epsilon", EPSILON))
        clip = settings.get("clip_observations", CLIP)
        statistics = {"mean_O": snapshot.observation_mean, "scale_O": scale_O, "clip": clip}
    if "ppo" in header.config and "actor.0.weight" in arrays:
        activation = header.config["ppo"].get("activation", "tanh")
        return Network(layers=_layers(arrays, transposed=False), activation=activation, **statistics)
    algorithm = settings.get("algorithm")
    if algorithm not in ALGORITHMS or any(array.ndim > 2 for array in arrays.values()):
        raise ValueError(
            f"{header.task}: a module of your own was recorded, or a stable-baselines3 policy with more than dense "
            "layers, so how it acts is not known here; load it with tipl_ray.load_module and run it yourself"
        )
    activation = settings.get("activation", ALGORITHMS[algorithm])
    if activation not in ACTIVATIONS:
        raise ValueError(f"{header.task}: activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return Network(
        layers=_layers(arrays, transposed=True),
        activation=activation,
        squashed=algorithm in SQUASHED,
        **statistics,
    )


def _layers(arrays: dict[str, Array], transposed: bool) -> list[tuple[Array, Array]]:
    """Weights and biases by layer, in the layout's order."""
    names = [name.removesuffix(".weight") for name in arrays if name.endswith(".weight")]
    weights = [arrays[f"{name}.weight"] for name in names]
    return [(one.T if transposed else one, arrays[f"{name}.bias"]) for name, one in zip(names, weights, strict=True)]
