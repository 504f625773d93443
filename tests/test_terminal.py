"""What a job prints."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from runs import model_states, write_torch

from tipl_ray import terminal
from tipl_ray.places import CHECKOUT
from tipl_ray.terminal import ProgressView, format_rows


def test_a_program_without_a_console_says_nothing_and_goes_on() -> None:
    closed = io.StringIO()
    closed.close()
    assert not terminal.is_terminal(closed)
    with contextlib.redirect_stdout(None), ProgressView() as view:
        view.show(ROWS, SUMMARY)
        terminal.say("a line")
        terminal.log_event("start", trials="1-2")


def test_progress_does_not_flood_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(terminal, "say", said.append)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)) / 2)
    with ProgressView() as view:
        for number in range(100):
            view.show([{"trials": "1-4"}], f"{number} done")
    assert 3 <= len(said) <= 12
    assert said[0] == "0 done"


ROWS = [{"trials": "1-2, 5-7", "env steps": "1,000,000 of 2,000,000", "mean return": "1234.5", "left": "1 h 02 min"}]
SUMMARY = "collect: 3 of 50 trials done, 1,234,567 of 40,000,000 env steps, 92,240 env steps/s on 2 actors, 12 min left"
SCRIPT = f"""
from tipl_ray.terminal import ProgressView, log_event, say
with ProgressView() as view:
    view.show([], "evaluate: nothing to show in columns yet, but that is no reason to show nothing: 12 of 34 tasks")
    log_event("start", actor=1)
    view.show({ROWS!r}, {SUMMARY!r})
    say("done")
"""


def shown(columns: int, script: str = SCRIPT, **environment: str) -> str:
    """What a terminal of so many columns is sent."""
    process, terminal = pty.fork()
    if not process:
        os.environ.update({"TERM": "xterm", "COLUMNS": str(columns), **environment, "PYTHONPATH": str(CHECKOUT)})
        os.execv(sys.executable, [sys.executable, "-c", script])
    parts = []
    with contextlib.suppress(OSError):  # the other side is closed
        while part := os.read(terminal, 65536):
            parts.append(part)
    os.waitpid(process, 0)
    os.close(terminal)
    return b"".join(parts).decode()


def plain_lines(said: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_nothing_is_cropped_on_a_terminal(columns: int) -> None:
    lines = plain_lines(shown(columns))
    assert max(map(len, lines)) <= columns
    words = " ".join(" ".join(lines).split())
    assert SUMMARY in words
    assert "no reason to show nothing: 12 of 34 tasks" in words
    if columns >= 80:
        assert "1,000,000 of 2,000,000" in words
    assert "event=" not in words


MOVES = re.compile(r"\x1b\[(\?25|[0-9]*[ABCDHJK])")


@pytest.mark.parametrize(
    "environment", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"FORCE_COLOR": "3", "TERM": "xterm"}]
)
def test_a_file_gets_lines_and_nothing_that_moves_the_cursor(environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", SCRIPT]
    variables = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout
    assert not MOVES.search(said)
    assert "event=start actor=1" in said
    assert "12 of 34 tasks" in said


def test_a_terminal_that_cannot_move_its_cursor_is_a_file() -> None:
    said = shown(80, TERM="dumb")
    assert not MOVES.search(said)
    assert "event=start actor=1" in said
    assert MOVES.search(shown(80, NO_COLOR="1"))


def test_a_table_is_folded_on_a_terminal_and_whole_in_a_file() -> None:
    row = {f"column {number}": "some words" for number in range(12)}
    script = f"from tipl_ray.terminal import say_rows; say_rows([{row!r}], title='a title')"
    assert max(map(len, plain_lines(shown(80, script)))) <= 80 < 12 * len("some words")
    in_a_file = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    title, heading, _, cells = (line.split() for line in in_a_file.splitlines())
    assert (title, len(heading), len(cells)) == (["a", "title"], 24, 24)


def test_cells_are_text_whatever_brackets_they_have() -> None:
    drawn = Console(width=60, file=io.StringIO(), force_terminal=False)
    rows = [{"[data]": "storage/[text]/x", "value": "[bold]1[/bold]"}, {"[data]": "[/]", "value": "a\x1b[2Jb\u202e"}]
    drawn.print(format_rows(rows, title="[title] of it"))
    said = drawn.file.getvalue()  # type: ignore[attr-defined]
    for text in ("[data]", "storage/[text]/x", "[bold]1[/bold]", "[/]", "a\\x1b[2Jb\\u202e", "[title] of it"):
        assert text in said


def test_help_texts_are_folded_between_words_and_commands_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = """A job: with a first line that is longer than forty columns.

    python jobs/job.py --with a-command that-is-longer-than-forty-columns \\
        --and more

Terms that
follow:
  skill     one word after the other, and more of them
            below the first
--option X   what it does, in more words than fit in
             one line
A paragraph.
"""
    assert terminal.folded(text).splitlines() == [
        "A job: with a first line that is longer",
        "than forty columns.",
        "",
        "    python jobs/job.py --with a-command that-is-longer-than-forty-columns \\",
        "        --and more",
        "",
        "Terms that follow:",
        "  skill     one word after the other,",
        "            and more of them below the",
        "            first",
        "--option X   what it does, in more words",
        "             than fit in one line",
        "A paragraph.",
    ]


def run_job(arguments: str) -> str:
    """A script that runs jobs/data.py as a terminal's user does."""
    job = str(CHECKOUT / "jobs" / "data.py")
    return (
        f"import runpy, sys; sys.argv = [{job!r}, *{arguments.split()!r}]; runpy.run_path({job!r}, run_name='__main__')"
    )


def test_help_on_a_coloured_terminal_has_whole_boxes_and_a_folded_description() -> None:
    sent = shown(80, run_job("ask --help"), NO_COLOR="", TERM="xterm-256color")
    assert "\x1b[2m" in sent
    lines = [line for line in plain_lines(sent.replace("\r\n", "\n")) if line]
    assert max(map(len, lines)) <= 80
    boxed = [line for line in lines if line[0] in "\u256d\u2502\u2570"]
    assert {len(line) for line in boxed} == {80}
    assert {line[-1] for line in boxed} == set("\u256e\u2502\u256f")
    described = lines[: lines.index(boxed[0])]
    assert described[0].startswith("usage: ")
    assert "Report how predictable training runs are, recorded trials and imported" in described


def test_what_is_refused_is_one_line_on_a_coloured_terminal_too() -> None:
    sent = shown(80, run_job("describee storage"), NO_COLOR="", TERM="xterm-256color")
    (line,) = plain_lines(sent.replace("\r\n", "\n"))
    assert line.startswith("error: describee: not a command, nor the value of an option; did you mean describe?")


def test_something_moves_while_checkpoints_are_read_and_asked_and_lines_break_between_words(tmp_path: Path) -> None:
    folder = write_torch(tmp_path / "run", model_states(12))
    lines = plain_lines(shown(80, run_job(f"import {folder} --storage {tmp_path}/s --exclude norm")))
    assert "import: starting" in " ".join(lines)
    assert max(map(len, lines)) <= 80
    assert "of 2,928 weights in 4 tensors, 141 KB: imported as" in " ".join(" ".join(lines).split())
    said = " ".join(plain_lines(shown(80, run_job(f"ask {tmp_path}/s"))))
    for what in ("ask: starting", "ask: reading the storage", "ask: comparing forecasts", f"report: file://{tmp_path}"):
        assert what in said
