"""Surroundings that do not fit and values that cannot be, each with what the user then reads.

python tests/test_surroundings.py writes the table into docs/surroundings.md. A row more is a `Case` more.
"""

import contextlib
import dataclasses
import errno
import io
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trajectories import write_trials

from tipl_ray.jobs import connected_to_ray, exit_status
from tipl_ray.places import CHECKOUT

PAGE = CHECKOUT / "docs" / "surroundings.md"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Something that is not as it should be, tried in an empty folder that is the working directory."""

    what: str
    attempt: Callable[[], object]
    """What a user does. It exits with status 1 or 2, and what it says on standard error is the row."""
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables beside those that are there."""


def job(name: str, *arguments: str) -> Callable[[], object]:
    """A job's own script with a command line; it is refused before it loads anything."""

    def attempt() -> None:
        script = str(CHECKOUT / "jobs" / f"{name}.py")
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")

    return attempt


def with_file(name: str, text: str, then: Callable[[], object]) -> Callable[[], object]:
    """Write a file, then what the user does."""

    def attempt() -> None:
        Path(name).write_text(text)
        then()

    return attempt


def mine(text: str) -> Callable[[], object]:
    """An experiment's file, and a job on it."""
    return with_file("mine.toml", text, job("collect", "--experiment", "mine.toml"))


def with_contender(fields: str) -> Callable[[], object]:
    """An experiment's file with a second variant, and the job that would run it."""
    text = f'[[accelerate.contenders]]\nname = "10"\n\n[[accelerate.contenders]]\nname = "mine"\n{fields}\n'
    return with_file("mine.toml", text, job("accelerate", "--experiment", "mine.toml"))


def fails(error: Exception) -> Callable[[], object]:
    """What a job makes of an error in the middle of its work."""

    def attempt() -> None:
        with exit_status():
            raise error

    return attempt


def connect() -> None:
    with exit_status(), connected_to_ray():
        raise AssertionError("there is no cluster")


def with_trials(seeds: Sequence[int], then: Callable[[], object]) -> Callable[[], object]:
    """A data set of these trials in `data`, then what the user does."""

    def attempt() -> None:
        write_trials("data", {seed: np.ones((3, 2), np.float32) for seed in seeds}).finish(seeds, 3)
        then()

    return attempt


CASES = [
    Case(what="A predictor is misspelt", attempt=job("pipeline", "--evaluate.run-policies-of", "tpil")),
    Case(
        what="None of the named predictors exists for the basis",
        attempt=job("evaluate", "--evaluate.run-policies-of", "svd-floor"),
    ),
    Case(what="A task is misspelt", attempt=job("collect", "--collect.task", "HalfCheeta-v4")),
    Case(
        what="One of jobs/accelerate.py's tasks is misspelt",
        attempt=job("accelerate", "--accelerate.tasks", "Hopper-v4", "Wolker2d-v4@100000"),
    ),
    Case(
        what="One of the tasks that jumps are tuned on is misspelt",
        attempt=job("find_rule", "--improve.tasks", "Hopper-v4", "Swimer-v4"),
    ),
    Case(
        what="A variant's predictor is misspelt",
        attempt=with_contender('jump = {predictor = "rigde"}'),
    ),
    Case(
        what="A field of a variant's PPO is misspelt",
        attempt=with_contender("ppo = {num_epoch = 4}"),
    ),
    Case(
        what="A variant leaves no epochs for its jump to replace",
        attempt=with_contender('jump = {predictor = "ridge"}'),
    ),
    Case(
        what="A variant to run is not one of the experiment's",
        attempt=job("accelerate", "--accelerate.only", "4+rigde"),
    ),
    Case(
        what="The search would use seeds of the results",
        attempt=job("accelerate", "--accelerate.search-first-seed", "100"),
    ),
    Case(
        what="The experiment that predictors come from is misspelt",
        attempt=job("accelerate", "--predictors-from", "inverted_pendulm"),
    ),
    Case(what="A sweep's metric does not exist", attempt=job("sweep", "--sweep.metric", "skil_h1")),
    Case(
        what="A sweep's metric is for a step that is not predicted", attempt=job("sweep", "--sweep.metric", "skill_h11")
    ),
    Case(what="A sweep's field is misspelt", attempt=job("sweep", "--over", "model.contxt=10,20")),
    Case(
        what="A sweep's field is given twice",
        attempt=job("sweep", "--over", "model.layers=1", "--over", "model.layers=2"),
    ),
    Case(
        what="A sweep has far too many combinations",
        attempt=job(
            "sweep",
            *("--over", f"model.context={','.join(map(str, range(2, 200)))}"),
            *("--over", f"train.seed={','.join(map(str, range(200)))}"),
        ),
    ),
    Case(what="An option is misspelt", attempt=job("train", "--train.sed", "3")),
    Case(what="An option is another job's", attempt=job("collect", "--train.seed", "3")),
    Case(what="An option has been renamed", attempt=job("train", "--train.num-workers", "4")),
    Case(what="A preset is misspelt", attempt=job("train", "--preset", "papr")),
    Case(what="A preset is empty", attempt=job("train", "--preset=")),
    Case(what="A preset is given twice", attempt=job("train", "--preset", "paper", "--preset", "causal")),
    Case(what="A number is a word", attempt=job("collect", "--collect.num-trials", "many")),
    Case(what="A pair of numbers is one", attempt=job("collect", "--collect.policy-hidden", "8")),
    Case(what="An experiment is named without --experiment", attempt=job("collect", "smoke")),
    Case(what="A command of jobs/data.py is misspelt", attempt=job("data", "wach", "storage/demo")),
    Case(what="A command of jobs/data.py lacks its file", attempt=job("data", "export", "storage/demo")),
    Case(
        what="An option of jobs/data.py is misspelt",
        attempt=job("data", "ask", "storage/demo", "--context-length", "3"),
    ),
    Case(what="A field is given twice", attempt=job("train", "--train.seed", "1", "--train.seed=2")),
    Case(what="An experiment is misspelt", attempt=job("collect", "--experiment", "dmeo")),
    Case(what="An experiment is a folder", attempt=job("collect", "--experiment", ".")),
    Case(what="`--experiment` comes last, without a value", attempt=job("collect", "--experiment")),
    Case(what="A file's key is misspelt", attempt=mine("[collect]\nnum_trails = 4\n")),
    Case(what="A file's section is misspelt", attempt=mine("[colect]\nnum_trials = 4\n")),
    Case(what="A file's section for the other preset is misspelt", attempt=mine("[causal.tain]\nnum_steps = 4\n")),
    Case(what="A file has a key where an earlier version had it", attempt=mine("[train]\nnum_workers = 4\n")),
    Case(what="A file has a key twice", attempt=mine("[collect]\nnum_trials = 4\nnum_trials = 8\n")),
    Case(what="A file has true for a number", attempt=mine("[collect]\nnum_trials = true\n")),
    Case(what="A file has text for a section", attempt=mine("causal = 'yes'\n")),
    Case(what="A file is nested 10,000 deep", attempt=mine(f"name = {'[' * 10_000}")),
    Case(what="A data set to train on does not exist", attempt=job("train", "--train.data", "storage/hoper")),
    Case(what="A number is NaN", attempt=job("train", "--ppo.entropy-coefficient", "nan")),
    Case(what="A number is infinite", attempt=job("train", "--train.weight-decay", "inf")),
    Case(what="A coefficient is negative", attempt=job("collect", "--ppo.value-coefficient", "-0.5")),
    Case(what="A seed is negative", attempt=job("train", "--train.seed", "-1")),
    Case(what="A seed has more than 31 bits", attempt=job("collect", "--collect.first-seed", "2147483648")),
    Case(what="The last seed has more than 31 bits", attempt=job("collect", "--collect.first-seed", "2147483640")),
    Case(what="Far too many trials", attempt=job("collect", "--collect.num-trials", "1000000000000")),
    Case(what="One and a half GPUs per run", attempt=job("sweep", "--gpus-per-trial", "1.5")),
    Case(what="A name is `..`", attempt=job("collect", "--name", "..")),
    Case(what="A name contains a colon", attempt=job("collect", "--name", "run:1")),
    Case(what="A name contains a quote", attempt=job("collect", "--name", "ada's")),
    Case(what="A name contains a character that reverses the text", attempt=job("collect", "--name", "a\u202eb")),
    Case(what="A name contains a line break", attempt=job("collect", "--name", "a\nb")),
    Case(what="A name has 300 letters", attempt=job("collect", "--name", "a" * 300)),
    Case(
        what="An MLflow experiment's name leads to the parent folder",
        attempt=job("collect", "--tracking.experiment", "../mine"),
    ),
    Case(
        what="An experiment's file has an invalid name",
        attempt=with_file("run:1.toml", "", job("collect", "--experiment", "run:1.toml")),
    ),
    Case(what="A storage is empty", attempt=job("collect", "--storage", "")),
    Case(what="A storage contains a line break", attempt=job("collect", "--storage", "a\nb")),
    Case(
        what="A storage refers to a variable that is empty",
        attempt=job("collect", "--storage", "$TIPL_STORAGE/d"),
        variables={"TIPL_STORAGE": ""},
    ),
    Case(what="A storage lacks a slash", attempt=job("collect", "--storage", "s3:/bucket/d")),
    Case(what="A storage is in the home of an unknown user", attempt=job("collect", "--storage", "~nobody-here/d")),
    Case(
        what="A file is in the way of the storage",
        attempt=with_file("file", "", job("collect", "--storage", "file/d")),
    ),
    Case(
        what="A file is in the way of jobs/accelerate.py's storage",
        attempt=with_file("file", "", job("accelerate", "--storage", "file/d/e")),
    ),
    Case(
        what="The folder for temporary files does not exist",
        attempt=job("collect", "--storage", "d"),
        variables={"TMPDIR": "/nowhere/tmp"},
    ),
    Case(what="No cluster answers at RAY_ADDRESS", attempt=connect, variables={"RAY_ADDRESS": "127.0.0.1:1"}),
    Case(
        what="The disk is full while a job writes",
        attempt=fails(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "d/models/x")),
    ),
    Case(
        what="The file system is read-only",
        attempt=fails(OSError(errno.EROFS, os.strerror(errno.EROFS), "d/models/x")),
    ),
    Case(
        what="What a storage remembers is cut short",
        attempt=with_file("experiment.json", '{"name": "demo"', job("train", "--storage", ".")),
    ),
    Case(
        what="What a storage remembers was written by a newer version",
        attempt=with_file("experiment.json", '{"name": "demo", "dreams": {}}', job("train", "--storage", ".")),
    ),
    Case(what="There are no trials to train on", attempt=job("train", "--storage", "data")),
    Case(
        what="The existing trials have other seeds",
        attempt=with_trials((11, 12, 13, 14), job("train", "--experiment", "smoke", "--storage", "data")),
    ),
]


def said_by(case: Case, folder: Path) -> tuple[object, str]:
    """Exit status, and what is said on standard error, with the places of this machine named as in the table."""
    before, arguments, variables = Path.cwd(), sys.argv, dict(os.environ)
    said = io.StringIO()
    os.chdir(folder)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= case.variables
    try:
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
            pytest.raises(SystemExit) as end,
        ):
            case.attempt()
    finally:
        os.chdir(before)
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(variables)
    text = said.getvalue().strip().replace(f"{folder}/", "").replace(f"{CHECKOUT}/", "")
    return end.value.code, text


def row(case: Case, folder: Path) -> str:
    status, text = said_by(case, folder)
    assert status in (1, 2)
    return f"| {case.what} | {text.replace('|', '/')} |"


@pytest.fixture(params=CASES, ids=lambda case: case.what)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_what_does_not_fit_is_one_line_and_as_the_page_says(case: Case, tmp_path: Path) -> None:
    line = row(case, tmp_path)
    assert line.startswith(f"| {case.what} | error: ")
    assert len(line.splitlines()) == 1
    assert "Traceback" not in line
    assert line in PAGE.read_text().splitlines()


def test_the_page_has_no_row_that_nobody_made() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows[1:]] == [case.what for case in CASES]


def test_nothing_is_left_where_a_job_was_refused(tmp_path: Path) -> None:
    refused: list[Any] = [case for case in CASES if "storage" in case.what]
    assert refused
    for number, case in enumerate(refused):
        folder = tmp_path / str(number)
        folder.mkdir()
        said_by(case, folder)
        assert [path.name for path in folder.iterdir()] in ([], ["file"], ["experiment.json"])


def main() -> None:
    """Write docs/surroundings.md."""
    lines = ["| what happened | what the user reads |", "|---|---|"]
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(case, Path(folder).resolve()))
    text = (
        "# Values and environments that are refused, and the message for it\n\n"
        "`python tests/test_surroundings.py` makes this page by trying each of these. Each row is tested: the "
        "situation is created and the message compared. A refused command line or experiment file exits with status 2, "
        "before anything is loaded; everything else exits with status 1. For damaged data, see "
        "[damage.md](damage.md).\n\n"
    )
    PAGE.write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
