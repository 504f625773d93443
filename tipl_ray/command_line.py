"""From a command line to an experiment: read it, check it for these jobs, and refuse it in one line if it is wrong."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from typing_extensions import Doc

from tipl_ray.config import (
    IMPROVING,
    JOBS,
    MOVED,
    Experiment,
    RunTask,
    check_place,
    every_field,
    fields_read,
    naming,
)
from tipl_ray.digest import redacted
from tipl_ray.errors import UserError, nearest, print_error
from tipl_ray.experiments import find_experiment, load_experiment, named_experiments
from tipl_ray.places import absolute_storage, check_places, forget_empty_variables, in_checkout, with_variables
from tipl_ray.registry import REPRESENTATIONS
from tipl_ray.terminal import COLOURS, folded, is_terminal, say

if TYPE_CHECKING:
    from tipl_ray.remembered import Remembered

TERMS = {
    "REPW": "return error of predicted weights: the absolute difference between the mean returns of the predicted and "
    "the true policy",
    "WPE": "weight prediction error: the mean squared error per weight between predicted and true weights",
    "skill": "the share of the squared error of copying the last snapshot that a predictor removes: 1 is perfect, 0 is "
    "no better than copying",
    "TIPL": "Transformer as Implicit Policy Learner (arXiv 2503.04074): a causal Transformer that predicts a policy's "
    "next snapshots from its last ones",
    "snapshot": "the policy's weights as one flat vector, with the observation statistics of that moment; one after "
    "every few update epochs",
}
"""Terms that a job's --help defines if it uses them, in words that use only terms after them."""

FIRST_BOX = re.compile(r"^(?=(?:\x1b\[[\d;]*m)*(?:\u256d|options|positional arguments|subcommands))", re.MULTILINE)
"""Where --help's description ends: at a box, or on a terminal without such letters at a heading."""

OWN_OPTIONS = ("--experiment", "--help", "--tyro-print-completion", "--tyro-write-completion")
"""Options that are not fields."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """A command line, and the experiment's file and storage that complete it."""

    description: str
    jobs: Sequence[str]
    """Jobs of `JOBS` to run; empty means all."""
    arguments: Sequence[str]
    """Without --experiment and --preset."""
    said: Sequence[str]
    """Fields that it sets, by their dotted names."""
    path: Path
    """The experiment's file."""
    preset: str | None
    memory: "Remembered | None"
    """What the storage remembers, if a storage is given and no experiment."""

    def experiment(self, preset: str | None) -> Experiment:
        """The experiment, checked; exits as `parse_arguments` does.

        Options override what the storage remembers, which overrides the experiment's file.
        """
        with refused():
            # The preset decides what the other fields' defaults are, wherever it stands among them.
            loaded = load_experiment(self.path, preset)
            sections = self.memory.sections(loaded.preset) if self.memory else {}
            loaded = dataclasses.replace(loaded, **sections)
        shown = _shown(loaded, fields_read(self.jobs))
        parsed = read_options(type(shown), self._usage(shown), default=shown, args=self.arguments)
        with refused():
            parsed = _with_places(_plain(parsed, loaded)).check(*self.jobs)
            _check_named(parsed, self.jobs)
        for option, why in _without_effect(parsed, self.said):
            print(f"note: {option} has no effect: {why}", file=sys.stderr)
        with refused():
            check_places(parsed.storage_path)
            if parsed.where.tracking.uri:
                _check_tracking(parsed.where.tracking.uri)
        if self.memory:
            taken = ", ".join(self._taken(parsed, {*sections, *(["preset"] if self.memory.preset else [])}))
            say(f"{_named(self.jobs)}: {taken} from storage {redacted(parsed.storage_path)}")
        return parsed

    def _usage(self, shown: Any) -> str:
        known = "" if tuple(self.jobs) == ("accelerate",) else "what the storage remembers, else "
        return "\n".join(
            [
                *(self.description.strip(), "", *_terms_in("\n".join([self.description, *_help_texts(shown)]))),
                "--experiment FILE   the experiment's TOML file, or its name; options override it "
                f"(default: {known}{self.path.name})",
            ]
        )

    def _taken(self, experiment: Experiment, sections: Collection[str]) -> Iterator[str]:
        """What was taken from the storage: what these jobs read and the command line does not set."""
        collect, split = experiment.collect, experiment.split
        told = {
            "preset": f"preset {experiment.preset}",
            "collect.task": f"task {collect.task}",
            "collect.num_trials": f"{collect.num_trials} trials (seeds {collect.seeds[0]} to {collect.seeds[-1]})",
            "collect.policy_hidden": f"policy {'-'.join(map(str, collect.policy_hidden))}",
            "split.test_trials": f"split {split.validation_trials}/{split.test_trials}",
        }
        for field, text in told.items():
            if field.partition(".")[0] in sections and field not in self.said and field in fields_read(self.jobs):
                yield text


def parse_arguments(
    description: str, arguments: list[str] | None = None, *, jobs: Sequence[str] = (), experiment: str = "demo"
) -> Experiment:
    """The experiment of a command line: `--experiment FILE` and `--preset NAME` first, then any field of it by name.

    It is checked for these jobs of `JOBS`, or for all; without `--experiment` it is what the storage named by
    `--storage` remembers, over the one of the name given here. Exits with one line on standard error: status 2 where
    the file or an option is refused, 1 where a place cannot be read or written. Prints a line for each option that has
    no effect in these jobs, and one for what was taken from the storage."""
    line = _read(description, arguments, jobs or tuple(JOBS), experiment)
    return line.experiment(line.preset or (line.memory.preset if line.memory else None))


def parse_trained(description: str, arguments: list[str] | None = None, *, jobs: Sequence[str]) -> list[Experiment]:
    """As `parse_arguments`, once for each preset that the storage remembers a model of, unless one is named."""
    line = _read(description, arguments, jobs, "demo")
    trained = line.memory.trained_for if line.memory and not line.preset else ()
    return [line.experiment(preset) for preset in trained or [line.preset]]


class _Captured(io.TextIOWrapper):
    """What is printed meanwhile, in the letters and colours of the real output."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding=sys.stdout.encoding, errors="backslashreplace", newline="")

    def isatty(self) -> bool:
        return is_terminal(sys.__stdout__)

    def text(self) -> str:
        self.seek(0)
        return self.read()


def read_options(kind: Any, description: str, *, args: Sequence[str] | None = None, **settings: Any) -> Any:
    """Options of a command line, read by tyro, which runs a `SubcommandApp`'s command too.

    tyro does not fold the descriptions that --help shows, and joins some of their lines; here they are folded. What it
    refuses, in a box of several lines, is one line here.
    """
    read = functools.partial(getattr(kind, "cli", functools.partial(tyro.cli, kind)), description=description)
    arguments = list(sys.argv[1:] if args is None else args)
    if any(argument.startswith("--tyro-") for argument in arguments):
        return read(args=arguments, **settings)
    if not {"--help", "-h"} & set(arguments):
        errors = _WithoutBox()
        try:
            with contextlib.redirect_stderr(errors):
                return read(args=arguments, **settings)
        finally:
            if errors.box:
                print_error(_in_one_line(errors.box, arguments, hasattr(kind, "cli")))
    captured = _Captured()
    try:
        with contextlib.redirect_stdout(captured):
            return read(args=arguments, **settings)
    finally:
        text = captured.text()
        described = FIRST_BOX.split(text, maxsplit=1)[0]
        try:
            print(re.sub(r"\n{3,}", "\n\n", folded(described)), text[len(described) :], sep="\n\n", end="", flush=True)
        except BrokenPipeError:  # `| head` has seen enough; Python would try to write the rest when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


TITLES = (
    *("Unrecognized options", "Required options", "Value error"),
    *("Missing argument", "Missing subcommand", "Invalid choice"),
)
"""Titles of the boxes in which tyro says what it refuses."""


class _WithoutBox:
    """Standard error, without the box of several lines in which tyro says what it refuses."""

    def __init__(self) -> None:
        self.box, self._real = "", sys.stderr

    def write(self, text: str) -> int:
        uncoloured = COLOURS.sub("", text)
        if self.box or uncoloured.lstrip("\u256d\u2500+- ").startswith(TITLES):
            self.box += uncoloured
            return len(text)
        return self._real.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


REPHRASED = (
    (r"Error parsing (\S+): no type matching .*? could be instantiated from \['?(.*?)'?\]\..*", r"\1=\2: wrong type"),
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: '(.*)'", r"\1=\2 is not an integer"),
    (r"Error parsing (\S+): could not convert string to float: '(.*)'", r"\1=\2 is not a number"),
    (r"Missing value for argument '(.*)'\. Expected 1 values?\.", r"\1 needs a value"),
    (r"Missing value for argument '(.*)'\. Expected (\d+) values\.", r"\1 needs \2 values"),
    (r"Unrecognized options: (-\S+?)(, .*)?", r"\1: no such option"),
    (r"Unrecognized options: (\S+?)(, .*)?", r"\1: not a command, nor the value of an option"),
    (r"Missing from .*?: (\S+) .*", r"\1 is missing"),
    (r"Expected one of \{(.*)\}\.", r"a command is missing: one of \1"),
)
"""What tyro says, as patterns, and how it is said here."""


def _in_one_line(box: str, arguments: Sequence[str], has_commands: bool) -> str:
    """What tyro has against a command line, and where to read on."""
    lines = [line.strip("\u2502\u2570\u256f|+ ") for line in box.splitlines()[1:]]
    groups = itertools.groupby(lines, key=lambda line: bool(line.strip("\u2500-")))  # rules are between the parts
    parts = [" ".join(group) for is_text, group in groups if is_text]
    complaint = parts[0]
    for pattern, said in REPHRASED:
        if found := re.fullmatch(pattern, complaint):
            complaint = found.expand(said)
            break
    program = next((found[1] for part in parts if (found := re.search(r"(?:run:?|see) (.*) --help", part))), "")
    command = next((argument for argument in arguments[:1] if not argument.startswith("-")), "")
    if names := next((part.partition(": ")[2].split(", ") for part in parts if "subcommands: " in part), []):
        complaint += nearest(command, names)
    elif has_commands and command and not program.endswith(f" {command}"):
        program += f" {command}"
    return f"{complaint}; see {program} --help"


def _help_texts(shown: Any) -> Iterator[str]:
    """The help texts of the sections and fields that a job's --help shows."""
    for field in dataclasses.fields(shown):
        notes = getattr(field.type, "__metadata__", ())
        if tyro.conf.Suppress in notes:
            continue
        yield from (note.documentation for note in notes if isinstance(note, Doc))
        if dataclasses.is_dataclass(value := getattr(shown, field.name)):
            yield str(type(value).__doc__)
            yield from _help_texts(value)


def _terms_in(text: str) -> list[str]:
    """Lines that define the terms of `TERMS` that a text uses; none where it uses none."""
    used = []
    for term, meaning in TERMS.items():
        if re.search(rf"\b{term}s?\b", text):
            used.append(f"  {term:<10}{meaning}")
            text += meaning
    return ["Terms:", *used[::-1], ""] if used else []


def options(jobs: Sequence[str]) -> Any:
    """All options of these jobs, with the demo's values: a dataclass for tyro.

    For the completion of a shell, which offers the known experiments by name.
    """
    shown = _shown(load_experiment("demo"), fields_read(jobs))
    names = Literal[tuple(named_experiments())]  # type: ignore[valid-type]
    kind = dataclasses.make_dataclass(
        "Options", [("experiment", names)], bases=(type(shown),), frozen=True, kw_only=True
    )
    return kind(experiment="demo", **{field.name: getattr(shown, field.name) for field in dataclasses.fields(shown)})


def _read(description: str, arguments: list[str] | None, jobs: Sequence[str], experiment: str) -> CommandLine:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    forget_empty_variables()
    with refused():
        said = _said(arguments, jobs)
        given, preset = take_option(arguments, "--experiment"), take_option(arguments, "--preset")
        path = find_experiment(given) if given else named_experiments().get(experiment) or find_experiment(experiment)
        # What accelerates is kept in storages of its own.
        asked = None if given or list(jobs) == ["accelerate"] else take_option(list(arguments), "--storage")
        return CommandLine(
            description=description,
            jobs=jobs,
            arguments=arguments,
            said=said,
            path=path,
            preset=preset,
            memory=_memory(asked) if asked else None,
        )


def _memory(storage: str) -> "Remembered | None":
    place = absolute_storage(with_variables("storage", storage) or storage)
    check_place("storage", place)
    check_places(place)
    # Takes a third of a second to load.
    from tipl_ray.remembered import remembered

    return remembered(place)


def _shown(part: Any, read: Collection[str], prefix: str = "") -> Any:
    """A section, in a subclass whose other fields tyro neither shows nor sets."""
    fields: list[Any] = []
    values: dict[str, Any] = {}
    docs = _field_docs(type(part))
    for field in dataclasses.fields(part):
        name, value = f"{prefix}{field.name}", getattr(part, field.name)
        if any(one.startswith(f"{name}.") for one in read):
            value = _shown(value, read, f"{name}.")
            # What says where a job runs has no section on a command line.
            kind = Annotated[type(value), tyro.conf.arg(name="")] if name == "where" else type(value)
            fields.append((field.name, kind))
        elif name not in read:
            fields.append((field.name, Annotated[field.type, tyro.conf.Suppress, tyro.conf.Fixed]))
        elif field.name in docs:
            fields.append((field.name, Annotated[field.type, Doc(docs[field.name])]))
        values[field.name] = value
    known = {"__doc__": " ".join((type(part).__doc__ or "").split())}
    made = dataclasses.make_dataclass(
        type(part).__name__, fields, bases=(type(part),), namespace=known, frozen=True, kw_only=True
    )
    return made(**values)


def _field_docs(section: type) -> dict[str, str]:
    """The docstrings under a section's fields, each in one line, of which tyro would keep the line breaks."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(section)).body if isinstance(node, ast.ClassDef))
    docs = {}
    for field, below in itertools.pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _plain(shown: Any, loaded: Any) -> Any:
    """What was set in something `_shown`, in the class that it was made of."""
    changed = {}
    for field in dataclasses.fields(loaded):
        value, before = getattr(shown, field.name), getattr(loaded, field.name)
        changed[field.name] = _plain(value, before) if dataclasses.is_dataclass(before) else value
    return dataclasses.replace(loaded, **changed)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Exit with one line on standard error: status 2 for a command line or a file, 1 for a place that is refused."""
    try:
        yield
    except (OSError, ValueError, UserError) as error:
        print_error(error)
        raise SystemExit(1 if isinstance(error, UserError) else 2) from error


def _with_places(experiment: Experiment) -> Experiment:
    """With $NAME in its folders replaced from the environment, and its storage as an absolute path for the workers."""
    storage = with_variables("storage", experiment.where.storage)
    if storage is not None or not in_checkout():
        storage = experiment.at(storage).storage_path
    data = tuple(str(with_variables("train.data", one)) for one in experiment.train.data)
    predictors = with_variables("predictors_storage", experiment.where.predictors_storage)
    return dataclasses.replace(
        experiment,
        where=dataclasses.replace(experiment.where, storage=storage, predictors_storage=predictors),
        train=dataclasses.replace(experiment.train, data=data),
    )


def _check_named(experiment: Experiment, jobs: Collection[str]) -> None:
    """Refuse names of tasks, files and folders that there are not, for these jobs, before anything is loaded."""
    # A third of a second, which --help does not wait for.
    import gymnasium

    tasks = {experiment.collect.task: "collect.task"} if set(jobs) - {"accelerate"} else {}
    if "accelerate" in jobs:
        for field in ("tasks", "search_tasks"):
            given = getattr(experiment.accelerate, field)
            tasks |= {RunTask.read(task).task: f"accelerate.{field}" for task in given}
    if set(IMPROVING) & set(jobs):
        tasks |= dict.fromkeys(experiment.improve.tasks, "improve.tasks")
    for task, field in tasks.items():
        module, _, name = task.rpartition(":")
        if not module and name not in gymnasium.registry:
            known = sorted(spec.id for spec in gymnasium.registry.values() if "mujoco" in str(spec.entry_point))
            near = nearest(name, sorted(gymnasium.registry)) or f"; MuJoCo's are {', '.join(known)}"
            raise ValueError(f"{field}={name!r} is not a gymnasium task{near}")
    if {"train", "evaluate", "cross_validate"} & set(jobs):
        for storage in experiment.train.data:
            _check_folder("train.data", storage)
    variants = {"accelerate.contenders": experiment.accelerate.running if "accelerate" in jobs else ()}
    variants["improve.regimes"] = experiment.improve.regimes if set(IMPROVING) & set(jobs) else ()
    jumping = [(field, one) for field, some in variants.items() for one in some if one.jump]
    if jumping:
        where = experiment.where
        path = find_experiment(where.predictors_from, "predictors_from")
        source = load_experiment(path, preset="causal").check_fields()
        for field, contender in jumping:
            with naming(field):
                contender.horizon(experiment.ppo, source)
        if where.predictors_storage is not None:
            _check_folder("predictors_storage", where.predictors_storage)


def _check_tracking(uri: str) -> None:
    # Takes a fifth of a second to load.
    from tipl_ray.tracking import check_uri

    check_uri(uri)


def _check_folder(field: str, place: str) -> None:
    folder = Path(absolute_storage(place))
    if "://" not in place and not folder.is_dir():
        siblings = [one.name for one in folder.parent.iterdir() if one.is_dir()] if folder.parent.is_dir() else []
        raise ValueError(f"{field}={place!r}: no such folder, {folder}{nearest(folder.name, siblings)}")


def _without_effect(experiment: Experiment, said: Collection[str]) -> Iterator[tuple[str, str]]:
    """Options that have no effect given the others, each with the reason."""
    reasons: dict[str, str] = {}

    def none_of(section: str, fields: Sequence[str], why: str) -> None:
        reasons.update({f"{section}.{field}": why for field in fields})

    if any(field.startswith(("basis.", "model.", "train.")) for field in said):
        reasons.update(REPRESENTATIONS.load(experiment.basis.kind)(experiment.basis).without_effect())
    if not experiment.evaluate.run_policies_of:
        fields = ["windows_per_trial", "episodes", "sampled_actions"]
        none_of("evaluate", fields, "evaluate.run_policies_of is empty, so no policy is rolled out")
    if experiment.sweep.search == "grid":
        none_of("sweep", ("num_samples", "seed"), "a grid search runs every combination once")
    if not any(one.jump for one in experiment.accelerate.running):
        none_of("where", ("predictors_from", "predictors_storage"), "no variant uses a predictor")
    for field in said:
        if field in reasons:
            yield _option(field), reasons[field]


def _said(arguments: Sequence[str], jobs: Sequence[str]) -> list[str]:
    """Fields that a command line sets, in its order.

    Raises ValueError for an option that is given twice, that these jobs do not read, or that there is not.
    """
    said: list[str] = []
    known = {_option(field): field for field in every_field()}
    moved = {_option(field): _option(f"where.{field.rpartition('.')[2]}") for field in MOVED}
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        given = argument.partition("=")[0]
        option = given.replace("_", "-")
        if option not in known:
            option = re.sub(r"^(.*\.|--)no-", r"\1", option)
        field = known.get(option, option)
        if field in said:
            raise ValueError(f"{given} is given twice")
        said.append(field)
        if option in known:
            _check_read(given, field, jobs)
        elif option not in OWN_OPTIONS:
            hint = (
                f"it is now called {moved[option]}"
                if option in moved
                else f"no such option{nearest(option, list(known))}"
            )
            raise ValueError(f"{given}: {hint}")
    return said


def _check_read(option: str, field: str, jobs: Sequence[str]) -> None:
    if field not in fields_read(jobs):
        readers = [job for job in JOBS if field in fields_read([job])]
        if not readers:
            raise ValueError(f"{option}: it can be set only in the experiment's file")
        do = f"{', '.join(readers[:-1])} and {readers[-1]} do" if len(readers) > 1 else f"{readers[0]} does"
        raise ValueError(f"{option}: {_named(jobs)} does not use it; {do}")


def _option(field: str) -> str:
    """As a field is named on a command line."""
    return f"--{field.removeprefix('where.').replace('_', '-')}"


def _named(jobs: Sequence[str]) -> str:
    return jobs[0] if len(jobs) == 1 else "pipeline"


def take_option(arguments: list[str], option: str) -> str | None:
    """Remove an option from a command line and return its value. Raises ValueError where it has none."""
    for position, argument in enumerate(arguments):
        if argument == option:
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
            taken = 2
        elif argument.startswith(f"{option}="):
            value, taken = argument.removeprefix(f"{option}="), 1
        else:
            continue
        if not value or value.startswith("--"):
            raise ValueError(f"{option} is given without its value")
        del arguments[position : position + taken]
        return value
    return None
