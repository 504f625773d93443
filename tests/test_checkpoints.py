"""Folders of checkpoints, reduced to inner products: what is read, in which order, and what is refused."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from runs import flat, model_states, path_states, write_safetensors, write_shards, write_torch, write_zips

from tipl_ray.checkpoints import products
from tipl_ray.checkpoints.files import CheckpointError
from tipl_ray.checkpoints.products import Progress, multiply
from tipl_ray.checkpoints.records import all_series, import_series
from tipl_ray.checkpoints.series import Selection, find_series, number_names
from tipl_ray.data.storage import StoreError

TESTS = Path(__file__).resolve().parent


def gram(folder: Path, **selection: object) -> np.ndarray:
    return multiply(find_series(folder, Selection(**selection))).gram_SS  # type: ignore[arg-type]


def expected_gram(states: list[dict[str, torch.Tensor]]) -> np.ndarray:
    moved_SP = np.diff(flat(states), axis=0)
    return moved_SP @ moved_SP.T


def assert_same_products(found_SS: np.ndarray, expected_SS: np.ndarray) -> None:
    lengths_S = np.sqrt(np.diag(expected_SS))
    assert np.abs((found_SS - expected_SS) / np.outer(lengths_S, lengths_S)).max() < 1e-6


def test_products_of_a_sharded_bfloat16_model_are_numpys_in_float64_however_small_the_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = model_states(24, dtype=torch.bfloat16)
    folder = write_shards(tmp_path / "run", states)
    assert_same_products(gram(folder), expected_gram(states))
    monkeypatch.setattr(products, "SLICE_BYTES", 1)
    monkeypatch.setattr(products, "COLUMNS_AT_ONCE", 128)
    told: list[Progress] = []
    found = multiply(find_series(folder, Selection()), told.append)
    assert_same_products(found.gram_SS, expected_gram(states))
    assert len(told) == told[-1].all_slices == 10 + 3 * (5 + 1)
    assert told[-1].bytes_read == told[-1].all_bytes == 24 * 2 * flat(states).shape[1]


def test_products_by_layer_add_up_to_the_whole_and_are_each_layers_own(tmp_path: Path) -> None:
    states = model_states(6)
    found = multiply(find_series(write_safetensors(tmp_path / "run", states), Selection()))
    assert found.groups == ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2")
    np.testing.assert_allclose(found.grams_GSS.sum(axis=0), found.gram_SS, rtol=1e-12)
    own = [{name: value for name, value in state.items() if "layers.1." in name} for state in states]
    assert_same_products(found.grams_GSS[2], expected_gram(own))
    assert found.weights_G.tolist() == [1200, 600, 600, 600]


def test_every_format_gives_the_same_products(tmp_path: Path) -> None:
    states = model_states(5, dtype=torch.float16)
    writers = (write_safetensors, write_shards, write_torch, write_zips)
    found = [gram(writer(tmp_path / writer.__name__, states)) for writer in writers]
    for other in found[1:]:
        # Tensors come in another order, and so do the sums.
        np.testing.assert_allclose(other, found[0], rtol=1e-12)
    assert_same_products(found[0], expected_gram(states))


def test_a_policy_that_stable_baselines3_saved_is_read_without_unpickling(tmp_path: Path) -> None:
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    model = stable_baselines3.PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, device="cpu")
    states = []
    (tmp_path / "run").mkdir()
    for step in (1000, 2000, 3000):
        with torch.no_grad():
            for parameter in model.policy.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save(tmp_path / "run" / f"rl_model_{step}_steps")
        states.append({name: value.clone() for name, value in model.policy.state_dict().items()})
    series = find_series(tmp_path / "run", Selection())
    assert series.steps == (1000, 2000, 3000)
    assert set(series.tensors) == set(states[0])
    assert_same_products(multiply(series).gram_SS, expected_gram(states))
    actor = [{name: value for name, value in state.items() if "policy_net" in name} for state in states]
    assert_same_products(gram(tmp_path / "run", include=("policy_net",)), expected_gram(actor))


def test_each_type_of_float_is_read_and_what_is_none_is_named(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    states = []
    for index in range(4):
        state = {
            str(dtype).removeprefix("torch."): torch.randn(40, generator=draw).to(dtype)
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        }
        states.append(state)
        whole = {**state, "count": torch.tensor([index]), "phase": torch.ones(3, dtype=torch.complex64)}
        (tmp_path / "run").mkdir(exist_ok=True)
        torch.save(whole, tmp_path / "run" / f"{index}.pt")
    series = find_series(tmp_path / "run", Selection())
    assert series.left_out == {"of type int64": ("count",), "of type complex64": ("phase",)}
    assert_same_products(multiply(series).gram_SS, expected_gram(states))


def test_small_displacements_of_large_float64_weights_are_not_rounded_away(tmp_path: Path) -> None:
    weights_TP = 1e3 + 1e-7 * np.arange(4)[:, None] * np.ones(50)
    folder = write_safetensors(tmp_path / "run", path_states(weights_TP))
    assert_same_products(gram(folder), np.diff(weights_TP, axis=0) @ np.diff(weights_TP, axis=0).T)


def test_displacements_whose_squares_exceed_float32_have_products_all_the_same(tmp_path: Path) -> None:
    weights_TP = np.float32(1e25) * np.arange(4, dtype=np.float32)[:, None] * np.ones(50, np.float32)
    found_SS = gram(write_safetensors(tmp_path / "run", path_states(weights_TP)))
    np.testing.assert_allclose(found_SS, 50 * 1e50, rtol=1e-5)


def test_tied_weights_count_once_and_views_are_read_where_they_lie(tmp_path: Path) -> None:
    states = []
    (tmp_path / "run").mkdir()
    for index in range(3):
        rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(index))
        states.append({"embed": rows, "part": rows[2:4].clone()})
        torch.save({"embed": rows, "head": rows, "part": rows[2:4]}, tmp_path / "run" / f"{index}.pt")
    series = find_series(tmp_path / "run", Selection())
    assert series.left_out == {"tied to another": ("head",)}
    assert_same_products(multiply(series).gram_SS, expected_gram(states))


@pytest.mark.parametrize(
    ("names", "pattern", "expected"),
    [
        (["step_100", "step_20", "step_3"], None, {"step_3": 3, "step_20": 20, "step_100": 100}),
        (["ppo_Hopper-v4_20_steps.zip", "ppo_Hopper-v4_3_steps.zip"], None, {1: 3, 0: 20}),
        (["stage1-step20-tokens4B", "stage1-step5-tokens1B"], None, {1: 5, 0: 20}),
        (["b.pt", "a.pt", "c.pt"], None, {"a.pt": 0, "b.pt": 1, "c.pt": 2}),
        (["epoch=1-step=5-loss=7.ckpt", "epoch=2-step=9-loss=3.ckpt"], r"step=(\d+)", {0: 5, 1: 9}),
        (["step_100", "step_20", "final"], r"step_(\d+)", {"step_20": 20, "step_100": 100}),
    ],
)
def test_the_order_is_that_of_the_number_in_which_names_differ(
    names: list[str], pattern: str | None, expected: dict[str | int, int]
) -> None:
    found, unmatched = number_names(names, pattern, Path("run"))
    assert list(found.items()) == [
        (names[key] if isinstance(key, int) else key, step) for key, step in expected.items()
    ]
    assert sorted([*found, *unmatched]) == sorted(names)


@pytest.mark.parametrize(
    ("names", "pattern", "complaint"),
    [
        (["step_1", "step_2", "final"], None, "final and step_. are named too differently to order"),
        (["e=1-loss=7", "e=2-loss=3"], None, "order them in 2 ways; choose the number with --steps"),
        (["step_01", "step_1"], None, "step_01 and step_1 both have the number 1"),
        (["a_1_x", "b_1_x"], r"_(\d)_", "a_1_x and b_1_x both have the number 1"),
        (["a", "b"], r"step_(\d+)", "matches none of 2 checkpoints, such as a"),
        (["a", "b"], r"(\w)", "is no whole number"),
    ],
)
def test_an_ambiguous_order_is_refused(names: list[str], pattern: str | None, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        number_names(names, pattern, Path("run"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 200)


def poison(path: Path) -> None:
    state = safetensors.torch.load_file(path)
    state["model.layers.1.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(state, path)


def reshape(path: Path) -> None:
    state = safetensors.torch.load_file(path)
    state["model.layers.1.norm.weight"] = torch.zeros(25)
    safetensors.torch.save_file(state, path)


def repack(path: Path) -> None:
    """What zip and unzip make of a file of torch.save: its tensors are elsewhere."""
    torch.save({"w": torch.ones(3), "v": torch.ones(5)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def rename(path: Path) -> None:
    state = safetensors.torch.load_file(path)
    state["other"] = state.pop("model.layers.1.norm.weight")
    safetensors.torch.save_file(state, path)


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (cut, r"step_10.safetensors: is damaged or cut short: .*; copy or save it again"),
        (poison, r"step_10.safetensors: model.layers.1.norm.weight has weights that are NaN or infinite; leave this"),
        (
            reshape,
            r"norm.weight has shape \[24\] in step_0.safetensors and \[25\] in step_10.safetensors; leave it out",
        ),
        (
            rename,
            r"norm.weight is in step_0.safetensors but not in step_10.safetensors; other is in step_10.safetensors but "
            r"not in step_0.safetensors; leave them out",
        ),
        (Path.unlink, r"run: holds one checkpoint, step_0.safetensors; a series has at least 2"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said_and_nothing_is_written(
    tmp_path: Path, harm: Callable[[Path], None], complaint: str
) -> None:
    folder = write_safetensors(tmp_path / "run", model_states(2))
    harm(folder / "step_10.safetensors")
    with pytest.raises(CheckpointError, match=complaint):
        import_series(folder, str(tmp_path / "storage"), Selection())
    assert not (tmp_path / "storage").exists()


def test_a_checkpoint_that_does_not_fit_the_others_is_named_and_the_option_that_leaves_it_out_works(
    tmp_path: Path,
) -> None:
    for harm, complaint in ((reshape, "does not fit the other 4 checkpoints; leave this"), (poison, "infinite; leave")):
        folder = write_safetensors(tmp_path / harm.__name__, model_states(5))
        harm(folder / "step_10.safetensors")
        (folder / "final.safetensors").write_bytes((folder / "step_0.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=complaint) as refused:
            import_series(folder, str(tmp_path / "storage"), Selection(steps=r"step_(\d+)"))
        _, option, *_ = shlex.split(str(refused.value).partition("out, with ")[2])
        series, _ = import_series(folder, str(tmp_path / "other"), Selection(steps=option))
        assert series.steps == (0, 20, 30, 40)


def test_every_tensor_that_does_not_fit_is_named_at_once_or_the_models_are_different_ones(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "run", model_states(4))
    for name in ("step_10", "step_20"):
        rename(folder / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"leave them out with --exclude 'model\\.*norm\\.weight' 'other'$"):
        find_series(folder, Selection())
    series = find_series(folder, Selection(exclude=(r"model\.layers\.1\.norm\.weight", "other")))
    assert len(series.names) == 4
    for index, width in enumerate((3, 3, 4, 4)):
        torch.save({"w": torch.ones(width), "v": torch.ones(width)}, folder / f"{index}.pt")
    with pytest.raises(
        CheckpointError, match=r"w has shape .*; v has shape .*; these are checkpoints of different models"
    ):
        find_series(folder, Selection(steps=r"(\d)\.pt"))


def test_a_folder_of_several_runs_is_refused_with_the_runs(tmp_path: Path) -> None:
    for name in ("a", "b b"):
        write_torch(tmp_path / "ck" / name, model_states(3))
    runs = f"{tmp_path}/ck/a '{tmp_path}/ck/b b'"
    with pytest.raises(CheckpointError, match=f"its folders look like runs of their own; give them one by one: {runs}"):
        find_series(tmp_path / "ck", Selection())


def test_tensors_that_do_not_fit_can_be_left_out(tmp_path: Path) -> None:
    states = model_states(2)
    folder = write_safetensors(tmp_path / "run", states)
    reshape(folder / "step_10.safetensors")
    kept = [{name: value for name, value in state.items() if "layers.1.norm" not in name} for state in states]
    assert_same_products(gram(folder, exclude=(r"layers\.1\.norm",)), expected_gram(kept))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.pt", lambda path: torch.save(torch.nn.Linear(2, 2), path), "contains more than tensors, numbers and text"),
        ("x.pt", lambda path: path.write_bytes(b"not a checkpoint"), "is cut short, or in a format from before"),
        (
            "x.pt",
            lambda path: torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False),
            "is cut short, or in a format from before",
        ),
        ("x.pt", repack, "was packed by another program; load it and save it again with torch.save"),
        ("x.pt", lambda path: torch.save({"w": torch.zeros(3, 4).T}, path), "w is a view that is not in one piece"),
        ("x-00001-of-00002.safetensors", lambda path: path.write_bytes(b""), "is one checkpoint in shards"),
        ("x.txt", lambda path: path.write_bytes(b""), "holds no checkpoints: files that end in .safetensors, .pt"),
        ("x.pt", lambda path: torch.save({"count": torch.tensor(1)}, path), "no tensor of floats is left"),
    ],
)
def test_a_folder_without_a_series_is_refused_by_what_is_in_it(
    tmp_path: Path, name: str, content: Callable[[Path], object], complaint: str
) -> None:
    content(tmp_path / f"1{name}")
    content(tmp_path / f"2{name}")
    with pytest.raises(CheckpointError, match=complaint):
        find_series(tmp_path, Selection())


def test_a_missing_shard_and_an_ambiguous_folder_are_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "run", model_states(2))
    missing = folder / "checkpoint-10" / "model-00002-of-00002.safetensors"
    missing.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"{missing.name} is missing, 1 of 2 shards"):
        find_series(folder, Selection())
    for step in (1, 2):
        (tmp_path / "two" / f"{step}").mkdir(parents=True)
        for name in ("actor.pt", "critic.pt"):
            torch.save({name: torch.full((3,), float(step))}, tmp_path / "two" / f"{step}" / name)
    with pytest.raises(CheckpointError, match=r"actor.pt, critic.pt could all be its weights; choose one with --file"):
        find_series(tmp_path / "two", Selection())
    assert set(find_series(tmp_path / "two", Selection(file="actor.pt")).tensors) == {"actor.pt"}


@pytest.mark.parametrize(
    ("selection", "complaint"),
    [
        ({"steps": "step_(\\d+"}, "is no regular expression"),
        ({"steps": "step_\\d+"}, "needs one group around the number"),
        ({"include": ("[",)}, "include='\\[' is no regular expression"),
    ],
)
def test_patterns_are_checked_before_anything_is_read(selection: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Selection(**selection)


def test_the_same_import_is_found_done_wherever_the_folder_lies_and_other_weights_are_another(tmp_path: Path) -> None:
    folder, storage = write_torch(tmp_path / "run", model_states(4)), str(tmp_path / "storage")
    first, was_there = import_series(folder, storage, Selection())
    assert not was_there
    shutil.copytree(folder, tmp_path / "copy" / "run")
    again, was_there = import_series(tmp_path / "copy" / "run", storage, Selection())
    assert was_there
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.products.gram_SS, first.products.gram_SS)
    np.testing.assert_array_equal(again.products.grams_GSS, first.products.grams_GSS)
    assert import_series(folder, storage, Selection(exclude=("norm",)))[0].digest != first.digest
    other = write_torch(tmp_path / "other" / "run", model_states(4, seed=1))
    assert import_series(other, storage, Selection())[0].digest != first.digest
    assert len(all_series(storage)) == 3


def test_a_damaged_record_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder, storage = write_torch(tmp_path / "run", model_states(4)), tmp_path / "storage"
    imported, _ = import_series(folder, str(storage), Selection())
    record = storage / "series" / imported.digest / "products.safetensors"
    content = record.read_bytes()
    record.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"is damaged.*; delete its folder and import the checkpoints again"):
        import_series(folder, str(storage), Selection())


KILLED = """
import os, sys
from pathlib import Path
from publications import before_publications
from tipl_ray.checkpoints.records import import_series
from tipl_ray.checkpoints.series import Selection

folder, storage = Path(sys.argv[1]), sys.argv[2]
for number in range(1, 100):
    if not (child := os.fork()):
        calls = iter(range(1, 1000))
        before_publications(storage, lambda name, path: next(calls) == number and os._exit(9))
        import_series(folder, storage, Selection())
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        print(number)
        break
"""


def test_an_import_that_is_killed_before_any_of_its_writes_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "run", model_states(3))
    imported, _ = import_series(folder, str(tmp_path / "storage"), Selection())
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed")]
    variables = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.splitlines()[-1]) > 6
    names = {"products.safetensors", "series.json", "series.sha256"}
    for name in names:
        places = [tmp_path / storage / "series" / imported.digest / name for storage in ("storage", "killed")]
        assert places[0].read_bytes() == places[1].read_bytes()
