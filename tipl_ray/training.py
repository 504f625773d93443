"""Training of a causal Transformer (Section 3.3): a loop that works alone, and the shell that gives it to Ray Train.

Knows objectives and Ray; knows nothing of policies, returns or MLflow. Ray is initialised by the caller.

    <storage>/training/<run digest>/    Ray Train's own: the last two checkpoints
    <storage>/models/<run digest>/      the best model by validation loss: model.safetensors, history.json, model.json

Every step is a pure function of the state before it and of (seed, step, worker): batches and dropout are drawn from
counters, so that a resumed run goes on bit for bit (on the CPU, with as many threads).
"""

import copy
import dataclasses
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from ray.util.queue import Queue
from torch import Tensor, nn

from tipl_ray import config
from tipl_ray.gram import GramBand, Question
from tipl_ray.model import BASIS_FILE, is_complete, load_about, load_model
from tipl_ray.objectives import TrainingData, gather_trials, make_objective
from tipl_ray.resources import require_resources
from tipl_ray.segments import Tokens, draw_windows, load_band, load_tokens
from tipl_ray.storage import Storage, StoreError, file_exists, join, read_file, write_file
from tipl_ray.temporal_svd import FittedBasis, fit_shared_basis
from tipl_ray.trajectory_store import TrajectoryStore

STATE_FILE, PROGRESS_FILE, HISTORY_FILE = "training.safetensors", "training.json", "history.json"
POLL_SECONDS, ABORT_SECONDS = 0.5, 60.0

Metrics = dict[str, float]
"""One iteration: iteration, step, loss, validation_loss, validation_skill, learning_rate, steps_per_second,
seconds_left."""


class TrainingError(config.UserError):
    """Training cannot go on: names the step and the way out."""


class Training:
    """One worker's share of a training run: a generator of metrics, with a state to save and restore."""

    def __init__(
        self,
        experiment: config.Experiment,
        data: TrainingData,
        *,
        device: torch.device | str = "cpu",
        rank: int = 0,
        num_workers: int = 1,
        distribute: Callable[[nn.Module], nn.Module] = lambda model: model,
    ):
        self.experiment, self.config = experiment, experiment.train
        self.device, self.rank, self.num_workers = device, rank, num_workers
        torch.manual_seed(self.config.seed)
        self.objective = make_objective(experiment, data, device)
        self._shared = data.shared
        self.model = self.objective.model
        self.model.blocks.in_bfloat16 = self.config.precision == "bfloat16"
        self.best = copy.deepcopy(self.model)
        self._distributed = distribute(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=self.config.weight_decay, fused=True)
        self.step = 0
        self.history: list[Metrics] = []

    def iterations(self) -> Iterator[Metrics]:
        """Train on from where the state stands; yields after each iteration's validation.

        Raises TrainingError if the loss is no longer finite.
        """
        while self.step < self.config.num_steps:
            started, first = time.perf_counter(), self.step
            per_iteration = self.config.steps_per_iteration
            loss = self.train_until(min((first // per_iteration + 1) * per_iteration, self.config.num_steps))
            steps_per_second = (self.step - first) / (time.perf_counter() - started)
            validation_loss, validation_skill = self.objective.validate()
            if not np.isfinite([loss, validation_loss]).all():
                raise TrainingError(
                    f"step {self.step}: loss={loss}, validation loss={validation_loss}: the model has diverged; lower "
                    f"train.learning_rate={self.config.learning_rate} or train.max_gradient_norm"
                )
            if validation_loss < min((row["validation_loss"] for row in self.history), default=np.inf):
                self.best.load_state_dict(self.model.state_dict())
            self.history.append(
                {
                    "iteration": -(-self.step // per_iteration),
                    "step": self.step,
                    "loss": loss,
                    "validation_loss": validation_loss,
                    "validation_skill": validation_skill,
                    "learning_rate": self._learning_rate(self.step - 1),
                    "steps_per_second": steps_per_second,
                    "seconds_left": (self.config.num_steps - self.step) / steps_per_second,
                }
            )
            yield self.history[-1]

    def save(self, folder: str) -> None:
        """Checkpoint: everything that the next step depends on, and the best model so far in `model/`."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_file(folder, STATE_FILE, safetensors.torch.save(tensors))
        write_file(folder, PROGRESS_FILE, json.dumps({"step": self.step, "history": self.history}).encode())
        if self._shared:
            write_file(join(folder, "model"), BASIS_FILE, self._shared.to_bytes())
        self.best.save(join(folder, "model"), self._about())

    def restore(self, folder: str) -> None:
        """Go on from the checkpoint that `save` wrote."""
        progress = json.loads(read_file(folder, PROGRESS_FILE))
        self.step, self.history = progress["step"], progress["history"]
        tensors = safetensors.torch.load(read_file(folder, STATE_FILE))
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.best.load_state_dict(load_model(join(folder, "model")).state_dict())

    def train_until(self, step: int) -> float:
        """Train on up to a step; the mean loss over the steps taken, of all workers."""
        self.model.train()
        first, loss_sum = self.step, torch.zeros((), dtype=torch.float64, device=self.device)
        while self.step < step:
            loss_sum += self._train_step()
        if self.num_workers > 1:
            torch.distributed.all_reduce(loss_sum)
        return loss_sum.item() / (step - first) / self.num_workers

    def _train_step(self) -> Tensor:
        # Seeded anew at every step, dropout needs no state in the checkpoint, on whatever device it is drawn.
        entropy = np.random.SeedSequence((self.config.seed, self.step, self.rank))
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        windows_B = draw_windows(
            self.objective.chances,
            self.step,
            self.config.batch_size,
            self.config.seed,
            self.rank,
            self.num_workers,
        )
        loss = self.objective.loss(self._distributed, windows_B)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _learning_rate(self, step: int) -> float:
        warmed = self.config.learning_rate * min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        if self.config.schedule == "constant":
            return warmed
        return warmed * 0.5 * (1.0 + math.cos(math.pi * step / self.config.num_steps))

    def _about(self) -> dict[str, Any]:
        return {
            "experiment": config.as_table(self.experiment),
            "basis": config.as_table(self.experiment.basis),
            **self.objective.about(),
            "metrics": min(self.history, key=lambda row: row["validation_loss"], default=None),
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """One data set that a model is trained on."""

    storage: str
    seeds: tuple[int, ...]
    split: config.Split

    @property
    def digest(self) -> str:
        """See `TrajectoryStore.digest`."""
        return TrajectoryStore(self.storage).digest(self.seeds)

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Seeds to train, to choose and to report, without the trials that diverged.

        Where a trial stands in the split does not depend on what became of others. Raises StoreError where trials to
        train or to choose by are all gone.
        """
        store, parts = TrajectoryStore(self.storage), []
        for use, seeds in zip(("train on", "choose by", "report on"), self.split.cut(self.seeds), strict=True):
            parts.append(store.sound(seeds))
            if seeds and not parts[-1]:
                raise StoreError(
                    f"{self.storage}: all {len(seeds)} trials to {use} diverged; collect with a lower "
                    "ppo.learning_rate, or give more trials to that part of the split"
                )
        return tuple(parts)

    @property
    def task(self) -> str:
        """Gymnasium id of its task."""
        return TrajectoryStore(self.storage).header(self.seeds[:1]).task


def data_sets(experiment: config.Experiment) -> tuple[DataSet, ...]:
    """What the experiment's model is trained on: its own data set, or those that `train.data` names.

    Raises StoreError for one of these that is not complete, ValueError for one that does not fit the experiment.
    """
    if not experiment.train.data:
        return (DataSet(storage=experiment.storage_path, seeds=experiment.collect.seeds, split=experiment.split),)
    found = []
    for storage in map(config.absolute_storage, experiment.train.data):
        store = TrajectoryStore(storage)
        if not store.finished():
            raise StoreError(f"{storage}: train.data names it, and no complete data set is there; collect it first")
        made = store.header().config
        phases = made["ppo"]["num_epochs"] // made["epochs_per_snapshot"]
        if phases != experiment.snapshots_per_iteration:
            raise ValueError(
                f"{storage}: {phases} snapshots per PPO iteration do not fit the experiment's "
                f"{experiment.snapshots_per_iteration}"
            )
        found.append(DataSet(storage=storage, seeds=store.seeds(), split=experiment.split))
        if not experiment.split.cut(store.seeds())[0]:
            raise ValueError(
                f"{storage}: split.validation_trials={experiment.split.validation_trials} and split.test_trials="
                f"{experiment.split.test_trials} leave none of its {len(store.seeds())} trials to train on"
            )
    return tuple(found)


def training_digest(experiment: config.Experiment) -> str:
    """Digest of the data that the experiment's model is trained on. Raises as `data_sets` does."""
    digests = [one.digest for one in data_sets(experiment)]
    return digests[0] if len(digests) == 1 else config.digest(*digests)


def run_digest(experiment: config.Experiment, data_digest: str) -> str:
    """What a trained model depends on, and nothing that only says where it is trained."""
    schedule = config.as_table(experiment.train)
    # The data sets, wherever they lie, are known by their digest.
    for field in ("num_workers", "use_gpu", "num_seeds", "data"):
        del schedule[field]
    if experiment.basis.kind != "window":
        del schedule["joined_windows"]
    # On the basis `window` all forward steps are learned at once; elsewhere one, whatever is asked of it later.
    steps = experiment.evaluate.steps if experiment.basis.kind == "window" else ()
    return config.digest(data_digest, experiment.basis, experiment.split, experiment.model, schedule, steps)


def model_folder(experiment: config.Experiment, data_digest: str) -> str:
    """Where `train` leaves the model of this experiment and data."""
    return join(experiment.storage_path, "models", run_digest(experiment, data_digest))


def load_history(folder: str) -> list[Metrics]:
    """Every iteration's metrics of a trained model. Raises FileNotFoundError if there is none."""
    return json.loads(read_file(folder, HISTORY_FILE))


def progress_line(metrics: Metrics, num_steps: int) -> str:
    """One iteration in one line."""
    minutes, seconds = divmod(round(metrics["seconds_left"]), 60)
    return (
        f"step {metrics['step']:,} of {num_steps:,}: loss {metrics['loss']:.4f}, "
        f"validation {metrics['validation_loss']:.4f}, one-step skill {metrics['validation_skill']:.3f}, "
        f"{metrics['steps_per_second']:.1f} steps/s, {minutes} min {seconds:02d} s left"
    )


def train(
    experiment: config.Experiment,
    data_digest: str,
    *,
    on_metrics: Callable[[Metrics], None] = lambda metrics: None,
    say: Callable[[str], None] = print,
) -> str:
    """Train the causal Transformer (Section 3.3) on the experiment's data set; the folder of the trained model.

    Goes on where an interrupted run stopped; a finished one is found and nothing is done. `on_metrics` is called in
    the caller's thread, once per iteration of this run (`load_history` has those of interrupted runs too), `say` with
    one line for each; an exception out of either ends the run. Raises StoreError or ValueError for data that cannot be
    used, Ray Train's TrainingFailedError with its cause where a worker failed for good.
    """
    folder = model_folder(experiment, data_digest)
    if is_complete(folder):
        say(f"found the trained model {folder}")
        return folder

    def on_row(metrics: Metrics) -> None:
        on_metrics(metrics)
        say(progress_line(metrics, experiment.train.num_steps))

    checkpoint = _run(experiment, run_digest(experiment, data_digest), on_row)
    with checkpoint.as_directory() as checkpoint_folder:
        publish(checkpoint_folder, folder, experiment, data_digest)
    return folder


def publish(checkpoint_folder: str, folder: str, experiment: config.Experiment, data_digest: str) -> None:
    """Put the best model of a training that has ended where `model_folder` says, its history beside it."""
    history = json.loads(read_file(checkpoint_folder, PROGRESS_FILE))["history"]
    write_file(folder, HISTORY_FILE, json.dumps(history, indent=1).encode())
    about = load_about(f"{checkpoint_folder}/model") | {"data_digest": data_digest}
    about["trained_on"] = "+".join(dict.fromkeys(one.task for one in data_sets(experiment)))
    if file_exists(f"{checkpoint_folder}/model", BASIS_FILE):
        write_file(folder, BASIS_FILE, read_file(f"{checkpoint_folder}/model", BASIS_FILE))
    load_model(f"{checkpoint_folder}/model").save(folder, about)


def train_loop(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs: `Training` with a checkpoint after every iteration."""
    torch.set_num_threads(settings["num_threads"])
    training = worker_training(config.from_table(settings["experiment"]), ray.get(settings["data"]))
    resumed = ray.train.get_checkpoint()
    if resumed is not None:
        with resumed.as_directory() as folder:
            training.restore(folder)
    for metrics in training.iterations():
        if training.rank:
            ray.train.report(metrics)
            continue
        with tempfile.TemporaryDirectory() as folder:
            training.save(folder)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        settings["queue"].put(metrics)


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


def require_workers(experiment: config.Experiment) -> None:
    """Refuse workers that the cluster can never have. Raises ValueError."""
    settings = experiment.train
    counted = f"train.num_workers={settings.num_workers}"
    needs = {"CPU": (1.0, counted), "GPU": (float(settings.use_gpu), "train.use_gpu=True")}
    require_resources(needs, "worker", settings.num_workers, counted)


def _run(experiment: config.Experiment, name: str, on_row: Callable[[Metrics], None]) -> ray.train.Checkpoint:
    """Reduce, train to the end, hand on the rows as they come; the last checkpoint.

    The trainer runs in a Ray task. Here it would replace the handler of Ctrl-C for good, with one that ends the process
    as if all were well; and a task can be cancelled, so that nothing trains on behind a caller who has gone on.
    """
    require_workers(experiment)
    queue = Queue(actor_options={"num_cpus": 0})
    data = ray.put(load_trials(experiment))
    settings = {"experiment": config.as_table(experiment), "data": data, "queue": queue}
    task = ray.remote(num_cpus=0, max_retries=3)(_fit).remote(settings, experiment, name)
    try:
        finished: list[ray.ObjectRef] = []
        while not finished:
            finished, _ = ray.wait([task], timeout=POLL_SECONDS)
            for metrics in queue.get_nowait_batch(queue.qsize()):
                on_row(metrics)
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        # Not by force: interrupted, Ray Train stops its workers and gives their CPUs back; killed, it keeps them.
        ray.cancel(task)
        ray.wait([task], timeout=ABORT_SECONDS)
        queue.shutdown(force=True)


def load_trials(experiment: config.Experiment) -> TrainingData:
    """All trials but the test trials, reduced in parallel, one Ray task per trial."""
    reduce = ray.remote(num_cpus=1)(_load_trial)
    sets = data_sets(experiment)
    shared: Any = None
    if experiment.basis.kind == "shared":
        shared = ray.remote(num_cpus=1)(_fit_shared_basis).remote(experiment)
    parts = [one.parts for one in sets]
    halves = [
        [[(one.storage, seed) for seed in part[half]] for one, part in zip(sets, parts, strict=True)] for half in (0, 1)
    ]
    sent = [[[reduce.remote(experiment, *trial, shared) for trial in trials] for trials in half] for half in halves]
    try:
        train, validation = ([ray.get(trials) for trials in half] for half in sent)
        fitted = ray.get(shared) if shared else None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return TrainingData(train=gather_trials(train), validation=gather_trials(validation), shared=fitted)


def _fit_shared_basis(experiment: config.Experiment) -> FittedBasis:
    store, basis = TrajectoryStore(experiment.storage_path), experiment.basis
    seeds = store.sound(experiment.train_seeds)
    return fit_shared_basis([store.weights(seed) for seed in seeds], basis.rank, basis.centred)


def _load_trial(
    experiment: config.Experiment, storage: str, seed: int, shared: FittedBasis | None
) -> Tokens | GramBand:
    if experiment.basis.kind == "window":
        return load_band(storage, seed, Question.of(experiment))
    return load_tokens(TrajectoryStore(storage), (seed,), experiment.basis, shared)


def _fit(settings: dict[str, Any], experiment: config.Experiment, name: str) -> ray.train.Checkpoint:
    """What the Ray task runs."""
    use_gpu = experiment.train.use_gpu
    # The model on the basis `window` gains little by a second thread, and loses all where that has to wait for its CPU.
    one_thread = use_gpu or experiment.basis.kind == "window"
    num_threads = 1 if one_thread else _cpus_per_worker(experiment.train.num_workers)
    settings = {**settings, "num_threads": num_threads}
    checkpoint = make_trainer(train_loop, settings, experiment, name, num_threads, float(use_gpu)).fit().checkpoint
    assert checkpoint is not None, "every iteration reports a checkpoint"
    return checkpoint


def make_trainer(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    experiment: config.Experiment,
    name: str,
    cpus_per_worker: int,
    gpus_per_worker: float,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> ray.train.torch.TorchTrainer:
    """Ray Train over a loop: built again under the same name and path, it goes on from the last checkpoint."""
    # A report waits until the controller has looked after the one before, by default every two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    # Ray would find the folder, and endpoints that the environment names, by itself; all endpoints only we know.
    filesystem, path = Storage(join(experiment.storage_path, "training")).filesystem
    return ray.train.torch.TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=experiment.train.num_workers,
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


def _cpus_per_worker(num_workers: int) -> int:
    """Most CPUs that each worker can have on the cluster as it is; 1 where it still has to grow."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = [cpus for cpus in range(1, max(nodes) + 1) if sum(node // cpus for node in nodes) >= num_workers]
    return max(fitting, default=1)
