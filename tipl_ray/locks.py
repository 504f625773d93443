"""One driver at a time: a lock by name in a storage, which the kernel gives back however its holder ends.

Guards folders of this machine and of network file systems that know flock. In a bucket nothing is guarded: there the
trials' conditional commits alone keep two writers apart. Knows nothing of what is done under a lock.

    <storage>/locks/<name>.lock    who holds it, as JSON; gone when nobody does
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tipl_ray.storage import StoreError, local_folder


@contextlib.contextmanager
def only_one(storage: str, name: str, what: str) -> Iterator[None]:
    """Be the one process that does `what`, as in "training this model", in a storage, until the block is left.

    Raises StoreError where another process does it, with its host, number and time of start, and where the storage
    cannot be written. Without a lock where the file system has none.
    """
    folder = local_folder(storage)
    if folder is None:
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
                f"{path.parent.parent}: cannot be written: {error.strerror}. Give access or make room, or choose "
                "another --storage"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            raise StoreError(
                f"{path.parent.parent}: {_told(holder)} is already {what}; wait until it has ended, or end it, and run "
                "this again"
            ) from None
        except OSError:  # a file system without locks
            return descriptor
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    os.write(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}).encode())
    return descriptor


def _told(holder: bytes) -> str:
    try:
        table = json.loads(holder)
        return f"process {table['process']} on {table['host']}, running since {table['since']},"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not yet written who it is
