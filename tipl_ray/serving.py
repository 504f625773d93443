"""A trained model for its users: `Forecaster`, and as MLflow has it, `mlflow.pyfunc.load_model(...)`, then `predict`.

MLflow imports this module where a logged model names it; the model is safetensors and JSON, and nothing is unpickled.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tipl_ray.experiments import from_table
from tipl_ray.predict.gram import GramBand, Question, check_starts, make_band
from tipl_ray.predict.models import load_about
from tipl_ray.predict.predictor import Trial
from tipl_ray.predict.representation import load_tipl
from tipl_ray.predict.saved import find_model


class Forecaster:
    """Future policy weights from past ones."""

    def __init__(self, folder: str):
        """A trained model in a folder or under a URI. Raises StoreError where there is none, or a damaged one."""
        self.experiment = from_table(load_about(folder)["experiment"])
        self._question = Question.of(self.experiment)
        self._tipl = load_tipl(folder, self._question)

    @classmethod
    def from_pretrained(cls, model: str) -> Self:
        """The model that comes with the package under this name, or the one in a folder, a URI or a whole storage.

        Raises ValueError where there is none, and where there are several, which it lists; StoreError for a damaged
        one.
        """
        return cls(find_model(model))

    @property
    def steps(self) -> tuple[int, ...]:
        """The H forward steps that it answers with, in snapshots, rising."""
        return self._question.steps

    @property
    def context(self) -> int:
        """Displacements that it needs before a start: one less than the snapshots."""
        return self._question.context

    def forecast(
        self,
        weights_TP: ArrayLike,
        starts_B: ArrayLike | None = None,
        *,
        learning_rates_T: ArrayLike | None = None,
        num_snapshots: int | None = None,
    ) -> NDArray[np.float32]:
        """The weights (B, H, P) at the model's forward `steps` after each start.

        `weights_TP` are one trial's snapshots from its first on. `starts_B` has the last known snapshot of each
        forecast, by default the last of all; nothing after it is used, except by a model on the basis `trial`, which
        takes the whole trial. `learning_rates_T` is PPO's at each snapshot. `num_snapshots` is the length that the
        trial is to have, by default that of the trials that the model was trained on: models know how much of a trial
        has passed. Raises ValueError for snapshots that are not (T, P) or more than `num_snapshots`, learning rates
        that are not T, or a start without context.
        """
        weights_TP = np.ascontiguousarray(weights_TP, np.float32)
        if weights_TP.ndim != 2:
            raise ValueError(f"weights has shape {weights_TP.shape}, not (snapshots, policy weights)")
        starts_B = np.atleast_1d(len(weights_TP) - 1 if starts_B is None else starts_B).astype(np.int64)
        check_starts(len(weights_TP), starts_B, self.context, 0)
        if num_snapshots is not None and num_snapshots < len(weights_TP):
            raise ValueError(f"num_snapshots={num_snapshots} is less than the {len(weights_TP)} snapshots given")
        planned = self.experiment.num_snapshots if num_snapshots is None else num_snapshots
        band = self._band(weights_TP, learning_rates_T, planned)
        return self._tipl.forecast(Trial(weights_TP=weights_TP, band=band), starts_B)

    def predict(self, model_input: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> NDArray[np.float32]:
        """What MLflow calls: `forecast` with the entries `weights` and, where they are there, `starts`,
        `learning_rates` and `num_snapshots`. Raises as `forecast` does."""
        return self.forecast(
            model_input["weights"],
            model_input.get("starts"),
            learning_rates_T=model_input.get("learning_rates"),
            num_snapshots=model_input.get("num_snapshots"),
        )

    def _band(self, weights_TP: NDArray[np.float32], rates_T: ArrayLike | None, num_snapshots: int) -> GramBand:
        """As wide and as long as a whole trial's, or the model would mistake a trial that continues for one that
        ends."""
        if rates_T is None and self.experiment.model.clock == "learning_rate":
            raise ValueError("learning_rates is missing, which a model with model.clock='learning_rate' needs as input")
        rates_T = None if rates_T is None else np.asarray(rates_T)
        if rates_T is not None and len(rates_T) != len(weights_TP):
            raise ValueError(f"learning_rates has {len(rates_T)} entries for {len(weights_TP)} snapshots; one each")
        band = make_band(
            weights_TP,
            self._question.width,
            snapshots_per_iteration=self._question.snapshots_per_iteration,
            learning_rates_T=rates_T,
        )
        to_come = max(0, num_snapshots - len(weights_TP))
        return dataclasses.replace(
            band,
            products_SW=np.pad(band.products_SW, ((0, to_come), (0, 0))),
            learning_rates_T=np.pad(band.learning_rates_T, (0, to_come)),
        )


def _load_pyfunc(path: str) -> Forecaster:
    """What MLflow calls."""
    return Forecaster(path)
