"""Pictures of a sweep in MLflow's own pages, taken by a headless browser over HTTP.

    python docs/screenshots.py --storage storage/demo

Starts an MLflow server for this machine alone on the storage's sqlite file, opens the runs table, the compare view of
the three best children of the newest sweep and its heat map among the parent's artifacts, and writes
docs/pictures/mlflow_*.png. Needs Chromium.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from tipl_ray.config import CHECKOUT

WINDOW = (1500, 1000)
PATIENCE = 60_000
"""Milliseconds of the page's own clock that it gets to fetch and draw."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What is photographed, and where to."""

    storage: str = str(CHECKOUT / "storage" / "demo")
    """Folder that the sweep was run in."""
    output: Path = CHECKOUT / "docs" / "pictures"
    """Folder for the pictures."""


def chromium() -> str | None:
    """The browser, if it is there."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def server(storage: str) -> Iterator[str]:
    """MLflow's server on the storage's sqlite file; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = Path(storage).absolute() / "mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{file}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/health", process)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def pages(address: str, storage: str) -> dict[str, str]:
    """The addresses of the pages of the newest sweep."""
    from tipl_ray import comparison
    from tipl_ray.tracking import open_to_read

    client, _ = open_to_read(address, storage)
    _, rows = comparison.choose(client, (), None, None, "skill")
    parent = client.get_run(rows[0].tags[comparison.PARENT_TAG]).info
    best = json.dumps([row.run_id for row in comparison.by_metric(rows, "skill")[:3]])
    told = urllib.parse.urlencode({"runs": best, "experiments": json.dumps([parent.experiment_id])})
    experiment = f"{address}/#/experiments/{parent.experiment_id}"
    return {
        "runs": f"{experiment}/runs?searchFilter={urllib.parse.quote(_of(parent.run_id))}",
        "compare": f"{address}/#/compare-runs?{told}",
        "heat_map": f"{experiment}/runs/{parent.run_id}/artifacts/figures/heat_map.png",
    }


def browse(page: str, *options: str) -> bytes:
    """What Chromium says of a page with these options, once it has drawn itself."""
    browser = chromium()
    assert browser is not None, "who asks has looked whether Chromium is there"
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        command += [f"--window-size={WINDOW[0]},{WINDOW[1]}", f"--virtual-time-budget={PATIENCE}", *options, page]
        return subprocess.run(command, capture_output=True, timeout=400, check=True).stdout


def main() -> None:
    """Take every picture."""
    chosen = tyro.cli(Pictures, description=__doc__)
    if chromium() is None:
        print("error: no Chromium is on the path", file=sys.stderr)
        raise SystemExit(1)
    with server(chosen.storage) as address:
        for name, page in pages(address, chosen.storage).items():
            picture = chosen.output.absolute() / f"mlflow_{name}.png"
            browse(page, f"--screenshot={picture}")
            print(picture)


def _of(parent_run_id: str) -> str:
    return f"tags.mlflow.parentRunId = '{parent_run_id}'"


def _wait_for(page: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(page, timeout=10).read()
            return
        time.sleep(0.5)
    raise RuntimeError(f"{page}: MLflow's server does not answer")


if __name__ == "__main__":
    main()
