"""Errors that a user can fix, and their wording."""

import difflib
import re
import sys
from collections.abc import Sequence


class UserError(RuntimeError):
    """An error that the user can fix: a job prints it in one line, without a traceback."""


def no_such(field: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for an unknown name: it lists the known ones and suggests the nearest."""
    return ValueError(f"{field}={name!r} is not one of {', '.join(known)}{nearest(name, known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error for an unknown name: the nearest known one, if any is near."""
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f"; did you mean {folded[near[0]]}?" if near else ""


def print_error(error: object) -> None:
    """One line on standard error, with jobs named as the user started this one: by `tipl` or by file."""
    text = str(error)
    print(f"error: {as_command(text) if sys.argv[0].startswith('tipl ') else text}", file=sys.stderr)


def as_command(text: str) -> str:
    """A text with `tipl NAME` in place of `python jobs/NAME.py`.

    >>> as_command("python jobs/train.py --experiment jobs/experiments/demo.toml")
    'tipl train --experiment demo'
    """
    text = re.sub(r"(?<!/)jobs/experiments/(\w+)\.toml", r"\1", text)
    return re.sub(r"(?:python )?(?<!/)jobs/(\w+)\.py", r"tipl \1", text)
