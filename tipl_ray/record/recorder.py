"""`Recorder`: a few lines in any torch training loop, and its module's weights are a trial of a data set (Section 3.1).

Writes as our own trials do: parts that commit records make count, one writer a trial, the same bytes from the same run
however often it was killed. Knows one module and one trial; knows nothing of environments or optimisers.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, Self, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from tipl_ray.data.locks import only_one
from tipl_ray.data.snapshots import ALWAYS, COLUMNS, ROW_GROUP_BYTES, STATISTICS, Header, PartialSnapshot, Trajectory
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.data.trial_writer import TrialWriter
from tipl_ray.digest import published
from tipl_ray.errors import no_such
from tipl_ray.record.tensors import Tensors, first_difference, frozen_digest, listed, named_tensors

COMMIT_BYTES, COMMIT_SNAPSHOTS = 64 * 2**20, 100
"""A commit by default: so many raw bytes of weights at most, or one snapshot, and so many snapshots at most."""


class Known(TypedDict, total=False):
    """What may be known of a snapshot besides its step and its weights."""

    iteration: int
    """Iterations begun."""
    epoch: int
    """Epochs done, of that iteration where there is one."""
    env_step: int
    """Environment steps taken, where `step` counts something else."""
    learning_rate: float
    episodic_return: float | None
    """Mean return of the latest episodes; None while there are none."""
    loss: float | None
    """None where none was computed."""
    observation_mean: Any
    """Observation statistics, all three or none: (O,) or flattened to it."""
    observation_variance: Any
    observation_count: float


class Recorder:
    """Records a torch module's weights into one trial of a storage, a folder or `s3://bucket/prefix`.

        with Recorder(model, "storage/mine", trial=seed, task="CIFAR-10") as recorder:
            for step in range(10_000):
                ...
                if step % 10 == 0:
                    recorder.record(step, loss=float(loss), learning_rate=scheduler.get_last_lr()[0])

    What counts is committed every few snapshots, at `close`, and by `commit`. Open the recorder again on the same trial
    after a kill, and give it all again from the beginning, or, after `load_state_dict`, from a checkpoint on: snapshots
    that are committed already are compared, bit for bit, and the others follow them. `tensors` lists what is recorded.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        storage: str,
        *,
        trial: int,
        task: str,
        snapshots_per_iteration: int = 1,
        config: Mapping[str, Any] | None = None,
        leave_out: Sequence[str] = (),
        frozen: bool = False,
        snapshots_per_commit: int | None = None,
        given_again: Literal["check", "skip"] = "check",
    ):
        """Open a trial, new or begun before, and be the only one that writes it until `close`.

        `task` names what is learned, `trial` the run of it, such as its seed. `snapshots_per_iteration` is the number
        of phases, where the training has iterations of as many snapshots each. `config` is whatever makes this training
        what it is, as JSON; all trials of a storage share it. `leave_out` are patterns of names, as `critic.*`, of
        tensors that are neither recorded nor watched; with `frozen`, parameters without a gradient are recorded too.
        Snapshots given again up to the last commit are checked, or skipped unseen.

        Raises ValueError for an argument without meaning and a tensor that cannot be recorded, StoreError where the
        trial was begun with something else, is damaged, or is being recorded by another process.
        """
        self._check_arguments(trial, task, snapshots_per_iteration, snapshots_per_commit, given_again)
        self._module, self._trial, self._given_again = module, trial, given_again
        self._leave_out = tuple(leave_out)
        tensors = Tensors.of(module, self._leave_out, frozen)
        self._names, self._versions = tuple(tensors.recorded), tensors.versions()
        self._state = tensors.state
        told = {"types": tensors.types, "leave_out": list(leave_out), "settings": _as_json(config or {})}
        self._begun = Header(
            task=task,
            layout=tensors.layout,
            config={
                "snapshots_per_iteration": snapshots_per_iteration,
                **{name: value for name, value in told.items() if value},
            },
            versions={name: version(name) for name in ("torch", "numpy")},
            columns=("snapshot", "step", "weights"),
        )
        size = 4 * self._begun.num_weights
        self.snapshots_per_commit = snapshots_per_commit or max(1, min(COMMIT_SNAPSHOTS, COMMIT_BYTES // size))
        """Snapshots after whose multiples there is a commit."""
        self._store = TrajectoryStore(storage)
        self._open: contextlib.ExitStack | None = contextlib.ExitStack()
        self._store.files.check_put_if_absent()
        self._open.enter_context(only_one(storage, f"trial-{trial}", f"recording trial {trial}"))
        self._writer: TrialWriter | None = None
        self._next, self._step = 0, 0
        self._known: Trajectory | None = None
        self._find_what_is_there()
        self.num_committed = self._writer.next_snapshot if self._writer else 0
        """Snapshots of the trial that are committed."""

    @property
    def next_snapshot(self) -> int:
        """Index of the snapshot that is recorded next."""
        return self._next

    def record(self, step: int, **known: Unpack[Known]) -> None:
        """Take the module as it is now for the next snapshot, after `step` steps of whatever the training counts.

        What else is known, see `Known`, is given with every snapshot from the first on; a return or a loss may be
        None. Raises ValueError for what cannot be recorded, StoreError for what does not fit the trial: weights that
        are not finite, or, where they are committed already, others than before.
        """
        self._refuse_closed()
        values = self._checked(step, known)
        if self._writer is None:
            self._begin(tuple(name for name in COLUMNS if name in (*ALWAYS, *values)))
        index = self._next
        if index >= self.num_committed or self._given_again == "check":
            snapshot = PartialSnapshot(seed=self._trial, snapshot=index, weights=self._read(), **values)
            self._take(snapshot)
        self._next, self._step = index + 1, step
        if self._next % self.snapshots_per_commit == 0:
            self.commit()

    def commit(self) -> None:
        """Make all that was recorded count: once this returns, it survives a power cut."""
        self._refuse_closed()
        if self._writer and self._writer.next_snapshot > self.num_committed:
            self._writer.commit(self._state)
            self.num_committed = self._writer.next_snapshot

    def state_dict(self) -> dict[str, int]:
        """Where the recording is, for a checkpoint. Commits first, so that no checkpoint is ahead of the data."""
        self.commit()
        return {"snapshot": self._next, "step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint: the next snapshot is the one after those that its run had recorded.

        What was recorded since and is not committed is forgotten, as after a kill. Raises StoreError where the trial
        has fewer snapshots than that.
        """
        if not 0 <= state["snapshot"] <= self.num_committed:
            raise StoreError(
                f"{self._store.root}: the checkpoint was taken after {state['snapshot']} snapshots, and trial "
                f"{self._trial} has {self.num_committed}; continue from an earlier checkpoint, or record another trial"
            )
        if self._writer:
            self._writer.discard()
        self._next, self._step = int(state["snapshot"]), int(state["step"])

    def close(self) -> None:
        """Commit what is left and let the trial go; nothing can be recorded after it."""
        if self._open is not None:
            self.commit()
            self.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: type[BaseException] | None, *others: Any) -> None:
        """Close, or after an exception abandon, so that a resumed run leaves the bytes of an undisturbed one."""
        if exception is None:
            self.close()
        else:
            self.abandon()

    def abandon(self) -> None:
        """Abandon the trial as a kill would: what is not committed is lost, and recorded again by a resumed run."""
        if self._open is not None:
            self._open.close()
        self._open = None

    def _refuse_closed(self) -> None:
        if self._open is None:
            raise ValueError(f"the recorder of trial {self._trial} is closed; open another to continue the trial")

    def _begin(self, columns: tuple[str, ...]) -> None:
        header = dataclasses.replace(self._begun, columns=columns)
        self._store.check_header(header)
        self._writer = TrialWriter(self._store, self._trial, header)

    def _take(self, snapshot: PartialSnapshot) -> None:
        assert self._writer is not None, "the first snapshot begins the trial"
        if snapshot.snapshot < self.num_committed:
            self._compare(snapshot)
            return
        if not (finite_P := np.isfinite(snapshot.weights)).all():
            position = int(np.argmin(finite_P))
            name = next(name for name, _, offset in reversed(self._begun.layout) if offset <= position)
            self.commit()
            raise StoreError(
                f"trial {self._trial}, snapshot {snapshot.snapshot}: {name} is not finite, or not in float32, after "
                f"step {snapshot.step}; the {self.num_committed} snapshots before are committed. Lower the learning "
                "rate, and record another trial"
            )
        self._writer.append(snapshot)

    def _compare(self, snapshot: PartialSnapshot) -> None:
        """Raise StoreError unless a snapshot is the one that is committed."""
        index = snapshot.snapshot
        if self._known is None or not self._known.snapshots_T[0] <= index <= self._known.snapshots_T[-1]:
            rows = max(1, ROW_GROUP_BYTES // snapshot.weights.nbytes)
            self._known = self._store.trajectory(self._trial, start=index, stop=min(index + rows, self.num_committed))
        row = index - int(self._known.snapshots_T[0])
        for column, field in COLUMNS.items():
            there_T, here = getattr(self._known, field), getattr(snapshot, column)
            there: Any = there_T[row] if len(there_T) else np.nan
            if column == "weights":
                differs = first_difference(self._begun.layout, there, here)
            else:
                same = np.array_equal(there, np.nan if here is None else here, equal_nan=True)
                differs = None if same else column
            if differs:
                raise StoreError(
                    f"{self._store.root}: trial {self._trial}, snapshot {index}: {differs} differs from what is "
                    "committed: this is another run, or it does not reproduce the first one bit for bit. Record "
                    "another "
                    'trial or, if runs are not reproducible, commit only with checkpoints, or pass given_again="skip"'
                )

    def _read(self) -> NDArray[np.float32]:
        """The recorded tensors. Raises ValueError where others have begun to change, or some are missing."""
        now = self._now()
        written = [name for name, times in now.versions().items() if times != self._versions[name]]
        # Written to is not changed: a checkpoint that was loaded has written the same values.
        if written and frozen_digest(now.state) != frozen_digest(self._state):
            raise ValueError(
                f"{listed(written)} changed although it requires no gradient and is not recorded, since the "
                "recorder was opened; record it with frozen=True, or exclude it with leave_out"
            )
        self._versions = now.versions()
        return now.read()

    def _now(self) -> Tensors:
        every = {name: tensor for name, tensor, _ in named_tensors(self._module, self._leave_out)}
        if lost := [name for name in self._names if name not in every]:
            raise ValueError(f"{listed(lost)} of the recorded tensors are no longer in the module")
        recorded = {name: every.pop(name) for name in self._names}
        if new := [name for name, tensor in every.items() if tensor.requires_grad]:
            raise ValueError(
                f"{listed(new)} did not require a gradient when the recorder was opened, or was not there; open the "
                "recorder once all that will be trained is there, or with frozen=True"
            )
        return Tensors(recorded=recorded, still={name: one for name, one in every.items() if name in self._versions})

    def _checked(self, step: int, known: Known) -> dict[str, Any]:
        """What is known as the store has it. Raises ValueError for a name or a number without meaning."""
        if unknown := [name for name in known if name not in Known.__annotations__]:
            raise no_such("record", unknown[0], tuple(Known.__annotations__))
        if step < self._step:
            raise ValueError(f"step={step} is below {self._step}, that of the snapshot before")
        values: dict[str, Any] = {"step": int(step)}
        for name, value in known.items():
            if name in STATISTICS[:2]:
                values[name] = np.array(value, np.float64).reshape(-1)
            elif value is None:
                values[name] = None
            else:
                number: Any = value.item() if isinstance(value, torch.Tensor) else value
                values[name] = int(number) if name in ("iteration", "epoch", "env_step") else float(number)
        given = [name for name in STATISTICS if name in values]
        if given and len(given) < len(STATISTICS):
            raise ValueError(f"{' and '.join(given)} require the rest of {', '.join(STATISTICS)}")
        return values

    def _find_what_is_there(self) -> None:
        """Begin the trial with the columns of the storage's trials. Raises StoreError for what differs."""
        try:
            if others := self._store.committed():
                self._begin(self._store.header(others[:1]).columns)
            self._refuse_other_frozen()
        except Exception:
            self.abandon()
            raise

    def _refuse_other_frozen(self) -> None:
        """Raise StoreError where what is not recorded is not what it was when the trial was begun."""
        begun = self._writer.state if self._writer else None
        if begun is not None and frozen_digest(begun) != frozen_digest(self._state):
            raise StoreError(
                f"{self._store.root}: trial {self._trial} was started with frozen weights other than the module's; "
                "load those, or record another trial"
            )

    @staticmethod
    def _check_arguments(
        trial: int, task: str, snapshots_per_iteration: int, snapshots_per_commit: int | None, given_again: str
    ) -> None:
        if trial < 0:
            raise ValueError(f"trial={trial} is below 0")
        if not task:
            raise ValueError("task is empty; name in a word what is learned")
        if snapshots_per_iteration < 1:
            raise ValueError(f"snapshots_per_iteration={snapshots_per_iteration} is below 1")
        if snapshots_per_commit is not None and snapshots_per_commit < 1:
            raise ValueError(f"snapshots_per_commit={snapshots_per_commit} is below 1")
        if given_again not in ("check", "skip"):
            raise no_such("given_again", given_again, ("check", "skip"))


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return published(json.loads(json.dumps(dict(config), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config cannot be written as JSON: {error}; use plain numbers, strings, lists and dicts"
        ) from error
