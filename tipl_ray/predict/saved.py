"""Predictors and trained models in a folder or under a URI, found and loaded again."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from tipl_ray.data.storage import Storage, file_exists, join, last_name, publish, read_file, read_published
from tipl_ray.digest import digest, flat, identity
from tipl_ray.errors import nearest
from tipl_ray.experiments import from_table
from tipl_ray.places import PUBLISHED_FOLDER, published_predictors
from tipl_ray.predict.gram import Question
from tipl_ray.predict.model_files import WEIGHTS_FILE, is_complete
from tipl_ray.predict.models import load_about, understood
from tipl_ray.predict.predictor import Combination, Predictor
from tipl_ray.predict.representation import load_tipl, representation_in
from tipl_ray.registry import PREDICTORS

HISTORY = ("experiment", "metrics", "data_digest", "trained_on")
"""Of a trained model's description, how it came to be: its answers to a question depend on none of it."""

PREDICTOR_FILE, ABOUT_PREDICTOR_FILE, PREDICTOR_RECORD = "predictor.safetensors", "predictor.json", "predictor.sha256"

PREDICTOR_WAY_OUT = "restore it from a copy, or delete the folder and fit the predictor again"


def save_fitted(predictors: Sequence[Predictor]) -> bytes:
    """What every predictor was fitted to, as safetensors."""
    arrays = {
        f"{one.name}/{key}": np.array(array, order="C") for one in predictors for key, array in one.fitted.items()
    }
    return safetensors.numpy.save(arrays)


def load_fitted(predictors: Sequence[Predictor], content: bytes) -> None:
    """Put back what `save_fitted` wrote."""
    for key, array in safetensors.numpy.load(content).items():
        name, field = key.split("/")
        for predictor in predictors:
            if predictor.name == name:
                predictor.fitted[field] = array


def combinations() -> tuple[str, ...]:
    """Names of the predictors that jumps can use, besides TIPL: those that answer with coefficients."""
    return tuple(name for name in PREDICTORS.names() if issubclass(PREDICTORS.load(name), Combination))


def save_predictor(predictor: Combination, folder: str, about: dict[str, Any]) -> None:
    """Write a fitted predictor and what is known about it, for `load_predictor`."""
    described = {
        "name": PREDICTORS.name_of(type(predictor)),
        "question": dataclasses.asdict(predictor.question),
        **about,
    }
    files = {PREDICTOR_FILE: save_fitted([predictor]), ABOUT_PREDICTOR_FILE: json.dumps(described, indent=1).encode()}
    publish(folder, files, PREDICTOR_RECORD)


def load_predictor(folder: str) -> Combination:
    """The predictor in a folder or under a URI: what `save_predictor` wrote, a trained model whose answers can
    jump, or the one such model of a storage; or the one of this name that the package brings along. Changes nothing of
    torch's settings and draws no random number.

    Raises ValueError where there is none, and where there are several, which it lists; StoreError for a damaged one.
    """
    folder = find_predictor(folder)
    if not file_exists(folder, ABOUT_PREDICTOR_FILE):
        tipl = load_tipl(folder)
        assert isinstance(tipl, Combination), "what can jump answers with coefficients"
        return tipl
    content = read_published(folder, ABOUT_PREDICTOR_FILE, PREDICTOR_RECORD, PREDICTOR_WAY_OUT)
    with understood(folder, ABOUT_PREDICTOR_FILE, PREDICTOR_WAY_OUT):
        about = json.loads(content)
        question = Question(**{**about["question"], "steps": tuple(about["question"]["steps"])})
        predictor = PREDICTORS.load(about["name"])(question)
    content = read_published(folder, PREDICTOR_FILE, PREDICTOR_RECORD, PREDICTOR_WAY_OUT)
    with understood(folder, PREDICTOR_FILE, PREDICTOR_WAY_OUT):
        load_fitted([predictor], content)
    return predictor


def find_predictor(folder: str) -> str:
    """The folder that `load_predictor` reads: the one named, or that of the one model in its `models/` that can jump.

    Raises as `load_predictor` does.
    """
    place = _published_or(folder)
    if file_exists(place, ABOUT_PREDICTOR_FILE):
        return place
    models = _models_in(place)
    able = [model for model in models if representation_in(model).can_jump]
    if able:
        return _only(folder, able)
    found = (
        f"; of its {len(models)} models none answers with displacements (train with --preset causal)" if models else ""
    )
    raise ValueError(
        f"{folder} contains neither a saved predictor nor a trained model that forecasts displacements{found}"
    )


def find_model(folder: str) -> str:
    """The folder of a trained model, on any representation: the one named, the one in its `models/`, or the one that
    the package brings along under this name.

    Raises ValueError where there is none, and where there are several, which it lists.
    """
    place = _published_or(folder)
    if models := _models_in(place):
        return _only(folder, models)
    rule = ": it has a rule for jumps, see load_predictor" if file_exists(place, ABOUT_PREDICTOR_FILE) else ""
    raise ValueError(f"{folder} contains no trained model{rule}")


def _published_or(folder: str) -> str:
    """The folder of what is published under this name, else the folder itself. Raises ValueError for a name that is
    neither."""
    if folder in published_predictors():
        return str(PUBLISHED_FOLDER / folder)
    if "/" not in folder and not Storage(folder).entries():
        raise ValueError(
            f"{folder}: no such folder, and not a predictor published with this package: "
            f"{', '.join(published_predictors())}{nearest(folder, published_predictors())}"
        )
    return folder


def _only(folder: str, models: Sequence[str]) -> str:
    """The one of the models found in a folder. Raises ValueError where there are several."""
    if len(models) > 1:
        told = "; ".join(_differences({model: load_about(model) for model in models}))
        raise ValueError(f"{folder} contains {len(models)} models; use the folder of one: {told}")
    return models[0]


def _models_in(folder: str) -> list[str]:
    return [folder] if is_complete(folder) else _models_below(folder)


def _models_below(folder: str) -> list[str]:
    parent = folder if last_name(folder) == "models" else join(folder, "models")
    return [model for name in sorted(Storage(parent).folders()) if is_complete(model := join(parent, name))]


def _differences(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line a model: its folder, the fields of its experiment that are not those of all, and its skill."""
    tables = {
        folder: dict(flat(identity(from_table(about["experiment"])))) if "experiment" in about else {}
        for folder, about in models.items()
    }
    names = dict.fromkeys(name for table in tables.values() for name in table)
    differ = [name for name in names if len({json.dumps(table.get(name)) for table in tables.values()}) > 1]
    lines = []
    for folder, table in tables.items():
        said = [f"{name}={table.get(name)}" for name in differ]
        if (metrics := models[folder].get("metrics")) and isinstance(metrics.get("validation_skill"), float):
            said.append(f"one-step skill {metrics['validation_skill']:.3f} in validation")
        lines.append(f"{folder} ({', '.join(said) or 'no difference recorded'})")
    return lines


def predictor_digest(folder: str) -> str:
    """Digest of a saved predictor, wherever it is stored: of a trained model, its weights and what describes it, not
    how it came to be. Raises as `load_predictor` does."""
    load_predictor(folder)
    folder = find_predictor(folder)
    if file_exists(folder, ABOUT_PREDICTOR_FILE):
        names = (ABOUT_PREDICTOR_FILE, PREDICTOR_FILE)
        return hashlib.sha256(b"".join(read_file(folder, name) for name in names)).hexdigest()[:16]
    about = {name: value for name, value in load_about(folder).items() if name not in HISTORY}
    return digest(about, hashlib.sha256(read_file(folder, WEIGHTS_FILE)).hexdigest())
