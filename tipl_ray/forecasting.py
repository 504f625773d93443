"""Predictors (Sections 3.3 and 4.2) behind one interface: a trajectory and moments in it in, forward steps out.

Knows weights and the trained model; knows nothing of trials' seeds, of returns or of how a forecast is judged.

Shapes: T snapshots, P policy weights, B moments, K snapshots of context, H forward steps, D numbers per token.
"""

import weakref
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from tipl_ray import config
from tipl_ray.model import CausalTransformer, Normaliser, load_about
from tipl_ray.temporal_svd import FittedBasis, fit_basis

Weights = NDArray[np.float32]


class Predictor(Protocol):
    """Anything that says how policy weights go on."""

    @property
    def name(self) -> str:
        """Name in the result table."""

    @property
    def basis(self) -> str:
        """`none`, or the kind of the basis that it predicts in."""

    @property
    def causal(self) -> bool:
        """Whether a forecast depends on nothing that comes after its start."""

    def forecast(self, weights_TP: Weights, starts_B: NDArray[np.integer], horizon: int) -> Weights:
        """Weights of the H snapshots after each start, the index of the last snapshot known; (B, H, P), read-only.

        Memory grows with B x H x P: callers cut their starts into batches.
        """


class TrialBasis:
    """The basis of the trajectory at hand, fitted once for as long as that array lives."""

    def __init__(self, basis: config.Basis):
        self.config = basis
        self._fitted: tuple[weakref.ref[Weights], FittedBasis] | None = None

    @property
    def causal(self) -> bool:
        """Whether tokens depend on nothing later than their own snapshot."""
        return self.config.kind == "raw" and not self.config.centred

    def of(self, weights_TP: Weights) -> FittedBasis:
        """Fitted on this very array, which must not change afterwards."""
        if self._fitted is None or self._fitted[0]() is not weights_TP:
            # A weak reference: a trajectory of a gigabyte must not outlive its caller's use of it.
            self._fitted = None
            basis = self.config
            fitted = fit_basis(weights_TP, basis.kind, basis.rank, centred=basis.centred, deltas=basis.deltas)
            self._fitted = (weakref.ref(weights_TP), fitted)
        return self._fitted[1]


class CopyLast:
    """Nothing changes: every forward step is the last snapshot known."""

    name, basis, causal = "copy-last", "none", True

    def forecast(self, weights_TP: Weights, starts_B: NDArray[np.integer], horizon: int) -> Weights:
        """The start's weights, H times; a view that takes no memory of its own."""
        last_B1P = weights_TP[starts_B][:, None]
        return np.broadcast_to(last_B1P, (len(starts_B), horizon, weights_TP.shape[1]))


class Linear:
    """The last displacement goes on: 2-point linear extrapolation."""

    name, basis, causal = "linear", "none", True

    def forecast(self, weights_TP: Weights, starts_B: NDArray[np.integer], horizon: int) -> Weights:
        """w_t + h (w_t - w_{t-1}). Raises ValueError for a start without a snapshot before it."""
        _check_starts(weights_TP, starts_B, context=2, horizon=0)
        last_BP = weights_TP[starts_B]
        displacement_BP = last_BP - weights_TP[np.asarray(starts_B) - 1]
        steps_H = np.arange(1, horizon + 1, dtype=np.float32)
        return last_BP[:, None] + steps_H[:, None] * displacement_BP[:, None]


class SvdFloor:
    """The true future, projected on the trial's basis: what no predictor on that basis can do better than."""

    name, causal = "svd-floor", False

    def __init__(self, trial_basis: TrialBasis):
        self.trial_basis = trial_basis
        self.basis: str = trial_basis.config.kind

    def forecast(self, weights_TP: Weights, starts_B: NDArray[np.integer], horizon: int) -> Weights:
        """Decoded tokens of the snapshots to come. Raises ValueError for a start with fewer than H after it."""
        _check_starts(weights_TP, starts_B, context=1, horizon=horizon)
        fitted = self.trial_basis.of(weights_TP)
        future_BH = np.asarray(starts_B)[:, None] + np.arange(1, horizon + 1)
        return _decode(fitted, fitted.coordinates_TD[future_BH])


class Tipl:
    """TIPL: the causal Transformer's tokens, one step after the other, decoded to weights."""

    name = "tipl"

    def __init__(
        self,
        model: CausalTransformer,
        trial_basis: TrialBasis,
        normaliser: Normaliser,
        device: torch.device | str = "cpu",
    ):
        self.model, self.trial_basis, self.normaliser = model.to(device).eval(), trial_basis, normaliser
        self.device = device
        self.basis: str = trial_basis.config.kind
        self.causal: bool = trial_basis.causal

    @classmethod
    def load(cls, folder: str, device: torch.device | str = "cpu") -> Self:
        """TIPL as training left it in a folder or under a URI. Raises FileNotFoundError if there is none."""
        about = load_about(folder)
        trial_basis = TrialBasis(config.Basis(**about["basis"]))
        return cls(CausalTransformer.load(folder), trial_basis, Normaliser.from_table(about["normaliser"]), device)

    def forecast(self, weights_TP: Weights, starts_B: NDArray[np.integer], horizon: int) -> Weights:
        """Raises ValueError for a start with fewer than K snapshots, or for tokens of another size than the model's."""
        _check_starts(weights_TP, starts_B, context=self.model.size.context, horizon=0)
        fitted = self.trial_basis.of(weights_TP)
        if fitted.rank != self.model.token_size:
            raise ValueError(f"tokens of {fitted.rank} numbers do not fit a model of {self.model.token_size}")
        snapshots_BK = np.asarray(starts_B, np.int64)[:, None] + np.arange(1 - self.model.size.context, 1)
        tokens_BKD = self.normaliser.normalise(fitted.coordinates_TD[snapshots_BK])
        # A trajectory longer than those of training: its late snapshots all take the last index there was.
        indices_BK = np.minimum(snapshots_BK, self.model.max_snapshots - 1)
        predicted_BHD = self.model.forecast(
            torch.from_numpy(tokens_BKD).to(self.device), torch.from_numpy(indices_BK).to(self.device), horizon
        )
        return _decode(fitted, self.normaliser.restore(predicted_BHD.cpu().numpy()))


def _decode(fitted: FittedBasis, coordinates_BHD: NDArray[np.float32]) -> Weights:
    num_starts, horizon, rank = coordinates_BHD.shape
    return fitted.decode(coordinates_BHD.reshape(num_starts * horizon, rank)).reshape(num_starts, horizon, -1)


def _check_starts(weights_TP: Weights, starts_B: NDArray[np.integer], context: int, horizon: int) -> None:
    first, last = context - 1, len(weights_TP) - 1 - horizon
    outside = [int(start) for start in starts_B if not first <= start <= last]
    if outside:
        raise ValueError(
            f"start={outside[0]} is not between {first} and {last}: {context} snapshots are needed up to it and "
            f"{horizon} after it, of {len(weights_TP)}"
        )
