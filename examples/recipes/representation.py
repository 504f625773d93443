"""A representation of one's own: weights projected on random directions, the same for every trial.

    python jobs/train.py --preset paper --basis.kind examples.recipes.representation:RandomProjection
    python jobs/evaluate.py --preset paper --basis.kind examples.recipes.representation:RandomProjection

Tokens of whatever kind need a basis for each trial and nothing else. One that is no basis of tokens inherits
`tipl_ray.predict.representation.Representation` itself, as `tipl_ray.window.representation` does.
"""

import numpy as np

from tipl_ray.data.rows import Rows
from tipl_ray.paper.representation import TokenRepresentation
from tipl_ray.paper.temporal_svd import FittedBasis


class RandomProjection(TokenRepresentation):
    """`basis.rank` orthonormal directions, drawn once: causal, and blind to what the trial does."""

    causal = True

    def fit_trial(self, weights_TP: Rows, shared: FittedBasis | None) -> FittedBasis:
        """The directions, with the trial's coordinates on them as tokens. Raises ValueError for more than P of them."""
        num_weights, rank = weights_TP.shape[1], self.basis.rank
        if rank > num_weights:
            raise ValueError(f"basis.rank={rank} exceeds the {num_weights} weights of a policy")
        directions_PD, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((num_weights, rank)))
        return FittedBasis(
            rank=rank,
            coordinates_TD=(weights_TP[:] @ directions_PD).astype(np.float32),
            singular_values_D=np.ones(rank),
            basis_PD=directions_PD.astype(np.float32),
            origin_P=np.zeros(num_weights, np.float32),
        )
