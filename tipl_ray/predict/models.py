"""Trained models on disk: safetensors plus JSON, in a folder or under a URI; nothing is unpickled."""

import abc
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from tipl_ray.data.storage import Storage, StoreError, publish, read_published
from tipl_ray.predict.blocks import DTYPE
from tipl_ray.predict.model_files import ABOUT_FILE, WEIGHTS_FILE
from tipl_ray.registry import Registry

RECORD_FILE = "model.sha256"
"""Digests of a model's files, as they were published."""


WAY_OUT = "restore it from a copy (MLflow keeps one), or delete the folder and train again"


class SavedModel(nn.Module, abc.ABC):
    """A model in a folder: its weights, and JSON that describes it."""

    @abc.abstractmethod
    def described(self) -> dict[str, Any]:
        """What `described_by` makes an untrained model of, as JSON."""

    @classmethod
    @abc.abstractmethod
    def described_by(cls, about: Mapping[str, Any]) -> Self:
        """An untrained model of the size given in model.json."""

    def save(self, folder: str, about: dict[str, Any] | None = None, beside: Mapping[str, bytes] | None = None) -> None:
        """Write the model, JSON that belongs to it, for `load_about`, and further files, for `read_model_file`.

        model.json is written last: if it exists, the model is complete.
        """
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        described = {**(about or {}), **self.described(), "architecture": ARCHITECTURES.name_of(type(self))}
        files = {WEIGHTS_FILE: safetensors.torch.save(weights), ABOUT_FILE: json.dumps(described, indent=1).encode()}
        publish(folder, {**(beside or {}), **files}, RECORD_FILE)

    @classmethod
    def load(cls, folder: str) -> Self:
        """The model that `save` wrote, on the CPU and in evaluation mode. Raises StoreError as `load_model` does."""
        model = load_model(folder)
        if not isinstance(model, cls):
            raise StoreError(f"{folder}: contains a {type(model).__name__}, not a {cls.__name__}; use another folder")
        return model


ARCHITECTURES = Registry(
    "architecture",
    "tipl_ray.architectures",
    {
        "CausalTransformer": "tipl_ray.paper.transformer:CausalTransformer",
        "WindowTransformer": "tipl_ray.window.transformer:WindowTransformer",
        "PerWeightTransformer": "tipl_ray.per_weight.transformer:PerWeightTransformer",
        "GainTransformer": "tipl_ray.improve.gain_model:GainTransformer",
    },
)
"""Models by what model.json calls them."""


def read_model_file(folder: str, name: str) -> bytes:
    """A file of a model's folder. Raises StoreError where it is missing, or not the one that was saved."""
    return read_published(folder, name, RECORD_FILE, WAY_OUT)


@contextlib.contextmanager
def understood(folder: str, name: str, way_out: str = WAY_OUT) -> Iterator[None]:
    """What fails in here fails for what the file holds, which may have no record: a StoreError in one line."""
    try:
        yield
    except StoreError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"{Storage(folder).show(name)}: is not understood: {type(error).__name__}: {reason}; {way_out}"
        ) from error


def load_about(folder: str) -> dict[str, Any]:
    """The description of the model in a folder, from model.json. Raises StoreError where there is none, or it is
    damaged."""
    content = read_model_file(folder, ABOUT_FILE)
    with understood(folder, ABOUT_FILE):
        about = json.loads(content)
        return {**about, "architecture": about["architecture"]}


def files_beside(folder: str) -> list[str]:
    """Names of the further files that were saved with a model."""
    own = (WEIGHTS_FILE, ABOUT_FILE, RECORD_FILE)
    return sorted(name for name in Storage(folder).sizes() if name not in own)


def load_model(folder: str) -> SavedModel:
    """The model in a folder, whichever it is, on the CPU and in evaluation mode.

    Draws no random number, and takes neither type nor device from torch's defaults. Raises StoreError where there is no
    model, or a damaged one.
    """
    about, content = load_about(folder), read_model_file(folder, WEIGHTS_FILE)
    # Not on torch's device "meta": initialising a tensor there loads torch's compiler, a second and a half.
    with understood(folder, ABOUT_FILE), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = ARCHITECTURES.load(about["architecture"]).described_by(about)
    with understood(folder, WEIGHTS_FILE):
        # A tensor of its own for each, aligned as torch does it: products may depend on that.
        weights = {name: tensor.to(DTYPE, copy=True) for name, tensor in safetensors.torch.load(content).items()}
        model.load_state_dict(weights, assign=True)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("some weights are NaN or infinite")
    return model.eval()
