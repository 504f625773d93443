"""Configuration: what is read, what is refused, and in which words."""

import doctest
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tipl_ray import config
from tipl_ray.config import (
    CHECKOUT,
    Basis,
    Experiment,
    Model,
    Train,
    as_table,
    digest,
    from_table,
    load_experiment,
    parse_arguments,
)

EXPERIMENTS = sorted((CHECKOUT / "jobs" / "experiments").glob("*.toml"))


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(config).failed == 0


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_that_is_shipped_passes_its_checks(path: Path) -> None:
    experiment = load_experiment(path).check()
    assert experiment.name == path.stem
    assert path.read_text().startswith("#")
    assert from_table(as_table(experiment)) == experiment


def test_the_papers_experiment_has_the_papers_numbers() -> None:
    experiment = load_experiment(CHECKOUT / "jobs" / "experiments" / "inverted_pendulum.toml")
    assert experiment.num_snapshots == 1 + 390 * 5
    assert (len(experiment.train_seeds), len(experiment.validation_seeds), len(experiment.test_seeds)) == (40, 5, 5)
    assert not set(experiment.train_seeds) & set(experiment.test_seeds)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[collect]\nnum_trial = 3", "collect.num_trial=3: unknown key"),
        ("colect = 3", "colect=3: unknown key"),
        ("[ppo]\ngamma = 'high'", "ppo.gamma='high'"),
        ("[collect]\npolicy_hidden = [8]", "policy_hidden"),
        ("[basis]\nkind = 'fourier'", "basis.kind='fourier'"),
        ("preset = 'mine'", "preset='mine' is not one of"),
        ("name = ", "is not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_field_and_value(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"mine\.toml") as caught:
        load_experiment(write(tmp_path, text))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "paper", "--basis.rank", "999"], "basis.rank=999 exceeds the 251 snapshots of a trial"),
        (
            ["--model.context", "250"],
            "model.context=250 + forward step 10 of evaluate = 260 displacements exceed the 250",
        ),
        (["--model.heads", "3"], "model.heads=3 does not divide model.embedding=64"),
        (["--ppo.num-minibatches", "30"], "ppo.num_minibatches=30"),
        (["--ppo.gamma", "1.5"], "ppo.gamma=1.5 is outside [0.0, 1.0]"),
        (["--split.test-trials", "14"], "leaves no trial to train on"),
        (["--collect.total-env-steps", "100"], "collect.total_env_steps=100 is less than one iteration"),
        (["--collect.epochs-per-snapshot", "3"], "collect.epochs_per_snapshot=3 does not divide ppo.num_epochs=10"),
        (["--collect.num-trials", "0"], "collect.num_trials=0 is outside [1, 100000]"),
        (["--train.batch-size", "65", "--train.num-workers", "2"], "train.num_workers=2 does not divide"),
        (["--basis.centred", "--basis.deltas"], "exclude each other"),
        (["--evaluate.extra-horizons", "5", "20"], "evaluate.extra_horizons=(5, 20) do not rise from beyond"),
        (["--preset", "mine"], "preset='mine' is not one of causal, paper"),
        (
            ["--experiment", "nowhere.toml"],
            f"nowhere.toml: no such file; in {CHECKOUT}/jobs/experiments there are: accelerate, demo",
        ),
    ],
)
def test_an_impossible_combination_is_refused_with_its_limit(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments("A job.", arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_the_command_line_overrides_the_file() -> None:
    experiment = parse_arguments("A job.", ["--collect.num-trials", "20", "--collect.policy-hidden", "16", "32"])
    assert experiment.name == "demo"
    assert (experiment.collect.num_trials, experiment.collect.policy_hidden) == (20, (16, 32))
    assert experiment.storage_path.endswith("storage/demo")


def test_the_storage_may_name_variables_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TIPL_STORAGE", "s3://bucket/prefix")
    assert parse_arguments("A job.", ["--storage", "$TIPL_STORAGE/demo"]).storage_path == "s3://bucket/prefix/demo"
    monkeypatch.delenv("TIPL_STORAGE")
    with pytest.raises(SystemExit):
        parse_arguments("A job.", ["--storage", "$TIPL_STORAGE/demo"])
    assert "storage='$TIPL_STORAGE/demo': the environment of the job has no TIPL_STORAGE" in capsys.readouterr().err


def test_the_preset_on_the_command_line_sets_the_defaults_before_other_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "preset = 'causal'\n[train]\nseed = 3\n[causal.train]\nnum_steps = 70\n[paper.train]\nnum_steps = 90\n",
    )
    ours = parse_arguments("A job.", ["--experiment", path])
    assert (ours.preset, ours.basis.kind, ours.model.embedding) == ("causal", "window", 64)
    assert (ours.train.num_steps, ours.train.seed, ours.train.schedule) == (70, 3, "cosine")
    papers = parse_arguments("A job.", ["--model.layers", "4", "--experiment", path, "--preset", "paper"])
    assert papers.train == Train(num_steps=90, seed=3)
    assert (papers.preset, papers.basis, papers.model) == ("paper", Basis(), Model(layers=4))
    assert parse_arguments("A job.", ["--experiment", path, "--preset=paper"]).train == papers.train


def test_the_papers_preset_is_the_papers() -> None:
    """Section 4.1 and Decision Transformer's defaults for gym."""
    paper = load_experiment(CHECKOUT / "jobs" / "experiments" / "inverted_pendulum.toml", preset="paper")
    assert (paper.basis.kind, paper.basis.centred, paper.basis.deltas) == ("trial", False, False)
    assert (paper.model.context, paper.model.embedding, paper.model.layers, paper.model.heads) == (20, 128, 3, 1)
    assert (paper.train.num_steps, paper.train.batch_size, paper.train.schedule) == (500_000, 64, "constant")


def test_the_demo_trains_our_own_preset_and_the_papers_is_one_flag_away() -> None:
    assert parse_arguments("A job.", []).basis.kind == "window"
    assert parse_arguments("A job.", ["--preset", "paper"]).basis.kind == "trial"


def test_forward_steps_are_the_horizon_and_the_extra_ones() -> None:
    experiment = parse_arguments("A job.", ["--evaluate.horizon", "3", "--evaluate.extra-horizons", "20", "50"])
    assert experiment.evaluate.steps == (1, 2, 3, 20, 50)


def test_digests_follow_values_and_nothing_else() -> None:
    assert digest(Experiment(name="a")) == digest(Experiment(name="a"))
    assert digest(Experiment(name="a")) != digest(Experiment(name="b"))


def test_help_explains_every_option_at_once() -> None:
    begin = time.monotonic()
    job = str(CHECKOUT / "jobs" / "pipeline.py")
    shown = subprocess.run([sys.executable, job, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--collect.policy-hidden" in shown
    assert "Widths of the policy's two hidden layers" in shown
    assert "--experiment FILE" in shown
    assert time.monotonic() - begin < 30
