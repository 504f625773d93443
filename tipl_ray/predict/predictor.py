"""The interface of predictors (Sections 3.3 and 4.2), and those that answer with coefficients.

A `Combination` is causal by construction: its input is the inner products of a context's displacements, its output
coefficients, so its forecast is the last snapshot plus a combination of displacements, and it is fitted and judged from
banded Gram matrices without a look at the weights. The others read weights. Knows trajectories; knows nothing of seeds,
of returns or of how a forecast is summed up.

Shapes: T snapshots, P policy weights, B starts, K displacements of context, F of future, N = K + F, H forward steps, Q
phases of a PPO iteration.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from tipl_ray.predict.gram import Contexts, GramBand, Question, check_starts, squared_errors

FORECAST_BYTES = 256 * 2**20
"""Limit of the forecasts (B, H, P) held at once."""

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
    """Trajectories to fit on: their bands at hand, their weights one after the other on demand."""

    bands: Sequence[GramBand]
    weights: Callable[[], Iterable[Weights]]


class Predictor(abc.ABC):
    """Anything that predicts how policy weights continue."""

    name: ClassVar[str]
    """Name in the result table."""
    in_tables: ClassVar[bool] = True
    """Whether every result table has it."""
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
        return combine(trial.weights_TP, starts_B, self.coefficients(contexts))

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
        for band, starts_B in every_window(bands, self.question):
            grams_BNN = band.windows(starts_B, context, self.question.future)
            for error_H, setting in zip(error_SH, settings, strict=True):
                coefficients_BHK = answer(grams_BNN[:, :context, :context], setting)
                error_H += squared_errors(grams_BNN, coefficients_BHK, steps).sum(axis=0)
            moved_H += squared_errors(grams_BNN, np.zeros((len(starts_B), len(steps), context)), steps).sum(axis=0)
        return settings[int(np.argmax([mean_skill(error_H, moved_H) for error_H in error_SH]))]


class PhaseTable(Combination):
    """Coefficients that depend only on the phase; subclasses define them."""

    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """The table's row of each window's phase."""
        return self.table_QHK()[contexts.phases_B]

    def table_QHK(self) -> NDArray[np.float64]:
        """Coefficients by phase; the same for all of them where `fitted` has none."""
        return self.fitted["coefficients_QHK"]

    def _everywhere(self, coefficients_HK: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.broadcast_to(coefficients_HK, (self.question.snapshots_per_iteration, *coefficients_HK.shape))


def every_window(bands: Sequence[GramBand], question: Question) -> Iterator[tuple[GramBand, Starts]]:
    """Each band with the starts of every window that it has."""
    for band in bands:
        yield band, np.arange(question.context, band.num_snapshots - question.future)


def mean_skill(error_H: NDArray[np.float64], moved_H: NDArray[np.float64]) -> float:
    """Skill, mean over forward steps, of summed squared errors and displacements."""
    return float(np.mean(1.0 - error_H / np.where(moved_H > 0, moved_H, 1.0)))


def combine(weights_TP: Weights, starts_B: Starts, coefficients_BHK: NDArray[np.float64]) -> Weights:
    """The last snapshot known plus a combination of the context's displacements; (B, H, P)."""
    context = coefficients_BHK.shape[2]
    known_BKP = weights_TP[np.asarray(starts_B)[:, None] + np.arange(-context, 1)]
    moved_BHP = coefficients_BHK.astype(np.float32) @ np.diff(known_BKP, axis=1)
    return known_BKP[:, -1:] + moved_BHP
