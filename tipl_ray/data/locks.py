"""One driver at a time: a lock by name in a storage, which is free again however its holder ends.

In a folder the kernel sees to that (flock). In a bucket the holder writes its lease anew every few seconds, and one
that has not changed for longer is nobody's. Knows nothing of what is done under a lock.

    <storage>/locks/<name>.lock        in a folder: who holds it, as JSON; gone when nobody does
    <storage>/locks/<name>/<n>.json    in a bucket: the n-th lease, of which the last counts
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tipl_ray.data.storage import Storage, StoreError, local_folder
from tipl_ray.terminal import say

RENEW_SECONDS = 5.0
"""Between two writings of a lease."""
LEASE_SECONDS = 30.0
"""A lease that has not been written for so long is nobody's."""


@contextlib.contextmanager
def only_one(storage: str, name: str, what: str) -> Iterator[None]:
    """Be the one process that does `what`, as in "training this model", in a storage, until the block is left.

    Raises StoreError where another process does it, with its host, number and time of start, and where the storage
    cannot be written. Without a lock where the file system has none, or the bucket no conditional put.
    """
    folder = local_folder(storage)
    if folder is None:
        with _lease(storage, name, what):
            yield
        return
    path = folder / "locks" / f"{name}.lock"
    descriptor = _locked(path, what)
    try:
        yield
    finally:
        # Taken away while it is still locked: who has opened it meanwhile sees that and makes a new one.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, what: str) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(
                f"{path.parent.parent}: cannot be written: {error.strerror}. Fix permissions or free some space, or "
                "use another --storage"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            raise StoreError(
                f"{path.parent.parent}: {_told(holder)} is already {what}; wait for it to end, or stop it, then run "
                "this again"
            ) from None
        except OSError:  # a file system without locks
            return descriptor
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(_holder()).encode())
    return descriptor


@contextlib.contextmanager
def _lease(storage: str, name: str, what: str) -> Iterator[None]:
    """A lock in a bucket. Whoever slept for longer than a lease lasts may find that another has begun the same work."""
    files, folder, holder = Storage(storage), f"locks/{name}", _holder()
    try:
        files.check_put_if_absent()
    except StoreError:
        yield
        return
    before = _last_lease(files, folder)
    while before and not _is_nobodys(files, f"{folder}/{before}.json", what):
        before = _last_lease(files, folder)
    path = f"{folder}/{before + 1}.json"
    if not files.put_if_absent(path, json.dumps(holder).encode()):
        raise _taken(files, path, what)
    ended = threading.Event()

    def renew() -> None:
        count = 0
        while not ended.wait(RENEW_SECONDS):
            count += 1
            with contextlib.suppress(StoreError):  # a request that fails is made again the next time
                files.write(path, json.dumps({**holder, "renewed": count}).encode())

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for number in range(max(1, before), before + 2):
            files.delete(f"{folder}/{number}.json")


def _last_lease(files: Storage, folder: str) -> int:
    names = [name.removesuffix(".json") for name in files.sizes(folder)]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _is_nobodys(files: Storage, path: str, what: str) -> bool:
    """Whether a lease was left behind, not given back. Raises StoreError once its holder is seen to be there."""
    try:
        first = files.read(path)
        say(f"{_told(first)} was {what}: checking for {LEASE_SECONDS:g} s whether it still is")
        begin = time.monotonic()
        while time.monotonic() - begin < LEASE_SECONDS:
            time.sleep(RENEW_SECONDS / 5)
            if files.read(path) != first:
                raise _taken(files, path, what)
    except FileNotFoundError:
        return False
    return True


def _taken(files: Storage, path: str, what: str) -> StoreError:
    holder = b""
    with contextlib.suppress(OSError):
        holder = files.read(path)
    return StoreError(
        f"{files.show('').rstrip('/')}: {_told(holder)} is already {what}; wait for it to end, or stop it, then run "
        "this again"
    )


def _holder() -> dict[str, str | int]:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _told(holder: bytes) -> str:
    try:
        table = json.loads(holder)
        return f"process {table['process']} on {table['host']}, running since {table['since']},"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not yet written who it is
