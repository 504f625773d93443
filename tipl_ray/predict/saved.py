"""Predictors and trained models in a folder or under a URI, found and loaded again."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from tipl_ray import config
from tipl_ray.data.storage import Storage, file_exists, join, last_name, publish, read_file, read_published
from tipl_ray.digest import flat, identity
from tipl_ray.paper.predictor import SvdFloor, Tipl, TrialBasis
from tipl_ray.paper.temporal_svd import FittedBasis
from tipl_ray.paper.transformer import CausalTransformer, Normaliser
from tipl_ray.predict.baselines import COMBINATIONS, SIMPLE
from tipl_ray.predict.gram import Question
from tipl_ray.predict.models import (
    ABOUT_FILE,
    BASIS_FILE,
    WEIGHTS_FILE,
    is_complete,
    load_about,
    read_model_file,
    understood,
)
from tipl_ray.predict.predictor import Combination, Predictor
from tipl_ray.window.predictor import RidgeElsewhere, WindowFloor, WindowTipl
from tipl_ray.window.transformer import WindowTransformer

MODEL_FILES = (WEIGHTS_FILE, ABOUT_FILE)

PREDICTOR_FILE, ABOUT_PREDICTOR_FILE, PREDICTOR_RECORD = "predictor.safetensors", "predictor.json", "predictor.sha256"

PREDICTOR_WAY_OUT = "restore it from a copy, or delete the folder and fit the predictor again"


def load_tipl(folder: str, question: Question, device: torch.device | str = "cpu") -> Tipl | WindowTipl:
    """TIPL as training left it in a folder or under a URI. Raises StoreError where there is none, or a damaged one."""
    about = load_about(folder)
    with understood(folder, ABOUT_FILE):
        basis = config.Basis(**about["basis"])
    if basis.kind == "window":
        return WindowTipl(question, WindowTransformer.load(folder), device)
    with understood(folder, ABOUT_FILE):
        normaliser = Normaliser.from_table(about["normaliser"])
    shared = None
    if basis.kind == "shared":
        content = read_model_file(folder, BASIS_FILE)
        with understood(folder, BASIS_FILE):
            shared = FittedBasis.from_bytes(content)
    return Tipl(question, CausalTransformer.load(folder), TrialBasis(basis, shared), normaliser, device)


def make_predictors(question: Question, model_folders: Sequence[str], elsewhere: bool = False) -> list[Predictor]:
    """Every predictor that is compared, TIPL as it was trained among them, and the floor of its basis; not fitted.

    Several models are those of several seeds. `elsewhere` says that they were trained on other data sets.
    """
    tipls = [load_tipl(folder, question) for folder in model_folders]
    for seed, tipl in enumerate(tipls):
        tipl.seed = seed
    first = tipls[0]
    floor = SvdFloor(question, first.trial_basis) if isinstance(first, Tipl) else WindowFloor(question)
    carried = [RidgeElsewhere(question, first.model)] if elsewhere and isinstance(first, WindowTipl) else []
    return [*(kind(question) for kind in SIMPLE), *carried, *tipls, floor]


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


def save_predictor(predictor: Combination, folder: str, about: dict[str, Any]) -> None:
    """Write a fitted predictor of `COMBINATIONS` and what is known about it, for `load_predictor`."""
    assert predictor.name in COMBINATIONS
    described = {"name": predictor.name, "question": dataclasses.asdict(predictor.question), **about}
    files = {PREDICTOR_FILE: save_fitted([predictor]), ABOUT_PREDICTOR_FILE: json.dumps(described, indent=1).encode()}
    publish(folder, files, PREDICTOR_RECORD)


def load_predictor(folder: str) -> Combination:
    """The predictor in a folder or under a URI: what `save_predictor` wrote, a model trained on the basis `window`, or
    the one such model of a storage. Changes nothing of torch's settings and draws no random number.

    Raises ValueError where there is none, and where there are several, which it lists; StoreError for a damaged one.
    """
    folder = find_predictor(folder)
    if not file_exists(folder, ABOUT_PREDICTOR_FILE):
        model = WindowTransformer.load(folder)
        question = Question(context=model.size.context, steps=model.steps, snapshots_per_iteration=model.num_phases)
        return WindowTipl(question, model)
    content = read_published(folder, ABOUT_PREDICTOR_FILE, PREDICTOR_RECORD, PREDICTOR_WAY_OUT)
    with understood(folder, ABOUT_PREDICTOR_FILE, PREDICTOR_WAY_OUT):
        about = json.loads(content)
        question = Question(**{**about["question"], "steps": tuple(about["question"]["steps"])})
        predictor = COMBINATIONS[about["name"]](question)
    content = read_published(folder, PREDICTOR_FILE, PREDICTOR_RECORD, PREDICTOR_WAY_OUT)
    with understood(folder, PREDICTOR_FILE, PREDICTOR_WAY_OUT):
        load_fitted([predictor], content)
    return predictor


def find_predictor(folder: str) -> str:
    """The folder that `load_predictor` reads: the one named, or that of the one model in its `models/` that can jump.

    Raises as `load_predictor` does.
    """
    if file_exists(folder, ABOUT_PREDICTOR_FILE):
        return folder
    models = [folder] if is_complete(folder) else _models_below(folder)
    able = {model: about for model in models if _basis(about := load_about(model)) == "window"}
    if len(able) == 1:
        return next(iter(able))
    if able:
        raise ValueError(f"{folder} holds {len(able)} models; name the folder of one: {'; '.join(_differences(able))}")
    found = f"; of its {len(models)} models none is of that basis (train with --preset causal)" if models else ""
    raise ValueError(
        f"jump.predictor={folder!r} holds neither a saved predictor nor a model of the basis `window`{found}"
    )


def _models_below(folder: str) -> list[str]:
    parent = folder if last_name(folder) == "models" else join(folder, "models")
    return [model for name in sorted(Storage(parent).folders()) if is_complete(model := join(parent, name))]


def _basis(about: Mapping[str, Any]) -> str | None:
    return about.get("basis", {}).get("kind")


def _differences(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line a model: its folder, the fields of its experiment that are not those of all, and its skill."""
    tables = {
        folder: dict(flat(identity(config.from_table(about["experiment"])))) if "experiment" in about else {}
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
    """Digest of what a saved predictor's answers depend on, wherever it lies. Raises as `load_predictor` does."""
    load_predictor(folder)
    folder = find_predictor(folder)
    names = (ABOUT_PREDICTOR_FILE, PREDICTOR_FILE) if file_exists(folder, ABOUT_PREDICTOR_FILE) else MODEL_FILES
    return hashlib.sha256(b"".join(read_file(folder, name) for name in names)).hexdigest()[:16]
