"""Cross-validation: every trial tests once, what was done is not done again, and figures rest on all trials."""

import contextlib
import dataclasses
from pathlib import Path

import pyarrow.csv
import pytest
from test_stages import collected
from test_training import experiment

from tipl_ray import config, jobs
from tipl_ray.config import Split
from tipl_ray.cross_validation import folds_of, run_cross_validation
from tipl_ray.digest import identity

SEEDS = (3, 4, 5, 6)


@pytest.mark.parametrize("folds", [3, 4, 7])
def test_every_trial_is_in_one_part_of_each_fold_and_tests_once(folds: int) -> None:
    seeds = tuple(range(11, 25))
    parts = [Split(folds=folds, fold=fold).cut(seeds) for fold in range(folds)]
    for training, validation, test in parts:
        assert sorted((*training, *validation, *test)) == list(seeds)
        assert training
        assert validation
    assert sorted(seed for _, _, test in parts for seed in test) == list(seeds)
    assert sorted(seed for _, validation, _ in parts for seed in validation) == list(seeds)


def test_without_folds_the_split_is_named_as_it_always_was() -> None:
    assert identity(Split()) == {"validation_trials": 5, "test_trials": 5}


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"folds": 2}, r"split\.folds=2 leaves no trial to train on"),
        ({"folds": 3, "fold": 3}, r"split\.fold=3 is not below split\.folds=3"),
        ({"folds": 5}, r"split\.folds=5 exceeds the number of trials: collect\.num_trials=4"),
    ],
)
def test_folds_that_cannot_be_are_refused(split: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(experiment(), split=Split(**split)).check("cross_validate")


@pytest.mark.usefixtures("cluster")
def test_the_job_judges_every_trial_by_a_model_that_has_not_seen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "connected_to_ray", contextlib.nullcontext)
    settings = experiment(tmp_path, "window", num_steps=10)
    settings = dataclasses.replace(
        settings, evaluate=config.Evaluate(horizon=2, run_policies_of=(), bootstrap=50), split=Split(folds=3)
    )
    collected(tmp_path, *SEEDS)
    assert [one.test_seeds for one in folds_of(settings)] == [(3, 6), (4,), (5,)]
    run_cross_validation(settings)
    said = capsys.readouterr().out
    assert "Does TIPL beat copying the last snapshot?" in said
    (summary,) = tmp_path.glob("cross_validations/*/summary.csv")
    rows = pyarrow.csv.read_csv(summary).to_pylist()
    assert {row["trials"] for row in rows} == {4}
    copies = [row["skill"] for row in rows if row["predictor"] == "copy-last"]
    assert copies == pytest.approx([0.0, 0.0])
    by_trial = pyarrow.csv.read_csv(summary.with_name("trials.csv")).to_pylist()
    assert sorted(row["trial"] for row in by_trial if (row["predictor"], row["step"]) == ("tipl", 1)) == [3, 4, 5, 6]
    for row in rows:
        own = [one for one in by_trial if (one["predictor"], one["step"]) == (row["predictor"], row["step"])]
        errors, moved = (sum(one[name] for one in own) for name in ("squared_error", "displacement_squared"))
        assert row["skill"] == pytest.approx(1 - errors / moved)
    models = {path: path.stat().st_mtime_ns for path in tmp_path.glob("models/*/model.json")}
    assert len(models) == 3
    assert not list(tmp_path.glob("experiment-*.json"))  # nor is a fold's split what later jobs go by
    run_cross_validation(settings)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("models/*/model.json")} == models
    assert pyarrow.csv.read_csv(summary).to_pylist() == rows
