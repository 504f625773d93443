"""An episode of a recorded policy, or of a prediction of it, with its return and a video."""

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from tipl_ray.data.snapshots import Header, PartialSnapshot
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.predict.bands import load_band, snapshots_per_iteration
from tipl_ray.predict.gram import Question
from tipl_ray.predict.predictor import Combination, Predictor, combine
from tipl_ray.predict.saved import combinations, load_predictor
from tipl_ray.record.export import read_snapshot
from tipl_ray.registry import PREDICTORS
from tipl_ray.watch.policies import Act, acting
from tipl_ray.watch.rendering import Frame, make_environment, video_path, write_video

CONTEXT = 20
"""Displacements that a predictor is given that has no context of its own, where there are as many."""
FRAMES = 500
"""Frames of a video at most; the episode goes on without being drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """What came of an episode."""

    trial: int
    snapshot: int
    episode_return: float
    num_steps: int
    true_return: float | None
    """Of the true snapshot in the same episode, where a prediction was run."""
    video: Path
    num_frames: int


def watch(
    storage: str,
    trial: int,
    snapshot: int = -1,
    *,
    predictor: str | None = None,
    ahead: int = 1,
    episode_seed: int = 0,
    num_frames: int = FRAMES,
    output: Path | None = None,
) -> Watched:
    """Run one snapshot for an episode, or what a predictor forecast for it `ahead` snapshots before, and draw it.

    Raises ValueError for what cannot be run, UserError for what cannot be drawn, StoreError as
    `TrajectoryStore.trajectory` does.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} is below 1")
    store = TrajectoryStore(storage)
    header, true = store.header([trial]), read_snapshot(store, trial, snapshot)
    run = true if predictor is None else predicted(store, header, true, predictor, ahead)
    name = f"trial-{trial}-snapshot-{true.snapshot}" + (f"-predicted-{ahead}-ahead" if predictor else "")
    path = video_path(output, name)
    environment = make_environment(header.task, header.config.get("task_options", {}))
    spaces = environment.action_space, environment.observation_space
    frames: list[Frame] = []
    episode_return, num_steps = episode(environment, acting(header, run, *spaces), episode_seed, frames, num_frames)
    true_return = None
    if predictor is not None:
        true_return, _ = episode(environment, acting(header, true, *spaces), episode_seed)
    write_video(path, frames, environment.metadata.get("render_fps", 30))
    environment.close()
    return Watched(
        trial=trial,
        snapshot=true.snapshot,
        episode_return=episode_return,
        num_steps=num_steps,
        true_return=true_return,
        video=path,
        num_frames=len(frames),
    )


def episode(
    environment: gymnasium.Env, act: Act, seed: int, frames: list[Frame] | None = None, num_frames: int = 0
) -> tuple[float, int]:
    """Return and steps of one episode, whose first frames are added to a list."""
    observation, _ = environment.reset(seed=seed)
    total, steps, ended = 0.0, 0, False
    while not ended:
        if frames is not None and len(frames) < num_frames:
            frames.append(np.asarray(environment.render()))
        observation, reward, terminated, truncated, _ = environment.step(act(observation))
        total, steps, ended = total + float(reward), steps + 1, terminated or truncated
    return total, steps


def predicted(
    store: TrajectoryStore, header: Header, true: PartialSnapshot, predictor: str, ahead: int
) -> PartialSnapshot:
    """What a predictor forecasts for a snapshot from those up to `ahead` before it, whose observation statistics it
    keeps.

    Raises ValueError where that is not one of the predictor's steps, or where there are too few snapshots before.
    """
    start = true.snapshot - ahead
    if ahead < 1 or start < 2:
        raise ValueError(
            f"ahead={ahead} is not between 1 and {max(1, true.snapshot - 2)}: a forecast of snapshot {true.snapshot} "
            "needs two displacements before its start"
        )
    chosen = _predictor(predictor, Question(context=min(CONTEXT, start), steps=(ahead,), **_phases(header)))
    question = chosen.question
    if ahead not in question.steps:
        raise ValueError(f"ahead={ahead} is none of the steps of {predictor}: {', '.join(map(str, question.steps))}")
    if start < question.context:
        raise ValueError(
            f"snapshot={true.snapshot} is too early for {predictor}, which needs {question.context} displacements: the "
            f"first that it can forecast {ahead} ahead is {question.context + ahead}"
        )
    band = load_band(store.root, true.seed, question)
    coefficients_1HK = chosen.coefficients(band.contexts(np.array([start]), question.context))
    known_TP = store.weights(true.seed)[start - question.context : start + 1]
    at = question.steps.index(ahead)
    forecast_P = combine(known_TP, np.array([question.context]), coefficients_1HK[:, at : at + 1])[0, 0]
    last = read_snapshot(store, true.seed, start)
    return dataclasses.replace(last, snapshot=true.snapshot, weights=forecast_P)


def _predictor(name: str, question: Question) -> Combination:
    """A saved predictor, or one by name that needs no fitting, for this question."""
    every = {own: PREDICTORS.load(own)(question) for own in combinations()}
    # One that has numbers without a fit is of a rule, whose numbers come from a folder.
    ready = {own: one for own, one in every.items() if type(one).fit is Predictor.fit and not one.fitted}
    if name in ready:
        return ready[name]
    if name in PREDICTORS.own:
        raise ValueError(
            f"predictor={name!r} has to be fitted first; give the folder of a saved one, or of a trained model, or one "
            f"that needs no fitting: {', '.join(ready)}"
        )
    try:
        return load_predictor(name)
    except ValueError as error:
        raise ValueError(f"{error}; predictors that need no fitting are {', '.join(ready)}") from error


def _phases(header: Header) -> dict[str, Any]:
    try:
        return {"snapshots_per_iteration": snapshots_per_iteration(header)}
    except KeyError:
        return {"snapshots_per_iteration": 1}
