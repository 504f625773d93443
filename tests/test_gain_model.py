"""TIPL for return: nothing at the start, a gain that it can see is found, one that it cannot see is not."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from test_forks import SMALL, SOURCE

from tipl_ray import config, jobs
from tipl_ray.accelerate.return_rule import ReturnRule, RuleNumbers
from tipl_ray.evaluate.metrics import Resampling
from tipl_ray.improve.fork_data import run_and_publish
from tipl_ray.improve.forks import SCHEMA, cells
from tipl_ray.improve.gain_job import CONSTANT, SIGHTS, STAGES, run_learning
from tipl_ray.improve.gain_model import FURTHEST, GainTransformer, Seen, Sight
from tipl_ray.improve.gain_training import (
    Forks,
    constant_gains,
    correlation,
    gain_loss,
    make_forks,
    predicted_gains,
    spearman,
    train_gain_model,
)
from tipl_ray.improve.return_tipl import ReturnTipl
from tipl_ray.predict.gram import Contexts, Question
from tipl_ray.predict.saved import load_predictor

CONTEXT = 6
SIZE = config.Model(context=CONTEXT, embedding=16, layers=1, heads=2, dropout=0.0)
ONE_EACH = {"validation_trials": 1, "test_trials": 1}
RESAMPLING = Resampling(confidence=0.95, bootstrap=50, seed=0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def seen(count: int, seed: int = 0) -> Seen:
    """Contexts of random displacements, in iterations of two and a jump."""
    random = np.random.default_rng(seed)
    moved_BKP = random.standard_normal((count, CONTEXT, 30))
    return Seen(
        grams_BKK=torch.from_numpy(moved_BKP @ moved_BKP.transpose(0, 2, 1)),
        recorded_B=torch.full((count,), 2),
        per_iteration_B=torch.full((count,), 3),
        progress_B=torch.from_numpy(random.random(count)),
        learning_rates_B=torch.from_numpy(random.random(count)),
        extras_BX=torch.zeros(count, 4),
    )


def synthetic(num_forks: int, gain: str, seed: int = 0) -> Forks:
    """Forks whose gain hangs on the cosine of the last two displacements, or on the progress, or on neither."""
    random, what = np.random.default_rng(seed), seen(num_forks, seed)
    grams = what.grams_BKK.numpy()
    cosines_F = grams[:, -1, -2] / np.sqrt(grams[:, -1, -1] * grams[:, -2, -2])
    wanted_F = {"trajectory": 4 * cosines_F, "progress": 2 * what.progress_B.numpy() - 1, "chance": 0 * cosines_F}[gain]
    forks = np.repeat(np.arange(num_forks), 8)
    changes_N3 = random.standard_normal((len(forks), 3))
    gains_N = (
        wanted_F[forks] * changes_N3[:, 0] - 0.3 * changes_N3[:, 0] ** 2 + 0.3 * random.standard_normal(len(forks))
    )
    return Forks(
        seen=what,
        fork_N=torch.from_numpy(forks),
        changes_NC=torch.from_numpy(changes_N3.astype(np.float32)),
        gains_N=torch.from_numpy((gains_N - gains_N.reshape(-1, 8).mean(axis=1).repeat(8)).astype(np.float32)),
        seeds_F=np.arange(num_forks) % 10,
        trials_F=np.arange(num_forks) % 10,
        stages_F=what.progress_B.numpy(),
    )


def trained(forks: Forks, sight: Sight) -> tuple[GainTransformer, np.ndarray]:
    training, validation, held_out = (forks.branches_of(seeds) for seeds in (range(7), (7,), (8, 9)))
    size = dataclasses.replace(SIZE, embedding=32)
    model = train_gain_model(
        forks, training, validation, size=size, sight=sight, num_steps=400, batch_size=128, learning_rate=3e-3
    )
    return model, held_out


def test_before_it_is_trained_it_changes_nothing() -> None:
    torch.manual_seed(0)
    model, what = GainTransformer(SIZE).eval(), seen(5)
    with torch.inference_mode():
        assert (model.best_change(what) == 0).all()
        assert (model.change_for(what, torch.ones(5)) == 0).all()
        assert (model(what, torch.zeros(5, 3)) == 0).all()


def test_neither_the_scale_of_weights_nor_their_number_is_seen() -> None:
    torch.manual_seed(0)
    model, what = GainTransformer(SIZE).eval(), seen(5)
    torch.nn.init.normal_(model.slope.weight)
    with torch.inference_mode():
        one, larger = (model.best_change(what._replace(grams_BKK=by * what.grams_BKK)) for by in (1.0, 1e6))
    torch.testing.assert_close(one, larger, rtol=1e-4, atol=1e-5)


def test_the_top_of_the_parabola_is_the_best_of_all_changes_within_the_limit() -> None:
    torch.manual_seed(1)
    model, what = GainTransformer(SIZE).eval(), seen(40)
    torch.nn.init.normal_(model.slope.weight, std=0.012)
    with torch.inference_mode():
        best_BC = model.best_change(what)
        inside = best_BC.abs().amax(dim=1) < 0.999 * FURTHEST
        assert 0 < inside.sum() < 40
        assert best_BC.abs().max() <= FURTHEST + 1e-6
        for direction in torch.eye(3):
            for step in (-0.1, 0.1):
                others = model(what, best_BC + step * direction)
                assert (others[inside] < model(what, best_BC)[inside]).all()


@pytest.mark.parametrize(
    ("gain", "sight", "sees"),
    [
        ("trajectory", Sight(), True),
        ("trajectory", Sight(trajectory=False), False),
        ("progress", Sight(trajectory=False), True),
        ("chance", Sight(), False),
    ],
)
def test_what_can_be_seen_is_found_and_what_cannot_is_not(gain: str, sight: Sight, sees: bool) -> None:
    """Against the best parabola that sees nothing, on forks of trials that neither was fitted on."""
    forks = synthetic(400, gain)
    model, held_out = trained(forks, sight)
    told = correlation(predicted_gains(model, forks, held_out), forks, held_out, RESAMPLING)
    training = forks.branches_of(range(7))
    nothing = correlation(constant_gains(forks, training, held_out), forks, held_out, RESAMPLING)
    if sees:
        assert told["low"] > nothing["high"] + 0.1
        asked, _, _ = forks.of(np.arange(0, len(forks.fork_N), 8))
        wanted = forks.seen.progress_B if gain == "progress" else None
        if wanted is not None:
            with torch.inference_mode():
                first_F = model.best_change(asked)[:, 0].numpy()
                asked_for_F = model.change_for(asked, torch.full((400,), 2.0))[:, 0].numpy()
            assert spearman(first_F, wanted.numpy()) > 0.8
            assert spearman(asked_for_F, wanted.numpy()) > 0.5
    else:
        assert told["spearman"] < nothing["high"] + 0.1


def row(branch: int, returns: list[float], change: float = 0.0, **fields: object) -> dict[str, object]:
    return {
        **{"task": "A", "regime": "r", "value": 1e-3, "seed": 1, "iteration": 3, "branch": branch, "epochs": 4},
        **{"recorded": 2, "per_iteration": 3, "first": 1.0 + change, "last": 0.0, "past": 0.25, "decay": 0.5},
        **{"progress": 0.3, "learning_rate": 0.7, "log_std": -0.1, "divergence": 0.01, "surrogate": 0.02},
        **{"gram": np.eye(CONTEXT).ravel().tolist(), "returns_before": [1.0, 2.0], "returns": returns},
        **fields,
    }


def test_gains_are_what_a_branch_returned_more_than_its_fork_and_tasks_count_alike() -> None:
    nan = float("nan")
    rows = [row(0, [nan, 2.0, nan]), row(1, [3.0, 3.0, 3.0], 0.5), row(2, [1.0, 1.0, 1.0], -0.5)]
    rows += [row(branch, [1000.0 * value], task="B") for branch, value in enumerate((2.0, 3.0, 1.0))]
    rows += [row(branch, [nan, nan], seed=2) for branch in range(3)]
    forks = make_forks(pa.Table.from_pylist(rows, schema=SCHEMA), (0.5, 0.5, 0.25), CONTEXT, (1,))
    assert len(forks.seeds_F) == 2
    expected = np.array([0.0, 1.0, -1.0]) / np.std([0.0, 1.0, -1.0])
    np.testing.assert_allclose(forks.gains_N.numpy(), [*expected, *expected], rtol=1e-6)
    np.testing.assert_allclose(forks.changes_NC.numpy()[:3, 0], [0.0, 1.0, -1.0])
    with pytest.raises(ValueError, match="no fork in which every branch has a return"):
        make_forks(pa.Table.from_pylist(rows[-3:], schema=SCHEMA), (0.5, 0.5, 0.25), CONTEXT, (1,))


def test_gains_are_scaled_by_the_trials_that_train_and_a_branch_that_diverges_is_the_worst() -> None:
    over = float("-inf")
    rows = [row(branch, [value]) for branch, value in enumerate((2.0, 3.0, 1.0))]
    rows += [row(branch, [10.0 * value], seed=2) for branch, value in enumerate((2.0, 3.0, 1.0))]
    rows += [row(0, [5.0, 5.0], seed=3), row(1, [20.0, over], seed=3), row(2, [over, over], seed=3)]
    forks = make_forks(pa.Table.from_pylist(rows, schema=SCHEMA), (0.5, 0.5, 0.25), CONTEXT, (1,))
    unit = np.std([0.0, 1.0, -1.0])
    np.testing.assert_allclose(forks.gains_N.numpy()[:3], np.array([0.0, 1.0, -1.0]) / unit, rtol=1e-6)
    np.testing.assert_allclose(forks.gains_N.numpy()[3:6], [0.0, 3.0, -3.0])  # clipped
    assert forks.gains_N.numpy()[6:].argmax() == 1  # (20 + 1) / 2 with the cell's lowest return
    assert forks.gains_N.numpy()[6:].argmin() == 2
    # Over before its first episode was, it has the lowest throughout; and where all are, none is better.
    early = [row(0, [2.0, 2.0]), row(1, [3.0, 3.0]), row(2, [float("nan"), over])]
    all_over = [row(branch, [over], task="B") for branch in range(3)]
    gains_N = make_forks(
        pa.Table.from_pylist([*early, *all_over], schema=SCHEMA), (0.5, 0.5, 0.25), CONTEXT, (1,)
    ).gains_N.numpy()
    np.testing.assert_allclose(gains_N[:3], np.array([-1.0, 2.0, -1.0]) / np.std([-1.0, 2.0, -1.0]), rtol=1e-6)
    np.testing.assert_array_equal(gains_N[3:], 0.0)


def test_a_training_shorter_than_the_validations_interval_is_judged_at_its_end() -> None:
    forks = synthetic(40, "progress")
    training, validation = forks.branches_of(range(7)), forks.branches_of((7, 8, 9))
    model = train_gain_model(
        forks, training, validation, size=SIZE, sight=Sight(), num_steps=20, batch_size=128, learning_rate=3e-3
    )
    # 0 for whatever it is asked, before it is trained.
    assert gain_loss(model, forks, validation) < float(forks.of(validation)[2].square().mean())


def test_the_best_change_is_the_top_of_the_true_parabola() -> None:
    """Gains are relative to their fork's mean, which lies below the top: curvature must not suffer from it."""
    random, num_forks = np.random.default_rng(3), 300
    halves_FP3 = random.standard_normal((num_forks, 4, 3))
    changes_N3 = np.concatenate([np.zeros((num_forks, 1, 3)), halves_FP3, -halves_FP3], axis=1).reshape(-1, 3)
    gains_FB = (0.5 * changes_N3[:, 0] - 0.5 * np.square(changes_N3).sum(axis=1)).reshape(num_forks, 9)
    forks = Forks(
        seen=seen(num_forks),
        fork_N=torch.from_numpy(np.repeat(np.arange(num_forks), 9)),
        changes_NC=torch.from_numpy(changes_N3.astype(np.float32)),
        gains_N=torch.from_numpy((gains_FB - gains_FB.mean(axis=1, keepdims=True)).ravel().astype(np.float32)),
        seeds_F=np.arange(num_forks) % 10,
        trials_F=np.arange(num_forks) % 10,
        stages_F=np.zeros(num_forks),
    )
    model, held_out = trained(forks, Sight(trajectory=False))
    with torch.inference_mode():
        best_BC = model.best_change(forks.of(held_out)[0])
    np.testing.assert_allclose(best_BC.mean(dim=0).numpy(), [0.5, 0.0, 0.0], atol=0.05)
    known = constant_gains(forks, forks.branches_of(range(7)), held_out)
    np.testing.assert_allclose(known, forks.gains_N.numpy()[held_out], atol=1e-5)


def test_a_model_is_the_same_in_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, what = GainTransformer(SIZE, Sight(extras=True)).eval(), seen(5)
    torch.nn.init.normal_(model.slope.weight)
    model.save(str(tmp_path))
    again = GainTransformer.load(str(tmp_path))
    assert again.sight == model.sight
    with torch.inference_mode():
        assert torch.equal(again.best_change(what), model.best_change(what))


@pytest.mark.usefixtures("cluster")
def test_the_job_trains_what_is_missing_and_its_predictor_changes_the_rule_of_the_forks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Forks of a real tiny task; the table has every model and stage, and the predictor is the rule and more."""
    monkeypatch.setattr(jobs, "connected_to_ray", contextlib.nullcontext)
    collect = dataclasses.replace(SMALL.collect, num_trials=3)
    improve = dataclasses.replace(SMALL.improve, stages=4, models=1, model_steps=50)
    experiment = dataclasses.replace(SMALL, collect=collect, improve=improve, split=config.Split(**ONE_EACH))
    experiment = dataclasses.replace(experiment, evaluate=config.Evaluate(bootstrap=20)).at(str(tmp_path))
    for cell in cells(improve):
        run_and_publish(cell, experiment, SOURCE, "torch")
    run_learning(experiment)
    said = capsys.readouterr().out
    assert "input: trajectory: Spearman" in said
    (table,) = tmp_path.glob("jumps/*/gains.csv")
    rows = pyarrow.csv.read_csv(table).to_pylist()
    assert {row["sees"] for row in rows} == {*SIGHTS, CONSTANT}
    assert {row["stage"] for row in rows} == set(STAGES)
    before = {path: path.stat().st_mtime_ns for path in table.parent.glob("*/model.safetensors")}
    assert len(before) == len(SIGHTS)
    run_learning(experiment)
    assert {path: path.stat().st_mtime_ns for path in table.parent.glob("*/model.safetensors")} == before
    assert pyarrow.csv.read_csv(table).to_pylist() == rows
    predictor = load_predictor(str(table.parent / "return-tipl"))
    assert isinstance(predictor, ReturnTipl)
    assert predictor.numbers == cells(improve)[0].base()


def test_a_predictor_for_return_is_the_rule_plus_the_top_of_the_models_parabola() -> None:
    torch.manual_seed(0)
    question = Question(context=CONTEXT, steps=(1,), snapshots_per_iteration=3)
    model, spread = GainTransformer(SIZE).eval(), (0.5, 0.4, 0.3)
    rule = ReturnRule.of(question, RuleNumbers(1.0, 0.5, 0.2, 0.2, 0.25, 0.25, 0.5), kl_limit=0.1)
    predictor = ReturnTipl.made_of(rule, model, spread)
    what = seen(4)
    contexts = Contexts(
        grams_BKK=what.grams_BKK.numpy(),
        phases_B=np.full(4, 2),
        progress_B=what.progress_B.numpy(),
        learning_rates_B=what.learning_rates_B.numpy(),
    )
    np.testing.assert_array_equal(predictor.coefficients(contexts), rule.coefficients(contexts))
    torch.nn.init.normal_(model.slope.weight, std=0.1)
    predictor = ReturnTipl.made_of(rule, model, spread)
    with torch.inference_mode():
        changes_BC = model.best_change(what).double().numpy()
    expected_B3 = rule.weights(contexts.progress_B) + changes_BC * spread
    np.testing.assert_allclose(predictor.coefficients(contexts)[:, 0], expected_B3 @ rule.terms(2), rtol=1e-6)
    # Where a displacement is 0, as before the context is full, the rule alone answers.
    still = contexts._replace(grams_BKK=contexts.grams_BKK * (np.arange(CONTEXT) > 0))
    np.testing.assert_array_equal(predictor.coefficients(still), rule.coefficients(still))
    with pytest.raises(ValueError, match="which a context does not contain"):
        ReturnTipl.made_of(rule, GainTransformer(SIZE, Sight(extras=True)), spread)
