"""A folder of checkpoints as one series: which of its entries they are, in which order, and what all of them hold.

Knows names, sizes and shapes; reads no more of the weights than the samples that the series' digest is of.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from tipl_ray.checkpoints.files import CheckpointError, Contents, StoredTensor, read_contents, readable
from tipl_ray.digest import digest
from tipl_ray.record.tensors import listed

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".zip")
"""How the names of checkpoints end."""
KNOWN_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""What Hugging Face's libraries call the weights in a folder; the first that is there is taken."""
NOT_CHECKPOINTS = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state).*", re.IGNORECASE)
"""Files next to the weights with the same ending."""
SHARD = re.compile(r"-\d+-of-\d+\.")
UNMATCHED = "not matched by --steps"
"""Why an entry is left out that a pattern does not take."""
SAMPLE_BYTES = 65536
"""Length of each of the three samples of a file that the series' digest is of."""
MOST_TENSORS, MOST_NAMES, MOST_NUMBERS = 6, 4, 6
"""Tensors and checkpoints that an error names, and numbers in a name that it looks for the checkpoint's among."""
FORMAT = 1
"""Of what is kept of a series; another one makes all series be imported again."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What a user takes of a folder. Raises ValueError for what is no regular expression."""

    steps: str | None = None
    """Regular expression whose first group is a checkpoint's number; entries that it does not match are left out."""
    file: str | None = None
    """Name of the weights' file, where each checkpoint is a folder with several."""
    include: tuple[str, ...] = ()
    """Regular expressions; with some, only tensors whose names one of them matches anywhere are taken."""
    exclude: tuple[str, ...] = ()
    """Regular expressions; tensors whose names one of them matches anywhere are left out."""

    def __post_init__(self) -> None:
        patterns = [("steps", self.steps)] if self.steps is not None else []
        patterns += [(field, pattern) for field in ("include", "exclude") for pattern in getattr(self, field)]
        for field, pattern in patterns:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"{field}={pattern!r} is no regular expression: {error}") from error
            if field == "steps" and groups != 1:
                raise ValueError(f"steps={pattern!r} needs one group around the number, such as 'step_(\\d+)'")

    def takes(self, name: str) -> bool:
        """Whether a tensor of this name is taken."""
        included = not self.include or any(re.search(pattern, name) for pattern in self.include)
        return included and not any(re.search(pattern, name) for pattern in self.exclude)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Checkpoints in their order, and the tensors that all of them have."""

    folder: Path
    names: tuple[str, ...]
    """Of the folder's entries, the first checkpoint's first."""
    steps: tuple[int, ...]
    """The checkpoints' numbers, rising."""
    tensors: Mapping[str, tuple[StoredTensor, ...]]
    """By name, in the order of the first checkpoint's files; one of each checkpoint."""
    left_out: Mapping[str, tuple[str, ...]]
    """Why -> names of entries and tensors."""
    digest: str
    """Of names, steps, sizes, tensors and samples: see `find_series`."""

    @property
    def num_weights(self) -> int:
        """Weights of one checkpoint that are taken."""
        return sum(stored[0].num_values for stored in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """What reading the weights of all checkpoints takes [bytes]."""
        return sum(one.num_bytes for stored in self.tensors.values() for one in stored)


def find_series(folder: Path, selection: Selection) -> Series:
    """The checkpoints in a folder, in order of their numbers.

    The digest is SHA-256 over the names, numbers and sizes of the files, the tensors' names, types and shapes, and
    three samples of 64 KiB of each file, at its beginning, middle and end: not over every byte. Raises CheckpointError
    where there are less than two, where their order or their weights are ambiguous, or where they do not fit each
    other.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder; give one that holds checkpoints")
    with readable(folder):
        return _read_series(folder, selection)


def _read_series(folder: Path, selection: Selection) -> Series:
    found, ignored = _checkpoints(folder, selection)
    if not found:
        raise CheckpointError(
            f"{folder}: holds no checkpoints: files that end in {', '.join(SUFFIXES)}, or folders with one"
        )
    steps, unmatched = number_names(list(found), selection.steps, folder)
    if len(steps) < 2:
        matching = f" that {selection.steps!r} matches" if unmatched else ""
        raise CheckpointError(f"{folder}: holds one checkpoint{matching}, {next(iter(steps))}; a series has at least 2")
    contents = {name: read_contents(found[name]) for name in steps}
    _check_shapes(folder, contents, selection, steps, unmatched)
    tensors, left_out = _common(folder, contents, selection)
    entries = {"no checkpoints": tuple(ignored), UNMATCHED: tuple(unmatched)}
    left_out |= {why: names for why, names in entries.items() if names}
    return Series(
        folder=folder,
        names=tuple(steps),
        steps=tuple(steps.values()),
        tensors=tensors,
        left_out=left_out,
        digest=_digest(folder, steps, contents, tensors),
    )


def number_names(names: Sequence[str], pattern: str | None, folder: Path) -> tuple[dict[str, int], list[str]]:
    """Names -> their numbers, rising, and the names that the pattern does not match.

    Without a pattern the number is the one in which the names differ; names without any number count from 0 in the
    alphabet's order. Raises CheckpointError where the order is ambiguous.
    """
    unmatched: list[str] = []
    if pattern is not None:
        matches = {name: re.search(pattern, name) for name in names}
        unmatched = sorted(name for name, match in matches.items() if match is None)
        try:
            numbers = {name: int(match[1]) for name, match in matches.items() if match}
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{folder}: what steps={pattern!r} takes is no whole number: {error}") from error
        if not numbers:
            raise CheckpointError(
                f"{folder}: steps={pattern!r} matches none of {len(names)} checkpoints, such as {names[0]}"
            )
    else:
        numbers = _numbers_that_differ(sorted(names), folder)
    ordered = dict(sorted(numbers.items(), key=lambda item: item[1]))
    for (one, number), (other, same) in itertools.pairwise(ordered.items()):
        if number == same:
            raise CheckpointError(f"{folder}: {one} and {other} both have the number {number}; choose one with --steps")
    return ordered, unmatched


def _numbers_that_differ(names: list[str], folder: Path) -> dict[str, int]:
    way_out = "choose the number with --steps, as in --steps 'step_(\\d+)'; names that it does not match are left out"
    words = {name: re.sub(r"\d+", "0", name) for name in names}
    if len(set(words.values())) > 1:
        if not any(re.search(r"\d", name) for name in names):
            return {name: index for index, name in enumerate(names)}
        counts = sorted(words, key=lambda name: sum(word == words[name] for word in words.values()))
        raise CheckpointError(f"{folder}: {counts[0]} and {counts[-1]} are named too differently to order; {way_out}")
    columns = list(zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True))
    differing = [column for column in columns if len(set(column)) > 1]
    if not differing:
        return dict.fromkeys(names, columns[0][0] if columns else 0)
    orders = {tuple(sorted(range(len(names)), key=column.__getitem__)) for column in differing}
    if len(orders) > 1:
        raise CheckpointError(
            f"{folder}: the numbers in {names[0]} and the others order them in {len(orders)} ways; {way_out}"
        )
    return dict(zip(names, differing[0], strict=True))


def _checkpoints(folder: Path, selection: Selection) -> tuple[dict[str, Path], list[str]]:
    """Names of the folder's entries -> the file with the weights or their index; names of what is no checkpoint."""
    found: dict[str, Path] = {}
    ignored: list[str] = []
    runs = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and _is_run(entry, selection)]
    if runs and not any(map(_is_checkpoint, folder.iterdir())):
        raise CheckpointError(
            f"{folder}: its folders look like runs of their own; give them one by one: "
            f"{' '.join(shlex.quote(str(run)) for run in runs)}; if each is one checkpoint, choose its weights with "
            "--file"
        )
    for entry in sorted(folder.iterdir()):
        if entry.name.endswith(".index.json") or (entry.suffix in SUFFIXES and SHARD.search(entry.name)):
            raise CheckpointError(
                f"{folder}: is one checkpoint in shards ({entry.name}); give the folder that holds several such folders"
            )
        path = _weights_in(entry, selection) if entry.is_dir() else entry if _is_checkpoint(entry) else None
        if path is None:
            ignored.append(entry.name)
        else:
            found[entry.name] = path
    return found, ignored


def _weights_in(folder: Path, selection: Selection) -> Path | None:
    """The file with the weights, or their index, in a checkpoint's own folder; None where there is none."""
    if selection.file is not None:
        return path if (path := folder / selection.file).is_file() else None
    for name in KNOWN_FILES:
        if (folder / name).is_file():
            return folder / name
    able = [path for path in sorted(folder.iterdir()) if _is_checkpoint(path)]
    if len(able) > 1:
        raise CheckpointError(
            f"{folder}: {', '.join(path.name for path in able[:3])}{', ...' * (len(able) > 3)} could all be its "
            f"weights; choose one with --file, as in --file {able[0].name}"
        )
    return able[0] if able else None


def _is_run(folder: Path, selection: Selection) -> bool:
    """Whether a folder holds checkpoints, rather than the files of one: several whose names differ in their numbers."""
    if selection.file is not None or any((folder / name).is_file() for name in KNOWN_FILES):
        return False
    names = [path.name for path in folder.iterdir() if _is_checkpoint(path) and not SHARD.search(path.name)]
    return len(names) > 1 and len({re.sub(r"\d+", "0", name) for name in names}) == 1


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() and path.suffix in SUFFIXES and not NOT_CHECKPOINTS.fullmatch(path.name)


def _common(
    folder: Path, contents: Mapping[str, Contents], selection: Selection
) -> tuple[dict[str, tuple[StoredTensor, ...]], dict[str, tuple[str, ...]]]:
    """The tensors taken, which all checkpoints must have with equal shapes, and those left out by the reason."""
    first_name, first = next(iter(contents.items()))
    tensors = {}
    for tensor, stored in first.tensors.items():
        if selection.takes(tensor) and stored.num_values:
            tensors[tensor] = tuple(one.tensors[tensor] for one in contents.values())
    if not tensors:
        raise CheckpointError(f"{folder}: no tensor of floats is left of {len(first.tensors)} in {first_name}")
    left_out: dict[str, tuple[str, ...]] = {}
    for name, why in {name: why for one in contents.values() for name, why in one.left_out.items()}.items():
        left_out[why] = (*left_out.get(why, ()), name)
    if not_asked := tuple(name for name in first.tensors if not selection.takes(name)):
        left_out["by --include and --exclude"] = not_asked
    return tensors, left_out


Shapes = Mapping[str, tuple[int, ...]]


def _check_shapes(
    folder: Path,
    contents: Mapping[str, Contents],
    selection: Selection,
    steps: Mapping[str, int],
    unmatched: Collection[str],
) -> None:
    """Raises CheckpointError where the checkpoints are not all of the same tensors, with every one that differs."""
    shapes = {
        name: {tensor: stored.shape for tensor, stored in one.tensors.items() if selection.takes(tensor)}
        for name, one in contents.items()
    }
    alike = [[name for name in shapes if shapes[name] == one] for one in shapes.values()]
    usual = max(alike, key=len)
    others = [name for name in shapes if name not in usual]
    if not others:
        return
    differing = _differences(shapes, usual[0], others)
    more = len(differing) - MOST_TENSORS
    told = "; ".join([*list(differing.values())[:MOST_TENSORS], *([f"{more} more tensors differ"] if more > 0 else [])])
    if len(others) == 1 and len(usual) > 1:
        way_out = f"{others[0]} does not fit the other {len(usual)} checkpoints; {leave_out(others, steps, unmatched)}"
    elif more > 0 or not {*shapes[usual[0]]} - {*differing}:
        way_out = "these are checkpoints of different models; give a folder with those of one"
    else:
        patterns = " ".join(f"'{re.escape(tensor)}'" for tensor in differing)
        way_out = f"leave {'it' if len(differing) == 1 else 'them'} out with --exclude {patterns}"
    raise CheckpointError(f"{folder}: {told}; {way_out}")


def _differences(shapes: Mapping[str, Shapes], usual: str, others: Sequence[str]) -> dict[str, str]:
    """Tensors that a checkpoint has otherwise than the usual one, each with the first such difference."""
    differing: dict[str, str] = {}
    for name in others:
        for tensor in dict.fromkeys([*shapes[usual], *shapes[name]]):
            shape, other = shapes[usual].get(tensor), shapes[name].get(tensor)
            if shape == other or tensor in differing:
                continue
            if shape is None or other is None:
                has, lacks = (usual, name) if other is None else (name, usual)
                differing[tensor] = f"{tensor} is in {has} but not in {lacks}"
            else:
                differing[tensor] = f"{tensor} has shape {list(shape)} in {usual} and {list(other)} in {name}"
    return differing


def leave_out(bad: Sequence[str], steps: Mapping[str, int], unmatched: Collection[str]) -> str:
    """How to leave some of a folder's checkpoints out, whose names and numbers are given: with --steps, where a short
    pattern can."""
    these = "this checkpoint" if len(bad) == 1 else listed(bad)
    pattern = _pattern_without(bad, steps, unmatched)
    return (
        f"leave {these} out, {f'with --steps {shlex.quote(pattern)} or ' if pattern else ''}by moving {_it(bad)} away"
    )


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _pattern_without(bad: Sequence[str], steps: Mapping[str, int], unmatched: Collection[str]) -> str | None:
    """A pattern for --steps that takes every checkpoint but the bad ones, with its number; None where no short one
    does."""
    rest = {name: number for name, number in steps.items() if name not in bad}
    if len(bad) > MOST_NAMES or len(rest) < 2:
        return None
    names = "|".join(map(re.escape, bad))
    for numbers_before in range(MOST_NUMBERS):
        before = rf"(?:\D*\d+){{{numbers_before}}}" if numbers_before else ""
        pattern = f"^(?!(?:{names})$){before}" + r"\D*(\d+)"
        with contextlib.suppress(CheckpointError):
            if number_names([*steps, *unmatched], pattern, Path())[0] == rest:
                return pattern
    return None


def _digest(
    folder: Path,
    steps: Mapping[str, int],
    contents: Mapping[str, Contents],
    tensors: Mapping[str, tuple[StoredTensor, ...]],
) -> str:
    files = [
        [str(path.relative_to(folder)), number, path.stat().st_size, _sampled(path)]
        for name, number in steps.items()
        for path in contents[name].files
    ]
    taken = [[name, list(stored[0].shape), [str(one.dtype) for one in stored]] for name, stored in tensors.items()]
    return digest(FORMAT, files, taken)


def _sampled(path: Path) -> str:
    """SHA-256 of three samples of a file, which are all of a small one."""
    sha256, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for place in _places(size):
            file.seek(place)
            sha256.update(file.read(SAMPLE_BYTES))
    return sha256.hexdigest()


def _places(size: int) -> Iterable[int]:
    last = max(0, size - SAMPLE_BYTES)
    return sorted({0, last // 2, last})
