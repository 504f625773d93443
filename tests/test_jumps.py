"""Jumps on real tiny trials: what they do to weights, and what they must not do to anything else."""

import dataclasses
import io
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tipl_ray import config
from tipl_ray.collection import GroupCollector, trial_header
from tipl_ray.config import Collect, Experiment, Jump, Ppo
from tipl_ray.forecasting import (
    COMBINATIONS,
    Combination,
    CopyLast,
    Linear,
    Ridge,
    Trial,
    Trials,
    WindowTipl,
    load_predictor,
    save_predictor,
)
from tipl_ray.gram import Contexts, GramBand, Question, make_band
from tipl_ray.jumps import GATED, REFUSED, TAKEN, History, ModuleJumps
from tipl_ray.model import WindowTransformer
from tipl_ray.ppo import TrialGroup
from tipl_ray.trajectory_store import TrajectoryStore

ENGINES = ["torch"] + (["compiled"] if shutil.which("g++") else [])
QUESTION = Question(context=10, steps=(1, 2, 3), snapshots_per_iteration=5)
FULL = Experiment(
    name="full",
    ppo=Ppo(num_steps=128, num_minibatches=4),
    collect=Collect(total_env_steps=7 * 128, policy_hidden=(8, 8)),
)
SHORT = dataclasses.replace(FULL, ppo=Ppo(num_steps=128, num_minibatches=4, num_epochs=4))


def run(experiment: Experiment, seeds: list[int], engine: str = "torch") -> dict[int, np.ndarray]:
    return weights_by_seed(TrialGroup(experiment, engine, seeds))


def weights_by_seed(group: TrialGroup) -> dict[int, np.ndarray]:
    found: dict[int, list[np.ndarray]] = {seed: [] for seed in group.seeds}
    for snapshot in group.initial_snapshots():
        found[snapshot.seed].append(snapshot.weights)
    while not group.finished:
        for snapshot in group.run_iteration():
            found[snapshot.seed].append(snapshot.weights)
    return {seed: np.stack(weights) for seed, weights in found.items()}


def band(weights_TP: np.ndarray) -> GramBand:
    return make_band(weights_TP, QUESTION.width, snapshots_per_iteration=5)


@pytest.fixture(scope="module")
def trajectories() -> list[np.ndarray]:
    return list(run(FULL, [1, 2, 3]).values())


@pytest.fixture(scope="module")
def predictors(trajectories: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder for every predictor that can drive a jump, fitted; TIPL's ridge gets a correction, as after training."""
    folders = {}
    data = Trials(bands=[band(weights_TP) for weights_TP in trajectories], weights=lambda: trajectories)
    for name, kind in COMBINATIONS.items():
        predictor = kind(QUESTION)
        predictor.fit(data, data)
        folders[name] = str(tmp_path_factory.mktemp(name))
        save_predictor(predictor, folders[name], {"trained_on": "InvertedPendulum-v4"})
    torch.manual_seed(0)
    model = WindowTransformer(config.Model(context=10, embedding=16, layers=1, heads=2, dropout=0.0), (1, 2, 3), 5)
    model.ridge_QHK.copy_(torch.from_numpy(load_predictor(folders["ridge"]).fitted["coefficients_QHK"]))
    folders["tipl"] = str(tmp_path_factory.mktemp("tipl"))
    model.save(folders["tipl"], {"basis": {"kind": "window"}})
    return folders


def jumping(folder: str, **settings: object) -> Experiment:
    return dataclasses.replace(SHORT, jump=Jump(predictor=folder, **settings))  # type: ignore[arg-type]


class Fixed(Combination):
    """Coefficients as given, whatever the context."""

    def __init__(self, value: float):
        super().__init__(QUESTION)
        self.value = value

    def coefficients(self, contexts: Contexts) -> np.ndarray:
        return np.full((len(contexts.phases_B), 3, 10), self.value)


def test_a_history_has_the_gram_matrix_of_the_trajectory_that_it_was_shown(trajectories: list[np.ndarray]) -> None:
    weights_TP = trajectories[0]
    history = History(weights_TP[0], 10)
    for weights_P in weights_TP[1:23]:
        history.record(weights_P)
        history.gram()
    expected_KK = band(weights_TP).windows(np.array([22]), 10, 0)[0]
    np.testing.assert_allclose(history.gram(), expected_KK, rtol=1e-5, atol=1e-6 * expected_KK.max())


def test_products_of_moves_are_those_of_the_displacements_that_they_make(trajectories: list[np.ndarray]) -> None:
    history, random = History(trajectories[0][0], 10), np.random.default_rng(0)
    weights_P = trajectories[0][0].copy()
    for iteration in range(4):
        for weights_P in trajectories[0][1 + 2 * iteration : 3 + 2 * iteration]:
            history.record(weights_P)
        history.gram()
        coefficients_HK = random.normal(size=(3, 10))
        moves_HP = history.moves(coefficients_HK)
        history.carry_on(coefficients_HK, moves_HP, weights_P + moves_HP.sum(axis=0))
    shown_KP = np.roll(history.displacements_KP, -history.oldest, axis=0).astype(np.float64)
    np.testing.assert_allclose(history.gram(), shown_KP @ shown_KP.T, rtol=1e-4, atol=1e-5 * history.gram().max())


@pytest.mark.parametrize("name", [*COMBINATIONS, "tipl"])
def test_a_modules_jump_is_the_predictors_own_forecast(
    name: str, predictors: dict[str, str], trajectories: list[np.ndarray]
) -> None:
    """With 10 epochs of real snapshots before: the start is a snapshot of phase 2, three steps ahead."""
    weights_TP, predictor = trajectories[1], load_predictor(predictors[name])
    module = nn.Linear(weights_TP.shape[1], 1, bias=False)
    jumps = ModuleJumps(module, predictor, Jump(limit=1e6))
    jumps._history = History(weights_TP[0], 10)
    for weights_P in weights_TP[1:18]:
        jumps._set_weights(weights_P)
        jumps.record()
    jumps.recorded = 2
    jumps.jump(progress=17 / (len(weights_TP) - 1), learning_rate=1.0)
    forecast_P = predictor.forecast(Trial(weights_TP=weights_TP, band=band(weights_TP)), np.array([17]))[0, 2]
    moved = np.abs(forecast_P - weights_TP[17]).max()
    np.testing.assert_allclose(jumps._weights(), forecast_P, atol=1e-4 * moved + 1e-7)


@pytest.mark.parametrize("engine", ENGINES[-1:])
def test_jumps_of_no_length_change_no_bit(engine: str, predictors: dict[str, str]) -> None:
    plain, jumped = run(SHORT, [1, 2], engine), run(jumping(predictors["copy-last"]), [1, 2], engine)
    for seed in (1, 2):
        real = np.arange(len(jumped[seed])) % 5
        np.testing.assert_array_equal(jumped[seed][(real == 1) | (real == 2)], np.delete(plain[seed], 0, axis=0))
        np.testing.assert_array_equal(jumped[seed][5::5], jumped[seed][2::5])


@pytest.mark.parametrize("name", ["ridge", "tipl"])
def test_a_jump_goes_where_the_coefficients_say_and_the_next_epochs_start_there(
    name: str, predictors: dict[str, str]
) -> None:
    weights_TP = run(jumping(predictors[name]), [1, 2])[1]
    assert len(weights_TP) == FULL.num_snapshots
    predictor = load_predictor(predictors[name])
    rates_T = np.r_[1.0, np.repeat(1.0 - np.arange(7) / 7, 5)]
    made = make_band(weights_TP, 20, snapshots_per_iteration=5, learning_rates_T=rates_T)
    starts_B = np.array([12, 17, 22, 27, 32])
    forecast_BHP = predictor.forecast(Trial(weights_TP=weights_TP, band=made), starts_B)
    np.testing.assert_allclose(weights_TP[starts_B[:, None] + np.arange(1, 4)], forecast_BHP, atol=1e-5)
    assert np.abs(forecast_BHP[:, 2] - weights_TP[starts_B]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "settings", "engine"),
    [
        ("tipl", {}, ENGINES[-1]),
        ("dmd", {"networks": "both"}, "torch"),
        ("ridge", {"gate": True, "moments": "reset"}, "torch"),
    ],
)
def test_a_trial_with_jumps_resumes_bit_for_bit_in_any_group(
    name: str, settings: dict, engine: str, predictors: dict[str, str]
) -> None:
    experiment = jumping(predictors[name], **settings)
    undisturbed = run(experiment, [1, 2, 3], engine)
    first = TrialGroup(experiment, engine, [1, 2])
    for _ in range(4):
        list(first.run_iteration())
    again = TrialGroup(experiment, engine, [9, 2], [None, first.state(2)])
    np.testing.assert_array_equal(weights_by_seed(again)[2], undisturbed[2][21:])


def test_a_collector_that_is_killed_between_commits_leaves_the_same_bytes(
    predictors: dict[str, str], tmp_path: Path
) -> None:
    experiment = jumping(predictors["ridge"])
    experiment = dataclasses.replace(
        experiment,
        collect=dataclasses.replace(experiment.collect, num_trials=2, iterations_per_commit=3),
        storage=str(tmp_path / "killed"),
    )
    killed = GroupCollector(experiment, "torch")
    killed.start([1, 2])
    for _ in range(4):
        killed._run_iteration()
    whole = dataclasses.replace(experiment, storage=str(tmp_path / "whole"))
    for one in (experiment, whole):
        collector = GroupCollector(one, "torch")
        collector.start([1, 2])
        collector.advance(1000.0)
    digests = [TrajectoryStore(one.storage_path).digest([1, 2]) for one in (experiment, whole)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "not finite"), (1e3, "beyond jump.limit"), (np.inf, "not finite")]
)
def test_a_forecast_that_is_absurd_is_refused_with_a_warning_and_training_goes_on(
    value: float, reason: str, predictors: dict[str, str]
) -> None:
    group = TrialGroup(jumping(predictors["ridge"]), "torch", [1, 2])
    assert group.jumps is not None
    group.jumps.forecaster = Fixed(value)
    with pytest.warns(RuntimeWarning, match=reason):
        refused = weights_by_seed(group)
    np.testing.assert_array_equal(refused[1], run(jumping(predictors["copy-last"]), [1, 2])[1])
    assert group.jumps.counts_B3.tolist() == [[0, 0, 7]] * 2


def test_the_gate_keeps_only_what_does_not_lower_the_surrogate(predictors: dict[str, str]) -> None:
    group = TrialGroup(jumping(predictors["linear"], gate=True, damping=-1.0, limit=1e6), "torch", [1, 2])
    assert group.jumps is not None
    before_and_after = []
    while not group.finished:
        for snapshot in group.run_iteration():
            if snapshot.seed == 2 and snapshot.epoch in (4, 10):
                before_and_after.append(group._surrogates(group.parameters_KN)[1])
    assert all(after >= before for before, after in zip(before_and_after[::2], before_and_after[1::2], strict=True))
    counts_3 = group.jumps.counts_B3.sum(axis=0)
    assert counts_3[GATED] > 0  # a step back along the last displacement
    assert counts_3[GATED] + counts_3[TAKEN] == 14
    assert counts_3[REFUSED] == 0


def test_the_critic_jumps_by_its_own_displacements_or_not_at_all(predictors: dict[str, str]) -> None:
    ends = {}
    for networks in ("policy", "both"):
        group = TrialGroup(jumping(predictors["ridge"], networks=networks), "torch", [1, 2])
        num_weights, seen = group.shape.num_policy_weights, []
        for _ in group.run_iteration():
            seen.append(group.parameters_KN[0].copy())
        ends[networks] = (seen[3][num_weights:], seen[-1][num_weights:])
    np.testing.assert_array_equal(*ends["policy"])
    assert np.abs(ends["both"][1] - ends["both"][0]).max() > 1e-4


def test_reset_moments_are_those_of_a_fresh_adam(predictors: dict[str, str]) -> None:
    group = TrialGroup(jumping(predictors["ridge"], moments="reset"), "torch", [1, 2])
    list(group.run_iteration())
    assert not group.adam_steps_K.any()
    assert not group.first_moments_KN.any()
    kept = TrialGroup(jumping(predictors["ridge"]), "torch", [1, 2])
    list(kept.run_iteration())
    assert kept.adam_steps_K.tolist() == [16, 16]


def test_what_a_predictor_answers_is_part_of_the_data_sets_hash_and_its_place_is_not(
    predictors: dict[str, str], tmp_path: Path
) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(predictors["ridge"], copied)
    ridge, moved, tipl = (
        trial_header(jumping(folder), "torch").config_hash
        for folder in (predictors["ridge"], str(copied), predictors["tipl"])
    )
    assert ridge == moved
    assert ridge != tipl
    assert "jump" not in trial_header(SHORT, "torch").config


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (dataclasses.replace(FULL, jump=Jump(predictor="ridge")), "5 snapshots of an iteration and jump.horizon=3"),
        (dataclasses.replace(SHORT, jump=Jump(predictor="ridge", horizon=2)), "jump.horizon=2 are not the 5 snapshots"),
        (dataclasses.replace(SHORT, jump=Jump(predictor="ridge", horizon=4)), "exceeds the predictor's forward steps"),
        (dataclasses.replace(SHORT, jump=Jump(predictor="nowhere")), "holds neither"),
    ],
)
def test_a_schedule_that_does_not_fit_the_predictor_is_refused(
    experiment: Experiment, message: str, predictors: dict[str, str]
) -> None:
    folder = predictors.get(str(experiment.jump.predictor), str(experiment.jump.predictor))
    experiment = dataclasses.replace(experiment, jump=dataclasses.replace(experiment.jump, predictor=folder))
    with pytest.raises(ValueError, match=message):
        TrialGroup(experiment, "torch", [1, 2])


def test_before_its_context_is_full_tipl_answers_as_its_ridge(predictors: dict[str, str]) -> None:
    tipl, ridge = load_predictor(predictors["tipl"]), load_predictor(predictors["ridge"])
    assert isinstance(tipl, WindowTipl)
    gram_KK = np.zeros((10, 10))
    gram_KK[-2:, -2:] = [[1.0, 0.3], [0.3, 2.0]]
    clocks = (np.array([2]), np.array([0.1]), np.array([0.9]))
    np.testing.assert_allclose(
        tipl.coefficients(Contexts(gram_KK[None], *clocks)),
        ridge.coefficients(Contexts(gram_KK[None], *clocks)),
        rtol=1e-6,
    )
    full = Contexts(np.eye(10)[None], *clocks)
    assert np.abs(tipl.coefficients(full) - ridge.coefficients(full)).max() > 1e-4


def train_a_little(module: nn.Module, optimizer: torch.optim.Optimizer, jumps: ModuleJumps, iterations: range) -> None:
    """Least squares on fixed numbers, two snapshots an iteration and a jump."""
    inputs = torch.linspace(-1, 1, 64).reshape(16, 4)
    for iteration in iterations:
        for _ in range(2):
            for _ in range(4):
                loss = (module(inputs) - inputs.sum(1, keepdim=True).sin()).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            jumps.record()
        jumps.jump(progress=iteration / 8)


def made(folder: str) -> tuple[nn.Module, torch.optim.Optimizer, ModuleJumps]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return module, torch.optim.Adam(module.parameters(), lr=1e-2), ModuleJumps(module, load_predictor(folder))


@pytest.mark.parametrize("name", ["ridge", "tipl"])
def test_a_users_loop_goes_on_bit_for_bit_from_its_state_dict(name: str, predictors: dict[str, str]) -> None:
    whole = made(predictors[name])
    train_a_little(*whole, range(8))
    first = made(predictors[name])
    train_a_little(*first, range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = made(predictors[name])
    for restore, state in zip(
        [part.load_state_dict for part in second], torch.load(file, weights_only=True), strict=True
    ):
        restore(state)
    train_a_little(*second, range(5, 8))
    for one, other in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert second[2].taken == 8


def test_weights_that_are_not_finite_are_refused_and_forgotten_once_they_are_gone() -> None:
    module = nn.Linear(6, 1)
    jumps = ModuleJumps(module, Linear(QUESTION))
    for iteration in range(8):
        with torch.no_grad():
            module.weight += 0.1
        jumps.record()
        if iteration == 1:
            torch.nn.init.constant_(module.bias, float("nan"))
        jumps.record()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            taken = jumps.jump(progress=iteration / 8)
        assert bool(caught) == (not taken)
        torch.nn.init.zeros_(module.bias)
    assert (jumps.taken, jumps.refused) == (5, 3)


def test_the_wrong_number_of_snapshots_is_refused_with_both_numbers() -> None:
    jumps = ModuleJumps(nn.Linear(2, 1), CopyLast(QUESTION))
    jumps.record()
    with pytest.raises(ValueError, match=r"1 snapshots of an iteration and jump.horizon=3 are not the 5 snapshots"):
        jumps.jump(progress=0.0)
    with pytest.raises(ValueError, match="exceeds the predictor's forward steps"):
        ModuleJumps(nn.Linear(2, 1), Ridge(QUESTION), Jump(horizon=4))
