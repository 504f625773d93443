"""The store on a real S3 endpoint over HTTP: what holds on a local folder holds there, or writing is refused."""

import http.client
import http.server
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machine import BUCKET, make_client, new_root
from test_trajectory_store import HEADER, collect, commit_snapshots, go_on_from, make_state

from tipl_ray.data.snapshots import COLUMNS
from tipl_ray.data.storage import StoreError
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.data.trial_writer import TrialWriter

Put = Callable[[int, dict[str, str]], None]
"""What to do with the n-th put that carries data, and its headers; counted from 1."""


Answer = Callable[[int, str], int | None]
"""Status to answer the n-th request with, method and path, in the real one's place; None asks the real one."""


class Proxy(http.server.ThreadingHTTPServer):
    """An S3 endpoint between the store and the real one, which meddles with puts."""

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target = target
        self.num_puts = self.num_requests = 0
        self.answer: Answer = lambda number, request: None
        self.before: Put = lambda number, headers: None
        self.after: Put = lambda number, headers: None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Forward(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = dict(self.headers.items())
        counts = self.command == "PUT" and len(body) > 0
        self.server.num_requests += 1
        try:
            if status := self.server.answer(self.server.num_requests, f"{self.command} {self.path}"):
                self.send_response_only(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if counts:
                self.server.num_puts += 1
                self.server.before(self.server.num_puts, headers)
            elif self.command == "PUT":
                self.server.before(0, headers)
            connection = http.client.HTTPConnection(self.server.target, timeout=30)
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            if counts:
                self.server.after(self.server.num_puts, headers)
        except ConnectionAbortedError:
            self.close_connection = True
            return
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy
        proxy.shutdown()


def keys(root: str) -> list[str]:
    """What lies under a root, without the root."""
    prefix, _, endpoint = root.removeprefix(f"s3://{BUCKET}/").partition("?endpoint_override=")
    listed = make_client(endpoint).list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return sorted(entry["Key"].removeprefix(f"{prefix}/") for entry in listed)


def collect_into(root: str, stops: tuple[int, ...] = (1, 4, 8), seed: int = 3) -> TrajectoryStore:
    store = TrajectoryStore(root)
    writer = TrialWriter(store, seed, HEADER)
    for stop in stops:
        commit_snapshots(writer, stop, seed)
    return store


def test_a_trial_in_a_bucket_is_the_trial_in_a_folder(server: str, tmp_path: Path) -> None:
    root = new_root(f"http://{server}")
    store, local = collect_into(root), collect(tmp_path)
    collect_into(root, seed=11)
    collect(tmp_path, seed=11)
    assert (store.seeds(), store.header(), store.digest()) == ((3, 11), HEADER, local.digest())
    for seed in (3, 11):
        read, expected = store.trajectory(seed), local.trajectory(seed)
        for field in COLUMNS.values():
            np.testing.assert_array_equal(getattr(read, field), getattr(expected, field))
    assert store.trajectory(3, columns=["weights"], start=2, stop=5).snapshots_T.tolist() == [2, 3, 4]
    store.finish([3, 11], 8)
    assert store.finished()
    local.finish([3, 11], 8)
    assert keys(root) == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    writer = TrialWriter(store, 3, HEADER)
    assert writer.state is not None
    assert {name: array.tobytes() for name, array in writer.state.items()} == {
        name: array.tobytes() for name, array in make_state(8).items()
    }


def test_the_endpoint_comes_from_the_uri_or_the_environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = new_root(f"http://{server}")
    digest = collect_into(root, stops=(2,)).digest()
    plain = root.partition("?")[0]
    assert TrajectoryStore(f"{plain}/?endpoint_override={server}&scheme=http&region=eu-west-1").digest() == digest
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{server}")
    assert TrajectoryStore(plain).digest() == digest
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    assert TrajectoryStore(plain).verify(3).num_snapshots == 2


@pytest.mark.parametrize(
    ("root", "complaint"),
    [
        ("s3://id:secret@bucket/folder", r"^s3://bucket/folder: the URI carries credentials"),
        ("s3://bucket/folder?endpoint=localhost", "'endpoint' is none of endpoint_override"),
        ("s3:///folder", "names no bucket"),
    ],
)
def test_a_uri_that_says_too_much_or_too_little_is_refused(root: str, complaint: str) -> None:
    with pytest.raises(StoreError, match=complaint):
        TrajectoryStore(root)


def test_a_second_writer_in_a_bucket_is_refused_and_harms_nothing(server: str) -> None:
    store = collect_into(new_root(f"http://{server}"))
    first, second = TrialWriter(store, 3, HEADER), TrialWriter(store, 3, HEADER)
    commit_snapshots(first, 10)
    with pytest.raises(StoreError, match=r"commit-4\.json: another process is writing trial 3"):
        commit_snapshots(second, 10)
    commit_snapshots(first, 12)
    assert store.verify(3, 12).num_commits == 5


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_process_killed_at_any_put_costs_at_most_the_open_commit(
    proxy: Proxy, tmp_path: Path, nth: int, when: str
) -> None:
    root = new_root(proxy.endpoint)
    store = collect_into(root, stops=(1, 4))
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_trajectory_store as t\n"
        "t.commit_snapshots(t.TrialWriter(t.TrajectoryStore(sys.argv[2]), 3, t.HEADER), 8)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent), root])

    def kill(number: int, headers: dict[str, str]) -> None:
        if number == nth:
            process.kill()
            process.wait()
            raise ConnectionAbortedError

    proxy.num_puts = 0
    setattr(proxy, when, kill)
    assert process.wait() == -signal.SIGKILL
    setattr(proxy, when, lambda number, headers: None)
    committed = 8 if (nth, when) == (3, "after") else 4
    go_on_from(store, committed)
    assert store.digest() == collect(tmp_path).digest()
    assert len([key for key in keys(root) if "/state-" in key]) == 1


def test_a_put_whose_answer_is_lost_is_known_as_ones_own(proxy: Proxy) -> None:
    root = new_root(proxy.endpoint)
    store = collect_into(root, stops=(1,))
    proxy.num_puts, marks = 0, []

    def lose_the_answer(number: int, headers: dict[str, str]) -> None:
        marks.append(headers.get("x-amz-meta-writer"))
        if number == 3:
            raise ConnectionAbortedError

    proxy.after = lose_the_answer
    commit_snapshots(TrialWriter(store, 3, HEADER), 4)
    assert marks[2] == marks[3] is not None
    assert store.verify(3, 4).num_commits == 2


def without_condition(number: int, headers: dict[str, str]) -> None:
    for name in [name for name in headers if name.lower() == "if-none-match"]:
        del headers[name]


def test_an_endpoint_that_ignores_the_condition_is_refused_before_anything_is_written(proxy: Proxy) -> None:
    root = new_root(proxy.endpoint)
    proxy.before = without_condition
    store = TrajectoryStore(root)
    with pytest.raises(
        StoreError, match=r"cannot be written there.*If-None-Match.*taken twice.*second writer.*collect"
    ):
        TrialWriter(store, 3, HEADER)
    assert keys(root) == []
    assert store.seeds() == ()


def test_a_data_set_behind_such_an_endpoint_can_still_be_read(proxy: Proxy) -> None:
    root = new_root(proxy.endpoint)
    collect_into(root)
    proxy.before = without_condition
    assert len(TrajectoryStore(root).trajectory(3).snapshots_T) == 8


def test_a_bucket_that_is_not_there_is_refused_by_name(server: str) -> None:
    root = f"s3://no-such-bucket/folder?endpoint_override=http://{server}"
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/folder: .*bucket does not exist"):
        TrialWriter(TrajectoryStore(root), 3, HEADER)
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/folder/commits: no trial is committed there"):
        TrajectoryStore(root).header()


def test_a_missing_and_an_altered_object_are_named(server: str) -> None:
    root = new_root(f"http://{server}")
    store = collect_into(root)
    client, prefix = make_client(f"http://{server}"), root.partition("?")[0].removeprefix(f"s3://{BUCKET}/")
    part = next(key for key in keys(root) if "part-00000001" in key)
    content = client.get_object(Bucket=BUCKET, Key=f"{prefix}/{part}")["Body"].read()
    client.put_object(
        Bucket=BUCKET, Key=f"{prefix}/{part}", Body=content[:99] + bytes([content[99] ^ 1]) + content[100:]
    )
    with pytest.raises(StoreError, match=rf"^s3://{BUCKET}/{prefix}/{part}: .*is altered.*collect again"):
        store.verify(3)
    client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{part}")
    with pytest.raises(StoreError, match=rf"^s3://{BUCKET}/{prefix}/{part}: is missing"):
        store.trajectory(3)


def fail_every(nth: int) -> Answer:
    """Every n-th request is answered 500, 503 or not at all, in turn."""

    def answer(number: int, request: str) -> int | None:
        if number % nth:
            return None
        kind = number // nth % 3
        if kind == 0:
            raise ConnectionAbortedError
        return (500, 503)[kind - 1]

    return answer


@pytest.mark.parametrize("nth", [10, 4])
def test_an_endpoint_that_fails_now_and_then_costs_time_and_nothing_else(
    proxy: Proxy, tmp_path: Path, nth: int
) -> None:
    root = new_root(proxy.endpoint)
    proxy.answer = fail_every(nth)
    store = collect_into(root, stops=(1, 8))
    store.finish([3], 8)
    local = collect(tmp_path, stops=(1, 8))
    assert store.finished()
    assert (store.seeds(), store.header(), store.digest()) == ((3,), HEADER, local.digest())
    np.testing.assert_array_equal(store.trajectory(3).weights_TP, local.trajectory(3).weights_TP)
    assert proxy.num_requests > 3 * nth


@pytest.mark.parametrize("request_of", ["list-type=2", ".parquet"])
def test_a_request_that_fails_three_times_in_a_row_is_made_again(proxy: Proxy, request_of: str) -> None:
    store = collect_into(new_root(proxy.endpoint), stops=(2,))
    failed: list[str] = []

    def answer(number: int, request: str) -> int | None:
        if request_of in request and len(failed) < 3:
            failed.append(request)
            return 500
        return None

    proxy.answer = answer
    assert len(store.trajectory(3).snapshots_T) == 2
    assert len(failed) == 3


def test_an_endpoint_that_always_fails_is_one_line_that_names_the_file(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_root(proxy.endpoint)
    collect_into(root, stops=(2,))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    store = TrajectoryStore(root)
    failing: list[str] = []
    proxy.answer = lambda number, request: 500 if failing[0] in request else None
    for part, complaint in (("list-type=2", "cannot be listed"), (".parquet", "cannot be read")):
        failing[:] = [part]
        with pytest.raises(StoreError, match=rf"^s3://[^ ]+: {complaint}: .*(check|connection)") as caught:
            store.trajectory(3)
        assert "\n" not in str(caught.value)
        assert "delete" not in str(caught.value)


@pytest.mark.parametrize("attempts", ["0", "many"])
def test_a_number_of_attempts_that_cannot_be_is_refused(attempts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    with pytest.raises(StoreError, match=rf"s3://bucket/x.*: cannot be opened: .*MAX_ATTEMPTS='{attempts}' is not"):
        TrajectoryStore("s3://bucket/x?endpoint_override=http://127.0.0.1:9")
