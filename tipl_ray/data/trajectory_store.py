"""The data set: policy weight trajectories as Parquet parts, and the commit records that make them count (Section 3.1).

Knows how trials are laid out, read, verified and sealed under one storage root; knows nothing of writers, PPO or Ray.

    <storage>/trajectories/trial=<seed>/part-<first snapshot>-<digest>.parquet
    <storage>/commits/trial=<seed>/commit-<n>.json, state-<n>-<digest>.safetensors
    <storage>/commits/trial=<seed>/diverged.json
    <storage>/commits/_SUCCESS

A part counts once a commit record names it, and a commit record counts while records 1, 2, ... n have no gap and their
snapshots follow each other from 0. Everything else is garbage, which readers do not see and `sweep` deletes. A trial
that stopped being finite has a record of that, and ends with its last finite snapshot.

`_SUCCESS` is the seal: what the data set was when every trial was whole. While it is there, whoever reads holds the
trials to it, and nothing uncounted may be in the trials' folders, which other readers take as they are.

How files are put under the root, a folder or a bucket's prefix, `storage` knows.

Shapes: T snapshots, P policy weights, O observation entries.
"""

import difflib
import functools
import json
import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pydantic
from numpy.typing import NDArray

from tipl_ray.data.commits import (
    COMMITS,
    PART_NAME,
    SEAL,
    SEAL_RECORD,
    TRAJECTORIES,
    TRIAL_FOLDER,
    Divergence,
    Run,
    Seal,
    TrialProgress,
    complaints,
    list_trials,
    run_progress,
    runs_digest,
    trial_digest,
)
from tipl_ray.data.snapshots import (
    COLUMNS,
    Header,
    Trajectory,
    differences,
    empty_array,
    empty_column,
    part_schema,
    to_numpy,
)
from tipl_ray.data.storage import TEMPORARY, Storage, StoreError
from tipl_ray.data.trial_files import Entries, TrialFiles
from tipl_ray.digest import as_table


class TrajectoryStore:
    """The data set under one storage root, a folder or a URI: what is committed, and nothing else."""

    def __init__(self, root: str) -> None:
        """Open without touching anything. Raises StoreError where no filesystem answers to the URI."""
        self.root = root
        # Not yet published files lie among the commits, where no Parquet reader looks.
        self.files = Storage(root, temporaries=COMMITS)

    def trial(self, seed: int) -> TrialFiles:
        """The files of a trial, whether there are any or not."""
        return TrialFiles(self.files, seed)

    def seal(self) -> Seal | None:
        """What the data set was sealed as; None where it is not sealed. Raises StoreError for a damaged seal."""
        content = self._seal_content()
        try:
            return None if content is None else SEAL_RECORD.validate_json(content, strict=True)
        except pydantic.ValidationError as error:
            raise self._broken_seal(f"is not a seal: {complaints(error, 'seal')}") from error

    def seeds(self) -> tuple[int, ...]:
        """Seeds of the trials, ascending. Raises StoreError where they are not those that a seal names."""
        seal, seeds = self.seal(), self.committed()
        if seal:
            self._hold_seeds(seal, seeds)
        return seeds

    def committed(self) -> tuple[int, ...]:
        """Seeds of the trials with at least one commit, ascending, whatever the seal contains: where a collection
        resumes."""
        seeds = self._trial_seeds(COMMITS)
        listings = self.files.each(self.files.entries, [self.trial(seed).folder(COMMITS) for seed in seeds])
        return tuple(seed for seed, names in zip(seeds, listings, strict=True) if "commit-1.json" in names)

    def absent(self, seed: int) -> StoreError:
        """The error for a trial without any commit, with a list of those that there are."""
        if (seal := self.seal()) and seed in seal.seeds:
            return self._lost([seed])
        seeds = self.committed()
        there = (
            f"there {'is' if len(seeds) == 1 else 'are'} {list_trials(seeds)}"
            if seeds
            else "no trial is committed there"
        )
        return StoreError(f"{self.files.show(COMMITS)}: there is no trial {seed}; {there}; collect it first")

    def progress(self, seed: int, num_snapshots: int | None = None) -> TrialProgress:
        """How much of a trial is committed, of `num_snapshots` expected, whatever the seal contains.

        Raises StoreError for a damaged commit record and for a part that is missing or cut short.
        """
        trial = self.trial(seed)
        run, _ = trial.present_run()
        return trial.progress(run, num_snapshots)

    def progress_of(self, seeds: Sequence[int], num_snapshots: int | None = None) -> list[TrialProgress]:
        """`progress` of several trials, of many at once where asking is a round trip."""
        return list(self.files.each(functools.partial(self.progress, num_snapshots=num_snapshots), seeds))

    def divergences(self, seeds: Sequence[int] | None = None) -> dict[int, Divergence]:
        """Those of all trials, or of some, that diverged, by seed. Raises StoreError for a damaged record."""
        seeds = self.seeds() if seeds is None else seeds
        found = self.files.each(lambda seed: self.trial(seed).divergence(), seeds)
        return {one.seed: one for one in found if one}

    def sound(self, seeds: Sequence[int]) -> tuple[int, ...]:
        """Those of some trials that did not diverge, in their order. Raises as `divergences` does."""
        diverged = self.divergences(seeds)
        return tuple(seed for seed in seeds if seed not in diverged)

    def folders(self) -> tuple[int, ...]:
        """Seeds of the trials that have a folder, committed or not, ascending."""
        return tuple(sorted({*self._trial_seeds(COMMITS), *self._trial_seeds(TRAJECTORIES)}))

    def header(self, seeds: Sequence[int] | None = None) -> Header:
        """The header that all trials share, or some of them.

        Raises StoreError where there is none, where two differ, and as `seeds` does.
        """
        headers = self._headers(self.seeds() if seeds is None else seeds)
        if not headers:
            raise StoreError(f"{self.files.show(COMMITS)}: no trial is committed there; collect first")
        first = min(headers)
        for seed, header in headers.items():
            if header.config_hash != headers[first].config_hash:
                complaint = f"is not of trial {first}'s configuration: {differences(header, headers[first])}"
                trial = self.trial(seed)
                raise trial.damaged(trial.commit_path(1), complaint, "Move the trial to a storage of its own")
        return headers[first]

    def check_header(self, header: Header) -> None:
        """Raise StoreError, saying what differs, where a trial there was begun with another configuration."""
        for seed, begun in self._headers(self.committed()).items():
            self.trial(seed).refuse_other(begun, header)

    def trajectory(
        self, seed: int, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> Trajectory:
        """Snapshots [start, stop) of a trial, all columns that it has or the named ones (`snapshot` always).

        Reads the row groups that hold the range and no others, one at a time, comparing each page's checksum; only
        `verify` finds all damage. Raises ValueError for a column or a range that the trial does not have, StoreError
        for what is missing or seen to be damaged, and for a trial that is not as the data set was sealed.
        """
        trial, run = self.trial(seed), self._held_run(seed)
        num_snapshots = run[-1].last_snapshot + 1
        stop = num_snapshots if stop is None else stop
        if not 0 <= start <= stop <= num_snapshots:
            raise ValueError(f"start={start}, stop={stop} is no range of the {num_snapshots} snapshots of trial {seed}")
        known = run[0].header.columns
        names = known if columns is None else tuple(dict.fromkeys(("snapshot", *columns)))
        if unknown := [name for name in names if name not in COLUMNS]:
            nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
            raise ValueError(f"columns={unknown}: perhaps {nearest!r}? There are {', '.join(known)}")
        if absent := [name for name in names if name not in known]:
            raise ValueError(
                f"{self.files.show(trial.folder(TRAJECTORIES))}: trial {seed} was recorded without "
                f"{' and '.join(absent)}, so what needs that cannot be had of it; it has {', '.join(known)}"
            )
        needed = [record for record in run if record.first_snapshot < stop and start <= record.last_snapshot]
        # Footers first: a record's word alone is no reason to ask for memory.
        footers = list(self.files.each(trial.footer, needed))
        schema = part_schema(run[0].header, run[0].num_observations)
        arrays = {name: empty_array(schema.field(name).type, stop - start if name in names else 0) for name in known}
        for record, footer in zip(needed, footers, strict=True):
            for first, rows in trial.row_groups(record, footer, names, start, stop):
                for name in names:
                    arrays[name][first - start : first - start + len(rows)] = to_numpy(rows.column(name))
        absent_column = {field: empty_column(name) for name, field in COLUMNS.items() if name not in known}
        return Trajectory(seed=seed, **absent_column, **{COLUMNS[name]: array for name, array in arrays.items()})

    def weights(self, seed: int) -> "StoredWeights":
        """The weights of a trial, read on demand and only as far as requested.

        Raises StoreError as `trajectory` does.
        """
        return StoredWeights(self.trial(seed), self._held_run(seed))

    def verify(self, seed: int, num_snapshots: int | None = None) -> TrialProgress:
        """Compare every digest, range, schema and number of a trial with its commit records; reads everything.

        A trial that is being written may be verified; what is committed meanwhile is too.
        Raises StoreError naming the first file that contradicts its record or should not be there, or
        the trial that is not as the data set was sealed, or that does not have `num_snapshots`, where given, and has
        not diverged, or any.
        """
        trial = self.trial(seed)
        run = self._verified_run(trial)
        if not run and num_snapshots is None:
            raise self.absent(seed)
        progress = trial.progress(run, num_snapshots)
        if num_snapshots is not None and not progress.ended:
            raise StoreError(
                f"{self.files.show(trial.folder(COMMITS))}: trial {seed} has {progress.num_snapshots} of "
                f"{num_snapshots} snapshots; collect again to complete it"
            )
        return progress

    def verify_all(self, expected_seeds: Sequence[int], num_snapshots: int) -> tuple[TrialProgress, ...]:
        """Verify that every expected trial is whole and that all share one header. Raises as `verify` does."""
        progress = tuple(self.verify(seed, num_snapshots) for seed in expected_seeds)
        self.verify_folder()
        return progress

    def verify_folder(self) -> None:
        """Verify that nothing foreign is among the trials, that all share one header, and that a seal holds.

        Raises StoreError.
        """
        self._refuse_foreign(TRAJECTORIES, self.files.entries(TRAJECTORIES), TRIAL_FOLDER)
        self.header()
        self.finished()

    def garbage(self, seeds: Sequence[int] | None = None, lost: bool = False) -> tuple[str, ...]:
        """What no unbroken run of commit records names, of all trials or of some: names of the store's own kind.

        Raises StoreError for a commit record that cannot be read and, unless `lost`, for a trial whose commit records
        seem to be lost, as there are parts that only they can have named.
        """
        return self._garbage(self._runs(self.folders() if seeds is None else seeds), lost)

    def sweep(self, seeds: Sequence[int] | None = None, lost: bool = False) -> tuple[str, ...]:
        """Delete the garbage; returns its names. Only while no writer is open.

        Raises StoreError as `garbage` does, before anything is deleted.
        """
        return self._delete(self.garbage(seeds, lost))

    def digest(self, seeds: Sequence[int] | None = None) -> str:
        """Identity of the data set: digest of the seeds and their parts' SHA-256, in whatever order it was written.

        Raises StoreError for a trial that is not there, and where the seal does not match what is requested.
        """
        seal = self.seal()
        if seal and (seeds is None or set(seeds) == set(seal.seeds)):
            return runs_digest(self._hold_all(seal))
        runs = self._runs(self.committed() if seeds is None else seeds, seal)
        for seed, run in runs.items():
            if not run:
                raise self.absent(seed)
        return runs_digest(runs)

    def finish(self, seeds: Sequence[int], num_snapshots: int, verified: Collection[int] = ()) -> None:
        """Seal the data set: verify every trial except those that the caller has verified, sweep, write `_SUCCESS`.

        Trials besides the expected ones are sealed with them, as other readers of the folder take them
        too. Raises StoreError as `verify` does, and for one of these that is not complete.
        """
        for seed in sorted(set(self.committed()) - set(seeds)):
            trial = self.trial(seed)
            if not (progress := self.progress(seed, num_snapshots)).ended:
                raise StoreError(
                    f"{self.files.show(trial.folder(COMMITS))}: trial {seed}, which is none of this experiment's, "
                    f"has {progress.num_snapshots} of {num_snapshots} snapshots, and readers of the folder would take "
                    "it for data. Collect it to its end with an experiment that has it, choose another storage, or "
                    f"delete {trial.folders}"
                )
        seeds = sorted({*seeds, *self.committed()})
        self.verify_all([seed for seed in seeds if seed not in verified], num_snapshots)
        # Each record is read once: where that is a round trip, it is what sealing takes.
        runs = self._runs({*seeds, *self.folders()})
        self._delete(self._garbage(runs, lost=False))
        runs = {seed: runs[seed] for seed in seeds}
        short = [seed for seed, run in runs.items() if run[-1].last_snapshot + 1 < num_snapshots]
        seal = Seal(
            seeds=tuple(seeds),
            num_snapshots=num_snapshots,
            digest=runs_digest(runs),
            diverged=tuple(sorted(self.divergences(short))),
            trials={seed: trial_digest(num_snapshots, seed, run) for seed, run in runs.items()},
        )
        self.files.write(SEAL, json.dumps(as_table(seal), indent=2).encode())

    def finished(self) -> bool:
        """Whether the data set is sealed. Raises StoreError where it is, and is not what it was when it was sealed."""
        seal = self.seal()
        if seal:
            self._hold_all(seal)
        return seal is not None

    def has_seal(self) -> bool:
        """Whether there is a seal, be it a damaged one. Raises StoreError where that cannot be known."""
        return self._seal_content() is not None

    def _seal_content(self) -> bytes | None:
        try:
            return self.files.read(SEAL)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            cause = " ".join(str(error).split())
            raise StoreError(f"{self.files.show(SEAL)}: cannot be read: {cause}; check the storage") from error

    def _hold_all(self, seal: Seal) -> dict[int, Run]:
        """The runs of a sealed data set, held to the seal."""
        self._hold_seeds(seal, self.committed())
        runs = self._runs(seal.seeds, seal)
        if (digest := runs_digest(runs)) != seal.digest:
            complaint = (
                f"digest={seal.digest} is not that of the data, {digest}: a trial was exchanged or the seal edited"
            )
            self._break(seal, self._broken_seal(complaint))
        return runs

    def _hold_seeds(self, seal: Seal, committed: Sequence[int]) -> None:
        """Raise StoreError unless the trials are those that the seal names and nothing else is among them."""
        entries = self.files.entries(TRAJECTORIES)
        folders = self._trial_seeds(TRAJECTORIES, entries)
        if lost := [seed for seed in seal.seeds if seed not in committed or seed not in folders]:
            self._break(seal, self._lost(lost))
        # A folder without files is what sweeping leaves.
        uncounted = [
            seed
            for seed in sorted({*committed, *folders} - set(seal.seeds))
            if seed in committed or self.files.entries(self.trial(seed).folder(TRAJECTORIES))
        ]
        if uncounted:
            self._break(seal, self._uncounted(uncounted))
        try:
            self._refuse_foreign(TRAJECTORIES, entries, TRIAL_FOLDER)
        except StoreError as error:
            self._break(seal, error)

    def _hold(self, seal: Seal, trial: TrialFiles, run: Run, entries: Entries) -> None:
        """Raise StoreError unless a trial is the one that the seal names and its folder has nothing else."""
        seed = trial.seed
        try:
            if seed not in seal.seeds:
                raise self._uncounted([seed]) if run else self.absent(seed)
            if not run:
                raise self._lost([seed])
            if seal.trials is not None:
                kept = seal.trials[seed] == trial_digest(seal.num_snapshots, seed, run)
            else:
                kept = run_progress(seed, run, seal.num_snapshots).complete
            kept &= seed not in seal.diverged or trial.divergence(run) is not None
            if not kept:
                trial.refuse_stray_records(run)
                complaint = f"its {run[-1].last_snapshot + 1} snapshots are not those that the data set was sealed with"
                raise trial.damaged(trial.folder(COMMITS), complaint, "Restore the trial")
            counted = {record.part for record in run}
            strays = {name: size for name, size in entries.items() if name not in counted}
            self._refuse_foreign(trial.folder(TRAJECTORIES), strays, PART_NAME)
            for name in filter(PART_NAME.fullmatch, strays):
                path = self.files.show(f"{trial.folder(TRAJECTORIES)}/{name}")
                raise StoreError(
                    f"{path}: no commit record names it, and other readers of this sealed data set would read it as "
                    "data; delete it with `python jobs/data.py sweep STORAGE --delete`"
                )
        except StoreError as error:
            self._break(seal, error)

    def _break(self, seal: Seal, error: StoreError) -> None:
        """Raise the error, unless the seal is another by now: then it is a writer's work that was seen half done."""
        if self.seal() == seal:
            raise error

    def _broken_seal(self, complaint: str) -> StoreError:
        return StoreError(
            f"{self.files.show(SEAL)}: {complaint}. Restore it, or delete this file and collect again, which verifies "
            "every trial and seals the data set again"
        )

    def _lost(self, seeds: Sequence[int]) -> StoreError:
        return StoreError(
            f"{self.files.show(self.trial(seeds[0]).folder(COMMITS))}: {list_trials(seeds)} of this sealed data set "
            f"{'is' if len(seeds) == 1 else 'are'} missing. Restore {self._folders_of(seeds)}, or collect again; "
            "other trials stay as they are"
        )

    def _uncounted(self, seeds: Sequence[int]) -> StoreError:
        return StoreError(
            f"{self.files.show(self.trial(seeds[0]).folder(COMMITS))}: {list_trials(seeds)} "
            f"{'is' if len(seeds) == 1 else 'are'} not part of the sealed data set, but other readers would read it "
            f"as data. Move {self._folders_of(seeds)} away, or delete {self.files.show(SEAL)} and collect again, "
            "which verifies every trial and seals the data set again"
        )

    def _folders_of(self, seeds: Sequence[int]) -> str:
        return self.trial(seeds[0]).folders + (" and those of the others" if len(seeds) > 1 else "")

    def _garbage(self, runs: dict[int, Run], lost: bool) -> tuple[str, ...]:
        garbage = [f"{COMMITS}/{name}" for name in self.files.sizes(COMMITS) if name.startswith(TEMPORARY)]
        for found in self.files.each(lambda seed: self.trial(seed).garbage(runs[seed], lost), runs):
            garbage += found
        return tuple(garbage)

    def _delete(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            self.files.delete(path)
        return paths

    def _runs(self, seeds: Iterable[int], seal: Seal | None = None) -> dict[int, Run]:
        """Each trial's run of commit records, by seed, ascending, held to a seal."""
        seeds = sorted(set(seeds))
        runs = self.files.each(lambda seed: self._present_run(seed, seal) if seal else self.trial(seed).run(), seeds)
        return dict(zip(seeds, runs, strict=True))

    def _headers(self, seeds: Sequence[int]) -> dict[int, Header]:
        """The headers that trials were begun with."""
        return dict(zip(seeds, self.files.each(self._header, seeds), strict=True))

    def _header(self, seed: int) -> Header:
        trial = self.trial(seed)
        path = trial.commit_path(1)
        with trial.explained(path):
            try:
                content = self.files.read(path)
            except FileNotFoundError:
                raise self.absent(seed) from None
        return trial.parse_record(1, content).header

    def _trial_seeds(self, parent: str, entries: Entries | None = None) -> list[int]:
        entries = self.files.entries(parent) if entries is None else entries
        matches = (TRIAL_FOLDER.fullmatch(name) for name, size in entries.items() if size is None)
        return sorted(int(match[1]) for match in matches if match)

    def _held_run(self, seed: int) -> Run:
        """The unbroken run, at least one commit, its parts known to be there, held to the seal where there is one."""
        run = self._present_run(seed, self.seal())
        if not run:
            raise self.absent(seed)
        return run

    def _present_run(self, seed: int, seal: Seal | None) -> Run:
        """The unbroken run, its parts known to be there, held to a seal."""
        trial = self.trial(seed)
        run, entries = trial.present_run()
        if seal:
            self._hold(seal, trial, run, entries)
        return run

    def _verified_run(self, trial: TrialFiles) -> Run:
        verified = 0
        while True:
            run = self._present_run(trial.seed, self.seal())
            try:
                for record in run[verified:]:
                    trial.verify_part(record)
                verified = len(run)
                trial.refuse_stray_records(run)
                if run:
                    trial.state(run[-1])
                folder = trial.folder(TRAJECTORIES)
                self._refuse_foreign(folder, self.files.entries(folder), PART_NAME)
                return run
            except StoreError:
                # A writer that goes on adds a record and takes the state before it away.
                if len(trial.run()) == len(run):
                    raise

    def _refuse_foreign(self, folder: str, entries: Entries, pattern: re.Pattern[str]) -> None:
        for name, size in entries.items():
            # Hidden files are left alone, but for those that DuckDB and Polars read all the same.
            hidden = name.startswith((".", "_")) and size is not None and not name.lower().endswith(".parquet")
            if not pattern.fullmatch(name) and not hidden:
                path = self.files.show(f"{folder}/{name}")
                raise StoreError(f"{path}: is not the store's, and readers of the folder may take it for data; move it")


class StoredWeights:
    """Weights of one trial, (T, P), that stay in the store: [start:stop] and [:, start:stop] read what they give."""

    def __init__(self, trial: TrialFiles, run: Run) -> None:
        self._trial, self._run = trial, run
        self.shape = (run[-1].last_snapshot + 1, run[0].header.num_weights)

    def __getitem__(self, part: slice | tuple[slice, slice]) -> NDArray[np.float32]:
        """Some snapshots, all or some of their weights. Raises StoreError for what is seen to be damaged."""
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        (start, stop, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        given = np.empty((max(0, stop - start), max(0, right - left)), np.float32)
        for record in self._run:
            if record.first_snapshot < stop and start <= record.last_snapshot:
                footer = self._trial.footer(record)
                for first, read in self._trial.row_groups(record, footer, ("weights",), start, stop):
                    weights_BP = to_numpy(read.column("weights"))
                    given[first - start : first - start + len(read)] = weights_BP[:, left:right]
        return given
