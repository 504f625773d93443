"""Where users wait: from each job's command to its first task, to the first commit, the evaluation, a sweep's runs.

The demo's jobs run one after the other in a storage of their own, with nothing compiled before, each in a process that
notes when MLflow and Ray are there and when the first task is sent to Ray. Seconds are a clock's, medians over rounds;
CPU seconds are those of the job and of all processes below it, which a machine that is at other work too changes less.

    python benchmarks/waits.py [--rounds 3] [--state after] [--checkout FOLDER]

Rows are kept in docs/results/waits.csv by their state; with `--checkout`, they are of the jobs of another checkout.
"""

import contextlib
import csv
import functools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "results" / "waits.csv"
NOTES = "TIPL_NOTES"
"""Environment variable of a watched job: the file that its notes are written to."""
COMMAND, MLFLOW, MLFLOW_THERE, RAY, RAY_THERE, TASK, END = (
    *("command", "MLflow asked", "MLflow there", "Ray asked", "Ray there", "first task", "end"),
)
REPORT, REPORT_THERE = "report begun", "report there"
POLL_SECONDS = 0.05


def watched(script: str) -> None:
    """Run a job's script in this process, and leave when it came how far."""
    import ray.actor
    import ray.remote_function

    from tipl_ray import stages, tracking

    notes = {COMMAND: float(os.environ["TIPL_BEGIN"])}

    def noting(function: Callable[..., Any], before: str, after: str | None = None) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            notes.setdefault(before, time.time())
            try:
                return function(*arguments, **named)
            finally:
                if after:
                    notes[after] = time.time()

        return call

    patches: list[tuple[Any, str, Any]] = [
        (tracking.Tracker, "open", staticmethod(noting(tracking.Tracker.open, MLFLOW, MLFLOW_THERE))),
        (ray, "init", noting(ray.init, RAY, RAY_THERE)),
        (ray.actor.ActorClass, "_remote", noting(ray.actor.ActorClass._remote, TASK)),
        (ray.remote_function.RemoteFunction, "_remote", noting(ray.remote_function.RemoteFunction._remote, TASK)),
        (stages, "_draw", noting(stages._draw, REPORT)),
        (stages, "_report", noting(stages._report, REPORT, REPORT_THERE)),
    ]
    for place, name, noted in patches:
        setattr(place, name, noted)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        notes[END] = time.time()
        Path(os.environ[NOTES]).write_text(json.dumps(notes))


class ProcessorTime:
    """CPU seconds of a process and of all below it, those that have ended included as far as they were seen."""

    def __init__(self, process: int) -> None:
        self._process, self._seen = process, dict[tuple[int, float], float]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        while not self._ended.wait(POLL_SECONDS):
            with contextlib.suppress(psutil.Error):
                job = psutil.Process(self._process)
                for one in (job, *job.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        times = one.cpu_times()
                        self._seen[one.pid, one.create_time()] = times.user + times.system

    @property
    def seconds(self) -> float:
        """So far."""
        return sum(self._seen.values())

    def end(self) -> float:
        """Stop looking; the seconds of the whole."""
        self._ended.set()
        self._thread.join()
        return self.seconds


Row = tuple[str, float, float | None]
"""What is waited for, seconds, CPU seconds."""


def run(checkout: Path, job: str, *arguments: str, commit: Path | None = None) -> Iterator[Row]:
    """The waits of one job. With a storage in `commit`, until its first commit too. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        notes = Path(folder, "notes")
        environment = {**os.environ, "PYTHONPATH": str(checkout), NOTES: str(notes), "TIPL_BEGIN": repr(begin)}
        script = str(checkout / "jobs" / f"{job}.py")
        command = [sys.executable, str(Path(__file__).resolve()), "--watched", script, *arguments]
        with Path(folder, "said").open("w+") as said:
            # Ray's workers have their driver's folder on their path before all others.
            process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=said, stderr=said)
            cpu = ProcessorTime(process.pid)
            if commit is not None:
                while process.poll() is None and not list(commit.glob("commits/trial=*/commit-1.json")):
                    time.sleep(POLL_SECONDS)
                yield f"{job}: command to the first trial's first commit", time.time() - begin, cpu.seconds
            process.wait()
            cpu_seconds = cpu.end()
            if process.returncode:
                said.seek(0)
                raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}: {said.read()}")
        at = json.loads(notes.read_text())
    yield f"{job}: command to the first task on Ray", at[TASK] - at[COMMAND], None
    yield f"{job}: of which MLflow", at[MLFLOW_THERE] - at[MLFLOW], None
    yield f"{job}: of which Ray", at[RAY_THERE] - at[RAY], None
    if REPORT in at:
        yield f"{job}: figures and report", at[REPORT_THERE] - at[REPORT], None
    yield f"{job}: whole", at[END] - at[COMMAND], cpu_seconds


def help_of(checkout: Path) -> Row:
    """What `--help` takes."""
    begin, before = time.time(), os.times()
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, str(checkout / "jobs" / "pipeline.py"), "--help"]
    subprocess.run(command, cwd=checkout, env=environment, capture_output=True, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return "pipeline --help", time.time() - begin, cpu


def measure(checkout: Path, quick: bool) -> Iterator[Row]:
    """All waits, once, in a new storage and with an empty cache of what is compiled."""
    name = "smoke" if quick else "demo"
    with tempfile.TemporaryDirectory(prefix="waits-") as folder, _environment(XDG_CACHE_HOME=f"{folder}/cache"):
        storage = Path(folder, "storage")
        told = ["--experiment", str(checkout / "jobs" / "experiments" / f"{name}.toml"), "--storage", str(storage)]
        yield help_of(checkout)
        yield from run(checkout, "collect", *told, commit=storage)
        yield from run(checkout, "train", *told)
        yield from run(checkout, "evaluate", *told)
        contexts = (4, 8) if quick else (5, 10, 15, 20)
        few = ["--train.num-steps", "20", "--train.steps-per-iteration", "10", "--train.warmup-steps", "5"]
        rows = list(run(checkout, "sweep", *told, "--over", f"model.context={','.join(map(str, contexts))}", *few))
        yield from rows
        seconds = {what: taken for what, taken, _ in rows}
        alone = seconds["sweep: whole"] - seconds["sweep: command to the first task on Ray"]
        yield "sweep: a run of 20 steps", alone / len(contexts), None


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main() -> None:
    """Measure, print the table, keep it in docs/results/waits.csv beside those of other states."""
    sys.path.insert(0, str(ROOT))
    from command import make_parser, results_folder

    from tipl_ray.pages import as_csv
    from tipl_ray.terminal import say_rows

    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="each in a new storage")
    parser.add_argument("--state", default="after", help="what the rows are of")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose jobs run")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    found: dict[str, list[tuple[float, float | None]]] = {}
    for _ in range(rounds):
        for what, seconds, cpu in measure(arguments.checkout.resolve(), arguments.quick):
            found.setdefault(what, []).append((seconds, cpu))
    table = results_folder(True) / "waits.csv" if arguments.quick else TABLE
    kept = list(csv.DictReader(table.open())) if table.exists() else []
    rows: list[dict[str, Any]] = [row for row in kept if row["state"] != arguments.state]
    for what, values in found.items():
        cpu_seconds = [cpu for _, cpu in values if cpu is not None]
        rows.append(
            {
                "state": arguments.state,
                "wait": what,
                "seconds": f"{statistics.median(seconds for seconds, _ in values):.2f}",
                "cpu_seconds": f"{statistics.median(cpu_seconds):.2f}" if cpu_seconds else "",
                "rounds": str(rounds),
            }
        )
    table.write_bytes(as_csv(rows))
    say_rows(rows, title=f"Waits, medians of {rounds} rounds")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watched"]:
        del sys.argv[:2]
        watched(sys.argv[0])
    else:
        main()
