"""The paper's representation (Section 3.2): snapshots as tokens of a Temporal SVD."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from tipl_ray import config
from tipl_ray.data.rows import Rows
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.experiments import from_table
from tipl_ray.predict.gram import Question, moved_squares
from tipl_ray.predict.representation import Representation, TrainingData

if TYPE_CHECKING:
    import torch

    from tipl_ray.paper.objective import NextToken
    from tipl_ray.paper.predictor import Tipl
    from tipl_ray.paper.temporal_svd import FittedBasis
    from tipl_ray.paper.tokens import Tokens
    from tipl_ray.predict.predictor import Predictor

FOR_WINDOWS = "it is for basis.kind=window"


class TokenRepresentation(Representation):
    """Each snapshot is one token of D numbers. Subclasses define how a trial's basis is fitted."""

    own_predictors = ("tipl", "svd-floor")
    not_learned_from = ("joined_windows",)

    causal: ClassVar[bool]
    """Whether a token depends on nothing of its trial that comes later."""

    @abc.abstractmethod
    def fit_trial(self, weights_TP: Rows, shared: FittedBasis | None) -> FittedBasis:
        """The basis of one trajectory, with its tokens. Raises ValueError as `temporal_svd.fit_basis`."""

    def without_effect(self) -> dict[str, str]:
        """See `Representation.without_effect`."""
        return dict.fromkeys(("model.phase", "model.clock", "train.joined_windows"), FOR_WINDOWS)

    def forecasts(self, model: config.Model) -> dict[str, str]:
        """See `Representation.forecasts`: changes of tokens used to be decoded as whole tokens."""
        return {"decoded": "changes"} if model.residual else {}

    def read(self, storage: str, seed: int, question: Question, shared: FittedBasis | None = None) -> Tokens:
        """See `Representation.read`."""
        from tipl_ray.paper.tokens import tokens_of
        from tipl_ray.predict.bands import load_band

        weights_TP = TrajectoryStore(storage).weights(seed)
        try:
            fitted = self.fit_trial(weights_TP, shared)
        except ValueError as error:
            raise ValueError(f"trial {seed}: {error}") from error
        band = load_band(storage, seed, question)
        return tokens_of(seed, weights_TP, fitted, moved_squares(band.products_SW, question.future))

    def gather(self, sets: Sequence[Sequence[Tokens]]) -> Tokens:
        """See `Representation.gather`."""
        from tipl_ray.paper.tokens import Tokens

        return Tokens.stack([trial for trials in sets for trial in trials])

    def objective(
        self, experiment: config.Experiment, data: TrainingData, device: torch.device | str = "cpu"
    ) -> NextToken:
        """See `Representation.objective`."""
        from tipl_ray.paper.objective import NextToken

        return NextToken(experiment.model, data, device)

    def load(self, folder: str, question: Question | None, device: torch.device | str = "cpu") -> Tipl:
        """See `Representation.load`."""
        from tipl_ray.paper.predictor import Tipl, TrialBasis
        from tipl_ray.paper.transformer import CausalTransformer, Normaliser
        from tipl_ray.predict.model_files import ABOUT_FILE
        from tipl_ray.predict.models import load_about, understood

        about = load_about(folder)
        with understood(folder, ABOUT_FILE):
            normaliser = Normaliser.from_table(about["normaliser"])
            question = question or Question.of(from_table(about["experiment"]))
        trial_basis = TrialBasis(self, self._load_shared(folder))
        return Tipl(question, CausalTransformer.load(folder), trial_basis, normaliser, device)

    def companions(self, tipl: Predictor, *, elsewhere: bool) -> tuple[list[Predictor], Predictor]:
        """See `Representation.companions`."""
        from tipl_ray.paper.predictor import SvdFloor, Tipl

        assert isinstance(tipl, Tipl), "TIPL is what `load` returned"
        return [], SvdFloor(tipl.question, tipl.trial_basis, changes=tipl.model.size.residual)

    def _load_shared(self, folder: str) -> FittedBasis | None:
        return None


class TrialTokens(TokenRepresentation):
    """A Temporal SVD of the trial's own trajectory: the paper's, not causal."""

    causal = False

    def __str__(self) -> str:
        return f"{self.name} of rank {self.basis.rank}"

    def check(self, experiment: config.Experiment) -> None:
        """See `Representation.check`."""
        if self.basis.rank > experiment.num_snapshots:
            raise ValueError(
                f"basis.rank={self.basis.rank} exceeds the {experiment.num_snapshots} snapshots of a trial"
            )

    def check_policy(self, num_weights: int) -> None:
        """See `Representation.check_policy`."""
        if self.basis.rank > num_weights:
            raise ValueError(
                f"basis.rank={self.basis.rank} exceeds the {num_weights} weights of a policy, and with them the "
                "singular values of a trial"
            )

    def fit_trial(self, weights_TP: Rows, shared: FittedBasis | None) -> FittedBasis:
        """See `TokenRepresentation.fit_trial`."""
        from tipl_ray.paper.temporal_svd import fit_basis

        return fit_basis(weights_TP, self.basis.rank)

    def narrowed(self, data: TrainingData) -> TrainingData:
        """Tokens of a lower SVD rank; see `Tokens.truncated`."""
        rank, shared = self.basis.rank, data.shared
        return TrainingData(
            train=data.train.truncated(rank),
            validation=data.validation.truncated(rank),
            shared=shared.truncated(rank) if shared else None,
        )


class SharedTokens(TrialTokens):
    """One Temporal SVD of all training trials together: causal."""

    causal = shares = True

    def check(self, experiment: config.Experiment) -> None:
        """See `Representation.check`: many trials have more snapshots than one, whatever the rank."""

    def fit(self, storage: str, seeds: Sequence[int]) -> FittedBasis:
        """The basis itself."""
        from tipl_ray.paper.temporal_svd import fit_shared_basis

        store = TrajectoryStore(storage)
        return fit_shared_basis([store.weights(seed) for seed in seeds], self.basis.rank)

    def fit_trial(self, weights_TP: Rows, shared: FittedBasis | None) -> FittedBasis:
        """See `TokenRepresentation.fit_trial`."""
        assert shared is not None, "a shared basis is fitted before the trials are read"
        return shared.on(weights_TP)

    def _load_shared(self, folder: str) -> FittedBasis:
        from tipl_ray.paper.temporal_svd import BASIS_FILE, FittedBasis
        from tipl_ray.predict.models import read_model_file, understood

        content = read_model_file(folder, BASIS_FILE)
        with understood(folder, BASIS_FILE):
            return FittedBasis.from_bytes(content)
