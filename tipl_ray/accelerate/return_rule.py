"""A rule for jumps whose few parameters are tuned for return, rather than to predict what PPO would have done.

At the end of an iteration of PPO, at progress p of the training (0 to 1),

    jump = first(p) x first displacement + last(p) x last displacement + past(p) x (M1 + decay M2 + decay^2 M3 + ...)

where the displacements are those between the iteration's snapshots, and Mj is the total weight change of the j-th
iteration before, including its jump, as far back as the context reaches. first(p), last(p) and past(p) are linear in p,
from their value at the beginning of training to that at the end.

Shapes: B contexts, H forward steps, K displacements of context.
"""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tipl_ray.predict.gram import Contexts, Question
from tipl_ray.predict.predictor import Combination


class RuleNumbers(NamedTuple):
    """The parameters of a rule; the defaults are `first-again`."""

    first_begin: float = 1.0
    first_end: float = 1.0
    last_begin: float = 0.0
    last_end: float = 0.0
    past_begin: float = 0.0
    past_end: float = 0.0
    decay: float = 0.5
    """Decay of past moves per iteration back; 0 to 1."""

    def closed_form(self) -> str:
        """The rule as a formula.

        >>> RuleNumbers(first_end=0.5).closed_form()
        '(1 - 0.5 p) first'
        """
        terms = [
            (self.first_begin, self.first_end, "first"),
            (self.last_begin, self.last_end, "last"),
            (self.past_begin, self.past_end, f"past moves, decaying by {self.decay:.3g}"),
        ]
        shown = [f"({begin:.3g} {end - begin:+.3g} p) {what}" for begin, end, what in terms if begin or end]
        return " + ".join(shown).replace(" -", " - ").replace(" +0 p", "").replace("  ", " ") or "0"


class ReturnRule(Combination):
    """The rule as a predictor; its parameters are set, not fitted to snapshots."""

    name, in_tables = "return-rule", False

    def __init__(self, question: Question):
        super().__init__(question)
        self.fitted = {"numbers": np.array(RuleNumbers())}

    @classmethod
    def of(cls, question: Question, numbers: RuleNumbers, kl_limit: float = 0.0) -> Self:
        """A rule with these parameters, tuned with a limit on a jump's KL divergence; 0: no limit."""
        made = cls(question)
        made.fitted = {"numbers": np.array(numbers), "kl_limit": np.array(kl_limit)}
        return made

    def asked(self, question: Question) -> Self:
        """The same rule for iterations of another length. Raises ValueError for another context length."""
        if question.context != self.question.context:
            raise ValueError(
                f"{self.name} has a context of {self.question.context} displacements, not {question.context}"
            )
        made = type(self)(question)
        made.fitted = self.fitted
        return made

    @property
    def numbers(self) -> RuleNumbers:
        """The rule's parameters."""
        return RuleNumbers(*self.fitted["numbers"].tolist())

    @property
    def kl_limit(self) -> float:
        """Limit on the approximate KL divergence of a jump from the rollout policy; 0: no limit."""
        return float(self.fitted.get("kl_limit", 0.0))

    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """The formula above as coefficients of each context's displacements.

        A jump over several snapshots is divided equally among them.
        """
        weights_B3 = self.weights_seen(contexts)
        left, steps_H = self.question.snapshots_per_iteration, np.asarray(self.question.steps)
        answers_BHK = np.empty((len(contexts.phases_B), len(steps_H), self.question.context))
        for phase in np.unique(contexts.phases_B):
            mine_B = contexts.phases_B == phase
            terms_3K = self.terms(int(phase))
            shares_H = steps_H / (left - phase)
            answers_BHK[mine_B] = shares_H[:, None] * (weights_B3[mine_B] @ terms_3K)[:, None]
        return answers_BHK

    def weights_seen(self, contexts: Contexts) -> NDArray[np.float64]:
        """Weights of the first, last and past displacements in each context, by its progress alone; (B, 3)."""
        return self.weights(contexts.progress_B)

    def weights(self, progress_B: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights of the first, last and past displacements at some progress; (B, 3)."""
        numbers = self.numbers
        begin_3, end_3 = np.array(numbers[0:6:2]), np.array(numbers[1:6:2])
        return begin_3 + np.asarray(progress_B)[:, None] * (end_3 - begin_3)

    def terms(self, phase: int) -> NDArray[np.float64]:
        """The iteration's first displacement, its last one and past moves, as combinations of a context's displacements
        (3, K); `phase` is the number of snapshots into the iteration."""
        per_iteration, context = self.question.snapshots_per_iteration, self.question.context
        # Where an iteration has just closed, it is the one that is meant.
        recorded = phase or per_iteration
        terms_3K = np.zeros((3, context))
        if recorded <= context:
            terms_3K[0, -recorded] = 1.0
        terms_3K[1, -1] = 1.0
        before = np.arange(context)[::-1] - recorded
        past_K = before >= 0
        terms_3K[2, past_K] = self.numbers.decay ** (before[past_K] // per_iteration)
        return terms_3K
