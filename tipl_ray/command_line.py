"""The experiment of a command line: read, checked for the jobs at hand, and refused in one line before work starts."""

import contextlib
import dataclasses
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import tyro

from tipl_ray.config import JOBS, Experiment, find_experiment, load_experiment, named_experiments
from tipl_ray.digest import as_table, flat
from tipl_ray.errors import UserError, nearest
from tipl_ray.places import absolute_storage, check_places, forget_empty_variables, in_checkout, with_variables
from tipl_ray.registry import REPRESENTATIONS


def parse_arguments(
    description: str, arguments: list[str] | None = None, *, jobs: Sequence[str] = (), experiment: str = "demo"
) -> Experiment:
    """The experiment of a command line: `--experiment FILE` and `--preset NAME` first, then any field of it by name.

    It is checked for these jobs of `JOBS`, or for all; without `--experiment` it is the one of the name given here.
    Exits with one line on standard error: status 2 where the file or a field is refused, 1 where nothing can be written
    where it says. What was said and changes nothing in these jobs is told in a line.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    forget_empty_variables()
    with refused():
        said = _options(arguments)
        given = take_option(arguments, "--experiment")
        path = find_experiment(given) if given else named_experiments().get(experiment) or find_experiment(experiment)
        # The preset decides what the other fields' defaults are, wherever it stands among them.
        loaded = load_experiment(path, take_option(arguments, "--preset"))
    usage = (
        f"{description}\n\n--experiment FILE   TOML file with the experiment, or its name; it is read first\n"
        f"                    (default: {path})"
    )
    parsed = tyro.cli(Experiment, default=loaded, args=arguments, description=usage)
    with refused():
        parsed = _with_places(parsed).check(*jobs)
        _check_named(parsed, jobs or tuple(JOBS))
    for option, why in _without_effect(parsed, jobs or tuple(JOBS), said):
        print(f"note: {option} has no effect: {why}", file=sys.stderr)
    try:
        check_places(parsed.storage_path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    return parsed


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Exit with status 2 and one line on standard error where a command line or an experiment's file is refused."""
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _with_places(experiment: Experiment) -> Experiment:
    """With $NAME in its folders as the environment has it, and its own storage wherever a worker stands."""
    settings = experiment.accelerate
    storage = with_variables("storage", experiment.storage)
    if storage is not None or not in_checkout():
        storage = dataclasses.replace(experiment, storage=storage).storage_path
    data = tuple(str(with_variables("train.data", one)) for one in experiment.train.data)
    predictors = with_variables("accelerate.predictors_storage", settings.predictors_storage)
    return dataclasses.replace(
        experiment,
        storage=storage,
        train=dataclasses.replace(experiment.train, data=data),
        accelerate=dataclasses.replace(settings, predictors_storage=predictors),
    )


def _check_named(experiment: Experiment, jobs: Collection[str]) -> None:
    """Refuse names of tasks, files and folders that there are not, for these jobs, before anything is loaded."""
    # A third of a second, which --help does not wait for.
    import gymnasium

    tasks = {experiment.collect.task: "collect.task"} if set(jobs) - {"accelerate"} else {}
    if "accelerate" in jobs:
        tasks |= {task.partition("@")[0]: "accelerate.tasks" for task in experiment.accelerate.tasks}
    for task, field in tasks.items():
        module, _, name = task.rpartition(":")
        if not module and name not in gymnasium.registry:
            known = sorted(spec.id for spec in gymnasium.registry.values() if "mujoco" in str(spec.entry_point))
            near = nearest(name, known) or f"; MuJoCo's are {', '.join(known)}"
            raise ValueError(f"{field}={name!r} is no task of gymnasium{near}")
    if "train" in jobs or "evaluate" in jobs:
        for storage in experiment.train.data:
            _check_folder("train.data", storage)
    if "accelerate" in jobs and experiment.accelerate.predictors:
        settings = experiment.accelerate
        path = find_experiment(settings.predictors_from, "accelerate.predictors_from")
        source = load_experiment(path, preset="causal").check_fields()
        size = source.collect.epochs_per_snapshot
        for contender, epochs in settings.predictors.items():
            skipped = source.ppo.num_epochs - epochs
            if skipped < size or skipped % size or epochs % size:
                raise ValueError(
                    f"accelerate.contenders: {contender!r} leaves {skipped} of {source.ppo.num_epochs} epochs to a "
                    f"predictor of snapshots that are {size} epochs apart"
                )
        if settings.predictors_storage is not None:
            _check_folder("accelerate.predictors_storage", settings.predictors_storage)


def _check_folder(field: str, place: str) -> None:
    folder = Path(absolute_storage(place))
    if "://" not in place and not folder.is_dir():
        siblings = [one.name for one in folder.parent.iterdir() if one.is_dir()] if folder.parent.is_dir() else []
        raise ValueError(f"{field}={place!r}: there is no folder {folder}{nearest(folder.name, siblings)}")


def _without_effect(experiment: Experiment, jobs: Sequence[str], said: Collection[str]) -> Iterator[tuple[str, str]]:
    """Options of a command line that change nothing in these jobs, each with the reason."""
    read = ("name", "storage", "tracking", *(field for job in jobs for field in JOBS[job]))
    settings = experiment.accelerate
    reasons: dict[str, str] = {}

    def none_of(section: str, fields: Sequence[str], why: str) -> None:
        reasons.update({f"{section}.{field}": why for field in fields})

    if "basis" in read:
        reasons.update(REPRESENTATIONS.load(experiment.basis.kind)(experiment.basis).without_effect())
    if not experiment.evaluate.run_policies_of:
        fields = ["windows_per_trial", "episodes", "sampled_actions"]
        none_of("evaluate", fields, "evaluate.run_policies_of is empty, so that no policy is run")
    if experiment.sweep.search == "grid":
        none_of("sweep", ("num_samples", "seed"), "a grid has every combination once")
    if list(jobs) == ["sweep"]:
        none_of("train", ("use_gpu",), "sweep.gpus_per_trial gives the runs of a sweep GPUs")
        none_of("train", ("num_seeds",), "the runs of a sweep have one seed each; vary train.seed")
    if list(jobs) == ["accelerate"]:
        none_of("collect", ("task",), "accelerate.tasks names the tasks")
        none_of("collect", ("trials_per_actor",), "all trials of a contender are one stack")
        none_of("ppo", ("num_epochs",), "each contender names its own")
        none_of("ppo", ("learning_rate",), "each contender's is chosen from accelerate.learning_rates")
        if not settings.predictors:
            none_of("accelerate", ("predictors_from", "predictors_storage"), "no contender has a predictor")
    for field in said:
        option = f"--{field.replace('_', '-')}"
        if field in reasons:
            yield option, reasons[field]
        elif not any(field == one or field.startswith(f"{one}.") for one in read) and _is_field(experiment, field):
            yield option, f"{' and '.join(jobs)} does not read it"


def _is_field(experiment: Experiment, field: str) -> bool:
    """Whether an option is an experiment's, and not the job's own."""
    return field in dict(flat(as_table(experiment))) or field == "preset"


def _options(arguments: Sequence[str]) -> list[str]:
    """Fields that a command line sets, in its order. Raises ValueError for one that is set twice."""
    said: list[str] = []
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        option = argument.partition("=")[0]
        section, dot, field = option.removeprefix("--").replace("-", "_").rpartition(".")
        field = f"{section}{dot}{field.removeprefix('no_')}"
        if field in said:
            raise ValueError(f"{option} is given twice")
        said.append(field)
    return said


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
