"""Forks of trials: the branch that changes nothing is the trial itself, and a data set that is killed comes to the same
bytes."""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tipl_ray import jobs
from tipl_ray.accelerate.acceleration import source_experiment
from tipl_ray.accelerate.contenders import jump_question, jump_settings
from tipl_ray.accelerate.group_jumps import Jumps
from tipl_ray.accelerate.return_rule import ReturnRule, RuleNumbers
from tipl_ray.config import Collect, Contender, Experiment, Improve, Jump, Ppo, Where
from tipl_ray.experiments import load_experiment
from tipl_ray.improve import fork_data, forks, work
from tipl_ray.improve.fork_data import cell_folder, forks_digest, read_forks, run_and_publish, run_forks
from tipl_ray.improve.forks import Branches, Cell, branch_rules, cells, fork_iterations, run_cell
from tipl_ray.improve.gain_job import run_learning
from tipl_ray.ppo.trials import TrialGroup

ENGINE = "compiled" if shutil.which("g++") else "torch"
NUMBERS = (1.0, 0.5, 0.2, 0.0, 0.25, 0.25, 0.5)
REGIME = Contender(
    name="small",
    ppo={"num_epochs": 4},
    jump=Jump(predictor="return-rule", horizon=1, numbers=NUMBERS),
    values=(1e-3,),
)
SMALL = Experiment(
    name="small",
    ppo=Ppo(num_steps=128, num_minibatches=4),
    collect=Collect(num_trials=2, first_seed=5, total_env_steps=16 * 128, policy_hidden=(8, 8), engine="torch"),
    improve=Improve(tasks=("InvertedPendulum-v4",), regimes=(REGIME,), stages=2, pairs=2, iterations=4),
    where=Where(predictors_from="jobs/experiments/inverted_pendulum.toml"),
)
SOURCE = source_experiment(SMALL)
(CELL,) = cells(SMALL.improve)


@pytest.mark.parametrize("engine", ["torch", *({ENGINE} - {"torch"})])
def test_a_fork_under_the_jump_that_the_trial_itself_made_is_the_trial(engine: str) -> None:
    experiment = CELL.experiment(SMALL, SOURCE)
    settings, question = jump_settings(REGIME, SMALL, SOURCE), jump_question(REGIME, SMALL, SOURCE)
    rule = ReturnRule.of(question, RuleNumbers(*NUMBERS))
    trials = TrialGroup(experiment, engine, [5, 6], extension=Jumps(settings=settings, predictor=rule, digest=""))
    for _ in range(6):
        list(trials.run_iteration())
    states = [trials.state(6), trials.state(5), trials.state(6)]
    changed = RuleNumbers(*NUMBERS)._replace(first_begin=1.5, first_end=1.0)
    rules = {0: rule.numbers, 1: rule.numbers, 2: changed}
    branches = TrialGroup(experiment, engine, [0, 1, 2], list(states), Branches(question, settings, rules))
    for _ in range(5):
        snapshots = {one.snapshot: one for one in trials.run_iteration() if one.seed == 6}
        followed = [one for one in branches.run_iteration() if one.seed == 0]
        for one in followed:
            np.testing.assert_array_equal(one.weights, snapshots[one.snapshot].weights)
            assert one.episodic_return == snapshots[one.snapshot].episodic_return
    own, forked = trials.state(6), branches.state(0)
    assert set(own) == set(forked)
    for name, array in own.items():
        np.testing.assert_array_equal(array, forked[name], err_msg=name)
    assert not np.array_equal(branches.parameters_KN[0], branches.parameters_KN[2])


def test_a_cell_has_every_branch_with_what_was_known_and_what_followed() -> None:
    table = run_cell(CELL, SMALL, SOURCE, "torch").to_pandas()
    assert fork_iterations(16, SMALL.improve) == [1, 12]
    assert len(table) == 2 * 2 * (1 + 2 * 2)
    assert set(zip(table.seed, table.iteration, strict=True)) == {(5, 1), (6, 1), (5, 12), (6, 12)}
    for _, fork in table.groupby(["seed", "iteration"]):
        # What is known at a fork is known to all of its branches alike.
        for column in ("progress", "learning_rate", "log_std", "divergence", "surrogate"):
            assert fork[column].nunique() == 1
        grams = np.stack(fork.gram)
        assert (grams == grams[0]).all()
        assert grams.shape[1] == 20 * 20
        assert np.stack(fork.returns).shape == (5, 4)
        # The pairs lie opposite each other around the branch that changes nothing.
        for column in ("first", "last", "past"):
            base, *others = fork.sort_values("branch")[column]
            np.testing.assert_allclose(np.add(others[::2], others[1::2]), 2 * base)
            assert len(set(others)) == 4
    early, late = table[table.iteration == 1].iloc[0], table[table.iteration == 12].iloc[0]
    assert early.progress == pytest.approx((2 - 1 / 3) / 16)
    assert early["first"] == pytest.approx(1 - 0.5 * early.progress)
    assert late.learning_rate == pytest.approx(4 / 16)
    assert np.isfinite(late.returns_before).any()


def test_a_cell_is_named_after_its_jumps_and_after_what_their_predictors_see() -> None:
    jump = Jump(predictor="return-rule", horizon=1, numbers=NUMBERS, corrective_epochs=2)
    corrected = dataclasses.replace(REGIME, jump=jump)
    longer = dataclasses.replace(SOURCE, model=dataclasses.replace(SOURCE.model, context=SOURCE.model.context + 1))
    folders = {
        cell_folder(CELL, SMALL, SOURCE, "torch"),
        cell_folder(dataclasses.replace(CELL, regime=corrected), SMALL, SOURCE, "torch"),
        cell_folder(CELL, SMALL, longer, "torch"),
    }
    assert len(folders) == 3


def test_what_branches_change_depends_on_nothing_but_their_key() -> None:
    base = RuleNumbers(*NUMBERS)
    assert branch_rules(base, SMALL.improve, 1, 2, 3) == branch_rules(base, SMALL.improve, 1, 2, 3)
    assert branch_rules(base, SMALL.improve, 1, 2, 3) != branch_rules(base, SMALL.improve, 1, 2, 4)
    first, plus, minus, *_ = branch_rules(base, SMALL.improve, 1)
    assert first == base
    np.testing.assert_allclose(np.add(plus, minus), 2 * np.array(base))
    assert plus.decay == base.decay


@pytest.mark.usefixtures("cluster")
def test_the_job_makes_every_cell_and_what_was_killed_comes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "connected_to_ray", contextlib.nullcontext)
    regimes = (REGIME, dataclasses.replace(REGIME, name="other", values=(3e-4,)))
    improve = dataclasses.replace(SMALL.improve, regimes=regimes, stages=1, pairs=1)
    whole, killed = (dataclasses.replace(SMALL, improve=improve).at(str(tmp_path / name)) for name in ("a", "b"))
    run_forks(whole)
    said = capsys.readouterr().out
    assert f"12 branches, digest {forks_digest(whole, SOURCE, 'torch')}" in said
    # One cell is there, another was killed while it was written, and a third is damaged.
    first, second = cells(improve)
    run_and_publish(first, killed, SOURCE, "torch")
    broken = Path(cell_folder(second, killed, SOURCE, "torch"))
    shutil.copytree(cell_folder(second, whole, SOURCE, "torch"), broken)
    (broken / fork_data.FORKS_FILE).write_bytes(b"half a file")
    run_forks(killed)
    assert "is damaged, so this cell counts as not run" in capsys.readouterr().out
    assert forks_digest(killed, SOURCE, "torch") == forks_digest(whole, SOURCE, "torch")
    table = read_forks(whole, SOURCE, "torch")
    assert table.schema == forks.SCHEMA
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/forks/*/*")}
    run_forks(killed)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/forks/*/*")} == before


def test_the_shipped_forks_are_of_no_task_that_is_reported() -> None:
    experiment = load_experiment("improve").check("fork")
    reported = load_experiment("opponents").accelerate
    held_out = set(reported.tasks) - {task.partition("@")[0] for task in reported.search_tasks}
    assert held_out == {"Walker2d-v4", "Ant-v4", "InvertedPendulum-v4", "HalfCheetah-v4/256-256"}
    assert not held_out & {cell.task for cell in cells(experiment.improve)}
    assert isinstance(CELL, Cell)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": 16}, r"improve\.stages=16 forks do not fit before the last improve\.iterations=4 iterations"),
        ({"regimes": ()}, r"improve\.regimes is empty"),
        ({"regimes": (Contender(name="x", values=(1e-3,)),)}, "'x' needs a jump by return-rule with numbers"),
        ({"regimes": (dataclasses.replace(REGIME, values=()),)}, "'small' needs values for learning_rate"),
        (
            {"regimes": (dataclasses.replace(REGIME, jump=Jump(predictor="return-tipl-v1", horizon=1)),)},
            "'small' needs a jump by return-rule with numbers, or by a published rule",
        ),
        ({"regimes": (dataclasses.replace(REGIME, values=(0.0, 1e-3)),)}, r"values=\[0\.0, 0\.001\] must be above 0"),
        ({"spread": (0.5, 0.0, 0.5)}, r"improve\.spread"),
        (
            {"regimes": (dataclasses.replace(REGIME, values=(1e-3, 1e-4)),)},
            r"improve\.regimes: 'small': values=\[0\.001, 0\.0001\] must increase",
        ),
        (
            {"regimes": (dataclasses.replace(REGIME, ppo={"num_epochs": 4, "num_steps": 4096}),)},
            r"improve\.regimes: 'small': ppo\.num_steps=4096 is more than the 2048 environment steps of a trial",
        ),
        (
            {
                "regimes": (
                    dataclasses.replace(
                        REGIME, jump=Jump(predictor="return-rule", numbers=NUMBERS, corrective_epochs=4)
                    ),
                )
            },
            r"improve\.regimes: 'small': jump\.corrective_epochs leaves no epoch",
        ),
    ],
)
def test_forks_that_mean_nothing_are_refused_before_work(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, improve=dataclasses.replace(SMALL.improve, **changes)).check("fork")


def test_a_model_without_forks_to_learn_from_is_refused_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "connected", lambda experiment: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit):
        run_learning(SMALL.at(str(tmp_path)))
    refused = capsys.readouterr().err
    assert "the forks of InvertedPendulum-v4, small, learning_rate 0.001 are missing; run jobs/fork.py" in refused


def test_a_cell_is_named_by_what_its_branches_depend_on_alone() -> None:
    def folder(**fields: Any) -> str:
        changed = dataclasses.replace(SMALL, collect=dataclasses.replace(SMALL.collect, **fields))
        return cell_folder(CELL, changed, SOURCE, "torch")

    assert folder() == folder(engine="auto") == folder(iterations_per_commit=7)
    assert len({folder(), folder(num_trials=3), folder(first_seed=6), folder(total_env_steps=17 * 128)}) == 4
