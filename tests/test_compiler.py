"""Compiled once, into a cache that may be anywhere, or cannot be written, or was damaged."""

import ctypes
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from tipl_ray.ppo.compiler import CompilerError, shared_library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
SOURCE = ("wrappers.cpp", "-ffp-contract=off")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of its own, and a folder for temporary files."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "home"


def test_it_is_built_once(home: Path) -> None:
    library = shared_library(*SOURCE)
    assert library.parent == home / ".cache" / "tipl_ray"
    before = library.stat().st_mtime_ns
    assert shared_library(*SOURCE) == library
    assert library.stat().st_mtime_ns == before
    assert [path.name for path in library.parent.iterdir()] == [library.name]


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_a_cache_variable_that_is_empty_or_relative_counts_as_unset(
    home: Path, monkeypatch: pytest.MonkeyPatch, value: str, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert shared_library(*SOURCE).parent == home / ".cache" / "tipl_ray"
    assert not (tmp_path / "relative").exists()


@pytest.mark.parametrize("unusable", ["/dev/null", "/proc/none", "", "file"])
def test_a_cache_that_cannot_be_written_gives_way_to_the_temporary_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, unusable: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    if unusable:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / unusable))
    else:
        monkeypatch.setenv("HOME", "/dev/null")
    library = shared_library(*SOURCE)
    assert library.parent == tmp_path / "tmp" / f"tipl_ray-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700


def test_where_nothing_can_be_written_the_places_and_the_way_out_are_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    (tmp_path / "tmp" / f"tipl_ray-{os.getuid()}").symlink_to("/")  # as another user could lay it
    with pytest.raises(CompilerError, match=re.escape("/dev/null/tipl_ray: Not a directory")) as caught:
        shared_library(*SOURCE)
    assert "set XDG_CACHE_HOME" in str(caught.value)
    assert "--collect.engine torch" in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "old"])
def test_a_library_that_is_not_whole_is_built_anew(home: Path, damage: str) -> None:
    library = shared_library(*SOURCE)
    content = library.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    library.unlink()  # this process has the file mapped
    library.write_bytes({"empty": b"", "half": content[:middle], "flipped": flipped, "old": content[:-32]}[damage])
    assert shared_library(*SOURCE) == library
    assert library.read_bytes() == content
    ctypes.CDLL(str(library))
