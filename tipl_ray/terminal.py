"""What a job says on the terminal: lines, and one table of progress that redraws itself where it can.

In a log file, where nothing can be redrawn, the progress is one line now and then. Knows nothing of what is reported.
"""

import datetime
import json
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

LOG_INTERVAL = 10.0
"""Seconds between two progress lines where the output is not a terminal."""

console = Console(highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a line."""
    console.print(message, markup=False)


def log_event(name: str, **fields: object) -> None:
    """Log one event in one line, time=... event=name key=value ...; on a terminal nothing, the table shows it there."""
    if not console.is_terminal:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        say(" ".join([f"time={now}", f"event={name}", *(f"{key}={_word(value)}" for key, value in fields.items())]))


def _word(value: object) -> str:
    text = str(value)
    return json.dumps(text) if " " in text or '"' in text else text


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(3725), duration(65), duration(4.2)
    ('1 h 02 min', '1 min 05 s', '4 s')
    """
    if seconds >= 3600:
        return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"
    if seconds >= 60:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds)} s"


def format_rows(rows: Iterable[Mapping[str, str]], title: str | None = None) -> Table:
    """Rows of equal keys as a table, numbers and all, headed by the keys."""
    rows = list(rows)
    table = Table(title=title, title_justify="left", header_style="bold")
    for column, key in enumerate(rows[0] if rows else ()):
        table.add_column(key, justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


class ProgressView:
    """A table that is redrawn in place on a terminal; elsewhere its summary, one line every LOG_INTERVAL seconds."""

    def __init__(self) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
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
            self._live.update(format_rows(rows, title=summary), refresh=True)
        elif time.monotonic() - self._last_line >= LOG_INTERVAL:
            self._last_line = time.monotonic()
            say(summary)
