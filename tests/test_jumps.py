"""Jumps on real tiny trials: what they do to weights, and what they must not do to anything else."""

import copy
import dataclasses
import io
import math
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tipl_ray import config
from tipl_ray.accelerate.group_jumps import GATED, REFUSED, TAKEN, GroupJumps, Jumps
from tipl_ray.accelerate.jumps import History, JumpSettings, ModuleJumps
from tipl_ray.accelerate.outer_steps import OuterSteps
from tipl_ray.collect.collection import pending_seeds
from tipl_ray.collect.group import GroupCollector, trial_header
from tipl_ray.config import Collect, Experiment, Ppo, Where
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.ppo.algorithms import NOTHING, Extension
from tipl_ray.ppo.trials import TrialGroup
from tipl_ray.predict.baselines import CopyLast, FirstAgain, Linear, Ridge
from tipl_ray.predict.gram import Contexts, GramBand, Question, make_band
from tipl_ray.predict.predictor import Combination, Trial, Trials
from tipl_ray.predict.saved import combinations, load_predictor, save_predictor
from tipl_ray.registry import PREDICTORS
from tipl_ray.window.predictor import WindowTipl
from tipl_ray.window.transformer import WindowTransformer

ENGINES = ["torch"] + (["compiled"] if shutil.which("g++") else [])
QUESTION = Question(context=10, steps=(1, 2, 3), snapshots_per_iteration=5)
FULL = Experiment(
    name="full",
    ppo=Ppo(num_steps=128, num_minibatches=4),
    collect=Collect(total_env_steps=7 * 128, policy_hidden=(8, 8)),
)
SHORT = dataclasses.replace(FULL, ppo=Ppo(num_steps=128, num_minibatches=4, num_epochs=4))


def run(
    experiment: Experiment, seeds: list[int], engine: str = "torch", extension: Extension = NOTHING
) -> dict[int, np.ndarray]:
    return weights_by_seed(TrialGroup(experiment, engine, seeds, extension=extension))


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
    for name, kind in [(name, PREDICTORS.load(name)) for name in combinations()]:
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


def jumps_by(folder: str, **settings: Any) -> Jumps:
    return Jumps.load(folder, JumpSettings(**settings))


def jumping(extension: Jumps, seeds: list[int]) -> tuple[TrialGroup, GroupJumps]:
    group = TrialGroup(SHORT, "torch", seeds, extension=extension)
    assert isinstance(group.hooks, GroupJumps)
    return group, group.hooks


class Fixed(Combination):
    """Coefficients as given, whatever the context."""

    def __init__(self, value: float):
        super().__init__(QUESTION)
        self.value = value

    def coefficients(self, contexts: Contexts) -> np.ndarray:
        return np.full((len(contexts.phases_B), 3, 10), self.value)


class Back(Linear):
    """Steps back along the last displacement."""

    def coefficients(self, contexts: Contexts) -> np.ndarray:
        return -super().coefficients(contexts)


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


@pytest.mark.parametrize("name", [*combinations(), "tipl"])
def test_a_modules_jump_is_the_predictors_own_forecast(
    name: str, predictors: dict[str, str], trajectories: list[np.ndarray]
) -> None:
    """With 10 epochs of real snapshots before: the start is a snapshot of phase 2, three steps ahead."""
    weights_TP, predictor = trajectories[1], load_predictor(predictors[name])
    module = nn.Linear(weights_TP.shape[1], 1, bias=False)
    jumps = ModuleJumps(module, predictor, JumpSettings(limit=1e6))
    jumps._history = History(weights_TP[0], 10)
    for weights_P in weights_TP[1:18]:
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(weights_P))
        jumps.record()
    jumps.recorded = 2
    jumps.jump(progress=17 / (len(weights_TP) - 1), learning_rate=1.0)
    forecast_P = predictor.forecast(Trial(weights_TP=weights_TP, band=band(weights_TP)), np.array([17]))[0, 2]
    moved = np.abs(forecast_P - weights_TP[17]).max()
    np.testing.assert_allclose(module.weight.detach().numpy()[0], forecast_P, atol=1e-4 * moved + 1e-7)


@pytest.mark.parametrize("engine", ENGINES[-1:])
def test_jumps_of_no_length_change_no_bit(engine: str, predictors: dict[str, str]) -> None:
    plain, jumped = (run(SHORT, [1, 2], engine, jumps) for jumps in (NOTHING, jumps_by(predictors["copy-last"])))
    for seed in (1, 2):
        real = np.arange(len(jumped[seed])) % 5
        np.testing.assert_array_equal(jumped[seed][(real == 1) | (real == 2)], np.delete(plain[seed], 0, axis=0))
        np.testing.assert_array_equal(jumped[seed][5::5], jumped[seed][2::5])


@pytest.mark.parametrize("name", ["ridge", "tipl"])
def test_a_jump_goes_where_the_coefficients_say_and_the_next_epochs_start_there(
    name: str, predictors: dict[str, str]
) -> None:
    weights_TP = run(SHORT, [1, 2], extension=jumps_by(predictors[name]))[1]
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
        ("first-again", {"corrective_epochs": 1}, ENGINES[-1]),
    ],
)
def test_a_trial_with_jumps_resumes_bit_for_bit_in_any_group(
    name: str, settings: dict, engine: str, predictors: dict[str, str]
) -> None:
    jumps = jumps_by(predictors[name], **settings)
    undisturbed = run(SHORT, [1, 2, 3], engine, jumps)
    first = TrialGroup(SHORT, engine, [1, 2], extension=jumps)
    for _ in range(4):
        list(first.run_iteration())
    again = TrialGroup(SHORT, engine, [9, 2], [None, first.state(2)], pickle.loads(pickle.dumps(jumps)))
    np.testing.assert_array_equal(weights_by_seed(again)[2], undisturbed[2][21:])


def test_a_collector_that_is_killed_between_commits_leaves_the_same_bytes(
    predictors: dict[str, str], tmp_path: Path
) -> None:
    jumps = jumps_by(predictors["ridge"])
    experiment = dataclasses.replace(
        SHORT,
        collect=dataclasses.replace(SHORT.collect, num_trials=2, iterations_per_commit=3),
        where=Where(storage=str(tmp_path / "killed")),
    )
    killed = GroupCollector(experiment, "torch", extension=jumps)
    killed.start([1, 2])
    for _ in range(4):
        killed._run_iteration()
    whole = experiment.at(str(tmp_path / "whole"))
    for one in (experiment, whole):
        GroupCollector(one, "torch", [1, 2], jumps).advance(1000.0)
        assert pending_seeds(one, TrajectoryStore(one.storage_path), jumps) == []
    digests = [TrajectoryStore(one.storage_path).digest([1, 2]) for one in (experiment, whole)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "not finite"), (1e3, "beyond the limit of"), (np.inf, "not finite")]
)
def test_a_forecast_that_is_absurd_is_refused_with_a_warning_and_training_goes_on(
    value: float, reason: str, predictors: dict[str, str]
) -> None:
    group, jumps = jumping(Jumps(settings=JumpSettings(), predictor=Fixed(value), digest=""), [1, 2])
    with pytest.warns(RuntimeWarning, match=reason):
        refused = weights_by_seed(group)
    still = run(SHORT, [1, 2], extension=jumps_by(predictors["copy-last"]))
    np.testing.assert_array_equal(refused[1], still[1])
    assert jumps.counts_K3.tolist() == [[0, 0, 7]] * 2


def test_the_gate_keeps_only_what_does_not_lower_the_surrogate() -> None:
    settings = JumpSettings(gate=True, limit=1e6)
    group, jumps = jumping(Jumps(settings=settings, predictor=Back(QUESTION), digest=""), [1, 2])
    before_and_after = []
    while not group.finished:
        for snapshot in group.run_iteration():
            if snapshot.seed == 2 and snapshot.epoch in (4, 10):
                before_and_after.append(group.surrogates(group.parameters_KN)[1])
    assert all(after >= before for before, after in zip(before_and_after[::2], before_and_after[1::2], strict=True))
    counts_3 = jumps.counts_K3.sum(axis=0)
    assert counts_3[GATED] > 0
    assert counts_3[GATED] + counts_3[TAKEN] == 14
    assert counts_3[REFUSED] == 0


def test_corrective_epochs_start_where_the_jump_led_and_end_the_iterations_path() -> None:
    """The next jump sees where they led: its displacements are those between the snapshots that were written."""
    settings = JumpSettings(corrective_epochs=1)
    group, hooks = jumping(Jumps(settings=settings, predictor=FirstAgain(QUESTION), digest=""), [1, 2])
    still, _ = jumping(Jumps(settings=JumpSettings(), predictor=FirstAgain(QUESTION), digest=""), [1, 2])
    seen = [one.weights for one in group.initial_snapshots() if one.seed == 1]
    seen += [one.weights for one in group.run_iteration() if one.seed == 1]
    jumped = [one.weights for one in still.run_iteration() if one.seed == 1]
    for mine, theirs in zip(seen[1:5], jumped[:4], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    moved = np.linalg.norm(seen[5] - jumped[4])
    assert 0 < moved < np.linalg.norm(jumped[4] - seen[0])
    assert group.gradient_steps_K.tolist() == [5 * 4] * 2
    history = hooks._histories[0][0]
    displacements_KP = np.diff(np.stack(seen), axis=0).astype(np.float64)
    np.testing.assert_allclose(history.gram()[-5:, -5:], displacements_KP @ displacements_KP.T, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(history.last_P, seen[5])


@pytest.mark.parametrize(
    ("rate", "momentum", "networks"), [(2.0, 0.0, "both"), (1.0, 0.5, "both"), (0.7, 0.9, "policy")]
)
def test_outer_steps_are_torchs_sgd_on_what_an_iteration_moved(
    rate: float, momentum: float, networks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.OuterStep(rate=rate, momentum=momentum, networks=networks)
    group = TrialGroup(SHORT, ENGINES[-1], [1, 2], extension=OuterSteps(settings=settings))
    size = group.shape.num_parameters if networks == "both" else group.shape.num_policy_weights
    outer_N = torch.tensor(group.parameters_KN[0, :size], requires_grad=True)
    optimizer = torch.optim.SGD([outer_N], lr=rate, momentum=momentum, nesterov=momentum > 0)
    move = group.hooks.move

    def checked(group: TrialGroup, rates_K: np.ndarray) -> Iterator[None]:
        inner_N = group.parameters_KN[0].copy()
        outer_N.grad = outer_N.detach() - torch.from_numpy(inner_N[:size])
        optimizer.step()
        yield from move(group, rates_K)
        np.testing.assert_allclose(group.parameters_KN[0, :size], outer_N.detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(group.parameters_KN[0, size:], inner_N[size:])

    monkeypatch.setattr(group.hooks, "move", checked)
    for _ in range(4):
        ran = [one for one in group.run_iteration() if one.seed == 1]
        assert len(ran) == 3
        np.testing.assert_array_equal(ran[-1].weights, group.parameters_KN[0, : group.shape.num_policy_weights])


def test_a_trial_with_outer_steps_resumes_bit_for_bit_in_any_group() -> None:
    outer = OuterSteps(settings=config.OuterStep(rate=1.5, momentum=0.5))
    undisturbed = run(SHORT, [1, 2, 3], ENGINES[-1], outer)
    first = TrialGroup(SHORT, ENGINES[-1], [1, 2], extension=outer)
    for _ in range(4):
        list(first.run_iteration())
    again = TrialGroup(SHORT, ENGINES[-1], [9, 2], [None, first.state(2)], pickle.loads(pickle.dumps(outer)))
    np.testing.assert_array_equal(weights_by_seed(again)[2], undisturbed[2][13:])


def test_the_critic_jumps_by_its_own_displacements_or_not_at_all(predictors: dict[str, str]) -> None:
    ends = {}
    for networks in ("policy", "both"):
        group, _ = jumping(jumps_by(predictors["ridge"], networks=networks), [1, 2])
        num_weights, seen = group.shape.num_policy_weights, []
        for _ in group.run_iteration():
            seen.append(group.parameters_KN[0].copy())
        ends[networks] = (seen[3][num_weights:], seen[-1][num_weights:])
    np.testing.assert_array_equal(*ends["policy"])
    assert np.abs(ends["both"][1] - ends["both"][0]).max() > 1e-4


def test_reset_moments_are_those_of_a_fresh_adam(predictors: dict[str, str]) -> None:
    group, _ = jumping(jumps_by(predictors["ridge"], moments="reset"), [1, 2])
    list(group.run_iteration())
    assert not group.adam_steps_K.any()
    assert not group.first_moments_KN.any()
    kept, _ = jumping(jumps_by(predictors["ridge"]), [1, 2])
    list(kept.run_iteration())
    assert kept.adam_steps_K.tolist() == [16, 16]


def test_what_a_predictor_answers_is_part_of_the_data_sets_hash_and_its_place_is_not(
    predictors: dict[str, str], tmp_path: Path
) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(predictors["ridge"], copied)
    ridge, moved, tipl = (
        trial_header(SHORT, "torch", jumps_by(folder)).config_hash
        for folder in (predictors["ridge"], str(copied), predictors["tipl"])
    )
    assert ridge == moved
    assert ridge != tipl
    assert "jump" not in trial_header(SHORT, "torch").config


@pytest.mark.parametrize(
    ("experiment", "horizon", "message"),
    [
        (FULL, 3, "5 recorded snapshots and horizon=3"),
        (SHORT, 2, "horizon=2 do not add up to the 5 snapshots"),
        (SHORT, 4, "exceeds the predictor's forward steps"),
    ],
)
def test_a_schedule_that_does_not_fit_the_predictor_is_refused(
    experiment: Experiment, horizon: int, message: str, predictors: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=message):
        TrialGroup(experiment, "torch", [1, 2], extension=jumps_by(predictors["ridge"], horizon=horizon))


def test_jumps_by_what_is_no_predictor_are_refused() -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder, and not a predictor"):
        jumps_by("nowhere")


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
    with pytest.raises(
        ValueError, match=r"record\(\) was called 1 times since the last jump, and jump\(\) expects 2: "
    ):
        jumps.jump(progress=0.0)
    with pytest.raises(ValueError, match="exceeds the predictor's forward steps"):
        ModuleJumps(nn.Linear(2, 1), Ridge(QUESTION), JumpSettings(horizon=4))


def jumped(module: nn.Module, jumps: ModuleJumps, step: complex = 0.01, names: str = "") -> bool:
    """Two snapshots and a jump of a module whose trained parameters of some name all move by one step at a time."""
    for _ in range(2):
        move(module, step, names)
        jumps.record()
    return jumps.jump(progress=0.1)


def move(module: nn.Module, step: complex = 0.01, names: str = "") -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and names in name:
                parameter.add_(step if parameter.is_complex() else step.real)


def bits(module: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer, to the bit."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()
    }


class One(nn.Module):
    """A module of one parameter."""

    def __init__(self, *shape: int, start: complex, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, start, dtype=dtype))


class Mixed(nn.Module):
    """What modules hold beside float32 weights that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128):
            name = str(dtype).replace("torch.", "of_")
            self.register_parameter(name, nn.Parameter(torch.full((3,), 1.1, dtype=dtype)))
        self.zeros = nn.Parameter(torch.tensor([-0.0, 0.0, -1e-42]))
        self.constant = nn.Parameter(torch.tensor([math.pi], dtype=torch.float64), requires_grad=False)
        self.masked = nn.Parameter(torch.tensor([math.nan, -math.inf]), requires_grad=False)
        self.counter = nn.Parameter(torch.tensor([2**40 + 1]), requires_grad=False)
        self.register_buffer("seen", torch.tensor([2**53 + 1]))


@pytest.mark.parametrize("recorded", [1, 2, 5])
def test_first_again_makes_the_iterations_first_displacement_once_more_after_any_number_of_epochs(
    recorded: int,
) -> None:
    module = nn.Linear(3, 2)
    jumps = ModuleJumps.from_pretrained(module, "first-again-v1", recorded=recorded)
    for iteration in range(3):
        moves = [0.1 * torch.randn(8) for _ in range(recorded)]
        for move in moves:
            shift(module, move)
            jumps.record()
        before = flat(module)
        # A context that is not full yet, and one that is.
        assert jumps.jump(progress=iteration / 3)
        torch.testing.assert_close(flat(module) - before, moves[0])


def shift(module: nn.Module, by: torch.Tensor) -> None:
    with torch.no_grad():
        nn.utils.vector_to_parameters(flat(module) + by, module.parameters())


def flat(module: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@pytest.mark.parametrize("name", ["layer.weight", "of_float64", "of_bfloat16", "of_complex64"])
def test_a_jump_changes_no_bit_of_what_nothing_has_moved(name: str) -> None:
    module = Mixed()
    before = bits(module)
    assert jumped(module, ModuleJumps(module, Linear(QUESTION)), names=name)
    after = bits(module)
    assert [key for key in before if after[key] != before[key]] == [name]


@pytest.mark.parametrize(
    ("dtype", "start", "step"),
    [
        (torch.float64, 1.0, 1e-12),
        (torch.float64, 2.0**30, 1e-3),
        (torch.float32, 1.0, 1e-3),
        (torch.bfloat16, 1.0, 2.0**-6),
        (torch.float16, 100.0, 0.5),
        (torch.complex64, 1.0 - 2.0j, 0.01 + 0.02j),
        (torch.complex128, 1.0j, 1e-12 - 3e-13j),
    ],
)
def test_every_parameter_moves_in_its_own_type(dtype: torch.dtype, start: complex, step: complex) -> None:
    module = One(5, 2, start=start, dtype=dtype)
    assert jumped(module, ModuleJumps(module, Linear(QUESTION)), step)
    assert module.weight.dtype == dtype
    torch.testing.assert_close(
        module.weight.detach() - start, torch.full((5, 2), 5 * step, dtype=dtype), rtol=2e-3, atol=0
    )


def first_weight(module: nn.Sequential) -> torch.Tensor:
    """Of the first layer as it is now."""
    layer = module[0]
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def replaced(module: nn.Sequential) -> None:
    module[0] = copy.deepcopy(module[0])


def assigned(module: nn.Sequential) -> None:
    module.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()}, assign=True)


def overwritten(module: nn.Sequential) -> None:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    module.double()
    torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.mark.parametrize(
    "change", [replaced, assigned, overwritten, nn.Module.double, nn.Module.half, nn.Module.bfloat16, torch.compile]
)
def test_what_is_trained_goes_on_under_its_name_whatever_becomes_of_its_object(change: Callable[[Any], Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    jumps = ModuleJumps(module, Linear(QUESTION))
    move(module, 0.25, "0.")
    jumps.record()
    change(module)
    before, last = bits(module), first_weight(module).clone()
    move(module, 0.25, "0.")
    jumps.record()
    assert jumps.jump(progress=0.1)
    after = bits(module)
    assert [name for name in before if after[name] != before[name]] == ["0.weight", "0.bias"]
    torch.testing.assert_close(first_weight(module), last + 1.0, rtol=0.02, atol=0)
    assert jumps.state_dict()["history"]["displacements"].shape == (10, 49)


def test_only_what_is_trained_now_is_kept_and_moved() -> None:
    module = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2), nn.Linear(2, 100))
    module[0].requires_grad_(False)
    jumps = ModuleJumps(module, Linear(QUESTION))
    kept = [jumps.state_dict()["history"]["displacements"].shape[1]]
    assert jumped(module, jumps)
    module[1].requires_grad_(False)
    before = bits(module)
    assert jumped(module, jumps)
    after = bits(module)
    assert [name for name in before if after[name] != before[name]] == ["2.weight", "2.bias"]
    kept.append(jumps.state_dict()["history"]["displacements"].shape[1])
    module[0].requires_grad_(True)
    jumps.record()
    last = first_weight(module).clone()
    move(module, 0.01)
    jumps.record()
    assert jumps.jump(progress=0.2)
    torch.testing.assert_close(first_weight(module), last + 0.04)
    kept.append(jumps.state_dict()["history"]["displacements"].shape[1])
    assert kept == [202 + 300, 300, 10_100 + 300]
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        jumps.record()


def test_a_tied_parameter_and_one_memory_under_two_names_move_once() -> None:
    layers = [nn.Linear(4, 4) for _ in range(3)]
    layers[1].weight, layers[2].weight = layers[0].weight, nn.Parameter(layers[0].weight.data)
    module = nn.Sequential(*layers)
    jumps, before = ModuleJumps(module, Linear(QUESTION)), first_weight(module).clone()
    for _ in range(2):
        move(module, 0.01, "0.weight")
        jumps.record()
    assert jumps.jump(progress=0.1)
    torch.testing.assert_close(layers[1].weight.detach(), before + 0.05)


def test_what_a_narrow_type_rounds_away_is_not_taken_for_a_displacement() -> None:
    module = One(6, start=1.0, dtype=torch.bfloat16)
    jumps = ModuleJumps(module, Linear(QUESTION), JumpSettings(damping=0.05))
    assert jumped(module, jumps, 2.0**-6)
    assert (module.weight == 1.0 + 2.0**-5).all(), "a seventh of a step is less than the type can hold"
    jumps.record()
    assert not jumps._history.displacements_KP[jumps._history.oldest - 1].any()


def test_a_jump_beyond_what_the_type_holds_is_refused() -> None:
    module = One(6, start=50_000.0, dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match="overflow their dtype"):
        assert not jumped(module, ModuleJumps(module, Linear(QUESTION)), 6_000.0)
    assert (module.weight - 62_000.0).abs().max() <= 32.0


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cuda" if torch.cuda.is_available() else "cpu")


def of_an_earlier_version(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in ("shapes", "answers")}


@pytest.mark.parametrize(
    "carried", [through_torch, copy.deepcopy, of_an_earlier_version, lambda state: pickle.loads(pickle.dumps(state))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_goes_on_to_the_bit_wherever_it_was_carried(
    carried: Callable[[dict[str, Any]], dict[str, Any]], dtype: torch.dtype
) -> None:
    module = nn.Linear(4, 3, dtype=dtype)
    jumps = ModuleJumps(module, Linear(QUESTION))
    jumped(module, jumps)
    move(module)
    jumps.record()
    other = copy.deepcopy(module)
    state = carried(jumps.state_dict())
    again = ModuleJumps(other, Linear(QUESTION))
    again.load_state_dict(state)
    whole = copy.deepcopy((module, jumps))
    for one, its in ((module, jumps), (other, again), whole):
        move(one)
        its.record()
        assert its.jump(progress=0.5)
    assert bits(module) == bits(other) == bits(whole[0])
    assert again.taken == 2


def test_a_state_of_other_parameters_is_refused_and_changes_nothing() -> None:
    state = ModuleJumps(nn.Linear(3, 2), Linear(QUESTION)).state_dict()
    jumps = ModuleJumps(nn.Linear(1, 4), Linear(QUESTION))
    with pytest.raises(ValueError, match=r"trained parameter 0 has shape \[2, 3\] in the state and \[4, 1\]"):
        jumps.load_state_dict(state)
    with pytest.raises(ValueError, match="the state has no 'history'"):
        jumps.load_state_dict({"recorded": 1, "taken": 0, "refused": 0})
    longer = Linear(dataclasses.replace(QUESTION, context=12))
    with pytest.raises(ValueError, match=r"the state's displacements have shape \(12, 8\)"):
        ModuleJumps(nn.Linear(3, 2), Linear(QUESTION)).load_state_dict(
            ModuleJumps(nn.Linear(3, 2), longer).state_dict()
        )
    assert jumps.recorded == 0


def test_a_state_of_another_predictor_is_refused(predictors: dict[str, str]) -> None:
    module = nn.Linear(3, 2)
    for saved, loaded in (
        (ModuleJumps(module, Linear(QUESTION)), ModuleJumps(module, CopyLast(QUESTION))),
        tuple(ModuleJumps.from_pretrained(module, predictors[name]) for name in ("ridge", "tipl")),
    ):
        with pytest.raises(ValueError, match="the state is of jumps by another predictor"):
            loaded.load_state_dict(saved.state_dict())
        loaded.load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("recorded", [0, -1, 2.0, True, "2"])
def test_a_number_of_snapshots_that_is_none_is_refused_by_name(recorded: Any, predictors: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"^recorded={recorded!r} is not a whole number from 1 on"):
        ModuleJumps.from_pretrained(nn.Linear(2, 1), recorded=recorded)
    with pytest.raises(ValueError, match=r"^recorded=5 leaves nothing to jump over: .* so at most 4$"):
        ModuleJumps.from_pretrained(nn.Linear(2, 1), predictors["ridge"], recorded=5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"moments": "reset"},
            "moments='reset' works only in this package's PPO; with ModuleJumps, reset your",
        ),
        ({"gate": True}, "gate=True works only in this package's PPO"),
        ({"networks": "both"}, "networks='both' works only in this package's PPO"),
        ({"corrective_epochs": 1}, r"with ModuleJumps, run them after jump\(\), and then record\(\)"),
        ({"corrective_epochs": -1}, "corrective_epochs=-1 is below 0"),
        ({"horizon": 0}, "horizon=0"),
        ({"damping": math.nan}, "damping=nan"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"limit": 0.0}, "limit=0.0"),
        ({"limit": math.inf}, "limit=inf"),
    ],
)
def test_settings_that_a_modules_jumps_do_not_follow_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModuleJumps(nn.Linear(2, 1), Linear(QUESTION), JumpSettings(**settings))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Tanh(), "nothing to train"),
        (nn.Linear(2, 1).requires_grad_(False), "nothing to train"),
        (nn.LazyLinear(2), "weight has no values yet"),
        (nn.Linear(2, 1, device="meta"), "weight has no values yet"),
    ],
)
def test_a_module_that_cannot_jump_is_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModuleJumps(module, Linear(QUESTION))


@pytest.mark.parametrize(
    ("progress", "learning_rate"),
    [(7, None), (-0.5, None), (math.nan, None), (0.5, math.nan), (0.5, math.inf), (1, -1.0)],
)
def test_shares_that_are_none_are_refused_before_anything_changes(progress: float, learning_rate: float | None) -> None:
    module = nn.Linear(2, 1)
    jumps = ModuleJumps(module, Linear(QUESTION))
    for _ in range(2):
        move(module)
        jumps.record()
    before = bits(module)
    with pytest.raises(ValueError, match=f"{'progress' if learning_rate is None else 'learning_rate'}="):
        jumps.jump(progress, learning_rate)
    assert bits(module) == before
    assert jumps.recorded == 2


def world() -> list[Any]:
    """What a library has to leave as it was."""
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        random.getstate(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    ]


@pytest.fixture
def default_dtype() -> Iterator[None]:
    """As control and physics people have it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["ridge", "tipl", "dmd"])
def test_loading_and_jumping_leave_the_users_world_as_it_was(name: str, predictors: dict[str, str]) -> None:
    before = world()
    predictor = load_predictor(predictors[name])
    assert world() == before
    module = nn.Linear(4, 1)
    before = world()
    assert jumped(module, ModuleJumps(module, predictor))
    assert world() == before


@pytest.mark.parametrize("name", ["ridge", "tipl"])
def test_a_predictor_answers_the_same_whatever_torchs_defaults(
    name: str, predictors: dict[str, str], default_dtype: None
) -> None:
    module = nn.Linear(4, 1)
    jumps = ModuleJumps(module, load_predictor(predictors[name]))
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            assert jumped(module, jumps)
    contexts = Contexts(np.eye(10)[None], np.array([2]), np.array([0.1]), np.array([0.9]))
    odd = load_predictor(predictors[name]).coefficients(contexts)
    torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        predictor = load_predictor(predictors[name])
    np.testing.assert_array_equal(odd, predictor.coefficients(contexts))
    np.testing.assert_array_equal(odd, load_predictor(predictors[name]).coefficients(contexts))
