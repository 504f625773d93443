"""Jumps: a predictor's forecast in place of the update epochs that would have led there.

`History` is one vector of weights on its way: its last displacements, their inner products, and how a predictor carries
it on. `ModuleJumps` keeps that of any torch module, for anybody's own training loop; group_jumps.py those of trials.
Knows predictors by what they answer; knows nothing of PPO or environments.

Shapes: K displacements of context, P weights of one history, H snapshots of a jump.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl_ray.accelerate.return_rule import ReturnRule
from tipl_ray.predict.baselines import FirstAgain
from tipl_ray.predict.gram import Contexts, Question
from tipl_ray.predict.saved import load_predictor

COLUMNS_AT_ONCE = 4096
"""Columns of the displacements whose products are summed in float32; such sums are added up in float64."""
MOVED_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Types of parameters that a module's jump moves; a complex parameter is moved as its real and imaginary parts."""

State = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JumpSettings:
    """How a predictor's forecast is applied. Raises ValueError naming the field for invalid values."""

    horizon: int = 3
    """Number of snapshots at the end of an iteration that the jump replaces; update epochs are run for those before."""
    damping: float = 1.0
    """Factor on the forecast displacement; above 1 goes further."""
    networks: Literal["policy", "both"] = "policy"
    """What jumps: only the policy, or also the critic, with a separate forecast."""
    moments: Literal["kept", "reset"] = "kept"
    """Whether Adam's moments and step count are kept or reset after a jump."""
    gate: bool = False
    """Undo a jump that lowers the surrogate objective on the stored rollout."""
    corrective_epochs: int = dataclasses.field(default=0, metadata={"later": True})
    """Update epochs to run after the jump, with Adam's state unchanged; the iteration's last snapshot is taken after
    them."""
    kl_limit: float = dataclasses.field(default=0.0, metadata={"later": True})
    """Shorten a jump whose approximate KL divergence from the rollout policy would exceed this. 0: no limit."""
    limit: float = 3.0
    """Refuse a jump that moves the weights per snapshot by more than this multiple of the context's longest
    displacement."""

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon={self.horizon} is below 1: a jump replaces at least one snapshot")
        if self.corrective_epochs < 0:
            raise ValueError(f"corrective_epochs={self.corrective_epochs} is below 0")
        if not 0 <= self.kl_limit < 1e37:
            raise ValueError(f"kl_limit={self.kl_limit} must be a number of at least 0")
        for field in ("damping", "limit"):
            # What float32 holds; NaN is refused too.
            if not 1e-37 < (value := getattr(self, field)) < 1e37:
                raise ValueError(f"{field}={value} is not a positive number")


class Forecaster(Protocol):
    """The interface of predictors for jumps; `predictor.Combination` has it."""

    question: Question

    def coefficients(self, contexts: Contexts) -> NDArray[np.float64]:
        """Coefficient of each of the context's displacements in each forward step; (B, H, K)."""


class History:
    """The last K displacements of a vector of weights, with their inner products, as a ring buffer.

    Displacements not yet recorded are 0. float64 weights are kept in float64, their displacements in float32.
    Memory: (K + 1) P float32, and K x K float64.
    """

    def __init__(self, weights_P: NDArray[np.floating], context: int):
        self.last_P = np.array(weights_P)
        # A ring: the oldest displacement lies at `oldest`, and nothing is moved when it gives way.
        self.displacements_KP = np.zeros((context, len(self.last_P)), dtype=np.float32)
        self.products_KK = np.zeros((context, context))
        self.oldest, self.fresh = 0, 0

    def record(self, weights_P: NDArray[np.floating]) -> None:
        """Record the next snapshot; it is copied."""
        np.subtract(weights_P, self.last_P, out=self.displacements_KP[self.oldest])
        self.last_P[:] = weights_P
        self.oldest = (self.oldest + 1) % len(self.displacements_KP)
        self.fresh = min(self.fresh + 1, len(self.displacements_KP))

    def gram(self) -> NDArray[np.float64]:
        """Inner products (K, K) of the displacements, oldest first."""
        self._multiply_fresh()
        order_K = self._order()
        return self.products_KK[np.ix_(order_K, order_K)]

    def moves(self, coefficients_HK: NDArray[np.float64]) -> NDArray[np.float32]:
        """The displacements (H, P) that coefficients give; coefficients are for the oldest displacement first."""
        if not coefficients_HK.any():
            # Nothing times a displacement that is not finite is not nothing.
            return np.zeros((len(coefficients_HK), len(self.last_P)), dtype=np.float32)
        return self._in_ring(coefficients_HK).astype(np.float32) @ self.displacements_KP

    def carry_on(
        self, coefficients_HK: NDArray[np.float64], moves_HP: NDArray[np.float32], weights_P: NDArray[np.floating]
    ) -> None:
        """Record the moves of these coefficients as the next displacements; `weights_P` are the weights after them."""
        self._multiply_fresh()
        ring_HK, places_H = self._in_ring(coefficients_HK), self._order()[: len(coefficients_HK)]
        # Products of combinations are combinations of products: the moves need not be multiplied.
        towards_HK = ring_HK @ self.products_KK if ring_HK.any() else ring_HK
        among_HH = towards_HK @ ring_HK.T
        self.products_KK[places_H], self.products_KK[:, places_H] = towards_HK, towards_HK.T
        self.products_KK[np.ix_(places_H, places_H)] = among_HH
        self.displacements_KP[places_H] = moves_HP
        self.last_P[:] = weights_P
        self.oldest = (self.oldest + len(places_H)) % len(self.displacements_KP)

    def amend(self, weights_P: NDArray[np.floating]) -> None:
        """Change the last displacement so that it ends at these weights."""
        self._multiply_fresh()
        self.displacements_KP[self._order()[-1]] += weights_P - self.last_P
        self.last_P[:] = weights_P
        self.fresh = 1

    def of_others(self, weights_P: NDArray[np.floating], kept: Iterable[tuple[slice, slice]]) -> "History":
        """A history for other weights: the kept slices (here, there) are carried over; the rest has not moved yet."""
        other = History(weights_P, len(self.displacements_KP))
        for here, there in kept:
            other.last_P[there], other.displacements_KP[:, there] = self.last_P[here], self.displacements_KP[:, here]
        other.oldest, other.fresh = self.oldest, len(self.displacements_KP)
        return other

    def state(self) -> State:
        """Everything that the next jump depends on."""
        marks = np.array([self.oldest, self.fresh], dtype=np.int64)
        return {
            "last": self.last_P.copy(),
            "displacements": self.displacements_KP.copy(),
            "products": self.products_KK.copy(),
            "marks": marks,
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a state. Raises ValueError if its context or its weights have another size."""
        own = {"displacements": self.displacements_KP, "last": self.last_P, "products": self.products_KK}
        for name, array in own.items():
            if state[name].shape != array.shape:
                raise ValueError(
                    f"the state's {name} have shape {state[name].shape}, but this history's have {array.shape}"
                )
        self.last_P[:], self.displacements_KP[:] = state["last"], state["displacements"]
        self.products_KK[:] = state["products"]
        self.oldest, self.fresh = map(int, state["marks"])

    def _order(self) -> NDArray[np.int64]:
        """Places in the ring, the oldest displacement's first."""
        return (self.oldest + np.arange(len(self.displacements_KP))) % len(self.displacements_KP)

    def _in_ring(self, coefficients_HK: NDArray[np.float64]) -> NDArray[np.float64]:
        ring_HK = np.empty_like(coefficients_HK)
        ring_HK[:, self._order()] = coefficients_HK
        return ring_HK

    def _multiply_fresh(self) -> None:
        """Inner products of the displacements that came since the last time with all of them, in one pass."""
        if not self.fresh:
            return
        places_F, size = self._order()[-self.fresh :], self.displacements_KP.shape[1]
        towards_FK = np.zeros((self.fresh, len(self.displacements_KP)))
        for column in range(0, size, COLUMNS_AT_ONCE):
            part_Kp = self.displacements_KP[:, column : column + COLUMNS_AT_ONCE]
            towards_FK += part_Kp[places_F] @ part_Kp.T
        self.products_KK[places_F], self.products_KK[:, places_F] = towards_FK, towards_FK.T
        self.fresh = 0


def check_schedule(question: Question, recorded: int, horizon: int) -> None:
    """Raise ValueError if a predictor cannot replace `horizon` snapshots after `recorded` ones in an iteration."""
    if question.steps[:horizon] != tuple(range(1, horizon + 1)):
        raise ValueError(f"horizon={horizon} exceeds the predictor's forward steps {question.steps}")
    if recorded + horizon != question.snapshots_per_iteration:
        raise ValueError(
            f"{recorded} recorded snapshots and horizon={horizon} do not add up to the "
            f"{question.snapshots_per_iteration} snapshots per iteration that the predictor was fitted on"
        )
    if horizon > question.context:
        raise ValueError(f"horizon={horizon} exceeds the predictor's context of {question.context} displacements")


def propose(
    forecaster: Forecaster,
    history: History,
    settings: JumpSettings,
    *,
    phase: int,
    progress: float,
    learning_rate: float,
) -> tuple[NDArray[np.float64], str | None]:
    """Coefficients of the displacements in each move of a jump (H, K), all 0 if it is refused; and why it is refused.

    Refused are forecasts that are not finite or that go much further than the displacements of the context do.
    """
    gram_KK = history.gram()
    nothing_HK = np.zeros((settings.horizon, len(gram_KK)))
    if not np.isfinite(gram_KK).all():
        return nothing_HK, "the weights are not finite"
    contexts = Contexts(
        grams_BKK=gram_KK[None],
        phases_B=np.array([phase]),
        progress_B=np.array([progress]),
        learning_rates_B=np.array([learning_rate]),
    )
    # One trial at a time: what a trial is told does not depend on those beside it.
    ahead_HK = settings.damping * forecaster.coefficients(contexts)[0, : settings.horizon]
    if not np.isfinite(ahead_HK).all():
        return nothing_HK, "the forecast is not finite"
    length = float(np.sqrt(max(ahead_HK[-1] @ gram_KK @ ahead_HK[-1], 0.0)))
    longest = settings.limit * settings.horizon * float(np.sqrt(gram_KK.diagonal().max()))
    if length > longest:
        return nothing_HK, f"the forecast moves the weights by {length:.3g}, beyond the limit of {longest:.3g}"
    return np.diff(ahead_HK, axis=0, prepend=0.0), None


def allowed_share(here: float, there: float, limit: float) -> float:
    """The share of a jump that stays within a KL divergence, given the divergence before and after the whole jump.

    The divergence grows ever faster along a jump, so a straight line between the two overestimates it.
    """
    if there <= limit or there <= here < float("inf"):  # beyond the limit, perhaps, but not because of the jump
        return 1.0
    share = (limit - here) / (there - here) if there < float("inf") else 0.0
    return float(np.clip(np.nan_to_num(share), 0.0, 1.0))


def answers_of(forecaster: Forecaster) -> NDArray[np.float64]:
    """A predictor's coefficients in each phase for one context of made-up displacements (Q, H, K): what it is known by,
    whatever its name and place."""
    question = forecaster.question
    places_K, phases_Q = np.arange(question.context), np.arange(question.snapshots_per_iteration)
    gram_KK = 0.5 ** np.abs(np.subtract.outer(places_K, places_K)) * np.sqrt(np.outer(1.0 + places_K, 1.0 + places_K))
    contexts = Contexts(
        grams_BKK=np.repeat(gram_KK[None], len(phases_Q), axis=0),
        phases_B=phases_Q,
        progress_B=np.full(len(phases_Q), 0.25),
        learning_rates_B=np.full(len(phases_Q), 0.75),
    )
    return np.asarray(forecaster.coefficients(contexts), dtype=np.float64)


def _same_answers(one_QHK: NDArray[np.float64], other_QHK: NDArray[np.float64]) -> bool:
    """Whether they are one predictor's; machines differ in the last bits."""
    return one_QHK.shape == other_QHK.shape and np.allclose(one_QHK, other_QHK, rtol=1e-3, atol=1e-4, equal_nan=True)


class ModuleJumps:
    """Jumps for any torch module, in any training loop: call `record` after as many update epochs as there were between
    snapshots in the predictor's data, and `jump` in place of the epochs left out.

    All parameters that require a gradient at the time of the call jump, each once and in its own dtype. A parameter
    that is replaced, moved or converted between calls is continued under its name; a frozen one is forgotten; a new one
    has not moved yet. Parameters that did not move, and everything else, stay bit-identical.

    Costs for P trained parameters and a context of K: 4 (K + 1) P bytes on the CPU; per jump about one pass over them
    in float64 and one in float32, and one call of the predictor, which does not depend on P. On a GPU, the parameters
    are copied to the CPU at each call, and the moves back at a jump.
    """

    def __init__(self, module: torch.nn.Module, predictor: Forecaster, settings: JumpSettings | None = None):
        """Uses `horizon`, `damping`, `kl_limit` and `limit` of the settings. Raises ValueError if other settings are
        not at their defaults, if the predictor does not reach that far, and for a module with no trained parameter."""
        self.settings = settings or JumpSettings()
        _check_module_settings(self.settings)
        if not hasattr(predictor, "coefficients"):
            raise ValueError(
                f"{type(predictor).__name__} is not a predictor that combines displacements, which jumps need"
            )
        question = predictor.question
        check_schedule(question, question.snapshots_per_iteration - self.settings.horizon, self.settings.horizon)
        self._module, self._predictor = module, predictor
        trained = _trained(module)
        self._layout, self._history = _layout(trained), History(_flat(trained), question.context)
        self.recorded = 0
        """Snapshots recorded since the last jump."""
        self.taken, self.refused = 0, 0

    @classmethod
    def from_pretrained(
        cls, module: torch.nn.Module, name: str = "first-again-v1", *, recorded: int = 2, damping: float = 1.0
    ) -> Self:
        """Jumps with a predictor that comes with this package, or with one in a folder or at a URI.

        `recorded` is the number of snapshots recorded per iteration before the jump, one after every second update
        epoch; the package's rules work with any number. Their limit on a jump's KL divergence applies if `jump` is
        given the divergence. Raises ValueError if there is no such predictor, if `recorded` is no whole number from 1
        on, or if the predictor was fitted on iterations of another length.
        """
        if isinstance(recorded, bool) or not isinstance(recorded, int | np.integer) or recorded < 1:
            raise ValueError(f"recorded={recorded!r} is not a whole number from 1 on: snapshots recorded before a jump")
        recorded = int(recorded)
        predictor = load_predictor(name)
        kl_limit = 0.0
        question = Question(context=predictor.question.context, steps=(1,), snapshots_per_iteration=recorded + 1)
        if isinstance(predictor, ReturnRule):
            predictor, kl_limit = predictor.asked(question), predictor.kl_limit
        elif isinstance(predictor, FirstAgain):
            predictor = FirstAgain(question)
        in_all = predictor.question.snapshots_per_iteration
        if recorded >= in_all:
            raise ValueError(
                f"recorded={recorded} leaves nothing to jump over: {name} was fitted on iterations of {in_all} "
                f"snapshots, so at most {in_all - 1}"
            )
        return cls(module, predictor, JumpSettings(horizon=in_all - recorded, damping=damping, kl_limit=kl_limit))

    def record(self) -> None:
        """Record a snapshot of the module's weights. Raises ValueError if no parameter is trained any more."""
        trained = self._follow()
        self._history.record(_flat(trained))
        self.recorded += 1

    def jump(
        self,
        progress: float,
        learning_rate: float | None = None,
        divergence: Callable[[], float] | None = None,
    ) -> bool:
        """Move the weights to the predictor's forecast for the epochs left out; returns whether the jump was taken.

        `progress` is the fraction of training that is done, 0 to 1; `learning_rate` is the current one as a fraction of
        the first, by default annealed linearly. `divergence` returns the approximate KL divergence of the module, as it
        is when called, from the policy that collected the rollout; with it, a jump beyond `settings.kl_limit` is
        shortened, by linear interpolation between the divergences before and after. A forecast that is not finite or
        absurdly far is refused with a RuntimeWarning. Raises ValueError for invalid fractions, and if `record` was not
        called as often since the last jump as the predictor expects.
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress={progress} is not between 0 and 1: it is the fraction of training that is done")
        learning_rate = 1.0 - progress if learning_rate is None else learning_rate
        if not 0.0 <= learning_rate < float("inf"):
            raise ValueError(f"learning_rate={learning_rate} is not a fraction of the first learning rate, such as 0.5")
        expected = self._predictor.question.snapshots_per_iteration - self.settings.horizon
        if self.recorded != expected:
            raise ValueError(
                f"record() was called {self.recorded} times since the last jump, and jump() expects {expected}: call "
                "record() after every few update epochs, or give another number as `recorded`"
            )
        trained = self._follow()
        coefficients_HK, refused = propose(
            self._predictor,
            self._history,
            self.settings,
            phase=self.recorded,
            progress=float(progress),
            learning_rate=float(learning_rate),
        )
        here = divergence() if divergence and self.settings.kl_limit else 0.0
        moves_HP = self._history.moves(coefficients_HK)
        if not refused and not _move(trained, moves_HP.sum(axis=0)):
            refused, coefficients_HK = "the new weights would overflow their dtype", np.zeros_like(coefficients_HK)
            moves_HP = self._history.moves(coefficients_HK)
        if divergence and self.settings.kl_limit and not refused:
            coefficients_HK, moves_HP = self._shorten(trained, coefficients_HK, moves_HP, here, divergence())
        if refused:
            self.refused += 1
            warnings.warn(f"jump refused: {refused}; training continues without it", RuntimeWarning, stacklevel=2)
        else:
            self.taken += 1
        # Read back, as a narrow type rounds: what it lost is no displacement of the next snapshot.
        self._history.carry_on(coefficients_HK, moves_HP, _flat(trained))
        self.recorded = 0
        return refused is None

    def _shorten(
        self,
        trained: Mapping[str, Tensor],
        coefficients_HK: NDArray[np.float64],
        moves_HP: NDArray[np.float32],
        here: float,
        there: float,
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Undo the part of a jump that exceeds the limit on the divergence."""
        if (share := allowed_share(here, there, self.settings.kl_limit)) < 1.0:
            _move(trained, (np.float32(share) - 1) * moves_HP.sum(axis=0))
            coefficients_HK, moves_HP = share * coefficients_HK, np.float32(share) * moves_HP
        return coefficients_HK, moves_HP

    def state_dict(self) -> dict[str, Any]:
        """Tensors and counts that the next jumps depend on, including the whole history; for `torch.save`."""
        self._follow()
        history = {name: torch.from_numpy(array) for name, array in self._history.state().items()}
        shapes = [list(shape) for shape, _ in self._layout.values()]
        counts = {"recorded": self.recorded, "taken": self.taken, "refused": self.refused}
        answers = torch.from_numpy(answers_of(self._predictor))
        return {"history": history, "shapes": shapes, "answers": answers, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; its tensors may be on any device.

        Raises ValueError if it belongs to another context, module or predictor.
        """
        if missing := sorted({"history", "recorded", "taken", "refused"} - state.keys()):
            raise ValueError(f"the state has no {missing[0]!r}: it is not what state_dict() returned")
        self._follow()
        shapes = [list(shape) for shape, _ in self._layout.values()]
        # A state of an earlier version has no shapes.
        for index, (there, here) in enumerate(itertools.zip_longest(state.get("shapes", shapes), shapes)):
            if there != here:
                raise ValueError(f"trained parameter {index} has shape {there} in the state and {here} in the module")
        if "answers" in state:  # nor has it these
            theirs_QHK, own_QHK = state["answers"].detach().cpu().numpy(), answers_of(self._predictor)
            if theirs_QHK.shape[-1] == own_QHK.shape[-1] and not _same_answers(theirs_QHK, own_QHK):
                raise ValueError(
                    f"the state is of jumps by another predictor, whose answers are not those of this one "
                    f"({type(self._predictor).__name__}); load the predictor that it was saved with"
                )
        self._history.set_state({name: tensor.detach().cpu().numpy() for name, tensor in state["history"].items()})
        self.recorded, self.taken, self.refused = (int(state[name]) for name in ("recorded", "taken", "refused"))

    def _follow(self) -> dict[str, Tensor]:
        """The parameters that are trained now, by name; if they differ from before, the history is adapted."""
        trained = _trained(self._module)
        layout = _layout(trained)
        if list(layout.items()) != list(self._layout.items()):
            before, after = _slices(self._layout), _slices(layout)
            same = [name for name, (shape, _) in layout.items() if name in before and self._layout[name][0] == shape]
            self._history = self._history.of_others(_flat(trained), [(before[name], after[name]) for name in same])
            for name in same:
                # Converted as the parameter was, or what conversion rounds away would pass for a displacement.
                last_p = torch.from_numpy(self._history.last_P[after[name]])
                last_p.copy_(last_p.to(layout[name][1]))
            self._layout = layout
        return trained


Layout = dict[str, tuple[torch.Size, torch.dtype]]


def _check_module_settings(settings: JumpSettings) -> None:
    for field, done, otherwise in (
        ("networks", "policy", "make a ModuleJumps for each module that is to jump"),
        ("moments", "kept", "reset your optimizer's state where jump() returns True"),
        ("corrective_epochs", 0, "run them after jump(), and then record()"),
        ("gate", False, "compare your objective before and after jump(), and restore the weights where it fell"),
    ):
        if (value := getattr(settings, field)) != done:
            raise ValueError(f"{field}={value!r} works only in this package's PPO; with ModuleJumps, {otherwise}")


def _trained(module: torch.nn.Module) -> dict[str, Tensor]:
    """What an optimizer can move, by name, a tied parameter once: real tensors that share the parameters' memory."""
    trained = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if torch.nn.parameter.is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"{name} has no values yet: run the module once, or load its weights, before it can jump")
        value = parameter.detach()
        real = torch.view_as_real(value) if value.is_complex() else value
        if type(value) is not Tensor or value.layout != torch.strided or real.dtype not in MOVED_TYPES:
            kind = f"{type(value).__name__} of {value.dtype} and {value.layout}"
            raise ValueError(
                f"{name} is a {kind}, which jumps do not support; freeze it (requires_grad_(False)), or pass a "
                "submodule without it"
            )
        trained[name] = real
    if not trained:
        raise ValueError(
            "no parameter of the module requires a gradient, so there is nothing to train and nothing to jump"
        )
    return trained


def _layout(trained: Mapping[str, Tensor]) -> Layout:
    return {name: (value.shape, value.dtype) for name, value in trained.items()}


def _slices(layout: Layout) -> dict[str, slice]:
    """Where each parameter lies in the vector of all."""
    ends = itertools.accumulate((shape.numel() for shape, _ in layout.values()), initial=0)
    return {name: slice(*bounds) for name, bounds in zip(layout, itertools.pairwise(ends), strict=True)}


def _flat(trained: Mapping[str, Tensor]) -> NDArray[np.floating]:
    """A copy of all parameters as one vector (P,), of float64 where one of them is, else of float32."""
    wide = torch.float64 if any(value.dtype == torch.float64 for value in trained.values()) else torch.float32
    return torch.cat([value.reshape(-1).to("cpu", wide) for value in trained.values()]).numpy()


def _move(trained: Mapping[str, Tensor], move_P: NDArray[np.float32]) -> bool:
    """Add a move to the parameters that it moves; False, with nothing done, where one would no longer be finite."""
    parts = torch.from_numpy(move_P).split([value.numel() for value in trained.values()])
    moved = []
    for value, part in zip(trained.values(), parts, strict=True):
        by = part.view(value.shape).to(value.device)
        # A sum with a narrow type is made in float32, and rounded once; 0 is not added, as it would turn -0 into 0.
        ahead = torch.where(by == 0, value, (value + by).to(value.dtype))
        if not torch.isfinite(ahead[by != 0]).all():
            return False
        moved.append(ahead)
    for value, ahead in zip(trained.values(), moved, strict=True):
        value.copy_(ahead)
    return True
