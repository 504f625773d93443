"""Jobs submitted to a real head process with token authentication: they succeed, fail, are stopped and go on."""

import contextlib
import dataclasses
import json
import re
import sqlite3
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from head import Head, answers, ray_head, short_folder, until
from ray.job_submission import JobStatus, JobSubmissionClient

from tipl_ray.collect.group import GroupCollector
from tipl_ray.config import Experiment
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.experiments import load_experiment
from tipl_ray.jobs import SUBMITTED, check_job
from tipl_ray.places import CHECKOUT
from tipl_ray.ppo.engines import choose_engine

SMOKE = CHECKOUT / "jobs" / "experiments" / "smoke.toml"
METRICS = [
    f"ray_tipl_{name}" for name in ("env_steps_total", "commits_total", "committed_bytes_total", "env_steps_per_second")
]


@dataclasses.dataclass
class Client:
    """Speaks with a head as a user would, without a trace of its token in this process' own environment."""

    head: Head
    jobs: JobSubmissionClient

    def submit(self, job: str, storage: Path, *overrides: str) -> str:
        """Submit a job of the checkout; its id."""
        command = ["python", f"jobs/{job}.py", "--experiment", f"jobs/experiments/{SMOKE.name}", "--storage", storage]
        return self.run(" ".join(map(str, [*command, *overrides])))

    def run(self, entrypoint: str) -> str:
        """Submit any command beside the checkout, without what .rayignore names; its id."""
        return self.jobs.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(CHECKOUT)})

    def wait(self, job: str, wanted: JobStatus) -> str:
        """Wait for a job's end; its log."""
        until(lambda: self.jobs.get_job_status(job).is_terminal(), 400)
        logs = self.jobs.get_job_logs(job)
        assert self.jobs.get_job_status(job) == wanted, logs
        return logs

    def get(self, path: str) -> Any:
        """JSON from the dashboard."""
        headers = {"Authorization": f"Bearer {self.head.token}"}
        with urllib.request.urlopen(urllib.request.Request(self.head.dashboard + path, headers=headers)) as answer:
            return json.load(answer)

    def scrape(self) -> str:
        """What Prometheus would read."""
        with urllib.request.urlopen(self.head.metrics) as answer:
            return answer.read().decode()

    def processes(self) -> dict[int, str]:
        """Process -> command line, of the head, its children, their children and so on."""
        parents, lines = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end while we look
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        own = {self.head.process.pid}
        while new := {process for process, parent in parents.items() if parent in own} - own:
            own |= new
        return {process: lines[process] for process in own}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with short_folder() as folder, ray_head(folder, {"RAY_metrics_report_interval_ms": "1000"}) as head:
        headers = {"Authorization": f"Bearer {head.token}"}
        yield Client(head, JobSubmissionClient(head.dashboard, headers=headers))


def expected_digest(folder: Path, total_env_steps: int) -> str:
    """Digest of the same trials run here, without Ray."""
    experiment = shrunk(folder, total_env_steps)
    collector = GroupCollector(experiment, choose_engine("auto", experiment.ppo), experiment.collect.seeds)
    assert collector.advance(seconds=600).finished
    return TrajectoryStore(experiment.storage_path).digest()


def working(processes: dict[int, str], before: dict[int, str], storage: Path) -> list[str]:
    """Command lines of new processes that may still do something for the job."""
    new = [line for process, line in processes.items() if process not in before]
    return [line for line in new if "GroupCollector" in line or str(storage) in line]


def shrunk(folder: Path, total_env_steps: int) -> Experiment:
    experiment = load_experiment(SMOKE)
    collect = dataclasses.replace(experiment.collect, total_env_steps=total_env_steps)
    return dataclasses.replace(experiment, collect=collect).at(str(folder))


def statuses(storage: Path) -> dict[str, str]:
    """MLflow run -> status."""
    with contextlib.closing(sqlite3.connect(storage / "mlflow.db")) as connection:
        return dict(connection.execute("select name, status from runs"))


def test_without_the_token_nothing_is_answered(client: Client) -> None:
    url = f"{client.head.dashboard}/api/jobs/"
    assert answers(url, client.head.token)
    assert not answers(url)
    assert not answers(url, client.head.token[::-1])


def test_a_failing_job_has_its_exit_code_and_the_upload_is_small(client: Client) -> None:
    script = (
        "import os, sys; from pathlib import Path; "
        "found = [p for p in Path().rglob('*') if p.is_file() and 'published' not in p.parts]; "
        "print('uploaded', len(found), sum(p.stat().st_size for p in found), sorted(os.listdir())); sys.exit(3)"
    )
    job = client.run(f'python -c "{script}"')
    logs = client.wait(job, JobStatus.FAILED)
    assert client.jobs.get_job_info(job).driver_exit_code == 3
    match = re.search(r"uploaded (\d+) (\d+) (.*)", logs)
    assert match, logs
    # Without the published predictors, each of which is small by a test of its own.
    assert int(match[2]) < 1_600_000
    assert "jobs" in match[3]
    assert not {"storage", ".git", "docs", ".venv"} & set(re.findall(r"'([^']+)'", match[3]))


def test_a_users_mistake_is_one_line_and_exit_code_1(client: Client, tmp_path: Path) -> None:
    job = client.submit("collect", tmp_path / "none", "--collect.task", "FrozenLake-v1")
    logs = client.wait(job, JobStatus.FAILED)
    assert client.jobs.get_job_info(job).driver_exit_code == 1
    assert "error: collect.task='FrozenLake-v1' is not one of" in logs
    assert "Traceback" not in logs


def test_a_storage_that_would_be_thrown_away_with_the_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment(SMOKE)
    check_job(experiment)
    monkeypatch.setenv(SUBMITTED, "{}")
    check_job(experiment.at("s3://bucket/mine?region=us-east-1"))
    for storage, words in (
        (None, "storage is not set"),
        (f"{CHECKOUT}/mine", f"storage is inside it, '{CHECKOUT}/mine'"),
    ):
        with pytest.raises(ValueError, match=f"is deleted when the job ends, and {words}"):
            check_job(experiment.at(storage))


@pytest.mark.slow
def test_a_stopped_pipeline_leaves_no_process_and_good_data_and_is_completed_when_submitted_again(
    client: Client, tmp_path: Path
) -> None:
    storage, steps = tmp_path / "stopped", 102_400
    before = client.processes()
    # A commit every 3 iterations of 256 steps: the job is stopped in the middle of its trials.
    overrides = ["--collect.total-env-steps", str(steps)]
    job = client.submit("pipeline", storage, *overrides)
    until(lambda: len(list(storage.glob("commits/trial=*/commit-*.json"))) > 4, 200)
    actors = client.get("/api/v0/actors?detail=1")["data"]["result"]["result"]
    named = {actor["name"] for actor in actors if actor["class_name"] == "GroupCollector"}
    assert {"collect smoke 1", "collect smoke 2"} <= named
    assert statuses(storage) == {"smoke InvertedPendulum-v4": "RUNNING"}
    until(
        lambda: all(re.search(rf'^{name}{{.*experiment="smoke".*}} [1-9]', client.scrape(), re.M) for name in METRICS),
        60,
    )
    assert client.jobs.stop_job(job)
    assert "interrupted: run the same command again" in client.wait(job, JobStatus.STOPPED)
    until(lambda: not working(client.processes(), before, storage), 60)
    assert statuses(storage) == {"smoke InvertedPendulum-v4": "KILLED"}
    assert not (storage / "commits" / "_SUCCESS").exists()
    store = TrajectoryStore(str(storage))
    committed = [store.verify(seed).num_snapshots for seed in store.seeds()]
    assert 0 < max(committed) < shrunk(storage, steps).num_snapshots
    logs = client.wait(client.submit("pipeline", storage, *overrides), JobStatus.SUCCEEDED)
    assert store.finished()
    assert store.digest() == expected_digest(tmp_path / "expected", steps)
    assert statuses(storage) == dict.fromkeys(
        ("smoke InvertedPendulum-v4", "collect", "train paper", "evaluate paper"), "FINISHED"
    )
    assert list(storage.glob("evaluations/*/report.html"))
    assert re.search(r"^time=\S+ event=start actor=\d trials=1-2$", logs, re.MULTILINE), logs
    assert re.search(r"event=commit trials=\S+ iteration=\d+ bytes=\d+ seconds=", logs)
