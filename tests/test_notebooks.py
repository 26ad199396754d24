"""Every notebook is committed with the output of a fresh run from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").rglob("[!.]*.ipynb"))
FOLDERS = "home|Users|root|tmp|work|mnt|var|opt|usr"
ABSOLUTE_PATH = re.compile(rf"(?<![\w./:-])(?:/(?:{FOLDERS})/|[A-Z]:\\)\S*")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_there_are_notebooks():
    assert PATHS


def test_the_numbers_of_the_notebooks_are_a_reading_path():
    numbers = [int(path.name.partition("_")[0]) for path in PATHS]
    assert numbers == list(range(1, len(PATHS) + 1))


def test_the_notebook_is_valid(notebook):
    nbformat.validate(notebook)


def test_the_notebook_ran_from_top_to_bottom_in_a_fresh_kernel(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_the_notebook_is_short(notebook):
    assert len(code_cells(notebook)) <= 15


def test_the_notebook_asserts_something(notebook):
    assert any(re.search(r"^\s*assert |assert_ok\(", c.source, re.M) for c in code_cells(notebook))


def test_the_notebook_shows_a_figure(notebook):
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_the_notebook_has_neither_errors_nor_warnings(notebook):
    for output in outputs(notebook):
        assert output.output_type != "error", output.get("evalue")
        assert output.get("name") != "stderr", output.get("text")


def test_the_notebook_has_no_absolute_path(notebook):
    text = [cell.source for cell in notebook.cells]
    for output in outputs(notebook):
        text.append(output.get("text", ""))
        text += [value for kind, value in output.get("data", {}).items() if "image" not in kind]
    assert not ABSOLUTE_PATH.findall("\n".join(map(str, text)))
