"""What the benchmarks' commands share: a shrunk run, one core, and where results are kept."""

import argparse
import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

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


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def use_one_core() -> None:
    """Keep this process on one core, with one thread."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
