"""The README's picture of the house, held: every file is in it, and every command names files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_tree_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The house", 1)[1].split("```")[1]
    shown = [
        path
        for folder in ("tipl_ray", "jobs", "tests", "benchmarks", "cluster", "docs", "examples")
        for path in (ROOT / folder).glob("*.*")
    ]
    assert [path.name for path in shown if path.name not in tree and path.name != "__init__.py"] == []


@pytest.mark.parametrize("name", ["README.md", *(f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py"))])
def test_commands_name_files_that_are_there(name: str) -> None:
    named = set(
        re.findall(r"(?<![\w/])(?:jobs|benchmarks|docs|examples|cluster)/[\w/]+\.\w+", (ROOT / name).read_text())
    )
    assert {file for file in named if not (ROOT / file).exists()} == set()
