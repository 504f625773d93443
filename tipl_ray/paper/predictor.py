"""TIPL as in the paper (Section 3.3), and the floor of its basis.

Shapes: T snapshots, P policy weights, D numbers per token, B starts, K tokens of context, F and H forward steps.
"""

import weakref

import numpy as np
import torch
from numpy.typing import NDArray

from tipl_ray import config
from tipl_ray.paper.temporal_svd import FittedBasis, basis_of
from tipl_ray.paper.transformer import CausalTransformer, Normaliser
from tipl_ray.predict.gram import Question, check_starts
from tipl_ray.predict.predictor import Predictor, Starts, Trial, Weights


class TrialBasis:
    """The basis of the trajectory at hand, fitted once for as long as that array lives."""

    def __init__(self, basis: config.Basis, shared: FittedBasis | None = None):
        self.config, self.shared = basis, shared
        self._fitted: tuple[weakref.ref[Weights], FittedBasis] | None = None

    @property
    def causal(self) -> bool:
        """Whether tokens depend on nothing later than their own snapshot."""
        return self.config.kind == "shared" or (self.config.kind == "raw" and not self.config.centred)

    def of(self, weights_TP: Weights) -> FittedBasis:
        """Fitted on this very array, which must not change afterwards."""
        if self._fitted is None or self._fitted[0]() is not weights_TP:
            # A weak reference: a trajectory of a gigabyte must not outlive its caller's use of it.
            self._fitted = None
            self._fitted = (weakref.ref(weights_TP), basis_of(weights_TP, self.config, self.shared))
        return self._fitted[1]


class SvdFloor(Predictor):
    """The true future, projected on the trial's basis: what no predictor on that basis can do better than."""

    name, causal = "svd-floor", False

    def __init__(self, question: Question, trial_basis: TrialBasis):
        super().__init__(question)
        self.trial_basis = trial_basis
        self.basis = trial_basis.config.kind

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """Decoded tokens of the snapshots to come. Raises ValueError for a start without its future."""
        check_starts(len(trial.weights_TP), starts_B, self.question.context, self.question.future)
        fitted = self.trial_basis.of(trial.weights_TP)
        future_BH = np.asarray(starts_B)[:, None] + np.asarray(self.question.steps)
        return _decode(fitted, fitted.coordinates_TD[future_BH])


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
        self.basis, self.causal = trial_basis.config.kind, trial_basis.causal

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """See `Predictor.forecast`. Raises ValueError also for tokens of another size than the model's."""
        # Tokens are snapshots here: as many of them as other predictors have displacements.
        check_starts(len(trial.weights_TP), starts_B, self.model.size.context, 0)
        fitted = self.trial_basis.of(trial.weights_TP)
        if fitted.rank != self.model.token_size:
            raise ValueError(f"tokens of {fitted.rank} numbers do not fit a model of {self.model.token_size}")
        snapshots_BK = np.asarray(starts_B, np.int64)[:, None] + np.arange(1 - self.model.size.context, 1)
        tokens_BKD = self.normaliser.normalise(fitted.coordinates_TD[snapshots_BK])
        # A trajectory longer than those of training: its late snapshots all take the last index there was.
        indices_BK = np.minimum(snapshots_BK, self.model.max_snapshots - 1)
        predicted_BFD = self.model.forecast(
            torch.from_numpy(tokens_BKD).to(self.device),
            torch.from_numpy(indices_BK).to(self.device),
            self.question.future,
        )
        predicted_BHD = predicted_BFD[:, np.asarray(self.question.steps) - 1].cpu().numpy()
        return _decode(fitted, self.normaliser.restore(predicted_BHD))


def _decode(fitted: FittedBasis, coordinates_BHD: NDArray[np.float32]) -> Weights:
    num_starts, num_steps, rank = coordinates_BHD.shape
    return fitted.decode(coordinates_BHD.reshape(num_starts * num_steps, rank)).reshape(num_starts, num_steps, -1)
