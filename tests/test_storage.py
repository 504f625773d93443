"""Whole files under one root: what holds in a folder holds in a bucket."""

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import new_root

from tipl_ray.data import storage
from tipl_ray.data.storage import (
    Storage,
    StoreError,
    file_exists,
    join,
    make_latest,
    publish,
    read_file,
    read_published,
    write_file,
)


@pytest.fixture(params=["folder", "file URI", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "bucket":
        return new_root(f"http://{request.getfixturevalue('server')}")
    return str(tmp_path / "a?b") if request.param == "folder" else tmp_path.as_uri()


def test_a_file_is_read_back_and_nothing_else_lies_there(root: str) -> None:
    folder = join(root, "deep", "er")
    assert not file_exists(folder, "a.bin")
    assert Storage(folder).entries() == {}
    write_file(folder, "a.bin", b"\x00one")
    write_file(folder, "a.bin", memoryview(b"two").tobytes())
    assert read_file(folder, "a.bin") == b"two"
    assert file_exists(folder, "a.bin")
    assert not file_exists(root, "deep")
    assert Storage(folder).entries() == {"a.bin": 3}
    assert (Storage(root).folders(), Storage(root).sizes("deep/er")) == (["deep"], {"a.bin": 3})
    Storage(root).delete("deep/er/a.bin")
    Storage(root).delete("deep/er/a.bin")
    assert not file_exists(folder, "a.bin")
    for name in ("deep/er/b.bin", "deep/er/and/c.bin", "deep/d.bin"):
        Storage(root).write(name, b"")
    for _ in range(2):
        Storage(root).delete_folder("deep/er")
    assert Storage(root).entries("deep") == {"d.bin": 0}


def test_a_file_that_is_missing_is_an_error_that_names_it(root: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.bin"):
        read_file(root, "nothing.bin")


def test_of_many_writers_of_one_name_one_is_first_and_its_file_stays(root: str) -> None:
    contents, won = [f"writer {number}".encode() for number in range(8)], []
    start = threading.Barrier(len(contents))

    def put(content: bytes) -> None:
        mine = Storage(root)
        mine.check_put_if_absent()
        start.wait()
        if mine.put_if_absent("folder/one", content):
            won.append(content)

    threads = [threading.Thread(target=put, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert read_file(join(root, "folder"), "one") == won[0]
    assert Storage(root).sizes("folder") == {"one": 8}
    assert Storage(root).sizes() == {}


@pytest.mark.parametrize("put", ["write", "put_if_absent"])
@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_a_killed_process_leaves_a_whole_file_or_none(tmp_path: Path, put: str, call: str) -> None:
    script = (
        "import os, signal, sys; from tipl_ray.data.storage import Storage\n"
        f"os.{call} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Storage(sys.argv[1], temporaries='half').{put}('name', bytes(1_000_000))\n"
    )
    used = {"write": {"fsync", "replace"}, "put_if_absent": {"fsync", "link"}}[put]
    status = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode
    if call in used:
        assert status == -signal.SIGKILL
        assert not (tmp_path / "name").exists()
        left = [path.name for path in (tmp_path / "half").iterdir()]
        assert len(left) == (0 if call == "fsync" else 1)  # the folder's own is the first
        assert all(name.startswith(storage.TEMPORARY) for name in left)
    else:
        assert status == 0
        assert (tmp_path / "name").stat().st_size == 1_000_000


def test_leftovers_are_what_nobody_wrote_for_an_hour_in_any_folder_and_nothing_else(tmp_path: Path) -> None:
    names = "models/0123/.tmp-1", "grams/.tmp-2", "evaluations/4567/.tmp-3", ".tmp-4", "models/0123/model.json"
    for name in (*names, "models/89ab/.tmp-in-use"):
        write_file(str(tmp_path), name, b"half")
    for name in names:
        os.utime(tmp_path / name, times=(0, time.time() - storage.LEFT_AFTER_SECONDS - 1))
    assert Storage(tmp_path.as_uri()).leftovers() == sorted(names[:-1])
    assert Storage(str(tmp_path / "nowhere")).leftovers() == []


def with_link(tmp_path: Path, patch: pytest.MonkeyPatch, link: Callable[..., None]) -> bool:
    with patch.context() as patched:
        patched.setattr(os, "link", link)
        return Storage(str(tmp_path)).put_if_absent("name", b"mine")


def test_a_link_whose_answer_the_network_lost_is_known_as_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def link_twice(*arguments: Any, **keywords: Any) -> None:
        real(*arguments, **keywords)
        real(*arguments, **keywords)

    assert with_link(tmp_path, monkeypatch, link_twice)
    assert not with_link(tmp_path, monkeypatch, link_twice)


def test_a_file_system_without_hard_links_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    with pytest.raises(StoreError, match=r"name: cannot be written: .*makes no hard links.*second writer"):
        with_link(tmp_path, monkeypatch, refuse)


def test_links_out_of_the_storage_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    inside = Storage(str(tmp_path / "inside"))
    inside.write("mine", b"mine")
    (tmp_path / "inside" / "away").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="leads out of the storage"):
        inside.read("away/secret")
    for attempt in (
        lambda: inside.write("away/new", b""),
        lambda: inside.put_if_absent("away/new", b""),
        lambda: inside.delete("away/secret"),
        lambda: inside.delete_folder("away"),
        lambda: inside.write("../new", b""),
    ):
        with pytest.raises(StoreError, match="leads out of the storage"):
            attempt()
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret"]


def test_latest_leads_to_the_newest_folder_and_takes_no_place_of_the_users(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_file(join(str(tmp_path), name), "report.html", name.encode())
        assert make_latest(str(tmp_path), join(str(tmp_path), name))
        assert (tmp_path / "latest" / "report.html").read_text() == name
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "latest"}
    assert not make_latest("s3://bucket/demo", "s3://bucket/demo/first")
    mine = tmp_path / "first" / "latest"
    mine.write_text("mine")
    assert not make_latest(str(tmp_path / "first"), str(tmp_path / "first"))
    assert mine.read_text() == "mine"


def test_an_endpoint_that_is_not_there_is_one_error_that_names_the_file(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    nowhere = "s3://bucket/folder?endpoint_override=http://127.0.0.1:9"
    with pytest.raises(StoreError, match=r"^s3://bucket/folder/a\.bin: cannot be written: http://127\.0\.0\.1:9: "):
        write_file(nowhere, "a.bin", b"")
    with pytest.raises(StoreError, match=r"^s3://bucket/folder/a\.bin: cannot be listed: .*check the storage"):
        file_exists(nowhere, "a.bin")


@pytest.mark.parametrize("unknown", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_a_folder_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: int
) -> None:
    with failing_fsync(monkeypatch, of_folders=True, code=unknown):
        Storage(str(tmp_path / "new")).write("folder/name", b"mine")
        assert Storage(str(tmp_path / "new")).put_if_absent("folder/once", b"mine")
    assert read_file(str(tmp_path / "new/folder"), "name") == b"mine"


@pytest.mark.parametrize(
    ("of_folders", "code", "complaint"),
    [
        (False, errno.EINVAL, "Invalid argument"),
        (True, errno.EIO, "Input/output error"),
        (True, errno.ENOSPC, "the disk is full"),
        (False, errno.ENOSPC, "the disk is full"),
    ],
)
def test_a_sync_that_fails_in_earnest_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_folders: bool, code: int, complaint: str
) -> None:
    with (
        failing_fsync(monkeypatch, of_folders, code),
        pytest.raises(StoreError, match=rf"name: cannot be written: .*{complaint}"),
    ):
        Storage(str(tmp_path)).write("name", b"mine")


@contextlib.contextmanager
def failing_fsync(patch: pytest.MonkeyPatch, of_folders: bool, code: int) -> Iterator[None]:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    with patch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        yield


@pytest.mark.parametrize("name", ["file", "file/deep/er", "link"])
def test_a_file_in_a_storages_place_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    for place in (str(tmp_path / name), (tmp_path / name).as_uri()):
        with pytest.raises(StoreError, match=r"^/.*(file|link):? is a file; choose another folder"):
            Storage(place)


def test_a_storage_without_a_name_is_refused() -> None:
    with pytest.raises(StoreError, match="name is empty; use a folder"):
        Storage("")


@pytest.mark.parametrize(
    "uri", ["floppy://me:secret@host/x?token=secret", "s3://bucket/x?token=secret", "gs://b?x=secret"]
)
def test_no_secret_of_a_uri_is_in_an_error(uri: str) -> None:
    with pytest.raises(StoreError, match="cannot be opened") as caught:
        Storage(uri)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_is_published_is_held_to_a_record_that_sha256sum_understands(tmp_path: Path):
    folder = str(tmp_path / "a folder")
    publish(folder, {"a.bin": b"one", "b.json": b"{}"}, "a.sha256")
    checked = subprocess.run(["sha256sum", "-c", "a.sha256"], cwd=folder, capture_output=True, text=True, check=True)
    assert checked.stdout.splitlines() == ["a.bin: OK", "b.json: OK"]
    assert read_published(folder, "a.bin", "a.sha256", "restore it") == b"one"
    write_file(folder, "a.bin", b"onE")
    with pytest.raises(StoreError, match=r"a\.bin: is damaged: its SHA-256 is not the one in a\.sha256; restore it$"):
        read_published(folder, "a.bin", "a.sha256", "restore it")
    write_file(folder, "a.sha256", b"\xff\x00")
    with pytest.raises(StoreError, match=r"b\.json: is damaged"):
        read_published(folder, "b.json", "a.sha256", "restore it")
    with pytest.raises(StoreError, match=r"c\.bin: is missing; restore it$"):
        read_published(folder, "c.bin", "a.sha256", "restore it")
