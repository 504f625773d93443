"""The notebook examples/your_own_run.ipynb, executed as a reader would, and what is kept of it."""

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks are executed by nbclient and ipykernel: make install")
nbclient = pytest.importorskip("nbclient", reason="notebooks are executed by nbclient and ipykernel: make install")
pytest.importorskip("ipykernel", reason="notebooks are executed by nbclient and ipykernel: make install")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "your_own_run.ipynb"


def pictures(notebook: Any) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_the_notebook_runs_from_its_first_cell_to_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
        skip_cells_with_tag="skip-execution",
    ).execute()
    assert len(pictures(notebook)) == 1
    assert "Can the next checkpoint be forecast?" in str(notebook.cells)
    assert (tmp_path / "storage" / "moons" / "trajectories").is_dir()


def test_the_notebook_is_short_and_small_and_installs_what_it_is_kept_with() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 10
    assert len(pictures(notebook)) == 1
    assert NOTEBOOK.stat().st_size < 200_000
    (skipped,) = (cell for cell in notebook.cells if "skip-execution" in cell.metadata.get("tags", []))
    assert skipped.source.startswith("%pip install")
    assert not re.search(r"/(tmp|home|root|work|Users)/", str(notebook))
    for cell in notebook.cells:
        for target in re.findall(r"\]\(([^)]+)\)", cell.source):
            assert (NOTEBOOK.parent / target).is_file(), target
