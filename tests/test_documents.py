"""The README and docs/ held to the repository: their links, and every command that they show, parsed and not run."""

import contextlib
import dataclasses
import functools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tipl_ray
from tipl_ray import command_line, tipl

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "cluster/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
TABLE = (ROOT / "docs" / "house.md").read_text().split("## Commands in these pages", 1)[1]
NOT_RUN = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", TABLE, re.MULTILINE))
"""Programs of others -> why no test runs them."""
PLACEHOLDERS = {"STORAGE": "storage/demo", "TASK": "Hopper-v4", "storage/TASK": "storage/hopper", "FOLDER": "folder"}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


class ParsedError(Exception):
    """A command line is read, and what it asks for would begin now."""


def shown(page: str) -> Iterator[str]:
    """The commands of a page: the lines of its `sh` blocks, and its code spans that begin as a command of ours does."""
    text = (ROOT / page).read_text()
    for _, language, block in FENCE.findall(text):
        lines = block.replace("\\\n", " ").splitlines() if language == "sh" else []
        for line in lines:
            yield from (part for part in line.strip().split(" && ") if part and not part.startswith("#"))
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text)):
        command = " ".join(span.split())
        if re.match(r"(python|tipl|make|ray job submit) [\w./-]*\w", command) and not re.search(
            r"\b(NAME|JOB)\b", command
        ):
            yield command


COMMANDS = sorted({command: page for page in PAGES for command in shown(page)}.items())


@pytest.fixture
def parsed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, where jobs end once they have read their command line."""
    experiment = command_line.CommandLine.experiment

    def then_end(line: command_line.CommandLine, preset: str | None) -> object:
        read = experiment(line, preset)
        if "sweep" not in line.jobs:  # which has its --over to check
            raise ParsedError
        return read

    monkeypatch.setattr(command_line.CommandLine, "experiment", then_end)
    # Data to train on and predictors are in nobody's storage here.
    monkeypatch.setattr(command_line, "_check_folder", lambda field, place: None)
    monkeypatch.setenv("TIPL_STORAGE", "s3://bucket/tipl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse_job(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a job its command line; what is wrong with that is a failure, with what the user would read."""
    assert name in tipl.NAMES
    if "--help" in arguments:
        arguments.remove("--help")
    job = tipl.load(name)
    if name == "data":
        for command, spec in job.app._subcommands.items():
            still = functools.wraps(spec.target)(lambda *_, **__: 0)
            job.app._subcommands[command] = dataclasses.replace(spec, target=still)
    if name == "compare":
        monkeypatch.setattr(job.Comparison, "check", stop)
    if name == "sweep":
        make_space = job.make_space
        monkeypatch.setattr(job, "make_space", lambda experiment: stop(make_space(experiment)))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with contextlib.suppress(ParsedError):
        assert not job.main()


def stop(_: object) -> None:
    """In place of what would begin."""
    raise ParsedError


@pytest.mark.parametrize(("command", "page"), COMMANDS, ids=[command[:70] for command, _ in COMMANDS])
def test_a_command_is_as_the_program_that_it_names_reads_it(
    command: str, page: str, parsed_alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
    if words[:3] == ["ray", "job", "submit"] and "--" in words:
        words = words[words.index("--") + 1 :]
    while "=" in words[0]:
        words = words[1:]
    words = words[: next((place for place, word in enumerate(words) if word in (">", "&")), None)]
    program, *arguments = words
    program = program.rpartition("/")[2]
    if program == "make":
        assert set(arguments) <= TARGETS
    elif program == "tipl" and arguments[0].startswith("--"):
        assert arguments[0] in (*tipl.HELP, tipl.VERSION, tipl.COMPLETION)
    elif program == "tipl":
        parse_job(arguments[0], arguments[1:], monkeypatch)
    elif program == "python" and arguments[0].startswith("jobs/"):
        assert (ROOT / arguments[0]).exists()
        parse_job(Path(arguments[0]).stem, [words.split("|")[0] for words in arguments[1:]], monkeypatch)
    elif program == "python" and arguments[0] != "-m":
        source = (ROOT / arguments[0]).read_text() + (ROOT / "benchmarks" / "command.py").read_text()
        for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            field = option.removeprefix("--").replace("-", "_")
            assert f'"{option}"' in source or re.search(rf"^    {field}: ", source, re.MULTILINE), option
    else:
        module = arguments[1] if program in ("python", "python3") else program
        assert module in NOT_RUN, f"{page}: say in docs/house.md why no test runs {module}"


def test_every_program_that_is_not_run_is_in_some_page() -> None:
    commands = [command for command, _ in COMMANDS]
    assert {
        name for name in NOT_RUN if not any(re.search(rf"(^|/| ){re.escape(name)} ", one) for one in commands)
    } == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_says_its_language(page: str) -> None:
    assert {language for _, language, _ in FENCE.findall((ROOT / page).read_text())} <= {"sh", "python", "toml", "text"}


def anchor(title: str) -> str:
    """What GitHub and the site call a heading in a link."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page: str) -> None:
    text = FENCE.sub("", (ROOT / page).read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", linked.read_text()), re.MULTILINE)
            assert heading in {anchor(title) for title in headings}, target


def test_every_page_is_reached_from_the_readme() -> None:
    assert {page for page in PAGES[1:] if f"]({page}" not in README} == set()


def test_the_readme_is_short_and_says_its_words_early() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    early = "\n".join(lines[:60])
    assert {word for word in ("TIPL", "WPE", "REPW", "snapshot", "skill") if f"| {word} |" not in early} == set()


def test_the_reference_has_every_name_that_the_package_exports() -> None:
    named = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE))
    assert named == {f"{module}.{name}" for name, module in tipl_ray.EXPORTS.items()}
