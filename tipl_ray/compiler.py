"""C++ sources of this package, compiled for the machine at hand, once, into the user's cache."""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

CONVENTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def shared_library(source: str, *options: str, march: str = "native") -> Path:
    """The library built from a source of this package. Raises RuntimeError with the compiler's words if it fails."""
    path = Path(__file__).with_name(source)
    command = ["g++", *CONVENTIONS, f"-march={march}", *options]
    # What `native` means is the processor's affair: a cache on a shared home must tell machines apart.
    # Not --help=target, whose answer names temporary files: no two are alike.
    asked = ["g++", f"-march={march}", "-E", "-v", "-x", "c++", os.devnull]
    target = subprocess.run(asked, capture_output=True, check=False)
    fingerprint = hashlib.sha256(path.read_bytes() + repr(command).encode() + target.stdout + target.stderr).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tipl_ray"
    library = cache / f"{path.stem}-{fingerprint[:24]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            result = subprocess.run(
                [*command, str(path), "-o", str(built)], capture_output=True, text=True, check=False
            )
            if result.returncode:
                raise RuntimeError(f"g++ could not compile {source}: {result.stderr.strip()}")
            built.replace(library)
    return library
