"""A predictor of one's own: the last displacement goes on, the less the later in training it is.

    python jobs/evaluate.py --experiment demo --evaluate.predictors examples.recipes.predictor:Fading

It then stands beside the others in the result table, the figures and the report. One that has something to learn also
has `fit`, which is given the training and the validation trials, and keeps what it finds in `self.fitted`; one that
reads the weights themselves inherits `Predictor` and has `forecast`.
"""

import numpy as np
from numpy.typing import NDArray

from tipl_ray.predict.gram import Contexts
from tipl_ray.predict.predictor import Combination


class Fading(Combination):
    """h times what is left of training for the last displacement, 0 for the others."""

    name = "fading"

    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """What each of the context's K displacements counts in each of the H forward steps of B windows; (B, H, K)."""
        left_B = 1.0 - contexts.progress_B
        coefficients_BHK = np.zeros((len(left_B), len(self.question.steps), self.question.context))
        coefficients_BHK[:, :, -1] = np.outer(left_B, self.question.steps)
        return coefficients_BHK
