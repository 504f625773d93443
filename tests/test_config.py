"""Configuration: what is read, what is refused, and in which words."""

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tipl_ray import config
from tipl_ray.command_line import parse_arguments
from tipl_ray.config import JOBS, Basis, Collect, Experiment, Model, Train, Where, fields_read
from tipl_ray.digest import as_table, digest, flat, identity
from tipl_ray.experiments import from_table, load_experiment
from tipl_ray.places import CHECKOUT
from tipl_ray.predict.predictor import Predictor
from tipl_ray.registry import PREDICTORS
from tipl_ray.tipl import NAMES, load

EXPERIMENTS = sorted((CHECKOUT / "jobs" / "experiments").glob("*.toml"))


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_that_is_shipped_passes_its_checks(path: Path) -> None:
    experiment = load_experiment(path).check()
    assert experiment.name == path.stem
    assert path.read_text().startswith("#")
    assert from_table(as_table(experiment)) == experiment


def test_a_table_that_an_earlier_version_wrote_is_read_with_its_fields_where_they_are_now() -> None:
    table = as_table(load_experiment("demo"))
    del table["where"]
    table |= {"storage": "/data", "tracking": {"uri": "http://mlflow:5000", "experiment": None}}
    table["collect"] |= {"trials_per_actor": 2, "physics_threads": 3}
    table["train"] |= {"num_workers": 4, "use_gpu": True}
    table["sweep"] |= {"trainer": "ray-train", "max_concurrent_trials": 5, "cpus_per_trial": 6, "gpus_per_trial": 1.0}
    table["accelerate"] |= {
        "contenders": ["10", "4+ridge:gate"],
        "predictors_from": "a",
        "predictors_storage": "/b",
        "units_at_once": 7,
    }
    read = from_table(table)
    assert read.where == Where(
        storage="/data",
        tracking=config.Tracking(uri="http://mlflow:5000"),
        trials_per_actor=2,
        physics_threads=3,
        num_workers=4,
        use_gpu=True,
        trainer="ray-train",
        max_concurrent_trials=5,
        cpus_per_trial=6,
        gpus_per_trial=1.0,
        predictors_from="a",
        predictors_storage="/b",
        units_at_once=7,
    )
    assert dataclasses.replace(read, where=Where()) == load_experiment("demo")


def test_a_table_of_an_experiment_that_could_jump_is_still_read() -> None:
    experiment = Experiment(name="before")
    before = {"predictor": None, "horizon": 3, "damping": 1.0, "networks": "policy", "moments": "kept", "gate": False}
    assert from_table(as_table(experiment) | {"jump": before | {"limit": 3.0}}) == experiment


def test_a_table_with_fields_that_were_removed_is_read_if_they_had_their_defaults() -> None:
    experiment = Experiment(name="before")
    table = as_table(experiment)
    table["basis"] |= {"centred": False, "deltas": False}
    assert from_table(table) == experiment
    table["basis"]["deltas"] = True
    with pytest.raises(ValueError, match=r"basis\.deltas: this version only reads models with basis\.deltas=False"):
        from_table(table)


def test_a_field_that_came_later_counts_where_it_is_not_at_its_default() -> None:
    default, own = Experiment(name="any"), Experiment(name="any", collect=Collect(algorithm="mine:Mine"))
    assert as_table(default)["collect"]["algorithm"] == "ppo"
    assert "algorithm" not in identity(default)["collect"]
    assert identity(own)["collect"]["algorithm"] == "mine:Mine"
    later = ("algorithm", "task_options")
    before = {name: value for name, value in as_table(default.collect).items() if name not in later}
    assert digest(default.collect) == digest(before) != digest(own.collect)


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
        ("[collect]\nnum_trials = 0", "collect.num_trials=0 is below 1"),
        ("[ppo]\nlearning_rate = nan", "ppo.learning_rate=nan is not a finite number"),
        ("[where]\nnum_workers = 0", "num_workers=0 is below 1"),
        ("[train]\nnum_workers = 2", "train.num_workers=2: num_workers has moved to the section [where]"),
        ("storage = 'data'", "storage='data': storage has moved to the section [where]"),
        ("[ppo]\ngamma = 'high'", "ppo.gamma='high'"),
        ("[collect]\npolicy_hidden = [8]", "policy_hidden"),
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
        (
            ["--basis.kind", "fourier"],
            "basis.kind='fourier' is not one of trial, shared, window, per-weight, nor module:Name",
        ),
        (["--preset", "paper", "--basis.rank", "999"], "basis.rank=999 exceeds the 251 snapshots of a trial"),
        (
            ["--model.context", "250"],
            "model.context=250 + the furthest forward step 10 = 260 displacements, more than the 250",
        ),
        (["--model.heads", "3"], "model.heads=3 does not divide model.embedding=64"),
        (["--ppo.num-minibatches", "30"], "ppo.num_minibatches=30"),
        (["--ppo.gamma", "1.5"], "ppo.gamma=1.5 is above 1"),
        (["--split.test-trials", "14"], "leaves no trial to train on"),
        (["--collect.total-env-steps", "100"], "collect.total_env_steps=100 is less than one PPO iteration"),
        (["--collect.epochs-per-snapshot", "3"], "collect.epochs_per_snapshot=3 does not divide ppo.num_epochs=10"),
        (["--collect.policy-hidden", "8", "0"], "collect.policy_hidden.1=0 is below 1"),
        (["--gpus-per-trial", "1.5"], "gpus_per_trial=1.5 must be a fraction of one GPU or a whole number"),
        (["--collect.num-trials", "0"], "collect.num_trials=0 is below 1"),
        (["--train.batch-size", "65", "--num-workers", "2"], "num_workers=2 does not divide train.batch_size=65"),
        (["--evaluate.extra-horizons", "5", "20"], "evaluate.extra_horizons=(5, 20) must increase and start above"),
        (["--preset", "mine"], "--preset='mine' is not one of causal, paper"),
        (
            ["--experiment", "nowhere.toml"],
            "nowhere.toml: no such file, and not one of the experiments accelerate, all_tasks, cart_pole",
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TIPL_STORAGE", str(tmp_path))
    assert parse_arguments("A job.", ["--storage", "$TIPL_STORAGE/demo"]).storage_path == f"{tmp_path}/demo"
    monkeypatch.delenv("TIPL_STORAGE")
    with pytest.raises(SystemExit):
        parse_arguments("A job.", ["--storage", "$TIPL_STORAGE/demo"])
    assert "storage='$TIPL_STORAGE/demo': the job's environment has no variable TIPL_STORAGE" in capsys.readouterr().err


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
    assert paper.basis.kind == "trial"
    assert (paper.model.context, paper.model.embedding, paper.model.layers, paper.model.heads) == (20, 128, 3, 1)
    assert (paper.train.num_steps, paper.train.batch_size, paper.train.schedule) == (500_000, 64, "constant")


def test_the_demo_trains_our_own_preset_and_the_papers_is_one_flag_away() -> None:
    assert parse_arguments("A job.", []).basis.kind == "window"
    assert parse_arguments("A job.", ["--preset", "paper"]).basis.kind == "trial"


def test_forward_steps_are_the_horizon_and_the_extra_ones() -> None:
    experiment = parse_arguments("A job.", ["--evaluate.horizon", "3", "--evaluate.extra-horizons", "20", "50"])
    assert experiment.evaluate.steps == (1, 2, 3, 20, 50)


def test_digests_follow_values_and_nothing_else() -> None:
    settings = Experiment(name="a")
    assert digest(settings) == digest(Experiment(name="b", where=Where(storage="/there", num_workers=4)))
    assert digest(settings) != digest(dataclasses.replace(settings, train=Train(seed=1)))


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_what_the_job_reads_and_nothing_else(job: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments("A job.", ["--help"], jobs=[job])
    assert ended.value.code == 0
    shown = re.findall(r"^\W*(--[a-z][a-z.-]+)", capsys.readouterr().out, re.MULTILINE)
    read = {f"--{field.removeprefix('where.').replace('_', '-')}" for field in fields_read([job])}
    assert set(shown) - {"--experiment"} == read


@pytest.mark.parametrize("columns", ["80", "100"])
@pytest.mark.parametrize("job", NAMES)
def test_help_defines_its_terms_and_fits_the_terminal(
    job: str, columns: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", [f"tipl {job}", "--help"])
    with pytest.raises(SystemExit) as ended:
        load(job).main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= int(columns)
    if job not in ("compare", "data"):
        for term in ("TIPL", "WPE", "REPW", "skill", "snapshot"):
            assert (f"\n  {term} " in shown) == bool(re.search(rf"\b{term}s?\b", shown)), term


def test_help_explains_every_option_at_once() -> None:
    begin = time.process_time()
    job = str(CHECKOUT / "jobs" / "collect.py")
    shown = subprocess.run([sys.executable, job, "--help"], capture_output=True, text=True, check=True).stdout
    assert "Widths of the policy's two hidden layers" in shown
    assert "--experiment FILE" in shown
    assert "--storage {None}|STR" in shown
    assert "--train" not in shown
    assert time.process_time() - begin < 1


def test_the_names_of_predictors_are_those_that_there_are() -> None:
    assert all(importlib.import_module(f"tipl_ray.{module}") for module in ("paper.predictor", "window.predictor"))
    assert all(PREDICTORS.load(name).name == name for name in PREDICTORS.own)
    kinds = [Predictor]
    for kind in kinds:
        kinds += [one for one in kind.__subclasses__() if one.__module__.startswith("tipl_ray.")]
    assert set(config.known_predictors()) == {kind.name for kind in kinds if hasattr(kind, "name")}


FOUR = ["--collect.num-trials", "4"]
SEEDS = ["--experiment", "accelerate", "--collect.num-trials", "2"]


@pytest.mark.parametrize(
    ("arguments", "taken", "refused"),
    [
        (FOUR, ["collect"], ["train", "evaluate", "sweep"]),
        (SEEDS, ["collect", "accelerate"], ["train", "evaluate", "sweep"]),
        (["--experiment", "accelerate", "--collect.num-trials", "10000"], ["collect"], ["accelerate"]),
    ],
)
def test_a_job_is_refused_for_what_it_reads_and_not_for_what_others_read(
    arguments: list[str], taken: list[str], refused: list[str]
) -> None:
    for job in taken:
        experiment = parse_arguments("A job.", arguments, jobs=[job])
        assert from_table(as_table(experiment)) == experiment
    for job in refused:
        with pytest.raises(SystemExit):
            parse_arguments("A job.", arguments, jobs=[job])
        with pytest.raises(SystemExit):
            parse_arguments("A job.", arguments, jobs=["collect", job])
    with pytest.raises(SystemExit):
        parse_arguments("A job.", arguments)


NUMBERS = [name for name, value in flat(as_table(Experiment(name="any"))) if type(value) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_of_any_section_is_nan_or_infinite_or_beyond_what_is_stored(name: str) -> None:
    experiment = Experiment(name="any")
    part, field = name.split(".")
    section: Any = getattr(experiment, part)
    is_float = isinstance(getattr(section, field), float)
    said = field if part == "where" else name
    for one in (float("nan"), float("inf"), -float("inf")) if is_float else (-1, 2**31, 10**30):
        changed = dataclasses.replace(section, **{field: one})
        with pytest.raises(ValueError, match=rf"^{re.escape(said)}="):
            dataclasses.replace(experiment, **{part: changed}).check()


@pytest.mark.parametrize(
    ("arguments", "job", "words"),
    [
        (["--basis.rank", "3"], "train", "note: --basis.rank has no effect: basis.kind=window fits no Temporal SVD"),
        (["--sweep.num-samples", "3"], "sweep", "note: --sweep.num-samples has no effect: a grid search runs every"),
        (["--train.seed", "3", "--evaluate.seed", "1", "--name", "mine"], "evaluate", ""),
    ],
)
def test_what_is_said_and_changes_nothing_is_told(
    arguments: list[str], job: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    parse_arguments("A job.", arguments, jobs=[job])
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == (1 if words else 0)


@pytest.mark.parametrize(
    ("arguments", "job", "words"),
    [
        (["--train.seed", "3"], "collect", "--train.seed: collect does not use it; train, evaluate, cross_v"),
        (["--preset", "paper"], "collect", "--preset: collect does not use it; train, evaluate, cross_v"),
        (["--evaluate.episodes=3"], "train", "--evaluate.episodes: train does not use it; evaluate and"),
        (["--use-gpu"], "sweep", "--use-gpu: sweep does not use it; train and cross_validate do"),
        (["--collect.task", "Hopper-v4"], "accelerate", "--collect.task: accelerate does not use it; collect, train"),
        (
            ["--accelerate.contenders", "10"],
            "accelerate",
            "--accelerate.contenders: it can be set only in the experiment's file",
        ),
        (
            ["--collect.engine", "torch"],
            "train",
            "--collect.engine: train does not use it; collect, accelerate, find_rule, fork and learn_jumps do",
        ),
        (["--train.num-workers", "2"], "train", "--train.num-workers: it is now called --num-workers"),
        (["--train.no-use-gpu"], "train", "--train.no-use-gpu: it is now called --use-gpu"),
        (["--train.sed", "2"], "train", "--train.sed: no such option; did you mean --train.seed?"),
        (["--sweep.over", "2"], "sweep", "--sweep.over: no such option"),
    ],
)
def test_an_option_that_a_job_does_not_read_is_refused_with_those_that_do(
    arguments: list[str], job: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments("A job.", arguments, jobs=[job])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}")
    assert said.count("\n") == 1


def test_every_section_is_read_by_some_job() -> None:
    read = {field.partition(".")[0].removeprefix("-") for fields in JOBS.values() for field in fields}
    assert read | {"name"} == {field.name for field in dataclasses.fields(Experiment)}
    fields = {name for name, _ in flat(as_table(Experiment(name="any")))}
    # Contenders have sections of their own, which no option could say.
    assert set(fields_read(JOBS)) | {"accelerate.contenders", "improve.regimes"} == fields


@pytest.mark.parametrize("name", ["demo", "run-1", "run_1.2", "lr=0.1", "Größe", "実験-3", "हिन्दी", "_mine", "a+b@c,d"])
def test_names_that_all_take_are_taken(name: str) -> None:
    Experiment(name=name, where=Where(tracking=config.Tracking(experiment=name))).check()


@pytest.mark.parametrize(
    "name",
    [
        *(".", "..", "-x", ".x", "x.", "x ", " x", "", "a/b", "a\\b", "a:b", "a b", "a'b", 'a"b', "a`b", "a$b", "a*"),
        *(
            "a\nb",
            "a\0b",
            "a\x1b[2Jb",
            "a\u202eb",
            "a\u200fb",
            "a\u2028b",
            "a\ud800b",
            "x" * 101,
            "é" * 51,
            "a<b",
            "a%b",
            "a|b",
        ),
    ],
)
def test_names_that_anyone_may_misread_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name="):
        Experiment(name=name).check()
    if " " not in name.strip() and "/" not in name:
        with pytest.raises(ValueError, match=r"tracking\.experiment="):
            Experiment(name="a", where=Where(tracking=config.Tracking(experiment=name))).check()


def test_a_password_in_an_address_is_not_repeated() -> None:
    address = "http://ada:secret@host/\n"
    for experiment in (
        Experiment(name="a", where=Where(storage=address)),
        Experiment(name="a", where=Where(tracking=config.Tracking(uri=address))),
    ):
        with pytest.raises(ValueError, match=r"//ada:\*\*\*@host") as caught:
            experiment.check()
        assert "secret" not in str(caught.value)


def test_an_experiment_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = load_experiment(CHECKOUT / "jobs" / "experiments" / "smoke.toml")
    for name in ("smoke", "smoke.toml", "jobs/experiments/smoke.toml"):
        assert load_experiment(name) == whole
    (tmp_path / "smoke.toml").write_text("name = 'mine'")
    assert load_experiment("smoke.toml").name == "mine"
    with pytest.raises(FileNotFoundError, match="did you mean smoke"):
        load_experiment("elsewhere/smoke.toml")


def test_a_storage_means_the_same_to_workers_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = parse_arguments("A job.", ["--storage", "mine"])
    monkeypatch.chdir("/")
    assert experiment.storage_path == str(tmp_path / "mine")


def test_an_installed_package_keeps_its_data_in_the_working_directory_and_finds_experiments_beside_the_jobs(
    tmp_path: Path,
) -> None:
    shutil.copytree(CHECKOUT / "tipl_ray", tmp_path / "site-packages" / "tipl_ray")
    shutil.copytree(CHECKOUT / "jobs", tmp_path / "work" / "jobs")
    (tmp_path / "work" / "mine.toml").write_text("")
    script = tmp_path / "work" / "jobs" / "where.py"
    script.write_text(
        "import sys; from tipl_ray.command_line import parse_arguments\n"
        "print(parse_arguments('Where.', jobs=['collect']).storage_path)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site-packages")}

    def storage(*arguments: str) -> str:
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path / "work", env=environment
        )
        return done.stdout.strip()

    assert storage() == str(tmp_path / "work" / "storage" / "demo")
    assert storage("--experiment", "mine.toml") == str(tmp_path / "work" / "storage" / "mine")
    assert storage("--experiment", "smoke", "--storage", "here") == str(tmp_path / "work" / "here")
    assert not (tmp_path / "site-packages" / "storage").exists()


def test_variables_that_are_empty_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which says that there are none
    parse_arguments("A job.", [])
    assert not {"TMPDIR", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"} & set(os.environ)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("job", ["collect", "train", "evaluate", "pipeline", "sweep", "accelerate"])
def test_the_command_that_each_job_says_to_submit_is_one_that_it_takes(job: str) -> None:
    described = (CHECKOUT / "jobs" / f"{job}.py").read_text().split('"""')[1].replace("\\\\\n", "")
    (submitted,) = [line for line in described.splitlines() if "ray job submit" in line]
    words = submitted.split(" -- python ")[1].split()
    assert words[0] == f"jobs/{job}.py"
    assert "--storage" in words
    assert "--tracking.uri" in words
    stages = ["collect", "train", "evaluate"] if job == "pipeline" else [job]
    default = "accelerate" if job == "accelerate" else "demo"
    experiment = parse_arguments("A job.", words[1:], jobs=stages, experiment=default)
    assert experiment.storage_path.startswith("s3://")


@pytest.mark.parametrize("uri", ["htp://mlflow:5000", "/data/mlflow.db", "sqlite:///mlflow.db"])
def test_a_tracking_uri_that_cannot_be_is_refused_while_it_is_parsed(
    uri: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments("A job.", ["--storage", str(tmp_path), "--tracking.uri", uri], jobs=["collect"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: tracking.uri='{uri}'")
