"""How much memory the pipeline takes: the most that any process of each kind had resident.

The job and everything below it, which is Ray and its workers, are looked at five times a second. Resident memory counts
what processes share, such as libraries and Ray's object store, in each of them.

    python benchmarks/memory.py --experiment half_cheetah --preset paper-residual --storage storage/half_cheetah

All options are those of jobs/pipeline.py; what is finished in the storage is not done again, so that one with all
trials and no model shows training and evaluation. Adds the rows to docs/results/memory.csv.
"""

import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, write_table  # noqa: E402

from tipl_ray.terminal import say_rows  # noqa: E402

TABLE = ROOT / "docs" / "results" / "memory.csv"
POLL_SECONDS = 0.2
KINDS = {r"^ray::(\w+)": r"\1", r"jobs/(\w+)\.py": r"jobs/\1.py", r"(raylet|gcs_server)": r"\1"}
"""What a command line says of a process -> what its row is called; the rest are Ray's own."""


def peaks(command: list[str]) -> dict[str, int]:
    """The most bytes that any process of a kind had resident. Raises RuntimeError if the command fails."""
    found: dict[str, int] = {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                job = psutil.Process(process.pid)
                for one in (job, *job.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        kind = _kind(" ".join(one.cmdline()))
                        found[kind] = max(found.get(kind, 0), one.memory_info().rss)
            time.sleep(POLL_SECONDS)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}: {said.read()}")
    return found


def _kind(command_line: str) -> str:
    for pattern, name in KINDS.items():
        if found := re.search(pattern, command_line):
            return found.expand(name)
    return "Ray's own"


def main() -> None:
    """Run the pipeline, print the table, and keep it."""
    parser = make_parser(__doc__)
    arguments, told = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.quick:
            told = ["--experiment", "smoke", "--storage", folder]
        found = peaks([sys.executable, "jobs/pipeline.py", *told])
    at = told.index("--storage") if "--storage" in told else len(told)
    options = " ".join(told[:at] + told[at + 2 :])
    ordered = sorted(found.items(), key=lambda item: -item[1])
    rows = [{"options": options, "process": kind, "peak_mb": peak // 10**6} for kind, peak in ordered]
    if not arguments.quick:
        kept: list[dict[str, Any]] = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
        write_table(TABLE, [row for row in kept if row["options"] != options] + rows)
    shown = [{key: str(value) for key, value in row.items() if key != "options"} for row in rows]
    say_rows(shown, title=f"Peak memory of pipeline {options}")


if __name__ == "__main__":
    main()
