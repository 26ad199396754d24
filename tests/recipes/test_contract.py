"""Every folder under recipes/ is a complete recipe."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import vi_toolkit as vi
from recipes.__main__ import reference_problem
from tests.recipes.checks import check_latents
from vi_toolkit.programs.joint import Joint

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    path.name for path in (ROOT / "recipes").iterdir() if path.is_dir() and path.name[0] not in "._"
)

every_recipe = pytest.mark.parametrize("name", NAMES)


def load(name):
    return importlib.import_module(f"recipes.{name}")


def test_there_are_recipes():
    assert NAMES


@every_recipe
def test_has_every_part(name):
    folder = ROOT / "recipes" / name
    for part in ("__init__.py", "model.py", "guide.py", "data.py", "reference.json"):
        assert (folder / part).is_file(), f"recipes/{name} lacks {part}"
    assert list((ROOT / "notebooks").glob(f"*[0-9]_{name}.ipynb")), f"no notebook for {name}"
    assert (ROOT / "tests" / "recipes" / f"test_{name}.py").is_file(), f"no test for {name}"


@every_recipe
def test_readme_has_a_row_with_a_picture(name):
    rows = [
        line
        for line in (ROOT / "README.md").read_text("utf-8").splitlines()
        if line.startswith("|") and f"recipes/{name}" in line
    ]
    assert rows, f"README.md has no table row that links to recipes/{name}"
    picture = re.search(r'!\[[^]]*\]\(([^) ]+)|<img [^>]*src="([^"]+)"', rows[0])
    assert picture, f"the README row of {name} has no picture"
    assert (ROOT / (picture[1] or picture[2])).is_file(), f"{picture[0]} is not there"


@every_recipe
def test_exports(name):
    recipe = load(name)
    assert recipe.__doc__, "the package docstring gives the model, its source and its data"
    for exported in ("model", "LATENTS", "guide", "GUIDES", "load_data", "coords", "simulate"):
        assert hasattr(recipe, exported), f"recipes.{name} does not export {exported}"
    assert next(iter(recipe.GUIDES.values())) is recipe.guide, "the recommended guide comes first"


@every_recipe
def test_model_can_be_copied_out_alone(name):
    source = (ROOT / "recipes" / name / "model.py").read_text("utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").partition(".")[0])
    assert imported <= {"torch", "pyro"}


@every_recipe
def test_data_are_the_models_arguments(name):
    recipe = load(name)
    parameters = inspect.signature(recipe.model).parameters
    data = recipe.load_data()
    assert set(data) <= set(parameters)
    for key, value in data.items():
        assert not isinstance(value, torch.Tensor) or value.isfinite().all(), f"{key} is not finite"
    observed = [key for key in data if parameters[key].default is None]
    assert observed, "the observed argument defaults to None, so that the model can also simulate"
    required = {key for key, value in parameters.items() if value.default is value.empty}
    assert required <= set(data)


@every_recipe
def test_latents_match_a_trace_of_the_model(name):
    recipe = load(name)
    check_latents(recipe.model, recipe.LATENTS, recipe.load_data(), recipe.coords())


def toy(y, inside=False, predictors=2):
    if not inside:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("beta", dist.Normal(0.0, 1.0).expand([predictors]).to_event(1))
    with pyro.plate("observations", len(y)):
        if inside:
            pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def test_latents_check_fires():
    latents, labels = {"mu": (), "beta": ("predictors",)}, {"predictors": ["a", "b"]}
    data = {"y": torch.zeros(5)}
    check_latents(toy, latents, data, labels)
    with pytest.raises(AssertionError, match="mu is sampled inside plate 'observations'"):
        check_latents(toy, latents, data | {"inside": True}, labels)
    with pytest.raises(AssertionError, match="not one label per predictors"):
        check_latents(toy, latents, data | {"predictors": 3}, labels)
    with pytest.raises(AssertionError, match="its shape is"):
        check_latents(toy, latents | {"beta": ()}, data, labels)
    with pytest.raises(AssertionError):
        check_latents(toy, {"mu": ()}, data, labels)


@every_recipe
def test_simulate_draws_from_the_model(name):
    recipe = load(name)
    data, truth = recipe.simulate(seed=1)
    assert set(data) == set(recipe.load_data())
    assert set(recipe.LATENTS) <= set(truth)
    again, other = recipe.simulate(seed=1)[0], recipe.simulate(seed=2)[0]
    tensors = [key for key, value in data.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(data[key], again[key]) for key in tensors)
    assert any(not torch.equal(data[key], other[key]) for key in tensors)


@every_recipe
def test_reference_is_of_this_model(name):
    recipe = load(name)
    reference = vi.Reference.load(ROOT / "recipes" / name / "reference.json")
    model, _, data = reference_problem(recipe)
    assert list(reference.names) == Joint(model, data).names
    assert (reference.sd > 0).all()
