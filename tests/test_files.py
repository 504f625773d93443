"""Small files in a folder or under a URI."""

from pathlib import Path

import pytest

from tipl_ray.files import file_exists, local_path, read_file, write_file


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_is_read_back_and_nothing_else_lies_there(tmp_path: Path, scheme: str) -> None:
    folder = f"{scheme}{tmp_path}/deep/er"
    assert not file_exists(folder, "a.bin")
    write_file(folder, "a.bin", b"\x00one")
    write_file(folder, "a.bin", b"two")
    assert read_file(folder, "a.bin") == b"two"
    assert file_exists(folder, "a.bin")
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["a.bin"]
    assert local_path(folder) == tmp_path / "deep" / "er"


def test_a_file_that_is_missing_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.bin"):
        read_file(str(tmp_path), "nothing.bin")
