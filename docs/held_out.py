"""What pays and what does not, as docs/results/return.csv: held-out tasks, then the zoo's presets.

    python docs/held_out.py

Puts together the tables of docs/opponents.py and docs/tuned_jumps.py; nothing is run. Of variants that ran on all
tasks the rows `all held-out` are over all held-out tasks, of the others over those of the first three.
"""

import sys
from pathlib import Path

import pyarrow.csv

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from tipl_ray.pages import as_csv  # noqa: E402

RESULTS = DOCS / "results"
FIRST_THREE = "all held-out of the first three tasks"


def read(name: str) -> list[dict[str, object]]:
    """Rows of a table of docs/results."""
    return list(pyarrow.csv.read_csv(RESULTS / f"{name}.csv").to_pylist())


def main() -> None:
    """Write the table."""
    whole, first = (
        [row for row in read(name) if row["held_out"] and row["task"] != "all"]
        for name in ("opponents_all_tasks", "opponents")
    )
    found = {row["contender"] for row in whole}
    rest = [row for row in first if row["contender"] not in found]
    for row in rest:
        row["task"] = FIRST_THREE if row["task"] == "all held-out" else row["task"]
    (RESULTS / "return.csv").write_bytes(as_csv([*whole, *rest, *read("tuned_jumps")]))


if __name__ == "__main__":
    main()
