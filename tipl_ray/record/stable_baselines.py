"""stable-baselines3's trainings as trials of the data set: a callback for `learn`, and legs that can be resumed.

The one place that imports stable-baselines3, an optional dependency: `pip install tipl_ray[stable-baselines3]`.
"""

import math
import shutil
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tipl_ray.data.snapshots import PartialSnapshot
from tipl_ray.data.storage import TEMPORARY, StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.errors import UserError
from tipl_ray.record.export import load_module
from tipl_ray.record.recorder import Recorder

try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback, CallbackList
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.vec_env import VecNormalize
except ImportError as error:
    raise UserError(
        f"stable-baselines3 cannot be imported ({error}); install it: pip install 'tipl_ray[stable-baselines3]'"
    ) from error

CRITIC = ("value_net.*", "mlp_extractor.value_net.*", "vf_features_extractor.*", "critic.*", "lstm_critic.*")
"""Names in an actor-critic policy of what does not act."""
OFF_POLICY_STEPS = 1000
"""Environment steps between two snapshots of an algorithm without updates that a snapshot could follow."""
SETTINGS = (
    *("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm", "tau"),
    *("buffer_size", "learning_starts", "gradient_steps", "policy_delay", "target_policy_noise", "target_entropy"),
)
"""Settings of an algorithm that are recorded with its trials, where it has them as plain values."""

_AT_WORK: weakref.WeakValueDictionary[tuple[str, int], "RecordPolicy"] = weakref.WeakValueDictionary()
"""Who records which trial in this process."""


def epochs_per_iteration(model: BaseAlgorithm, every: int) -> int:
    """How often `every` update epochs go into an iteration. Raises ValueError where they have no equal number."""
    if not isinstance(model, PPO):
        raise ValueError(f"epochs_per_snapshot={every}: {type(model).__name__} has no update epochs; leave it out")
    if model.target_kl is not None:
        raise ValueError(
            f"target_kl={model.target_kl} ends updates early, so that iterations have no phases of equal number; "
            "leave epochs_per_snapshot out"
        )
    if model.n_epochs % every:
        raise ValueError(f"epochs_per_snapshot={every} does not divide n_epochs={model.n_epochs}")
    return model.n_epochs // every


class UpdateEpochs:
    """Calls back after every few of PPO's update epochs, with their number; the rollout is still in its buffer."""

    def __init__(self, model: Any, every: int, then: Callable[[int], None]):
        """Begin. Raises ValueError as `epochs_per_iteration` does."""
        epochs_per_iteration(model, every)
        self._every, self._then, self._steps = every, then, 0
        self._per_epoch = math.ceil(model.n_steps * model.n_envs / model.batch_size)
        self._hook = model.policy.optimizer.register_step_post_hook(self._after_step)

    def begin(self) -> None:
        """Count from 0: a rollout has ended."""
        self._steps = 0

    def stop(self) -> None:
        """Call back no more."""
        self._hook.remove()

    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        epoch, rest = divmod(self._steps, self._per_epoch)
        if not rest and epoch % self._every == 0:
            self._then(epoch)


class RecordPolicy(BaseCallback):
    """Records the policy of a model while it learns: `model.learn(100_000, callback=RecordPolicy("storage", trial=1))`.

    Recorded is what acts: of PPO and A2C the policy without its critic, of SAC, TD3 and DDPG the actor, of DQN the Q
    network. With it come the environment steps, the learning rate, the mean return of the latest episodes (the model's
    `ep_info_buffer`) and the observation statistics of a VecNormalize. PPO and A2C give one snapshot an update or, with
    `steps_per_snapshot`, one at the end of the first update past each multiple of so many steps; PPO with
    `epochs_per_snapshot` one after so many of its update epochs, which gives its trials phases. Algorithms with a
    replay buffer give one every `steps_per_snapshot` environment steps, by default 1,000, from their first update on.
    """

    def __init__(
        self,
        storage: str,
        *,
        trial: int,
        task: str | None = None,
        steps_per_snapshot: int | None = None,
        epochs_per_snapshot: int | None = None,
        **recorder: Any,
    ):
        """Where to record; `task` is by default the environment's id, `recorder` whatever else `Recorder` takes.

        Raises ValueError for settings without meaning.
        """
        super().__init__()
        for name, value in (("steps_per_snapshot", steps_per_snapshot), ("epochs_per_snapshot", epochs_per_snapshot)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1")
        if steps_per_snapshot and epochs_per_snapshot:
            raise ValueError("steps_per_snapshot and epochs_per_snapshot are mutually exclusive; leave one out")
        self._storage, self._trial, self._task, self._settings = storage, trial, task, recorder
        self._every, self._epochs = steps_per_snapshot, epochs_per_snapshot
        self._recorder: Recorder | None = None
        self._last_step: int | None = None
        self._last_updates = -1
        self._counted: UpdateEpochs | None = None

    def _on_training_start(self) -> None:
        """Open the trial where the model is: behind the snapshots up to its number of steps.

        Raises ValueError for an algorithm or environment that this cannot record, StoreError as `Recorder` does, and
        where snapshots up to the model's steps were never committed.
        """
        # A `learn` that was interrupted never said that it ended, and may be kept alive by its traceback.
        _AT_WORK.get((self._storage, self._trial), self)._abandon()
        self._abandon()
        model = self.model
        if isinstance(model, OffPolicyAlgorithm) and not self._every:
            self._every = OFF_POLICY_STEPS
        module, leave_out = acting_part(model)
        self._recorder = Recorder(
            module,
            self._storage,
            trial=self._trial,
            task=self._task or _task_of(model),
            snapshots_per_iteration=epochs_per_iteration(model, self._epochs) if self._epochs else 1,
            config={**_described(model), **self._settings.get("config", {})},
            leave_out=leave_out,
            **{name: value for name, value in self._settings.items() if name != "config"},
        )
        _AT_WORK[self._storage, self._trial] = self
        self._go_on(model.num_timesteps)
        if self._epochs:
            self._counted = UpdateEpochs(model, self._epochs, lambda epoch: self._record(epoch=epoch))

    def _on_rollout_start(self) -> None:
        self._record_if_due()

    def _on_rollout_end(self) -> None:
        if self._counted:
            self._counted.begin()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._record_if_due()
        if self._recorder:
            self._recorder.close()
        self._abandon()

    def _abandon(self) -> None:
        if self._counted:
            self._counted.stop()
        if self._recorder:
            self._recorder.abandon()
        self._recorder = self._counted = None

    def _go_on(self, steps: int) -> None:
        """Take up the trial behind the snapshots up to a number of steps, none where the model begins."""
        recorder = self._recorder
        assert recorder is not None, "the trial was opened"
        index, self._last_step, self._last_updates = 0, None, -1
        if steps and recorder.num_committed:
            steps_T = TrajectoryStore(self._storage).trajectory(self._trial, ["step"]).steps_T
            index = int(np.searchsorted(steps_T, steps, side="right"))
        if index:
            self._last_step, self._last_updates = int(steps_T[index - 1]), self.model._n_updates
            apart = max(self._every or 0, _rollout_steps(self.model))
            lost = self.model._n_updates > 0 and steps - self._last_step > 2 * apart
            if lost and index == recorder.num_committed:
                raise StoreError(
                    f"{self._storage}: the model has done {steps} steps, and the last snapshot of trial {self._trial} "
                    f"is of step {self._last_step}: those between were not committed. Go on from a model that was "
                    "saved when `learn` had ended, or record another trial"
                )
        recorder.load_state_dict({"snapshot": index, "step": self._last_step or 0})

    def _record_if_due(self) -> None:
        steps, last, every = self.model.num_timesteps, self._last_step, self._every
        if last is None:
            self._record()
        elif not self._epochs and self.model._n_updates != self._last_updates:
            due = (last // every + 1) * every if every else last + 1
            if steps >= due:
                self._record()

    def _record(self, epoch: int = 0) -> None:
        model: Any = self.model
        known: dict[str, Any] = {
            "env_step": model.num_timesteps,
            "learning_rate": _optimizer(model).param_groups[0]["lr"],
            "episodic_return": float(np.mean([one["r"] for one in model.ep_info_buffer]))
            if model.ep_info_buffer
            else None,
        }
        if isinstance(model, OnPolicyAlgorithm):
            known["iteration"] = model.num_timesteps // _rollout_steps(model)
        if self._epochs:
            known["epoch"] = epoch
        if statistics := _statistics(model):
            known["observation_mean"], known["observation_variance"] = statistics.mean, statistics.var
            known["observation_count"] = statistics.count
        assert self._recorder is not None, "the trial was opened"
        self._recorder.record(model.num_timesteps, **known)
        self._last_step, self._last_updates = model.num_timesteps, model._n_updates


def acting_part(model: BaseAlgorithm) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The module of a model that acts, and the patterns of the names in it that do not. Raises ValueError for none."""
    policy: Any = model.policy
    if isinstance(policy, ActorCriticPolicy):
        return policy, CRITIC
    for name in ("actor", "q_net"):
        if isinstance(part := getattr(policy, name, None), torch.nn.Module):
            return part, ()
    raise ValueError(
        f"{type(policy).__name__} is not an actor-critic policy and has no `actor` or `q_net`; record the "
        "module that acts with your own Recorder"
    )


def load_policy(model: BaseAlgorithm, storage: str, *, trial: int, snapshot: int = -1) -> PartialSnapshot:
    """Put a recorded snapshot into a model: what acts of its policy, and its VecNormalize's observation statistics.

    Raises as `load_module` does, and ValueError for observation statistics that the model has no VecNormalize for.
    """
    before = _statistics(model)
    has_statistics = "observation_mean" in TrajectoryStore(storage).header([trial]).columns
    if has_statistics and before is None:
        raise ValueError(
            f"trial {trial} has observation statistics, and the model's environment is not a VecNormalize; wrap it"
        )
    read = load_module(acting_part(model)[0], storage, trial=trial, snapshot=snapshot)
    if before is not None and read.observation_mean is not None and read.observation_variance is not None:
        before.mean = read.observation_mean.reshape(before.mean.shape).copy()
        before.var = read.observation_variance.reshape(before.var.shape).copy()
        before.count = read.observation_count
    return read


class _LegEnded(Exception):  # noqa: N818  # nothing went wrong
    pass


class _Leg(BaseCallback):
    """Ends learning between an update and the next rollout, once so many steps are done."""

    def __init__(self, until: int):
        super().__init__()
        self._until = until

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps >= self._until:
            raise _LegEnded

    def _on_step(self) -> bool:
        return True


def learn_in_legs(
    make: Callable[[], BaseAlgorithm],
    folder: Path | str,
    *,
    total_timesteps: int,
    leg_timesteps: int,
    seed: int,
    callback: BaseCallback,
) -> BaseAlgorithm:
    """Learn in legs, each of which begins with the checkpoint of the one before; the same call resumes after a kill.

    stable-baselines3's own checkpoints have neither environments nor random generators in them, so that what is loaded
    cannot go on as if nothing had been. Here every leg begins by `make`, the last checkpoint (model, replay buffer,
    VecNormalize), a seed of its own and a reset of the environments, so that a leg that is run again is run the same:
    a killed training ends with the bytes of an undisturbed one. Checkpoints are kept in a folder, complete or not at
    all, and only the last one. Raises ValueError for a leg without steps.
    """
    if leg_timesteps < 1:
        raise ValueError(f"leg_timesteps={leg_timesteps} is below 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        model: Any = _load_checkpoint(make(), folder)
        done = model.num_timesteps
        if done >= total_timesteps:
            return model
        model.set_random_seed(int(np.random.SeedSequence([seed, done]).generate_state(1)[0] // 2))
        leg = CallbackList([callback, _Leg(until=done + leg_timesteps)])
        try:
            model.learn(total_timesteps - done, callback=leg, reset_num_timesteps=False)
        except _LegEnded:
            callback.on_training_end()
        _save_checkpoint(model, folder)
        model.get_env().close()


def _save_checkpoint(model: Any, folder: Path) -> None:
    partial = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    partial.mkdir()
    model.save(partial / "model.zip")
    if isinstance(model, OffPolicyAlgorithm):
        model.save_replay_buffer(partial / "replay_buffer.pkl")
    if vector := model.get_vec_normalize_env():
        vector.save(str(partial / "vec_normalize.pkl"))
    partial.rename(folder / str(model.num_timesteps))
    for one in folder.iterdir():
        if one.name.startswith(TEMPORARY) or (_is_checkpoint(one) and one.name != str(model.num_timesteps)):
            shutil.rmtree(one)


def _is_checkpoint(place: Path) -> bool:
    """Whether it is a folder that `_save_checkpoint` made: the user may keep other files beside them."""
    return place.name.isdecimal() and (place / "model.zip").is_file()


def _load_checkpoint(model: Any, folder: Path) -> Any:
    """A fresh model as it was at the last checkpoint; itself where there is none."""
    steps = [int(one.name) for one in folder.iterdir() if _is_checkpoint(one)]
    if not steps:
        return model
    place, vector = folder / str(max(steps)), model.get_vec_normalize_env()
    if vector:
        kept = VecNormalize.load(str(place / "vec_normalize.pkl"), vector.venv)
        vector.obs_rms, vector.ret_rms = kept.obs_rms, kept.ret_rms
    loaded = type(model).load(place / "model.zip", env=model.get_env(), device=model.device)
    if isinstance(loaded, OffPolicyAlgorithm):
        loaded.load_replay_buffer(place / "replay_buffer.pkl")
    return loaded


def _optimizer(model: Any) -> torch.optim.Optimizer:
    policy = model.policy
    return policy.actor.optimizer if isinstance(getattr(policy, "actor", None), torch.nn.Module) else policy.optimizer


def _rollout_steps(model: Any) -> int:
    """Environment steps of one rollout; of one step of all environments where rollouts are episodes."""
    if isinstance(model, OnPolicyAlgorithm):
        return model.n_steps * model.n_envs
    frequency = getattr(model.train_freq, "frequency", 1)
    return frequency * model.n_envs


def _statistics(model: BaseAlgorithm) -> Any:
    """The running mean and variance of a VecNormalize's observations; None where there is none."""
    vector = model.get_vec_normalize_env()
    if vector is None or not vector.norm_obs:
        return None
    if isinstance(vector.obs_rms, dict):
        raise ValueError(
            "VecNormalize has statistics of a dictionary of observations, which a snapshot cannot hold; flatten them "
            "with gymnasium's FlattenObservation, or set norm_obs=False"
        )
    return vector.obs_rms


def _task_of(model: BaseAlgorithm) -> str:
    vector = model.get_env()
    spec = vector.get_attr("spec")[0] if vector else None
    if spec is None:
        raise ValueError("the environment has no gymnasium id; pass task=..., a name for what is learned")
    return spec.id


def _activation(model: Any) -> dict[str, str]:
    """The activation of a model's networks, where it is another than that of its kind of policy."""
    used = getattr(model.policy, "activation_fn", None)
    usual = torch.nn.Tanh if isinstance(model, OnPolicyAlgorithm) else torch.nn.ReLU
    return {} if used in (None, usual) else {"activation": used.__name__.lower()}


def _described(model: Any) -> dict[str, Any]:
    """The settings that define a training, as far as the model has them as plain values."""
    settings = {name: getattr(model, name) for name in SETTINGS if hasattr(model, name)}
    vector = model.get_vec_normalize_env()
    return {
        "algorithm": type(model).__name__,
        "num_environments": model.n_envs,
        **{name: value for name, value in settings.items() if isinstance(value, int | float | str)},
        **_activation(model),
        **({"clip_observations": vector.clip_obs, "epsilon": vector.epsilon} if vector and vector.norm_obs else {}),
    }
