"""What a recorder promises: anyone's module in the data set bit for bit, and the same bytes after any kill."""

import itertools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from publications import before_publications
from test_collection import smoke
from torch import nn

from tipl_ray import Recorder, load_module
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.predict.bands import load_band, snapshots_per_iteration
from tipl_ray.predict.gram import Question, rate_shares
from tipl_ray.stages import data_digest, learning_curves

ROOT = Path(__file__).resolve().parent.parent


class Net(nn.Module):
    """A layer, a BatchNorm and a head: parameters and buffers."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.first = nn.Linear(3, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.head = nn.Linear(4, 2, dtype=dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(inputs)).tanh())


def train(module: nn.Module, seed: int, steps: int) -> Any:
    """A small training: yields (step, loss, learning rate) after each step."""
    torch.manual_seed(seed)
    parameters = [one for one in module.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for step in range(1, steps + 1):
        inputs = torch.randn(8, 3, dtype=parameters[0].dtype)
        loss = (module(inputs).float() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step, float(loss.detach()), 1e-2


def record_run(
    storage: Path | str, trial: int = 1, steps: int = 10, kill_at: int | None = None, **settings: Any
) -> None:
    torch.manual_seed(trial)
    net = Net()
    with Recorder(net, str(storage), trial=trial, task="toy", snapshots_per_commit=4, **settings) as recorder:
        recorder.record(0, loss=None, learning_rate=1e-2)
        for step, loss, rate in train(net, trial, steps):
            if step == kill_at:
                raise KeyboardInterrupt
            recorder.record(step, loss=loss, learning_rate=rate)


def open_recorder(module: nn.Module, storage: Path, **settings: Any) -> Recorder:
    return Recorder(module, str(storage), **{"trial": 1, "task": "toy", **settings})


def layout_names(storage: Path) -> list[str]:
    return [name for name, _, _ in TrajectoryStore(str(storage)).header().layout]


def test_a_modules_weights_come_back_bit_for_bit_and_what_is_not_known_is_not_there(tmp_path: Path) -> None:
    record_run(tmp_path)
    store = TrajectoryStore(str(tmp_path))
    assert store.verify(1).num_snapshots == 11
    header = store.header()
    assert header.columns == ("snapshot", "step", "learning_rate", "loss", "weights")
    assert (header.task, header.config) == ("toy", {"snapshots_per_iteration": 1})
    torch.manual_seed(1)
    net, expected = Net(), []
    for _ in train(net, 1, 10):
        state = net.state_dict()
        expected.append(np.concatenate([state[name].numpy().ravel() for name, _, _ in header.layout]))
    trajectory = store.trajectory(1)
    np.testing.assert_array_equal(trajectory.weights_TP[1:], np.array(expected))
    assert trajectory.steps_T.tolist() == list(range(11))
    assert np.isnan(trajectory.losses_T).tolist() == [True] + [False] * 10
    for field in ("episodic_returns_T", "iterations_T", "env_steps_T", "observation_means_TO"):
        assert len(getattr(trajectory, field)) == 0
    with pytest.raises(ValueError, match=r"trial 1 was recorded without episodic_return, so what needs that cannot be"):
        store.trajectory(1, ["episodic_return"])


@pytest.mark.parametrize("kill_at", range(1, 11))
def test_a_run_given_again_from_its_beginning_after_a_kill_leaves_the_same_bytes(tmp_path: Path, kill_at: int) -> None:
    record_run(tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        record_run(tmp_path / "killed", kill_at=kill_at)
    record_run(tmp_path / "killed")
    digests = [TrajectoryStore(str(tmp_path / name)).digest() for name in ("undisturbed", "killed")]
    assert digests[0] == digests[1]


def record_and_die(storage: str, call: int) -> None:
    """Record a run, killed before its n-th call that publishes or deletes a file."""
    calls = itertools.count(1)

    def reach(*_: str) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    before_publications(storage, reach)
    record_run(storage)


@pytest.mark.slow
def test_killed_before_any_call_that_publishes_a_recording_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    record_run(tmp_path / "undisturbed")
    expected = TrajectoryStore(str(tmp_path / "undisturbed")).digest()
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_recorder"])
    for call in range(1, 100):
        storage = str(tmp_path / str(call))
        process = server.Process(target=record_and_die, args=(storage, call))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        record_run(storage)
        assert TrajectoryStore(storage).digest() == expected
    assert call > 20


def test_a_run_goes_on_from_its_checkpoint_and_what_it_gives_again_is_checked(tmp_path: Path) -> None:
    record_run(tmp_path / "undisturbed", steps=9)
    torch.manual_seed(1)
    net = Net()
    weights: list[dict[str, torch.Tensor]] = [{name: one.clone() for name, one in net.state_dict().items()}]
    losses = [None]
    for _, loss, _ in train(net, 1, 9):
        weights.append({name: one.clone() for name, one in net.state_dict().items()})
        losses.append(loss)

    def give(recorder: Recorder, start: int, stop: int) -> None:
        for step in range(start, stop):
            net.load_state_dict(weights[step])
            recorder.record(step, loss=losses[step], learning_rate=1e-2)

    storage = tmp_path / "resumed"
    recorder = open_recorder(net, storage, snapshots_per_commit=4)
    give(recorder, 0, 4)
    checkpoint = recorder.state_dict()
    assert checkpoint == {"snapshot": 4, "step": 3}
    give(recorder, 4, 7)
    recorder.load_state_dict(checkpoint)  # of the same process, which has recorded beyond it
    give(recorder, 4, 9)
    assert recorder.num_committed == 8
    del recorder
    recorder = open_recorder(net, storage, snapshots_per_commit=4)
    recorder.load_state_dict(checkpoint)
    give(recorder, 4, 10)
    recorder.close()
    assert TrajectoryStore(str(storage)).digest() == TrajectoryStore(str(tmp_path / "undisturbed")).digest()
    recorder = open_recorder(net, storage)
    with pytest.raises(StoreError, match=r"taken after 11 snapshots, and trial 1 has 10; continue from an earlier"):
        recorder.load_state_dict({"snapshot": 11, "step": 10})
    with torch.no_grad():
        net.norm.state_dict()["running_var"][2] += 1e-7
    recorder.load_state_dict({"snapshot": 9, "step": 8})
    with pytest.raises(StoreError, match=r"trial 1, snapshot 9: norm\.running_var differs from what is committed"):
        recorder.record(9, loss=losses[9], learning_rate=1e-2)
    recorder.load_state_dict({"snapshot": 9, "step": 8})
    net.load_state_dict(weights[9])
    with pytest.raises(StoreError, match=r"snapshot 9: loss differs from what is committed"):
        recorder.record(9, loss=0.0, learning_rate=1e-2)
    del recorder
    open_recorder(net, storage, given_again="skip").record(0)


def test_a_trial_has_one_recorder_at_a_time(tmp_path: Path) -> None:
    net = Net()
    recorder = open_recorder(net, tmp_path)
    with pytest.raises(StoreError, match=r"is already recording trial 1; wait for it to end, or stop it"):
        open_recorder(net, tmp_path)
    open_recorder(net, tmp_path, trial=2).close()
    recorder.close()
    with pytest.raises(ValueError, match=r"the recorder of trial 1 is closed"):
        recorder.record(0)
    open_recorder(net, tmp_path).close()


def test_trials_of_a_storage_share_task_module_and_columns(tmp_path: Path) -> None:
    record_run(tmp_path)
    with pytest.raises(StoreError, match=r"task='toy' there, 'other' here"):
        open_recorder(Net(), tmp_path, trial=2, task="other")
    with pytest.raises(StoreError, match=r"layout="):
        open_recorder(nn.Linear(2, 1), tmp_path, trial=2)
    recorder = open_recorder(Net(), tmp_path, trial=2)
    with pytest.raises(StoreError, match=r"learning_rate=None, and the trial has that column: give it with each"):
        recorder.record(0)
    with pytest.raises(StoreError, match=r"epoch=1, and the trial has no such column; what its first snapshot has"):
        recorder.record(0, learning_rate=1e-3, loss=0.0, epoch=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrower_types_are_held_exactly_and_float64_is_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 3, dtype=dtype)
    with open_recorder(net, tmp_path) as recorder:
        recorder.record(0)
    store = TrajectoryStore(str(tmp_path))
    short = str(dtype).removeprefix("torch.")
    assert store.header().config["types"] == {"weight": short, "bias": short}
    held = torch.from_numpy(store.trajectory(1).weights_TP[0][:15]).reshape(3, 5)
    assert (held.to(dtype) == net.weight).all() == (dtype != torch.float64)
    assert (held == net.weight.float()).all()


def test_eight_bits_are_held_exactly_too(tmp_path: Path) -> None:
    narrow = torch.tensor([0.5, -1.75, 0.0625]).to(torch.float8_e4m3fn)
    with open_recorder(nn.ParameterDict({"w": nn.Parameter(narrow)}), tmp_path) as recorder:
        recorder.record(0)
    assert TrajectoryStore(str(tmp_path)).trajectory(1).weights_TP.tolist() == [[0.5, -1.75, 0.0625]]
    other = nn.ParameterDict({"w": nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn))})
    load_module(other, str(tmp_path), trial=1)
    assert other["w"].float().tolist() == [0.5, -1.75, 0.0625]


def test_a_complex_parameter_is_its_real_and_its_imaginary_part(tmp_path: Path) -> None:
    module = nn.ParameterDict({"phase": nn.Parameter(torch.tensor([1 + 2j, 3 - 4j]))})
    with open_recorder(module, tmp_path) as recorder:
        recorder.record(0)
    store = TrajectoryStore(str(tmp_path))
    assert store.header().layout == (("phase", (2, 2), 0),)
    assert store.header().config["types"] == {"phase": "complex64"}
    assert store.trajectory(1).weights_TP.tolist() == [[1, 2, 3, -4]]


def test_tied_parameters_are_recorded_once(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    with open_recorder(module, tmp_path) as recorder:
        recorder.record(0)
    assert layout_names(tmp_path) == ["0.weight"]


def test_of_an_adapter_on_a_frozen_base_the_adapter_is_recorded_and_the_base_watched(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        module = nn.ModuleDict({"base": nn.Linear(64, 64), "adapter": nn.Linear(64, 2)})
        module["base"].requires_grad_(False)
        module.register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
        return module

    module = model()
    with open_recorder(module, tmp_path) as recorder:
        recorder.record(0)
    assert layout_names(tmp_path) == ["adapter.weight", "adapter.bias"]
    with pytest.raises(
        ValueError, match=r"codes is a parameter of int64, which float32 does not hold; leave it out by"
    ):
        open_recorder(module, tmp_path, trial=2, frozen=True)
    with open_recorder(module, tmp_path / "all", frozen=True, leave_out=("codes",)) as recorder:
        recorder.record(0)
    assert layout_names(tmp_path / "all") == ["base.weight", "base.bias", "adapter.weight", "adapter.bias"]

    recorder = open_recorder(module, tmp_path)
    with torch.no_grad():
        module.get_parameter("base.weight").add_(1.0)
    with pytest.raises(ValueError, match=r"base\.weight changed although it requires no gradient"):
        recorder.record(0)
    recorder.close()
    with pytest.raises(
        StoreError, match=r"trial 1 was started with frozen weights other than the module's; load those"
    ):
        open_recorder(module, tmp_path)
    recorder = open_recorder(thawed := model(), tmp_path)
    thawed.get_submodule("base").requires_grad_(True)
    with pytest.raises(ValueError, match=r"base\.weight, base\.bias did not require a gradient when the recorder was"):
        recorder.record(0)


def test_of_buffers_what_a_function_depends_on_is_recorded_and_integers_are_watched(tmp_path: Path) -> None:
    net = Net()
    net.register_buffer("mask", torch.tensor([1, 0]))
    net.register_buffer("cache", torch.zeros(9), persistent=False)
    recorder = open_recorder(net, tmp_path)
    net(torch.randn(8, 3))
    recorder.record(0)
    recorder.commit()
    assert layout_names(tmp_path)[-2:] == ["norm.running_mean", "norm.running_var"]
    assert not {"mask", "cache", "norm.num_batches_tracked"} & {*layout_names(tmp_path)}
    net.mask.add_(1)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"mask changed although it requires no gradient"):
        recorder.record(1)


def test_compiled_and_data_parallel_modules_have_the_names_of_the_bare_one(tmp_path: Path) -> None:
    bare, inner = Net(), Net()
    inner.first = torch.compile(inner.first)  # type: ignore[assignment]
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(Net())
        every = {
            "bare": bare,
            "compiled": torch.compile(Net()),
            "within": inner,
            "parallel": parallel,
            "both": torch.compile(parallel),
            "threads": nn.DataParallel(Net()),
        }
        for name, module in every.items():
            with open_recorder(module, tmp_path / name) as recorder:  # type: ignore[arg-type]
                recorder.record(0)
            assert layout_names(tmp_path / name) == layout_names(tmp_path / "bare")
    finally:
        torch.distributed.destroy_process_group()


def test_a_submodule_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    with open_recorder(nn.ModuleDict({"module": nn.Linear(1, 1)}), tmp_path) as recorder:
        recorder.record(0)
    assert layout_names(tmp_path) == ["module.weight", "module.bias"]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            lambda: nn.Linear(2, 1).requires_grad_(False),
            "Linear has nothing to record: no parameter requires a gradient",
        ),
        (lambda: nn.LazyLinear(2), "weight has no shape yet; run the module once before you open the recorder"),
        (lambda: nn.Linear(2, 1, device="meta"), "weight is on the device `meta`, without values; load the module"),
        (
            lambda: nn.ParameterDict({"w": nn.Parameter(torch.eye(2).to_sparse())}),
            r"w is sparse_coo, not a dense tensor; leave it out by leave_out=\('w',\)",
        ),
        (
            lambda: nn.ParameterDict({"w": nn.Parameter(torch.empty(1).expand(2**31))}),
            r"2,147,483,648 weights are more than a trial's 2\*\*31 - 1; record a part of the module",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_work_starts(module: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        open_recorder(module(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trial": -1}, r"trial=-1 is below 0"),
        ({"task": ""}, r"task is empty; name in a word what is learned"),
        ({"snapshots_per_iteration": 0}, r"snapshots_per_iteration=0 is below 1"),
        ({"snapshots_per_commit": 0}, r"snapshots_per_commit=0 is below 1"),
        ({"given_again": "chek"}, r"given_again='chek' is not one of check, skip; did you mean check\?"),
        ({"config": {"net": nn.Linear(1, 1)}}, r"config cannot be written as JSON: .*; use plain numbers, strings"),
    ],
)
def test_arguments_without_meaning_are_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        open_recorder(Net(), tmp_path, **settings)


def test_what_is_said_of_a_snapshot_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    recorder = open_recorder(Net(), tmp_path)
    with pytest.raises(ValueError, match=r"record='learning_rat' is not one of .*did you mean learning_rate\?"):
        recorder.record(0, learning_rat=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"observation_mean require the rest of observation_mean, observation_"):
        recorder.record(0, observation_mean=np.zeros(3))
    statistics: Any = {
        "observation_mean": torch.zeros(2, 2),
        "observation_variance": np.ones(4),
        "observation_count": 3,
    }
    recorder.record(5, **statistics)
    with pytest.raises(ValueError, match=r"step=4 is below 5, that of the snapshot before"):
        recorder.record(4, **statistics)
    with pytest.raises(StoreError, match=r"observation_mean=float64\[3\] is not float64\[4\]"):
        recorder.record(6, **{**statistics, "observation_mean": np.zeros(3)})
    recorder.close()
    assert TrajectoryStore(str(tmp_path)).trajectory(1).observation_variances_TO.tolist() == [[1.0] * 4]


def test_a_training_that_is_no_longer_finite_ends_with_what_was(tmp_path: Path) -> None:
    net = Net()
    recorder = open_recorder(net, tmp_path)
    recorder.record(0)
    with torch.no_grad():
        net.head.bias[1] = float("nan")
    with pytest.raises(
        StoreError, match=r"snapshot 1: head\.bias is not finite, or not in float32, after step 1; the 1 "
    ):
        recorder.record(1)
    assert TrajectoryStore(str(tmp_path)).verify(1).num_snapshots == 1


def test_the_rest_of_the_package_reads_recorded_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Linear(3, 2)
    for trial in (1, 2):
        with open_recorder(net, tmp_path, trial=trial, snapshots_per_iteration=2) as recorder:
            for step, loss, _ in train(net, trial, 12):
                recorder.record(step, loss=loss)
    store = TrajectoryStore(str(tmp_path))
    phases = snapshots_per_iteration(store.header())
    assert phases == 2
    band = load_band(str(tmp_path), 1, Question(context=3, steps=(1, 2), snapshots_per_iteration=phases))
    moved_SP = np.diff(store.trajectory(1).weights_TP.astype(np.float64), axis=0)
    np.testing.assert_allclose(band.products_SW[0], (moved_SP[:5] @ moved_SP[0]), rtol=1e-12)
    assert band.learning_rates_T.tolist() == [1.0] * 12
    assert band.contexts(np.array([4, 5]), 3).phases_B.tolist() == [0, 1]
    data = runpy.run_path(str(ROOT / "jobs" / "data.py"))["main"]
    for command in (["describe", str(tmp_path)], ["list", str(tmp_path)], ["verify", str(tmp_path)]):
        assert data(command) == 0
    said = capsys.readouterr().out
    for words in ("toy", "snapshot, step, loss, weights", "last losses", "2 trials verified: 24 snapshots"):
        assert words in said
    assert data(["export", str(tmp_path), str(tmp_path / "one.npz"), "--seeds", "1"]) == 0
    assert {*np.load(tmp_path / "one.npz")} == {"header", "snapshot", "step", "loss", "weights"}
    assert data(["export", str(tmp_path), str(tmp_path / "x.npz"), "--seeds", "1", "--columns", "env_step"]) == 1
    assert "trial 1 was recorded without env_step, so what needs that cannot be had of it" in capsys.readouterr().err


def test_what_needs_trials_of_our_own_ppo_says_so(tmp_path: Path) -> None:
    record_run(tmp_path)
    with pytest.raises(StoreError, match=r"its trials were recorded by another program \(task='toy'\), and this job"):
        data_digest(smoke(tmp_path))
    TrajectoryStore(str(tmp_path)).finish([1], 11)
    assert TrajectoryStore(str(tmp_path)).finished()
    with pytest.raises(ValueError, match=r"trial 1 was recorded without env_step and episodic_return, so what needs"):
        learning_curves(smoke(tmp_path, num_trials=3, first_seed=1))


def test_learning_rates_that_rise_from_nothing_are_shares_of_the_first_that_is_something() -> None:
    assert rate_shares(np.array([0.0, 0.5, 1.0]), 3).tolist() == [0.0, 1.0, 2.0]
    assert rate_shares(np.array([2.0, 1.0, 0.0]), 3).tolist() == [1.0, 0.5, 0.0]
    assert rate_shares(np.zeros(2), 2).tolist() == [0.0, 0.0]
    assert rate_shares(None, 2).tolist() == [1.0, 1.0]


def test_a_recorder_adds_little_to_a_plain_import() -> None:
    code = "import sys, tipl_ray; assert 'Recorder' in dir(tipl_ray); assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
