"""The causal Transformers (Section 3.3), the paper's and ours.

`CausalTransformer` is the paper's: the tokens of K snapshots in, the token of each one's next snapshot out; of the size
and shape of Decision Transformer's for gym, with one token per snapshot and no Tanh on the prediction.
`WindowTransformer` is ours, on the basis `window`: inner products of K displacements in, coefficients that combine them
into all H forward steps out, so that one set of weights serves policies of any size.
Knows tokens and indices, and nothing of trials or how it is trained. A model on disk is safetensors plus JSON, in a
folder or under a URI; nothing is unpickled.

Shapes: B windows, K tokens of context, H forward steps, D numbers per token, Q phases of a PPO iteration, E embedding,
A attention heads.
"""

import dataclasses
import json
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import config
from tipl_ray.storage import file_exists, read_file, write_file

WEIGHTS_FILE, ABOUT_FILE = "model.safetensors", "model.json"
CLOCK_SIZE = 4
SMALLEST_SQUARE = 1e-30
"""Squared length below which a displacement has no direction."""
MOST_LOG_LENGTH = 8.0
"""Limit of a token's log length: a displacement may be 0."""


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
        """Write the model and any JSON that belongs to it, which `load_about` reads back."""
        described = {"token_size": self.token_size, "max_snapshots": self.max_snapshots}
        _save(self, folder, {**(about or {}), "model": config.as_table(self.size), **described})

    @classmethod
    def load(cls, folder: str) -> Self:
        """The model that `save` wrote, on the CPU and in evaluation mode. Raises FileNotFoundError if there is none."""
        about = load_about(folder)
        model = cls(config.Model(**about["model"]), about["token_size"], about["max_snapshots"])
        model.load_state_dict(safetensors.torch.load(read_file(folder, WEIGHTS_FILE)))
        return model.eval()


class WindowTransformer(nn.Module):
    """TIPL on the basis `window`: each displacement of the context is a token, answered with H coefficients.

    A token holds nothing but the displacement's cosines with the context's others and its length against theirs, the
    phase in which it was made and, if `size.clock` says so, how far the trial has come: neither the number of weights
    nor their scale. It corrects the coefficients of a ridge regression, by phase, which it is given.
    """

    def __init__(self, size: config.Model, steps: tuple[int, ...], num_phases: int):
        super().__init__()
        self.size, self.steps, self.num_phases = size, tuple(steps), num_phases
        self.embed_token = nn.Linear(size.context + 1, size.embedding)
        self.embed_position = nn.Embedding(size.context, size.embedding)
        self.embed_phase = nn.Embedding(num_phases, size.embedding)
        self.embed_clock = nn.Linear(CLOCK_SIZE, size.embedding, bias=False)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.final_norm = nn.LayerNorm(size.embedding)
        self.predict = nn.Linear(size.embedding, len(steps))
        self.register_buffer("ridge_QHK", torch.zeros(num_phases, len(steps), size.context))
        self.ridge_QHK: Tensor
        nn.init.normal_(self.embed_position.weight, std=0.02)
        nn.init.zeros_(self.predict.bias)
        # The first forecasts are the ridge's own, but for a whisper.
        nn.init.normal_(self.predict.weight, std=0.002)

    def forward(self, grams_BKK: Tensor, phases_B: Tensor, progress_B: Tensor, learning_rates_B: Tensor) -> Tensor:
        """Coefficients of the K displacements in each forward step; (B, H, K). See `gram.Contexts` for what comes in.

        Each displacement's coefficients depend on it and those before it alone, but for its cosines with later ones.
        """
        hidden_BKE = self.embed_token(self._tokens(grams_BKK)) + self.embed_position.weight
        if self.size.phase:
            # The last displacement led to the start's phase, the one before it to the phase before.
            ages_K = torch.arange(self.size.context - 1, -1, -1, device=phases_B.device)
            hidden_BKE = hidden_BKE + self.embed_phase((phases_B[:, None] - ages_K) % self.num_phases)
        if self.size.clock != "none":
            clock_B = progress_B if self.size.clock == "progress" else 1.0 - learning_rates_B
            hidden_BKE = hidden_BKE + self.embed_clock(_clock_features(clock_B.float()))[:, None]
        hidden_BKE = functional.dropout(hidden_BKE, self.size.dropout, self.training)
        for block in self.blocks:
            hidden_BKE = block(hidden_BKE)
        correction_BHK = self.predict(self.final_norm(hidden_BKE)).transpose(1, 2)
        return self.ridge_QHK[phases_B] + correction_BHK

    def _tokens(self, grams_BKK: Tensor) -> Tensor:
        """Cosines with every displacement of the context, and the logarithm of the length against their mean."""
        lengths_BK = grams_BKK.diagonal(dim1=1, dim2=2).clamp_min(SMALLEST_SQUARE).sqrt()
        cosines_BKK = grams_BKK / (lengths_BK[:, :, None] * lengths_BK[:, None])
        logs_BK = lengths_BK.log()
        relative_BK = (logs_BK - logs_BK.mean(dim=1, keepdim=True)).clamp(-MOST_LOG_LENGTH, MOST_LOG_LENGTH)
        return torch.cat((cosines_BKK, relative_BK[:, :, None]), dim=2).float()

    def save(self, folder: str, about: dict[str, Any] | None = None) -> None:
        """Write the model and any JSON that belongs to it, which `load_about` reads back."""
        described = {"steps": self.steps, "num_phases": self.num_phases}
        _save(self, folder, {**(about or {}), "model": config.as_table(self.size), **described})

    @classmethod
    def load(cls, folder: str) -> Self:
        """The model that `save` wrote, on the CPU and in evaluation mode. Raises FileNotFoundError if there is none."""
        about = load_about(folder)
        model = cls(config.Model(**about["model"]), tuple(about["steps"]), about["num_phases"])
        model.load_state_dict(safetensors.torch.load(read_file(folder, WEIGHTS_FILE)))
        return model.eval()


def _save(model: nn.Module, folder: str, described: dict[str, Any]) -> None:
    """Write model.safetensors, then model.json, each in one go: where model.json stands, the model is whole."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_file(folder, WEIGHTS_FILE, safetensors.torch.save(weights))
    described["architecture"] = type(model).__name__
    write_file(folder, ABOUT_FILE, json.dumps(described, indent=1).encode())


MODELS: dict[str, type[CausalTransformer] | type[WindowTransformer]] = {
    kind.__name__: kind for kind in (CausalTransformer, WindowTransformer)
}


def load_about(folder: str) -> dict[str, Any]:
    """What model.json says of the model in a folder. Raises FileNotFoundError if there is none."""
    return json.loads(read_file(folder, ABOUT_FILE))


def load_model(folder: str) -> "CausalTransformer | WindowTransformer":
    """The model in a folder, whichever it is. Raises FileNotFoundError if there is none."""
    return MODELS[load_about(folder)["architecture"]].load(folder)


def is_complete(folder: str) -> bool:
    """Whether `save` has finished in this folder."""
    return file_exists(folder, ABOUT_FILE)


def _clock_features(clock_B: Tensor) -> Tensor:
    """A share of the trial, seen so that its beginning, where most happens, is told apart finely; (B, CLOCK_SIZE)."""
    return torch.stack((clock_B, clock_B**2, torch.exp(-10 * clock_B), torch.exp(-50 * clock_B)), dim=1)


def _initialise(module: nn.Module) -> None:
    """GPT-2's: normal weights of deviation 0.02, no bias."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
