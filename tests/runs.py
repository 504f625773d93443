"""Folders of checkpoints of made-up training runs, as other people's tools write them."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

State = Mapping[str, Tensor]


def model_states(num_checkpoints: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Tensor]]:
    """States of a small language model that drifts and trembles."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (50, 24)}
    for index in range(3):
        shapes |= {f"model.layers.{index}.attention.weight": (24, 24), f"model.layers.{index}.norm.weight": (24,)}  # type: ignore[dict-item]
    start = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    drift = {name: 0.02 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return [
        {
            name: (start[name] + index * drift[name] + 0.01 * torch.randn(shape, generator=draw)).to(dtype)
            for name, shape in shapes.items()
        }
        for index in range(num_checkpoints)
    ]


def path_states(weights_TP: np.ndarray) -> list[dict[str, Tensor]]:
    """States of one tensor, whose values are given."""
    return [{"layer.weight": torch.from_numpy(np.ascontiguousarray(row_P))} for row_P in weights_TP]


def write_safetensors(folder: Path, states: Sequence[State]) -> Path:
    """One file a checkpoint: step_0.safetensors, step_10.safetensors, ..."""
    folder.mkdir(parents=True)
    for index, state in enumerate(states):
        safetensors.torch.save_file(dict(state), folder / f"step_{10 * index}.safetensors")
    return folder


def write_shards(folder: Path, states: Sequence[State]) -> Path:
    """One folder a checkpoint, with two shards, an index and a configuration, as Hugging Face's libraries write it."""
    for index, state in enumerate(states):
        place = folder / f"checkpoint-{10 * index}"
        place.mkdir(parents=True)
        names = list(state)
        files = {
            name: f"model-0000{1 + 2 * place_in // len(names)}-of-00002.safetensors"
            for place_in, name in enumerate(names)
        }
        for file in set(files.values()):
            safetensors.torch.save_file({name: state[name] for name in names if files[name] == file}, place / file)
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        (place / "config.json").write_text("{}")
        torch.save({"state": {0: torch.ones(3)}}, place / "optimizer.pt")
    return folder


def write_torch(folder: Path, states: Sequence[State]) -> Path:
    """One file of torch.save a checkpoint, with the optimizer's state and what else a loop keeps."""
    folder.mkdir(parents=True)
    for index, state in enumerate(states):
        moments = {str(number): {"exp_avg": torch.zeros_like(value)} for number, value in enumerate(state.values())}
        whole = {"model": dict(state), "optimizer_state_dict": {"state": moments}, "epoch": index, "loss": 0.5}
        torch.save(whole, folder / f"step_{10 * index}.pt")
    return folder


def write_zips(folder: Path, states: Sequence[State]) -> Path:
    """One zip a checkpoint, as stable-baselines3's CheckpointCallback writes it, with VecNormalize's pickle."""
    folder.mkdir(parents=True)
    for index, state in enumerate(states):
        with zipfile.ZipFile(folder / f"ppo_Hopper-v4_{10 * index}_steps.zip", "w") as archive:
            archive.writestr("data", "{}")
            with archive.open("policy.pth", "w", force_zip64=True) as file:
                torch.save(dict(state), file)
    (folder / "ppo_vecnormalize_10_steps.pkl").write_bytes(b"not read")
    return folder


def flat(states: Sequence[State]) -> np.ndarray:
    """All weights in float64, (T, P)."""
    return np.stack([torch.cat([value.double().reshape(-1) for value in state.values()]).numpy() for state in states])
