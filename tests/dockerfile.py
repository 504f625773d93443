"""The Dockerfile's steps carried out without Docker, in a chroot of a fresh Debian; needs root, debootstrap, network.

In the place of the base image stands the same release of Debian with its own Python. RUN, COPY, ARG, ENV, WORKDIR and
USER do what they say; pip's settings and the proxies' come from this process' environment.

    python tests/dockerfile.py [--arg TORCH_INDEX=https://pypi.org/simple] [--mount FOLDER] [--then COMMAND]
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED_ON = re.compile(r"PIP_\w+|(?i:https?|no)_(?i:proxy)|SSL_CERT_FILE")


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, comments left out, continued lines joined.

    >>> instructions("FROM a\\n# why\\nRUN b \\\\\\n    && c\\n")
    [('FROM', 'a'), ('RUN', 'b     && c')]
    """
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = lines.replace("\\\n", "").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined) if word]


def base_image(name: str, root: Path) -> None:
    """Debian and its Python, as the official image of Python would have them. Raises ValueError for another image."""
    found = re.fullmatch(r"python:(3\.\d+)-slim-(\w+)", name)
    if not found:
        raise ValueError(f"FROM {name} is not python:3.x-slim-<release of Debian>")
    wanted = "ca-certificates,python3,python3-dev,python3-pip"
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={wanted}", found[2], root], check=True)
    for name in ("resolv.conf", "hosts", "pip.conf", "ssl/certs/ca-certificates.crt"):
        if Path("/etc", name).exists():
            shutil.copy(Path("/etc", name), root / "etc" / name)
    (root / "usr" / "lib" / f"python{found[1]}" / "EXTERNALLY-MANAGED").unlink()
    (root / "usr" / "local" / "bin" / "python").symlink_to(f"/usr/bin/python{found[1]}")


def build(root: Path, given: dict[str, str], mounts: Sequence[str], then: Sequence[str]) -> None:
    """Carry out all steps, and then commands in what they made. Raises CalledProcessError where one fails."""
    user, folder = "root", "/"
    environment = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    environment |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    steps = instructions((ROOT / "Dockerfile").read_text())
    for word, rest in [*steps, *(("RUN", command) for command in then)]:
        begin = time.monotonic()
        if word == "FROM":
            base_image(rest, root)
        elif word == "ARG":
            name, _, value = rest.partition("=")
            environment[name] = given.get(name, value)
        elif word == "ENV":
            environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "WORKDIR":
            folder = rest
            (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            user, environment["HOME"] = rest, "/home/tipl"
        elif word == "COPY":
            *sources, target = shlex.split(rest)
            for source in sources:
                copy(ROOT / source, root / folder.lstrip("/") / target)
        elif word == "RUN":
            run(root, f"cd {folder} && {rest}", user, environment, mounts)
        else:
            raise ValueError(f"{word} is not known here")
        print(f"{time.monotonic() - begin:.0f} s: {word} {rest}", flush=True)


def copy(source: Path, target: Path) -> None:
    """A folder's content into the target, a file into it or under its name."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def run(root: Path, command: str, user: str, environment: dict[str, str], mounts: Sequence[str]) -> None:
    """One step's commands in the chroot, whose mounts go when they end."""
    make = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    for folder in mounts:
        inside = root / folder.lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        make.append(f"mount --bind {folder} {inside}")
    enter = f"exec chroot --userspec={user} {root} /bin/sh -c {shlex.quote(command)}"
    script = " && ".join([*make, enter])
    subprocess.run(["unshare", "--mount", "sh", "-c", script], env=environment, check=True)


def main() -> None:
    """Build, say what each step took, leave nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arg", action="append", default=[], help="NAME=VALUE of a build argument")
    parser.add_argument("--mount", action="append", default=[], help="a folder that pip's settings name")
    parser.add_argument("--then", action="append", default=[], help="a command in the finished image")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        build(Path(root), dict(one.split("=", 1) for one in arguments.arg), arguments.mount, arguments.then)


if __name__ == "__main__":
    main()
