"""Pictures of a sweep in MLflow's own pages, taken over HTTP in a headless Chromium.

    python docs/screenshots.py --storage storage/demo

Starts MLflow's server, for this machine alone, on the storage's sqlite file, and opens the pages of a sweep as
a person would: the runs table, sorted by skill; the compare view of three children, the best, the middle and the last;
the heat map among the parent's artifacts. Each page must say what it is looked at for before its picture is taken.
"""

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from websockets.sync.client import ClientConnection, connect

from tipl_ray.places import CHECKOUT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1500
PATIENCE = 180.0
"""Seconds that a server, or a page, gets to answer."""
COLUMNS = ("metrics.`skill`", "metrics.`ridge_skill`", "metrics.`floor_skill`")
"""What the runs table shows beside the varied fields; a person ticks them under Columns."""

MEMORY = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",  # else an assistant covers a third of the window
}
"""What MLflow remembers of a person who has been there before."""
KEYS = {"Escape": 27}

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What is photographed, and where to."""

    storage: str = str(CHECKOUT / "storage" / "demo")
    """Folder that the sweep was run in."""
    parent: str | None = None
    """Id of the sweep's run; none takes the newest."""
    output: Path = CHECKOUT / "docs" / "pictures"
    """Folder for the pictures, mlflow_<page>.png."""


def find_browser() -> str | None:
    """The browser's program, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def mlflow_server(storage: str) -> Iterator[str]:
    """MLflow's server on the storage's sqlite file; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{Path(storage).absolute() / 'mlflow.db'}"]
    with running(command, MLFLOW_DISABLE_TELEMETRY="true"):
        address = f"http://127.0.0.1:{port}"
        until(lambda: answers(f"{address}/health"), "MLflow's server to answer")
        yield address


@contextlib.contextmanager
def running(command: Sequence[str], **environment: str) -> Iterator[None]:
    """A program, with all that it starts, for as long as the block runs."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | environment,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def answers(address: str) -> bool:
    """Whether something is there."""
    with contextlib.suppress(OSError):
        return bool(urllib.request.urlopen(address, timeout=10).read())
    return False


def until(look: Callable[[], Value | None], what: str) -> Value:
    """What `look` finds, once it finds something. Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.3)
    raise TimeoutError(f"waited {PATIENCE:.0f} s for {what}")


class Page:
    """A page of Chromium, driven by its DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.send("Page.enable")

    @classmethod
    @contextlib.contextmanager
    def open(cls, browser: str) -> Iterator["Page"]:
        """An empty page in a browser that nobody has used before."""
        with tempfile.TemporaryDirectory() as profile:
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += ["--remote-debugging-port=0", f"--user-data-dir={profile}/new", "about:blank"]
            with running(command):
                port_file = Path(profile, "new", "DevToolsActivePort")
                port = until(lambda: port_file.is_file() and port_file.read_text().split("\n")[0], "Chromium to start")
                request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
                with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                    target = json.load(answer)["webSocketDebuggerUrl"]
                with connect(target, max_size=None) as socket:
                    yield cls(socket)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result. Raises RuntimeError for one that fails."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def goto(self, address: str, height: int, **store: str) -> None:
        """Open an address in a window of some height, with some things in MLflow's memory within the browser."""
        self.send("Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False)
        remember = f"for (const [key, value] of Object.entries({json.dumps(MEMORY | store)})) localStorage[key] = value"
        self.send("Page.addScriptToEvaluateOnNewDocument", source=remember)
        # Between two addresses of one page only what stands after the # would change, and nothing be loaded anew.
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """What the page's own JavaScript makes of an expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def see(self, *words: str) -> None:
        """Wait until the page says all these words. Raises TimeoutError."""
        for word in words:
            said = f"document.body?.innerText.includes({json.dumps(word)})"
            until(lambda said=said: self.value(said), f"the page to say {word!r}")  # type: ignore[misc]

    def click(self, element: str) -> None:
        """Click in the middle of what a JavaScript expression finds, once it is there."""
        middle = f"""(() => {{
            const element = {element};
            element?.scrollIntoView({{block: "nearest"}});
            const box = element?.getBoundingClientRect();
            return box && [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = until(lambda: self.value(middle), f"{element} on the page")
        for kind, button in (("mouseMoved", "none"), ("mousePressed", "left"), ("mouseReleased", "left")):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def write(self, text: str) -> None:
        """Type a text where the cursor is."""
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press and let go a key by its name."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def picture(self, path: Path) -> None:
        """Write what can be seen as PNG."""
        time.sleep(1.0)  # what fades in has done so
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


def take_pictures(storage: str, parent_id: str | None, output: Path, browser: str) -> list[Path]:
    """The three pictures of a sweep. Raises TimeoutError where a page does not show its part."""
    from tipl_ray.sweep import comparison
    from tipl_ray.tracking import PARENT_TAG, open_to_read

    output.mkdir(parents=True, exist_ok=True)
    runs, compare, heat_map = (output.absolute() / f"mlflow_{name}.png" for name in ("runs", "compare", "heat_map"))
    with mlflow_server(storage) as address, Page.open(browser) as page:
        client, _ = open_to_read(address, storage)
        rows = comparison.by_metric(comparison.choose(client, (), parent_id, None, "skill")[1], "skill")
        parent = client.get_run(rows[0].tags[PARENT_TAG]).info
        _show_runs(page, address, parent.experiment_id, parent.run_id, rows)
        page.picture(runs)
        _show_comparison(page, address, parent.experiment_id, [rows[0], rows[len(rows) // 2], rows[-1]])
        page.picture(compare)
        _show_artifact(page, address, parent.experiment_id, parent.run_id, "figures/heat_map.png")
        page.picture(heat_map)
    return [runs, compare, heat_map]


def _show_runs(page: Page, address: str, experiment_id: str, parent_id: str, rows: Sequence[Any]) -> None:
    from tipl_ray.sweep import comparison

    columns = [*COLUMNS, *(f"params.`{field}`" for field in comparison.varied(rows)), "tags.`best`"]
    store = {
        f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment_id}"]-ReactComponentState': json.dumps(
            {"selectedColumns": columns}
        ),
    }
    query = {"searchFilter": f"tags.mlflow.parentRunId = '{parent_id}'", "orderByKey": "metrics.`skill`"}
    query |= {"orderByAsc": "false"}
    told = urllib.parse.urlencode(query, quote_via=urllib.parse.quote)
    page.goto(f"{address}/#/experiments/{experiment_id}/runs?{told}", 330 + 32 * len(rows), **store)
    page.see(f"{len(rows)} matching runs", *(row.name for row in rows))


def _show_comparison(page: Page, address: str, experiment_id: str, rows: Sequence[Any]) -> None:
    query = {"runs": json.dumps([row.run_id for row in rows]), "experiments": json.dumps([experiment_id])}
    page.goto(f"{address}/#/compare-runs?{urllib.parse.urlencode(query)}", 1190)
    page.see("Comparing 3 Runs", "Parallel Coordinates Plot", *(row.name for row in rows))
    # The plot begins with the first metric by name; what is asked for is skill.
    page.click("""[...document.querySelectorAll('[class*="select-selection-item-remove"]')].at(-1)""")
    page.click("""[...document.querySelectorAll('input[role="combobox"]')].at(-1)""")
    page.write("skill")
    page.click(
        """[...document.querySelectorAll('[class*="item-option-content"]')].find(e => e.innerText === "skill")"""
    )
    page.press("Escape")
    page.click("""document.querySelector('button[role="switch"]')""")


def _show_artifact(page: Page, address: str, experiment_id: str, run_id: str, artifact: str) -> None:
    page.goto(f"{address}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{artifact}", 700)
    page.see(artifact)
    until(
        lambda: page.value("[...document.images].some(image => image.complete && image.naturalWidth > 500)"), artifact
    )
    # Where this machine keeps its artifacts is of no use to a reader.
    page.value("[...document.querySelectorAll('*')].filter(e => /^Path: /.test(e.innerText)).at(-1)?.remove()")


def main() -> None:
    """Take every picture."""
    chosen = tyro.cli(Pictures, description=__doc__)
    browser = find_browser()
    if browser is None:
        raise SystemExit(f"error: none of {', '.join(BROWSERS)} is on the path")
    for path in take_pictures(chosen.storage, chosen.parent, chosen.output, browser):
        print(path)


if __name__ == "__main__":
    main()
