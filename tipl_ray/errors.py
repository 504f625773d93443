"""Errors that a user can fix, and their wording."""

import difflib
import re
import sys
from collections.abc import Sequence

MOST_NAMES, SOME_NAMES = 12, 3
"""Known names that an error lists, and how many of more it gives as examples."""


class UserError(RuntimeError):
    """An error that the user can fix: a job prints it in one line, without a traceback."""


def no_such(field: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for an unknown name: it suggests the nearest known one and lists all, or of many a few.

    >>> no_such("task", "Hoper", ["Ant", "Bird", "Cat", "Dog", "Hopper", *"abcdefgh"])
    ValueError("task='Hoper' is not one of 13 names; did you mean Hopper? (Ant, Bird, Cat, ...)")
    """
    if len(known) <= MOST_NAMES:
        return ValueError(f"{field}={name!r} is not one of {', '.join(known)}{nearest(name, known)}")
    some = ", ".join(known[:SOME_NAMES])
    return ValueError(f"{field}={name!r} is not one of {len(known)} names{nearest(name, known)} ({some}, ...)")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error for an unknown name: the nearest known one, if any is near."""
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f"; did you mean {folded[near[0]]}?" if near else ""


def print_error(error: object) -> None:
    """One line on standard error, with jobs named as the user started this one."""
    print(f"error: {as_started(str(error))}", file=sys.stderr)


def as_started(text: str) -> str:
    """A text with jobs named as the user started this one: by `tipl` or by file."""
    return as_command(text) if sys.argv[0].startswith("tipl ") else text


def as_command(text: str) -> str:
    """A text with `tipl NAME` in place of `python jobs/NAME.py`.

    >>> as_command("python jobs/train.py --experiment jobs/experiments/demo.toml")
    'tipl train --experiment demo'
    """
    text = re.sub(r"(?<!/)jobs/experiments/(\w+)\.toml", r"\1", text)
    return re.sub(r"(?:python )?(?<!/)jobs/(\w+)\.py", r"tipl \1", text)
