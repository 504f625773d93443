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

from tipl_ray.accelerate import acceleration, contenders
from tipl_ray.accelerate.acceleration import (
    AccelerationError,
    find_predictors,
    run_acceleration,
    run_unit,
    source_experiment,
)
from tipl_ray.accelerate.contenders import Contender, Fitted, Unit, filled
from tipl_ray.collect.group import GroupCollector
from tipl_ray.config import Accelerate, Collect, Experiment, Ppo, Split, Where
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
            contenders=("10", "4+ridge", "4+tipl:gate"),
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
    monkeypatch.setattr(acceleration, "connected_to_ray", contextlib.nullcontext)
    run_acceleration(experiment)
    (folder,) = (storage / "accelerations").iterdir()
    rows = pyarrow.csv.read_csv(folder / "table.csv").to_pylist()
    assert [row["contender"] for row in rows] == ["10", "4+ridge", "4+tipl:gate"]
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
        assert row["learning_rate"] == max(chosen, key=lambda rate: chosen[rate])
    assert list(storage.glob("units/*/trajectories")) == []
    page = (folder / "report.html").read_text()
    assert page.count("of the gradient steps of") == 2
    assert page.count("data:image/png;base64,") == 3
    rates = pyarrow.csv.read_csv(folder / "search.csv").to_pylist()
    assert [row["learning_rate"] for row in rates if row["chosen"]] == [row["learning_rate"] for row in rows]
    assert len(rates) == len(searched)
    assert len(list((folder / "figures").glob("*.png"))) == 3
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


def test_a_unit_that_was_killed_goes_on_to_the_same_curves(experiment: Experiment, tmp_path: Path) -> None:
    named = [Contender.parse("4+ridge")]
    source = source_experiment(experiment)
    contenders.fit_and_save(source, 3, ["ridge"], f"{tmp_path}/predictors/1")
    folder = f"{tmp_path}/predictors/1/ridge"
    predictors = {"ridge": Fitted(predictor=load_predictor(folder), digest=predictor_digest(folder))}
    unit = Unit(task="InvertedPendulum-v4", env_steps=768, contender=named[0], learning_rate=1e-3, search=True)
    tables = []
    for name, killed_after in (("killed", 3), ("whole", 0)):
        jumps = unit.jumps(source, predictors)
        assert jumps is not None
        made = unit.experiment(experiment.at(str(tmp_path / name)), jumps)
        made = dataclasses.replace(made, collect=dataclasses.replace(made.collect, iterations_per_commit=2))
        if killed_after:
            killed = GroupCollector(made, "torch", extension=jumps)
            killed.start(made.collect.seeds)
            for _ in range(killed_after):
                killed._run_iteration()
        run_unit(made, "torch", jumps)
        tables.append(json.loads((Path(made.storage_path) / "unit.json").read_text()))
    assert tables[0]["returns"] == tables[1]["returns"]
    assert tables[0]["jump_counts"] == tables[1]["jump_counts"] == [12, 0, 0]


@pytest.mark.parametrize(("task", "rate"), [("InvertedPendulum-v4", 1e3), ("HalfCheetah-v4", 1e5)])
def test_a_unit_whose_trials_diverge_has_run_and_is_the_worst(
    experiment: Experiment, tmp_path: Path, task: str, rate: float
) -> None:
    plan = acceleration.Plan(
        experiment=experiment.at(str(tmp_path)),
        source=source_experiment(experiment),
        predictors={},
        engine="torch",
    )
    loaded = []
    for contender, learning_rate in (("10", rate), ("4", 1e-3)):
        unit = Unit(
            task=task,
            env_steps=1_280,
            contender=Contender.parse(contender),
            learning_rate=learning_rate,
            search=True,
        )
        for _ in range(2):
            run_unit(plan.of(unit), "torch")
        loaded.append(acceleration.load_unit(plan, unit))
    assert [one.num_diverged for one in loaded] == [2, 0]
    first, second = contenders.comparable(loaded)
    assert first.areas_S.max() <= second.areas_S.min()
    assert contenders.best_learning_rate(loaded) == 1e-3


def test_a_unit_without_the_end_of_an_episode_is_one_line(experiment: Experiment, tmp_path: Path) -> None:
    plan = acceleration.Plan(
        experiment=experiment.at(str(tmp_path)),
        source=source_experiment(experiment),
        predictors={},
        engine="torch",
    )
    ten = Contender.parse("10")
    unit = Unit(task="HalfCheetah-v4", env_steps=256, contender=ten, learning_rate=1e-3, search=True)
    run_unit(plan.of(unit), "torch")
    with pytest.raises(
        AccelerationError, match=r"contender '10': no episode of trial 10001 ended within 256 env steps"
    ):
        acceleration.load_unit(plan, unit)


@pytest.mark.parametrize("names", [["4+first-again"], ["10", "4+linear:gate,x0.5"], ["4+copy-last", "6+copy-last"]])
def test_rules_that_learn_nothing_need_no_trials(experiment: Experiment, tmp_path: Path, names: list[str]) -> None:
    mine = experiment.at(str(tmp_path / "mine"))
    source = source_experiment(experiment).at(str(tmp_path / "nothing"))
    named = [Contender.parse(name) for name in names]
    found = find_predictors(mine, source, named)
    assert set(found) == {one.predictor for one in named if one.predictor}
    for one in named:
        if one.predictor:
            question = found[one.predictor].predictor.question
            assert question.context == source.model.context
            assert len(question.steps) >= one.jump_settings(source).horizon
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(
        StoreError, match=r"contender '4\+ridge' learns from the 3 trials of source, the experiment of predictors_from"
    ):
        find_predictors(mine, source, [*named, Contender.parse("4+ridge")])


def test_a_source_without_its_model_says_what_to_run(experiment: Experiment, tmp_path: Path) -> None:
    other = source_experiment(experiment).at(str(tmp_path))
    collected(other)
    with pytest.raises(StoreError, match=r"no trained model of source is there; run jobs/train.py --preset causal"):
        find_predictors(experiment, other, [Contender.parse("4+tipl")])
