"""A cluster's services on this machine, on the loopback address alone, and a job submitted to them as to a real one.

Starts PostgreSQL, an S3 server (moto's), the MLflow server of mlflow.yaml with runs in the one and artifacts in the
other, and a Ray head with token authentication; submits a job whose storage is the bucket and whose tracking is that
server; reads back what it left in all three; ends everything. Needs the extra `dev`, and PostgreSQL's programs
(Debian: postgresql).

    python cluster/rehearsal.py [--job pipeline] [--experiment jobs/experiments/smoke.toml]
    python cluster/rehearsal.py --stay      says what to export, and is a cluster to try the page on until Ctrl-C
"""

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from head import Head, answers, free_port, ray_head, running, short_folder, until  # noqa: E402
from machine import BUCKET, CREDENTIALS, make_client, s3_server  # noqa: E402


def main() -> None:
    """Start all, submit, read back, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="pipeline", help="name of the job in jobs/")
    parser.add_argument("--experiment", default="jobs/experiments/smoke.toml")
    parser.add_argument("--stay", action="store_true", help="submit nothing, say what to export, end at Ctrl-C")
    arguments = parser.parse_args()
    if postgres_programs() is None:
        sys.exit("error: initdb of PostgreSQL is neither on PATH nor in /usr/lib/postgresql; on Debian: postgresql")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all as Ctrl-C does
    with services() as (head, database):
        if arguments.stay:
            names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "TIPL_STORAGE", "MLFLOW_TRACKING_URI")
            names += ("AWS_ENDPOINT_URL", *CREDENTIALS)
            print(*(f"export {name}={shlex.quote(head.environment[name])}" for name in names), sep="\n", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        else:
            submit(head, arguments.job, arguments.experiment)
            tell_storage(head.environment["TIPL_STORAGE"])
            tell_tracking(database)


@contextlib.contextmanager
def services() -> Iterator[tuple[Head, str]]:
    """The head, whose jobs know the storage and the MLflow server by its environment, and the database's URI."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(short_folder())
        database = stack.enter_context(postgres(folder))
        endpoint = f"http://{stack.enter_context(s3_server())}"
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
        tracking = stack.enter_context(mlflow_server(folder, database))
        settings = {"TIPL_STORAGE": f"s3://{BUCKET}/experiment", "MLFLOW_TRACKING_URI": tracking}
        head = stack.enter_context(ray_head(folder, settings))
        print(
            f"PostgreSQL, S3 at {endpoint}, MLflow at {tracking} and a Ray head at {head.dashboard} are up", flush=True
        )
        yield head, database


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's initdb and postgres, which Debian keeps off PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server with a password; the URI of its one database."""
    programs, data, password, port = postgres_programs(), folder / "postgres", secrets.token_hex(16), free_port()
    assert programs
    user = "nobody" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
    data.mkdir()
    (folder / "password").write_text(password)
    if user:
        folder.chmod(0o755)
        for path in (data, folder / "password"):
            shutil.chown(path, user)
    make = [programs / "initdb", f"--pgdata={data}", "--username=tipl", "--auth=scram-sha-256"]
    make += [f"--pwfile={folder / 'password'}"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, user=user, cwd=folder)
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    command += ["-c", f"unix_socket_directories={data}"]
    with running(command, folder / "postgres.log", user=user, cwd=folder):
        until(lambda: connects(port), 60)
        yield f"postgresql://tipl:{password}@127.0.0.1:{port}/postgres"


def connects(port: int) -> bool:
    """Whether somebody listens on a port of the loopback address."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


@contextlib.contextmanager
def mlflow_server(folder: Path, database: str) -> Iterator[str]:
    """The server of mlflow.yaml, with addresses of this machine in the place of the cluster's; its URI."""
    import yaml

    port = free_port()
    deployment, _ = yaml.safe_load_all((ROOT / "cluster" / "mlflow.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    here = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--artifacts-destination": f"s3://{BUCKET}/mlflow",
        "--allowed-hosts": f"127.0.0.1:{port}",
        "--workers": "1",
    }
    assert set(here) == {argument.partition("=")[0] for argument in container["args"]}
    command = [sys.executable, "-m", *container["command"], *(f"{name}={value}" for name, value in here.items())]
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": database.replace("://", "+psycopg2://", 1)}
    # In a group of its own: the server starts others, which are to end with it.
    with running(command, folder / "mlflow.log", env=environment, cwd=folder, start_new_session=True) as process:
        try:
            until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/health"), 300)
            if process.poll() is not None:
                raise RuntimeError((folder / "mlflow.log").read_text())
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def submit(head: Head, job: str, experiment: str) -> None:
    """Submit a job as the page says, with its log on this terminal. Raises CalledProcessError with its exit code."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--"]
    command += ["python", f"jobs/{job}.py", "--experiment", experiment, "--storage", "$TIPL_STORAGE"]
    subprocess.run(command, cwd=ROOT, env=head.environment, check=True)
    print(f"the job took {time.monotonic() - begin:.0f} s, its submission included")


def tell_storage(storage: str) -> None:
    """Verify every trial in the bucket."""
    from tipl_ray.data.trajectory_store import TrajectoryStore

    store = TrajectoryStore(storage)
    trials = [store.verify(seed) for seed in store.seeds()]
    print(f"S3: {len(trials)} trials verified, {sum(trial.num_snapshots for trial in trials)} snapshots, ", end="")
    print(f"data set {store.digest()}, sealed: {store.finished()}")


def tell_tracking(database: str) -> None:
    """What MLflow has in its database and in the bucket, asked without it."""
    import psycopg2

    runs = "select r.name, r.status, count(m.*) from runs r left join metrics m using (run_uuid) group by 1, 2"
    with contextlib.closing(psycopg2.connect(database)) as connection, connection.cursor() as cursor:
        cursor.execute(runs)
        for name, status, points in cursor.fetchall():
            print(f"PostgreSQL: run {name} {status}, {points} metric points")
    found = make_client(os.environ["AWS_ENDPOINT_URL"]).list_objects_v2(Bucket=BUCKET, Prefix="mlflow/")
    artifacts = found.get("Contents", [])
    print(f"S3: {len(artifacts)} artifacts of MLflow, {sum(one['Size'] for one in artifacts):,} bytes")


if __name__ == "__main__":
    main()
