"""What a representation is: how trajectories become what a model learns from, and how its answers become weights.

Training, evaluation, sweep and serving know representations by this interface alone, and never ask which one they have.
This package has three: the tokens of `tipl_ray.paper`, the Gram windows of `tipl_ray.window` and the single weights of
`tipl_ray.per_weight`; one from outside is named as `module:Name`. Does not import torch until a model is loaded, so
that errors in options are found at once.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tipl_ray import config
from tipl_ray.predict.gram import Question
from tipl_ray.registry import REPRESENTATIONS

if TYPE_CHECKING:
    import torch

    from tipl_ray.predict.objective import Objective
    from tipl_ray.predict.predictor import Predictor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingData:
    """The trials that train and those that choose, as a representation gathers them; test trials have no place here."""

    train: Any
    validation: Any
    shared: Any = None
    """What `Representation.fit` found."""


class Representation(abc.ABC):
    """One way to see trajectories, as an experiment's `basis` describes it."""

    own_predictors: ClassVar[tuple[str, ...]] = ("tipl",)
    """Names of the predictors that it brings: TIPL, its upper bound, and others."""
    across_tasks: ClassVar[bool] = False
    """Whether one model serves policies of any size, so that it may be trained on other tasks' data sets."""
    can_jump: ClassVar[bool] = False
    """Whether its TIPL answers with coefficients of displacements, which jumps are made of."""
    shares: ClassVar[bool] = False
    """Whether trials share something that is fitted on those that train: see `fit`."""
    one_thread: ClassVar[bool] = False
    """Whether its model is too small to gain by a second thread."""
    not_learned_from: ClassVar[tuple[str, ...]] = ()
    """Fields of `train` that change nothing in what its model learns."""

    def __init__(self, basis: config.Basis) -> None:
        self.basis = basis

    @property
    def name(self) -> str:
        """Its name in the result table."""
        return self.basis.kind.rpartition(":")[2]

    def __str__(self) -> str:
        """In a few words."""
        return self.name

    def check(self, experiment: config.Experiment) -> None:  # noqa: B027  # most fit every experiment
        """Refuse an experiment that it does not fit. Raises ValueError naming the field, the value and the limit."""

    def check_policy(self, num_weights: int) -> None:  # noqa: B027
        """Refuse policies of so many weights that it does not fit. Raises ValueError."""

    def without_effect(self) -> dict[str, str]:
        """Fields of an experiment that change nothing here, each with the reason."""
        return {}

    def learned_steps(self, evaluate: config.Evaluate) -> tuple[int, ...]:
        """Forward steps that training depends on; empty where later forecasts are made of single steps."""
        return ()

    def forecasts(self, model: config.Model) -> dict[str, str]:
        """How a trained model's answers become weights, if that has changed since earlier versions: results of those
        are not taken for these."""
        return {}

    def fit(self, storage: str, seeds: Sequence[int]) -> Any:
        """What all trials share, fitted on those that train."""
        raise NotImplementedError

    @abc.abstractmethod
    def read(self, storage: str, seed: int, question: Question, shared: Any = None) -> Any:
        """One trial, reduced to what the model learns from; its weights are let go.

        Raises StoreError where the data set is damaged, ValueError where the trial does not fit.
        """

    @abc.abstractmethod
    def gather(self, sets: Sequence[Sequence[Any]]) -> Any:
        """Trials of one or more data sets that were read one by one. Raises ValueError if they do not fit each other.

        Of several data sets each counts as much as any other, whatever its number of trials and weights.
        """

    def narrowed(self, data: TrainingData) -> TrainingData:
        """What was read for an experiment that asks for more, such as a higher SVD rank, as it is for this one."""
        return data

    @abc.abstractmethod
    def objective(
        self, experiment: config.Experiment, data: TrainingData, device: torch.device | str = "cpu"
    ) -> Objective:
        """A new model, drawn from torch's generator, and what it is trained for."""

    @abc.abstractmethod
    def load(self, folder: str, question: Question | None, device: torch.device | str = "cpu") -> Predictor:
        """The trained TIPL in a folder; by default for the question that it was trained on.

        Raises StoreError where there is no model, or a damaged one.
        """

    @abc.abstractmethod
    def companions(self, tipl: Predictor, *, elsewhere: bool) -> tuple[list[Predictor], Predictor | None]:
        """Predictors that a loaded TIPL brings, and its upper bound: the true future as well as this can express it;
        None where it can express everything.

        `elsewhere`: TIPL was trained on other data sets than those at hand.
        """


def representation_of(basis: config.Basis) -> Representation:
    """The one that an experiment's basis names. Raises ValueError where there is none such."""
    return REPRESENTATIONS.load(basis.kind)(basis)


def representation_in(folder: str) -> Representation:
    """The one of a trained model in a folder. Raises StoreError where there is none, or a damaged one."""
    from tipl_ray.predict.model_files import ABOUT_FILE
    from tipl_ray.predict.models import load_about, understood

    about = load_about(folder)
    with understood(folder, ABOUT_FILE):
        return representation_of(config.Basis(**config.Basis.upgraded(about["basis"])))


def load_tipl(folder: str, question: Question | None = None, device: torch.device | str = "cpu") -> Predictor:
    """The trained TIPL in a folder or under a URI, by default for the question that it was trained on.

    Raises StoreError where there is none, or a damaged one.
    """
    return representation_in(folder).load(folder, question, device)
