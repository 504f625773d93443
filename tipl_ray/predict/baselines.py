"""The baselines that TIPL is compared with in every table, and the rules that jumps can use.

Shapes: T snapshots, P policy weights, B starts, K displacements of context, F of future, N = K + F, H forward steps, Q
phases of a PPO iteration, R rank of a decomposition, M knots of a mean trajectory.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tipl_ray.predict.context_ridge import CONTEXT_PENALTIES, ContextRidge
from tipl_ray.predict.gram import Contexts, GramBand, Question, check_starts, future_sums
from tipl_ray.predict.predictor import (
    Combination,
    PhaseTable,
    Predictor,
    Starts,
    Trial,
    Trials,
    Weights,
    every_window,
    mean_skill,
)

MEAN_BYTES = 64 * 2**20
"""Limit of the mean trajectory (M, P) that is kept."""

RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Penalties that the ridge chooses from, in units of a displacement's mean squared length."""

DAMPINGS = tuple(np.linspace(0.0, 1.0, 21).tolist())
"""Shares of a velocity that may be left after one more step."""

DMD_RANKS = (1, 2, 3, 5, 8)
"""Ranks that the dynamic mode decomposition chooses from."""

SMALLEST_EIGENVALUE = 1e-10
"""Eigenvalues of a Gram matrix below this share of the largest are zero."""


class CopyLast(PhaseTable):
    """Nothing changes: every forward step is the last snapshot known."""

    name = "copy-last"

    def table_QHK(self) -> NDArray[np.float64]:
        """All 0."""
        return self._everywhere(np.zeros((len(self.question.steps), self.question.context)))


class Linear(PhaseTable):
    """The last displacement continues: 2-point linear extrapolation."""

    name = "linear"

    def table_QHK(self) -> NDArray[np.float64]:
        """h for the last displacement, 0 for the others."""
        return self._everywhere(_last_only(np.asarray(self.question.steps, np.float64), self.question.context))


class Damped(PhaseTable):
    """The last displacement continues and fades by the same factor at every step; the factor is fitted."""

    name = "damped"

    def fit(self, training: Trials, validation: Trials) -> None:
        """Take the share with the highest skill on the training trials, mean over forward steps."""
        moments = phase_moments(training.bands, self.question)
        best = max(DAMPINGS, key=lambda damping: moments.mean_skill(self._everywhere(self._fading(damping))))
        self.fitted = {"coefficients_QHK": self._everywhere(self._fading(best)), "damping": np.array(best)}

    def _fading(self, damping: float) -> NDArray[np.float64]:
        steps_H = np.asarray(self.question.steps)
        fading_F = damping ** np.arange(1, self.question.future + 1)
        return _last_only(fading_F.cumsum()[steps_H - 1], self.question.context)


class WindowLinear(PhaseTable):
    """The least-squares line through the context continues from the last snapshot."""

    name = "window-linear"

    def table_QHK(self) -> NDArray[np.float64]:
        """h times what each displacement counts in the slope."""
        centred = np.arange(self.question.context + 1) - self.question.context / 2
        # Displacement k moves every snapshot after it: the slope counts it as often as the centred times there add to.
        slope_K = centred[::-1].cumsum()[::-1][1:] / np.square(centred).sum()
        return self._everywhere(np.outer(self.question.steps, slope_K))


class Ridge(PhaseTable):
    """Phase-aware ridge regression on the context's displacements: one set of coefficients per phase and step."""

    name = "ridge"

    def fit(self, training: Trials, validation: Trials) -> None:
        """Solve on the training trials; the penalty is the one with the highest skill on the validation trials."""
        moments = phase_moments(training.bands, self.question)
        judge = phase_moments(validation.bands, self.question)
        tables = {penalty: moments.ridge(penalty) for penalty in RIDGE_PENALTIES}
        best = max(tables, key=lambda penalty: judge.mean_skill(tables[penalty]))
        self.fitted = {"coefficients_QHK": tables[best], "penalty": np.array(best)}


class FirstAgain(PhaseTable):
    """The displacement that began the PPO iteration is made once more by the iteration's end: for jumps, the plainest
    that does more than carry on with the last one."""

    name, in_tables = "first-again", False

    def table_QHK(self) -> NDArray[np.float64]:
        """h for that displacement, as a share of the snapshots that the iteration still has; 0 for the others."""
        num_phases, context = self.question.snapshots_per_iteration, self.question.context
        table_QHK = np.zeros((num_phases, len(self.question.steps), context))
        for phase in range(num_phases):
            # Where an iteration has just closed, phase 0, the one that it began with lies a whole iteration back.
            before = phase or num_phases
            if before <= context:
                table_QHK[phase, :, -before] = np.asarray(self.question.steps) / (num_phases - phase)
        return table_QHK


class RidgeOnContext(Combination):
    """Ridge regression that is fitted on nothing but the context at hand: see `context_ridge.ContextRidge`."""

    name = "context-ridge"

    def __init__(self, question: Question):
        super().__init__(question)
        self._ridge = ContextRidge(question.context, question.steps, question.snapshots_per_iteration)

    def fit(self, training: Trials, validation: Trials) -> None:
        """The penalty is the one with the highest skill on the validation trials."""
        self.fitted = {"penalty": np.array(self.best_setting(CONTEXT_PENALTIES, validation.bands, self._solve))}

    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """The regression's own."""
        return self._solve(contexts.grams_BKK, float(self.fitted["penalty"]))

    def _solve(self, grams_BKK: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
        return self._ridge(torch.from_numpy(grams_BKK), (penalty,))[:, :, 0].numpy()


class RankOne(Combination):
    """Rank-1 extrapolation (RELEX, arXiv 2605.21468) on the context: SVD of the deltas from its first snapshot, the
    leading direction, a line through the snapshots' coordinates on it, continued.

    As published, the forecast is on that direction, wherever the last snapshot is.
    """

    name = "rank-1"

    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """Of the forecast on the leading direction, less the last snapshot's delta."""
        directions_BK, ahead_BH, _ = self._line(contexts)
        return ahead_BH[:, :, None] * directions_BK[:, None] - 1.0

    def _line(self, contexts: Contexts) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The leading direction as coefficients (B, K), the line's coordinate at each step ahead (B, H), its slope."""
        context, steps_H = self.question.context, np.asarray(self.question.steps)
        # Delta k is the sum of the displacements up to k, so a lower triangle turns their Gram into that of deltas.
        sums_KK = np.tril(np.ones((context, context)))
        _, vectors_BKK = np.linalg.eigh(sums_KK @ contexts.grams_BKK @ sums_KK.T)
        leading_BK = vectors_BKK[:, :, -1]
        times_K = np.arange(1, context + 1) - (context + 1) / 2
        slope_B = leading_BK @ times_K / np.square(times_K).sum()
        ahead_BH = leading_BK.mean(axis=1)[:, None] + slope_B[:, None] * (times_K[-1] + steps_H)
        return leading_BK @ sums_KK, ahead_BH, slope_B


class RankOneFromLast(RankOne):
    """As `RankOne`, with the line's slope continued from the last snapshot itself."""

    name = "rank-1-from-last"

    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """Of the change along the leading direction."""
        directions_BK, _, slope_B = self._line(contexts)
        return np.multiply.outer(slope_B, self.question.steps)[:, :, None] * directions_BK[:, None]


class DynamicModes(Combination):
    """Dynamic mode decomposition of the context's displacements: the linear map that takes each to the next, on their
    leading R directions, applied again and again. A constant drift is a mode of its own, with eigenvalue 1."""

    name = "dmd"

    def fit(self, training: Trials, validation: Trials) -> None:
        """Choose the rank, the same for every window, with the highest skill on the validation trials."""
        ranks = [rank for rank in DMD_RANKS if rank < self.question.context]
        self.fitted = {"rank": np.array(self.best_setting(ranks, validation.bands, self._modes))}

    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """See `_modes`; the displacement that the map has not been applied to counts 0."""
        return self._modes(contexts.grams_BKK, int(self.fitted["rank"]))

    def _modes(self, grams_BKK: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
        before_BKK, onwards_BKK = grams_BKK[:, :-1, :-1], grams_BKK[:, :-1, 1:]
        values_BK, vectors_BKK = np.linalg.eigh(before_BKK)
        values_BR, vectors_BKR = values_BK[:, -rank:], vectors_BKK[:, :, -rank:]
        known_BR = values_BR > SMALLEST_EIGENVALUE * np.maximum(values_BR[:, -1:], np.finfo(float).tiny)
        inverse_BR = np.where(known_BR, 1.0, 0.0) / np.sqrt(np.where(known_BR, values_BR, 1.0))
        directions_BKR = vectors_BKR * inverse_BR[:, None]
        map_BRR = directions_BKR.transpose(0, 2, 1) @ onwards_BKK @ directions_BKR
        # A map that grows has no place in ten, let alone fifty, steps ahead: it is held at keeping its length.
        radius_B = np.abs(np.linalg.eigvals(map_BRR)).max(axis=1)
        map_BRR /= np.maximum(radius_B, 1.0)[:, None, None]
        state_BR1 = directions_BKR.transpose(0, 2, 1) @ grams_BKK[:, :-1, -1:]
        moved_BRF = []
        for _ in range(self.question.future):
            state_BR1 = map_BRR @ state_BR1
            moved_BRF.append(state_BR1)
        sums_BRF = np.concatenate(moved_BRF, axis=2).cumsum(axis=2)[:, :, np.asarray(self.question.steps) - 1]
        coefficients_BHK = (directions_BKR @ sums_BRF).transpose(0, 2, 1)
        return np.pad(coefficients_BHK, ((0, 0), (0, 0), (0, 1)))


class MeanTrajectory(Predictor):
    """The training trials' mean displacement over the same snapshots, added to the last snapshot.

    The mean trajectory is kept at as many evenly spaced snapshots as MEAN_BYTES holds, straight between them.
    """

    name = "mean-trajectory"

    def fit(self, training: Trials, validation: Trials) -> None:
        """Average the training trials, read one at a time."""
        sum_MP: NDArray[np.float64] | None = None
        count = 0
        for weights_TP in training.weights():
            if sum_MP is None:
                num_knots = int(np.clip(MEAN_BYTES // (4 * weights_TP.shape[1]), 2, len(weights_TP)))
                knots_M = np.linspace(0, len(weights_TP) - 1, num_knots).round().astype(np.int64)
                sum_MP = np.zeros((num_knots, weights_TP.shape[1]))
            sum_MP += weights_TP[knots_M]
            count += 1
        assert sum_MP is not None, "an experiment has at least one trial to train on"
        self.fitted = {"knots_M": knots_M, "mean_MP": (sum_MP / count).astype(np.float32)}

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """Last snapshot + mean displacement; beyond the length of the training trials it does not move."""
        check_starts(len(trial.weights_TP), starts_B, self.question.context, 0)
        ahead_BH = np.asarray(starts_B)[:, None] + np.asarray(self.question.steps)
        return trial.weights_TP[starts_B][:, None] + (self._mean(ahead_BH) - self._mean(starts_B)[:, None])

    def _mean(self, snapshots: Starts) -> Weights:
        knots_M, mean_MP = self.fitted["knots_M"], self.fitted["mean_MP"]
        place = np.interp(snapshots, knots_M, np.arange(len(knots_M), dtype=np.float64))
        before = np.minimum(place.astype(np.int64), len(knots_M) - 2)
        share = (place - before).astype(np.float32)[..., None]
        return (1 - share) * mean_MP[before] + share * mean_MP[before + 1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moments:
    """Sums over every window of some trials, by phase: all that coefficients by phase are fitted on and judged by."""

    known_QKK: NDArray[np.float64]
    """Inner products of the context's displacements."""
    towards_QHK: NDArray[np.float64]
    """Of the true displacement at each forward step with the context's."""
    moved_QH: NDArray[np.float64]
    """Squared length of the true displacement."""

    def ridge(self, penalty: float) -> NDArray[np.float64]:
        """Coefficients of least squared error with a penalty on their squares, by phase; (Q, H, K)."""
        context = self.known_QKK.shape[1]
        length_Q = np.trace(self.known_QKK, axis1=1, axis2=2) / context
        # A phase without a displacement has nothing to solve for: its coefficients are 0.
        penalty_Q = penalty * length_Q + (length_Q == 0)
        matrix_QKK = self.known_QKK + penalty_Q[:, None, None] * np.eye(context)
        return np.linalg.solve(matrix_QKK, self.towards_QHK.transpose(0, 2, 1)).transpose(0, 2, 1)

    def mean_skill(self, coefficients_QHK: NDArray[np.float64]) -> float:
        """Skill of coefficients over all windows, mean over forward steps."""
        quadratic_QHK = coefficients_QHK @ self.known_QKK - 2.0 * self.towards_QHK
        error_H = (np.einsum("qhk,qhk->qh", quadratic_QHK, coefficients_QHK) + self.moved_QH).sum(axis=0)
        return mean_skill(error_H, self.moved_QH.sum(axis=0))


def phase_moments(bands: Sequence[GramBand], question: Question) -> Moments:
    """Sum up every window of some trials."""
    context, num_phases, sums_HF = question.context, question.snapshots_per_iteration, future_sums(question.steps)
    total_QNN = np.zeros((num_phases, question.width, question.width))
    for band, starts_B in every_window(bands, question):
        for phase in range(num_phases):
            own_B = starts_B[starts_B % num_phases == phase]
            total_QNN[phase] += band.windows(own_B, context, question.future).sum(axis=0)
    future_QFF = total_QNN[:, context:, context:]
    return Moments(
        known_QKK=total_QNN[:, :context, :context],
        towards_QHK=sums_HF @ total_QNN[:, context:, :context],
        moved_QH=np.einsum("hf,qfg,hg->qh", sums_HF, future_QFF, sums_HF),
    )


def _last_only(values_H: NDArray[np.float64], context: int) -> NDArray[np.float64]:
    coefficients_HK = np.zeros((len(values_H), context))
    coefficients_HK[:, -1] = values_H
    return coefficients_HK
