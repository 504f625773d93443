"""Which tensors of a torch module are recorded, what they are called, and how they make one flat vector of float32.

Recorded are the parameters that require a gradient and the floating-point buffers that a state dict has, such as the
running statistics of a BatchNorm: with everything else as it was, they are the function. Names are those of the bare
module, without the prefixes of `torch.compile` and data parallelism. Knows modules; knows nothing of trials or files.

Shapes: P weights in all.
"""

import dataclasses
import fnmatch
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tipl_ray.data.snapshots import Layout

FROZEN = "frozen"
"""Name, in a commit's state, of the digest of what the module has and the trial does not."""
COUNTERS = ("num_batches_tracked",)
"""Integer buffers that change while a module trains, and on which its function does not depend."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tensors:
    """A module's tensors, by name: those that are recorded, and those that have to stay as they are."""

    recorded: dict[str, Tensor]
    still: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, leave_out: Sequence[str] = (), frozen: bool = False) -> "Tensors":
        """What of a module is recorded, `leave_out` being patterns of names that are neither recorded nor watched;
        `frozen` parameters, which require no gradient, are recorded too if asked for.

        Raises ValueError for a tensor that cannot be read as numbers here, and where there is nothing to record.
        """
        recorded, still = {}, {}
        for name, tensor, is_parameter in named_tensors(module, leave_out):
            is_number = tensor.is_floating_point() or tensor.is_complex()
            if frozen and is_parameter and not is_number:
                raise ValueError(
                    f"{name} is a parameter of {_short(tensor.dtype)}, which float32 does not hold; leave it out by "
                    f"leave_out=({name!r},), or record without frozen=True"
                )
            if is_number and (tensor.requires_grad or frozen or not is_parameter):
                recorded[name] = tensor
            elif is_parameter or name.rpartition(".")[2] not in COUNTERS:
                still[name] = tensor
        if not recorded:
            raise ValueError(
                f"{type(module).__name__} has nothing to record: no parameter requires a gradient. Open the recorder "
                "once it is to be trained, or with frozen=True"
            )
        return cls(recorded=recorded, still=still)

    @property
    def layout(self) -> Layout:
        """Layout of the flat vector; a complex tensor ends in a dimension of 2.

        Raises ValueError for more weights than a trial can have.
        """
        layout, offset = [], 0
        for name, tensor in self.recorded.items():
            shape = (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)
            layout.append((name, shape, offset))
            offset += math.prod(shape)
        if offset >= 2**31:
            raise ValueError(
                f"{offset:,} weights are more than a trial's 2**31 - 1; record a part of the module, or leave some out "
                "by leave_out"
            )
        return tuple(layout)

    @property
    def types(self) -> dict[str, str]:
        """Types of the recorded tensors that are not float32."""
        return {name: _short(one.dtype) for name, one in self.recorded.items() if one.dtype != torch.float32}

    def read(self) -> NDArray[np.float32]:
        """The weights of this moment, (P,): float64 rounded to float32, narrower types as they are."""
        parts = [_real(tensor).reshape(-1) for tensor in self.recorded.values()]
        flat = torch.empty(sum(part.numel() for part in parts), dtype=torch.float32)
        for into, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True):
            into.copy_(part)
        return flat.numpy()

    def versions(self) -> dict[str, int]:
        """How often each tensor that has to stay as it is was written to, as torch counts it."""
        return {name: 0 if one.is_inference() else one._version for name, one in self.still.items()}

    @property
    def state(self) -> dict[str, NDArray[np.uint8]]:
        """A commit state's record of the tensors that do not change; empty without any."""
        return {FROZEN: tensors_digest(self.still)} if self.still else {}


def named_tensors(module: nn.Module, leave_out: Sequence[str] = ()) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is a parameter) of parameters, tied ones once, and of a state dict's buffers.

    Empty tensors are left out. Raises ValueError for one that holds no numbers here, such as a shard or a lazy one.
    """
    module = bare(module)
    prefixes = _prefixes(module)
    persistent = module.state_dict(keep_vars=True).keys()
    kept = {name: tensor for name, tensor in module.named_buffers() if name in persistent}
    for tensors, is_parameter in ((module.named_parameters(), True), (kept.items(), False)):
        for own_name, tensor in tensors:
            name = _without(own_name, prefixes)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in leave_out):
                continue
            _refuse_unreadable(name, tensor)
            if tensor.numel():
                yield name, tensor, is_parameter


def bare(module: nn.Module) -> nn.Module:
    """The module within `torch.compile` and data parallelism."""
    while wrapped := _wrapped(module):
        module = module.get_submodule(wrapped)
    return module


def write(tensors: Mapping[str, Tensor], layout: Layout, weights_P: NDArray[np.float32]) -> None:
    """Put weights where they belong, each in its tensor's own type."""
    flat = torch.from_numpy(np.array(weights_P))
    with torch.no_grad():
        for name, shape, offset in layout:
            tensor, values = tensors[name], flat[offset : offset + math.prod(shape)].reshape(shape)
            tensor.copy_(torch.view_as_complex(values) if tensor.is_complex() else values)


def tensors_digest(tensors: Mapping[str, Tensor]) -> NDArray[np.uint8]:
    """SHA-256 of tensors with their names, types and shapes, (32,)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def frozen_digest(state: Mapping[str, NDArray]) -> bytes:
    """The digest in a commit's state of what the module has and the trial does not; empty where there is none."""
    return state[FROZEN].tobytes() if FROZEN in state else b""


def first_difference(layout: Layout, one_P: NDArray[np.float32], other_P: NDArray[np.float32]) -> str | None:
    """Name of the first tensor whose bits differ; None where none do."""
    if one_P.tobytes() == other_P.tobytes():
        return None
    position = int(np.argmax(one_P.view(np.uint32) != other_P.view(np.uint32)))
    return next(name for name, shape, offset in reversed(layout) if offset <= position)


def listed(names: Iterable[str]) -> str:
    """Some names, the first few of them."""
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrapped(module: nn.Module) -> str | None:
    """Name of the one submodule that a wrapper is about; None of what is no wrapper."""
    if "_orig_mod" in module._modules:
        return "_orig_mod"
    return "module" if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) else None


def _prefixes(module: nn.Module) -> set[str]:
    """Paths of what wrappers within the module are about."""
    wrapped = ((path, _wrapped(one)) for path, one in module.named_modules(remove_duplicate=False))
    return {f"{path}.{name}" for path, name in wrapped if name}


def _without(name: str, prefixes: set[str]) -> str:
    """A tensor's name without the parts added by wrappers."""
    parts = name.split(".")
    return ".".join(part for at, part in enumerate(parts) if ".".join(parts[: at + 1]) not in prefixes)


def _refuse_unreadable(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{name} has no shape yet; run the module once before you open the recorder")
    if hasattr(tensor, "full_tensor") or type(tensor).__name__ == "FlatParameter":
        raise ValueError(f"{name} is a shard of a tensor; gather the module on one process, and record it there")
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the device `meta`, without values; load the module before you open the recorder"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else _short(tensor.layout)  # type: ignore[arg-type]
        raise ValueError(f"{name} is {kind}, not a dense tensor; leave it out by leave_out=({name!r},)")
