"""`python -m recipes list | run | reference | new`."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import recipes.__main__ as command_line
import vi_toolkit as vi
from recipes import linear_regression

ROOT = Path(__file__).parents[2]


def invoke(*arguments):
    return CliRunner().invoke(command_line.app, [str(argument) for argument in arguments])


def test_list_names_every_recipe_with_one_line():
    result = invoke("list")
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert list(lines) == command_line.recipe_names()
    assert lines["linear_regression"] == linear_regression.__doc__.splitlines()[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "logistic_regresion"),
        ("run", "Logistic-Regression"),
        ("reference", "logistic_regresion"),
        ("new", "mine", "--like", "logistic_regresion"),
    ],
)
def test_unknown_recipe_suggests_the_nearest(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Did you mean 'logistic_regression'?" in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_unknown_recipe_near_to_none_shows_them_all():
    result = invoke("run", "zzz")
    assert result.exit_code == 2
    assert all(name in result.output for name in command_line.recipe_names())


def test_run_prints_the_verdict_and_writes_figures_and_fits(tmp_path):
    result = invoke("run", "linear_regression", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    reference = vi.Reference.load(ROOT / "recipes" / "linear_regression" / "reference.json")
    folder = tmp_path / "linear_regression"
    assert str(folder) in result.output
    assert (folder / "comparison.png").stat().st_size > 10_000
    for label, guide in linear_regression.GUIDES.items():
        file = folder / re.sub(r"\W", "_", label)
        assert file.with_suffix(".png").stat().st_size > 10_000
        table = pd.read_csv(file.with_suffix(".csv"), index_col=0)
        assert list(table.index) == reference.names
        fit = vi.load(file.with_suffix(".safetensors"), linear_regression.model, guide)
        comparison = vi.compare(fit, reference)
        assert f"Verdict: {comparison.verdict}." in result.output
        np.testing.assert_allclose(table["VI mean"], comparison.table["VI mean"])


def test_ctrl_c_ends_the_run(tmp_path, monkeypatch):
    """The second of three guides is interrupted: the first one's files stay, no third is fitted."""
    fit, fitted = vi.fit, []

    def interrupted_at_the_second(model, guide, data, **options):
        fitted.append(guide)
        result = fit(model, guide, data, progress=False, **options)
        result.interrupted = len(fitted) == 2
        return result

    monkeypatch.setattr(vi, "fit", interrupted_at_the_second)
    result = invoke("run", "linear_regression", "--output", tmp_path)
    first, second, _ = linear_regression.GUIDES
    assert result.exit_code == 130
    assert len(fitted) == 2
    assert result.stderr == f"Interrupted: nothing was written for the {second} guide.\n"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3
    assert {path.stem for path in written} == {re.sub(r"\W", "_", first)}


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is SIGINT there")
def test_ctrl_c_in_a_terminal(tmp_path):
    # The process signals itself when its first fit starts to optimise: no time left to chance.
    code = """
import os, signal
from recipes.__main__ import app
from vi_toolkit.deterministic import run

# A process that was started in the background ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
original = run.solve_rounds
def signalled(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return original(*arguments, **options)
run.solve_rounds = signalled
app(["run", "linear_regression", "--output", "."])
"""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    first, *others = linear_regression.GUIDES
    assert finished.returncode == 130, finished.stderr
    assert f"Interrupted: nothing was written for the {first} guide." in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not any(other in finished.stdout for other in others)
    assert not list(tmp_path.iterdir())


def test_run_without_a_reference_says_how_to_make_it(tmp_path, monkeypatch):
    (tmp_path / "linear_regression").mkdir()
    (tmp_path / "linear_regression" / "model.py").touch()
    monkeypatch.setattr(command_line, "RECIPES", tmp_path)
    result = invoke("run", "linear_regression", "--output", tmp_path)
    assert result.exit_code == 1
    assert "python -m recipes reference linear_regression" in result.output


def comparison_of(d):
    """A stand-in for a Comparison with d scalars whose mean error is their position / 100."""
    names = [f"coefficients[{i}]" for i in range(d)]
    table = pd.DataFrame(
        {
            "reference mean": np.arange(d) * 1000.0,
            "reference sd": 20.0,
            "VI mean": np.arange(d) * 1000.2,
            "VI sd": 20.0,
            "mean error": np.arange(d) / 100,
            "sd ratio": 1.0,
            "expected sd ratio": 1.0,
            "ok": True,
        },
        index=names,
    )
    return SimpleNamespace(
        table=table,
        verdict="trust",
        reasons=[f"the largest error is that of {names[-1]}"],
        reference=SimpleNamespace(kind="nuts"),
    )


def test_comparison_text_shows_the_worst_rows_with_their_labels():
    names = [f"predictor {i}" for i in range(40)]
    recipe = SimpleNamespace(
        LATENTS={"coefficients": ("predictors",)}, coords=lambda: {"predictors": names}
    )
    d = command_line.SHOWN_ROWS + 3
    text = command_line.comparison_text(comparison_of(d), recipe)
    assert "MCMC mean ± sd" in text
    assert "coefficients[predictor 2]" not in text
    assert "coefficients[predictor 3]" in text
    assert f"{command_line.SHOWN_ROWS} of {d}" in text
    assert f"the largest error is that of coefficients[predictor {d - 1}]" in text
    assert "Verdict: trust." in text
    whole = command_line.comparison_text(comparison_of(3), recipe)
    assert "coefficients[predictor 0]" in whole
    assert " of 3" not in whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("effects[1,0]", "effects[b, 0]"),
        ("log(rates[0])", "log(rates[a])"),
        ("effects[1]", "effects[1]"),  # a scalar of an unconstrained scale with fewer dimensions
        ("other[1] and mu", "other[1] and mu"),
    ],
)
def test_labelled(text, expected):
    recipe = SimpleNamespace(
        LATENTS={"effects": ("groups", 3), "rates": ("groups",), "mu": ()},
        coords=lambda: {"groups": ["a", "b"]},
    )
    assert command_line.labelled(text, recipe) == expected


def test_reference_makes_the_committed_file_again(tmp_path, monkeypatch):
    (tmp_path / "linear_regression").mkdir()
    (tmp_path / "linear_regression" / "model.py").touch()
    monkeypatch.setattr(command_line, "RECIPES", tmp_path)
    result = invoke("reference", "linear_regression")
    assert result.exit_code == 0, result.output
    made = vi.Reference.load(tmp_path / "linear_regression" / "reference.json")
    committed = vi.Reference.load(ROOT / "recipes" / "linear_regression" / "reference.json")
    assert made.names == committed.names
    np.testing.assert_allclose(made.mean, committed.mean, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(made.sd, committed.sd, rtol=1e-6)


def test_new_makes_a_recipe_that_passes_its_own_test(tmp_path):
    result = invoke("new", "my_model", "--like", "linear_regression", "--into", tmp_path)
    assert result.exit_code == 0, result.output
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "notebooks" / "01_my_model.ipynb" in made
    for path in made:
        if "my_model" in str(path):
            assert str(path) in result.output or path.parent.name == "my_model"
            assert "linear_regression" not in path.read_text("utf-8")

    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # where vi_toolkit is, if not installed
    for command in (
        ["pytest", "-q", "-p", "no:cacheprovider", "tests/recipes/test_my_model.py"],
        ["recipes", "list"],
    ):
        finished = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.split()[0] == "my_model"

    again = invoke("new", "my_model", "--like", "linear_regression", "--into", tmp_path)
    assert again.exit_code == 2
    assert "there already is" in again.output


@pytest.mark.parametrize("name", ["my-model", "2stage", "class", "../outside", ""])
def test_new_refuses_a_name_that_cannot_be_imported(name, tmp_path):
    result = invoke("new", name, "--like", "linear_regression", "--into", tmp_path)
    assert result.exit_code == 2
    assert "cannot be imported" in result.output
    assert not list(tmp_path.iterdir())


def test_new_refuses_a_name_that_is_taken():
    result = invoke("new", "logistic_regression", "--like", "linear_regression")
    assert result.exit_code == 2
    assert "there already is" in result.output


@pytest.mark.parametrize(
    ("text", "renamed"),
    [
        ("from recipes.mixture import model", "from recipes.mine import model"),
        ("from recipes import mixture", "from recipes import mine"),
        ("mixture.load_data()", "mine.load_data()"),
        ("tests/recipes/test_mixture.py", "tests/recipes/test_mine.py"),
        ("notebooks/07_mixture.ipynb", "notebooks/12_mine.ipynb"),
        ("from sklearn.mixture import BayesianGaussianMixture", None),
        ("mixture_weights, submixture", None),
    ],
)
def test_new_renames_the_recipe_and_nothing_else(text, renamed):
    rename = command_line.renamer("mixture", "mine", "07_mixture", "12_mine")
    assert rename(text) == (renamed or text)


def test_new_leaves_pictures_as_they_are():
    cell = {"source": ["ten"], "data": {"image/png": "ab/ten+cd", "text/plain": ["ten"]}}
    rename = command_line.renamer("ten", "eleven", "01_ten", "02_eleven")
    assert command_line.rename_notebook(cell, rename) == {
        "source": ["eleven"],
        "data": {"image/png": "ab/ten+cd", "text/plain": ["eleven"]},
    }
