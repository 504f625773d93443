"""Context windows (Section 3.3): trajectories become tokens or Gram bands, and those the Transformers' batches.

Knows the data set and the basis; knows nothing of the model beyond its context length, nor of how it is trained.
A trial is read, reduced and let go before the next: only its tokens, or its band, stay.

Shapes: N trials, T snapshots, P policy weights, D numbers per token, B windows, K tokens of context, W width of a band,
S displacements of a trial, or of all of them, H forward steps. In `WindowSegments`, N windows in all.
"""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl_ray import config
from tipl_ray.data.rows import Rows
from tipl_ray.data.storage import StoreError, file_exists, join, publish, read_published
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.paper.temporal_svd import FittedBasis, basis_of
from tipl_ray.predict.gram import GramBand, Question, band_index, banded_products, squared_errors
from tipl_ray.predict.model import Normaliser

SNAPSHOTS_AT_ONCE = 64
"""Snapshots that are decoded at a time when the basis is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """Whole trials in their bases, and what it takes to judge a forecast in weights without the weights."""

    seeds: tuple[int, ...]
    """The N trials."""
    coordinates_NTD: NDArray[np.float32]
    """Each trial's coordinates in its own basis, not normalised."""
    singular_values_ND: NDArray[np.float64]
    """Weights that a coordinate's unit stands for."""
    outside_NT: NDArray[np.float64]
    """Squared distance of each snapshot's weights from its basis."""
    displacement_NT: NDArray[np.float64]
    """Squared distance of each snapshot's weights from those of the snapshot before; 0 for the first."""

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """One stack of several. Raises ValueError if their trials differ in snapshots or token size."""
        shapes = {part.seeds[0]: part.coordinates_NTD.shape[1:] for part in parts}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"trial {seed}: {shape[0]} x {shape[1]}" for seed, shape in shapes.items())
            raise ValueError(f"trials differ in snapshots x token size: {listed}")
        arrays = [field.name for field in dataclasses.fields(cls) if field.name != "seeds"]
        return cls(
            seeds=tuple(seed for part in parts for seed in part.seeds),
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
        )

    def truncated(self, rank: int) -> "Tokens":
        """The same trials in the leading part of their bases, as if they had been reduced to that SVD rank.

        What is left out stands at right angles to what stays, so its square adds to that of what was outside before.
        """
        left_out_NTd = self.coordinates_NTD[..., rank:] * self.singular_values_ND[:, None, rank:]
        return dataclasses.replace(
            self,
            coordinates_NTD=self.coordinates_NTD[..., :rank],
            singular_values_ND=self.singular_values_ND[:, :rank],
            outside_NT=self.outside_NT + np.square(left_out_NTd).sum(axis=-1),
        )


def load_tokens(
    store: TrajectoryStore, seeds: Sequence[int], basis: config.Basis, shared: FittedBasis | None = None
) -> Tokens:
    """Tokens of some trials, each in a basis of its own or all in the shared one, read one trial at a time.

    Raises StoreError where the data set is damaged, ValueError where a trial does not fit the basis or the others.
    """
    return Tokens.stack([_reduce(store, seed, basis, shared) for seed in seeds])


def _reduce(store: TrajectoryStore, seed: int, basis: config.Basis, shared: FittedBasis | None) -> Tokens:
    weights_TP = store.weights(seed)
    try:
        fitted = basis_of(weights_TP, basis, shared)
    except ValueError as error:
        raise ValueError(f"trial {seed}: {error}") from error
    return tokens_of(seed, weights_TP, fitted)


def tokens_of(seed: int, weights_TP: Rows, fitted: FittedBasis) -> Tokens:
    """Tokens of one trial whose basis is fitted."""
    num_snapshots = weights_TP.shape[0]
    outside_T, displacement_T = np.zeros(num_snapshots), np.zeros(num_snapshots)
    for start in range(0, num_snapshots, SNAPSHOTS_AT_ONCE):
        part, before = slice(start, start + SNAPSHOTS_AT_ONCE), min(start, 1)
        some_TP = weights_TP[start - before : part.stop].astype(np.float64)
        displacement_T[start + 1 - before : part.stop] = np.square(np.diff(some_TP, axis=0)).sum(axis=1)
        if fitted.kind != "raw":
            outside_TP = some_TP[before:] - fitted.decode(fitted.coordinates_TD[part])
            outside_T[part] = np.square(outside_TP).sum(axis=1)
    return Tokens(
        seeds=(seed,),
        coordinates_NTD=fitted.coordinates_TD[None],
        singular_values_ND=fitted.singular_values_D[None],
        outside_NT=outside_T[None],
        displacement_NT=displacement_T[None],
    )


def load_band(storage: str, seed: int, question: Question) -> GramBand:
    """The Gram band of a trial, wide enough for the question's windows.

    Computed once per data set and width: the products are kept in <storage>/grams, and made anew where what is there is
    not what was kept. Raises StoreError where the data set is damaged.
    """
    store = TrajectoryStore(storage)
    folder, name = join(storage, "grams"), f"{store.digest([seed])}-{question.width}"
    rates_T = store.trajectory(seed, columns=("learning_rate",)).learning_rates_T
    products_SW = _kept_products(folder, name, (len(rates_T) - 1, question.width))
    if products_SW is None:
        products_SW = banded_products(store.weights(seed), question.width)
        content = io.BytesIO()
        np.save(content, products_SW, allow_pickle=False)
        # Where it cannot be kept, as in a storage that can only be read, it is made again the next time.
        with contextlib.suppress(StoreError):
            publish(folder, {f"{name}.npy": content.getvalue()}, f"{name}.sha256")
    return GramBand(
        products_SW=products_SW,
        learning_rates_T=rates_T / rates_T[0],
        snapshots_per_iteration=question.snapshots_per_iteration,
    )


def _kept_products(folder: str, name: str, shape: tuple[int, int]) -> NDArray[np.float64] | None:
    """The products that `load_band` kept; None where there are none, or others."""
    try:
        if not file_exists(folder, f"{name}.sha256"):
            return None
        content = read_published(folder, f"{name}.npy", f"{name}.sha256", "it is made anew")
        products_SW = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (StoreError, ValueError):
        return None
    whole = products_SW.shape == shape and products_SW.dtype == np.float64 and np.isfinite(products_SW).all()
    return products_SW if whole else None


MOST_CONTRAST = 8.0
"""How unequal the parts of a policy that is made of several can be: the deviation of the logarithms of their scales."""


class Batch(NamedTuple):
    """Windows as the model takes them, normalised."""

    tokens_BKD: Tensor
    snapshots_BK: Tensor
    """Index of each token's snapshot in its trajectory."""
    targets_BKD: Tensor
    """The token of each one's next snapshot."""


class Segments:
    """Every context window of some trials, gathered where the model is: no loader, no Python per window."""

    def __init__(self, tokens: Tokens, normaliser: Normaliser, context: int, device: torch.device | str = "cpu"):
        num_trials, self.num_snapshots, self.token_size = tokens.coordinates_NTD.shape
        self.context, self.windows_per_trial = context, self.num_snapshots - context
        if self.windows_per_trial < 1:
            raise ValueError(
                f"model.context={context} leaves no window with a next snapshot in the {self.num_snapshots} snapshots "
                "of a trial"
            )
        self.num_windows = num_trials * self.windows_per_trial
        self._tokens_SD = torch.from_numpy(normaliser.normalise(tokens.coordinates_NTD)).to(device).flatten(0, 1)
        self._scales_ND = torch.from_numpy(tokens.singular_values_ND * normaliser.deviation_D).to(device)
        self._outside_S = torch.tensor(tokens.outside_NT, device=device).flatten()
        self._displacement_S = torch.tensor(tokens.displacement_NT, device=device).flatten()
        self._offsets_K = torch.arange(context, device=device)

    def gather(self, windows_B: NDArray[np.int64]) -> Batch:
        """The windows of these numbers, below `num_windows`, trial by trial and in each by their first snapshot."""
        trials_B, firsts_B = self._locate(windows_B)
        snapshots_BK = firsts_B[:, None] + self._offsets_K
        rows_BK = trials_B[:, None] * self.num_snapshots + snapshots_BK
        return Batch(self._tokens_SD[rows_BK], snapshots_BK, self._tokens_SD[rows_BK + 1])

    def batch(self, step: int, batch_size: int, seed: int, rank: int = 0, num_workers: int = 1) -> Batch:
        """One worker's share of a step's global batch, a pure function of the arguments: see `draw_windows`."""
        return self.gather(draw_windows(self.num_windows, step, batch_size, seed, rank, num_workers))

    def one_step_errors(self, windows_B: NDArray[np.int64], predicted_BD: Tensor) -> tuple[Tensor, Tensor]:
        """||w_hat - w||^2 of the snapshot after each window, and ||w_t - w_{t+1}||^2; float64, (B,) each.

        Exact without the weights: inside the basis a coordinate counts with its singular value, and what the true
        weights have outside the basis stands at right angles to it.
        """
        trials_B, firsts_B = self._locate(windows_B)
        rows_B = trials_B * self.num_snapshots + firsts_B + self.context
        inside_BD = (predicted_BD - self._tokens_SD[rows_B]) * self._scales_ND[trials_B]
        return inside_BD.square().sum(dim=1) + self._outside_S[rows_B], self._displacement_S[rows_B]

    def _locate(self, windows_B: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(windows_B).to(self._offsets_K.device, non_blocking=True)
        trials_B = windows // self.windows_per_trial
        return trials_B, windows - trials_B * self.windows_per_trial


class WindowBatch(NamedTuple):
    """Windows of displacements as the model and its loss take them, in units of the scales; see `gram.Contexts`."""

    grams_BKK: Tensor
    """Inner products of the context's displacements."""
    towards_BHK: Tensor
    """Inner products of the true displacement at each forward step with the context's."""
    moved_BH: Tensor
    """Squared length of the true displacement at each forward step."""
    phases_B: Tensor
    progress_B: Tensor
    learning_rates_B: Tensor
    scales_B: Tensor
    """Mean squared length of the context's displacements."""


class WindowSegments:
    """Every window of some trials' Gram bands, gathered where the model is: no loader, no Python per window.

    `moved_H` are the mean squared displacements at each forward step, `shares_N` each window's own as a share of them,
    mean over steps: what a window counts in the skill over all of them. Trials may differ in length.
    """

    def __init__(self, bands: Sequence[GramBand], question: Question, device: torch.device | str = "cpu"):
        self.question = question
        for band in bands:
            if band.num_snapshots <= question.width:
                raise ValueError(
                    f"model.context={question.context} and forward step {question.future} leave no window in the "
                    f"{band.num_snapshots} snapshots of a trial"
                )
        context, steps_H = question.context, np.asarray(question.steps)
        starts = [np.arange(context, band.num_snapshots - question.future) for band in bands]
        contexts = [band.contexts(starts_B, context) for band, starts_B in zip(bands, starts, strict=True)]
        begins = np.cumsum([0, *(len(band.products_SW) for band in bands)])
        moved_NH = np.concatenate([_displacements(*pair, question) for pair in zip(bands, starts, strict=True)])
        mean_H = moved_NH.mean(axis=0)
        self.num_windows = len(moved_NH)
        self.moved_H = np.where(mean_H > 0, mean_H, 1.0)
        self.shares_N = (moved_NH / self.moved_H).mean(axis=1)

        def on_device(array: NDArray) -> Tensor:
            return torch.from_numpy(array).to(device)

        products_SW = np.concatenate([band.products_SW for band in bands])
        self._products_SW, self._sums_SW = on_device(products_SW), on_device(products_SW.cumsum(axis=1))
        self._firsts_N = on_device(np.concatenate([b + s - context for b, s in zip(begins[:-1], starts, strict=True)]))
        self._moved_NH = on_device(moved_NH)
        self._phases_N = on_device(np.concatenate([told.phases_B for told in contexts]))
        self._progress_N = on_device(np.concatenate([told.progress_B for told in contexts])).float()
        self._rates_N = on_device(np.concatenate([told.learning_rates_B for told in contexts])).float()
        self._row_KK, self._column_KK = (on_device(index) for index in band_index(context))
        # The displacement k of the context has those of the future in the columns from K - k on.
        self._before_K = on_device(np.arange(context)[::-1].copy())
        self._until_HK = self._before_K + on_device(steps_H)[:, None]

    def gather(self, windows_B: NDArray[np.int64]) -> WindowBatch:
        """The windows of these numbers, below `num_windows`, trial by trial and in each by their first displacement."""
        windows = torch.from_numpy(windows_B).to(self._firsts_N.device, non_blocking=True)
        firsts_B = self._firsts_N[windows]
        grams_BKK = self._products_SW[firsts_B[:, None, None] + self._row_KK, self._column_KK]
        rows_B1K = firsts_B[:, None, None] + torch.arange(self.question.context, device=firsts_B.device)
        towards_BHK = self._sums_SW[rows_B1K, self._until_HK] - self._sums_SW[rows_B1K, self._before_K]
        scales_B = grams_BKK.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return WindowBatch(
            grams_BKK=(grams_BKK / scales_B[:, None, None]).float(),
            towards_BHK=(towards_BHK / scales_B[:, None, None]).float(),
            moved_BH=(self._moved_NH[windows] / scales_B[:, None]).float(),
            phases_B=self._phases_N[windows],
            progress_B=self._progress_N[windows],
            learning_rates_B=self._rates_N[windows],
            scales_B=scales_B,
        )


def side_by_side(batch: WindowBatch, steps_H: Sequence[int], num_phases: int, share: float) -> WindowBatch:
    """Put some of a batch's windows beside others, and beside made-up ones, so that they stand for other policies.

    The weights of several policies, each at a scale of its own, are the weights of a larger one, whose displacements'
    inner products are the sum of theirs. Partners are of the same phase. The made-up ones repeat themselves with PPO's
    iterations and otherwise differ in how alike displacements are within one, and from one to the next.
    """
    (size, context), device = batch.grams_BKK.shape[:2], batch.phases_B.device
    made: dict[str, Any] = {"dtype": batch.grams_BKK.dtype, "device": device}
    contrast_B1 = MOST_CONTRAST * torch.rand(size, 1, **made)
    apart_BB = batch.phases_B[:, None] != batch.phases_B
    parts_BB = (contrast_B1 * torch.randn(size, size, **made)).masked_fill(apart_BB, -torch.inf).softmax(dim=1)
    joined_B1 = torch.rand(size, 1, **made) < share
    parts_BB = torch.where(joined_B1, parts_BB, torch.eye(size, **made))
    made_up_BNN = periodic_grams(batch.phases_B, context, max(steps_H), num_phases)
    scales_B1 = torch.where(joined_B1, torch.exp(2.0 * torch.randn(size, 1, **made)), 0.0)
    sums_HF = (torch.arange(max(steps_H), device=device) < torch.as_tensor(steps_H, device=device)[:, None]).float()
    ahead_BHN = sums_HF @ made_up_BNN[:, context:]
    made_up = {
        "grams_BKK": made_up_BNN[:, :context, :context],
        "towards_BHK": ahead_BHN[:, :, :context],
        "moved_BH": (ahead_BHN[:, :, context:] * sums_HF).sum(dim=2),
    }
    joined = {}
    for name, other in made_up.items():
        own = getattr(batch, name)
        joined[name] = (parts_BB @ own.flatten(1) + scales_B1 * other.flatten(1)).view_as(own)
    # Whoever it stands for, a window counts as much as it did.
    return batch._replace(**joined, scales_B=batch.scales_B / (1.0 + scales_B1[:, 0]))


def periodic_grams(phases_B: Tensor, context: int, future: int, num_phases: int) -> Tensor:
    """Gram matrices of displacements whose inner products repeat with PPO's iterations, of mean squared length 1;
    (B, N, N).

    As of policies with very many weights: the inner products are what they are expected to be.
    """
    size, device = len(phases_B), phases_B.device
    made: dict[str, Any] = {"dtype": torch.float32, "device": device}
    alike_B11, memory_B11, carried_B11 = torch.rand(3, size, 1, 1, **made)
    lengths_BQ = torch.exp(0.3 * torch.randn(size, num_phases, **made))
    # Displacement n of the window leads to snapshot n + 1 - K after the start.
    places_BN = phases_B[:, None] + torch.arange(1 - context, 1 + future, device=device) - 1
    iterations_BN, phases_BN = places_BN.div(num_phases, rounding_mode="floor"), places_BN % num_phases
    apart_BNN = (phases_BN[:, :, None] - phases_BN[:, None]).abs()
    between_BNN = (iterations_BN[:, :, None] - iterations_BN[:, None]).abs()
    same_BNN = torch.eye(context + future, **made)
    cosines_BNN = alike_B11 * memory_B11**apart_BNN * (0.5 * carried_B11) ** between_BNN
    cosines_BNN = torch.where(same_BNN > 0, 1.0, cosines_BNN)
    lengths_BN = lengths_BQ.gather(1, phases_BN)
    lengths_BN = lengths_BN / lengths_BQ.square().mean(dim=1, keepdim=True).sqrt()
    return cosines_BNN * lengths_BN[:, :, None] * lengths_BN[:, None]


def _displacements(band: GramBand, starts_B: NDArray[np.int64], question: Question) -> NDArray[np.float64]:
    """||w_t - w_{t+h}||^2 of some windows at every forward step; (B, H)."""
    nothing_BHK = np.zeros((len(starts_B), len(question.steps), 0))
    return squared_errors(band.windows(starts_B, 0, question.future), nothing_BHK, question.steps)


def draw_windows(
    chances: int | NDArray[np.float64], step: int, batch_size: int, seed: int, rank: int = 0, num_workers: int = 1
) -> NDArray[np.int64]:
    """One worker's share of the windows that a step trains on, drawn with replacement.

    `chances` are the number of windows, all of them as likely, or the window's probabilities, summed up to each. The
    step is the counter of a counter-based generator: no state to save, and the union over the workers is the same
    global batch whatever their number, which must divide the batch size.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    if isinstance(chances, int):
        return generator.integers(chances, size=batch_size)[rank::num_workers]
    return np.searchsorted(chances, generator.random(batch_size), side="right")[rank::num_workers]
