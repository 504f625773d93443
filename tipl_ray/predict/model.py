"""The causal Transformers (Section 3.3), the paper's and ours.

`CausalTransformer` is the paper's: the tokens of K snapshots in, the token of each one's next snapshot out; of the size
and shape of Decision Transformer's for gym, with one token per snapshot and no Tanh on the prediction.
`WindowTransformer` is ours, on the basis `window`: inner products of K displacements in, coefficients that combine them
into all H forward steps out, so that one set of weights serves policies of any size.
Knows tokens and indices, and nothing of trials or how it is trained. A model on disk is safetensors plus JSON, in a
folder or under a URI; nothing is unpickled.

Shapes: B windows, K tokens of context, H forward steps, F of them one by one, D numbers per token, Q phases of a PPO
iteration, E embedding, A attention heads, R ridge regressions.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import config
from tipl_ray.data.storage import Storage, StoreError, file_exists, publish, read_published
from tipl_ray.digest import as_table

WEIGHTS_FILE, ABOUT_FILE = "model.safetensors", "model.json"
RECORD_FILE = "model.sha256"
"""Digests of a model's files, as they were published."""
BASIS_FILE = "basis.safetensors"
"""The shared basis that a model's tokens are of, where they are; see `temporal_svd.FittedBasis.to_bytes`."""
WAY_OUT = "restore it from a copy (MLflow keeps one), or delete the folder and train again"
DTYPE = torch.float32
"""Of every model's weights, whatever the default is where it is made or loaded."""
CLOCK_SIZE = 4
SMALLEST_SQUARE = 1e-30
"""Squared length below which a displacement has no direction."""
CONTEXT_PENALTIES = (0.1, 0.3, 1.0, 3.0)
"""Penalties of the ridge regressions on the context itself that a model weighs, in units of its mean squared length."""
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
        self.attention_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.query_key_value = nn.Linear(size.embedding, 3 * size.embedding, dtype=DTYPE)
        self.attention_out = nn.Linear(size.embedding, size.embedding, dtype=DTYPE)
        self.mlp_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.mlp_in = nn.Linear(size.embedding, 4 * size.embedding, dtype=DTYPE)
        self.mlp_out = nn.Linear(4 * size.embedding, size.embedding, dtype=DTYPE)

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


class Blocks(nn.ModuleList):
    """GPT-2 blocks one after the other; while training with `in_bfloat16` their matrix products are of bfloat16."""

    in_bfloat16 = False

    def __init__(self, size: config.Model):
        super().__init__(Block(size) for _ in range(size.layers))

    def forward(self, hidden_BKE: Tensor) -> Tensor:
        """(B, K, E) to (B, K, E); what is carried from block to block stays float32."""
        with torch.autocast(hidden_BKE.device.type, torch.bfloat16, enabled=self.in_bfloat16 and self.training):
            for block in self:
                hidden_BKE = block(hidden_BKE)
        return hidden_BKE


class CausalTransformer(nn.Module):
    """The causal Transformer (Section 3.3) for tokens of D numbers and trajectories of up to `max_snapshots`."""

    def __init__(self, size: config.Model, token_size: int, max_snapshots: int):
        super().__init__()
        self.size, self.token_size, self.max_snapshots = size, token_size, max_snapshots
        self.embed_token = nn.Linear(token_size, size.embedding, dtype=DTYPE)
        self.embed_snapshot = nn.Embedding(max_snapshots, size.embedding, dtype=DTYPE)
        self.embedding_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.blocks = Blocks(size)
        self.final_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.predict = nn.Linear(size.embedding, token_size, dtype=DTYPE)
        self.apply(_initialise)

    def forward(self, tokens_BKD: Tensor, snapshots_BK: Tensor) -> Tensor:
        """Predicted token of each position's next snapshot, from that position and those before; (B, K, D).

        `snapshots_BK` are the snapshots' indices in their trajectory, int64, below `max_snapshots`.
        """
        embedded_BKE = self.embed_token(tokens_BKD) + self.embed_snapshot(snapshots_BK)
        hidden_BKE = functional.dropout(self.embedding_norm(embedded_BKE), self.size.dropout, self.training)
        return self.predict(self.final_norm(self.blocks(hidden_BKE)))

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

    def save(self, folder: str, about: dict[str, Any] | None = None, beside: Mapping[str, bytes] | None = None) -> None:
        """Write the model, JSON that belongs to it, for `load_about`, and files beside it, for `read_model_file`."""
        described = {"token_size": self.token_size, "max_snapshots": self.max_snapshots}
        _save(self, folder, {**(about or {}), "model": as_table(self.size), **described}, beside or {})

    @classmethod
    def load(cls, folder: str) -> Self:
        """The model that `save` wrote, on the CPU and in evaluation mode. Raises StoreError as `load_model` does."""
        model = load_model(folder)
        if not isinstance(model, cls):
            raise StoreError(f"{folder}: holds a {type(model).__name__}, not a {cls.__name__}; name another folder")
        return model

    @classmethod
    def described_by(cls, about: Mapping[str, Any]) -> Self:
        """An untrained model of the size that model.json says."""
        return cls(config.Model(**about["model"]), about["token_size"], about["max_snapshots"])


def lengths_and_cosines(grams_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of displacements, and cosines between them; (B, K) and (B, K, K)."""
    lengths_BK = grams_BKK.diagonal(dim1=1, dim2=2).clamp_min(SMALLEST_SQUARE).sqrt()
    return lengths_BK, grams_BKK / (lengths_BK[:, :, None] * lengths_BK[:, None])


class ContextRidge(nn.Module):
    """Ridge regression that is fitted on nothing but the context at hand, by the period of PPO's iterations.

    The cosine of a future displacement with one of the context is taken to be what it was one, two, ... iterations
    before, mean over those in the context, and its length likewise. Cosines of which the context has none are 0.
    """

    def __init__(self, context: int, steps: tuple[int, ...], num_phases: int):
        super().__init__()
        # The context knows no cosine between displacements further apart than it is long.
        future = min(max(steps), context)
        before_FK, before_FKKK = _same_phase(context, future, num_phases)
        for name, tensor in (
            # Of float64, as a single context is: to turn them into it would cost more than to use them.
            ("_before_KF", before_FK.T.double()),
            ("_before_NM", before_FKKK.flatten(2).flatten(0, 1).T.double().contiguous()),
            ("_last_H", torch.tensor(steps, device="cpu").clamp(max=future) - 1),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self._before_KF: Tensor
        self._before_NM: Tensor
        self._last_H: Tensor

    def forward(self, grams_BKK: Tensor, penalties_R: Sequence[float]) -> Tensor:
        """Coefficients of the K displacements in each forward step for each of R penalties; (B, H, R, K).

        Penalties are in units of the displacements' mean squared length.
        """
        lengths_BK, cosines_BKK = lengths_and_cosines(grams_BKK)
        context = grams_BKK.shape[1]
        ahead_BF = lengths_BK @ self._before_KF.to(lengths_BK.dtype)
        means_BFK = (cosines_BKK.flatten(1) @ self._before_NM.to(lengths_BK.dtype)).unflatten(1, (-1, context))
        towards_BHK = (means_BFK * ahead_BF[:, :, None] * lengths_BK[:, None]).cumsum(dim=1)[:, self._last_H]
        identity_KK = torch.eye(context, dtype=grams_BKK.dtype, device=grams_BKK.device)
        penalties = torch.as_tensor(penalties_R, dtype=grams_BKK.dtype, device=grams_BKK.device)
        penalties_BR = penalties * lengths_BK.square().mean(dim=1, keepdim=True)
        matrix_BRKK = grams_BKK[:, None] + penalties_BR[:, :, None, None] * identity_KK
        return torch.linalg.solve(matrix_BRKK, towards_BHK.transpose(1, 2)[:, None]).permute(0, 3, 1, 2)


def _same_phase(context: int, future: int, num_phases: int) -> tuple[Tensor, Tensor]:
    """Means over whole iterations back: of a future displacement (F, K), of its pair with a known one (F, K, K, K).

    Displacements are numbered from the context's first on, so those of the future begin at K.
    """
    singles_FK = torch.zeros(future, context, dtype=DTYPE, device="cpu")
    pairs_FKKK = torch.zeros(future, context, context, context, dtype=DTYPE, device="cpu")
    for ahead in range(future):
        own = [index for index in range(context) if (context + ahead - index) % num_phases == 0]
        singles_FK[ahead, own] = 1.0 / max(1, len(own))
        for known in range(context):
            shifts = range(num_phases, known + 1, num_phases)
            found = [(context + ahead - shift, known - shift) for shift in shifts if ahead < shift]
            for later, earlier in found:
                pairs_FKKK[ahead, known, later, earlier] = 1.0 / len(found)
    return singles_FK, pairs_FKKK


class WindowTransformer(nn.Module):
    """TIPL on the basis `window`: each displacement of the context is a token, answered with H coefficients.

    A token holds nothing but the displacement's cosines with the context's others and its length against theirs, the
    phase in which it was made and, if `size.clock` says so, how far the trial has come: neither the number of weights
    nor their scale. The model weighs two kinds of ridge regression against each other, one that other trials were
    fitted on, by phase, which it is given, and `ContextRidge`, and corrects their coefficients.
    """

    def __init__(self, size: config.Model, steps: tuple[int, ...], num_phases: int):
        super().__init__()
        self.size, self.steps, self.num_phases = size, tuple(steps), num_phases
        self.embed_token = nn.Linear(size.context + 1, size.embedding, dtype=DTYPE)
        self.embed_position = nn.Embedding(size.context, size.embedding, dtype=DTYPE)
        self.embed_phase = nn.Embedding(num_phases, size.embedding, dtype=DTYPE)
        self.embed_clock = nn.Linear(CLOCK_SIZE, size.embedding, bias=False, dtype=DTYPE)
        self.blocks = Blocks(size)
        self.final_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.predict = nn.Linear(size.embedding, len(steps), dtype=DTYPE)
        self.weigh = nn.Linear(size.embedding, len(steps) * (1 + len(CONTEXT_PENALTIES)), dtype=DTYPE)
        self.context_ridge = ContextRidge(size.context, self.steps, num_phases)
        self.register_buffer("ridge_QHK", torch.zeros(num_phases, len(steps), size.context, dtype=DTYPE))
        self.ridge_QHK: Tensor
        nn.init.normal_(self.embed_position.weight, std=0.02)
        nn.init.zeros_(self.predict.bias)
        # The first forecasts are the fitted ridge's own, but for a whisper.
        nn.init.normal_(self.predict.weight, std=0.002)
        nn.init.normal_(self.weigh.weight, std=0.002)
        with torch.no_grad():
            self.weigh.bias.copy_(torch.eye(1 + len(CONTEXT_PENALTIES))[0].repeat(len(steps)))

    def forward(self, grams_BKK: Tensor, phases_B: Tensor, progress_B: Tensor, learning_rates_B: Tensor) -> Tensor:
        """Coefficients of the K displacements in each forward step; (B, H, K). What comes in: see `gram.Contexts`."""
        lengths_BK, cosines_BKK = lengths_and_cosines(grams_BKK)
        logs_BK = lengths_BK.log()
        relative_BK = (logs_BK - logs_BK.mean(dim=1, keepdim=True)).clamp(-MOST_LOG_LENGTH, MOST_LOG_LENGTH)
        tokens_BKD = torch.cat((cosines_BKK, relative_BK[:, :, None]), dim=2).float()
        hidden_BKE = self.embed_token(tokens_BKD) + self.embed_position.weight
        if self.size.phase:
            # The last displacement led to the start's phase, the one before it to the phase before.
            ages_K = torch.arange(self.size.context - 1, -1, -1, device=phases_B.device)
            hidden_BKE = hidden_BKE + self.embed_phase((phases_B[:, None] - ages_K) % self.num_phases)
        if self.size.clock != "none":
            clock_B = progress_B if self.size.clock == "progress" else 1.0 - learning_rates_B
            hidden_BKE = hidden_BKE + self.embed_clock(_clock_features(clock_B.float()))[:, None]
        hidden_BKE = functional.dropout(hidden_BKE, self.size.dropout, self.training)
        hidden_BKE = self.final_norm(self.blocks(hidden_BKE))
        fitted_BH1K, own_BHRK = self.ridge_QHK[phases_B][:, :, None], self.context_ridge(grams_BKK, CONTEXT_PENALTIES)
        # The last token alone has seen them all.
        shares_BH1R = self.weigh(hidden_BKE[:, -1]).unflatten(-1, (len(self.steps), 1, -1))
        weighed_BHK = (shares_BH1R @ torch.cat((fitted_BH1K, own_BHRK.float()), dim=2)).squeeze(2)
        return weighed_BHK + self.predict(hidden_BKE).transpose(1, 2)

    def save(self, folder: str, about: dict[str, Any] | None = None, beside: Mapping[str, bytes] | None = None) -> None:
        """Write the model, JSON that belongs to it, for `load_about`, and files beside it, for `read_model_file`."""
        described = {"steps": self.steps, "num_phases": self.num_phases}
        _save(self, folder, {**(about or {}), "model": as_table(self.size), **described}, beside or {})

    @classmethod
    def load(cls, folder: str) -> Self:
        """The model that `save` wrote, on the CPU and in evaluation mode. Raises StoreError as `load_model` does."""
        model = load_model(folder)
        if not isinstance(model, cls):
            raise StoreError(f"{folder}: holds a {type(model).__name__}, not a {cls.__name__}; name another folder")
        return model

    @classmethod
    def described_by(cls, about: Mapping[str, Any]) -> Self:
        """An untrained model of the size that model.json says."""
        return cls(config.Model(**about["model"]), tuple(about["steps"]), about["num_phases"])


def _save(model: nn.Module, folder: str, described: dict[str, Any], beside: Mapping[str, bytes]) -> None:
    """Write all files, model.json last: where it stands, the model is whole."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    described["architecture"] = type(model).__name__
    about = json.dumps(described, indent=1).encode()
    publish(folder, {**beside, WEIGHTS_FILE: safetensors.torch.save(weights), ABOUT_FILE: about}, RECORD_FILE)


MODELS: dict[str, type[CausalTransformer] | type[WindowTransformer]] = {
    kind.__name__: kind for kind in (CausalTransformer, WindowTransformer)
}


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
    """What model.json says of the model in a folder. Raises StoreError where there is none, or it is damaged."""
    content = read_model_file(folder, ABOUT_FILE)
    with understood(folder, ABOUT_FILE):
        about = json.loads(content)
        return {**about, "architecture": about["architecture"]}


def load_model(folder: str) -> "CausalTransformer | WindowTransformer":
    """The model in a folder, whichever it is, on the CPU and in evaluation mode.

    Draws no random number, and takes neither type nor device from torch's defaults. Raises StoreError where there is no
    model, or a damaged one.
    """
    about, content = load_about(folder), read_model_file(folder, WEIGHTS_FILE)
    with understood(folder, ABOUT_FILE), torch.device("meta"):
        model = MODELS[about["architecture"]].described_by(about)
    with understood(folder, WEIGHTS_FILE):
        # A tensor of its own for each, aligned as torch does it: products may depend on that.
        weights = {name: tensor.to(DTYPE, copy=True) for name, tensor in safetensors.torch.load(content).items()}
        model.load_state_dict(weights, assign=True)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("some weights are NaN or infinite")
    return model.eval()


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
