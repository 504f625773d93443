"""The recipes of docs/extending.md, copied out of the checkout and named on the command line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from tipl_ray.places import CHECKOUT

RECIPES = CHECKOUT / "examples" / "recipes"


def job(folder: Path, name: str, *options: str) -> str:
    """What a job says that is started beside one's own files."""
    command = [sys.executable, str(CHECKOUT / "jobs" / f"{name}.py"), "--experiment", "smoke", "--storage", "data"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=400, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_predictor_and_a_representation_of_ones_own_are_trained_and_compared_like_any_other(tmp_path: Path) -> None:
    for name in ("predictor", "representation"):
        shutil.copy(RECIPES / f"{name}.py", tmp_path / f"my_{name}.py")
    job(
        tmp_path,
        "pipeline",
        *("--basis.kind", "my_representation:RandomProjection"),
        *("--evaluate.predictors", "my_predictor:Fading", "--evaluate.run-policies-of", "tipl", "fading"),
    )
    (results,) = tmp_path.glob("data/evaluations/*/results.parquet")
    table = pyarrow.parquet.read_table(results, columns=["predictor", "basis", "return_predicted"]).to_pylist()
    assert {row["basis"] for row in table if row["predictor"] == "tipl"} == {"RandomProjection"}
    assert any(row["return_predicted"] == row["return_predicted"] for row in table if row["predictor"] == "fading")
    report = (results.parent / "report.html").read_text()
    assert "fading" in report
    assert "RandomProjection" in report


@pytest.mark.parametrize(
    ("option", "named", "words"),
    [
        ("--evaluate.predictors", "nowhere:Fading", "no module 'nowhere'"),
        ("--evaluate.predictors", "my_predictor:Fadign", "my_predictor has no 'Fadign'"),
        ("--evaluate.predictors", "fading", "evaluate.predictors='fading' is not one of copy-last, linear"),
        ("--basis.kind", "nowhere:Mine", "basis.kind='nowhere:Mine': no module 'nowhere'"),
    ],
)
def test_what_is_not_there_is_refused_before_work_starts(tmp_path: Path, option: str, named: str, words: str) -> None:
    shutil.copy(RECIPES / "predictor.py", tmp_path / "my_predictor.py")
    refused = subprocess.run(
        [sys.executable, str(CHECKOUT / "jobs" / "evaluate.py"), "--experiment", "smoke", option, named],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert refused.returncode == 2
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
