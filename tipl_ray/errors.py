"""What a user can mend, and what is said of it."""

import difflib
from collections.abc import Sequence


class UserError(RuntimeError):
    """What a user can mend: a job prints it in one line, without a traceback."""


def no_such(field: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for a name that there is not: it gives those that there are, and the nearest."""
    return ValueError(f"{field}={name!r} is not one of {', '.join(known)}{nearest(name, known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error for a name that there is not: the nearest one that there is, if any is near."""
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[near[0]]}?" if near else ""
