"""Predictors (Sections 3.3 and 4.2) behind one interface: fitted on some trials, asked how others go on.

Two kinds. A `Combination` is causal by construction: it is told the inner products of a context's displacements and
answers with coefficients, so its forecast is the last snapshot plus a combination of displacements, and it is fitted
and judged from banded Gram matrices without a look at the weights. The others read weights.
Knows trajectories and trained models; knows nothing of seeds, of returns or of how a forecast is summed up.

Shapes: T snapshots, P policy weights, D numbers per token, B starts, K displacements of context, F of future,
N = K + F, H forward steps, Q phases of a PPO iteration, R rank of a decomposition, M knots of a mean trajectory.
"""

import abc
import dataclasses
import hashlib
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from tipl_ray import config
from tipl_ray.data.storage import Storage, file_exists, join, last_name, publish, read_file, read_published
from tipl_ray.digest import flat
from tipl_ray.paper.temporal_svd import FittedBasis, basis_of
from tipl_ray.predict.gram import Contexts, GramBand, Question, check_starts, future_sums, squared_errors
from tipl_ray.predict.model import (
    ABOUT_FILE,
    BASIS_FILE,
    CONTEXT_PENALTIES,
    WEIGHTS_FILE,
    CausalTransformer,
    ContextRidge,
    Normaliser,
    WindowTransformer,
    is_complete,
    load_about,
    read_model_file,
    understood,
)

FORECAST_BYTES = 256 * 2**20
"""Limit of the forecasts (B, H, P) held at once."""
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

MODEL_FILES = (WEIGHTS_FILE, ABOUT_FILE)
PREDICTOR_FILE, ABOUT_PREDICTOR_FILE, PREDICTOR_RECORD = "predictor.safetensors", "predictor.json", "predictor.sha256"
PREDICTOR_WAY_OUT = "restore it from a copy, or delete the folder and fit the predictor again"

PLACES = ("name", "storage", "tracking.uri", "tracking.experiment")
"""Fields of an experiment that say where it is kept, and nothing of a model."""

Weights = NDArray[np.float32]
Starts = NDArray[np.integer]
Setting = TypeVar("Setting", int, float)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trial:
    """One trajectory as predictors see it."""

    weights_TP: Weights
    band: GramBand


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trials:
    """Trajectories to fit on: their bands at hand, their weights one after the other where they are asked for."""

    bands: Sequence[GramBand]
    weights: Callable[[], Iterable[Weights]]


class Predictor(abc.ABC):
    """Anything that says how policy weights go on."""

    name: ClassVar[str]
    """Name in the result table."""
    basis: str = "none"
    """`none`, or the kind of the basis that it predicts in."""
    seed: int = 0
    """Which of several trained on other seeds it is."""
    causal: bool = True
    """Whether a forecast depends on nothing of its trial that comes after its start."""

    def __init__(self, question: Question):
        self.question = question
        self.fitted: dict[str, NDArray] = {}
        """What fitting found: small arrays that `save_fitted` writes."""

    def fit(self, training: Trials, validation: Trials) -> None:  # noqa: B027  # most predictors have nothing to fit
        """Learn from the training trials; settings are chosen on the validation trials."""

    @abc.abstractmethod
    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """Weights at the question's forward steps after each start, the last snapshot known; (B, H, P), read-only.

        Memory grows with B x H x P. Raises ValueError for a start without its context.
        """

    def squared_errors(self, trial: Trial, starts_B: Starts) -> NDArray[np.float64]:
        """||w_hat - w||^2 per start and forward step; (B, H). Raises ValueError for a start without its future too."""
        check_starts(len(trial.weights_TP), starts_B, self.question.context, self.question.future)
        steps_H = np.asarray(self.question.steps)
        size = max(1, FORECAST_BYTES // (4 * self.question.future * trial.weights_TP.shape[1]))
        errors_BH = np.empty((len(starts_B), len(steps_H)))
        for begin in range(0, len(starts_B), size):
            part_B = np.asarray(starts_B[begin : begin + size])
            apart_BHP = self.forecast(trial, part_B) - trial.weights_TP[part_B[:, None] + steps_H]
            errors_BH[begin : begin + size] = np.einsum("bhp,bhp->bh", apart_BHP, apart_BHP, dtype=np.float64)
        return errors_BH


class Combination(Predictor):
    """The last snapshot plus a combination of the context's displacements."""

    @abc.abstractmethod
    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """What each displacement of the context counts in each forward step; (B, H, K)."""

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """See `Predictor.forecast`."""
        contexts = trial.band.contexts(starts_B, self.question.context)
        return _combine(trial.weights_TP, starts_B, self.coefficients(contexts))

    def squared_errors(self, trial: Trial, starts_B: Starts) -> NDArray[np.float64]:
        """Exact, from the Gram band alone: see `gram.squared_errors`."""
        return self.band_errors(trial.band, starts_B)

    def band_errors(self, band: GramBand, starts_B: Starts) -> NDArray[np.float64]:
        """As `squared_errors`, of a trial whose weights are not at hand."""
        grams_BNN = band.windows(starts_B, self.question.context, self.question.future)
        coefficients_BHK = self.coefficients(band.contexts(starts_B, self.question.context))
        return squared_errors(grams_BNN, coefficients_BHK, self.question.steps)

    def best_setting(
        self,
        settings: Sequence[Setting],
        bands: Sequence[GramBand],
        answer: Callable[[NDArray[np.float64], Setting], NDArray[np.float64]],
    ) -> Setting:
        """The setting whose answers, coefficients to Gram matrices of contexts, have the highest skill on some trials,
        mean over forward steps."""
        steps, context = self.question.steps, self.question.context
        error_SH, moved_H = np.zeros((len(settings), len(steps))), np.zeros(len(steps))
        for band, starts_B in _every_window(bands, self.question):
            grams_BNN = band.windows(starts_B, context, self.question.future)
            for error_H, setting in zip(error_SH, settings, strict=True):
                coefficients_BHK = answer(grams_BNN[:, :context, :context], setting)
                error_H += squared_errors(grams_BNN, coefficients_BHK, steps).sum(axis=0)
            moved_H += squared_errors(grams_BNN, np.zeros((len(starts_B), len(steps), context)), steps).sum(axis=0)
        return settings[int(np.argmax([_mean_skill(error_H, moved_H) for error_H in error_SH]))]


class PhaseTable(Combination):
    """Coefficients that depend on the phase alone; those who inherit say which."""

    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """The table's row of each window's phase."""
        return self.table_QHK()[contexts.phases_B]

    def table_QHK(self) -> NDArray[np.float64]:
        """Coefficients by phase; the same for all of them where `fitted` has none."""
        return self.fitted["coefficients_QHK"]

    def _everywhere(self, coefficients_HK: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.broadcast_to(coefficients_HK, (self.question.snapshots_per_iteration, *coefficients_HK.shape))


class CopyLast(PhaseTable):
    """Nothing changes: every forward step is the last snapshot known."""

    name = "copy-last"

    def table_QHK(self) -> NDArray[np.float64]:
        """All 0."""
        return self._everywhere(np.zeros((len(self.question.steps), self.question.context)))


class Linear(PhaseTable):
    """The last displacement goes on: 2-point linear extrapolation."""

    name = "linear"

    def table_QHK(self) -> NDArray[np.float64]:
        """h for the last displacement, 0 for the others."""
        return self._everywhere(_last_only(np.asarray(self.question.steps, np.float64), self.question.context))


class Damped(PhaseTable):
    """The last displacement goes on and fades by the same share at every step; the share is fitted."""

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
    """The least-squares line through the context goes on from the last snapshot."""

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

    name = "first-again"

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


class RidgeElsewhere(PhaseTable):
    """The ridge regression that a model carries: fitted on what the model was trained on, which is not this task."""

    name = "ridge-elsewhere"

    def __init__(self, question: Question, model: WindowTransformer):
        super().__init__(question)
        self.model = model

    def table_QHK(self) -> NDArray[np.float64]:
        """As the model keeps it."""
        return self.model.ridge_QHK.double().cpu().numpy()


class RidgeOnContext(Combination):
    """Ridge regression that is fitted on nothing but the context at hand: see `model.ContextRidge`."""

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

    As published the forecast lies on that direction, wherever the last snapshot is.
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
        """Last snapshot + mean displacement; a trial longer than the training trials stands still at their end."""
        check_starts(len(trial.weights_TP), starts_B, self.question.context, 0)
        ahead_BH = np.asarray(starts_B)[:, None] + np.asarray(self.question.steps)
        return trial.weights_TP[starts_B][:, None] + (self._mean(ahead_BH) - self._mean(starts_B)[:, None])

    def _mean(self, snapshots: Starts) -> Weights:
        knots_M, mean_MP = self.fitted["knots_M"], self.fitted["mean_MP"]
        place = np.interp(snapshots, knots_M, np.arange(len(knots_M), dtype=np.float64))
        before = np.minimum(place.astype(np.int64), len(knots_M) - 2)
        share = (place - before).astype(np.float32)[..., None]
        return (1 - share) * mean_MP[before] + share * mean_MP[before + 1]


class WindowFloor(Predictor):
    """The true future, projected on the span of the context's displacements: the floor of every `Combination`."""

    name, basis, causal = "window-floor", "window", False

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """See `Predictor.forecast`. Raises ValueError for a start without its future."""
        return _combine(trial.weights_TP, starts_B, self._coefficients(self._windows(trial.band, starts_B)))

    def squared_errors(self, trial: Trial, starts_B: Starts) -> NDArray[np.float64]:
        """Exact, from the Gram band alone."""
        return self.band_errors(trial.band, starts_B)

    def band_errors(self, band: GramBand, starts_B: Starts) -> NDArray[np.float64]:
        """As `squared_errors`, of a trial whose weights are not at hand."""
        grams_BNN = self._windows(band, starts_B)
        return squared_errors(grams_BNN, self._coefficients(grams_BNN), self.question.steps)

    def _windows(self, band: GramBand, starts_B: Starts) -> NDArray[np.float64]:
        return band.windows(starts_B, self.question.context, self.question.future)

    def _coefficients(self, grams_BNN: NDArray[np.float64]) -> NDArray[np.float64]:
        context = self.question.context
        towards_BHK = future_sums(self.question.steps) @ grams_BNN[:, context:, :context]
        inverse_BKK = np.linalg.pinv(grams_BNN[:, :context, :context], rcond=SMALLEST_EIGENVALUE, hermitian=True)
        return towards_BHK @ inverse_BKK


class TrialBasis:
    """The basis of the trajectory at hand, fitted once for as long as that array lives."""

    def __init__(self, basis: config.Basis, shared: FittedBasis | None = None):
        self.config, self.shared = basis, shared
        self._fitted: tuple[weakref.ref[Weights], FittedBasis] | None = None

    @property
    def causal(self) -> bool:
        """Whether tokens depend on nothing later than their own snapshot."""
        return self.config.kind == "shared" or (self.config.kind == "raw" and not self.config.centred)

    def of(self, weights_TP: Weights) -> FittedBasis:
        """Fitted on this very array, which must not change afterwards."""
        if self._fitted is None or self._fitted[0]() is not weights_TP:
            # A weak reference: a trajectory of a gigabyte must not outlive its caller's use of it.
            self._fitted = None
            self._fitted = (weakref.ref(weights_TP), basis_of(weights_TP, self.config, self.shared))
        return self._fitted[1]


class SvdFloor(Predictor):
    """The true future, projected on the trial's basis: what no predictor on that basis can do better than."""

    name, causal = "svd-floor", False

    def __init__(self, question: Question, trial_basis: TrialBasis):
        super().__init__(question)
        self.trial_basis = trial_basis
        self.basis = trial_basis.config.kind

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """Decoded tokens of the snapshots to come. Raises ValueError for a start without its future."""
        check_starts(len(trial.weights_TP), starts_B, self.question.context, self.question.future)
        fitted = self.trial_basis.of(trial.weights_TP)
        future_BH = np.asarray(starts_B)[:, None] + np.asarray(self.question.steps)
        return _decode(fitted, fitted.coordinates_TD[future_BH])


class Tipl(Predictor):
    """TIPL as in the paper: the causal Transformer's tokens, one step after the other, decoded to weights."""

    name = "tipl"

    def __init__(
        self,
        question: Question,
        model: CausalTransformer,
        trial_basis: TrialBasis,
        normaliser: Normaliser,
        device: torch.device | str = "cpu",
    ):
        super().__init__(question)
        self.model, self.trial_basis, self.normaliser = model.to(device).eval(), trial_basis, normaliser
        self.device = device
        self.basis, self.causal = trial_basis.config.kind, trial_basis.causal

    def forecast(self, trial: Trial, starts_B: Starts) -> Weights:
        """See `Predictor.forecast`. Raises ValueError also for tokens of another size than the model's."""
        # Tokens are snapshots here: as many of them as other predictors have displacements.
        check_starts(len(trial.weights_TP), starts_B, self.model.size.context, 0)
        fitted = self.trial_basis.of(trial.weights_TP)
        if fitted.rank != self.model.token_size:
            raise ValueError(f"tokens of {fitted.rank} numbers do not fit a model of {self.model.token_size}")
        snapshots_BK = np.asarray(starts_B, np.int64)[:, None] + np.arange(1 - self.model.size.context, 1)
        tokens_BKD = self.normaliser.normalise(fitted.coordinates_TD[snapshots_BK])
        # A trajectory longer than those of training: its late snapshots all take the last index there was.
        indices_BK = np.minimum(snapshots_BK, self.model.max_snapshots - 1)
        predicted_BFD = self.model.forecast(
            torch.from_numpy(tokens_BKD).to(self.device),
            torch.from_numpy(indices_BK).to(self.device),
            self.question.future,
        )
        predicted_BHD = predicted_BFD[:, np.asarray(self.question.steps) - 1].cpu().numpy()
        return _decode(fitted, self.normaliser.restore(predicted_BHD))


class WindowTipl(Combination):
    """TIPL on the causal basis `window`: a Transformer over displacements answers with coefficients."""

    name, basis = "tipl", "window"

    def __init__(self, question: Question, model: WindowTransformer, device: torch.device | str = "cpu"):
        super().__init__(question)
        if (model.size.context, model.steps, model.num_phases) != dataclasses.astuple(question):
            raise ValueError(
                f"the model answers for context {model.size.context}, steps {model.steps} and {model.num_phases} "
                f"phases; asked is {question}"
            )
        self.model, self.device = model.to(device).eval(), device

    @torch.inference_mode()
    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """The model's answer, in batches; that of its ridge alone where a displacement of the context is 0.

        So it is before a context is full, and after weights stood still: the model has seen no such thing.
        """
        answers = []
        # A user's loop may jump under autocast; the model answers in its own type.
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for begin in range(0, len(contexts.phases_B), 512):
                parts = (torch.from_numpy(np.asarray(part[begin : begin + 512])).to(self.device) for part in contexts)
                answers.append(self.model(*parts).double().cpu().numpy())
        answer_BHK = np.concatenate(answers)
        still_B = np.any(np.diagonal(contexts.grams_BKK, axis1=1, axis2=2) <= 0, axis=1)
        if still_B.any():
            answer_BHK[still_B] = self.model.ridge_QHK.double().cpu().numpy()[contexts.phases_B[still_B]]
        return answer_BHK


def load_tipl(folder: str, question: Question, device: torch.device | str = "cpu") -> Tipl | WindowTipl:
    """TIPL as training left it in a folder or under a URI. Raises StoreError where there is none, or a damaged one."""
    about = load_about(folder)
    with understood(folder, ABOUT_FILE):
        basis = config.Basis(**about["basis"])
    if basis.kind == "window":
        return WindowTipl(question, WindowTransformer.load(folder), device)
    with understood(folder, ABOUT_FILE):
        normaliser = Normaliser.from_table(about["normaliser"])
    shared = None
    if basis.kind == "shared":
        content = read_model_file(folder, BASIS_FILE)
        with understood(folder, BASIS_FILE):
            shared = FittedBasis.from_bytes(content)
    return Tipl(question, CausalTransformer.load(folder), TrialBasis(basis, shared), normaliser, device)


SIMPLE: tuple[type[Predictor], ...] = (
    CopyLast,
    Linear,
    Damped,
    WindowLinear,
    Ridge,
    RidgeOnContext,
    RankOne,
    RankOneFromLast,
    DynamicModes,
    MeanTrajectory,
)
"""What TIPL is held against in every table."""


def make_predictors(question: Question, model_folders: Sequence[str], elsewhere: bool = False) -> list[Predictor]:
    """Every predictor that is compared, TIPL as it was trained among them, and the floor of its basis; not fitted.

    Several models are those of several seeds. `elsewhere` says that they were trained on other data sets.
    """
    tipls = [load_tipl(folder, question) for folder in model_folders]
    for seed, tipl in enumerate(tipls):
        tipl.seed = seed
    first = tipls[0]
    floor = SvdFloor(question, first.trial_basis) if isinstance(first, Tipl) else WindowFloor(question)
    carried = [RidgeElsewhere(question, first.model)] if elsewhere and isinstance(first, WindowTipl) else []
    return [*(kind(question) for kind in SIMPLE), *carried, *tipls, floor]


def save_fitted(predictors: Sequence[Predictor]) -> bytes:
    """What every predictor was fitted to, as safetensors."""
    arrays = {
        f"{one.name}/{key}": np.array(array, order="C") for one in predictors for key, array in one.fitted.items()
    }
    return safetensors.numpy.save(arrays)


def load_fitted(predictors: Sequence[Predictor], content: bytes) -> None:
    """Put back what `save_fitted` wrote."""
    for key, array in safetensors.numpy.load(content).items():
        name, field = key.split("/")
        for predictor in predictors:
            if predictor.name == name:
                predictor.fitted[field] = array


COMBINATIONS: dict[str, type[Combination]] = {
    kind.name: kind
    for kind in (CopyLast, Linear, Damped, WindowLinear, Ridge, FirstAgain, RankOne, RankOneFromLast, DynamicModes)
}
"""Predictors that one small file holds, by name."""


def save_predictor(predictor: Combination, folder: str, about: dict[str, Any]) -> None:
    """Write a fitted predictor of `COMBINATIONS` and what is known about it, for `load_predictor`."""
    assert predictor.name in COMBINATIONS
    described = {"name": predictor.name, "question": dataclasses.asdict(predictor.question), **about}
    files = {PREDICTOR_FILE: save_fitted([predictor]), ABOUT_PREDICTOR_FILE: json.dumps(described, indent=1).encode()}
    publish(folder, files, PREDICTOR_RECORD)


def load_predictor(folder: str) -> Combination:
    """The predictor in a folder or under a URI: what `save_predictor` wrote, a model trained on the basis `window`, or
    the one such model of a storage. Changes nothing of torch's settings and draws no random number.

    Raises ValueError where there is none, and where there are several, which it lists; StoreError for a damaged one.
    """
    folder = find_predictor(folder)
    if not file_exists(folder, ABOUT_PREDICTOR_FILE):
        model = WindowTransformer.load(folder)
        question = Question(context=model.size.context, steps=model.steps, snapshots_per_iteration=model.num_phases)
        return WindowTipl(question, model)
    content = read_published(folder, ABOUT_PREDICTOR_FILE, PREDICTOR_RECORD, PREDICTOR_WAY_OUT)
    with understood(folder, ABOUT_PREDICTOR_FILE, PREDICTOR_WAY_OUT):
        about = json.loads(content)
        question = Question(**{**about["question"], "steps": tuple(about["question"]["steps"])})
        predictor = COMBINATIONS[about["name"]](question)
    content = read_published(folder, PREDICTOR_FILE, PREDICTOR_RECORD, PREDICTOR_WAY_OUT)
    with understood(folder, PREDICTOR_FILE, PREDICTOR_WAY_OUT):
        load_fitted([predictor], content)
    return predictor


def find_predictor(folder: str) -> str:
    """The folder that `load_predictor` reads: the one named, or that of the one model in its `models/` that can jump.

    Raises as `load_predictor` does.
    """
    if file_exists(folder, ABOUT_PREDICTOR_FILE):
        return folder
    models = [folder] if is_complete(folder) else _models_below(folder)
    able = {model: about for model in models if _basis(about := load_about(model)) == "window"}
    if len(able) == 1:
        return next(iter(able))
    if able:
        raise ValueError(f"{folder} holds {len(able)} models; name the folder of one: {'; '.join(_differences(able))}")
    found = f"; of its {len(models)} models none is of that basis (train with --preset causal)" if models else ""
    raise ValueError(
        f"jump.predictor={folder!r} holds neither a saved predictor nor a model of the basis `window`{found}"
    )


def _models_below(folder: str) -> list[str]:
    parent = folder if last_name(folder) == "models" else join(folder, "models")
    return [model for name in sorted(Storage(parent).folders()) if is_complete(model := join(parent, name))]


def _basis(about: Mapping[str, Any]) -> str | None:
    return about.get("basis", {}).get("kind")


def _differences(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line a model: its folder, the fields of its experiment that are not those of all, and its skill."""
    tables = {
        folder: {name: value for name, value in flat(about.get("experiment") or {}) if name not in PLACES}
        for folder, about in models.items()
    }
    names = dict.fromkeys(name for table in tables.values() for name in table)
    differ = [name for name in names if len({json.dumps(table.get(name)) for table in tables.values()}) > 1]
    lines = []
    for folder, table in tables.items():
        said = [f"{name}={table.get(name)}" for name in differ]
        if (metrics := models[folder].get("metrics")) and isinstance(metrics.get("validation_skill"), float):
            said.append(f"one-step skill {metrics['validation_skill']:.3f} in validation")
        lines.append(f"{folder} ({', '.join(said) or 'no difference recorded'})")
    return lines


def predictor_digest(folder: str) -> str:
    """Digest of what a saved predictor's answers depend on, wherever it lies. Raises as `load_predictor` does."""
    load_predictor(folder)
    folder = find_predictor(folder)
    names = (ABOUT_PREDICTOR_FILE, PREDICTOR_FILE) if file_exists(folder, ABOUT_PREDICTOR_FILE) else MODEL_FILES
    return hashlib.sha256(b"".join(read_file(folder, name) for name in names)).hexdigest()[:16]


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
        return _mean_skill(error_H, self.moved_QH.sum(axis=0))


def phase_moments(bands: Sequence[GramBand], question: Question) -> Moments:
    """Sum up every window of some trials."""
    context, num_phases, sums_HF = question.context, question.snapshots_per_iteration, future_sums(question.steps)
    total_QNN = np.zeros((num_phases, question.width, question.width))
    for band, starts_B in _every_window(bands, question):
        for phase in range(num_phases):
            own_B = starts_B[starts_B % num_phases == phase]
            total_QNN[phase] += band.windows(own_B, context, question.future).sum(axis=0)
    future_QFF = total_QNN[:, context:, context:]
    return Moments(
        known_QKK=total_QNN[:, :context, :context],
        towards_QHK=sums_HF @ total_QNN[:, context:, :context],
        moved_QH=np.einsum("hf,qfg,hg->qh", sums_HF, future_QFF, sums_HF),
    )


def _every_window(bands: Sequence[GramBand], question: Question) -> Iterator[tuple[GramBand, Starts]]:
    for band in bands:
        yield band, np.arange(question.context, band.num_snapshots - question.future)


def _mean_skill(error_H: NDArray[np.float64], moved_H: NDArray[np.float64]) -> float:
    return float(np.mean(1.0 - error_H / np.where(moved_H > 0, moved_H, 1.0)))


def _last_only(values_H: NDArray[np.float64], context: int) -> NDArray[np.float64]:
    coefficients_HK = np.zeros((len(values_H), context))
    coefficients_HK[:, -1] = values_H
    return coefficients_HK


def _combine(weights_TP: Weights, starts_B: Starts, coefficients_BHK: NDArray[np.float64]) -> Weights:
    context = coefficients_BHK.shape[2]
    known_BKP = weights_TP[np.asarray(starts_B)[:, None] + np.arange(-context, 1)]
    moved_BHP = coefficients_BHK.astype(np.float32) @ np.diff(known_BKP, axis=1)
    return known_BKP[:, -1:] + moved_BHP


def _decode(fitted: FittedBasis, coordinates_BHD: NDArray[np.float32]) -> Weights:
    num_starts, num_steps, rank = coordinates_BHD.shape
    return fitted.decode(coordinates_BHD.reshape(num_starts * num_steps, rank)).reshape(num_starts, num_steps, -1)
