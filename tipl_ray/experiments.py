"""Experiments found and read: TOML files by path or name, and the tables that earlier jobs wrote down."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from tipl_ray.config import MOVED, Basis, Experiment, validated
from tipl_ray.errors import nearest, no_such
from tipl_ray.places import JOBS_FOLDER

_OURS: dict[str, dict[str, Any]] = {
    "model": {"embedding": 64, "layers": 2, "heads": 4, "dropout": 0.0},
    "train": {
        "batch_size": 64,
        "learning_rate": 2e-3,
        "weight_decay": 0.05,
        "warmup_steps": 200,
        "schedule": "cosine",
        "max_gradient_norm": 1.0,
    },
}
"""What our presets have in common."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "paper-residual": {
        "model": {"residual": True},
        "train": {
            "num_steps": 20_000,
            "steps_per_iteration": 1_000,
            "learning_rate": 1e-3,
            "warmup_steps": 200,
            "schedule": "cosine",
            "max_gradient_norm": 1.0,
        },
    },
    "causal": {
        "basis": {"kind": "window"},
        "model": _OURS["model"],
        "train": _OURS["train"] | {"num_steps": 2_500, "steps_per_iteration": 250, "joined_windows": 0.3},
    },
    "per-weight": {
        "basis": {"kind": "per-weight"},
        "model": _OURS["model"],
        "train": _OURS["train"] | {"num_steps": 5_000, "steps_per_iteration": 500},
    },
}
"""Fields that a preset sets; the paper's are the dataclasses' own defaults."""


def named_experiments() -> dict[str, Path]:
    """The experiments that are found by name: those in the running job's folder, then this package's.

    For `tipl` that folder is `experiments` in the working directory.
    """
    folders = (JOBS_FOLDER / "experiments", Path(sys.argv[0]).absolute().parent / "experiments")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.toml"))}


def find_experiment(given: str | Path, option: str = "--experiment") -> Path:
    """The file of an experiment: a path, or a name, or jobs/experiments/NAME.toml from wherever a job is started.

    Raises FileNotFoundError naming the option and the experiments that there are, or IsADirectoryError.
    """
    path, known = Path(given), named_experiments()
    if path.exists() and not path.is_dir():
        return path
    if path.parent in (Path(), Path("jobs", "experiments")) and path.name.removesuffix(".toml") in known:
        return known[path.name.removesuffix(".toml")]
    if path.is_dir():
        raise IsADirectoryError(f"{option} {given}: this is a folder, not an experiment's file")
    near = nearest(path.stem, list(known))
    raise FileNotFoundError(f"{option} {given}: no such file, and not one of the experiments {', '.join(known)}{near}")


def load_experiment(path: str | Path, preset: str | None = None) -> Experiment:
    """Read an experiment's TOML file, unchecked; a preset given here takes the place of the file's.

    What is later overrides what is before: the dataclasses' defaults, the preset, the file's sections, its sections for
    this preset. Raises OSError where there is no such file, or ValueError naming the key for what is not TOML, an
    unknown key or a wrong type.
    """
    path = find_experiment(path)
    table = _read_toml(path)
    given = table.get("preset", "paper") if preset is None else preset
    if given not in PRESETS:
        where = f"{path}: preset" if preset is None else "--preset"
        raise no_such(where, given, sorted(PRESETS))
    own = {name: _section(path, table.pop(name, {}), name) for name in PRESETS}
    # The sections for other presets are not used, and may not be wrong either.
    return {name: _with_preset(path, table, name, own[name]) for name in PRESETS}[given]


def _with_preset(path: Path, table: dict[str, Any], preset: str, own: dict[str, Any]) -> Experiment:
    """The experiment of a file's sections, a preset and the file's sections for that preset."""
    built = {"name": path.stem, **table, "preset": preset}
    for section in PRESETS[preset] | own:
        parts = (
            PRESETS[preset].get(section, {}),
            _section(path, table.get(section, {}), section),
            _section(path, own.get(section, {}), f"{preset}.{section}"),
        )
        built[section] = {key: value for part in parts for key, value in part.items()}
    try:
        return validated(Experiment, built)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        # It says where, and not what stands there.
        line = re.search(r"at line (\d+)", str(error))
        shown = f": {text.splitlines()[int(line[1]) - 1].strip()!r}" if line else ""
        raise ValueError(f"{path} is not TOML: {error}{shown}") from error


def _section(path: Path, value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name}={value!r} must be a section: write [{name}] with its fields below it")
    return value


def from_table(table: dict[str, Any]) -> Experiment:
    """The experiment that `as_table` wrote down, in this version or an earlier one. Raises ValueError as `check`."""
    return validated(Experiment, _upgraded(table)).check_fields()


def _upgraded(table: dict[str, Any]) -> dict[str, Any]:
    """A table that any version wrote, as this one writes it."""
    table = {name: dict(part) if isinstance(part, dict) else part for name, part in table.items()}
    table.pop("jump", None)  # which is no part of an experiment any more
    where = table.setdefault("where", {})
    # Contenders were words once; what runs them writes no table.
    if any(isinstance(one, str) for one in table.get("accelerate", {}).get("contenders", ())):
        del table["accelerate"]["contenders"]
    for moved in MOVED:
        section, _, field = moved.rpartition(".")
        part = table.get(section, {}) if section else table
        if field in part:
            where[field] = part.pop(field)
    table["basis"] = Basis.upgraded(table.get("basis", {}))
    return table
