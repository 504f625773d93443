"""What a job prints: lines, and one table of progress that is redrawn in place on a terminal.

In a log file the progress is one line now and then. Colours follow NO_COLOR and
FORCE_COLOR; cursor movements go only to a terminal. Knows nothing of what is reported.
"""

import contextlib
import datetime
import json
import re
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

LOG_INTERVAL = 10.0
"""Seconds between two progress lines where the output is not a terminal."""
MARKS, TURNS = "|/-\\", 8
"""What turns, in letters that every terminal has, and how often [1/s]."""
FILE_COLUMNS = 1000
"""Columns of a file, where no line is folded."""
MOST_COLUMNS = 120
"""Width that running text is folded to on wider terminals."""
COLOURS = re.compile(r"\x1b\[[\d;]*m")
"""What turns colours and bold letters on and off."""

console = Console(highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a line, folded between words on a terminal."""
    indented: dict[str, Any] = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    say_whole(textwrap.fill(message, console.width, **indented) if is_terminal(sys.stdout) else message)


def say_whole(message: str) -> None:
    """Print a line as it is, as a command is to be copied."""
    console.print(message, markup=False)


def folded(text: str) -> str:
    """A help text folded to the terminal's width: paragraphs, lists of terms, and commands, which stay as they are.

    A term is followed by at least two spaces and its definition, whose further lines are indented below it. A line that
    is indented by four spaces and is no definition's is a command. Colours are left out: they take no room, but hide
    where a line begins.
    """
    width = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    blocks: list[tuple[str, list[str]]] = []
    indent: str | None = None
    for line in COLOURS.sub("", text).strip().splitlines():
        term = re.match(r" {0,2}\S+(?: \S+)* {2,}(?=\S)", line)
        if not line.strip() or (line.startswith("    ") and not indent):
            blocks.append(("", [line.rstrip()]))
            indent = None
        elif term:
            indent = " " * term.end()
            blocks.append((indent, [line.rstrip()]))
        elif indent is None or (indent and not line.startswith("  ")):
            indent = ""
            blocks.append((indent, [line.strip()]))
        else:
            blocks[-1][1].append(line.strip())
    lines: list[str] = []
    for below, parts in blocks:
        if parts[0].startswith("    ") or not parts[0]:
            lines += parts
        else:
            whole = {"subsequent_indent": below, "break_long_words": False, "break_on_hyphens": False}
            lines += textwrap.wrap(" ".join(parts), width, **whole)  # type: ignore[arg-type]
    return "\n".join(lines)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; not for a program without a console, or with one that was closed."""
    return stream is not None and not stream.closed and stream.isatty()


def redraws() -> bool:
    """Whether what was printed can be redrawn: on a terminal that moves its cursor, whatever FORCE_COLOR is."""
    return is_terminal(sys.stdout) and console.is_terminal and not console.is_dumb_terminal


def log_event(name: str, **fields: object) -> None:
    """Log an event in one line, time=... event=name key=value ...; not on a terminal, where the table shows it."""
    if not redraws():
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        say(" ".join([f"time={now}", f"event={name}", *(f"{key}={_word(value)}" for key, value in fields.items())]))


def _word(value: object) -> str:
    text = str(value)
    return json.dumps(text) if any(letter in text for letter in ' "\n\r') else text


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(3725), duration(65), duration(4.2)
    ('1 h 02 min', '1 min 05 s', '4 s')
    """
    if seconds >= 3600:
        return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"
    if seconds >= 60:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds)} s"


def size_text(num_bytes: float) -> str:
    """Bytes in words.

    >>> size_text(512), size_text(53.2e9)
    ('512 B', '53.2 GB')
    """
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} GB"


def plain(text: str) -> str:
    r"""A text whose control and direction marks are written out: none of it moves a cursor or turns a line around.

    >>> plain("a[b]\x1b[2J")
    'a[b]\\x1b[2J'
    """
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in ("Cc", "Cf") else letter
        for letter in text
    )


def format_rows(rows: Iterable[Mapping[str, str]], title: str | None = None) -> Table:
    """Rows of equal keys as a table, numbers and all, headed by the keys; text as it is, whatever brackets it has."""
    rows = list(rows)
    heading = None if title is None else Text(plain(title))
    lean: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False}
    table = Table(title=heading, title_justify="left", header_style="bold", **lean)
    for column, key in enumerate(rows[0] if rows else ()):
        table.add_column(Text(plain(key)), justify="left" if column == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row.values()))
    return table


def say_rows(rows: Iterable[Mapping[str, str]], title: str | None = None) -> None:
    """Print rows of equal keys as a table: folded to the width of a terminal, elsewhere as wide as it needs to be."""
    place = console if is_terminal(sys.stdout) else Console(highlight=False, soft_wrap=True, width=FILE_COLUMNS)
    place.print(format_rows(rows, title))


class _Moving:
    """A summary behind a mark that turns while there is work, and a table under it; wrapped to the terminal's width."""

    def __init__(self, summary: str, rows: Sequence[Mapping[str, str]]) -> None:
        self._summary, self._table = plain(summary), format_rows(rows) if rows else None

    def __rich__(self) -> Group:
        mark = MARKS[int(time.monotonic() * TURNS) % len(MARKS)]
        # Said outright, because the console wraps nothing.
        line = Text(f"{mark} {self._summary}", overflow="fold", no_wrap=False)
        return Group(line, *([self._table] if self._table else []))


class ProgressView:
    """A summary and a table that are redrawn in place on a terminal; elsewhere the summary, every LOG_INTERVAL seconds.

    What does not fit the terminal's width is wrapped, and something moves whether there is news or not.
    """

    def __init__(self) -> None:
        self._live = Live(console=console, refresh_per_second=TURNS, transient=True) if redraws() else None
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.__exit__(kind, error, traceback)

    def show(self, rows: Iterable[Mapping[str, str]], summary: str) -> None:
        """Bring the view up to date."""
        if self._live:
            self._live.update(_Moving(summary, list(rows)), refresh=True)
        elif time.monotonic() - self._last_line >= LOG_INTERVAL:
            self._last_line = time.monotonic()
            say(summary)

    def wait(self, summary: str) -> None:
        """On a terminal, show what takes its time; a log has no line for it."""
        if self._live:
            self.show([], summary)


@contextlib.contextmanager
def waiting(summary: str) -> Iterator[None]:
    """Show on a terminal what takes its time, such as the start of a job."""
    with ProgressView() as view:
        view.wait(summary)
        yield
