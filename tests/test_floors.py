"""The house's picture, held: imports go strictly down, never sideways, and `ray` stays where it belongs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"config", "rows", "terminal"},
    {"storage", "compiler"},
    {
        "tasks",
        "policy",
        "trajectory_store",
        "placement",
        "locks",
        "temporal_svd",
        "gram",
        "model",
        "metrics",
        "tracking",
        "search_space",
        "resources",
    },
    {"data_sets", "environments", "learner", "segments", "forecasting", "jobs", "jumps"},
    {"ppo", "returns", "objectives", "contenders", "serving"},
    {"collection", "training", "evaluation", "figures", "report", "validation"},
    {"stages", "comparison"},
    {"acceleration", "sweep"},
]
RAY = {"jobs", "resources", "collection", "training", "evaluation", "acceleration", "sweep"}
MODULES = sorted(path.stem for path in (ROOT / "tipl_ray").glob("*.py") if path.stem != "__init__")


def imports_of(module: str) -> set[str]:
    """Dotted names that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / "tipl_ray" / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(module: str) -> int:
    return next(floor for floor, modules in enumerate(FLOORS) if module in modules)


def test_every_module_has_its_floor() -> None:
    assert sorted(set().union(*FLOORS)) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_down(module: str) -> None:
    own = {name.split(".")[1] for name in imports_of(module) if name.startswith("tipl_ray.")}
    assert all(floor_of(name) < floor_of(module) for name in own), own


@pytest.mark.parametrize("module", MODULES)
def test_ray_is_imported_on_the_upper_floors_alone(module: str) -> None:
    imports_ray = any(name.split(".")[0] == "ray" for name in imports_of(module))
    assert imports_ray == (module in RAY)


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
