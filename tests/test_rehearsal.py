"""The submitted pipeline with an S3 server, an MLflow server on PostgreSQL and a head with a token, all real."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cluster"))

from rehearsal import postgres_programs  # noqa: E402


@pytest.mark.slow
@pytest.mark.skipif(
    postgres_programs() is None, reason="PostgreSQL's initdb is neither on PATH nor where Debian has it"
)
def test_the_pipeline_leaves_its_data_in_s3_and_its_runs_in_postgresql() -> None:
    command = [sys.executable, str(ROOT / "cluster" / "rehearsal.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^S3: 4 trials verified, 164 snapshots, data set \w+, sealed: True$", result.stdout, re.MULTILINE)
    runs = dict(re.findall(r"^PostgreSQL: run (\S+) (\S+), \d+ metric points$", result.stdout, re.MULTILINE))
    assert set(runs) == {"smoke InvertedPendulum-v4", "collect", "train paper", "evaluate paper"}
    assert set(runs.values()) == {"FINISHED"}
    artifacts = re.search(r"^S3: (\d+) artifacts of MLflow, ([\d,]+) bytes$", result.stdout, re.MULTILINE)
    assert artifacts
    assert int(artifacts[1]) > 0
