"""Inspect, verify and export a data set of policy weight trajectories, and analyse other people's checkpoints.

    python jobs/data.py describe storage/demo
    python jobs/data.py verify s3://bucket/experiment
    python jobs/data.py export storage/demo trial-7.safetensors --seeds 7
    python jobs/data.py export storage/demo demo-trajectories
    python jobs/data.py import runs/model --storage storage/model
    python jobs/data.py ask storage/model
    python jobs/data.py watch storage/demo 1

STORAGE is the folder or URI of the experiment. A trajectory is one training run's snapshots: the flat policy weights
after every few update epochs. Each command has its own --help.
"""

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import safetensors.numpy
import tyro

from tipl_ray.command_line import read_options
from tipl_ray.data.commits import TrialProgress
from tipl_ray.data.parquet_folder import export_folder
from tipl_ray.data.snapshots import COLUMNS, Header, as_json
from tipl_ray.data.storage import TEMPORARY, Storage, StoreError, join, link_to
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.errors import UserError, print_error
from tipl_ray.remembered import remembered_collection
from tipl_ray.terminal import say, say_rows, say_whole, size_text, waiting

Root = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORAGE", help="folder or URI of the data set")]


def option(text: str, default: str, metavar: str | None = None) -> Any:
    """An option of a command, with its default in words."""
    return tyro.conf.arg(help=text, help_behavior_hint=f"(default: {default})", metavar=metavar)


Seeds = Annotated[tuple[int, ...], option("seeds of the trials", "all")]

app = tyro.extras.SubcommandApp()


@app.command
def describe(storage: Root) -> int:
    """Show task, policy, versions, trials, snapshots, returns, and size on disk compared with raw weights."""
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
        "trials": f"{len(progress)}, {'of no set length' if expected is None else f'{num_complete} of them complete'}"
        + (f", {len(diverged)} diverged: {', '.join(diverged)}" if diverged else ""),
        "snapshots": f"{snapshots:,}" + ("" if expected is None else f", {expected:,} in a complete trial"),
        "columns": ", ".join(header.columns),
        "on disk": f"{size_text(num_bytes)}, {num_bytes / raw:.3f} of the {size_text(raw)} of the raw weights",
        "digest": "? (see the errors)" if refusals else store.digest(seeds),
        "verified and sealed": "not any more (see the errors)" if refusals else "yes" if store.seal() else "no",
    }
    for column, name, digits in (("episodic_return", "last returns", ",.1f"), ("loss", "last losses", ".4g")):
        if values := [value for one in progress for value in _last(store, one, column, header)]:
            mean, least, most = (f"{value:{digits}}" for value in (np.mean(values), min(values), max(values)))
            lines[name] = f"mean {mean}, from {least} to {most}"
    say_rows([{"data set": name, storage: value} for name, value in lines.items()])
    return _tell(refusals)


@app.command(name="list")
def list_trials(storage: Root) -> int:
    """List the trials, with what is committed of each and whether it is complete."""
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
            else "no set length"
            if expected is None
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
    """Read everything and check every digest, range, column and number against the commit records.

    If anything is wrong, exits with status 1 and names each damaged file with what to do about it.
    """
    store = TrajectoryStore(storage)
    progress, refusals = _survey(store, store.verify, seeds)
    if not seeds and not refusals:
        store.verify_folder()
    snapshots, num_bytes = sum(one.num_snapshots for one in progress), sum(one.num_bytes for one in progress)
    say(f"{len(progress)} trials verified: {snapshots:,} snapshots, {size_text(num_bytes)}")
    return _tell(refusals)


@app.command
def export(
    storage: Root,
    output: Annotated[
        Path,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="OUTPUT",
            help="new file, .safetensors or .npz, for the arrays of one trial; or a folder for all trials",
        ),
    ],
    seeds: Seeds = (),
    columns: Annotated[tuple[str, ...], option(f"of {', '.join(COLUMNS)}", "all")] = (),
    start: Annotated[int, tyro.conf.arg(help="of one trial: first snapshot")] = 0,
    stop: Annotated[int | None, option("of one trial: snapshot before which to stop", "after the last", "INT")] = None,
) -> int:
    """Export one trial as arrays, or all trials as a folder that Hugging Face's `datasets` loads.

    A file has the columns as arrays and the data set's header as JSON. A folder has one Parquet file per trial, sorted
    into training, validation and test trials, and a card (README.md). A folder that was not finished is continued.
    """
    single = output.suffix in (".npz", ".safetensors")
    if output.suffix and not single and not output.is_dir():
        raise ValueError(f"output={output} must end in .safetensors or .npz, or be a folder, without a suffix")
    if not output.parent.is_dir():
        raise ValueError(f"output={output}: no such folder, {output.parent}; create it first, or choose another")
    store = TrajectoryStore(storage)
    chosen = seeds or store.seeds()
    if single:
        if output.exists():
            raise ValueError(f"output={output} already exists; choose another name")
        if len(chosen) != 1:
            raise ValueError(
                f"output={output}: a {output.suffix} file holds one trial, and there are {len(chosen)}; choose one "
                "with --seeds, or name a folder"
            )
        return _export_arrays(store, chosen[0], output, columns, start, stop)
    if (start, stop) != (0, None):
        raise ValueError(f"--start and --stop are for the arrays of one trial; output={output} holds whole trials")
    splits = _splits(storage, chosen)
    with _room(output):
        for seed, path in export_folder(store, splits, output, columns):
            say(f"trial {seed}: {path}, {size_text(path.stat().st_size)}")
    counts = ", ".join(f"{len(members)} {split}" for split, members in splits.items())
    say(f"{output}: {counts}; datasets.load_dataset({str(output)!r}) loads it, and README.md says what it is")
    return 0


def _export_arrays(
    store: TrajectoryStore, seed: int, output: Path, columns: Sequence[str], start: int, stop: int | None
) -> int:
    header = store.header([seed])
    names = tuple(dict.fromkeys(("snapshot", *(columns or header.columns))))
    described = as_json(header).decode()
    trajectory = store.trajectory(seed, names, start, stop)
    arrays = {name: getattr(trajectory, COLUMNS[name]) for name in names}
    partial = output.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with _room(output):
            if output.suffix == ".npz":
                with partial.open("xb") as file:
                    np.savez(file, allow_pickle=False, header=np.array(described), **arrays)
            else:
                safetensors.numpy.save_file(arrays, partial, metadata={"header": described, "seed": str(seed)})
            partial.rename(output)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    say(f"{output}: {shapes}")
    return 0


def _splits(storage: str, seeds: Sequence[int]) -> dict[str, list[int]]:
    """The trials that the storage's experiment trains on, validates on and tests on; all are `train` without one."""
    experiment = remembered_collection(storage)
    if experiment and {*seeds} <= {*experiment.collect.seeds}:
        parts = zip(("train", "validation", "test"), experiment.split.cut(experiment.collect.seeds), strict=True)
        splits = {name: [seed for seed in part if seed in seeds] for name, part in parts}
        return {name: part for name, part in splits.items() if part}
    return {"train": list(seeds)}


@contextlib.contextmanager
def _room(output: Path) -> Iterator[None]:
    """What cannot be written is one line that says what to do."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise StoreError(
            f"output={output}: cannot be written: {error}. Free some space or fix permissions, or choose another folder"
        ) from error


@app.command
def sweep(
    storage: Root,
    seeds: Seeds = (),
    delete: Annotated[bool, tyro.conf.arg(help="delete the files instead of only listing them")] = False,
    lost: Annotated[bool, tyro.conf.arg(help="also take trials with lost commit records for garbage")] = False,
) -> int:
    """List or delete files that no commit record names, such as a killed run leaves. Only while nothing is collecting.

    This includes half-written files of killed stages elsewhere in the storage, once they are an hour old.
    """
    store, files, refusals = TrajectoryStore(storage), Storage(storage), []
    if not files.entries():
        raise StoreError(f"{storage}: there is nothing there")
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
    say(f"{len(garbage)} garbage files{' deleted' if delete else '; pass --delete to delete them' if garbage else ''}")
    return _tell(refusals)


@app.command(name="import")
def import_checkpoints(
    folders: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="FOLDER [FOLDER ...]",
            help="folders of checkpoints, one per training run",
            help_behavior_hint="(required)",
        ),
    ],
    storage: Annotated[str, tyro.conf.arg(help="folder or URI to store the inner products in")],
    steps: Annotated[
        str | None,
        option(
            "regular expression with one group, the checkpoint's number, such as 'step_(\\d+)'",
            "the number in which the names differ",
            "REGEX",
        ),
    ] = None,
    file: Annotated[
        str | None,
        option("name of the weights' file, if each checkpoint is a folder", "the only file of weights there", "STR"),
    ] = None,
    include: Annotated[tuple[str, ...], option("regular expressions of the only tensors to read", "all")] = (),
    exclude: Annotated[tuple[str, ...], option("regular expressions of tensors to leave out", "none")] = (),
) -> int:
    """Reduce the checkpoints of any training run to inner products of the displacements between them, for `ask`.

    Reads safetensors, state dicts saved by torch.save and stable-baselines3 zips, as files or as one folder each. The
    weights themselves are not copied.
    """
    with waiting("import: starting"):
        from tipl_ray.checkpoints.records import import_series
        from tipl_ray.checkpoints.series import Selection

    if not folders:
        raise ValueError("no folder given; give the folders of checkpoints, one per training run")
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
    series: Annotated[
        tuple[str, ...],
        option("recorded trials, such as trial-1, and names or digests of imported series", "all"),
    ] = (),
    steps: Annotated[tuple[int, ...], tyro.conf.arg(help="checkpoints ahead")] = (1, 2, 5, 10),
    context: Annotated[
        int | None, option("displacements in a forecast's context", "a quarter of all, 2 to 20", "INT")
    ] = None,
    per_iteration: Annotated[
        int | None,
        option(
            "checkpoints per iteration of an algorithm that reuses its data, as PPO does",
            "what recorded trials say, else 1",
            "INT",
        ),
    ] = None,
    leave_out: Annotated[
        tuple[str, ...], option("layers to leave out, such as 'running statistics' or 'layer1.*'", "none")
    ] = (),
    predictor: Annotated[
        str | None,
        option(
            "trained model or saved predictor to evaluate as well, without further training: its folder, or the name "
            "of one that comes with this package",
            "none",
            "FOLDER|NAME",
        ),
    ] = None,
) -> int:
    """Report how predictable training runs are, recorded trials and imported checkpoints, with tables and figures.

    Skill is the share of the squared error of copying the last checkpoint that a forecast removes: 1 is perfect, 0 is
    no better than copying."""
    with waiting("ask: starting"):
        from tipl_ray.checkpoints.asking import REPORT_FILE, answer
        from tipl_ray.checkpoints.predictability import Asking
        from tipl_ray.checkpoints.report import answers, skill_table

    asking = Asking(context=context, steps=steps, per_iteration=per_iteration, leave_out=leave_out)
    folder, findings = answer(storage, series, asking, predictor)
    for one in answers(findings):
        say(one.line)
    say_rows(skill_table(findings), title="Skill against copying the last checkpoint")
    say_whole(f"report: {link_to(folder, REPORT_FILE)}")
    return 0


@app.command
def watch(
    storage: Root,
    trial: Annotated[int, tyro.conf.Positional, tyro.conf.arg(help="seed of the trial")],
    snapshot: Annotated[int, tyro.conf.arg(help="snapshot to run; negative ones count from the end")] = -1,
    predictor: Annotated[
        str | None,
        option(
            "run what this predictor forecasts for the snapshot instead: a folder or name as for `ask`, or a baseline "
            "that needs no fitting, such as copy-last, linear or rank-1",
            "none",
            "FOLDER|NAME",
        ),
    ] = None,
    ahead: Annotated[
        int | None, option("snapshots from the last one that the predictor sees to this one", "1", "INT")
    ] = None,
    episode_seed: Annotated[int, tyro.conf.arg(help="seed of the episode")] = 0,
    frames: Annotated[int, tyro.conf.arg(help="frames of the video at most; the episode is run to its end")] = 500,
    output: Annotated[
        Path | None,
        option("video, .mp4 or .gif", "in the working directory, mp4 if imageio-ffmpeg is installed", "FILE"),
    ] = None,
) -> int:
    """Run a recorded policy for an episode, print its return and write a video.

    For trials of gymnasium's tasks, ours or stable-baselines3's. Actions are the policy's mean or likeliest ones.
    """
    if ahead is not None and predictor is None:
        raise ValueError(f"--ahead {ahead} is for what a predictor forecasts; choose one with --predictor")
    ahead = 1 if ahead is None else ahead
    from tipl_ray.watch.backends import offscreen_backend

    if "MUJOCO_GL" in os.environ:
        offscreen_backend()
    with waiting("watch: starting"):
        from tipl_ray.watch.watching import watch as watch_one

    watched = watch_one(
        storage,
        trial,
        snapshot,
        predictor=predictor,
        ahead=ahead,
        episode_seed=episode_seed,
        num_frames=frames,
        output=output,
    )
    what = f"snapshot {watched.snapshot} of trial {watched.trial}"
    if predictor is not None:
        what += f" as {predictor} forecasts it {ahead} ahead"
    say(f"{what}: return {watched.episode_return:,.1f} in {watched.num_steps:,} steps")
    if watched.true_return is not None:
        say(f"the true snapshot in the same episode: return {watched.true_return:,.1f}")
    shown = f"the first {watched.num_frames:,} of {watched.num_steps:,} steps"
    shown = shown if watched.num_frames < watched.num_steps else "the whole episode"
    say(f"{watched.video}: {watched.video.suffix.removeprefix('.')}, {shown}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that the user can fix are printed in one line."""
    try:
        return read_options(app, __doc__, args=arguments)
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
        imported = Storage(join(store.root, "series")).folders()
        there = (
            f"it holds imported checkpoints ({len(imported)} series), not trials; use jobs/data.py ask"
            if imported
            else "no trial is committed there; run jobs/collect.py first"
        )
        raise StoreError("\nerror: ".join(refusals) or f"{store.root}: {there}")
    return progress, refusals


def _expected_snapshots(header: Header) -> int | None:
    """Snapshots of a complete trial according to the configuration in the header; None if it is not recorded."""
    from tipl_ray.predict.bands import snapshots_per_iteration

    told = {**header.config, **header.config.get("ppo", {})}
    try:
        iterations = told["total_env_steps"] // told["num_steps"]
        return 1 + iterations * snapshots_per_iteration(header)
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
        print_error(refusal)
    return 1 if refusals else 0


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


if __name__ == "__main__":
    sys.exit(main())
