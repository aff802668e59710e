"""The notebook of the quickstart: stripped in the repository, and run from its first cell to its last."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "notebooks" / "quickstart.ipynb"


def cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook, kind):
    """What the cells show of a kind, such as text/html."""
    return [output.data[kind] for cell in cells(notebook) for output in cell.outputs if kind in output.get("data", {})]


@pytest.fixture(scope="module")
def stored():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.fixture(scope="module")
def executed(stored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.from_dict(stored)
    # The tests run at "error", where Trainer shows no progress unless asked to.
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute(env=environment)
    return notebook, folder


def test_the_repository_has_no_output_of_it(stored):
    assert [cell.outputs for cell in cells(stored)] == [[]] * len(cells(stored))
    assert {cell.execution_count for cell in cells(stored)} == {None}
    assert all(cell.metadata == {} for cell in stored.cells)


def test_it_installs_first_and_has_about_ten_cells(stored):
    assert "%pip install" in cells(stored)[0].source
    assert len(cells(stored)) <= 10


@pytest.mark.slow
def test_it_runs_without_an_error(executed):
    notebook, _ = executed
    assert [output.ename for cell in cells(notebook) for output in cell.outputs if output.output_type == "error"] == []
    assert all(cell.execution_count for cell in cells(notebook))


@pytest.mark.slow
def test_its_progress_table_has_our_columns(executed):
    notebook, _ = executed
    tables = [re.findall(r"<th>(.*?)</th>", html) for html in outputs(notebook, "text/html")]
    ours = {"Loss Task", "Loss Kd", "Loss Hidden", "Kd", "Agreement", "Teacher Accuracy", "Retention Accuracy"}
    assert any({"Step", "Training Loss", "Validation Loss", *ours} <= {*table} for table in tables)


@pytest.mark.slow
def test_it_ends_with_a_report_its_plots_and_a_student_that_retains_what_counts(executed):
    notebook, folder = executed
    written = {path.name for path in (folder / "distilled" / "distillation").iterdir()}
    assert {"report.json", "report.md", "run.json", "losses.png", "tradeoff.png", "confusion.png"} <= written
    assert len(outputs(notebook, "image/png")) == len([name for name in written if name.endswith(".png")])
    assert "student, undistilled" in outputs(notebook, "text/markdown")[0]
    texts = outputs(notebook, "text/plain")
    assert float(re.search(r"'eval_retention_accuracy': ([\d.]+)", " ".join(texts))[1]) > 0.95
    assert "PlayMusic" in texts[-1]
