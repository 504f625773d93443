"""What the benchmarks' commands share: a shrunk run, one core, and where results are kept."""

import argparse
import atexit
import csv
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows `--quick`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run everything once at its smallest, to see that it runs; its figures mean nothing and are not kept",
    )
    return parser


def results_folder(quick: bool) -> Path:
    """Where a benchmark keeps its results; those of a quick run are deleted when it ends."""
    return _scratch() if quick else ROOT / "benchmarks" / "results"


def keep(path: Path, results: Any) -> None:
    """Rows, or values by name, as JSON of one line each, whole or not at all: a run that is killed goes on from what it
    kept last."""
    named = isinstance(results, Mapping)
    lines = [f"{json.dumps(key)}: {json.dumps(results[key])}" if named else json.dumps(key) for key in results]
    begin, end = "{}" if named else "[]"
    partial = path.with_name(f".{path.name}")
    partial.write_text(begin + "\n" + ",\n".join(lines) + "\n" + end + "\n")
    partial.replace(path)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as CSV, headed by the keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def publish_table(name: str, rows: Sequence[Mapping[str, Any]], quick: bool) -> None:
    """Rows as docs/results/NAME.csv; of a quick run they are not kept."""
    write_table((_scratch() if quick else ROOT / "docs" / "results") / f"{name}.csv", rows)


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def use_one_core(quick: bool) -> None:
    """Keep this process on one core, with one thread; a quick run, which has others beside it, on one thread alone."""
    if not quick:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
