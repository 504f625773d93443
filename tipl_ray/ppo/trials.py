"""A group of PPO trials in lock step: a generator of snapshots, with a state to save and restore per trial.

K trials, S steps of a rollout, A action values, E update epochs, P policy weights, N parameters.
The algorithm is CleanRL's `ppo_continuous_action.py`. A trial draws everything random from its own generators, and no
arithmetic crosses from one trial to another, so that its snapshots do not depend on the group that it runs in. Where
snapshots and states are kept is the caller's affair.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tipl_ray.config import Collect, Experiment, Ppo
from tipl_ray.data.snapshots import Snapshot
from tipl_ray.ppo.algorithms import NOTHING, Extension, State
from tipl_ray.ppo.engines import make_learner
from tipl_ray.ppo.environments import CompiledEnvironments, Environments, generator_state, restored_generator
from tipl_ray.ppo.learner import Rollouts
from tipl_ray.ppo.networks import NetworkShape
from tipl_ray.ppo.tasks import find_task


def network_shape(collect: Collect) -> NetworkShape:
    """The widths of a task's actor and critic. Raises ValueError for an unknown task."""
    simulations = find_task(collect.task)(1)
    return NetworkShape(
        observation_size=simulations.observation_size,
        action_size=simulations.action_size,
        policy_hidden=collect.policy_hidden,
        critic_hidden=collect.critic_hidden,
    )


class TrialGroup:
    """K trials, each at its own iteration; `run_iteration` takes all of them one PPO iteration further.

    An algorithm that differs from PPO in one step is a subclass that overrides `update`.
    """

    def __init__(
        self,
        experiment: Experiment,
        engine: str,
        seeds: list[int],
        states: list[State | None] | None = None,
        extension: Extension = NOTHING,
    ):
        self.collect: Collect = experiment.collect
        self.ppo: Ppo = experiment.ppo
        self.num_iterations = experiment.num_iterations
        self.snapshots_run = experiment.snapshots_per_iteration
        self.snapshots_per_iteration = extension.snapshots_per_iteration(experiment)
        self.seeds = list(seeds)
        self.shape = network_shape(self.collect)
        self.learner = make_learner(engine, self.shape, self.ppo)
        count, size = len(seeds), self.shape.num_parameters
        wrapped = CompiledEnvironments if engine == "compiled" else Environments
        self.environments = wrapped(self.collect.task, self.seeds, self.ppo.gamma, experiment.where.physics_threads)
        self.generators = [np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 1]))) for seed in seeds]
        fresh = (self.ppo.initialisation, self.ppo.initial_log_std)
        self.parameters_KN = np.stack([self.shape.initial_parameters(one, *fresh) for one in self.generators])
        self.first_moments_KN, self.second_moments_KN = np.zeros((2, count, size), dtype=np.float32)
        self.adam_steps_K, self.iterations_K = np.zeros((2, count), dtype=np.int64)
        self.gradient_steps_K = np.zeros(count, dtype=np.int64)
        """Gradient steps that were run in this process, those of all replicas together."""
        self._replicas: list[list[np.ndarray]] = []
        self.adapted_rates_K = np.full(count, self.ppo.learning_rate)
        """Learning rates as they are adapted, where they are."""
        self.diverged: dict[int, tuple[int, str]] = {}
        """By seed, the trials that ended because something of them is not finite: whole iterations, and what it is."""
        self.hooks = extension.hooks(self)
        for k, state in enumerate(states or []):
            if state is not None:
                self._set_state(k, state)
        self._first_rates_K = self._learning_rates()
        """Of the iteration that is run, at its beginning."""
        self._allocate()

    def _allocate(self) -> None:
        self.rollouts = Rollouts.empty(len(self), self.ppo.num_steps, self.shape)
        self.going_on_K = np.ones(len(self), dtype=np.int64)
        self._noise_KA, self._actions_KA = np.zeros((2, len(self), self.shape.action_size), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def finished(self) -> bool:
        """Whether every trial has run all of its iterations, or has diverged."""
        return not len(self._going_on())

    def initial_snapshots(self) -> Iterator[Snapshot]:
        """Snapshot 0 of the trials that have not begun."""
        for k in np.flatnonzero(self.iterations_K == 0):
            yield self._snapshot(int(k), 0, None)

    def run_iteration(self) -> Iterator[Snapshot]:
        """One iteration of every trial that is not finished: rollout, update epochs with their snapshots, and what
        the extension adds.

        Every snapshot is finite: a trial that is not any more has diverged, and ends with the one before.
        """
        going_on = self._going_on()
        if len(going_on) < len(self):
            self._keep(going_on)
        returns = self._collect_rollouts()
        self.learner.advantages(self.parameters_KN, self.rollouts)
        self._first_rates_K = self._learning_rates()
        learning_rates_K = self._first_rates_K.copy()
        self.iterations_K += 1
        self.going_on_K[:] = 1
        self._replicas = []
        for index in range(1, self.snapshots_run + 1):
            self.run_epochs(learning_rates_K, self.collect.epochs_per_snapshot)
            yield from self._finite_snapshots(index, returns if index == 1 else [None] * len(self))
            self.hooks.record(self)
        self._replicas = []
        for index, _ in enumerate(self.hooks.move(self, learning_rates_K), self.snapshots_run + 1):
            yield from self._finite_snapshots(index, [None] * len(self))

    def run_epochs(self, learning_rates_K: np.ndarray, epochs: int) -> None:
        """`update`, with its gradient steps counted."""
        before_K = self.adam_steps_K.copy()
        self.update(learning_rates_K, epochs)
        self.gradient_steps_K += self.ppo.replicas * (self.adam_steps_K - before_K)

    def update(self, learning_rates_K: np.ndarray, epochs: int) -> None:
        """Move `parameters_KN` in place, by so many update epochs on `rollouts`.

        To be overridden: advantages are in the rollouts, what is random comes from each trial's own of `generators`.
        """
        trained = [self.parameters_KN, self.first_moments_KN, self.second_moments_KN, self.adam_steps_K]
        if self.ppo.replicas == 1:
            self._optimise(trained, learning_rates_K, epochs)
        else:
            # They go their own ways until the iteration ends; where a snapshot is taken, their mean is.
            self._replicas = self._replicas or [[one.copy() for one in trained] for _ in range(self.ppo.replicas)]
            for replica in self._replicas:
                self._optimise(replica, learning_rates_K, epochs)
            for one, *copies in zip(trained, *self._replicas, strict=True):
                one[:] = np.mean(copies, axis=0, dtype=np.float64)
        if self.ppo.desired_kl:
            self.adapted_rates_K[:] = learning_rates_K

    def _optimise(self, trained: Sequence[np.ndarray], learning_rates_K: np.ndarray, epochs: int) -> None:
        """Update epochs of parameters, Adam's moments and its step counts, in place."""
        parameters_KN, first_moments_KN, second_moments_KN, adam_steps_K = trained
        permutations_KES = self._permutations(epochs)
        at_once = 1 if self.ppo.recompute_advantages else epochs
        for first in range(0, epochs, at_once):
            if self.ppo.recompute_advantages:
                # Of the policy that collected the log-probabilities stay.
                scratch = np.empty_like(self.rollouts.log_probabilities_KS)
                self.learner.advantages(parameters_KN, dataclasses.replace(self.rollouts, log_probabilities_KS=scratch))
            self.learner.update(
                parameters_KN,
                first_moments_KN,
                second_moments_KN,
                adam_steps_K,
                learning_rates_K,
                self.going_on_K,
                self.rollouts,
                np.ascontiguousarray(permutations_KES[:, first : first + at_once]),
            )

    def _finite_snapshots(self, index: int, returns: list[float | None]) -> Iterator[Snapshot]:
        """A snapshot of every trial that has not diverged by now."""
        self._find_divergences(returns)
        for k, seed in enumerate(self.seeds):
            if seed not in self.diverged:
                yield self._snapshot(k, index, returns[k])

    def _find_divergences(self, returns: list[float | None]) -> None:
        num_weights, statistics = self.shape.num_policy_weights, self.environments.observation_statistics
        watched = {
            "weights": self.parameters_KN[:, :num_weights],
            "critic": self.parameters_KN[:, num_weights:],
            "observation_mean": statistics.mean,
            "observation_variance": statistics.variance,
            "episodic_return": np.array([[0.0 if value is None else value] for value in returns]),
        }
        for name, array in watched.items():
            # What is not finite shows in the sum, at a fraction of the price of looking at each; so does an overflow.
            with np.errstate(over="ignore", invalid="ignore"):
                suspects = np.flatnonzero(~np.isfinite(array.sum(axis=1)))
            for k in map(int, suspects):
                if not np.isfinite(array[k]).all():
                    self.diverged.setdefault(self.seeds[k], (int(self.iterations_K[k]) - 1, name))

    def _going_on(self) -> np.ndarray:
        sound_K = np.array([seed not in self.diverged for seed in self.seeds], dtype=bool)
        return np.flatnonzero(sound_K & (self.iterations_K < self.num_iterations))

    def surrogates(self, parameters_KN: np.ndarray) -> np.ndarray:
        """PPO's clipped surrogate objective (K,) of some parameters on the stored rollouts, advantages centred."""
        ratio_KS, clip = np.exp(self._log_ratios(parameters_KN)), self.ppo.clip_coefficient
        stored_KS = self.rollouts.advantages_KS
        advantages_KS = stored_KS - stored_KS.mean(axis=1, keepdims=True, dtype=np.float64)
        clipped_KS = np.clip(ratio_KS, 1 - clip, 1 + clip)
        return np.minimum(ratio_KS * advantages_KS, clipped_KS * advantages_KS).mean(axis=1)

    def divergences(self, parameters_KN: np.ndarray) -> np.ndarray:
        """Approximate KL divergence (K,) of the policies of some parameters from those that collected the stored
        rollouts: CleanRL's, (ratio - 1) - log ratio, mean over steps."""
        log_ratio_KS = self._log_ratios(parameters_KN)
        return (np.expm1(log_ratio_KS) - log_ratio_KS).mean(axis=1)

    def _log_ratios(self, parameters_KN: np.ndarray) -> np.ndarray:
        """Logarithms of the ratios of the stored actions' probabilities (K, S), under some parameters and as
        collected."""
        stored = self.rollouts
        scratch = [np.empty_like(stored.rewards_KS) for _ in range(4)]
        names = ("log_probabilities_KS", "values_KS", "advantages_KS", "returns_KS")
        again = dataclasses.replace(stored, **dict(zip(names, scratch, strict=True)))
        self.learner.advantages(parameters_KN, again)
        return np.subtract(again.log_probabilities_KS, stored.log_probabilities_KS, dtype=np.float64)

    def _collect_rollouts(self) -> list[float | None]:
        """Fill the rollouts; the mean return of each trial's episodes that ended meanwhile."""
        rollouts, environments = self.rollouts, self.environments
        noise_SKA = np.stack([self._noise(generator) for generator in self.generators], axis=1)
        environments.finished.clear()
        act = self.learner.actor(
            self.parameters_KN, None, environments.observations_KO, self._noise_KA, self._actions_KA
        )
        for step in range(self.ppo.num_steps):
            rollouts.observations_KSO[:, step] = environments.observations_KO
            self._noise_KA[:] = noise_SKA[step]
            act()
            rollouts.actions_KSA[:, step] = self._actions_KA
            environments.step(self._actions_KA)
            rollouts.rewards_KS[:, step] = environments.rewards_K
            rollouts.ends_KS[:, step + 1] = environments.ends_K
            if self.ppo.bootstrap_truncated and environments.cut_off:
                self._bootstrap(step)
        rollouts.observations_KSO[:, -1] = environments.observations_KO
        ended: list[list[float]] = [[] for _ in self.seeds]
        for k, episodic_return in environments.finished:
            ended[k].append(episodic_return)
        return [float(np.mean(values)) if values else None for values in ended]

    def _bootstrap(self, step: int) -> None:
        """Add what the critic expects after the episodes that this step cut off."""
        for k, observation_O in self.environments.cut_off:
            alone = Rollouts.empty(1, 1, self.shape)
            alone.observations_KSO[0, 0] = observation_O
            self.learner.advantages(self.parameters_KN[k : k + 1], alone)
            self.rollouts.rewards_KS[k, step] += np.float32(self.ppo.gamma) * alone.values_KS[0, 0]

    def _noise(self, generator: np.random.Generator) -> np.ndarray:
        return generator.standard_normal((self.ppo.num_steps, self.shape.action_size), dtype=np.float32)

    def _permutations(self, epochs: int) -> np.ndarray:
        """(K, E, S) int32, each trial's from its own generator."""
        steps = self.ppo.num_steps
        permutations = [[generator.permutation(steps) for _ in range(epochs)] for generator in self.generators]
        return np.array(permutations, dtype=np.int32)

    def _learning_rates(self) -> np.ndarray:
        return np.array([self._learning_rate(k) for k in range(len(self))])

    def _learning_rate(self, k: int) -> float:
        """Of the iteration that trial k runs next."""
        if self.ppo.desired_kl:
            return float(self.adapted_rates_K[k])
        if self.ppo.schedule == "constant":
            return self.ppo.learning_rate
        return self.ppo.learning_rate * (1.0 - int(self.iterations_K[k]) / self.num_iterations)

    def _snapshot(self, k: int, index: int, episodic_return: float | None) -> Snapshot:
        iteration, statistics = int(self.iterations_K[k]), self.environments.observation_statistics
        ran = max(iteration - 1, 0)
        return Snapshot(
            seed=self.seeds[k],
            snapshot=ran * self.snapshots_per_iteration + index,
            iteration=iteration,
            epoch=index * self.collect.epochs_per_snapshot,
            env_step=iteration * self.ppo.num_steps,
            learning_rate=float(self._first_rates_K[k]),
            episodic_return=episodic_return,
            weights=self.parameters_KN[k, : self.shape.num_policy_weights].copy(),
            observation_mean=statistics.mean[k].copy(),
            observation_variance=statistics.variance[k].copy(),
            observation_count=float(statistics.count[k, 0]),
        )

    def state(self, seed: int) -> State:
        """Everything that the next bit of a trial depends on, as arrays, between two iterations."""
        k = self.seeds.index(seed)
        arrays = {name: np.array(array[k]) for name, array in self._per_trial().items()}
        generator, environments = generator_state(self.generators[k]), self.environments.state(k)
        return {**arrays, "generator": generator, **environments, **self.hooks.state(k)}

    def _set_state(self, k: int, state: State) -> None:
        for name, array in self._per_trial().items():
            array[k] = state[name]
        self.generators[k] = restored_generator(state["generator"])
        self.environments.set_state(k, state)
        self.hooks.set_state(k, state)

    def _keep(self, kept: np.ndarray) -> None:
        """Go on with the kept trials alone."""
        self.environments.keep(kept)
        self.seeds = [self.seeds[k] for k in kept]
        self.generators = [self.generators[k] for k in kept]
        for name, array in self._per_trial().items():
            setattr(self, name, array[kept])
        self.gradient_steps_K = self.gradient_steps_K[kept]
        self.hooks.keep(kept)
        self._allocate()

    def _per_trial(self) -> dict[str, np.ndarray]:
        names = ["parameters_KN", "first_moments_KN", "second_moments_KN", "adam_steps_K", "iterations_K"]
        names += ["adapted_rates_K"] if self.ppo.desired_kl else []
        return {name: getattr(self, name) for name in names}
