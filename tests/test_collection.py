"""Collection: groups and commits without Ray, and actors that are killed with it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from publications import dying_before

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from cluster import measure_driver
from tipl_ray.accelerate.contenders import unit_table
from tipl_ray.accelerate.group_jumps import Jumps
from tipl_ray.accelerate.jumps import JumpSettings
from tipl_ray.collect import crew
from tipl_ray.collect.collection import CollectionError, collect, pending_seeds
from tipl_ray.collect.crew import LOOK_SECONDS, MESSAGES_PER_SECOND, seat_resources
from tipl_ray.collect.group import GroupCollector, trial_header
from tipl_ray.collect.placement import GroupProgress
from tipl_ray.config import Contender, Experiment, Jump, Ppo, Where
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import digest
from tipl_ray.experiments import load_experiment
from tipl_ray.improve.forks import Cell
from tipl_ray.jobs import check_job
from tipl_ray.places import CHECKOUT
from tipl_ray.ppo.algorithms import NOTHING, State
from tipl_ray.ppo.engines import choose_engine
from tipl_ray.ppo.trials import TrialGroup
from tipl_ray.predict.baselines import FirstAgain
from tipl_ray.predict.gram import Question
from tipl_ray.train.data_sets import DataSet


def smoke(storage: Path, where: Where | None = None, **collect_fields: Any) -> Experiment:
    experiment = load_experiment(CHECKOUT / "jobs" / "experiments" / "smoke.toml")
    return dataclasses.replace(
        experiment,
        where=dataclasses.replace(where or Where(), storage=str(storage)),
        collect=dataclasses.replace(experiment.collect, **collect_fields),
    ).check()


ENGINE = choose_engine("auto", Ppo())
REGIME = Contender(name="any", ppo={"num_epochs": 2}, jump=Jump(predictor="first-again", horizon=1))


@pytest.mark.parametrize("groups", [[[1, 2, 3, 4]], [[4], [2, 1, 3]]])
def test_the_data_does_not_depend_on_the_groups(tmp_path: Path, groups: list[list[int]]) -> None:
    digests = []
    for name, parts in (("one by one", [[1], [2], [3], [4]]), ("grouped", groups)):
        experiment = smoke(tmp_path / name)
        for seeds in parts:
            collector = GroupCollector(experiment, choose_engine("auto", experiment.ppo), seeds)
            assert collector.advance(seconds=600).finished
        store = TrajectoryStore(experiment.storage_path)
        store.finish(experiment.collect.seeds, experiment.num_snapshots)
        digests.append(store.digest())
    assert digests[0] == digests[1]


def test_a_group_goes_on_from_commits_at_different_iterations(tmp_path: Path) -> None:
    """Trial 1 is two commits ahead of the others when the collector is dropped."""
    undisturbed, dropped = smoke(tmp_path / "undisturbed"), smoke(tmp_path / "dropped")
    engine = choose_engine("auto", undisturbed.ppo)
    GroupCollector(undisturbed, engine, [1, 2]).advance(seconds=600)
    early = GroupCollector(dropped, engine, [1])
    for _ in range(7):
        early._run_iteration()
    assert TrajectoryStore(dropped.storage_path).progress(1).num_snapshots == 1 + 6 * 5
    assert GroupCollector(dropped, engine, [1, 2]).advance(seconds=600).finished
    stores = [TrajectoryStore(experiment.storage_path) for experiment in (undisturbed, dropped)]
    assert stores[0].digest([1, 2]) == stores[1].digest([1, 2])


def test_of_two_collectors_on_one_storage_one_is_refused_and_the_other_makes_the_data_set(tmp_path: Path) -> None:
    alone, shared = smoke(tmp_path / "alone"), smoke(tmp_path / "shared")
    GroupCollector(alone, "torch", [1, 2]).advance(seconds=600)
    first, second = (GroupCollector(shared, "torch", [1, 2]) for _ in range(2))
    while TrajectoryStore(shared.storage_path).seeds() != (1, 2):
        first.advance(0.001)
    with pytest.raises(
        StoreError, match=r"trial=1/commit-1\.json: another process is writing trial 1 .*stop one of the two"
    ):
        second.advance(seconds=600)
    assert first.advance(seconds=600).finished
    stores = [TrajectoryStore(experiment.storage_path) for experiment in (alone, shared)]
    stores[1].verify_all([1, 2], shared.num_snapshots)
    assert stores[0].digest([1, 2]) == stores[1].digest([1, 2])


def test_what_was_altered_since_its_commit_is_found_when_its_group_ends(tmp_path: Path) -> None:
    experiment = smoke(tmp_path)
    early = GroupCollector(experiment, "torch", [1, 2])
    for _ in range(4):
        early._run_iteration()
    (part,) = Path(experiment.storage_path).glob("trajectories/trial=2/*.parquet")
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    with pytest.raises(StoreError, match=r"trial=2/part-.* is altered: its SHA-256 is not the one in commit 1"):
        GroupCollector(experiment, "torch", [1, 2]).advance(seconds=600)


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trials at their first commit, of which trial 2 cannot stay finite: its log-std is 100."""
    folder = tmp_path_factory.mktemp("doomed")
    collector = GroupCollector(smoke(folder), ENGINE, [1, 2, 3, 4])
    group = collector._group
    assert isinstance(group, TrialGroup)
    num_weights = group.shape.num_policy_weights
    healthy = group.state

    def state(seed: int) -> State:
        found = healthy(seed)
        if seed == 2:
            found["parameters_KN"][num_weights - 1] = 100.0
        return found

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(group, "state", state)
    for _ in range(3):
        collector._run_iteration()
    assert TrajectoryStore(str(folder)).progress(2).num_snapshots == 1 + 3 * 5
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """The data set but for its seal."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "_SUCCESS"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("groups", [[[1], [2], [3], [4]], [[4, 2], [3, 1]]])
def test_a_trial_that_diverges_ends_and_the_others_go_on_to_the_same_bytes(
    doomed: Path, tmp_path: Path, groups: list[list[int]]
) -> None:
    together, apart = tmp_path / "together", tmp_path / "apart"
    for folder, parts in ((together, [[1, 2, 3, 4]]), (apart, groups)):
        shutil.copytree(doomed, folder)
        for seeds in parts:
            progress = GroupCollector(smoke(folder), ENGINE, seeds).advance(seconds=600)
            assert progress.finished
            assert progress.diverged == ({2: 3} if 2 in seeds else {})
    assert files_of(together) == files_of(apart)
    experiment = smoke(together)
    store = TrajectoryStore(experiment.storage_path)
    assert pending_seeds(experiment, store) == []
    assert store.sound((1, 2, 3, 4)) == (1, 3, 4)
    assert str(store.divergences()[2]) == "trial 2 diverged after iteration 3"
    assert store.progress(2).num_snapshots == store.divergences()[2].snapshot + 1 < experiment.num_snapshots
    assert np.isfinite(store.trajectory(2).weights_TP).all()
    store.finish(experiment.collect.seeds, experiment.num_snapshots)
    assert json.loads((together / "commits" / "_SUCCESS").read_text())["diverged"] == [2]
    # Out of the part of the split that it was in, and no other trial moves for that.
    kept = DataSet(storage=str(together), seeds=experiment.collect.seeds, split=experiment.split).parts
    assert kept == ((1,), (3,), (4,))
    turned = DataSet(storage=str(together), seeds=(1, 3, 2, 4), split=experiment.split)
    with pytest.raises(StoreError, match=r"all 1 validation trials diverged; collect with a lower ppo\.learning"):
        _ = turned.parts
    undisturbed = smoke(tmp_path / "undisturbed")
    GroupCollector(undisturbed, ENGINE, [1, 3, 4]).advance(seconds=600)
    assert store.digest([1, 3, 4]) == TrajectoryStore(undisturbed.storage_path).digest([1, 3, 4])


def test_a_kill_before_the_record_of_a_divergence_or_after_it_changes_nothing(doomed: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(doomed, folder)
        GroupCollector(smoke(folder), ENGINE, [1, 2, 3, 4]).advance(seconds=600)
    (killed / "commits" / "trial=2" / "diverged.json").unlink()
    again = GroupCollector(smoke(killed), ENGINE, [2, 3])
    assert again.advance(seconds=600).finished
    assert files_of(killed) == files_of(whole)
    assert GroupCollector(smoke(killed), ENGINE, [1, 2]).advance(seconds=0).finished
    assert files_of(killed) == files_of(whole)


def test_what_was_finite_since_the_last_commit_is_kept_whenever_the_killing_comes(tmp_path: Path) -> None:
    """Diverges between two commits, so that the last good snapshots are committed with nothing to resume from."""
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        collector = GroupCollector(smoke(folder, iterations_per_commit=20), ENGINE, [1, 2])
        for iteration in range(4):
            if iteration == 2:
                group = collector._group
                assert isinstance(group, TrialGroup)
                group.parameters_KN[0, group.shape.num_policy_weights - 1] = 100.0
            collector._run_iteration()
    (record,) = folders[1].glob("commits/*/diverged.json")
    divergence = TrajectoryStore(str(folders[1])).divergences()[1]
    assert (divergence.iteration, divergence.snapshot >= 2 * 5) == (2, True)
    assert TrajectoryStore(str(folders[1])).progress(1).num_snapshots == divergence.snapshot + 1
    record.unlink()
    assert GroupCollector(smoke(folders[1], iterations_per_commit=20), ENGINE, [1]).advance(seconds=600).diverged
    assert files_of(folders[0]) == files_of(folders[1])


@pytest.mark.parametrize("task", ["InvertedPendulum-v4", "HalfCheetah-v4"])
def test_a_learning_rate_of_ten_ends_every_trial_and_leaves_finite_data(tmp_path: Path, task: str) -> None:
    experiment = smoke(tmp_path, num_trials=4)
    collect_settings = dataclasses.replace(experiment.collect, task=task)
    experiment = dataclasses.replace(
        experiment, collect=collect_settings, ppo=dataclasses.replace(experiment.ppo, learning_rate=1000.0)
    )
    progress = GroupCollector(experiment, ENGINE, [1, 2]).advance(seconds=600)
    assert progress.finished
    assert set(progress.diverged) == {1, 2}
    store = TrajectoryStore(experiment.storage_path)
    for seed in (1, 2):
        store.verify(seed, experiment.num_snapshots)


def test_a_record_of_a_divergence_that_does_not_fit_its_commits_is_damage(doomed: Path, tmp_path: Path) -> None:
    shutil.copytree(doomed, tmp_path / "d")
    experiment = smoke(tmp_path / "d")
    GroupCollector(experiment, ENGINE, [2]).advance(seconds=600)
    record = tmp_path / "d" / "commits" / "trial=2" / "diverged.json"
    before, store = json.loads(record.read_text()), TrajectoryStore(experiment.storage_path)
    for change in ({"snapshot": 7}, {"seed": 3}, {"config_hash": "0"}, {"array": 5}, {"more": 1}):
        record.write_text(json.dumps(before | change))
        for read in (store.divergences, lambda: store.progress(2), lambda: store.verify(2, experiment.num_snapshots)):
            with pytest.raises(StoreError, match=r"trial=2/diverged\.json: (is not a record|records that trial)"):
                read()


def reinforce(storage: Path) -> Experiment:
    """As examples/recipes/algorithm.py says, on the smallest trials."""
    experiment = smoke(storage, algorithm="examples.recipes.algorithm:Reinforce")
    collect_settings = dataclasses.replace(experiment.collect, epochs_per_snapshot=1)
    ppo = dataclasses.replace(experiment.ppo, num_epochs=1, learning_rate=0.1)
    return dataclasses.replace(experiment, collect=collect_settings, ppo=ppo).check("collect")


def test_an_algorithm_from_outside_collects_resumes_and_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    whole, killed = reinforce(tmp_path / "whole"), reinforce(tmp_path / "killed")
    GroupCollector(whole, ENGINE, [1, 2]).advance(seconds=600)
    early = GroupCollector(killed, ENGINE, [1, 2])
    for _ in range(4):
        early._run_iteration()
    for seed in (2, 1):
        assert GroupCollector(killed, ENGINE, [seed]).advance(seconds=600).finished
    stores = [TrajectoryStore(experiment.storage_path) for experiment in (whole, killed)]
    assert stores[0].digest([1, 2]) == stores[1].digest([1, 2])
    weights_TP = stores[0].trajectory(1).weights_TP
    assert len(weights_TP) == whole.num_snapshots == 9
    assert np.abs(np.diff(weights_TP, axis=0)).max(axis=1).min() > 1e-3
    assert stores[0].header([1]).config["algorithm"] == "examples.recipes.algorithm:Reinforce"
    by_ppo = dataclasses.replace(whole, collect=dataclasses.replace(whole.collect, algorithm="ppo"))
    with pytest.raises(StoreError, match="algorithm"):
        GroupCollector(by_ppo, ENGINE, [1])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pppo", "collect.algorithm='pppo' is not one of ppo, nor module:Name of your own; did you mean"),
        ("nowhere:Mine", "collect.algorithm='nowhere:Mine': no module 'nowhere'"),
        ("examples.recipes.algorithm:Mine", ": examples.recipes.algorithm has no 'Mine'"),
    ],
)
def test_an_algorithm_that_there_is_not_is_refused_before_work_starts(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    with pytest.raises(ValueError, match=re.escape(words)):
        check_job(smoke(tmp_path, algorithm=name))


def test_where_nobody_names_an_algorithm_headers_are_as_they_were(tmp_path: Path) -> None:
    config = trial_header(smoke(tmp_path), "torch").config
    assert "algorithm" not in config
    assert digest(config) == "8c5aefb121297edc"


@pytest.mark.parametrize(
    ("field", "name", "named"),
    [
        ("task", "task", "CentredPendulum"),
        ("task", "mountain", "MyMountain-v0"),
        ("algorithm", "algorithm", "Reinforce"),
    ],
)
def test_trials_of_someone_elses_file_are_not_continued_with_another_version_of_it(
    field: str, name: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"someones_{name}.py"
    file.write_text(MOUNTAIN if name == "mountain" else (CHECKOUT / f"examples/recipes/{name}.py").read_text())
    theirs: dict[str, Any] = {field: f"someones_{name}:{named}"}
    experiment = smoke(tmp_path, epochs_per_snapshot=1, **theirs)
    experiment = dataclasses.replace(experiment, ppo=dataclasses.replace(experiment.ppo, num_epochs=1))
    GroupCollector(experiment, "torch", [1]).advance(seconds=0.1, to_commit=True)
    GroupCollector(experiment, "torch", [1])
    cell = Cell(task=experiment.collect.task, regime=REGIME, value=1e-3)
    made_of, curves = cell.made_of(experiment, experiment, "torch"), unit_table(experiment, NOTHING)
    file.write_text(file.read_text() + "\n# changed\n")
    with pytest.raises(StoreError, match=rf"another configuration: config.source.{field}='\w+' there, '\w+' here"):
        GroupCollector(experiment, "torch", [1])
    assert cell.made_of(experiment, experiment, "torch") != made_of
    assert unit_table(experiment, NOTHING) != curves


MOUNTAIN = """
import gymnasium
from gymnasium.envs.classic_control import Continuous_MountainCarEnv


class Mountain(Continuous_MountainCarEnv):
    pass


gymnasium.register("MyMountain-v0", entry_point=Mountain, max_episode_steps=100)
"""


def test_the_engine_is_no_part_of_a_name_but_as_what_runs(tmp_path: Path) -> None:
    automatic, named = smoke(tmp_path, engine="auto"), smoke(tmp_path, engine="torch")
    assert unit_table(automatic, NOTHING) == unit_table(named, NOTHING)
    cell = Cell(task="HalfCheetah-v4", regime=REGIME, value=1e-3)
    assert cell.made_of(automatic, automatic, "torch") == cell.made_of(named, named, "torch")


def test_progress_counts_what_was_run_before(tmp_path: Path) -> None:
    experiment = smoke(tmp_path)
    collector = GroupCollector(experiment, "torch", [1, 2])
    progress = collector.advance(seconds=0)
    assert (progress.env_steps, progress.total_env_steps, progress.finished) == (0, 2 * 2048, False)
    for _ in range(3):
        collector._run_iteration()
    again = GroupCollector(experiment, "torch", [1, 2]).advance(seconds=0)
    assert again.env_steps == 2 * 3 * 256


FAR = ("predict", "paper", "window", "train", "evaluate", "sweep", "accelerate")
"""Wings of the package that learn from trials or judge what has learned."""

COLLECTING = """
import contextlib, sys
from tipl_ray.command_line import parse_arguments
experiment = parse_arguments("Collect.", sys.argv[1:], jobs=["collect"])
from tipl_ray.stages import STAGES, Context
with contextlib.ExitStack() as until_the_end:
    assert not STAGES["collect"].check(Context(experiment, until_the_end))
    from tipl_ray.collect.group import GroupCollector
    GroupCollector(experiment, "torch", experiment.collect.seeds).advance(seconds=600)
print("loaded", *sys.modules)
"""


def loaded_from_afar(modules: Iterable[str]) -> set[str]:
    return {module for module in modules if module.startswith(tuple(f"tipl_ray.{wing}" for wing in FAR))}


def test_a_collection_loads_no_predictor_and_no_transformer(tmp_path: Path) -> None:
    """What jobs/collect.py loads to refuse and to run, and a group of trials that it runs to the end."""
    command = [sys.executable, "-c", COLLECTING, "--experiment", "smoke", "--storage", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    loaded = ran.stdout.splitlines()[-1].split()
    assert "tipl_ray.ppo.trials" in loaded
    # The stages know by data_sets what a model is called, and by the interface what it depends on: neither learns.
    known = {"train", "train.data_sets", "predict", "predict.gram", "predict.representation"}
    known |= {"predict.bands", "predict.model_files"}
    assert loaded_from_afar(loaded) <= {f"tipl_ray.{module}" for module in known}


def test_an_actor_loads_no_predictor_and_no_transformer(cluster: None, tmp_path: Path) -> None:
    actor: Any = ray.remote(num_cpus=1)(GroupCollector).remote(smoke(tmp_path), "torch", [1, 2])
    ray.get(actor.advance.remote(0.1))
    loaded = ray.get(actor.__ray_call__.remote(lambda collector: list(sys.modules)))
    ray.kill(actor)
    assert "tipl_ray.ppo.trials" in loaded
    assert loaded_from_afar(loaded) == set()


def test_jumps_that_are_handed_in_reach_the_actors(cluster: None, tmp_path: Path) -> None:
    rule = FirstAgain(Question(context=8, steps=(1, 2, 3), snapshots_per_iteration=5))
    jumps = Jumps(settings=JumpSettings(), predictor=rule, digest="of a rule")
    experiment = smoke(tmp_path / "actors", num_trials=3, total_env_steps=1024)
    experiment = dataclasses.replace(experiment, ppo=dataclasses.replace(experiment.ppo, num_epochs=4))
    alone = experiment.at(str(tmp_path / "alone"))
    GroupCollector(alone, ENGINE, [1, 2, 3], jumps).advance(seconds=600)
    store = collect(experiment, extension=jumps)
    assert store.finished()
    assert store.digest() == TrajectoryStore(alone.storage_path).digest([1, 2, 3])
    assert store.header().config["jump"]["predictor"] == "of a rule"
    assert len(store.trajectory(1).weights_TP) == 1 + 4 * 5


def test_killed_actors_are_restarted_and_the_data_is_the_same(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, disturbed = (smoke(tmp_path / name, total_env_steps=10_240) for name in ("undisturbed", "disturbed"))
    expected = collect(undisturbed).digest()
    calls, deaths = (1, 12, 31), tmp_path / "deaths"
    deaths.mkdir()
    monkeypatch.setattr(crew, "GroupCollector", dying_before(calls, deaths))
    seen: list[list[GroupProgress]] = []
    store = collect(disturbed, seen.append)
    assert {path.name for path in deaths.iterdir()} == {str(number) for number in calls}
    assert store.digest() == expected
    assert pending_seeds(disturbed, store) == []
    assert sum(group.env_steps for group in seen[-1]) == 4 * 10_240


def test_a_collection_whose_trials_all_diverge_ends_in_one_line_each_time(cluster: None, tmp_path: Path) -> None:
    experiment = smoke(tmp_path)
    experiment = dataclasses.replace(experiment, ppo=dataclasses.replace(experiment.ppo, learning_rate=1000.0))
    for _ in range(2):
        with pytest.raises(CollectionError, match=r"all 4 trials diverged, .*; lower ppo\.learning_rate=1000 and"):
            collect(experiment)
    assert not TrajectoryStore(experiment.storage_path).finished()


@pytest.mark.parametrize("groups", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_groups_are_driven_over_real_calls(cluster: None, groups: int) -> None:
    crew, seconds_per_message, seconds_per_look = measure_driver(groups, slices=1)
    # One that the actor is there, one that it has started, one of progress, which told of a commit.
    assert (crew.messages, crew.commits) == (groups * 3, groups)
    assert seconds_per_message < 1 / MESSAGES_PER_SECOND
    assert seconds_per_look < LOOK_SECONDS


def test_trials_on_gpus_are_refused_where_there_is_none(cluster: None, tmp_path: Path) -> None:
    experiment = smoke(tmp_path, Where(physics_threads=2))
    experiment = dataclasses.replace(experiment, collect=dataclasses.replace(experiment.collect, engine="cuda"))
    assert seat_resources(experiment, "cuda") == {"CPU": 2, "GPU": 1}
    assert seat_resources(experiment, "torch") == {"CPU": 2}
    with pytest.raises(ValueError, match=r"collect\.engine='cuda' needs a GPU per actor, but no node"):
        collect(experiment)
