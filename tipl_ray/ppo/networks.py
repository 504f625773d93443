"""The policy and the critic as flat vectors: layout, orthogonal initialisation, named weights.

P policy weights: the actor's mean network, then log-std; of discrete actions, the network of the logits alone. N
parameters: the policy's P, then the critic's. A trial's parameters are one float32 vector, so that a snapshot is its
first P values and stacked trials are an (K, N) array.
Weights are stored (inputs, outputs), the transpose of `torch.nn.Linear.weight`.
"""

import dataclasses
import itertools
import math
from functools import cached_property

import numpy as np

from tipl_ray.data.snapshots import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """Widths of a trial's actor and critic."""

    observation_size: int
    action_size: int
    policy_hidden: tuple[int, int]
    critic_hidden: tuple[int, int]
    discrete: bool = False
    """Whether the actor's outputs are logits of action_size choices, and not means."""

    @cached_property
    def layout(self) -> Layout:
        """Layout of all N parameters: actor, log-std, critic."""
        arrays: list[tuple[str, tuple[int, ...]]] = []
        arrays += _layers("actor", (self.observation_size, *self.policy_hidden, self.action_size))
        if not self.discrete:
            arrays.append(("log_std", (self.action_size,)))
        arrays += _layers("critic", (self.observation_size, *self.critic_hidden, 1))
        offset, layout = 0, []
        for name, shape in arrays:
            layout.append((name, shape, offset))
            offset += math.prod(shape)
        return tuple(layout)

    @cached_property
    def policy_layout(self) -> Layout:
        """Layout of a snapshot's P weights."""
        return tuple(entry for entry in self.layout if not entry[0].startswith("critic"))

    @cached_property
    def num_policy_weights(self) -> int:
        """P."""
        return sum(math.prod(shape) for _, shape, _ in self.policy_layout)

    @cached_property
    def num_parameters(self) -> int:
        """N."""
        return sum(math.prod(shape) for _, shape, _ in self.layout)

    def initial_parameters(
        self, generator: np.random.Generator, initialisation: str = "orthogonal", log_std: float = 0.0
    ) -> np.ndarray:
        """A fresh actor, log-std and critic, (N,) float32.

        `orthogonal` is CleanRL's: of gain sqrt 2 (actor head 0.01, critic head 1), biases 0; `uniform` is torch's
        default for linear layers, weights and biases within 1 / sqrt(inputs).
        """
        parameters = np.zeros(self.num_parameters, dtype=np.float32)
        named = unflatten(parameters, self.layout)
        if not self.discrete:
            named["log_std"][:] = log_std
        heads = {"actor.2.weight": 0.01, "critic.2.weight": 1.0}
        for name, weight in named.items():
            if not name.endswith("weight"):
                continue
            if initialisation == "orthogonal":
                weight[:] = _orthogonal(generator, weight.shape) * heads.get(name, math.sqrt(2))
            else:
                bound = 1 / math.sqrt(len(weight))
                weight[:] = generator.uniform(-bound, bound, weight.shape)
                bias = named[name.replace("weight", "bias")]
                bias[:] = generator.uniform(-bound, bound, bias.shape)
        return parameters


def unflatten(flat: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """Views (..., *shape) into flat vectors (..., N), by name.

    >>> unflatten(np.arange(6), (("a", (2, 2), 0), ("b", (2,), 4)))["b"]
    array([4, 5])
    """
    return {
        name: flat[..., offset : offset + math.prod(shape)].reshape(*flat.shape[:-1], *shape)
        for name, shape, offset in layout
    }


def _layers(name: str, widths: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    arrays: list[tuple[str, tuple[int, ...]]] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        arrays += [(f"{name}.{index}.weight", (inputs, outputs)), (f"{name}.{index}.bias", (outputs,))]
    return arrays


def _orthogonal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A random matrix with orthonormal rows or columns, whichever are fewer."""
    rows, columns = shape
    q, r = np.linalg.qr(generator.standard_normal((max(shape), min(shape))))
    q *= np.sign(np.diag(r))
    return q if rows >= columns else q.T
