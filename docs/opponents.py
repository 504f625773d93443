"""What an acceleration found, as the table and pictures of this folder.

    python docs/opponents.py storage/opponents/accelerations/0123456789abcdef --name opponents

One row a task and contender, then those over all tasks at once and over the held-out ones.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.csv

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from tipl_ray.pages import as_csv  # noqa: E402

RENAMED = {"share": "share_of_ten"}
COLUMNS = (
    *("task", "contender", "hyperparameters", "env_steps", "seeds", "epochs", "auc", "auc_low", "auc_high"),
    *("share", "share_low", "share_high", "gradient_steps"),
    *("env_steps_to_90", "gradient_steps_to_90", "seconds_to_90", "held_out"),
)
SCOPES = {"all tasks": "all", "held-out tasks": "all held-out"}
"""What the rows over several tasks at once are called."""


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file."""
    return pyarrow.csv.read_csv(path).to_pylist()


def table(folder: Path) -> list[dict[str, Any]]:
    """Rows in the columns of docs/results."""
    rows = [{name: row[name] for name in COLUMNS} for row in read(folder / "table.csv")]
    for row in read(folder / "tasks.csv"):
        same = [other for other in rows if other["contender"] == row["contender"]]
        steps = round(row["share_of_gradient_steps"] * 100)
        known = {name: same[0][name] for name in ("hyperparameters", "env_steps", "seeds", "epochs")}
        shares = {name: row[name] for name in ("share", "share_low", "share_high")}
        whole = dict.fromkeys(COLUMNS) | {
            "task": SCOPES[row["scope"]],
            "contender": row["contender"],
            **known,
            **shares,
        }
        rows.append(whole | {"gradient_steps": f"{steps}%", "held_out": row["scope"] == "held-out tasks"})
    return tidied(rows)


def tidied(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as docs/results has them: three decimals, gradient steps as text, and the columns' names there."""
    for row in rows:
        row["gradient_steps"] = str(row["gradient_steps"])
        row |= {name: round(value, 3) for name, value in row.items() if isinstance(value, float)}
    return [{RENAMED.get(name, name): value for name, value in row.items()} for row in rows]


def main() -> None:
    """Write the table, and copy the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what the job named last")
    parser.add_argument("--name", required=True, help="of the table, and what the pictures' names begin with")
    arguments = parser.parse_args()
    (DOCS / "results" / f"{arguments.name}.csv").write_bytes(as_csv(table(arguments.folder)))
    for picture in (arguments.folder / "figures").glob("*.png"):
        shutil.copy(picture, DOCS / "pictures" / f"{arguments.name}_{picture.name.removeprefix('acceleration_')}")


if __name__ == "__main__":
    main()
