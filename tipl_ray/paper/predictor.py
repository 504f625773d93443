"""TIPL as in the paper (Section 3.3), and the upper bound of its basis.

Shapes: T snapshots, P policy weights, D numbers per token, B starts, K tokens of context, F and H forward steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from tipl_ray.paper.temporal_svd import FittedBasis
from tipl_ray.paper.tokens import Tokens, tokens_of
from tipl_ray.paper.transformer import CausalTransformer, Normaliser
from tipl_ray.predict.gram import Question, check_starts, moved_squares
from tipl_ray.predict.predictor import Predictor, Starts, Trial, Weights

if TYPE_CHECKING:
    from tipl_ray.paper.representation import TokenRepresentation

WINDOWS_AT_ONCE = 256
"""Windows that are forecast together."""


class TrialBasis:
    """The basis of the trajectory at hand, fitted once for as long as that array lives."""

    def __init__(self, representation: TokenRepresentation, shared: FittedBasis | None = None):
        self.representation, self.shared = representation, shared
        self._fitted: tuple[weakref.ref[Weights], FittedBasis] | None = None
        self._tokens: Tokens | None = None

    def of(self, weights_TP: Weights) -> FittedBasis:
        """Fitted on this very array, which must not change afterwards."""
        if self._fitted is None or self._fitted[0]() is not weights_TP:
            # A weak reference: a trajectory of a gigabyte must not outlive its caller's use of it.
            self._fitted = self._tokens = None
            self._fitted = (weakref.ref(weights_TP), self.representation.fit_trial(weights_TP, self.shared))
        return self._fitted[1]

    def tokens(self, trial: Trial, future: int) -> Tokens:
        """The trial in its basis, and how far its weights move in so many snapshots."""
        fitted = self.of(trial.weights_TP)
        if self._tokens is None or self._tokens.moved_NTF.shape[2] < future:
            moved_TF = moved_squares(trial.band.products_SW, future)
            self._tokens = tokens_of(0, trial.weights_TP, fitted, moved_TF)
        return self._tokens


class SvdFloor(Predictor):
    """The true future, projected on the trial's basis, or with `changes` the last snapshot and the true change since,
    projected: what no predictor on that basis can do better than."""

    name, causal = "svd-floor", False

    def __init__(self, question: Question, trial_basis: TrialBasis, *, changes: bool = False):
        super().__init__(question)
        self.trial_basis, self.changes = trial_basis, changes
        self.basis = trial_basis.representation.name

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """Decoded tokens of the snapshots to come. Raises ValueError for a start without its future."""
        check_starts(len(trial.weights_TP), starts_B, self.question.context, self.question.future)
        fitted = self.trial_basis.of(trial.weights_TP)
        future_BHD = fitted.coordinates_TD[np.asarray(starts_B)[:, None] + np.asarray(self.question.steps)]
        return _weights(fitted, future_BHD, trial, starts_B, self.changes)

    def squared_errors(self, trial: Trial, starts_B: Starts) -> NDArray[np.float64]:
        """See `Predictor.squared_errors`: what is outside the basis."""
        check_starts(len(trial.weights_TP), starts_B, self.question.context, self.question.future)
        tokens = self.trial_basis.tokens(trial, self.question.future)
        return tokens.outside(0, np.asarray(starts_B), self.question.steps, changes=self.changes)


class Tipl(Predictor):
    """TIPL as in the paper: the causal Transformer's tokens, one step after the other, decoded to weights.

    A residual model's forecast is the last snapshot's weights and the decoded change of its token, so that what the
    basis leaves out of a snapshot stays as it was.
    """

    name = "tipl"

    def __init__(
        self,
        question: Question,
        model: CausalTransformer,
        trial_basis: TrialBasis,
        normaliser: Normaliser,
        device: torch.device | str = "cpu",
    ):
        super().__init__(question)
        self.model, self.trial_basis, self.normaliser = model.to(device).eval(), trial_basis, normaliser
        self.device = device
        self.basis, self.causal = trial_basis.representation.name, trial_basis.representation.causal

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """See `Predictor.forecast`. Raises ValueError also for tokens of another size than the model's."""
        # Tokens are snapshots here: as many of them as other predictors have displacements.
        check_starts(len(trial.weights_TP), starts_B, self.model.size.context, 0)
        fitted, steps_H = self._fitted(trial), self.question.steps
        found_BHD = forecast_coordinates(
            self.model, self.normaliser, fitted.coordinates_TD, starts_B, steps_H, self.device
        )
        return _weights(fitted, found_BHD, trial, starts_B, self.model.size.residual)

    def squared_errors(self, trial: Trial, starts_B: Starts) -> NDArray[np.float64]:
        """See `Predictor.squared_errors`: exact, without decoding a forecast."""
        check_starts(len(trial.weights_TP), starts_B, self.question.context, self.question.future)
        self._fitted(trial)
        tokens, steps_H = self.trial_basis.tokens(trial, self.question.future), self.question.steps
        return token_errors(self.model, self.normaliser, tokens, 0, starts_B, steps_H, self.device)

    def _fitted(self, trial: Trial) -> FittedBasis:
        fitted = self.trial_basis.of(trial.weights_TP)
        if fitted.rank != self.model.token_size:
            raise ValueError(f"tokens of {fitted.rank} numbers do not fit a model of {self.model.token_size}")
        return fitted


def forecast_coordinates(
    model: CausalTransformer,
    normaliser: Normaliser,
    coordinates_TD: NDArray[np.float32],
    starts_B: Starts,
    steps_H: Sequence[int],
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """What a model forecasts from the tokens up to each start, one step after the other; coordinates (B, H, D)."""
    snapshots_BK = np.asarray(starts_B, np.int64)[:, None] + np.arange(1 - model.size.context, 1)
    # A trajectory longer than those of training: its late snapshots all take the last index there was.
    indices_BK = np.minimum(snapshots_BK, model.max_snapshots - 1)
    predicted_BFD = model.forecast(
        torch.from_numpy(normaliser.normalise(coordinates_TD[snapshots_BK])).to(device),
        torch.from_numpy(indices_BK).to(device),
        max(steps_H),
    )
    return normaliser.restore(predicted_BFD[:, np.asarray(steps_H) - 1].cpu().numpy())


def token_errors(
    model: CausalTransformer,
    normaliser: Normaliser,
    tokens: Tokens,
    trial: int,
    starts_B: Starts,
    steps_H: Sequence[int],
    device: torch.device | str = "cpu",
) -> NDArray[np.float64]:
    """||w_hat - w||^2 of a model's forecasts at some starts of the trial of this index; (B, H)."""
    errors = []
    for begin in range(0, len(starts_B), WINDOWS_AT_ONCE):
        some_B = np.asarray(starts_B[begin : begin + WINDOWS_AT_ONCE])
        found_BHD = forecast_coordinates(model, normaliser, tokens.coordinates_NTD[trial], some_B, steps_H, device)
        errors.append(tokens.squared_errors(trial, found_BHD, some_B, steps_H, changes=model.size.residual))
    return np.concatenate(errors)


def _weights(
    fitted: FittedBasis, coordinates_BHD: NDArray[np.float32], trial: Trial, starts_B: Starts, changes: bool
) -> Weights:
    """Weights of forecast tokens; with `changes` the last snapshot's, changed as its token does."""
    num_starts, num_steps, rank = coordinates_BHD.shape
    if not changes:
        return fitted.decode(coordinates_BHD.reshape(-1, rank)).reshape(num_starts, num_steps, -1)
    changes_BHD = coordinates_BHD - fitted.coordinates_TD[starts_B][:, None]
    changes_BHP = fitted.decode_change(changes_BHD.reshape(-1, rank)).reshape(num_starts, num_steps, -1)
    return trial.weights_TP[starts_B][:, None] + changes_BHP
