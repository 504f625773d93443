"""The Python code in the documentation's pages, run as written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trajectories import write_trials

from tipl_ray import config, tipl
from tipl_ray.data.parquet_folder import export_folder
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.window.transformer import WindowTransformer

ROOT = Path(__file__).resolve().parent.parent
ALONE = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PAGE = (ROOT / "docs" / "jumps.md").read_text()


def run_example(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What `python examples/<command>` answers, run in a folder."""
    script, *arguments = shlex.split(command)
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A folder with storage/demo as `make demo` leaves it, its model smaller."""
    torch.manual_seed(0)
    model = WindowTransformer(config.Model(embedding=16, layers=1, heads=2, dropout=0.0), tuple(range(1, 11)), 5)
    model.ridge_QHK[:, :, -1] = torch.arange(1, 11) * 0.1
    model.save(str(tmp_path / "storage" / "demo" / "models" / "0123"), {"basis": {"kind": "window"}})
    return tmp_path


def test_the_pages_lines_jump_in_a_loop_of_ones_own_and_in_stable_baselines3() -> None:
    code, theirs = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    torch.manual_seed(0)
    policy = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    inputs = torch.linspace(-1, 1, 24).reshape(8, 3)

    def update_epoch() -> None:
        optimizer.zero_grad()
        policy(inputs).square().sum().backward()
        optimizer.step()

    names = {"policy": policy, "update_epoch": update_epoch, "num_iterations": 3}
    exec(code, names)
    jumps = names["jumps"]
    assert (jumps.taken, jumps.refused) == (3, 0)  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    exec(theirs, names)
    assert names["jumping"].jumps.taken == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("predictor", ["first-again-v1", "storage/demo"])
def test_the_pages_command_trains_a_plain_ppo_with_jumps(predictor: str, demo: Path) -> None:
    (command,) = (line for line in PAGE.splitlines() if line.startswith("python") and line.endswith(predictor))
    ran = run_example(f"{command.removeprefix('python examples/')} --iterations 3 --steps 256", demo)
    assert ran.returncode == 0, ran.stderr
    first, *_, last = ran.stdout.splitlines()
    assert first.startswith("256 env steps: mean return")
    assert first.endswith(" s left")
    assert last.startswith("768 env steps: mean return")
    assert last.endswith(", 3 jumps taken, 0 refused, 0 s left")


def test_checkpoints_of_a_small_gpt_are_imported_and_asked(tmp_path: Path) -> None:
    ran = run_example(f"checkpoints_of_a_gpt.py --folder {tmp_path}/new --steps 70 --every 10", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "\nCan the next checkpoint be forecast? Linear extrapolation forecasts the next checkpoint " in ran.stdout
    report = Path(ran.stdout.splitlines()[-1])
    assert report.is_relative_to(tmp_path / "new" / "storage" / "predictability")
    assert "How predictable is gpt?" in report.read_text()


def test_the_page_on_recording_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recording.md").read_text(), flags=re.S):
        exec(code, names)
    assert capsys.readouterr().out.startswith("150 0.")
    assert Path("sine.safetensors").exists()
    assert TrajectoryStore("storage/sine").verify(3).num_snapshots == 61
    assert TrajectoryStore("storage/pendulum").verify(1).num_snapshots == 21
    for storage, fitted in (("storage/sine", "other series"), ("storage/pendulum", "first half")):
        assert tipl.load("data").main(["ask", storage]) == 0
        assert fitted in capsys.readouterr().out


def test_a_small_resnet_is_recorded_and_asked(tmp_path: Path) -> None:
    ran = run_example(f"resnet_on_digits.py --folder {tmp_path} --epochs 1 --every 1 --seeds 1 2", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Can the next checkpoint be forecast?") == 2
    assert TrajectoryStore(str(tmp_path / "storage")).verify(2).num_snapshots == 12
    rows = (tmp_path / "digits.csv").read_text().splitlines()
    kept = (ROOT / "docs" / "results" / "resnet_on_digits.csv").read_text().splitlines()
    assert rows[0] == kept[0]
    assert len({line.split(",")[0] for line in rows[1:]}) == 2
    assert (tmp_path / "digits.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("ppo_with_jumps.py --epochs 0", "--epochs 0 is below 1"),
        ("ppo_with_jumps.py --steps 0", "--steps 0 is below 64"),
        ("ppo_with_jumps.py --steps 100", "--steps 100 is not a multiple of the 32 minibatches"),
        ("ppo_with_jumps.py --predictor first-again-v1 --epochs 5", "--epochs 5 is not a multiple of 2: with a "),
        ("checkpoints_of_a_gpt.py --folder a_file", "--folder a_file: Not a directory"),
        ("resnet_on_digits.py --folder a_file", "--folder a_file: File exists"),
        ("resnet_on_digits.py --folder new --predictor typo", "--predictor typo: no such folder, and not a predictor"),
    ],
)
def test_what_an_example_cannot_do_is_one_line_before_anything_is_trained(
    command: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "a_file").touch()
    ran = run_example(command, tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1].startswith(f"{command.split()[0]}: error: {complaint}")


@pytest.mark.parametrize("page", ["start", "data", "install", "reference"])
def test_the_pages_python_reads_a_data_set(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    store = write_trials("storage/demo", {1: np.ones((251, 122), np.float32)})
    if page == "data":
        assert list(export_folder(store, {"train": [1]}, Path("demo-trajectories")))
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.S):
        exec(code, names)
    read = {name: len(value) for name, value in names.items() if name.startswith("by_")}  # type: ignore[arg-type]
    assert set(read.values()) <= {251}
    assert len(read) == (4 if page == "data" else 0)
