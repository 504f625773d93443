"""A data set of policy weight trajectories: what is in it, whether it is sound, and single trials out of it.

    python jobs/data.py describe storage/demo
    python jobs/data.py verify s3://bucket/experiment
    python jobs/data.py export storage/demo 7 trial-7.safetensors --columns weights episodic_return --stop 100
    python jobs/data.py import runs/model --storage storage/model
    python jobs/data.py ask storage/model

STORAGE is the folder or URI that the experiment was collected into. Each command explains itself with --help.
"""

import contextlib
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import safetensors.numpy
import tyro

from tipl_ray.data.commits import TrialProgress
from tipl_ray.data.snapshots import COLUMNS, Header, as_json
from tipl_ray.data.storage import TEMPORARY, Storage, StoreError, join
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.errors import UserError
from tipl_ray.terminal import say, say_rows, say_sentence, size_text

Root = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORAGE", help="folder or URI of the data set")]
Seeds = Annotated[tuple[int, ...], tyro.conf.arg(help="seeds of the trials to take; none takes all")]

app = tyro.extras.SubcommandApp()


@app.command
def describe(storage: Root) -> int:
    """Task, policy, versions, sizes on disk against raw, trials, snapshots and returns."""
    store = TrajectoryStore(storage)
    progress, refusals = _survey(store, store.progress)
    header, seeds = store.header([progress[0].seed]), [one.seed for one in progress]
    expected = _expected_snapshots(header)
    snapshots, num_bytes = sum(one.num_snapshots for one in progress), sum(one.num_bytes for one in progress)
    raw = 4 * header.num_weights * snapshots
    num_complete = sum(one.num_snapshots == expected for one in progress)
    diverged = [str(one.seed) for one in progress if one.divergence]
    lines = {"task": header.task, "policy weights P": f"{header.num_weights:,}"}
    lines |= {f"  {name}": f"{list(shape)} at {offset:,}" for name, shape, offset in header.layout}
    lines |= {f"version of {name}": version for name, version in sorted(header.versions.items())}
    lines |= {
        "config hash": header.config_hash,
        "trials": f"{len(progress)}, {num_complete} of them complete"
        + (f", {len(diverged)} diverged: {', '.join(diverged)}" if diverged else ""),
        "snapshots": f"{snapshots:,}, {_number(expected)} in a complete trial",
        "columns": ", ".join(header.columns),
        "on disk": f"{size_text(num_bytes)}, {num_bytes / raw:.3f} of the {size_text(raw)} that the weights are raw",
        "digest": "? (see the errors)" if refusals else store.digest(seeds),
        "verified and sealed": "no longer (see the errors)" if refusals else "yes" if store.seal() else "no",
    }
    for column, name, digits in (("episodic_return", "last returns", ",.1f"), ("loss", "last losses", ".4g")):
        if values := [value for one in progress for value in _last(store, one, column, header)]:
            mean, least, most = (f"{value:{digits}}" for value in (np.mean(values), min(values), max(values)))
            lines[name] = f"mean {mean}, from {least} to {most}"
    say_rows([{"data set": name, storage: value} for name, value in lines.items()])
    return _tell(refusals)


@app.command(name="list")
def list_trials(storage: Root) -> int:
    """The trials, what of each is committed and whether that is all of it."""
    store = TrajectoryStore(storage)
    progress, refusals = _survey(store, store.progress)
    expected = _expected_snapshots(store.header([progress[0].seed]))
    rows = [
        {
            "trial": str(one.seed),
            "snapshots": f"{one.num_snapshots:,}",
            "of": _number(expected),
            "commits": f"{one.num_commits:,}",
            "on disk": size_text(one.num_bytes),
            "complete": f"diverged after iteration {one.divergence.iteration}"
            if one.divergence
            else "yes"
            if one.num_snapshots == expected
            else "no",
        }
        for one in progress
    ]
    say_rows(rows)
    return _tell(refusals)


@app.command
def verify(storage: Root, seeds: Seeds = ()) -> int:
    """Read everything and compare each digest, range, column and number with the commit records.

    Exit status 1, and each damaged trial's file named with the way out, where anything is wrong.
    """
    store = TrajectoryStore(storage)
    progress, refusals = _survey(store, store.verify, seeds)
    if not seeds and not refusals:
        store.verify_folder()
    snapshots, num_bytes = sum(one.num_snapshots for one in progress), sum(one.num_bytes for one in progress)
    say(f"{len(progress)} trials are sound: {snapshots:,} snapshots, {size_text(num_bytes)}")
    return _tell(refusals)


@app.command
def export(
    storage: Root,
    seed: Annotated[int, tyro.conf.Positional, tyro.conf.arg(help="seed of the trial")],
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="new file, .safetensors or .npz")],
    columns: Annotated[tuple[str, ...], tyro.conf.arg(help=f"of {', '.join(COLUMNS)}; none takes all")] = (),
    start: Annotated[int, tyro.conf.arg(help="first snapshot")] = 0,
    stop: Annotated[int | None, tyro.conf.arg(help="snapshot before which to end; none takes all")] = None,
) -> int:
    """One trial's snapshots as arrays under the columns' names, with the data set's header as JSON."""
    if output.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"output={output} ends neither in .safetensors nor in .npz")
    if output.exists():
        raise ValueError(f"output={output} exists; choose another name")
    if not output.parent.is_dir():
        raise ValueError(f"output={output}: there is no folder {output.parent}; make it first, or choose another")
    store = TrajectoryStore(storage)
    header = store.header([seed])
    names = tuple(dict.fromkeys(("snapshot", *(columns or header.columns))))
    described = as_json(header).decode()
    trajectory = store.trajectory(seed, names, start, stop)
    arrays = {name: getattr(trajectory, COLUMNS[name]) for name in names}
    partial = output.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        if output.suffix == ".npz":
            with partial.open("xb") as file:
                np.savez(file, allow_pickle=False, header=np.array(described), **arrays)
        else:
            safetensors.numpy.save_file(arrays, partial, metadata={"header": described, "seed": str(seed)})
        partial.rename(output)
    except (OSError, safetensors.SafetensorError) as error:
        raise StoreError(
            f"output={output}: cannot be written: {error}. Make room or give access, or choose another folder; nothing "
            "is left of it"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    say(f"{output}: {shapes}")
    return 0


@app.command
def sweep(
    storage: Root,
    seeds: Seeds = (),
    delete: Annotated[bool, tyro.conf.arg(help="delete it; otherwise it is only listed")] = False,
    lost: Annotated[bool, tyro.conf.arg(help="take trials whose commit records are lost for garbage as well")] = False,
) -> int:
    """Garbage that no commit record names, such as a killed run leaves. Only while nothing is being collected.

    With it go the files that killed stages left half written beside the data set, once they are an hour old.
    """
    store, files, refusals = TrajectoryStore(storage), Storage(storage), []
    if not files.entries():
        raise StoreError(f"{storage}: nothing is there")
    garbage = {*files.leftovers(), *store.garbage(())}
    if unknown := sorted(set(seeds) - set(store.folders())):
        raise store.absent(unknown[0])
    for seed in seeds or store.folders():
        try:
            garbage.update(store.garbage((seed,), lost))
        except StoreError as error:
            refusals.append(str(error))
    for path in sorted(garbage):
        if delete:
            files.delete(path)
        say(path)
    say(f"{len(garbage)} files of garbage{' deleted' if delete else '; --delete deletes them' if garbage else ''}")
    return _tell(refusals)


@app.command(name="import")
def import_checkpoints(
    folders: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FOLDER [FOLDER ...]", help="folders of checkpoints, one training run each"),
    ],
    storage: Annotated[str, tyro.conf.arg(help="folder or URI that the inner products are kept in")],
    steps: Annotated[
        str | None,
        tyro.conf.arg(help="regular expression with one group, the checkpoint's number, such as 'step_(\\d+)'"),
    ] = None,
    file: Annotated[str | None, tyro.conf.arg(help="the weights' file, where each checkpoint is a folder")] = None,
    include: Annotated[tuple[str, ...], tyro.conf.arg(help="regular expressions of the tensors to take alone")] = (),
    exclude: Annotated[tuple[str, ...], tyro.conf.arg(help="regular expressions of tensors to leave out")] = (),
) -> int:
    """Reduce checkpoints of any training run to the inner products of its displacements, for `ask`.

    Reads safetensors, state dicts of torch.save and zips of stable-baselines3, as files or one folder each. The weights
    themselves are not copied.
    """
    from tipl_ray.checkpoints.records import import_series
    from tipl_ray.checkpoints.series import Selection

    if not folders:
        raise ValueError("no folder is given; give those that hold checkpoints, one training run each")
    selection, refusals = Selection(steps=steps, file=file, include=include, exclude=exclude), []
    for folder in folders:
        try:
            series, was_there = import_series(folder, storage, selection)
        except UserError as error:
            refusals.append(str(error))
            continue
        say(
            f"{series.name}: {len(series.steps)} checkpoints, {series.steps[0]:,} to {series.steps[-1]:,}, of "
            f"{series.num_weights:,} weights in {series.num_tensors:,} tensors, {size_text(series.num_bytes)}: "
            f"{'imported before' if was_there else 'imported'} as {series.digest}"
        )
        for why, names in series.left_out.items():
            say(f"  left out {why}: {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}")
    return _tell(refusals)


@app.command
def ask(
    storage: Root,
    series: Annotated[tuple[str, ...], tyro.conf.arg(help="names or digests of imported series; none takes all")] = (),
    steps: Annotated[tuple[int, ...], tyro.conf.arg(help="checkpoints ahead")] = (1, 2, 5, 10),
    context: Annotated[
        int | None, tyro.conf.arg(help="displacements that a forecast knows; by default a quarter of them, 2 to 20")
    ] = None,
    per_iteration: Annotated[
        int, tyro.conf.arg(help="checkpoints per iteration of an algorithm that reuses its data, as PPO does")
    ] = 1,
    predictor: Annotated[
        str | None, tyro.conf.arg(help="folder of a trained model or saved predictor, asked without further training")
    ] = None,
) -> int:
    """How predictable imported series are: sentences, and a report with tables and pictures."""
    from tipl_ray.checkpoints.asking import REPORT_FILE, answer
    from tipl_ray.checkpoints.predictability import Asking
    from tipl_ray.checkpoints.report import answers, skill_table

    asking = Asking(context=context, steps=steps, per_iteration=per_iteration)
    folder, findings = answer(storage, series, asking, predictor)
    for one in answers(findings):
        say_sentence(one.line)
    say_rows(skill_table(findings), title="Skill against copying the last checkpoint")
    say(f"{join(folder, REPORT_FILE)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what a user can mend is told in one line."""
    try:
        return app.cli(description=__doc__, args=arguments)
    except (UserError, ValueError) as error:
        return _tell([str(error)])


def _survey(
    store: TrajectoryStore, look: Callable[[int], TrialProgress], seeds: Sequence[int] = ()
) -> tuple[list[TrialProgress], list[str]]:
    """Progress of the trials that can be read, at least one, and what is wrong with the others or with the seal."""
    progress, refusals = [], []
    for seed in seeds or store.committed():
        try:
            progress.append(look(seed))
        except StoreError as error:
            refusals.append(str(error))
    if not seeds:
        try:
            store.finished()
        except StoreError as error:
            refusals.append(str(error))
    refusals = list(dict.fromkeys(refusals))
    if not progress:
        raise StoreError("\nerror: ".join(refusals) or f"{store.root}: no trial is committed there; collect first")
    return progress, refusals


def _expected_snapshots(header: Header) -> int | None:
    """Snapshots of a complete trial, as the configuration in the header says; None where it does not."""
    told = {**header.config, **header.config.get("ppo", {})}
    try:
        iterations = told["total_env_steps"] // told["num_steps"]
        predicted = told["jump"]["horizon"] if "jump" in told else 0
        return 1 + iterations * (told["num_epochs"] // told["epochs_per_snapshot"] + predicted)
    except KeyError:
        return None


def _last(store: TrajectoryStore, progress: TrialProgress, column: str, header: Header) -> list[float]:
    """The last value of a column among a trial's last 50 snapshots, if there is any."""
    if column not in header.columns:
        return []
    start = max(0, progress.num_snapshots - 50)
    values_T = getattr(store.trajectory(progress.seed, [column], start), COLUMNS[column])
    return [float(value) for value in values_T[np.isfinite(values_T)][-1:]]


def _tell(refusals: Sequence[str]) -> int:
    """Say what is wrong on standard error; the exit status."""
    for refusal in refusals:
        print(f"error: {refusal}", file=sys.stderr)
    return 1 if refusals else 0


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


if __name__ == "__main__":
    sys.exit(main())
