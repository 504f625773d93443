"""Limits on the fields of a configuration, and the one place where they are checked."""

import contextlib
import dataclasses
import functools
import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import Field

from tipl_ray.digest import published
from tipl_ray.errors import nearest

LARGEST = 2**31 - 1
"""Largest integer: what fits the data set's columns and every library's seeds."""

MAX_NAME_BYTES = 100


LATER = {"later": True}
"""Metadata of fields added later: they enter names and digests only if they differ from their default."""

NO_IDENTITY = {"identity": False}
"""Metadata of fields that do not affect results; see `digest.identity`."""

STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Step = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=16_384)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(ge=1e-37, le=1e37)]
"""Positive and representable in float32."""

MOVED = (
    *("storage", "tracking", "collect.trials_per_actor", "collect.physics_threads", "train.num_workers"),
    *("train.use_gpu", "sweep.trainer", "sweep.max_concurrent_trials", "sweep.cpus_per_trial", "sweep.gpus_per_trial"),
    *("accelerate.predictors_from", "accelerate.predictors_storage", "accelerate.units_at_once"),
    "accelerate.keep_weights",
)
"""Earlier names of fields that are now in the section `where` under the same last name."""


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Put a field's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def check_limits(part: Any, prefix: str = "") -> None:
    """Refuse values beyond the limits of their fields. Raises ValueError naming field, value and limit of each."""
    validated(type(part), dataclasses.asdict(part), prefix)


_adapter = functools.cache(pydantic.TypeAdapter)


def validated(kind: Any, table: dict[str, Any], prefix: str = "") -> Any:
    """The configuration of a table. Raises ValueError for unknown keys, wrong types and values beyond limits."""
    try:
        # By way of JSON, in which a list may be a tuple, and true no number.
        return _adapter(kind).validate_json(json.dumps(table, default=str), strict=True)
    except pydantic.ValidationError as error:
        known = tuple(_names(kind, prefix))
        raise ValueError("; ".join(_complaint(item, prefix, known) for item in error.errors())) from error


def _names(kind: Any, prefix: str = "") -> Iterator[str]:
    """Sections and fields of a configuration by their dotted names."""
    for field in dataclasses.fields(kind):
        yield f"{prefix}{field.name}"
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _names(field.type, f"{prefix}{field.name}.")


def _complaint(item: Any, prefix: str, known: Sequence[str]) -> str:
    """One of pydantic's errors, in our words where it is a limit's or a key's."""
    field, context = prefix + ".".join(map(str, item["loc"])).removeprefix("where."), item.get("ctx", {})
    said = f"{field}={published(item['input'])!r}"
    if item["type"] == "greater_than_equal":
        return f"{said} is below {context['ge']}"
    if item["type"] == "less_than_equal":
        return f"{said} is above {context['le']}"
    if item["type"] == "finite_number":
        return f"{said} is not a finite number"
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if field in MOVED:
            return f"{said}: {field.rpartition('.')[2]} has moved to the section [where]"
        return f"{said}: unknown key{nearest(field, known)}"
    return f"{said}: {item['msg']}"


def check_name(field: str, whole: str, name: str, also: str = "") -> None:
    """A name for a folder, a shell's word, an MLflow experiment, a registered model and a web page, all at once."""
    allowed = f"-_.+=@,{also}"
    for letter in name:
        # Letters, the marks on them, digits: all else means something to someone.
        if unicodedata.category(letter)[0] not in "LMN" and letter not in allowed:
            raise ValueError(
                f"{field}={whole!r} contains {letter!r}; use only letters, digits and {' '.join(allowed).strip()}"
            )
    if not name or (name[0] != "_" and unicodedata.category(name[0])[0] not in "LN"):
        raise ValueError(f"{field}={whole!r} must begin with a letter, a digit or _")
    if name[-1] in ". ":
        raise ValueError(f"{field}={whole!r} ends in {name[-1]!r}, which some file systems drop")
    if len(whole.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{field}={whole[:20]!r}... has {len(whole.encode())} bytes, more than {MAX_NAME_BYTES}")


def check_last_seed(section: str, field: str, first: int, count: int) -> None:
    """Refuse seeds that count up beyond what a seed may be. Raises ValueError."""
    if first + count - 1 > LARGEST:
        raise ValueError(f"{section}.{field}={first}: the last of {count} seeds would exceed {LARGEST}")


def check_once(section: str, field: str, values: Sequence[Any]) -> None:
    """Refuse a value that is given twice. Raises ValueError."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{section}.{field} contains {value!r} twice")
