"""The causal Transformer (Section 3.3): the tokens of K snapshots in, the token of each one's next snapshot out.

Of the size and shape of Decision Transformer's for gym, with one token per snapshot and no Tanh on the prediction.
Knows tokens and snapshot indices, and nothing of bases, trials or how it is trained. A model on disk is safetensors
plus JSON, in a folder or under a URI; nothing is unpickled.

Shapes: B windows, K snapshots of context, H forward steps, D numbers per token, E embedding, A attention heads.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.fs
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import config

WEIGHTS_FILE, ABOUT_FILE = "model.safetensors", "model.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Normaliser:
    """Mean and standard deviation of each of a token's D numbers, over the training trials."""

    mean_D: NDArray[np.float32]
    deviation_D: NDArray[np.float32]

    @classmethod
    def fit(cls, coordinates_NTD: NDArray[np.float32]) -> Self:
        """Statistics over N trials; a number that never changes keeps the deviation 1, so that nothing divides by 0."""
        mean_D = coordinates_NTD.mean(axis=(0, 1), dtype=np.float64)
        deviation_D = coordinates_NTD.std(axis=(0, 1), dtype=np.float64)
        deviation_D[deviation_D <= 1e-7 * np.abs(mean_D)] = 1.0
        return cls(mean_D=mean_D.astype(np.float32), deviation_D=deviation_D.astype(np.float32))

    def normalise(self, coordinates: NDArray[np.float32]) -> NDArray[np.float32]:
        """Tokens as the model sees them: mean 0, deviation 1; (..., D)."""
        return (coordinates - self.mean_D) / self.deviation_D

    def restore(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Coordinates of tokens, the inverse of `normalise`; (..., D)."""
        return tokens * self.deviation_D + self.mean_D

    def as_table(self) -> dict[str, list[float]]:
        """Plain JSON types, exact."""
        return {"mean": self.mean_D.tolist(), "deviation": self.deviation_D.tolist()}

    @classmethod
    def from_table(cls, table: dict[str, list[float]]) -> Self:
        """The normaliser that `as_table` wrote down."""
        return cls(mean_D=np.asarray(table["mean"], np.float32), deviation_D=np.asarray(table["deviation"], np.float32))


class Block(nn.Module):
    """One GPT-2 block: attention over the snapshots before, then a ReLU MLP of four times the width; norms first."""

    def __init__(self, size: config.Model):
        super().__init__()
        self.heads, self.dropout = size.heads, size.dropout
        self.attention_norm = nn.LayerNorm(size.embedding)
        self.query_key_value = nn.Linear(size.embedding, 3 * size.embedding)
        self.attention_out = nn.Linear(size.embedding, size.embedding)
        self.mlp_norm = nn.LayerNorm(size.embedding)
        self.mlp_in = nn.Linear(size.embedding, 4 * size.embedding)
        self.mlp_out = nn.Linear(4 * size.embedding, size.embedding)

    def forward(self, hidden_BKE: Tensor) -> Tensor:
        """(B, K, E) to (B, K, E)."""
        hidden_BKE = hidden_BKE + self._drop(self.attention_out(self._attend(self.attention_norm(hidden_BKE))))
        return hidden_BKE + self._drop(self.mlp_out(functional.relu(self.mlp_in(self.mlp_norm(hidden_BKE)))))

    def _attend(self, hidden_BKE: Tensor) -> Tensor:
        split_3BAKe = self.query_key_value(hidden_BKE).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query_BAKe, key_BAKe, value_BAKe = split_3BAKe
        dropout = self.dropout if self.training else 0.0
        seen_BAKe = functional.scaled_dot_product_attention(
            query_BAKe, key_BAKe, value_BAKe, dropout_p=dropout, is_causal=True
        )
        return seen_BAKe.transpose(1, 2).flatten(2)

    def _drop(self, hidden_BKE: Tensor) -> Tensor:
        return functional.dropout(hidden_BKE, self.dropout, self.training)


class CausalTransformer(nn.Module):
    """The causal Transformer (Section 3.3) for tokens of D numbers and trajectories of up to `max_snapshots`."""

    def __init__(self, size: config.Model, token_size: int, max_snapshots: int):
        super().__init__()
        self.size, self.token_size, self.max_snapshots = size, token_size, max_snapshots
        self.embed_token = nn.Linear(token_size, size.embedding)
        self.embed_snapshot = nn.Embedding(max_snapshots, size.embedding)
        self.embedding_norm = nn.LayerNorm(size.embedding)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.final_norm = nn.LayerNorm(size.embedding)
        self.predict = nn.Linear(size.embedding, token_size)
        self.apply(_initialise)

    def forward(self, tokens_BKD: Tensor, snapshots_BK: Tensor) -> Tensor:
        """Predicted token of each position's next snapshot, from that position and those before; (B, K, D).

        `snapshots_BK` are the snapshots' indices in their trajectory, int64, below `max_snapshots`.
        """
        embedded_BKE = self.embed_token(tokens_BKD) + self.embed_snapshot(snapshots_BK)
        hidden_BKE = functional.dropout(self.embedding_norm(embedded_BKE), self.size.dropout, self.training)
        for block in self.blocks:
            hidden_BKE = block(hidden_BKE)
        return self.predict(self.final_norm(hidden_BKE))

    @torch.no_grad()
    def forecast(self, tokens_BKD: Tensor, snapshots_BK: Tensor, horizon: int) -> Tensor:
        """Tokens of the next H snapshots, each predicted from the last K known or predicted so far; (B, H, D)."""
        assert not self.training, "a forecast in training mode would be dropped out"
        predicted = []
        for _ in range(horizon):
            next_B1D = self(tokens_BKD, snapshots_BK)[:, -1:]
            predicted.append(next_B1D)
            tokens_BKD = torch.cat((tokens_BKD, next_B1D), dim=1)[:, -self.size.context :]
            next_B1 = (snapshots_BK[:, -1:] + 1).clamp(max=self.max_snapshots - 1)
            snapshots_BK = torch.cat((snapshots_BK, next_B1), dim=1)[:, -self.size.context :]
        return torch.cat(predicted, dim=1)

    def save(self, folder: str, about: dict[str, Any] | None = None) -> None:
        """Write model.safetensors, then model.json, each in one go: where model.json stands, the model is whole.

        `about` is any JSON that belongs to the model; `load_about` reads it back.
        """
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        described = {
            **(about or {}),
            "model": config.as_table(self.size),
            "token_size": self.token_size,
            "max_snapshots": self.max_snapshots,
        }
        write_file(folder, WEIGHTS_FILE, safetensors.torch.save(weights))
        write_file(folder, ABOUT_FILE, json.dumps(described, indent=1).encode())

    @classmethod
    def load(cls, folder: str) -> Self:
        """The model that `save` wrote, on the CPU and in evaluation mode. Raises FileNotFoundError if there is none."""
        about = load_about(folder)
        model = cls(config.Model(**about["model"]), about["token_size"], about["max_snapshots"])
        model.load_state_dict(safetensors.torch.load(read_file(folder, WEIGHTS_FILE)))
        return model.eval()


def load_about(folder: str) -> dict[str, Any]:
    """What model.json says of the model in a folder. Raises FileNotFoundError if there is none."""
    return json.loads(read_file(folder, ABOUT_FILE))


def is_complete(folder: str) -> bool:
    """Whether `save` has finished in this folder."""
    filesystem, path = _locate(folder)
    return filesystem.get_file_info(f"{path}/{ABOUT_FILE}").type == pyarrow.fs.FileType.File


def write_file(folder: str, name: str, content: bytes) -> None:
    """Put a whole file into a folder or under a URI: it appears complete or not at all."""
    filesystem, path = _locate(folder)
    filesystem.create_dir(path, recursive=True)
    with filesystem.open_output_stream(f"{path}/{name}.tmp") as stream:
        stream.write(content)
    filesystem.move(f"{path}/{name}.tmp", f"{path}/{name}")


def read_file(folder: str, name: str) -> bytes:
    """Content of a file in a folder or under a URI. Raises FileNotFoundError."""
    filesystem, path = _locate(folder)
    with filesystem.open_input_stream(f"{path}/{name}", compression=None) as stream:
        return stream.read()


def _locate(folder: str) -> tuple[pyarrow.fs.FileSystem, str]:
    return pyarrow.fs.FileSystem.from_uri(folder if "://" in folder else str(Path(folder).absolute()))


def _initialise(module: nn.Module) -> None:
    """GPT-2's: normal weights of deviation 0.02, no bias."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
