"""The command `tipl`: every job by its name, from any folder.

    tipl collect --experiment smoke
    tipl collect --help

`tipl NAME` calls the same `main` as `python jobs/NAME.py`. Loads only the requested job.
`tipl --tyro-print-completion SHELL` prints what bash, zsh or tcsh wants to complete names, options and experiments.
"""

import ast
import dataclasses
import importlib.util
import sys
from types import ModuleType
from typing import Any, NoReturn

import tipl_ray
from tipl_ray.errors import as_command, no_such, print_error
from tipl_ray.places import JOBS_FOLDER

NAMES = (
    "collect",
    "train",
    "evaluate",
    "pipeline",
    "cross_validate",
    "sweep",
    "compare",
    "accelerate",
    "fork",
    "find_rule",
    "learn_jumps",
    "data",
)
"""The jobs, in the order of the work."""

HELP, VERSION, COMPLETION = ("--help", "-h"), "--version", "--tyro-print-completion"


def main() -> int | None:
    """Run the job that the command line names; the exit status. Exits with 2 and one line for a name that is none."""
    name, *arguments = sys.argv[1:] or HELP[:1]
    if name in HELP:
        print(overview())
        return 0
    if name == VERSION:
        print(tipl_ray.__version__)
        return 0
    if name == COMPLETION:
        _complete([name, *arguments])
    if name not in NAMES:
        print_error(no_such("job", name, NAMES))
        return 2
    sys.argv = [f"tipl {name}", *arguments]  # as usage lines have it
    return load(name).main()


def overview() -> str:
    """What `tipl --help` shows: a line for each job."""
    from tipl_ray.terminal import folded

    lines = [f"  {name:<16}{_first_line(name)}" for name in NAMES]
    text = "\n".join(
        [
            "usage: tipl JOB [OPTIONS]",
            "",
            f"{tipl_ray.__doc__}".strip(),
            "",
            *lines,
            "",
            "tipl JOB --help explains a job and all its options; tipl --version shows the version.",
            "",
            f"tipl {COMPLETION} SHELL prints shell completion for bash, zsh or tcsh.",
        ]
    )
    return folded(text)


@dataclasses.dataclass(frozen=True)
class _Data:
    """Whose subcommands `tipl data --help` lists."""


def _complete(arguments: list[str]) -> NoReturn:
    """Print a shell's completion of every job, which tyro writes, and exit."""
    import tyro

    from tipl_ray.command_line import options
    from tipl_ray.config import JOBS

    jobs: dict[str, Any] = {name: options([name]) for name in JOBS}
    jobs |= {"pipeline": options(load("pipeline").STAGES), "compare": load("compare").Comparison(), "data": _Data()}
    tyro.cli(tyro.extras.subcommand_type_from_defaults(jobs, prefix_names=False), args=arguments, prog="tipl")
    raise AssertionError("tyro exits once it has printed it")


def load(name: str) -> ModuleType:
    """The file of a job as a module, with its description for `tipl`."""
    spec = importlib.util.spec_from_file_location(f"tipl_{name}", JOBS_FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    job = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = job
    before = list(sys.path)
    spec.loader.exec_module(job)
    # A job puts the folder above its own first, for a checkout that is not installed.
    sys.path[:] = before
    job.__doc__ = as_command(job.__doc__ or "")
    return job


def _first_line(name: str) -> str:
    described = ast.get_docstring(ast.parse((JOBS_FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    line = described.splitlines()[0].removeprefix(f"{name.capitalize()}: ")
    return line[0].upper() + line[1:]
