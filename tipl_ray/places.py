"""Folders and environment variables of the machine that a job runs on: where things are, and whether they are
writable."""

import json
import os
import re
import unicodedata
from collections.abc import Collection
from pathlib import Path

from tipl_ray.digest import redacted
from tipl_ray.errors import UserError

CHECKOUT = Path(__file__).resolve().parent.parent
"""The folder that contains this package: the checkout, or, where it is installed, site-packages."""


def check_text(field: str, text: str) -> None:
    """Raise ValueError for a text that is empty, or holds what is no letter of a name or a path."""
    if not text.strip():
        raise ValueError(f"{field}={text!r} is empty; set a value, or leave it out")
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cs"):
            raise ValueError(
                f"{field}={redacted(text)!r} contains {letter!r}, which cannot be part of a name or a path"
            )


def absolute_storage(storage: str) -> str:
    """A folder as an absolute path, a URI as given. Raises ValueError for the home of a user that is not known."""
    if "://" in storage:
        return storage
    if slip := re.match(r"(s3|gs|gcs|abfss?|hdfs|file|https?):/*", storage):
        raise ValueError(f"storage={storage!r} is neither a folder nor a URI: did you mean {slip[1]}://...?")
    try:
        return str(Path(storage).expanduser().absolute())
    except RuntimeError as error:
        raise ValueError(f"storage={storage!r}: {error}") from error


def in_checkout() -> bool:
    """Whether this package is in a clone of its repository, and not installed."""
    return (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / "jobs").is_dir()


JOBS_FOLDER = (CHECKOUT if in_checkout() else Path(__file__).resolve().parent / "shipped") / "jobs"
"""Folder of the jobs, with the experiments that are known by name: the checkout's, or the one that a wheel brings."""

PUBLISHED_FOLDER = Path(__file__).resolve().parent / "published"
"""Folder of the predictors that this package brings along."""


def published_predictors() -> tuple[str, ...]:
    """Names of the predictors that this package brings along: rules, and models of TIPL."""
    return tuple(sorted({file.parent.name for file in PUBLISHED_FOLDER.glob("*/*.json")}))


def published_rules(kinds: Collection[str] = ("return-rule", "return-tipl")) -> tuple[str, ...]:
    """Names of those that were tuned for return: `return-rule` with numbers of their own, and `return-tipl`, such a
    rule with a model that changes it."""
    about = {file.parent.name: json.loads(file.read_text()) for file in PUBLISHED_FOLDER.glob("*/predictor.json")}
    return tuple(sorted(name for name, one in about.items() if one["name"] in kinds))


def default_storage(name: str) -> str:
    """Where an experiment is kept that names no storage: below the checkout, else below the working directory."""
    return str((CHECKOUT if in_checkout() else Path.cwd()) / "storage" / name)


def unwritable(folder: Path) -> str | None:
    """Why a folder can be neither written nor created; None if it can."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if not there.is_dir():
            return f"{there} is no folder"
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            return f"{there} is on a read-only file system"
        return None if os.access(there, os.W_OK | os.X_OK) else f"no permission to write in {there}"
    except OSError as error:
        return error.strerror


def with_variables(field: str, place: str | None) -> str | None:
    """As the environment has it: `ray job submit` quotes its command, so that no shell has seen to that."""
    if place is None:
        return None
    check_text(field, place)

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        # Set to nothing is not set: the rest would be a place at the root.
        if not os.environ.get(name):
            raise ValueError(f"{field}={redacted(place)!r}: the job's environment has no variable {name}")
        return os.environ[name]

    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, place)


def forget_empty_variables() -> None:
    """Unset what is set to nothing among the variables that this package, Ray and MLflow take a place from."""
    for name in (
        *(
            "HOME",
            "TMPDIR",
            "TMP",
            "TEMP",
            "XDG_CACHE_HOME",
            "XDG_CONFIG_HOME",
            "RAY_ADDRESS",
            "RAY_TMPDIR",
            "RAY_AUTH_MODE",
        ),
        *("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION"),
        *("FORCE_COLOR", "NO_COLOR"),
    ):
        value = os.environ.get(name)
        # By the convention, a relative XDG_CACHE_HOME is none either.
        if value == "" or (value and name.startswith("XDG_") and not Path(value).is_absolute()):
            del os.environ[name]


def check_places(storage_path: str) -> None:
    """Raise UserError, before anything is loaded, where a job could write neither its storage nor temporary files."""
    if "://" not in storage_path and (problem := unwritable(Path(storage_path))):
        raise UserError(f"storage {storage_path} is not writable: {problem}; use another --storage")
    folder = os.environ.get("TMPDIR")
    if folder and (problem := "no such folder" if not Path(folder).is_dir() else unwritable(Path(folder))):
        raise UserError(f"TMPDIR={folder} is not writable: {problem}; unset TMPDIR, or set it to another folder")
