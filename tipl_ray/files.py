"""Whole small files in a folder or under a URI: they appear complete or not at all.

For what a stage leaves once (models, tables, reports); the trajectory store has its own, stricter way.
"""

from pathlib import Path

import pyarrow.fs


def write_file(folder: str, name: str, content: bytes) -> None:
    """Put a file into a folder, which is made where it is missing."""
    filesystem, path = _locate(folder)
    filesystem.create_dir(path, recursive=True)
    with filesystem.open_output_stream(f"{path}/{name}.tmp") as stream:
        stream.write(content)
    filesystem.move(f"{path}/{name}.tmp", f"{path}/{name}")


def read_file(folder: str, name: str) -> bytes:
    """Content of a file. Raises FileNotFoundError."""
    filesystem, path = _locate(folder)
    with filesystem.open_input_stream(f"{path}/{name}", compression=None) as stream:
        return stream.read()


def file_exists(folder: str, name: str) -> bool:
    """Whether there is such a file."""
    filesystem, path = _locate(folder)
    return filesystem.get_file_info(f"{path}/{name}").type == pyarrow.fs.FileType.File


def local_path(folder: str) -> Path | None:
    """The folder on this machine's own file system, or None where it is elsewhere."""
    filesystem, path = _locate(folder)
    return Path(path) if isinstance(filesystem, pyarrow.fs.LocalFileSystem) else None


def _locate(folder: str) -> tuple[pyarrow.fs.FileSystem, str]:
    return pyarrow.fs.FileSystem.from_uri(folder if "://" in folder else str(Path(folder).absolute()))
