"""What the Transformers are trained for (Section 3.3): a model, its loss on a batch of windows, and its validation.

`NextToken` is the paper's: squared error of every position's next token. `WindowError` is for the basis `window`: exact
squared error of the forecast weights at all forward steps at once, from Gram matrices alone.
Knows windows and models; knows nothing of optimisers, workers or checkpoints.

Shapes: B windows, K tokens of context, H forward steps, D numbers per token.
"""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import config
from tipl_ray.paper.temporal_svd import FittedBasis
from tipl_ray.predict.forecasting import Ridge, Trials
from tipl_ray.predict.gram import GramBand, Question
from tipl_ray.predict.model import CausalTransformer, Normaliser, WindowTransformer
from tipl_ray.predict.segments import Segments, Tokens, WindowBatch, WindowSegments, side_by_side

VALIDATION_WINDOWS = 4096
"""Most windows that a validation takes, evenly spaced over the validation trials."""
VALIDATION_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingData:
    """The trials that train and those that choose, reduced; test trials have no place here."""

    train: Tokens | Sequence[GramBand]
    validation: Tokens | Sequence[GramBand]
    shared: FittedBasis | None = None
    """The basis of all trials, where they share one."""

    def truncated(self, rank: int) -> "TrainingData":
        """Tokens of a lower SVD rank; see `Tokens.truncated`."""
        assert isinstance(self.train, Tokens), "bands have no rank"
        assert isinstance(self.validation, Tokens), "bands have no rank"
        shared = self.shared.truncated(rank) if self.shared else None
        return TrainingData(train=self.train.truncated(rank), validation=self.validation.truncated(rank), shared=shared)


def gather_trials(sets: Sequence[Sequence[Tokens | GramBand]]) -> Tokens | Sequence[GramBand]:
    """Trials of one or more data sets that were reduced one by one, all of them on the same basis.

    Of several data sets each counts as much as any other in the skill over all of them, whatever its number of trials
    and weights. Raises ValueError if trials do not fit each other.
    """
    tokens = [trial for trials in sets for trial in trials if isinstance(trial, Tokens)]
    if tokens:
        return Tokens.stack(tokens)
    bands = []
    for trials in sets:
        own = [trial for trial in trials if isinstance(trial, GramBand)]
        moved = sum(band.products_SW[:, 0].sum() for band in own) if len(sets) > 1 else 1.0
        bands += [dataclasses.replace(band, products_SW=band.products_SW / (moved or 1.0)) for band in own]
    return bands


class Objective(abc.ABC):
    """A model and what it is trained for."""

    model: CausalTransformer | WindowTransformer
    chances: int | NDArray[np.float64]
    """How windows of the training trials are drawn: see `segments.draw_windows`."""

    @abc.abstractmethod
    def loss(self, network: nn.Module, windows_B: NDArray[np.int64]) -> Tensor:
        """Mean over some of the training trials' windows; `network` is the model, or its shell over many workers."""

    @abc.abstractmethod
    def validate(self) -> tuple[float, float]:
        """The validation trials' loss, which chooses the best model, and the one-step skill in weights.

        The skill can be compared between bases. It is NaN for trajectories that stand still.
        """

    def about(self) -> dict[str, Any]:
        """What must be known beside the model's weights to use it, as JSON."""
        return {}


class NextToken(Objective):
    """The paper's: mean squared error of normalised tokens, at every position of a window."""

    def __init__(self, size: config.Model, train: Tokens, validation: Tokens, device: torch.device | str):
        self.normaliser = Normaliser.fit(train.coordinates_NTD)
        self.segments = Segments(train, self.normaliser, size.context, device)
        self.validation = Segments(validation, self.normaliser, size.context, device)
        self.chances = self.segments.num_windows
        self.model: CausalTransformer = CausalTransformer(
            size, self.segments.token_size, self.segments.num_snapshots
        ).to(device)

    def loss(self, network: nn.Module, windows_B: NDArray[np.int64]) -> Tensor:
        """See `Objective.loss`."""
        batch = self.segments.gather(windows_B)
        return functional.mse_loss(network(batch.tokens_BKD, batch.snapshots_BK), batch.targets_BKD)

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """See `Objective.validate`; the skill is that after whole contexts."""
        self.model.eval()
        loss, error, displacement, count = 0.0, 0.0, 0.0, 0
        for windows_B in _validation_windows(self.validation.num_windows):
            batch = self.validation.gather(windows_B)
            predicted_BKD = self.model(batch.tokens_BKD, batch.snapshots_BK)
            loss += functional.mse_loss(predicted_BKD, batch.targets_BKD).item() * len(windows_B)
            error_B, displacement_B = self.validation.one_step_errors(windows_B, predicted_BKD[:, -1])
            error += error_B.sum().item()
            displacement += displacement_B.sum().item()
            count += len(windows_B)
        return loss / count, 1.0 - error / displacement if displacement else float("nan")

    def about(self) -> dict[str, Any]:
        """See `Objective.about`."""
        return {"normaliser": self.normaliser.as_table()}


class WindowError(Objective):
    """For the basis `window`: squared error of the forecast weights over that of copying the last snapshot.

    The loss is 1 - skill, mean over forward steps: windows count by how far they move, as in the figure that is
    reported. As early windows move a hundred times as far as late ones, they are drawn more often instead of weighed
    more, which tells the same to less noise. The ridge that the model corrects is fitted here.
    """

    def __init__(
        self,
        size: config.Model,
        question: Question,
        train: Sequence[GramBand],
        validation: Sequence[GramBand],
        device: torch.device | str,
        joined: float = 0.0,
    ):
        self._joined = joined
        self.segments = WindowSegments(train, question, device)
        self.validation = WindowSegments(validation, question, device)
        # Half of each draw is by share: late windows are still seen, and no window's weight exceeds 2.
        total = self.segments.shares_N.sum() or 1.0
        chances_N = 0.5 * self.segments.shares_N / total + 0.5 / self.segments.num_windows
        self.chances = chances_N.cumsum() / chances_N.sum()
        importances_N = 1.0 / (chances_N * self.segments.num_windows)
        self._importances_N = torch.from_numpy(importances_N).float().to(device)
        model = WindowTransformer(size, question.steps, question.snapshots_per_iteration)
        self._moved_H = torch.from_numpy(self.segments.moved_H).float().to(device)
        ridge = Ridge(question)
        ridge.fit(Trials(bands=train, weights=tuple), Trials(bands=validation, weights=tuple))
        model.ridge_QHK.copy_(torch.from_numpy(ridge.table_QHK()))
        self.model: WindowTransformer = model.to(device)

    def loss(self, network: nn.Module, windows_B: NDArray[np.int64]) -> Tensor:
        """See `Objective.loss`."""
        batch = self.segments.gather(windows_B)
        if self._joined:
            question = self.segments.question
            batch = side_by_side(batch, question.steps, question.snapshots_per_iteration, self._joined)
        error_BH, scales_B = _error(network, batch), batch.scales_B
        weights_B = scales_B.float() * self._importances_N[torch.from_numpy(windows_B).to(scales_B.device)]
        return (error_BH * weights_B[:, None] / self._moved_H).mean()

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """See `Objective.validate`; the loss is 1 - skill, mean over forward steps."""
        self.model.eval()
        error_H, moved_H = (torch.zeros_like(self._moved_H, dtype=torch.float64) for _ in range(2))
        for windows_B in _validation_windows(self.validation.num_windows):
            batch = self.validation.gather(windows_B)
            error_H += (_error(self.model, batch) * batch.scales_B[:, None]).sum(dim=0)
            moved_H += (batch.moved_BH * batch.scales_B[:, None]).sum(dim=0)
        # Where nothing moves, what is left of the loss is the error itself; skill there is none.
        loss = (error_H / torch.where(moved_H > 0, moved_H, 1.0)).mean()
        return loss.item(), 1.0 - (error_H[0] / moved_H[0]).item()


def _error(network: nn.Module, batch: WindowBatch) -> Tensor:
    """||w_hat - w||^2 of the network's forecasts, in units of the batch's scales; (B, H)."""
    coefficients_BHK = network(batch.grams_BKK, batch.phases_B, batch.progress_B, batch.learning_rates_B)
    # The square of a difference, multiplied out: coefficients meet nothing but inner products.
    quadratic_BHK = (coefficients_BHK @ batch.grams_BKK - 2.0 * batch.towards_BHK) * coefficients_BHK
    return quadratic_BHK.sum(dim=2) + batch.moved_BH


def make_objective(experiment: config.Experiment, data: TrainingData, device: torch.device | str = "cpu") -> Objective:
    """What the experiment's basis asks for."""
    if isinstance(data.train, Tokens) and isinstance(data.validation, Tokens):
        return NextToken(experiment.model, data.train, data.validation, device)
    assert not isinstance(data.train, Tokens), "training and validation trials have one basis"
    assert not isinstance(data.validation, Tokens), "training and validation trials have one basis"
    question, joined = Question.of(experiment), experiment.train.joined_windows
    return WindowError(experiment.model, question, data.train, data.validation, device, joined)


def _validation_windows(num_windows: int) -> Iterator[NDArray[np.int64]]:
    windows = np.linspace(0, num_windows - 1, min(num_windows, VALIDATION_WINDOWS)).astype(np.int64)
    for begin in range(0, len(windows), VALIDATION_BATCH):
        yield windows[begin : begin + VALIDATION_BATCH]
