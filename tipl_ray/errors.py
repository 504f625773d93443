"""Errors that a user can fix, and their wording."""

import difflib
from collections.abc import Sequence


class UserError(RuntimeError):
    """An error that the user can fix: a job prints it in one line, without a traceback."""


def no_such(field: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for an unknown name: it lists the known ones and suggests the nearest."""
    return ValueError(f"{field}={name!r} is not one of {', '.join(known)}{nearest(name, known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error for an unknown name: the nearest known one, if any is near."""
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[near[0]]}?" if near else ""
