"""Jumps of PPO's trials: the extension `Jumps` for a collection, and how it moves a group's parameters.

Shapes: K trials of a group, N parameters of a trial, M of them that jump, H snapshots of a jump, C displacements of
context.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tipl_ray.accelerate.jumps import Forecaster, History, JumpSettings, allowed_share, check_schedule, propose
from tipl_ray.digest import identity
from tipl_ray.ppo.algorithms import Extension, Hooks, State
from tipl_ray.ppo.trials import TrialGroup
from tipl_ray.predict.predictor import Combination
from tipl_ray.predict.saved import load_predictor, predictor_digest

TAKEN, GATED, REFUSED = range(3)
"""Outcomes of a jump, as indices of the counts."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Jumps(Extension):
    """Jumps with a predictor, in place of the update epochs that an experiment leaves out."""

    settings: JumpSettings
    predictor: Combination
    digest: str
    """Digest of everything that the predictor's answers depend on."""

    @classmethod
    def load(cls, folder: str, settings: JumpSettings) -> Self:
        """Jumps with the predictor in a folder or at a URI. Raises as `load_predictor` does."""
        return cls(settings=settings, predictor=load_predictor(folder), digest=predictor_digest(folder))

    @property
    def num_snapshots(self) -> int:
        """Snapshots of an iteration that are predicted."""
        return self.settings.horizon

    @property
    def header(self) -> Mapping[str, Any]:
        """The settings and what the predictor answers, wherever it is kept."""
        return {"jump": identity(self.settings) | {"predictor": self.digest}}

    def hooks(self, group: TrialGroup) -> Hooks:
        """The jumps of a group. Raises ValueError if the predictor expects another number of snapshots per
        iteration."""
        return GroupJumps(group, self.predictor, self.settings)


class GroupJumps(Hooks):
    """The jumps of K stacked trials, whose parameters are a policy's weights and then a critic's."""

    def __init__(self, group: TrialGroup, forecaster: Forecaster, settings: JumpSettings):
        check_schedule(forecaster.question, group.snapshots_run, settings.horizon)
        self.settings, self.forecaster, self.phase = settings, forecaster, group.snapshots_run
        bounds = [0, group.shape.num_policy_weights]
        if settings.networks == "both":
            bounds.append(group.shape.num_parameters)
        self._parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self._histories = [
            [History(parameters_N[part], forecaster.question.context) for part in self._parts]
            for parameters_N in group.parameters_KN
        ]
        self._num_moved = bounds[-1]
        """Parameters M that a jump moves, a trial's first ones."""
        self.counts_K3 = np.zeros((len(group), 3), dtype=np.int64)
        """Jumps taken, dropped by the gate, and refused."""
        self._coefficients: list[list[NDArray[np.float64]]] = []

    def record(self, group: TrialGroup) -> None:
        """Record every trial's next snapshot."""
        for histories, parameters_N in zip(self._histories, group.parameters_KN, strict=True):
            for part, history in zip(self._parts, histories, strict=True):
                history.record(parameters_N[part])

    def move(self, group: TrialGroup, learning_rates_K: np.ndarray) -> Iterator[None]:
        """Move to the forecast weights, one snapshot at a time."""
        horizon, moved = self.settings.horizon, slice(self._num_moved)
        moves_KHM = self.propose(self.progress(group), learning_rates_K / group.ppo.learning_rate)
        if self.settings.gate:
            there_KN = group.parameters_KN.copy()
            there_KN[:, moved] += moves_KHM.sum(axis=1)
            worse_K = group.surrogates(there_KN) < group.surrogates(group.parameters_KN)
            self._drop(worse_K)
            moves_KHM[worse_K] = 0.0
        if self.settings.kl_limit:
            self._shorten(group, moves_KHM)
        for step in range(horizon - 1):
            group.parameters_KN[:, moved] += moves_KHM[:, step]
            yield
        group.parameters_KN[:, moved] += moves_KHM[:, -1]
        self.carry_on(moves_KHM, group.parameters_KN)
        if self.settings.moments == "reset":
            for array in (group.first_moments_KN, group.second_moments_KN, group.adam_steps_K):
                array[moves_KHM.any(axis=(1, 2))] = 0
        if self.settings.corrective_epochs:
            group.run_epochs(learning_rates_K, self.settings.corrective_epochs)
            for histories, parameters_N in zip(self._histories, group.parameters_KN, strict=True):
                for part, history in zip(self._parts, histories, strict=True):
                    history.amend(parameters_N[part])
        yield

    def progress(self, group: TrialGroup) -> NDArray[np.float64]:
        """Fraction (K,) of each trial that is done before the jump, as in the predictor's data."""
        # The snapshots so far; the predicted ones are still to come.
        done_K = group.iterations_K - self.settings.horizon / group.snapshots_per_iteration
        return np.asarray(done_K / group.num_iterations, dtype=np.float64)

    def propose(self, progress_K: NDArray[np.float64], learning_rates_K: NDArray[np.float64]) -> NDArray[np.float32]:
        """The moves (K, H, M) that replace the epochs left out; 0 with a warning if a forecast is refused.

        Progress is the fraction of the trial that is done; learning rates are fractions of the first one.
        """
        moves_KHM = np.zeros((len(self._histories), self.settings.horizon, self._num_moved), dtype=np.float32)
        self._coefficients = []
        for k, histories in enumerate(self._histories):
            answers = [
                propose(
                    self.forecaster_of(k),
                    history,
                    self.settings,
                    phase=self.phase,
                    progress=float(progress_K[k]),
                    learning_rate=float(learning_rates_K[k]),
                )
                for history in histories
            ]
            reasons = [reason for _, reason in answers if reason]
            if reasons:
                self.counts_K3[k, REFUSED] += 1
                warnings.warn(
                    f"jump refused: {reasons[0]}; training continues without it", RuntimeWarning, stacklevel=2
                )
            self._coefficients.append([np.zeros_like(found) if reasons else found for found, _ in answers])
            if not reasons:
                self.counts_K3[k, TAKEN] += 1
                for part, history, found_HC in zip(self._parts, histories, self._coefficients[k], strict=True):
                    moves_KHM[k, :, part] = history.moves(found_HC)
        return moves_KHM

    def forecaster_of(self, k: int) -> Forecaster:
        """The predictor of trial k; overridden if the trials of a group have different ones."""
        return self.forecaster

    def _drop(self, dropped_K: NDArray[np.bool_]) -> None:
        """Drop the proposals that the gate refused; the caller sets their moves to 0."""
        for k in map(int, np.flatnonzero(dropped_K)):
            self.counts_K3[k] += np.array([-1, 1, 0])
            self._coefficients[k] = [np.zeros_like(found_HC) for found_HC in self._coefficients[k]]

    def _shorten(self, group: TrialGroup, moves_KHM: NDArray[np.float32]) -> None:
        """Scale moves in place so that every policy stays within the KL limit from its rollout policy."""
        there_KN, limit = group.parameters_KN.copy(), self.settings.kl_limit
        there_KN[:, : self._num_moved] += moves_KHM.sum(axis=1)
        here_K, there_K = group.divergences(group.parameters_KN), group.divergences(there_KN)
        for k in map(int, np.flatnonzero(~(there_K <= limit))):
            share = allowed_share(float(here_K[k]), float(there_K[k]), limit)
            moves_KHM[k] *= np.float32(share)
            self._coefficients[k] = [share * found_HC for found_HC in self._coefficients[k]]

    def carry_on(self, moves_KHM: NDArray[np.float32], parameters_KN: NDArray[np.float32]) -> None:
        """Record the moves in the histories; the parameters are those after them."""
        for k, histories in enumerate(self._histories):
            for part, history, found_HC in zip(self._parts, histories, self._coefficients[k], strict=True):
                history.carry_on(found_HC, moves_KHM[k, :, part], parameters_KN[k, part])

    def keep(self, kept: np.ndarray) -> None:
        """Keep only these trials, in order."""
        self._histories = [self._histories[k] for k in kept]
        self.counts_K3 = self.counts_K3[kept]

    def state(self, k: int) -> State:
        """Everything that trial k's next jump depends on, and its counts."""
        parts = [history.state() for history in self._histories[k]]
        arrays = {f"jump.{index}.{name}": array for index, part in enumerate(parts) for name, array in part.items()}
        return {**arrays, "jump.counts": self.counts_K3[k].copy()}

    def set_state(self, k: int, state: Mapping[str, np.ndarray]) -> None:
        """Restore a state."""
        for index, history in enumerate(self._histories[k]):
            prefix = f"jump.{index}."
            part = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            history.set_state(part)
        self.counts_K3[k] = state["jump.counts"]
