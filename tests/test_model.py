import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from machine import modules_after

from tipl_ray import config
from tipl_ray.data.storage import StoreError
from tipl_ray.paper.objective import NextToken
from tipl_ray.paper.tokens import Tokens
from tipl_ray.paper.transformer import CausalTransformer, Normaliser
from tipl_ray.predict.model_files import is_complete
from tipl_ray.predict.models import load_about, load_model
from tipl_ray.predict.representation import TrainingData
from tipl_ray.window.transformer import WindowTransformer

SIZE = config.Model(context=6, embedding=16, layers=2, heads=2, dropout=0.1)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small_model(max_snapshots: int = 30, residual: bool = False) -> CausalTransformer:
    torch.manual_seed(0)
    size = dataclasses.replace(SIZE, residual=residual)
    return CausalTransformer(size, token_size=4, max_snapshots=max_snapshots).eval()


def window(length: int = 6, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 4, generator=generator), torch.arange(length).expand(batch, length) + 2


@pytest.mark.parametrize("residual", [False, True])
def test_a_future_token_changes_nothing_before_it(residual: bool):
    model, (tokens_BKD, snapshots_BK) = small_model(residual=residual), window()
    torch.nn.init.normal_(model.predict.weight)
    before = model(tokens_BKD, snapshots_BK)
    for position in range(6):
        changed_BKD = tokens_BKD.clone()
        changed_BKD[:, position] += 10.0
        after = model(changed_BKD, snapshots_BK)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=0)
        assert (after[:, position:] != before[:, position:]).any(dim=-1).all()


def test_a_residual_model_begins_as_a_copy_and_moves_in_units_of_what_a_snapshot_changes():
    model, (tokens_BKD, snapshots_BK) = small_model(residual=True), window()
    torch.testing.assert_close(model(tokens_BKD, snapshots_BK), tokens_BKD, rtol=0, atol=0)
    torch.nn.init.normal_(model.predict.weight)
    model.change_D.copy_(torch.tensor([1.0, 0.5, 0.1, 1e-3]))
    moved_D = (model(tokens_BKD, snapshots_BK) - tokens_BKD).abs().mean(dim=(0, 1))
    assert (moved_D / model.change_D).min() > 1e-4
    assert moved_D[3] < 1e-2 * moved_D[0]


def test_a_residual_models_loss_is_1_where_it_copies():
    """In units of the changes' root mean square: over all windows copying has an error of 1 in each number."""
    random = np.random.default_rng(0)
    walks_NTD = random.standard_normal((3, 40, 4)).cumsum(axis=1).astype(np.float32) * [1.0, 0.1, 10.0, 1e-3]
    tokens = Tokens(
        seeds=(1, 2, 3),
        coordinates_NTD=walks_NTD.astype(np.float32),
        singular_values_ND=np.ones((3, 4)),
        outside_NT=np.zeros((3, 40)),
        moved_NTF=np.ones((3, 40, 1)),
    )
    size = dataclasses.replace(SIZE, residual=True)
    objective = NextToken(size, TrainingData(train=tokens, validation=tokens))
    loss, _ = objective.validate()
    assert loss == pytest.approx(1.0, rel=0.1)
    assert 0 < objective.model.change_D.min() < objective.model.change_D.max()


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
    assert sorted(path.name for path in Path(folder).iterdir()) == ["model.json", "model.safetensors", "model.sha256"]


def test_a_folder_without_a_model_is_not_found(tmp_path: Path):
    with pytest.raises(StoreError, match=r"model\.json: is missing; restore it from a copy"):
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


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def more_heads(path: Path) -> None:
    path.write_text(path.read_text().replace('"heads": 2', '"heads": 4'))


def all_nan(path: Path) -> None:
    weights = safetensors.torch.load(path.read_bytes())
    path.write_bytes(safetensors.torch.save({name: tensor * torch.nan for name, tensor in weights.items()}))


def fewer_weights(path: Path) -> None:
    weights = safetensors.torch.load(path.read_bytes())
    weights.popitem()
    path.write_bytes(safetensors.torch.save(weights))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", flipped, "is damaged: its SHA-256 is not the one in model.sha256"),
        ("model.safetensors", cut_short, "is damaged"),
        ("model.safetensors", emptied, "is damaged"),
        ("model.safetensors", Path.unlink, "is missing"),
        ("model.json", flipped, "is damaged"),
        ("model.json", more_heads, "is damaged"),
        ("model.json", emptied, "is damaged"),
        ("model.json", Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("made", [lambda: small_model(), lambda: window_model()], ids=["causal", "window"])
def test_a_model_that_is_not_the_one_saved_is_refused_in_one_line(
    name: str, damage: Callable[[Path], None], words: str, made: Callable[[], Any], tmp_path: Path
) -> None:
    made().save(str(tmp_path), {"basis": {"kind": "window"}})
    damage(tmp_path / name)
    with pytest.raises(StoreError) as refused:
        load_model(str(tmp_path))
    assert str(refused.value).startswith(f"{tmp_path}/{name}: {words}")
    assert str(refused.value).endswith(
        "restore it from a copy (MLflow keeps one), or delete the folder and train again"
    )


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut_short),
        ("model.safetensors", emptied),
        ("model.safetensors", all_nan),
        ("model.safetensors", fewer_weights),
        ("model.json", emptied),
        ("model.json", lambda path: path.write_text("[]")),
        ("model.json", lambda path: path.write_text('{"architecture": "Other"}')),
        ("model.json", lambda path: path.write_text(path.read_text().replace('"embedding": 16', '"embedding": 32'))),
    ],
)
def test_a_model_of_an_earlier_version_has_no_record_and_is_loaded_if_it_is_one(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    window_model().save(str(tmp_path))
    (tmp_path / "model.sha256").unlink()
    assert torch.equal(load_model(str(tmp_path))(*contexts()), window_model()(*contexts()))
    damage(tmp_path / name)
    with pytest.raises(StoreError, match="is not understood"):
        load_model(str(tmp_path))


def test_loading_draws_no_random_number_and_keeps_the_type_that_was_saved(tmp_path: Path) -> None:
    for name, model in (("causal", small_model()), ("window", window_model())):
        folder, before = str(tmp_path / name), torch.get_rng_state()
        model.save(folder)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                loaded = load_model(folder)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(torch.get_rng_state(), before)
        assert {(tensor.dtype, tensor.device.type) for tensor in loaded.state_dict().values()} == {
            (torch.float32, "cpu")
        }
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
        assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_process_that_loads_a_model_does_not_wait_for_torchs_compiler(tmp_path: Path) -> None:
    window_model().save(str(tmp_path))
    loaded = modules_after(f"from tipl_ray.predict.models import load_model; load_model({str(tmp_path)!r})")
    assert "torch" in loaded
    assert "torch._dynamo" not in loaded


def test_a_seed_makes_the_same_model_whatever_the_default_type() -> None:
    expected = [small_model(), window_model()]
    torch.set_default_dtype(torch.float64)
    try:
        made = [small_model(), window_model()]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(made, expected, strict=True):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
