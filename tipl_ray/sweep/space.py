"""What a sweep varies: fields of the experiment by name, with their values or ranges, checked before anything starts.

Knows the configuration alone. A candidate is a dict from field to value, such as {"basis.rank": 32}.
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tipl_ray import config
from tipl_ray.digest import as_table, flat
from tipl_ray.experiments import from_table
from tipl_ray.predict.representation import representation_of

SECTIONS = ("basis", "model", "train")
"""Sections whose fields a sweep may vary: the others define the data or the question, which all runs share."""
FIXED = {
    "train.num_seeds": "a run has one seed; vary train.seed",
    "train.data": "all runs share their trials",
}
"""Fields of those sections that are the same for all, and why."""
MAX_COMBINATIONS = 10_000
MOST_TRIED = 64
"""Integers between a range's ends that are tried before a sweep starts."""
RANGE = re.compile(r"(log|uniform)\(([^,()]+),([^,()]+)\)")

Candidate = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers between two limits, both included."""

    low: float
    high: float
    log: bool
    """Sampled log-uniformly."""
    whole: bool
    """Integers only."""


Space = dict[str, tuple[Any, ...] | Range]
"""What each field may be."""


def parse_over(arguments: Sequence[str]) -> dict[str, Any]:
    """Fields and values from `FIELD=VALUES`, as `Sweep.over` holds them. Raises ValueError for what is not that.

    >>> parse_over(["basis.rank=8,16", "train.learning_rate=log(1e-4,1e-2)"])
    {'basis.rank': ['8', '16'], 'train.learning_rate': 'log(1e-4,1e-2)'}
    """
    over: dict[str, Any] = {}
    for argument in arguments:
        field, equals, text = argument.partition("=")
        if not equals or not field.strip() or not text.strip():
            raise ValueError(f"--over {argument}: use FIELD=VALUE,VALUE,... or FIELD=log(LOW,HIGH)")
        if field.strip() in over:
            raise ValueError(
                f"--over {field.strip()} is given twice; put all its values into one, --over "
                f"{field.strip()}=VALUE,VALUE"
            )
        values = text.strip()
        over[field.strip()] = values if "(" in values else [value.strip() for value in values.split(",")]
    return over


def make_space(experiment: config.Experiment) -> Space:
    """What the experiment's sweep varies. Raises ValueError for unknown fields, wrong values, impossible candidates."""
    over = dict(flat(experiment.sweep.over))  # TOML reads an unquoted `basis.rank = ...` as a table in a table
    if not over:
        raise ValueError(
            "sweep.over is empty; give fields and values, as in --over basis.rank=8,16,32 --over model.context=10,20"
        )
    known = field_types(experiment)
    space = {field: _entry(field, values, known) for field, values in over.items()}
    if experiment.sweep.search == "grid":
        ranges = [field for field, entry in space.items() if isinstance(entry, Range)]
        if ranges:
            raise ValueError(
                f"sweep.over.{ranges[0]} is a range; a grid search needs a list of values (or use --sweep.search "
                "optuna)"
            )
    combinations = math.prod(2 if isinstance(entry, Range) else len(entry) for entry in space.values())
    if combinations > MAX_COMBINATIONS:
        raise ValueError(f"sweep.over makes {combinations} combinations, more than {MAX_COMBINATIONS}")
    children = [with_fields(experiment, candidate) for candidate in corners(space)]
    for field, entry in space.items():
        if isinstance(entry, Range) and entry.whole:
            _check_between(experiment, field, entry, next(corners(space)))
    bases = {child.basis for child in children}
    without_effect = [representation_of(basis).without_effect() for basis in bases]
    for field in space:
        if all(field in fields for fields in without_effect):
            raise ValueError(
                f"sweep.over.{field} has no effect with basis.kind={sorted({basis.kind for basis in bases})}; "
                "--preset paper uses basis `trial`, --preset causal `window`"
            )
    return space


def _check_between(experiment: config.Experiment, field: str, entry: Range, candidate: Candidate) -> None:
    """Refuse a range of integers in which some are impossible, as those that another field does not divide; of many,
    the first are tried."""
    for value in itertools.islice(range(int(entry.low) + 1, int(entry.high)), MOST_TRIED):
        try:
            with_fields(experiment, {**candidate, field: value})
        except ValueError as error:
            raise ValueError(
                f"sweep.over.{field} is a range with impossible values in it: {error}; give a list of values"
            ) from error


def corners(space: Space) -> Iterator[Candidate]:
    """Every combination of values and of ranges' limits."""
    ends = [(entry.low, entry.high) if isinstance(entry, Range) else entry for entry in space.values()]
    for values in itertools.product(*ends):
        yield dict(zip(space, values, strict=True))


def with_fields(experiment: config.Experiment, candidate: Mapping[str, Any]) -> config.Experiment:
    """The experiment with some fields changed, checked. Raises ValueError naming the field, the value and the limit."""
    table = as_table(experiment)
    for field, value in candidate.items():
        section, name = field.split(".")
        table[section][name] = value
    return from_table(table).check("train")


def field_types(experiment: config.Experiment) -> dict[str, type]:
    """Fields that may vary, and the type of each one's value."""
    return {
        f"{section}.{field.name}": type(getattr(getattr(experiment, section), field.name))
        for section in SECTIONS
        for field in dataclasses.fields(getattr(experiment, section))
    }


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Each field's last part, with its section only where two fields share it."""
    last = [field.rpartition(".")[2] for field in fields]
    return {field: name if last.count(name) == 1 else field for field, name in zip(fields, last, strict=True)}


def describe(candidate: Mapping[str, Any]) -> str:
    """A candidate in one line.

    >>> describe({"basis.rank": 32, "train.learning_rate": 0.00123456})
    'rank=32 learning_rate=0.00123'
    """
    names = short_names(list(candidate))
    return " ".join(f"{names[field]}={_short(value)}" for field, value in candidate.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _entry(field: str, values: Any, known: Mapping[str, type]) -> tuple[Any, ...] | Range:
    if field in FIXED:
        raise ValueError(f"sweep.over.{field} cannot vary: {FIXED[field]}")
    if field not in known:
        near = difflib.get_close_matches(field, known, n=3, cutoff=0.5) or [
            name for name in known if name.endswith(f".{field.rpartition('.')[2]}")
        ]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"sweep.over.{field} is not a field of {', '.join(SECTIONS)}{hint}")
    if isinstance(values, str):
        return _range(field, values, known[field])
    if not isinstance(values, list | tuple):
        values = [values]
    if not values:
        raise ValueError(f"sweep.over.{field}={values} is empty")
    typed = [_typed(field, value, known[field]) for value in values]
    if len({str(value) for value in typed}) < len(typed):
        raise ValueError(f"sweep.over.{field}={typed} contains a value twice")
    return tuple(typed)


def _typed(field: str, value: Any, kind: type) -> Any:
    """The value as the field has it: text from a command line, 1 for 1.0."""
    if isinstance(value, str) and kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"sweep.over.{field}={value!r} is neither true nor false")
        return value.lower() == "true"
    if isinstance(value, bool) != (kind is bool):
        raise ValueError(f"sweep.over.{field}={value!r} is not of the field's type, {kind.__name__}")
    try:
        typed = kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sweep.over.{field}={value!r} is not of the field's type, {kind.__name__}") from error
    if isinstance(value, float) and typed != value:
        raise ValueError(f"sweep.over.{field}={value!r} is not of the field's type, {kind.__name__}")
    return typed


def _range(field: str, text: str, kind: type) -> Range:
    match = RANGE.fullmatch(text.replace(" ", ""))
    if not match or kind not in (int, float):
        raise ValueError(
            f"sweep.over.{field}={text!r} is not a range for a field of type {kind.__name__}; give a list of values "
            "or, for numbers, log(LOW,HIGH) or uniform(LOW,HIGH)"
        )
    try:
        low, high = kind(match[2]), kind(match[3])
    except ValueError as error:
        raise ValueError(f"sweep.over.{field}={text!r} has limits that are not {kind.__name__}") from error
    log = match[1] == "log"
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not log)):
        raise ValueError(f"sweep.over.{field}={text!r}: the limits must increase{' and be above 0' if log else ''}")
    return Range(low=low, high=high, log=log, whole=kind is int)
