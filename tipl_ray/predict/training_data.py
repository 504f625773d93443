"""The trials that train and those that choose, reduced."""

import dataclasses
from collections.abc import Sequence

import torch

from tipl_ray import config
from tipl_ray.paper.objective import NextToken
from tipl_ray.paper.temporal_svd import FittedBasis
from tipl_ray.paper.tokens import Tokens
from tipl_ray.predict.gram import GramBand, Question
from tipl_ray.predict.objective import Objective
from tipl_ray.window.objective import WindowError


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


def make_objective(experiment: config.Experiment, data: TrainingData, device: torch.device | str = "cpu") -> Objective:
    """What the experiment's basis asks for."""
    if isinstance(data.train, Tokens) and isinstance(data.validation, Tokens):
        return NextToken(experiment.model, data.train, data.validation, device)
    assert not isinstance(data.train, Tokens), "training and validation trials have one basis"
    assert not isinstance(data.validation, Tokens), "training and validation trials have one basis"
    question, joined = Question.of(experiment), experiment.train.joined_windows
    return WindowError(experiment.model, question, data.train, data.validation, device, joined)
