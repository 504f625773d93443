"""The shell that gives a training to Ray Train, and what it leaves in the storage.

    <storage>/training/<run digest>/    checkpoints as Ray Train keeps them, the last two of each start
    <storage>/models/<run digest>/      the best model by validation loss: model.safetensors, history.json, model.json

Ray is initialised by the caller.
"""

import contextlib
import errno
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.train.torch
import safetensors.torch
import torch
from ray.util.queue import Queue

from tipl_ray import config
from tipl_ray.data.storage import Storage, StoreError, join, read_file, read_published
from tipl_ray.digest import as_table
from tipl_ray.errors import UserError
from tipl_ray.experiments import from_table
from tipl_ray.predict.model_files import is_complete
from tipl_ray.predict.models import files_beside, load_about, load_model, read_model_file
from tipl_ray.predict.representation import TrainingData, representation_of
from tipl_ray.train.data_sets import data_sets, model_folder, run_digest
from tipl_ray.train.reading import POLL_SECONDS, load_trials
from tipl_ray.train.training import (
    CHECKPOINT_RECORD,
    HISTORY_FILE,
    PROGRESS_FILE,
    STATE_FILE,
    Metrics,
    Training,
    TrainingError,
    progress_line,
)
from tipl_ray.train.workers import cpus_of_each, require_workers

RECORD_FILE = "checkpoint_manager_snapshot.json"
"""Where Ray Train records which checkpoints there are."""
ABORT_SECONDS = 60.0


def train(
    experiment: config.Experiment,
    data_digest: str,
    *,
    on_metrics: Callable[[Metrics], None] = lambda metrics: None,
    on_phase: Callable[[str], None] = lambda phase: None,
    say: Callable[[str], None] = print,
) -> str:
    """Train the causal Transformer (Section 3.3) on the experiment's data set; the folder of the trained model.

    Continues where an interrupted run stopped; a finished one is found and nothing is done. `on_metrics` is called in
    the caller's thread, once per iteration of this run (`load_history` has those of interrupted runs too), `say` with
    one line for each; `on_phase` is called about twice a second with what is being done. An exception out of any of
    them ends the run. Raises StoreError or ValueError for data that cannot be used, StoreError where checkpoints cannot
    be written, TrainingError for a model that diverges, Ray Train's TrainingFailedError where a worker failed for good.
    """
    folder = model_folder(experiment, data_digest)
    if is_complete(folder):
        load_model(folder)  # refuses a damaged one
        say(f"already trained, model in {folder}")
        return folder

    def on_row(metrics: Metrics) -> None:
        on_metrics(metrics)
        say(progress_line(metrics, experiment.train.num_steps))

    name = run_digest(experiment, data_digest)
    kept = join(experiment.storage_path, "training", name)
    with _explained(kept):
        checkpoint, step = _resumed(kept, say)
    if checkpoint is None or step < experiment.train.num_steps:
        checkpoint = _run(experiment, name, checkpoint, on_row, on_phase)
    with checkpoint.as_directory() as checkpoint_folder:
        publish_model(checkpoint_folder, folder, experiment, data_digest)
    return folder


def publish_model(checkpoint_folder: str, folder: str, experiment: config.Experiment, data_digest: str) -> None:
    """Put the best model of a finished training and its history into `model_folder`."""
    history = json.loads(read_file(checkpoint_folder, PROGRESS_FILE))["history"]
    beside = {HISTORY_FILE: json.dumps(history, indent=1).encode()}
    about = load_about(f"{checkpoint_folder}/model") | {"data_digest": data_digest}
    about["trained_on"] = "+".join(dict.fromkeys(one.task for one in data_sets(experiment)))
    trained = f"{checkpoint_folder}/model"
    beside |= {name: read_model_file(trained, name) for name in files_beside(trained)}
    load_model(trained).save(folder, about, beside)


def _step_of(folder: str) -> int | None:
    """The step of the checkpoint in a folder; None where it is not what was written, or not all of it."""
    try:
        load_model(join(folder, "model"))
        safetensors.torch.load(read_published(folder, STATE_FILE, CHECKPOINT_RECORD, ""))
        return int(json.loads(read_published(folder, PROGRESS_FILE, CHECKPOINT_RECORD, ""))["step"])
    except (StoreError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
        return None


def _resumed(folder: str, say: Callable[[str], None]) -> tuple[ray.train.Checkpoint | None, int]:
    """The newest whole checkpoint that earlier starts of a training have left, and its step; None and 0 without one.

    Everything else that they left is deleted, Ray Train's own record of it first: it is believed without being looked
    at, so that a training whose record or last checkpoint is damaged would end there at every further start.
    """
    files = Storage(folder)
    names = [name for name in files.folders() if name.startswith("checkpoint_")]
    steps = {name: _step_of(join(folder, name)) for name in names}
    whole = [(step, name) for name, step in steps.items() if step is not None]
    step, newest = max(whole, default=(0, None))
    damaged = [name for name, found in steps.items() if found is None]
    if damaged:
        go_on = f"continuing from step {step:,}" if newest else "there is no other, so training starts over"
        say(f"{', '.join(damaged)} in {folder}: incomplete; {go_on}")
    elif newest:
        say(f"continuing from step {step:,}")
    filesystem, path = files.filesystem
    if files.exists(RECORD_FILE):
        filesystem.delete_file(f"{path}/{RECORD_FILE}")
    for name in set(names) - {newest}:
        filesystem.delete_dir(f"{path}/{name}")
    return ray.train.Checkpoint(f"{path}/{newest}", filesystem) if newest else None, step


@contextlib.contextmanager
def _explained(folder: str) -> Iterator[None]:
    """The cause of Ray Train's failure, if a user can fix it, in place of Ray Train's own exception."""
    try:
        yield
    except (OSError, ray.train.TrainingFailedError) as error:
        failures = [error, getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
        for failure in failures:
            if isinstance(failure, UserError | ValueError):
                raise failure from error
            if isinstance(failure, OSError) and not isinstance(failure, ConnectionError):
                full = failure.errno in (errno.ENOSPC, errno.EDQUOT)
                raise StoreError(
                    f"{folder}: checkpoints cannot be written: {'the disk is full' if full else failure}. Free some "
                    "space or fix permissions, then run again to continue from the last checkpoint"
                ) from error
        raise


def train_loop(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs: `Training` with a checkpoint after every iteration."""
    torch.set_num_threads(settings["num_threads"])
    training = worker_training(from_table(settings["experiment"]), ray.get(settings["data"]))
    # Ray Train knows of none until this start has made one.
    resumed = ray.train.get_checkpoint() or settings["checkpoint"]
    if resumed is not None:
        with resumed.as_directory() as folder:
            training.restore(folder)
    if not training.rank:
        first = min(training.config.steps_per_iteration, training.config.num_steps)
        settings["queue"].put(f"training, first result after {first:,} steps")
    try:
        for metrics in training.iterations():
            if training.rank:
                ray.train.report(metrics)
                continue
            with tempfile.TemporaryDirectory() as folder:
                training.save(folder)
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
            settings["queue"].put(metrics)
    except TrainingError as error:
        # Raised, it would be taken for a lost worker's, and tried again to the same end.
        if not training.rank:
            settings["queue"].put(error)


def worker_training(experiment: config.Experiment, data: TrainingData) -> Training:
    """The share of the Ray Train worker that asks."""
    # Ray Train tells the root logger of every report, whatever its own level: one line per worker and iteration.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray.train.get_context()
    num_workers = context.get_world_size()
    return Training(
        experiment,
        data,
        device=ray.train.torch.get_device(),
        rank=context.get_world_rank(),
        num_workers=num_workers,
        distribute=ray.train.torch.prepare_model if num_workers > 1 else lambda model: model,
    )


def _run(
    experiment: config.Experiment,
    name: str,
    checkpoint: ray.train.Checkpoint | None,
    on_row: Callable[[Metrics], None],
    on_phase: Callable[[str], None],
) -> ray.train.Checkpoint:
    """Reduce, train from a checkpoint to the end, hand on the rows as they come; the last checkpoint.

    The trainer runs in a Ray task. Here it would replace the handler of Ctrl-C for good, with one that ends the process
    as if all were well; and a task can be cancelled, so that nothing trains on behind a caller who has gone on.
    """
    require_workers(experiment)
    data = ray.put(load_trials(experiment, on_phase))
    num_workers = experiment.where.num_workers
    phase = f"starting {num_workers} Ray Train worker{'s' if num_workers > 1 else ''}"
    on_phase(phase)
    queue = Queue(actor_options={"num_cpus": 0})
    settings = {"experiment": as_table(experiment), "data": data, "checkpoint": checkpoint, "queue": queue}
    task = ray.remote(num_cpus=0, max_retries=3)(_fit).remote(settings, experiment, name)
    try:
        finished: list[ray.ObjectRef] = []
        while not finished:
            finished, _ = ray.wait([task], timeout=POLL_SECONDS)
            for told in queue.get_nowait_batch(queue.qsize()):
                if isinstance(told, TrainingError):
                    raise told
                if isinstance(told, str):
                    phase = told
                else:
                    phase = ""
                    on_row(told)
            if phase:
                on_phase(phase)
        with _explained(join(experiment.storage_path, "training", name)):
            try:
                last = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
        assert last is not None, "every iteration reports a checkpoint"
        return last
    finally:
        # Not by force: interrupted, Ray Train stops its workers and gives their CPUs back; killed, it keeps them.
        ray.cancel(task)
        ray.wait([task], timeout=ABORT_SECONDS)
        queue.shutdown(force=True)


def _fit(settings: dict[str, Any], experiment: config.Experiment, name: str) -> ray.train.Checkpoint | None:
    """What the Ray task runs; None where the model diverged before its first checkpoint."""
    use_gpu = experiment.where.use_gpu
    # A small model gains little by a second thread, and loses all where that has to wait for its CPU.
    one_thread = use_gpu or representation_of(experiment.basis).one_thread
    num_threads = 1 if one_thread else cpus_of_each(experiment.where.num_workers)
    settings = {**settings, "num_threads": num_threads}
    return make_trainer(train_loop, settings, experiment, name, num_threads, float(use_gpu)).fit().checkpoint


def make_trainer(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    experiment: config.Experiment,
    name: str,
    cpus_per_worker: int,
    gpus_per_worker: float,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> ray.train.torch.TorchTrainer:
    """Ray Train over a loop: built again under the same name and path, it continues from the last checkpoint."""
    # A report waits until the controller has looked after the one before, by default every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    # Ray would find the folder, and endpoints that the environment names, by itself; all endpoints only we know.
    filesystem, path = Storage(join(experiment.storage_path, "training")).filesystem
    return ray.train.torch.TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=experiment.where.num_workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker={"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Train v1
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=list(callbacks),  # type: ignore[arg-type]
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
