"""The whole of jobs/accelerate.py, shrunk: fitted predictors, a search, the table, and the same again after a kill."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest
import torch

from tipl_ray import jobs
from tipl_ray.accelerate import acceleration
from tipl_ray.accelerate.acceleration import find_predictors, read_finished, run_acceleration, source_experiment
from tipl_ray.accelerate.contenders import Fitted, Unit, fit_and_save, jump_question, jump_settings
from tipl_ray.accelerate.scores import Finished, best_value, comparable, filled
from tipl_ray.accelerate.units import AccelerationError, Counted, has_run, load_unit, run_unit
from tipl_ray.collect.group import GroupCollector
from tipl_ray.config import Accelerate, Collect, Contender, Experiment, Jump, OuterStep, Ppo, Split, Where
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import as_table
from tipl_ray.predict.gram import Question
from tipl_ray.predict.saved import load_predictor, predictor_digest
from tipl_ray.train.data_sets import model_folder
from tipl_ray.window.transformer import WindowTransformer

SOURCE = """
[ppo]
num_steps = 128
num_minibatches = 4

[collect]
num_trials = 3
total_env_steps = 1_280

[split]
validation_trials = 1
test_trials = 1

[model]
context = 6
embedding = 16
layers = 1
heads = 2

[evaluate]
horizon = 3
"""


RIDGE = Contender(name="4+ridge", ppo={"num_epochs": 4}, jump=Jump(predictor="ridge"))


def collected(source: Experiment) -> TrajectoryStore:
    collector = GroupCollector(source, "torch")
    collector.start(source.collect.seeds)
    collector.advance(1000.0)
    store = TrajectoryStore(source.storage_path)
    store.finish(source.collect.seeds, source.num_snapshots)
    return store


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Three contenders on one task, with a collected source whose model is a Transformer as it begins."""
    folder = tmp_path_factory.mktemp("acceleration")
    (folder / "source.toml").write_text(SOURCE)
    made = Experiment(
        name="accelerate",
        where=Where(
            storage=str(folder / "accelerate"),
            predictors_from=str(folder / "source.toml"),
            predictors_storage=str(folder / "source"),
            units_at_once=1,
        ),
        ppo=Ppo(num_steps=128, num_minibatches=4),
        collect=Collect(task="InvertedPendulum-v4", num_trials=3, first_seed=101, total_env_steps=768, engine="torch"),
        split=Split(validation_trials=1, test_trials=1),
        accelerate=Accelerate(
            tasks=("InvertedPendulum-v4",),
            contenders=(
                Contender(name="10"),
                RIDGE,
                Contender(name="gated", ppo={"num_epochs": 4}, jump=Jump(predictor="tipl", gate=True)),
            ),
            learning_rates=(3e-4, 1e-3),
            search_trials=2,
            bootstrap=50,
        ),
    )
    source = source_experiment(made)
    store = collected(source)
    torch.manual_seed(0)
    question = Question.of(source)
    model = WindowTransformer(source.model, question.steps, question.snapshots_per_iteration)
    model.save(model_folder(source, store.digest(source.collect.seeds)), {"basis": as_table(source.basis)})
    return made


@pytest.mark.usefixtures("cluster")
def test_the_job_searches_runs_and_compares_and_again_finds_all_done(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Path(experiment.storage_path)
    monkeypatch.setattr(jobs, "connected_to_ray", contextlib.nullcontext)
    run_acceleration(experiment)
    (folder,) = (storage / "accelerations").iterdir()
    rows = pyarrow.csv.read_csv(folder / "table.csv").to_pylist()
    assert [row["contender"] for row in rows] == ["10", "4+ridge", "gated"]
    assert {row["env_steps"] for row in rows} == {768}
    assert {row["seeds"] for row in rows} == {3}
    assert [row["gradient_steps"] for row in rows] == [240, 96, 96]
    assert rows[1]["jumps_taken"] == 18
    assert rows[2]["jumps_taken"] + rows[2]["jumps_gated"] == 18
    assert rows[1]["predictor_trained_on"] == "InvertedPendulum-v4"
    assert all(row["seconds"] > 0 for row in rows)
    units = [json.loads(path.read_text()) for path in storage.glob("units/*/unit.json")]
    assert len(units) == 3 * 3
    searched = [unit for unit in units if unit["experiment"]["collect"]["first_seed"] == 10_001]
    assert len(searched) == 6
    for row in rows:
        chosen = {
            unit["experiment"]["ppo"]["learning_rate"]: np.nanmean(filled(np.array(unit["returns"], float)))
            for unit in searched
            if unit["experiment"]["ppo"]["num_epochs"] == row["epochs"]
            and (unit["experiment"]["jump"]["predictor"] is None) == (row["predictor"] == "none")
            and unit["experiment"]["jump"]["gate"] == ("gate" in row["contender"])
        }
        assert row["hyperparameters"] == f"learning_rate={max(chosen, key=lambda rate: chosen[rate]):g}"
    assert list(storage.glob("units/*/trajectories")) == []
    page = (folder / "report.html").read_text()
    assert page.count("of the gradient steps of") == 2
    assert page.count("data:image/png;base64,") == 4
    rates = pyarrow.csv.read_csv(folder / "search.csv").to_pylist()
    chosen_values = [f"{row['searched']}={row['value']:g}" for row in rates if row["chosen"]]
    assert chosen_values == [row["hyperparameters"] for row in rows]
    assert len(rates) == len(searched)
    assert len(list((folder / "figures").glob("*.png"))) == 4
    # Read without running anything: the same, and nothing where nothing has run.
    source = source_experiment(experiment)
    predictors = find_predictors(experiment, source, experiment.accelerate.running)
    plan = acceleration.Plan(experiment=experiment, source=source, predictors=predictors, engine="torch")
    read = [(one.unit.contender.name, one.unit.hyperparameters) for one in read_finished(plan)]
    assert read == [(row["contender"], row["hyperparameters"]) for row in rows]
    elsewhere = dataclasses.replace(plan, experiment=experiment.at(str(tmp_path / "none")))
    assert read_finished(elsewhere) == []
    before = {path: path.stat().st_mtime_ns for path in storage.glob("units/*/unit.json")}
    run_acceleration(experiment)
    assert {path: path.stat().st_mtime_ns for path in storage.glob("units/*/unit.json")} == before
    # A unit that was altered since is not believed, but run again.
    altered = min(before)
    content = altered.read_bytes()
    altered.write_bytes(content.replace(b'"returns": [[', b'"returns": [[1'))
    run_acceleration(experiment)
    assert json.loads(altered.read_text())["returns"] == json.loads(content)["returns"]
    # Moved elsewhere, and asked with other settings of how fast it goes, it is the same acceleration.
    shutil.copytree(storage, tmp_path / "moved")
    shutil.copytree(str(experiment.where.predictors_storage), tmp_path / "source")
    where = Where(
        storage=str(tmp_path / "moved"),
        predictors_from=experiment.where.predictors_from,
        predictors_storage=str(tmp_path / "source"),
        units_at_once=2,
        keep_weights=True,
    )
    run_acceleration(dataclasses.replace(experiment, where=where))
    assert [path.name for path in (tmp_path / "moved" / "accelerations").iterdir()] == [folder.name]
    units_there = {path.relative_to(tmp_path / "moved") for path in tmp_path.glob("moved/units/*/unit.json")}
    assert units_there == {path.relative_to(storage) for path in before}
    assert str(storage) not in (tmp_path / "moved" / units_there.pop()).read_text()


def plan(experiment: Experiment, storage: Path, predictors: dict[str, Fitted] | None = None) -> acceleration.Plan:
    source = source_experiment(experiment)
    here = experiment.at(str(storage))
    return acceleration.Plan(experiment=here, source=source, predictors=predictors or {}, engine="torch")


@pytest.mark.parametrize(
    ("contender", "gradient_steps"),
    [
        (RIDGE, 4 * 4),
        (Contender(name="outer", ppo={"num_epochs": 2}, outer=OuterStep(rate=2.0, momentum=0.5)), 2 * 4),
        (
            Contender(name="then 1", ppo={"num_epochs": 3}, jump=Jump(predictor="first-again", corrective_epochs=1)),
            3 * 4,
        ),
        (Contender(name="replicas", ppo={"num_epochs": 2, "replicas": 2}), 2 * 2 * 4),
        (Contender(name="stop", ppo={"target_kl": 1e-4}), None),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_a_unit_that_was_killed_goes_on_to_the_same_curves(
    experiment: Experiment, tmp_path: Path, contender: Contender, gradient_steps: int | None
) -> None:
    source, predictors = source_experiment(experiment), {}
    if contender.jump:
        question, name = jump_question(contender, experiment, source), contender.jump.predictor
        fit_and_save(source, question, [name], f"{tmp_path}/predictors")
        folder = f"{tmp_path}/predictors/{name}"
        predictors = {contender.name: Fitted(predictor=load_predictor(folder), digest=predictor_digest(folder))}
    unit = Unit(task="InvertedPendulum-v4", env_steps=768, contender=contender, value=1e-3, search=True)
    tables, finished = [], []
    for storage, killed_after in (("killed", 3), ("whole", 0)):
        planned = plan(experiment, tmp_path / storage, predictors)
        made, extension = planned.of(unit), planned.extension(unit)
        made = dataclasses.replace(made, collect=dataclasses.replace(made.collect, iterations_per_commit=2))
        if killed_after:
            killed = GroupCollector(made, "torch", extension=Counted(extension))
            killed.start(made.collect.seeds)
            for _ in range(killed_after):
                killed._run_iteration()
        run_unit(made, "torch", extension)
        tables.append(json.loads((Path(made.storage_path) / "unit.json").read_text()))
        finished.append(load_unit(unit, made, 10))
    assert tables[0]["returns"] == tables[1]["returns"]
    assert tables[0]["gradient_steps"] == tables[1]["gradient_steps"]
    assert tables[0]["jump_counts"] == tables[1]["jump_counts"] == ([12, 0, 0] if contender.jump else [])
    steps_I = finished[0].gradient_steps_I
    if gradient_steps:
        np.testing.assert_array_equal(steps_I, gradient_steps * np.arange(1, 7))
    else:
        assert (np.diff(steps_I, prepend=0) > 0).all()
        assert steps_I[-1] < 6 * 10 * 4


@pytest.mark.parametrize(("task", "rate"), [("InvertedPendulum-v4", 1e3), ("HalfCheetah-v4", 1e5)])
def test_a_unit_whose_trials_diverge_has_run_and_is_the_worst(
    experiment: Experiment, tmp_path: Path, task: str, rate: float
) -> None:
    planned = plan(experiment, tmp_path)
    loaded = []
    for contender, learning_rate in ((Contender(name="10"), rate), (RULES[0], 1e-3)):
        unit = Unit(
            task=task,
            env_steps=1_280,
            contender=contender,
            value=learning_rate,
            search=True,
        )
        for _ in range(2):
            run_unit(planned.of(unit), "torch")
        loaded.append(planned.load(unit))
    assert [one.num_diverged for one in loaded] == [2, 0]
    assert loaded[0].gradient_steps_I[-1] > 0  # those of the trials until they diverged
    first, second = comparable(loaded)
    assert first.areas_S.max() <= second.areas_S.min()
    alike = [dataclasses.replace(one, unit=dataclasses.replace(one.unit, contender=RULES[0])) for one in loaded]
    assert best_value(alike) == 1e-3


def test_a_unit_that_another_engine_ran_is_run_again(experiment: Experiment, tmp_path: Path) -> None:
    planned = plan(experiment, tmp_path)
    contender = Contender(name="10")
    unit = Unit(task="InvertedPendulum-v4", env_steps=1_280, contender=contender, value=1e-3, search=True)
    made = planned.of(unit)
    run_unit(made, "torch")
    assert has_run(made.storage_path, "torch")
    assert not has_run(made.storage_path, "compiled")


def test_what_a_trial_lost_is_counted_among_runs_of_its_own_length(experiment: Experiment, tmp_path: Path) -> None:
    long, short = (
        Finished(
            unit=Unit(task="A", env_steps=steps, contender=Contender(name="10"), value=1e-3, search=False),
            returns_SI=returns_SI,
            env_steps_I=np.arange(2),
            gradient_steps_I=np.arange(2),
            epochs=10,
            cpu_seconds=1.0,
            jump_counts=[],
            num_diverged=0,
        )
        for steps, returns_SI in ((1000, np.array([[-50.0, 9.0]])), (100, np.array([[3.0, np.nan], [2.0, 4.0]])))
    )
    np.testing.assert_array_equal(comparable([long, short])[1].returns_SI, [[3.0, 2.0], [2.0, 4.0]])


def test_a_unit_without_the_end_of_an_episode_is_one_line(experiment: Experiment, tmp_path: Path) -> None:
    planned = plan(experiment, tmp_path)
    unit = Unit(task="HalfCheetah-v4", env_steps=256, contender=Contender(name="10"), value=1e-3, search=True)
    run_unit(planned.of(unit), "torch")
    with pytest.raises(AccelerationError, match=r"variant '10': no episode of trial 10001 ended within 256 env steps"):
        planned.load(unit)


RULES = (
    Contender(name="4", ppo={"num_epochs": 4}),
    Contender(name="again", ppo={"num_epochs": 4}, jump=Jump(predictor="first-again")),
    Contender(name="linear", ppo={"num_epochs": 4}, jump=Jump(predictor="linear", gate=True, damping=0.5)),
    Contender(name="twenty", ppo={"num_epochs": 20}, jump=Jump(predictor="first-again", horizon=1)),
    Contender(name="nowhere", ppo={"num_epochs": 6}, jump=Jump(predictor="copy-last")),
)


def test_rules_that_learn_nothing_need_no_trials(experiment: Experiment, tmp_path: Path) -> None:
    mine = experiment.at(str(tmp_path / "mine"))
    source = source_experiment(experiment).at(str(tmp_path / "nothing"))
    found = find_predictors(mine, source, RULES)
    assert set(found) == {one.name for one in RULES if one.jump}
    for one in RULES:
        if one.jump:
            question = found[one.name].predictor.question
            assert question.context == source.model.context
            assert len(question.steps) == jump_settings(one, mine, source).horizon
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(StoreError, match=r"variant '4\+ridge' needs a predictor fitted on the 3 trials of source"):
        find_predictors(mine, source, [*RULES, RIDGE])


def test_what_combines_no_displacements_cannot_jump(experiment: Experiment) -> None:
    mean = Contender(name="mean", ppo={"num_epochs": 4}, jump=Jump(predictor="mean-trajectory"))
    with pytest.raises(ValueError, match=r"jump\.predictor='mean-trajectory' does not combine displacements"):
        jump_settings(mean, experiment, source_experiment(experiment))


def test_a_source_without_its_model_says_what_to_run(experiment: Experiment, tmp_path: Path) -> None:
    other = source_experiment(experiment).at(str(tmp_path))
    collected(other)
    tipl = Contender(name="4+tipl", ppo={"num_epochs": 4}, jump=Jump(predictor="tipl"))
    with pytest.raises(StoreError, match=r"there is no trained model of source; run jobs/train.py --preset causal"):
        find_predictors(experiment, other, [tipl])


@pytest.mark.usefixtures("cluster")
def test_one_setting_for_all_tasks_is_searched_once_and_an_oracles_on_each(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "connected_to_ray", contextlib.nullcontext)
    rates = (3e-4, 1e-3)
    accelerate = Accelerate(
        tasks=("InvertedPendulum-v4", "InvertedDoublePendulum-v4"),
        search_tasks=("InvertedPendulum-v4@512",),
        contenders=(
            Contender(name="2", ppo={"num_epochs": 2}),
            Contender(name="KL", ppo={"schedule": "constant"}, searched="desired_kl", values=(0.01, 0.02)),
            Contender(name="oracle", ppo={"num_epochs": 2}, per_task=True),
            Contender(name="left out"),
        ),
        only=("KL", "oracle"),
        learning_rates=rates,
        search_trials=2,
        bootstrap=50,
    )
    run_acceleration(dataclasses.replace(experiment, accelerate=accelerate).at(str(tmp_path)))
    (folder,) = tmp_path.glob("accelerations/*")
    rows = pyarrow.csv.read_csv(folder / "table.csv").to_pylist()
    assert [(row["contender"], row["held_out"]) for row in rows] == [
        (name, held and name != "oracle")  # which was tuned on the task itself
        for held in (False, True)
        for name in ("2", "KL", "oracle")
    ]
    chosen = [row["hyperparameters"] for row in rows]
    assert chosen[:2] == chosen[3:5]
    assert chosen[0] == chosen[2]
    assert chosen[1].startswith("desired_kl=")
    search = pyarrow.csv.read_csv(folder / "search.csv").to_pylist()
    # The oracle's cells on the searched task are those of the first contender, run once.
    tasks = {"InvertedPendulum-v4": 512, "InvertedDoublePendulum-v4": 512}
    assert {row["task"]: row["env_steps"] for row in search} == tasks
    assert [row["contender"] for row in search] == [*2 * ["2"], *2 * ["KL"], *4 * ["oracle"]]
    # What the oracle reports on the searched task is what the first contender does there.
    assert len(list(tmp_path.glob("units/*/unit.json"))) == (2 + 2 + 2) + (6 - 1)
    (page,) = tmp_path.glob("accelerations/*/report.html")
    assert "held-out tasks" in page.read_text()
