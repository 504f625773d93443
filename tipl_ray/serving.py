"""A trained model as MLflow's users load it: `mlflow.pyfunc.load_model(...)`, then `predict`.

MLflow imports this module where a logged model names it; the model is safetensors and JSON, and nothing is unpickled.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl_ray.experiments import from_table
from tipl_ray.predict.gram import GramBand, Question, check_starts, make_band
from tipl_ray.predict.models import load_about
from tipl_ray.predict.predictor import Trial
from tipl_ray.predict.representation import load_tipl


class Forecaster:
    """Future policy weights from past ones."""

    def __init__(self, folder: str):
        self.experiment = from_table(load_about(folder)["experiment"])
        self._question = Question.of(self.experiment)
        self._tipl = load_tipl(folder, self._question)

    def predict(self, model_input: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> NDArray[np.float32]:
        """Weights at the model's forward steps after each start; (B, H, P).

        `model_input` has `weights`, one trial's snapshots from its first on, (T, P); optionally `starts`, the last
        known snapshot of each forecast, by default the last of all, and `learning_rates`, PPO's at each snapshot. A
        model on the basis `trial` takes the whole trial, its future included, as its basis is made of that.
        Raises ValueError for snapshots that are not (T, P), learning rates that are not T, or a start without context.
        """
        weights_TP = np.ascontiguousarray(model_input["weights"], np.float32)
        if weights_TP.ndim != 2:
            raise ValueError(f"weights has shape {weights_TP.shape}, not (snapshots, policy weights)")
        starts_B = np.atleast_1d(model_input.get("starts", len(weights_TP) - 1)).astype(np.int64)
        check_starts(len(weights_TP), starts_B, self._question.context, 0)
        return self._tipl.forecast(Trial(weights_TP=weights_TP, band=self._band(weights_TP, model_input)), starts_B)

    def _band(self, weights_TP: NDArray[np.float32], model_input: Mapping[str, Any]) -> GramBand:
        """As wide and as long as a whole trial's, or the model would mistake a trial that continues for one that
        ends."""
        rates_T = model_input.get("learning_rates")
        if rates_T is None and self.experiment.model.clock == "learning_rate":
            raise ValueError("learning_rates is missing, which a model with model.clock='learning_rate' needs as input")
        if rates_T is not None and len(rates_T) != len(weights_TP):
            raise ValueError(f"learning_rates has {len(rates_T)} entries for {len(weights_TP)} snapshots; one each")
        band = make_band(
            weights_TP,
            self._question.width,
            snapshots_per_iteration=self._question.snapshots_per_iteration,
            learning_rates_T=rates_T,
        )
        to_come = max(0, self.experiment.num_snapshots - len(weights_TP))
        return dataclasses.replace(
            band,
            products_SW=np.pad(band.products_SW, ((0, to_come), (0, 0))),
            learning_rates_T=np.pad(band.learning_rates_T, (0, to_come)),
        )


def _load_pyfunc(path: str) -> Forecaster:
    """What MLflow calls."""
    return Forecaster(path)
