import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from machine import modules_after
from trajectories import write_trials

from tipl_ray import config
from tipl_ray.data.storage import publish
from tipl_ray.paper import temporal_svd
from tipl_ray.paper.representation import TrialTokens
from tipl_ray.paper.segments import Segments
from tipl_ray.paper.temporal_svd import fit_basis
from tipl_ray.paper.tokens import Tokens, tokens_of
from tipl_ray.paper.transformer import Normaliser
from tipl_ray.predict.bands import load_band
from tipl_ray.predict.gram import Question, banded_products, make_band, moved_squares
from tipl_ray.predict.objective import draw_windows
from tipl_ray.window.augmentation import periodic_grams, side_by_side
from tipl_ray.window.windows import WindowSegments

BASIS = config.Basis(rank=4)
QUESTION = Question(context=4, steps=(1, 3), snapshots_per_iteration=5)


def trajectory(seed: int, num_snapshots: int = 15, num_weights: int = 11) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((num_snapshots, num_weights)).cumsum(axis=0).astype(np.float32)


def moved(weights_TP: np.ndarray) -> np.ndarray:
    return moved_squares(banded_products(weights_TP, 3), 3)


def tokens(seeds: range, num_snapshots: int = 15) -> Tokens:
    trajectories = {seed: trajectory(seed, num_snapshots) for seed in seeds}
    return Tokens.stack([tokens_of(seed, w_TP, fit_basis(w_TP, 4), moved(w_TP)) for seed, w_TP in trajectories.items()])


def test_windows_are_the_tokens_of_neighbouring_snapshots_and_targets_the_next():
    two = tokens(range(2))
    segments = Segments(two, Normaliser.fit(two.coordinates_NTD), context=5)
    assert segments.num_windows == 2 * (15 - 5)
    normalised_NTD = Normaliser.fit(two.coordinates_NTD).normalise(two.coordinates_NTD)
    batch = segments.gather(np.arange(20))
    for window in range(20):
        trial, first = divmod(window, 10)
        assert batch.snapshots_BK[window].tolist() == list(range(first, first + 5))
        np.testing.assert_array_equal(batch.tokens_BKD[window], normalised_NTD[trial, first : first + 5])
        np.testing.assert_array_equal(batch.targets_BKD[window], normalised_NTD[trial, first + 1 : first + 6])


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_share_out_the_same_global_batch_whatever_their_number(num_workers):
    two = tokens(range(2))
    segments = Segments(two, Normaliser.fit(two.coordinates_NTD), context=5)
    for step in (0, 1, 1000):
        alone = segments.gather(draw_windows(segments.num_windows, step, 8, 3))
        shares = [
            segments.gather(draw_windows(segments.num_windows, step, 8, 3, rank, num_workers))
            for rank in range(num_workers)
        ]
        for one, many in zip(alone, zip(*shares, strict=True), strict=True):
            assert torch.equal(torch.stack(many, dim=1).flatten(0, 1), one)


def test_batches_depend_on_step_and_seed_and_on_nothing_else():
    draw = draw_windows(1000, step=7, batch_size=64, seed=1)
    np.testing.assert_array_equal(draw, draw_windows(1000, step=7, batch_size=64, seed=1))
    assert (draw != draw_windows(1000, step=8, batch_size=64, seed=1)).any()
    assert (draw != draw_windows(1000, step=7, batch_size=64, seed=2)).any()


def test_windows_are_drawn_as_often_as_their_chances_say():
    chances = np.array([0.5, 0.1, 0.0, 0.4])
    draws = np.concatenate([draw_windows(chances.cumsum(), step, 100, seed=0) for step in range(100)])
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 10_000, chances, atol=0.02)


def test_every_window_is_drawn_about_as_often():
    draws = np.concatenate([draw_windows(10, step, 100, seed=0) for step in range(100)])
    np.testing.assert_allclose(np.bincount(draws, minlength=10), 1000, rtol=0.15)


def test_squared_errors_are_those_of_the_decoded_weights():
    weights_TP = trajectory(5)
    fitted = fit_basis(weights_TP, 4)
    one = tokens_of(5, weights_TP, fitted, moved(weights_TP))
    starts_B, steps_H = np.arange(5, 12), (1, 3)
    future_BHP = weights_TP[starts_B[:, None] + np.array(steps_H)]
    forecast_BHD = np.random.default_rng(0).standard_normal((7, 2, fitted.rank))
    whole_BHP = fitted.decode(forecast_BHD.reshape(14, -1)).reshape(7, 2, -1)
    # The last snapshot, and how its token changes.
    last_B1P = (weights_TP - fitted.decode(fitted.coordinates_TD))[starts_B][:, None]
    for changes, forecast_BHP in ((False, whole_BHP), (True, last_B1P + whole_BHP)):
        found_BH = one.squared_errors(0, forecast_BHD, starts_B, steps_H, changes=changes)
        np.testing.assert_allclose(found_BH, np.square(forecast_BHP - future_BHP).sum(axis=2), rtol=1e-4)


def test_a_window_ends_where_its_last_token_stands():
    one = tokens(range(2))
    segments = Segments(one, Normaliser.fit(one.coordinates_NTD), context=5)
    trials_B, ends_B = segments.ends(np.arange(segments.num_windows))
    batch = segments.gather(np.arange(segments.num_windows))
    np.testing.assert_array_equal(ends_B, batch.snapshots_BK[:, -1])
    np.testing.assert_array_equal(np.bincount(trials_B), [10, 10])


def test_tokens_come_from_the_store_one_basis_per_trial(tmp_path: Path):
    trajectories = {seed: trajectory(seed) for seed in (3, 4, 5)}
    write_trials(tmp_path, trajectories)
    trial_tokens = TrialTokens(BASIS)
    loaded = trial_tokens.gather([[trial_tokens.read(str(tmp_path), seed, QUESTION) for seed in (3, 5)]])
    assert loaded.seeds == (3, 5)
    for index, seed in enumerate(loaded.seeds):
        fitted = fit_basis(trajectories[seed], 4)
        np.testing.assert_array_equal(loaded.coordinates_NTD[index], fitted.coordinates_TD)
        np.testing.assert_array_equal(loaded.singular_values_ND[index], fitted.singular_values_D)


def test_trials_of_different_length_are_refused_by_name(tmp_path: Path):
    write_trials(tmp_path, {3: trajectory(3), 4: trajectory(4, num_snapshots=12)})
    trial_tokens = TrialTokens(BASIS)
    read = [trial_tokens.read(str(tmp_path), seed, QUESTION) for seed in (3, 4)]
    with pytest.raises(ValueError, match="trial 3: 15 x 4, trial 4: 12 x 4"):
        trial_tokens.gather([read])


def test_rank_beyond_a_trial_is_refused_with_its_seed(tmp_path: Path):
    write_trials(tmp_path, {3: trajectory(3)})
    with pytest.raises(ValueError, match=r"trial 3: basis\.rank=12 is not between 1 and 11"):
        TrialTokens(config.Basis(rank=12)).read(str(tmp_path), 3, QUESTION)


def test_context_as_long_as_the_trajectory_is_refused():
    one = tokens(range(1))
    with pytest.raises(ValueError, match=r"model\.context=15 leaves no window"):
        Segments(one, Normaliser.fit(one.coordinates_NTD), context=15)


def window_segments(num_trials: int = 2) -> WindowSegments:
    bands = [make_band(trajectory(seed), QUESTION.width, snapshots_per_iteration=5) for seed in range(num_trials)]
    return WindowSegments(bands, QUESTION)


def test_windows_of_displacements_are_parts_of_the_gram_matrix_in_units_of_the_context():
    segments = window_segments()
    assert segments.num_windows == 2 * (15 - 7)
    batch = segments.gather(np.arange(segments.num_windows))
    for window in range(segments.num_windows):
        seed, first = divmod(window, 8)
        displacements_MP = np.diff(trajectory(seed)[first : first + 8].astype(np.float64), axis=0)
        gram_MM = displacements_MP @ displacements_MP.T
        scale = np.trace(gram_MM[:4, :4]) / 4
        assert batch.scales_B[window].item() == pytest.approx(scale)
        np.testing.assert_allclose(batch.grams_BKK[window], gram_MM[:4, :4] / scale, rtol=1e-5, atol=1e-6)
        for index, step in enumerate(QUESTION.steps):
            towards_K = gram_MM[:4, 4 : 4 + step].sum(axis=1)
            np.testing.assert_allclose(batch.towards_BHK[window, index], towards_K / scale, rtol=1e-5, atol=1e-5)
            moved = gram_MM[4 : 4 + step, 4 : 4 + step].sum()
            assert batch.moved_BH[window, index].item() == pytest.approx(moved / scale, rel=1e-5)
        assert batch.phases_B[window].item() == (first + 4) % 5
        assert batch.progress_B[window].item() == pytest.approx((first + 4) / 14)


def test_what_a_model_is_told_of_a_window_is_the_same_in_training_and_in_a_forecast():
    batch = window_segments(1).gather(np.arange(8))
    contexts = make_band(trajectory(0), 7, snapshots_per_iteration=5).contexts(np.arange(4, 12), 4)
    np.testing.assert_array_equal(batch.phases_B, contexts.phases_B)
    np.testing.assert_allclose(batch.progress_B, contexts.progress_B, rtol=1e-6)
    np.testing.assert_allclose(batch.learning_rates_B, contexts.learning_rates_B, rtol=1e-6)
    grams_BKK = batch.grams_BKK.double() * batch.scales_B[:, None, None]
    np.testing.assert_allclose(grams_BKK, contexts.grams_BKK, rtol=1e-5, atol=1e-4)


def whole_grams(batch) -> torch.Tensor:
    """Gram matrices of a context's displacements and of the true displacement at each forward step; (B, K + H, .)."""
    size, context = batch.grams_BKK.shape[:2]
    rows = []
    for step in range(len(QUESTION.steps)):
        whole = torch.zeros(size, context + 1, context + 1)
        whole[:, :context, :context] = batch.grams_BKK
        whole[:, context, :context] = whole[:, :context, context] = batch.towards_BHK[:, step]
        whole[:, context, context] = batch.moved_BH[:, step]
        rows.append(whole)
    return torch.cat(rows)


def test_windows_side_by_side_are_those_of_a_policy_that_could_be():
    """Inner products of real vectors: no Gram matrix of context and future has a negative eigenvalue."""
    torch.manual_seed(0)
    segments = window_segments(8)
    batch = segments.gather(np.arange(segments.num_windows))
    joined = side_by_side(batch, QUESTION.steps, 5, share=1.0)
    for own, other in ((batch, batch), (joined, batch)):
        eigenvalues = torch.linalg.eigvalsh(whole_grams(own).double())
        assert eigenvalues.min() > -1e-4 * eigenvalues.max()
        assert torch.equal(own.phases_B, other.phases_B)
    assert not torch.isclose(joined.grams_BKK, batch.grams_BKK).all(dim=(1, 2)).any()
    alone = side_by_side(batch, QUESTION.steps, 5, share=0.0)
    for found, expected in zip(alone, batch, strict=True):
        torch.testing.assert_close(found, expected)


def test_made_up_policies_repeat_themselves_with_the_iterations():
    torch.manual_seed(0)
    grams_BNN = periodic_grams(torch.tensor([0, 3, 4]), 10, 10, 5)
    torch.testing.assert_close(grams_BNN[:, 5:, 5:], grams_BNN[:, :-5, :-5])
    torch.testing.assert_close(grams_BNN.diagonal(dim1=1, dim2=2)[:, :10].mean(dim=1), torch.ones(3))
    assert torch.linalg.eigvalsh(grams_BNN.double()).min() > -1e-6


def test_a_band_is_computed_once_and_then_found(tmp_path: Path):
    write_trials(tmp_path, {3: trajectory(3)})
    first = load_band(str(tmp_path), 3, QUESTION)
    (kept,) = (tmp_path / "grams").glob("*.npy")
    written = kept.stat().st_mtime_ns
    again = load_band(str(tmp_path), 3, QUESTION)
    assert kept.stat().st_mtime_ns == written
    np.testing.assert_array_equal(again.products_SW, first.products_SW)
    np.testing.assert_array_equal(again.learning_rates_T, np.ones(15))
    np.testing.assert_array_equal(first.products_SW, make_band(trajectory(3), 7).products_SW)
    load_band(str(tmp_path), 3, Question(context=4, steps=(5,), snapshots_per_iteration=5))
    assert len(list((tmp_path / "grams").glob("*.npy"))) == 2, "a wider band is another band"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)


def saved_as(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Another array in its place, with or without a record that agrees."""

    def damage(path: Path) -> None:
        content = io.BytesIO()
        np.save(content, change(np.load(path)))
        publish(str(path.parent), {path.name: content.getvalue()}, f"{path.stem}.sha256")

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.with_suffix(".sha256").write_bytes(b""),
        lambda path: np.save(path, np.load(path) * np.nan),
        lambda path: np.save(path, np.load(path)[:-1]),
        saved_as(lambda array: array.astype(np.float32)),
        saved_as(lambda array: array[:-1]),
        saved_as(lambda array: array[:, :-1]),
        saved_as(lambda array: array * np.nan),
        saved_as(lambda array: array[..., None]),
        lambda path: path.with_suffix(".sha256").unlink(),
    ],
)
def test_a_damaged_band_is_made_anew(damage: Callable[[Path], None], tmp_path: Path):
    """The last one is as an earlier version left it, without a record; and so it was never held to anything."""
    write_trials(tmp_path, {3: trajectory(3)})
    first = load_band(str(tmp_path), 3, QUESTION)
    (kept,) = (tmp_path / "grams").glob("*.npy")
    content = kept.read_bytes()
    damage(kept)
    np.testing.assert_array_equal(load_band(str(tmp_path), 3, QUESTION).products_SW, first.products_SW)
    assert kept.read_bytes() == content
    assert sorted(path.suffix for path in kept.parent.iterdir()) == [".npy", ".sha256"]


def test_a_band_that_cannot_be_kept_is_made_all_the_same(tmp_path: Path):
    write_trials(tmp_path, {3: trajectory(3)})
    (tmp_path / "grams").write_text("no folder")
    found = load_band(str(tmp_path), 3, QUESTION)
    np.testing.assert_array_equal(found.products_SW, make_band(trajectory(3), 7).products_SW)


def test_windows_of_trials_of_different_length_lie_one_after_the_other():
    bands = [make_band(trajectory(seed, length), 7) for seed, length in ((0, 15), (1, 12))]
    both, second = WindowSegments(bands, QUESTION), WindowSegments(bands[1:], QUESTION)
    assert (both.num_windows, second.num_windows) == (8 + 5, 5)
    for found, expected in zip(both.gather(np.arange(8, 13)), second.gather(np.arange(5)), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_trial_too_short_has_no_windows():
    bands = [make_band(trajectory(0, length), 7) for length in (15, 7)]
    with pytest.raises(ValueError, match=r"model\.context=4 and forward step 3 leave no window in the 7 snapshots"):
        WindowSegments(bands[1:], QUESTION)


def test_a_trial_reduced_from_the_store_is_reduced_as_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporal_svd, "HELD_BYTES", 4 * 9 * 4)
    monkeypatch.setattr(temporal_svd, "BLOCK_BYTES", 8 * 9 * 3)
    for shape in ((9, 11), (15, 11)):
        weights_TP = trajectory(3, *shape)
        storage = str(tmp_path / str(shape))
        write_trials(Path(storage), {3: weights_TP})
        found, expected = (
            TrialTokens(BASIS).read(storage, 3, QUESTION),
            tokens_of(
                3,
                weights_TP,
                fit_basis(weights_TP, 4),
                moved_squares(banded_products(weights_TP, QUESTION.width), QUESTION.future),
            ),
        )
        for field in ("coordinates_NTD", "singular_values_ND", "outside_NT", "moved_NTF"):
            np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


def test_who_reads_trials_waits_for_no_torch() -> None:
    """The tasks that read and reduce trials: importing torch would take each of them two seconds."""
    loaded = modules_after("import tipl_ray.paper.tokens, tipl_ray.predict.bands, tipl_ray.train.reading")
    assert "tipl_ray.paper.tokens" in loaded
    assert "torch" not in loaded
