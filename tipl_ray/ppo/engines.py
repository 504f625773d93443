"""Which learner runs the networks, compiled C++ or torch: its choice, construction, and name with version."""

from typing import Literal

from tipl_ray.config import Ppo
from tipl_ray.ppo.compiled_learner import CompiledLearner, why_not_compiled
from tipl_ray.ppo.learner import Learner
from tipl_ray.ppo.networks import NetworkShape

ENGINES = {"compiled": "compiled-1", "torch": "torch-1", "cuda": "cuda-1"}
"""Name and version of each learner. The version is part of the data's hash, and rises if the learner's bits change."""


def choose_engine(engine: str, ppo: Ppo) -> Literal["compiled", "torch", "cuda"]:
    """The learner for a configuration. Raises ValueError if it needs `compiled`, which is not available here."""
    reason = None if engine in ("cuda", "torch") else why_not_compiled(ppo)
    if engine == "compiled" and reason:
        raise ValueError(f"collect.engine='compiled' is not available: {reason}; use 'torch' instead")
    if ppo.precision == "bfloat16" and (engine in ("cuda", "torch") or reason):
        other = reason or f"collect.engine={engine!r}"
        raise ValueError(f"ppo.precision='bfloat16' needs the compiled engine, but {other}; change one of them")
    if engine == "cuda":
        return "cuda"
    if engine == "torch" or reason:
        return "torch"
    return "compiled"


def make_learner(engine: str, shape: NetworkShape, ppo: Ppo) -> Learner:
    """The learner named `compiled`, `torch` or `cuda`, for these shapes."""
    if engine == "compiled":
        return CompiledLearner(shape, ppo)
    # Importing torch takes a second and 200 MB of each actor, which the compiled learner has no use for.
    from tipl_ray.ppo.torch_learner import TorchLearner

    return TorchLearner(shape, ppo, "cuda" if engine == "cuda" else "cpu")
