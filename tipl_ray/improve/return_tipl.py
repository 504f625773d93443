"""TIPL for return as a predictor: a rule's weights plus the changes that a model predicts from the trajectory.

Shapes: B contexts, K displacements of context, C = 3 changes: of first, last and past.
"""

import functools
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from tipl_ray import config
from tipl_ray.accelerate.return_rule import ReturnRule
from tipl_ray.improve.gain_model import EXTRA_SIZE, GainTransformer, Seen, Sight
from tipl_ray.predict.gram import Contexts, Question

MODEL = "model."
"""Prefix of the names of the model's weights in `fitted`."""


class ReturnTipl(ReturnRule):
    """The rule plus the change with the largest predicted gain; without a model only the rule."""

    name, in_tables = "return-tipl", False

    @classmethod
    def made_of(cls, rule: ReturnRule, model: GainTransformer, spread: tuple[float, ...]) -> Self:
        """A model's changes, in units of `spread`, added to a rule. Raises ValueError for a model with inputs that a
        context does not contain."""
        if model.sight.extras:
            raise ValueError("the model needs KL divergence and returns as inputs, which a context does not contain")
        made = cls.of(rule.question, rule.numbers, rule.kl_limit)
        made.fitted["spread"] = np.array(spread)
        made.fitted["size"] = np.array([model.size.embedding, model.size.layers, model.size.heads])
        made.fitted["trajectory"] = np.array(model.sight.trajectory)
        made.fitted |= {f"{MODEL}{name}": value.numpy() for name, value in model.state_dict().items()}
        return made

    @functools.cached_property
    def model(self) -> GainTransformer:
        """The model, restored from `fitted`."""
        embedding, layers, heads = self.fitted["size"].tolist()
        size = config.Model(context=self.question.context, embedding=embedding, layers=layers, heads=heads, dropout=0.0)
        with torch.random.fork_rng(devices=[]):
            model = GainTransformer(size, Sight(trajectory=bool(self.fitted["trajectory"])))
        weights = {
            name.removeprefix(MODEL): torch.from_numpy(np.array(array))
            for name, array in self.fitted.items()
            if name.startswith(MODEL)
        }
        model.load_state_dict(weights)
        return model.eval()

    @torch.inference_mode()
    def weights_seen(self, contexts: Contexts) -> NDArray[np.float64]:
        """The rule's weights plus the changes; only the rule's in a context with a displacement of 0."""
        rule_B3 = self.weights(contexts.progress_B)
        if "size" not in self.fitted:
            return rule_B3
        # A user's loop may jump under autocast; the model answers in its own type.
        with torch.autocast("cpu", enabled=False):
            changes_B3 = self.model.best_change(seen(contexts, self.question)).double().numpy()
        still_B = np.any(np.diagonal(contexts.grams_BKK, axis1=1, axis2=2) <= 0, axis=1)
        changes_B3[still_B] = 0.0
        return rule_B3 + changes_B3 * self.fitted["spread"]


def seen(contexts: Contexts, question: Question) -> Seen:
    """The model's inputs from contexts; those that only the PPO engine has are 0."""
    count, per_iteration = len(contexts.phases_B), question.snapshots_per_iteration
    phases_B = torch.from_numpy(np.asarray(contexts.phases_B, dtype=np.int64))
    return Seen(
        grams_BKK=torch.from_numpy(np.asarray(contexts.grams_BKK)),
        # Where an iteration has just closed, it is the one that is meant.
        recorded_B=torch.where(phases_B == 0, per_iteration, phases_B),
        per_iteration_B=torch.full((count,), per_iteration),
        progress_B=torch.from_numpy(np.asarray(contexts.progress_B, dtype=np.float64)),
        learning_rates_B=torch.from_numpy(np.asarray(contexts.learning_rates_B, dtype=np.float64)),
        extras_BX=torch.zeros(count, EXTRA_SIZE),
    )
