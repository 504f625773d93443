"""Training of a causal Transformer (Section 3.3): a loop that runs without Ray, whatever the representation.

Knows objectives; knows nothing of Ray, policies, returns or MLflow. Every step is a pure function of the state before
it and of (seed, step, worker): batches and dropout are drawn from counters, so that a resumed run goes on bit for bit
(on the CPU, with as many threads).
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from tipl_ray import config
from tipl_ray.data.storage import join, publish, read_file
from tipl_ray.digest import identity
from tipl_ray.errors import UserError
from tipl_ray.predict.blocks import Blocks
from tipl_ray.predict.models import load_model, read_model_file
from tipl_ray.predict.objective import draw_windows
from tipl_ray.predict.representation import TrainingData, representation_of

STATE_FILE, PROGRESS_FILE, HISTORY_FILE = "training.safetensors", "training.json", "history.json"

CHECKPOINT_RECORD = "training.sha256"
"""What a checkpoint's files were when it was written: name -> SHA-256."""

Metrics = dict[str, float]
"""One iteration: iteration, step, loss, validation_loss, validation_skill, learning_rate, steps_per_second,
seconds_left."""
TIMINGS = ("steps_per_second", "seconds_left")
"""Metrics that differ between two runs of the same training, and are no part of its model."""
NOT_LEARNED_FROM = ("accelerate", "improve", "sweep")
"""Sections of an experiment that no training reads."""


class TrainingError(UserError):
    """Training cannot continue: names the step and what to do."""


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
        self.objective = representation_of(experiment.basis).objective(experiment, data, device)
        self.model = self.objective.model
        for module in self.model.modules():
            if isinstance(module, Blocks):
                module.in_bfloat16 = self.config.precision == "bfloat16"
        self.best = copy.deepcopy(self.model)
        self._distributed = distribute(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=self.config.weight_decay, fused=True)
        self.step = 0
        self.history: list[Metrics] = []

    def iterations(self) -> Iterator[Metrics]:
        """Train from the current state on; yields after each iteration's validation.

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
                    f"step {self.step}: loss={loss}, validation loss={validation_loss}: the model diverged; lower "
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
        self.best.save(join(folder, "model"), self._about(), self.objective.beside())
        progress = json.dumps({"step": self.step, "history": self.history}).encode()
        publish(folder, {STATE_FILE: safetensors.torch.save(tensors), PROGRESS_FILE: progress}, CHECKPOINT_RECORD)

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
        """What model.json has besides the model: the same for every run of this training, wherever it runs."""
        made_by = {part: of for part, of in identity(self.experiment).items() if part not in NOT_LEARNED_FROM}
        made_by["train"].pop("data")  # wherever the data sets are, their digest is known
        best = min(self.history, key=lambda row: row["validation_loss"], default={})
        return {
            "experiment": {"name": self.experiment.name, **made_by},
            "basis": identity(self.experiment.basis),
            **self.objective.about(),
            "metrics": {name: value for name, value in best.items() if name not in TIMINGS},
        }


def load_history(folder: str) -> list[Metrics]:
    """Every iteration's metrics of a trained model. Raises StoreError if there is none, or it is damaged."""
    return json.loads(read_model_file(folder, HISTORY_FILE))


def progress_line(metrics: Metrics, num_steps: int) -> str:
    """One iteration in one line."""
    minutes, seconds = divmod(round(metrics["seconds_left"]), 60)
    return (
        f"step {metrics['step']:,} of {num_steps:,}: loss {metrics['loss']:.4f}, "
        f"validation loss {metrics['validation_loss']:.4f}, skill one step ahead {metrics['validation_skill']:.3f}, "
        f"{metrics['steps_per_second']:.1f} steps/s, {minutes} min {seconds:02d} s left"
    )
