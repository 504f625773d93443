"""TIPL on the basis `window`, its upper bound, and the ridge regression that it contains.

Shapes: T snapshots, P policy weights, B starts, K displacements of context, F of future, N = K + F, H forward steps, Q
phases of a PPO iteration.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from tipl_ray.predict.baselines import SMALLEST_EIGENVALUE
from tipl_ray.predict.gram import Contexts, GramBand, Question, future_sums, squared_errors
from tipl_ray.predict.predictor import Combination, PhaseTable, Predictor, Starts, Trial, Weights, combine
from tipl_ray.window.transformer import WindowTransformer


class RidgeElsewhere(PhaseTable):
    """The ridge regression inside a model: fitted on what the model was trained on, which is not this task."""

    name = "ridge-elsewhere"

    def __init__(self, question: Question, model: WindowTransformer):
        super().__init__(question)
        self.model = model

    def table_QHK(self) -> NDArray[np.float64]:
        """As the model keeps it."""
        return self.model.ridge_QHK.double().cpu().numpy()


class WindowFloor(Predictor):
    """The true future, projected onto the span of the context's displacements: the upper bound of every
    `Combination`."""

    name, basis, causal = "window-floor", "window", False

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """See `Predictor.forecast`. Raises ValueError for a start without its future."""
        return combine(trial.weights_TP, starts_B, self._coefficients(self._windows(trial.band, starts_B)))

    def squared_errors(self, trial: Trial, starts_B: Starts) -> NDArray[np.float64]:
        """Exact, from the Gram band alone."""
        return self.band_errors(trial.band, starts_B)

    def band_errors(self, band: GramBand, starts_B: Starts) -> NDArray[np.float64]:
        """As `squared_errors`, of a trial whose weights are not at hand."""
        grams_BNN = self._windows(band, starts_B)
        return squared_errors(grams_BNN, self._coefficients(grams_BNN), self.question.steps)

    def _windows(self, band: GramBand, starts_B: Starts) -> NDArray[np.float64]:
        return band.windows(starts_B, self.question.context, self.question.future)

    def _coefficients(self, grams_BNN: NDArray[np.float64]) -> NDArray[np.float64]:
        context = self.question.context
        towards_BHK = future_sums(self.question.steps) @ grams_BNN[:, context:, :context]
        inverse_BKK = np.linalg.pinv(grams_BNN[:, :context, :context], rcond=SMALLEST_EIGENVALUE, hermitian=True)
        return towards_BHK @ inverse_BKK


class WindowTipl(Combination):
    """TIPL on the causal basis `window`: a Transformer over displacements answers with coefficients."""

    name, basis = "tipl", "window"

    def __init__(self, question: Question, model: WindowTransformer, device: torch.device | str = "cpu"):
        super().__init__(question)
        model.check_question(question)
        self.model, self.device = model.to(device).eval(), device

    @torch.inference_mode()
    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """The model's answer, in batches; that of its ridge alone where a displacement of the context is 0.

        So it is before a context is full, and after weights stood still: the model has seen no such thing.
        """
        answers = []
        # A user's loop may jump under autocast; the model answers in its own type.
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for begin in range(0, len(contexts.phases_B), 512):
                parts = (torch.from_numpy(np.asarray(part[begin : begin + 512])).to(self.device) for part in contexts)
                answers.append(self.model(*parts).double().cpu().numpy())
        answer_BHK = np.concatenate(answers)
        still_B = np.any(np.diagonal(contexts.grams_BKK, axis1=1, axis2=2) <= 0, axis=1)
        if still_B.any():
            answer_BHK[still_B] = self.model.ridge_QHK.double().cpu().numpy()[contexts.phases_B[still_B]]
        return answer_BHK
