"""Our representation: a context is its displacements, through their inner products; causal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tipl_ray import config
from tipl_ray.predict.bands import load_band
from tipl_ray.predict.gram import GramBand, Question
from tipl_ray.predict.representation import Representation, TrainingData

if TYPE_CHECKING:
    import torch

    from tipl_ray.predict.predictor import Predictor
    from tipl_ray.window.objective import WindowError
    from tipl_ray.window.predictor import WindowTipl


class Window(Representation):
    """Each displacement of the context is one token, whatever the number of weights that it moves."""

    own_predictors = ("tipl", "ridge-elsewhere", "window-floor")
    across_tasks = can_jump = one_thread = True

    def without_effect(self) -> dict[str, str]:
        """See `Representation.without_effect`."""
        without_svd = dict.fromkeys(("basis.rank",), "basis.kind=window fits no Temporal SVD")
        return {**without_svd, "model.residual": "it is for bases of tokens"}

    def learned_steps(self, evaluate: config.Evaluate) -> tuple[int, ...]:
        """All of them: they are learned at once."""
        return evaluate.steps

    def read(self, storage: str, seed: int, question: Question, shared: Any = None) -> GramBand:
        """See `Representation.read`."""
        return load_band(storage, seed, question)

    def gather(self, sets: Sequence[Sequence[GramBand]]) -> list[GramBand]:
        """See `Representation.gather`."""
        bands = []
        for trials in sets:
            moved = sum(band.products_SW[:, 0].sum() for band in trials) if len(sets) > 1 else 1.0
            bands += [dataclasses.replace(band, products_SW=band.products_SW / (moved or 1.0)) for band in trials]
        return bands

    def objective(
        self, experiment: config.Experiment, data: TrainingData, device: torch.device | str = "cpu"
    ) -> WindowError:
        """See `Representation.objective`."""
        from tipl_ray.window.objective import WindowError

        question, joined = Question.of(experiment), experiment.train.joined_windows
        return WindowError(experiment.model, question, data.train, data.validation, device, joined)

    def load(self, folder: str, question: Question | None, device: torch.device | str = "cpu") -> WindowTipl:
        """See `Representation.load`. Raises ValueError for a question that the model was not trained for."""
        from tipl_ray.window.predictor import WindowTipl
        from tipl_ray.window.transformer import WindowTransformer

        model = WindowTransformer.load(folder)
        return WindowTipl(question or model.question, model, device)

    def companions(self, tipl: Predictor, *, elsewhere: bool) -> tuple[list[Predictor], Predictor]:
        """See `Representation.companions`."""
        from tipl_ray.window.predictor import RidgeElsewhere, WindowFloor, WindowTipl

        assert isinstance(tipl, WindowTipl), "TIPL is what `load` returned"
        return [RidgeElsewhere(tipl.question, tipl.model)] if elsewhere else [], WindowFloor(tipl.question)
