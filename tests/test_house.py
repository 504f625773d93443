"""The tree of docs/house.md held to the files line by line, and the examples in docstrings."""

import doctest
import fnmatch
import functools
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tipl_ray", "jobs", "examples", "cluster", "docs", "benchmarks", "tests", ".ci")
TREE = (ROOT / "docs" / "house.md").read_text().split("## The tree", 1)[1].split("```")[1].splitlines()[1:]
WITH_EXAMPLES = sorted(path for path in (ROOT / "tipl_ray").rglob("*.py") if ">>> " in path.read_text())


@functools.cache
def files() -> tuple[str, ...]:
    """Every file of the house but the folders' `__init__.py`, for which the folder's line speaks."""
    ignored = (ROOT / ".gitignore").read_text().split()
    paths = [path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name not in ignored]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return tuple(str(path.relative_to(ROOT)) for path in paths if path.is_file() and path.name != "__init__.py")


def complaints(tree: list[str]) -> list[str]:
    """What is wrong with a tree: `name   description`, a folder's name with a slash, what is in it two spaces further.

    A name may be a pattern, for files that are all of one kind. Each file has one line, and each line a file.
    """
    wrong, folders, lines = [], [""], Counter(dict.fromkeys(files(), 0))
    for line in tree:
        match = re.fullmatch(r"((?:  )*)(\S+?)(/?) {2,}\S.*", line)
        depth = len(match[1]) // 2 if match else 0
        if not match or depth >= len(folders):
            wrong.append(f"{line!r}: no name and description, or in no folder")
            continue
        path = f"{folders[depth]}{match[2]}{match[3]}"
        folders[depth + 1 :] = [path] if match[3] else []
        if match[3]:
            named = [path] if any(name.startswith(path) for name in files()) else []
        else:
            named = fnmatch.filter(files(), path) if "*" in path else [path] if path in files() else []
        lines.update(named)
        if not named:
            wrong.append(f"{path}: is not there")
    return wrong + [f"{name}: has {count} lines" for name, count in lines.items() if count != 1]


def test_the_houses_tree_has_one_line_for_each_file_and_no_other() -> None:
    assert complaints(TREE) == []


def test_a_tree_is_wrong_that_lacks_any_one_line_has_one_twice_or_undescribed_or_one_of_no_file() -> None:
    assert len(TREE) > len(FOLDERS)
    for index, line in enumerate(TREE):
        before, after = TREE[:index], TREE[index + 1 :]
        indent, name = re.findall(r"^( *)(\S+)", line)[0]
        assert complaints([*before, *after]), f"without {line!r}"
        assert complaints([*before, line, line, *after]), f"{line!r} twice"
        assert complaints([*before, f"{indent}{name}", *after]), f"{line!r} without a description"
        assert complaints([*before, f"{indent}no_such_file.py   a file", line, *after]), (
            f"a line of no file above {line!r}"
        )


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings_hold(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("name", [path.name for path in (ROOT / "jobs").glob("*.py")])
def test_a_jobs_description_names_files_that_are_there(name: str) -> None:
    named = set(
        re.findall(
            r"(?<![\w/])(?:jobs|benchmarks|docs|examples|cluster)/[\w/]+\.\w+", (ROOT / "jobs" / name).read_text()
        )
    )
    assert named
    assert {file for file in named if not (ROOT / file).exists()} == set()
