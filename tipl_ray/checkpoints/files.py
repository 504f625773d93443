"""Where the tensors of a checkpoint are in its files, whatever wrote them; read as flat values, a slice at a time.

No file is loaded or mapped: its own table of contents says where each tensor begins, and only what is asked for is
read. Knows one checkpoint; knows nothing of a series.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import pickle
import re
import zipfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tipl_ray.errors import UserError

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The types that are read; tensors of others are left out."""
FLOATS = tuple(SAFETENSORS_TYPES.values())
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|rng|callback", re.IGNORECASE)
"""Parts of a training state, by the first name of what is in them, that are no weights."""
POLICY_IN_ZIP = "policy.pth"
"""Where stable-baselines3 keeps a policy's state dict in the zip that it saves."""


class CheckpointError(UserError):
    """A file or a folder of checkpoints is refused: names it, what is wrong with it, and what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of floats as it is in a file: its values in one piece from `offset` [bytes] on."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """Number of its values."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """What reading all of it takes [bytes]."""
        return self.num_values * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Values [start:stop], flat and of their own type. Raises CheckpointError where the file cannot give them."""
        first, count = self.offset + start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        with readable(self.path):
            content = np.fromfile(self.path, np.uint8, count, offset=first)
        if len(content) != count:
            raise CheckpointError(f"{self.path}: ends before its last tensor does; copy or save it again")
        return torch.from_numpy(content).view(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What is in a checkpoint."""

    tensors: Mapping[str, StoredTensor]
    """By name; a tensor that bears several names, as tied weights do, only under the first."""
    left_out: Mapping[str, str]
    """Names of tensors that are no weights -> why."""
    files: tuple[Path, ...]


def read_contents(path: Path) -> Contents:
    """What is in a checkpoint: a .safetensors file, the index of several, a file of `torch.save`, or a zip of
    stable-baselines3. Raises CheckpointError for what is none of them, or damaged."""
    with readable(path):
        if path.name.endswith(".index.json"):
            return _join([read_contents(part) for part in _parts(path)], path)
        if path.suffix == ".safetensors":
            return _safetensors(path)
        return _torch(path)


def _parts(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is not the index of a sharded checkpoint: it has no weight_map") from error
    parts = [index.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(f"{index}: {missing[0]} is missing, 1 of {len(parts)} shards; copy or download it again")
    return parts


def _join(parts: list[Contents], index: Path) -> Contents:
    tensors: dict[str, StoredTensor] = {}
    left_out: dict[str, str] = {}
    for part in parts:
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise CheckpointError(f"{index}: {twice[0]} is in two of its shards; save the checkpoint again")
        tensors.update(part.tensors)
        left_out.update(part.left_out)
    return Contents(
        tensors=tensors, left_out=left_out, files=(index, *itertools.chain(*(part.files for part in parts)))
    )


def _safetensors(path: Path) -> Contents:
    try:
        # Holds the header to the file's length, and itself to the format.
        with safetensors.safe_open(path, "pt"):
            pass
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: is damaged or cut short: {error}; copy or save it again") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors, left_out = {}, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] in SAFETENSORS_TYPES:
            offset = 8 + length + entry["data_offsets"][0]
            tensors[name] = StoredTensor(path, offset, SAFETENSORS_TYPES[entry["dtype"]], tuple(entry["shape"]))
        else:
            left_out[name] = f"of type {entry['dtype']}"
    return Contents(tensors=tensors, left_out=left_out, files=(path,))


def _torch(path: Path) -> Contents:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: is cut short, or in a format from before PyTorch 1.6; load and save it again with torch.save"
        )
    inner = 0
    file: IO[bytes]
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        if POLICY_IN_ZIP in archive.namelist():
            entry = archive.getinfo(POLICY_IN_ZIP)
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: {POLICY_IN_ZIP} in it is compressed; save the model again")
            inner, file = _place_in_zip(file, entry), io.BytesIO(archive.read(entry))
        places = _places_in_zip(file)
        file.seek(0)
        state = _load(path, file)
    tensors, left_out, seen = {}, {}, set()
    for name, tensor in _flat(state):
        if tensor.dtype not in FLOATS:
            left_out[name] = f"of type {str(tensor.dtype).removeprefix('torch.')}"
        elif NOT_WEIGHTS.search(name.partition("/")[0]) and "/" in name:
            left_out[name] = "part of the optimiser's or training state"
        else:
            stored = _stored(path, name, tensor, inner, places)
            if stored in seen:
                left_out[name] = "tied to another"
            else:
                tensors[name.replace("/", ".")] = stored
            seen.add(stored)
    return Contents(tensors=tensors, left_out=left_out, files=(path,))


def _places_in_zip(file: IO[bytes]) -> set[int]:
    """Where the entries of a zip begin that are not compressed."""
    with zipfile.ZipFile(file) as archive:
        return {_place_in_zip(file, entry) for entry in archive.infolist() if entry.compress_type == zipfile.ZIP_STORED}


def _place_in_zip(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: after its own header, whose name and extra field say how long they are."""
    file.seek(entry.header_offset + 26)
    lengths = file.read(4)
    return entry.header_offset + 30 + sum(int.from_bytes(lengths[index : index + 2], "little") for index in (0, 2))


def _load(path: Path, file: IO[bytes]) -> Any:
    """What was saved, its tensors without their values: they know where in the file these are."""
    try:
        with FakeTensorMode():
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: contains more than tensors, numbers and text, and unpickling it is not safe; save "
            "module.state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: is not a checkpoint of torch.save, or damaged: {first}") from error


def _flat(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, or of dictionaries and lists around it, named as a path is."""
    if isinstance(state, Tensor):
        yield prefix, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _flat(value, f"{prefix}/{key}" if prefix else str(key))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _flat(value, f"{prefix}/{index}" if prefix else str(index))


def _stored(path: Path, name: str, tensor: Tensor, inner: int, places: Container[int]) -> StoredTensor:
    begin = tensor.untyped_storage()._checkpoint_offset
    if begin is None or begin not in places:  # torch reckons where torch.save would have put it
        raise CheckpointError(f"{path}: was packed by another program; load it and save it again with torch.save")
    if not tensor.is_contiguous():
        raise CheckpointError(f"{path}: {name} is a view that is not in one piece; save it as tensor.contiguous()")
    offset = inner + begin + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return StoredTensor(path, offset, tensor.dtype, tuple(tensor.shape))


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises CheckpointError where a file or folder cannot be read."""
    try:
        yield
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {reason}; fix permissions, or copy or save it again") from error
