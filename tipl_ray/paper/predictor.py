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
from tipl_ray.predict.gram import Question, check_starts
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

    def tokens(self, weights_TP: Weights) -> Tokens:
        """The trial in its basis."""
        fitted = self.of(weights_TP)
        if self._tokens is None:
            self._tokens = tokens_of(0, weights_TP, fitted)
        return self._tokens


class SvdFloor(Predictor):
    """The true future, projected on the trial's basis: what no predictor on that basis can do better than."""

    name, causal = "svd-floor", False

    def __init__(self, question: Question, trial_basis: TrialBasis):
        super().__init__(question)
        self.trial_basis = trial_basis
        self.basis = trial_basis.representation.name

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """Decoded tokens of the snapshots to come. Raises ValueError for a start without its future."""
        fitted, future_BH = self.trial_basis.of(trial.weights_TP), self._future(trial, starts_B)
        return _decode(fitted, fitted.coordinates_TD[future_BH])

    def squared_errors(self, trial: Trial, starts_B: Starts) -> NDArray[np.float64]:
        """See `Predictor.squared_errors`: what is outside the basis."""
        return self.trial_basis.tokens(trial.weights_TP).outside_NT[0][self._future(trial, starts_B)]

    def _future(self, trial: Trial, starts_B: Starts) -> NDArray[np.int64]:
        check_starts(len(trial.weights_TP), starts_B, self.question.context, self.question.future)
        return np.asarray(starts_B)[:, None] + np.asarray(self.question.steps)


class Tipl(Predictor):
    """TIPL as in the paper: the causal Transformer's tokens, one step after the other, decoded to weights."""

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
        return _decode(
            fitted,
            forecast_coordinates(self.model, self.normaliser, fitted.coordinates_TD, starts_B, steps_H, self.device),
        )

    def squared_errors(self, trial: Trial, starts_B: Starts) -> NDArray[np.float64]:
        """See `Predictor.squared_errors`: exact, without decoding a forecast."""
        check_starts(len(trial.weights_TP), starts_B, self.question.context, self.question.future)
        self._fitted(trial)
        tokens, steps_H = self.trial_basis.tokens(trial.weights_TP), self.question.steps
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
        errors.append(tokens.squared_errors(trial, found_BHD, some_B[:, None] + np.asarray(steps_H)))
    return np.concatenate(errors)


def _decode(fitted: FittedBasis, coordinates_BHD: NDArray[np.float32]) -> Weights:
    num_starts, num_steps, rank = coordinates_BHD.shape
    return fitted.decode(coordinates_BHD.reshape(num_starts * num_steps, rank)).reshape(num_starts, num_steps, -1)
