"""Recorded trials, asked how predictable they are: the same answers as about checkpoints of the same weights."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import path_states, write_safetensors
from torch import nn
from trajectories import write_trials

from tipl_ray import Recorder
from tipl_ray.checkpoints import products, report, trials
from tipl_ray.checkpoints.asking import answer, choose_series
from tipl_ray.checkpoints.files import CheckpointError
from tipl_ray.checkpoints.predictability import Asking, ask
from tipl_ray.checkpoints.records import import_series, without_layers
from tipl_ray.checkpoints.series import Selection
from tipl_ray.checkpoints.trials import trial_series

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

from data import main

NUM_WEIGHTS = 9000


def walk(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, NUM_WEIGHTS)).cumsum(axis=0).astype(np.float32)


def iterations(num: int, seed: int, per_iteration: int = 5) -> np.ndarray:
    """Straight within an iteration, into a direction of its own in each."""
    directions = np.random.default_rng(seed).normal(size=(num, NUM_WEIGHTS))
    moved = np.repeat(directions, per_iteration, axis=0)
    return np.concatenate([np.zeros((1, NUM_WEIGHTS)), moved.cumsum(axis=0)]).astype(np.float32)


def record(root: Path, trial: int, num_steps: int) -> None:
    torch.manual_seed(trial)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(32, 3)
    with Recorder(model, str(root), trial=trial, task="sum") as recorder:
        for step in range(num_steps):
            recorder.record(2 * step)
            optimizer.zero_grad()
            (model(inputs)[:, 0] - inputs.sum(dim=1)).square().mean().backward()
            optimizer.step()


def test_a_trials_products_are_numpys_whatever_the_width_of_a_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_TP = walk(30)
    layout = (("a.w", (4, 1000), 0), ("a.b", (500,), 4000), ("c.running_var", (4500,), 4500))
    moved_SP = np.diff(weights_TP.astype(np.float64), axis=0)
    whole = products.multiply_rows(weights_TP, layout)
    monkeypatch.setattr(products, "WIDE_BYTES", 1)
    for one in (whole, products.multiply_rows(weights_TP, layout)):
        np.testing.assert_allclose(one.gram_SS, moved_SP @ moved_SP.T, rtol=1e-5, atol=0.1)
        assert (one.groups, one.weights_G.tolist()) == (("a", "running statistics"), [4500, 4500])
        np.testing.assert_allclose(one.grams_GSS.sum(axis=0), one.gram_SS, rtol=1e-12)
        np.testing.assert_allclose(one.grams_GSS[0], moved_SP[:, :4500] @ moved_SP[:, :4500].T, rtol=1e-5, atol=0.1)


def test_a_trial_and_checkpoints_of_the_same_weights_get_the_same_answers(tmp_path: Path) -> None:
    weights_TP = walk(24)
    write_trials(tmp_path / "recorded", {1: weights_TP})
    (trial,) = choose_series(str(tmp_path / "recorded"), ())
    folder = write_safetensors(tmp_path / "run", path_states(weights_TP))
    imported, _ = import_series(folder, str(tmp_path / "imported"), Selection())
    mine, theirs = ask([trial], Asking()), ask([imported], Asking())
    for table, column in (
        ("skills", "skill"),
        ("paths", "straightness"),
        ("spectra", "path"),
        ("groups", "skill_linear"),
    ):
        found, expected = ([row[column] for row in getattr(one, table)] for one in (mine, theirs))
        assert found == pytest.approx(expected, abs=1e-5)


def test_what_was_computed_of_a_trial_is_kept_and_computed_again_once_it_is_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    record(tmp_path, trial=1, num_steps=12)
    first = trial_series(root, 1)
    assert first.steps == tuple(range(0, 24, 2))
    with monkeypatch.context() as patched:
        patched.setattr(trials, "multiply_rows", None)
        assert trial_series(root, 1).products.gram_SS.tobytes() == first.products.gram_SS.tobytes()
    record(tmp_path, trial=1, num_steps=14)
    assert len(trial_series(root, 1).steps) == 14
    for kept in (tmp_path / "grams").glob("*-series/products.safetensors"):
        kept.write_bytes(b"damaged")
    assert len(trial_series(root, 1).steps) == 14


def test_skills_by_phase_say_where_in_an_iteration_a_run_is_predictable(tmp_path: Path) -> None:
    write_trials(tmp_path, {seed: iterations(8, seed) for seed in (1, 2, 3)}, {"snapshots_per_iteration": 5})
    folder, findings = answer(str(tmp_path), (), Asking(context=3, steps=(1, 2)), None)
    by_phase = {(row["predictor"], row["step"], row["phase"]): row["skill"] for row in findings.phases}
    assert {phase for _, _, phase in by_phase} == set(range(5))
    assert by_phase["linear", 1, 0] == pytest.approx(-1.0, abs=0.1)
    assert [by_phase["linear", 1, phase] for phase in (1, 2, 3, 4)] == pytest.approx([1.0] * 4, abs=1e-4)
    # Learned on the other runs by phase: it repeats the last displacement but where an iteration has ended.
    assert by_phase["ridge", 1, 0] == pytest.approx(0.0, abs=0.1)
    assert by_phase["ridge", 1, 2] == pytest.approx(1.0, abs=0.01)
    answers = {one.question: one for one in report.answers(findings)}
    assert answers["Does that hold at the end of an iteration?"].verdict == "no"
    assert (Path(folder) / "phases.csv").exists()
    page = (Path(folder) / "report.html").read_text()
    assert "Skill by phase" in page
    _, flat = answer(str(tmp_path), (), Asking(context=3, steps=(1, 2), per_iteration=1), None)
    assert flat.phases == []


def test_learning_rates_that_a_trial_has_are_what_predictors_are_given(tmp_path: Path) -> None:
    write_trials(tmp_path, {1: walk(12)})
    (series,) = choose_series(str(tmp_path), ())
    assert series.learning_rates == (3e-4,) * 12


def test_running_statistics_are_a_layer_of_their_own_and_can_be_left_out(tmp_path: Path) -> None:
    for trial in (1, 2):
        record(tmp_path, trial, num_steps=14)
    series = choose_series(str(tmp_path), ())
    assert series[0].products.groups == ("0", "1", "3", "running statistics")
    rest = without_layers(series[0], ("running*", "3"))
    assert rest.num_weights == 8 * 3 + 8 + 8 + 8
    np.testing.assert_allclose(rest.products.gram_SS, series[0].products.grams_GSS[:2].sum(axis=0))
    with pytest.raises(ValueError, match="leave_out='bn' matches no layer of trial-1; its layers are 0, 1, 3, running"):
        answer(str(tmp_path), (), Asking(leave_out=("bn",)), None)
    with pytest.raises(ValueError, match="leaves nothing of trial-1"):
        answer(str(tmp_path), (), Asking(leave_out=("*",)), None)


def test_products_that_would_not_fit_are_refused_and_some_trials_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trials(tmp_path, {1: walk(12), 2: walk(12, 1)})
    monkeypatch.setattr(trials, "MOST_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"2 series of up to 12 checkpoints would take .* more than 1 KB; choose"):
        choose_series(str(tmp_path), ())
    assert [one.name for one in choose_series(str(tmp_path), ("trial-2",))] == ["trial-2"]


def test_the_command_asks_about_recorded_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for trial in (1, 2, 3):
        record(tmp_path, trial, num_steps=20)
    assert main(["ask", str(tmp_path), "--leave-out", "running statistics"]) == 0
    said = capsys.readouterr().out
    assert "Can the next checkpoint be forecast?" in said
    assert [line for line in said.splitlines() if line.startswith("ridge ") and "other series" in line]
    page = Path(said.splitlines()[-1].removeprefix("report: file://")).read_text()
    assert "--leave-out &#39;running statistics&#39;" in page
    assert "learns its coefficients" in page
    assert main(["ask", str(tmp_path / "none")]) == 1
