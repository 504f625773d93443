"""A recorded policy, run for an episode and drawn: it acts as it did in training, and the video is of that episode."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tipl_ray import Recorder
from tipl_ray.config import Ppo
from tipl_ray.data.snapshots import Header, Snapshot
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.data.trial_writer import TrialWriter
from tipl_ray.errors import UserError
from tipl_ray.ppo.engines import make_learner
from tipl_ray.ppo.networks import NetworkShape
from tipl_ray.ppo.returns import policy_returns
from tipl_ray.record.export import policy_module, read_snapshot
from tipl_ray.record.stable_baselines import RecordPolicy, load_policy
from tipl_ray.watch import rendering
from tipl_ray.watch.backends import offscreen_backend
from tipl_ray.watch.policies import acting
from tipl_ray.watch.rendering import video_path, write_video
from tipl_ray.watch.watching import episode, predicted, watch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

from data import main

KINDS: dict[str, Any] = {"PPO": PPO, "A2C": A2C, "SAC": SAC, "TD3": TD3, "DQN": DQN}


def recorded(root: Path, task: str, shape: NetworkShape, num_snapshots: int = 12, activation: str = "tanh") -> None:
    """Trial 1 of a task: weights that move along a line, as our own PPO records them."""
    header = Header(
        task=task,
        layout=shape.policy_layout,
        config={"ppo": {"num_epochs": 10, "activation": activation}, "epochs_per_snapshot": 2},
        versions={"mujoco": "4.0", "gymnasium": "1.4"},
    )
    draw = np.random.default_rng(0)
    begin_P, move_P = (draw.normal(size=shape.num_policy_weights).astype(np.float32) for _ in range(2))
    writer = TrialWriter(TrajectoryStore(str(root)), 1, header)
    for index in range(num_snapshots):
        writer.append(
            Snapshot(
                seed=1,
                snapshot=index,
                iteration=index,
                epoch=0,
                env_step=index,
                learning_rate=3e-4,
                episodic_return=None,
                weights=begin_P + np.float32(0.01 * index) * move_P,
                observation_mean=draw.normal(size=shape.observation_size) / 10,
                observation_variance=np.full(shape.observation_size, 0.5),
                observation_count=float(index + 1),
            )
        )
    writer.commit({})


def pendulum(root: Path) -> str:
    shape = NetworkShape(observation_size=4, action_size=1, policy_hidden=(8, 8), critic_hidden=(8, 8))
    recorded(root, "InvertedPendulum-v4", shape)
    return str(root)


def cart_pole(root: Path) -> str:
    shape = NetworkShape(observation_size=4, action_size=2, policy_hidden=(8, 8), critic_hidden=(8, 8), discrete=True)
    recorded(root, "CartPole-v1", shape, activation="relu")
    return str(root)


def needs_mujocos_pictures() -> None:
    try:
        offscreen_backend()
    except UserError as error:
        pytest.skip(str(error))


def test_our_own_policies_act_as_the_exported_module_does(tmp_path: Path) -> None:
    storage = pendulum(tmp_path)
    store = TrajectoryStore(storage)
    environment = gymnasium.make("InvertedPendulum-v4")
    act = acting(store.header(), read_snapshot(store, 1), environment.action_space, environment.observation_space)
    module = policy_module(storage, trial=1)
    for observation_O in np.random.default_rng(1).normal(size=(20, 4)):
        mean = module(torch.from_numpy(observation_O)[None]).mean.detach().numpy()[0]
        np.testing.assert_allclose(act(observation_O), np.clip(mean, -3, 3), rtol=1e-4, atol=1e-5)


def test_an_episodes_return_is_that_of_the_same_episode_among_many(tmp_path: Path) -> None:
    store = TrajectoryStore(pendulum(tmp_path))
    header, snapshot, environment = store.header(), read_snapshot(store, 1), gymnasium.make("InvertedPendulum-v4")
    act = acting(header, snapshot, environment.action_space, environment.observation_space)
    shape = NetworkShape(observation_size=4, action_size=1, policy_hidden=(8, 8), critic_hidden=(8, 8))
    returns_1E = policy_returns(
        "InvertedPendulum-v4",
        make_learner("torch", shape, Ppo()),
        snapshot.weights[None],
        np.array([snapshot.observation_mean]),
        np.array([snapshot.observation_variance]),
        [0, 1, 2],
    )
    assert [episode(environment, act, seed)[0] for seed in range(3)] == returns_1E[0].tolist()


@pytest.mark.parametrize("algorithm", KINDS)
@pytest.mark.parametrize("normalised", [True, False])
def test_policies_of_stable_baselines3_act_as_it_predicts(tmp_path: Path, algorithm: str, normalised: bool) -> None:
    torch.set_num_threads(1)
    task = "CartPole-v1" if algorithm == "DQN" else "Pendulum-v1"
    vector: Any = DummyVecEnv([lambda: Monitor(gymnasium.make(task))])
    vector = VecNormalize(vector) if normalised else vector
    settings: dict[str, Any] = {"learning_starts": 20, "batch_size": 8, "buffer_size": 200}
    if algorithm in ("PPO", "A2C"):
        settings = {"n_steps": 32} | ({"batch_size": 32} if algorithm == "PPO" else {})
    kwargs = {"net_arch": [6, 5], **({"activation_fn": torch.nn.ReLU} if normalised else {})}
    model = KINDS[algorithm]("MlpPolicy", vector, seed=0, device="cpu", policy_kwargs=kwargs, **settings)
    model.learn(64, callback=RecordPolicy(str(tmp_path), trial=1, steps_per_snapshot=20))
    load_policy(model, str(tmp_path), trial=1, snapshot=1)
    store, environment = TrajectoryStore(str(tmp_path)), gymnasium.make(task)
    act = acting(store.header(), read_snapshot(store, 1, 1), environment.action_space, environment.observation_space)
    for seed in range(20):
        observation_O, _ = environment.reset(seed=seed)
        seen_O = vector.normalize_obs(observation_O) if normalised else observation_O
        expected, _ = model.predict(seen_O, deterministic=True)
        np.testing.assert_allclose(act(observation_O), expected, rtol=1e-4, atol=1e-5)


def test_a_prediction_is_what_the_predictor_says_of_the_snapshots_before(tmp_path: Path) -> None:
    store = TrajectoryStore(pendulum(tmp_path))
    true = read_snapshot(store, 1, 9)
    linear = predicted(store, store.header(), true, "linear", 3)
    np.testing.assert_allclose(linear.weights, true.weights, atol=1e-5)
    copied = predicted(store, store.header(), true, "copy-last", 3)
    before = read_snapshot(store, 1, 6)
    np.testing.assert_array_equal(copied.weights, before.weights)
    # What had been observed by then is all that a forecast knows.
    np.testing.assert_array_equal(linear.observation_mean, before.observation_mean)
    for ahead in (0, 8):
        with pytest.raises(ValueError, match=f"ahead={ahead} is not between 1 and 7"):
            predicted(store, store.header(), true, "linear", ahead)
    with pytest.raises(ValueError, match=r"predictor='ridge' has to be fitted first.* no fitting: copy-last, linear, "):
        predicted(store, store.header(), true, "ridge", 1)
    with pytest.raises(ValueError, match=r"nowhere: no such folder.* that need no fitting are copy-last, linear, "):
        predicted(store, store.header(), true, "nowhere", 1)


def test_mujocos_episode_is_drawn_as_a_gif_with_its_return(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_mujocos_pictures()
    storage, output = pendulum(tmp_path / "data"), tmp_path / "pendulum.gif"
    asked = ["--predictor", "linear", "--ahead", "2", "--output", str(output)]
    assert main(["watch", storage, "1", *asked]) == 0
    said = capsys.readouterr().out
    assert "snapshot 11 of trial 1 as linear forecasts it 2 ahead: return " in said
    assert "the true snapshot in the same episode: return " in said
    store, environment = TrajectoryStore(storage), gymnasium.make("InvertedPendulum-v4")
    policy = acting(store.header(), read_snapshot(store, 1), environment.action_space, environment.observation_space)
    total, steps = episode(environment, policy, seed=0)
    assert f"in the same episode: return {total:,.1f}" in said
    with Image.open(output) as video:
        assert video.size == (480, 480)
        assert 1 <= sum(1 for _ in ImageSequence.Iterator(video)) <= steps
        assert np.asarray(video.convert("RGB")).std() > 10


def test_a_classic_task_is_drawn_as_an_mp4_where_that_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pygame", reason="gymnasium draws its classic tasks with pygame")
    storage = cart_pole(tmp_path / "data")
    suffix = ".mp4" if importlib.util.find_spec("imageio_ffmpeg") else ".gif"
    watched = watch(storage, 1, 3, num_frames=7, output=tmp_path / f"video{suffix}")
    assert watched.snapshot == 3
    assert watched.episode_return == watched.num_steps >= watched.num_frames == 7
    assert watched.video.stat().st_size > 500
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [watched.video.name]


def test_an_mp4_has_the_frames_that_it_was_given(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="mp4 needs imageio-ffmpeg")
    frames = [np.full((65, 64, 3), shade, np.uint8) for shade in range(0, 250, 25)]
    write_video(tmp_path / "a.mp4", frames, 20)
    assert ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))[0] == 10
    read = ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    assert next(read)["size"] == (64, 64)
    assert np.frombuffer(next(read), np.uint8).mean() < 10
    read.close()


def test_what_cannot_be_watched_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(4, 1)
    with Recorder(model, str(tmp_path / "own"), trial=1, task="InvertedPendulum-v4") as recorder:
        recorder.record(0)
    needs = gymnasium.make("InvertedPendulum-v4")
    store = TrajectoryStore(str(tmp_path / "own"))
    with pytest.raises(ValueError, match="InvertedPendulum-v4: a module of your own was recorded"):
        acting(store.header(), read_snapshot(store, 1), needs.action_space, needs.observation_space)
    storage = pendulum(tmp_path / "data")
    store = TrajectoryStore(storage)
    hopper = gymnasium.make("Hopper-v5")
    with pytest.raises(ValueError, match="but the policy reads 4 values"):
        acting(store.header(), read_snapshot(store, 1), hopper.action_space, hopper.observation_space)
    with pytest.raises(ValueError, match=r"output=a\.avi must end in \.mp4 or \.gif"):
        video_path(Path("a.avi"), "")
    with pytest.raises(ValueError, match="no such folder"):
        video_path(tmp_path / "none" / "a.gif", "")
    with pytest.raises(ValueError, match="num_frames=0 is below 1"):
        watch(storage, 1, num_frames=0)
    with pytest.raises(ValueError, match="task='sine' is no task of gymnasium that can be watched"):
        rendering.make_environment("sine", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert video_path(None, "episode") == Path("episode.gif")
    with pytest.raises(UserError, match=r"needs imageio-ffmpeg; pip install 'tipl_ray\[watch\]', or choose a \.gif"):
        video_path(Path("a.mp4"), "")
    monkeypatch.setenv("MUJOCO_GL", "none")
    with pytest.raises(UserError, match=r"MuJoCo cannot draw here \(MUJOCO_GL=none: .*\); install EGL"):
        offscreen_backend()
    assert main(["watch", storage, "1"]) == 1
