"""Our second representation: each weight by its own past and tensor, next to the displacements of all; causal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tipl_ray import config
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.predict.bands import load_band
from tipl_ray.predict.gram import Question
from tipl_ray.predict.representation import Representation, TrainingData

if TYPE_CHECKING:
    from typing import Any

    import torch

    from tipl_ray.per_weight.objective import PerWeightError
    from tipl_ray.per_weight.predictor import PerWeightTipl
    from tipl_ray.per_weight.samples import WeightSample
    from tipl_ray.predict.predictor import Predictor


class PerWeight(Representation):
    """The basis `window`, with a correction for each weight; for policies of one layout, and not for jumps."""

    own_predictors, one_thread = ("tipl",), True

    def without_effect(self) -> dict[str, str]:
        """See `Representation.without_effect`."""
        return {
            "basis.rank": "basis.kind=per-weight fits no Temporal SVD",
            "model.residual": "it is for bases of tokens",
            "train.joined_windows": "joined windows have no single weights",
        }

    def learned_steps(self, evaluate: config.Evaluate) -> tuple[int, ...]:
        """All of them: they are learned at once."""
        return evaluate.steps

    def read(self, storage: str, seed: int, question: Question, shared: Any = None) -> WeightSample:
        """See `Representation.read`."""
        from tipl_ray.per_weight.samples import sample_weights

        store = TrajectoryStore(storage)
        return sample_weights(
            store.weights(seed), store.header([seed]).layout, load_band(storage, seed, question), seed
        )

    def gather(self, sets: Sequence[Sequence[WeightSample]]) -> list[WeightSample]:
        """See `Representation.gather`."""
        return [sample for trials in sets for sample in trials]

    def objective(
        self, experiment: config.Experiment, data: TrainingData, device: torch.device | str = "cpu"
    ) -> PerWeightError:
        """See `Representation.objective`."""
        from tipl_ray.per_weight.objective import PerWeightError

        return PerWeightError(experiment.model, Question.of(experiment), data.train, data.validation, device)

    def load(self, folder: str, question: Question | None, device: torch.device | str = "cpu") -> PerWeightTipl:
        """See `Representation.load`. Raises ValueError for a question that the model was not trained for."""
        from tipl_ray.per_weight.predictor import PerWeightTipl
        from tipl_ray.per_weight.transformer import PerWeightTransformer

        model = PerWeightTransformer.load(folder)
        return PerWeightTipl(question or model.trunk.question, model, device)

    def companions(self, tipl: Predictor, *, elsewhere: bool) -> tuple[list[Predictor], None]:
        """See `Representation.companions`: nothing is out of its reach."""
        return [], None
