"""C++ sources of this package, compiled for the machine at hand, once, into the user's cache.

Where the cache cannot be written, or nothing in it be loaded, a folder of the user's own among the temporary ones takes
its place.
"""

import contextlib
import ctypes
import hashlib
import os
import pwd
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tipl_ray.errors import UserError

CONVENTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


class CompilerError(UserError):
    """A source cannot be compiled, or its library cannot be stored; the message has the places tried and the fix."""


def shared_library(source: str, *options: str, march: str = "native") -> Path:
    """The library built from a source of this package. Raises CompilerError with the reason if that fails."""
    path = Path(__file__).with_name(source)
    command = ["g++", *CONVENTIONS, f"-march={march}", *options]
    # What `native` means is the processor's affair: a cache on a shared home must tell machines apart.
    # Not --help=target, whose answer names temporary files: no two are alike.
    asked = ["g++", f"-march={march}", "-E", "-v", "-x", "c++", os.devnull]
    target = subprocess.run(asked, capture_output=True, check=False)
    fingerprint = hashlib.sha256(path.read_bytes() + repr(command).encode() + target.stdout + target.stderr).hexdigest()
    name, refusals = f"{path.stem}-{fingerprint[:24]}.so", []
    for cache in _caches():
        try:
            if not _is_whole(cache / name):
                _build([*command, str(path)], cache / name)
            ctypes.CDLL(str(cache / name))  # a file system may forbid what it holds to be run
            return cache / name
        except OSError as error:
            refusals.append(f"{cache}: {error.strerror or error}")
    raise CompilerError(
        f"{source} cannot be compiled and cached ({'; '.join(refusals)}): set XDG_CACHE_HOME to a writable folder, or "
        "use --collect.engine torch"
    )


def _caches() -> Iterator[Path]:
    """Folders for libraries, in the order in which they are tried."""
    # The convention: a variable that is empty or relative counts as not set.
    for folder in (Path(os.environ.get("XDG_CACHE_HOME", "")), _home() / ".cache"):
        if folder.is_absolute():
            yield folder / "tipl_ray"
            break
    with contextlib.suppress(OSError):
        mine = Path(tempfile.gettempdir()) / f"tipl_ray-{os.getuid()}"
        mine.mkdir(mode=0o700, exist_ok=True)
        found = mine.lstat()
        # What is loaded is run, and anyone may make a folder of this name.
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            yield mine


def _home() -> Path:
    try:
        return Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a container's user that has no name
        return Path()


def _build(command: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        result = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=False)
        if result.returncode:
            raise OSError(f"g++ ended with status {result.returncode}: {' '.join(result.stderr.split())}")
        content = built.read_bytes()
        # The loader reads what its tables name, and minds nothing behind that.
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.replace(library)


def _is_whole(library: Path) -> bool:
    """Whether a library exists and is complete: loading half of one ends the process."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]
