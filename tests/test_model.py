import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tipl_ray import config
from tipl_ray.model import CausalTransformer, Normaliser, WindowTransformer, is_complete, load_about, load_model

SIZE = config.Model(context=6, embedding=16, layers=2, heads=2, dropout=0.1)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small_model(max_snapshots: int = 30) -> CausalTransformer:
    torch.manual_seed(0)
    return CausalTransformer(SIZE, token_size=4, max_snapshots=max_snapshots).eval()


def window(length: int = 6, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 4, generator=generator), torch.arange(length).expand(batch, length) + 2


def test_a_future_token_changes_nothing_before_it():
    model, (tokens_BKD, snapshots_BK) = small_model(), window()
    before = model(tokens_BKD, snapshots_BK)
    for position in range(6):
        changed_BKD = tokens_BKD.clone()
        changed_BKD[:, position] += 10.0
        after = model(changed_BKD, snapshots_BK)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=0)
        assert (after[:, position:] != before[:, position:]).any(dim=-1).all()


def test_the_snapshots_index_matters():
    model, (tokens_BKD, snapshots_BK) = small_model(), window()
    assert not torch.equal(model(tokens_BKD, snapshots_BK), model(tokens_BKD, snapshots_BK + 1))


def test_paper_preset_has_decision_transformers_size():
    model = CausalTransformer(config.Model(), token_size=32, max_snapshots=1951)
    block = 12 * 128**2 + 13 * 128
    outside = (32 + 1) * 128 + 1951 * 128 + 2 * 2 * 128 + (128 + 1) * 32
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * block + outside
    assert model.get_parameter("blocks.0.mlp_in.weight").std().item() == pytest.approx(0.02, rel=0.02)


def test_forecast_feeds_predictions_back_and_slides_the_context():
    model, (tokens_BKD, snapshots_BK) = small_model(), window()
    forecast_BHD = model.forecast(tokens_BKD, snapshots_BK, 3)
    assert forecast_BHD.shape == (3, 3, 4)
    for step in range(3):
        known = torch.cat((tokens_BKD, forecast_BHD[:, :step]), dim=1)[:, -6:]
        expected = model(known, snapshots_BK + step)[:, -1]
        torch.testing.assert_close(forecast_BHD[:, step], expected)


def test_forecast_past_the_last_snapshot_stays_at_the_tables_end():
    tokens_BKD, snapshots_BK = window()
    assert torch.isfinite(small_model(max_snapshots=8).forecast(tokens_BKD, snapshots_BK, 5)).all()


def test_dropout_acts_in_training_only():
    model, (tokens_BKD, snapshots_BK) = small_model(), window()
    assert torch.equal(model(tokens_BKD, snapshots_BK), model(tokens_BKD, snapshots_BK))
    model.train()
    assert not torch.equal(model(tokens_BKD, snapshots_BK), model(tokens_BKD, snapshots_BK))


def test_saved_model_loads_equal_with_what_is_said_of_it(tmp_path: Path):
    model, (tokens_BKD, snapshots_BK) = small_model(), window()
    folder = str(tmp_path / "a model")
    assert not is_complete(folder)
    model.save(folder, {"data_digest": "abc"})
    assert is_complete(folder)
    assert torch.equal(CausalTransformer.load(folder)(tokens_BKD, snapshots_BK), model(tokens_BKD, snapshots_BK))
    assert load_about(folder)["data_digest"] == "abc"
    assert isinstance(load_model(folder), CausalTransformer)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["model.json", "model.safetensors"]


def test_a_folder_without_a_model_is_not_found(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        CausalTransformer.load(str(tmp_path))


def test_normaliser_is_its_own_inverse_and_survives_json():
    generator = np.random.default_rng(0)
    coordinates_NTD = (3.0 + 0.01 * generator.standard_normal((4, 9, 5))).astype(np.float32)
    coordinates_NTD[..., 2], coordinates_NTD[..., 3] = 0.0, 0.1
    normaliser = Normaliser.fit(coordinates_NTD)
    tokens_NTD = normaliser.normalise(coordinates_NTD)
    np.testing.assert_allclose(tokens_NTD.std(axis=(0, 1)), [1, 1, 0, 0, 1], atol=1e-4)
    np.testing.assert_allclose(normaliser.restore(tokens_NTD), coordinates_NTD, rtol=1e-6)
    again = Normaliser.from_table(json.loads(json.dumps(normaliser.as_table())))
    np.testing.assert_array_equal(again.mean_D, normaliser.mean_D)
    np.testing.assert_array_equal(again.deviation_D, normaliser.deviation_D)


def window_model(**size) -> WindowTransformer:
    torch.manual_seed(0)
    model = WindowTransformer(dataclasses.replace(SIZE, **size), steps=(1, 2, 5), num_phases=5).eval()
    model.predict.weight.data.normal_()
    return model


def contexts(scale: float = 1.0, batch: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    displacements_BKP = torch.randn(batch, 6, 40, generator=generator, dtype=torch.float64) * scale
    return (
        displacements_BKP @ displacements_BKP.transpose(1, 2),
        torch.tensor([0, 1, 4]),
        torch.tensor([0.1, 0.5, 0.9]),
        torch.tensor([0.8, 0.6, 0.2]),
    )


def test_window_model_answers_every_displacement_with_a_coefficient_per_step():
    assert window_model()(*contexts()).shape == (3, 3, 6)


def test_window_model_does_not_know_the_scale_of_weights():
    model = window_model()
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(model(*contexts(scale)), model(*contexts()), rtol=1e-4, atol=1e-5)


def test_window_model_corrects_the_ridge_of_its_phase():
    model = window_model()
    model.weigh.weight.data.zero_()
    before = model(*contexts())
    model.ridge_QHK[4] = 1.0
    torch.testing.assert_close(model(*contexts()) - before, model.ridge_QHK[contexts()[1]])


def test_window_model_is_told_the_phase_and_the_clock_that_it_is_made_for():
    grams, phases, progress, rates = contexts()
    other_phase, other_progress = (phases + 1) % 5, progress / 2
    for size, phase_matters, progress_matters, rate_matters in (
        ({}, True, True, False),
        ({"phase": False}, False, True, False),
        ({"clock": "none"}, True, False, False),
        ({"clock": "learning_rate"}, True, False, True),
    ):
        model = window_model(**size)
        answer = model(grams, phases, progress, rates)
        assert torch.equal(model(grams, other_phase, progress, rates), answer) != phase_matters
        assert torch.equal(model(grams, phases, other_progress, rates), answer) != progress_matters
        assert torch.equal(model(grams, phases, progress, rates / 2), answer) != rate_matters


def test_displacements_of_no_length_are_answered_with_numbers():
    grams, *clocks = contexts()
    grams[:, :, 2], grams[:, 2] = 0.0, 0.0
    assert torch.isfinite(window_model()(grams, *clocks)).all()
    assert torch.isfinite(window_model()(torch.zeros_like(grams), *clocks)).all()


def test_saved_window_model_loads_equal(tmp_path: Path):
    model = window_model()
    model.ridge_QHK.normal_()
    model.save(str(tmp_path), {"data_digest": "abc"})
    loaded = load_model(str(tmp_path))
    assert isinstance(loaded, WindowTransformer)
    assert torch.equal(loaded(*contexts()), model(*contexts()))
