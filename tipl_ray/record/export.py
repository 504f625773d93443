"""Out of the data set again: a snapshot as a torch module's weights, as a safetensors file, as a policy that acts.

Shapes: O observation entries, A action entries, B observations.
"""

import contextlib
import math
import uuid
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tipl_ray.data.snapshots import COLUMNS, STATISTICS, Header, PartialSnapshot, as_json
from tipl_ray.data.storage import TEMPORARY, StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.ppo.environments import CLIP, EPSILON
from tipl_ray.record.tensors import COUNTERS, FROZEN, Tensors, frozen_digest, listed, named_tensors, write

STATISTICS_PREFIX = "observation_statistics"
"""Where a file has the observation statistics of its snapshot: `<prefix>.mean`, `.variance` and `.count`, float64."""

PARTS = {"complex64": "float32", "complex128": "float64"}
"""Type of the parts of a complex number."""


def load_module(module: nn.Module, storage: str, *, trial: int, snapshot: int = -1) -> PartialSnapshot:
    """Put a snapshot's weights into a module of the same names and shapes, in place, each in its tensor's own type.

    Negative snapshots count from the end. Returns the snapshot with all that is known of it, such as the observation
    statistics. Raises ValueError, the module as it was, where names or shapes differ, or where what the trial does not
    hold, such as a frozen base, is not what it was recorded on; StoreError as `TrajectoryStore.trajectory` does.
    """
    store = TrajectoryStore(storage)
    read, header = read_snapshot(store, trial, snapshot), store.header([trial])
    patterns = header.config.get("leave_out", ())
    tensors = {name: tensor for name, tensor, _ in named_tensors(module)}
    _refuse_misfit(header, tensors, f"trial {trial}")
    kept = {name: tensor for name, tensor, _ in named_tensors(module, patterns)}
    names = {name for name, _, _ in header.layout}
    still = {n: t for n, t in kept.items() if n not in names and n.rpartition(".")[2] not in COUNTERS}
    run = store.trial(trial).run()
    state = store.trial(trial).state(run[-1])
    if FROZEN in state and frozen_digest(state) != frozen_digest(Tensors(recorded={}, still=still).state):
        raise ValueError(
            f"trial {trial} was recorded on other frozen weights than those of {listed(still)}; load the base that it "
            "was trained on first"
        )
    write(tensors, header.layout, read.weights)
    return read


def save_safetensors(path: Path | str, storage: str, *, trial: int, snapshot: int = -1) -> None:
    """Write a snapshot as a safetensors file: each tensor by name and in the type that it was recorded from, the
    observation statistics where there are any, and header, trial, snapshot and step as the file's metadata.

    A complex tensor is its real and imaginary part, in a last dimension of 2. Raises ValueError for a path that exists
    or whose folder does not, StoreError as `TrajectoryStore.trajectory` does and where the file cannot be written.
    """
    path, store = Path(path), TrajectoryStore(storage)
    if path.exists() or not path.parent.is_dir():
        way_out = (
            "already exists; choose another name"
            if path.exists()
            else f"no such folder, {path.parent}; create it first"
        )
        raise ValueError(f"path={path}: {way_out}")
    read, header = read_snapshot(store, trial, snapshot), store.header([trial])
    types, tensors = header.config.get("types", {}), {}
    for name, shape, offset in header.layout:
        values = torch.from_numpy(read.weights[offset : offset + math.prod(shape)].reshape(shape).copy())
        tensors[name] = values.to(getattr(torch, PARTS.get(recorded := types.get(name, "float32"), recorded)))
    for name in STATISTICS:
        if (value := getattr(read, name)) is not None:
            short = name.removeprefix("observation_")
            tensors[f"{STATISTICS_PREFIX}.{short}"] = torch.from_numpy(np.array(value, np.float64))
    about = {"header": as_json(header).decode(), "trial": str(trial), "snapshot": str(read.snapshot)}
    about |= {} if read.step is None else {"step": str(read.step)}
    partial = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        safetensors.torch.save_file(tensors, partial, metadata=about)
        partial.rename(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise StoreError(f"path={path}: cannot be written: {error}; free some space or fix permissions") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_snapshot(store: TrajectoryStore, trial: int, snapshot: int = -1) -> PartialSnapshot:
    """One snapshot of a trial; what its trial does not know is None. Raises as `TrajectoryStore.trajectory` does."""
    if not (total := store.progress(trial).num_snapshots):
        raise store.absent(trial)
    index = snapshot if snapshot >= 0 else snapshot + total
    if not 0 <= index < total:
        raise ValueError(f"snapshot={snapshot} is none of the {total} snapshots of trial {trial}")
    trajectory = store.trajectory(trial, start=index, stop=index + 1)
    values = {column: getattr(trajectory, field) for column, field in COLUMNS.items()}
    known = {
        column: array[0] if array.ndim == 2 else array[0].item()
        for column, array in values.items()
        if len(array) and not np.isnan(array[0]).any()
    }
    return PartialSnapshot(seed=trial, **known)


class GaussianPolicy(nn.Module):
    """A policy of our own PPO: observations as the environment gives them (B, O) to a distribution of actions (B, A).

    Weights are (inputs, outputs), as the data set has them; observations are normalised and clipped as in training.
    """

    observation_mean: Tensor
    observation_variance: Tensor

    def __init__(self, header: Header):
        """The policy of a data set's header, its weights 0. Raises ValueError for a header of another kind."""
        super().__init__()
        shapes = {name: shape for name, shape, _ in header.layout}
        expected = {"log_std"} | {f"actor.{index}.{kind}" for index in range(3) for kind in ("weight", "bias")}
        if "ppo" in header.config and {*shapes} == expected - {"log_std"}:
            raise ValueError(
                f"{header.task}: its actions are choices, and only policies with continuous actions become modules "
                "here; build the module yourself, and give it to load_module"
            )
        if {*shapes} != expected or "ppo" not in header.config:
            raise ValueError(
                f"{header.task}: these trials are not of our own PPO, so nothing here builds their module; build it "
                "yourself, and give it to load_module"
            )
        self.actor = nn.ModuleList(
            nn.ParameterDict({kind: torch.zeros(shapes[f"actor.{index}.{kind}"]) for kind in ("weight", "bias")})
            for index in range(3)
        )
        self.log_std = nn.Parameter(torch.zeros(shapes["log_std"]))
        self.activation = torch.relu if header.config["ppo"].get("activation") == "relu" else torch.tanh
        for name in ("observation_mean", "observation_variance"):
            self.register_buffer(name, torch.zeros(shapes["actor.0.weight"][0], dtype=torch.float64), persistent=False)

    def forward(self, observations_BO: Tensor) -> torch.distributions.Normal:
        """Distribution of actions, before they are clipped to the task's limits."""
        scale_O = (self.observation_variance + EPSILON).sqrt()
        x = ((observations_BO.double() - self.observation_mean) / scale_O).float().clamp(-CLIP, CLIP)
        for index, layer in enumerate(self.actor):
            x = x @ layer["weight"] + layer["bias"]  # type: ignore[index]
            x = x if index == 2 else self.activation(x)
        return torch.distributions.Normal(x, self.log_std.exp())


def policy_module(storage: str, *, trial: int, snapshot: int = -1) -> GaussianPolicy:
    """A snapshot of our own PPO as a torch module with its observation statistics. Raises as `load_module` does."""
    policy = GaussianPolicy(TrajectoryStore(storage).header([trial]))
    read = load_module(policy, storage, trial=trial, snapshot=snapshot)
    policy.observation_mean.copy_(torch.as_tensor(read.observation_mean))
    policy.observation_variance.copy_(torch.as_tensor(read.observation_variance))
    return policy


def _refuse_misfit(header: Header, tensors: dict[str, Tensor], trial: str) -> None:
    layout = {name: shape for name, shape, _ in header.layout}
    if lost := [name for name in layout if name not in tensors]:
        raise ValueError(
            f"{listed(lost)}: {trial} has them and the module does not; build it as it was when it was recorded, with "
            "the same parameters tied"
        )
    for name, shape in layout.items():
        tensor = tensors[name]
        own = (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)
        if own != tuple(shape):
            raise ValueError(f"{name} has shape {list(own)} in the module and {list(shape)} in {trial}")
