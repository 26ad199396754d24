"""Private names of Pyro: one file uses them, and says so in a sentence if one of them is gone."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.infer.util
import pyro.util
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam

from vi_toolkit import pyro_private
from vi_toolkit.errors import CompileError, PrivateNameError

ROOT = Path(__file__).parents[2]


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.fixture(autouse=True)
def look_again():
    """Look for every name again in each test, and after it."""
    probes = [f for f in vars(pyro_private).values() if hasattr(f, "cache_clear")]
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


# --- a name that is gone --------------------------------------------------------------------------


def check_sentence(text, name, lost):
    assert f"Pyro {pyro.__version__} has no {name}" in text
    assert f"written for Pyro {pyro_private.WRITTEN_FOR}" in text
    assert lost in text


class SlottedStore:
    """A parameter store with no dictionary of attributes."""

    __slots__ = ("params",)

    def __init__(self):
        self.params = {}

    def __setitem__(self, name, value):
        self.params[name] = value

    def __contains__(self, name):
        return name in self.params


class StoreElsewhere(SlottedStore):
    """A parameter store that keeps its parameters outside of its attributes."""

    __slots__ = ("__dict__",)


@pytest.mark.parametrize("store", [SlottedStore, StoreElsewhere])
def test_a_parameter_store_of_another_make_is_noticed(monkeypatch, store):
    monkeypatch.setattr(pyro_private, "ParamStoreDict", store)
    with (
        pytest.raises(PrivateNameError) as caught,
        pyro_private.global_store_as(pyro.get_param_store()),
    ):
        pass
    check_sentence(str(caught.value), "ParamStoreDict", "nothing can be fitted")


def test_a_module_without_its_constraints_is_noticed():
    module = PyroModule()
    del vars(module)["_pyro_params"]
    with pytest.raises(PrivateNameError) as caught:
        pyro_private.unconstrained_parameter(module, "scale")
    check_sentence(str(caught.value), "PyroModule._pyro_params", "deterministic fits")


def test_an_autoguide_that_keeps_its_model_elsewhere_is_noticed():
    guide = AutoNormal(model)
    del vars(guide)["_model"]
    with pytest.raises(PrivateNameError) as caught:
        pyro_private.set_model(guide, model)
    check_sentence(str(caught.value), "AutoGuide._model", "cannot be copied")


def test_a_masked_distribution_without_its_mask_is_noticed():
    fn = dist.Normal(0.0, 1.0).mask(torch.tensor(True))
    del fn._mask
    with pytest.raises(PrivateNameError) as caught:
        pyro_private.mask_of(fn)
    check_sentence(str(caught.value), "MaskedDistribution._mask", "masked observations")


def test_handlers_that_wrap_in_another_way_are_noticed(monkeypatch):
    def wrapped(self, fn):
        return functools.partial(self.run, fn)

    monkeypatch.setattr(poutine.messenger.Messenger, "__call__", wrapped)
    monkeypatch.setattr(poutine.messenger.Messenger, "run", print, raising=False)
    fn = poutine.messenger.Messenger()(model)
    with pytest.warns(UserWarning, match="taken apart") as caught:
        assert pyro_private.outer_handler(fn) == (None, fn)
    check_sentence(str(caught[0].message), "effect handlers", "are not checked")
    assert pyro_private.unwrap(fn) is fn  # without a second warning


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (pyro.infer.util, "torch_item"),
        (pyro.infer.util, "Dice"),
        (pyro.infer.util, "_fulldot"),
        (pyro.util, "torch_isnan"),
        (pyro.util, "torch_isinf"),
        (pyro.util, "warn_if_nan"),
        (pyro.util, "warn_if_inf"),
    ],
)
def test_a_reader_of_values_that_is_gone_is_noticed(monkeypatch, module, name):
    monkeypatch.delattr(module, name)
    with pytest.raises(CompileError) as caught:
        pyro_private.value_readers()
    check_sentence(str(caught.value), f"{module.__name__}.{name}", "cannot be compiled")


# --- what the functions do ------------------------------------------------------------------------


def test_stores_are_lent_and_given_back():
    theirs = pyro.param("theirs", torch.tensor(2.0), constraint=constraints.positive)
    outer, inner = (pyro.params.param_store.ParamStoreDict() for _ in range(2))
    with pyro_private.global_store_as(outer):
        assert "theirs" not in pyro.get_param_store()
        pyro.param("a", torch.tensor(1.0))
        assert list(outer.keys()) == ["a"]
        with pyro_private.global_store_as(inner):
            pyro.param("b", torch.tensor(1.0))
        with pyro_private.global_store_as(outer):
            pyro.param("c", torch.tensor(1.0))
        assert list(pyro.get_param_store().keys()) == ["a", "c"]
        pyro.clear_param_store()
        pyro.param("d", torch.tensor(1.0))
    assert list(outer.keys()) == ["d"]
    assert list(inner.keys()) == ["b"]
    with pytest.raises(KeyError, match="stop"), pyro_private.global_store_as(inner):
        raise KeyError("stop")
    assert list(pyro.get_param_store().keys()) == ["theirs"]
    assert theirs.unconstrained().item() == pytest.approx(0.6931, abs=1e-4)


def test_the_public_way_to_change_stores_would_cut_the_callers_links():
    """Or `global_store_as` could use it."""
    theirs = pyro.param("theirs", torch.tensor(2.0))
    with pyro.get_param_store().scope():
        pass
    assert not hasattr(theirs, "unconstrained")


def test_parameters_of_nested_modules_are_found():
    module = PyroModule()
    module.inner = PyroModule()
    module.inner.scale = PyroParam(torch.tensor(1.0), constraints.positive)
    module.inner.loc = torch.nn.Parameter(torch.tensor(3.0))
    leaf, constraint = pyro_private.unconstrained_parameter(module, "inner.scale")
    assert constraint is constraints.positive
    with torch.no_grad():
        leaf.fill_(1.0)
    assert module.inner.scale.item() == pytest.approx(2.71828, abs=1e-4)
    leaf, constraint = pyro_private.unconstrained_parameter(module, "inner.loc")
    assert leaf is module.inner.loc
    assert constraint is constraints.real


def test_only_handlers_are_unwrapped():
    partial = functools.partial(model, 1, 2)
    handler = poutine.block(poutine.scale(partial, scale=2.0), hide=["z"])
    assert pyro_private.outer_handler(partial) == (None, partial)
    assert pyro_private.unwrap(handler) is partial
    assert pyro_private.unwrap(model) is model


@pytest.mark.parametrize("mask", [True, False, torch.tensor([True, False])])
def test_the_mask_is_the_one_given(mask):
    fn = dist.Normal(torch.zeros(2), 1.0).mask(mask)
    assert torch.equal(torch.as_tensor(pyro_private.mask_of(fn)), torch.as_tensor(mask))


# --- the source -----------------------------------------------------------------------------------

MEMBERS = re.compile(r"(?:\bdef |\bclass |\bself\.|^ *)(_(?!_)\w+)", re.MULTILINE)
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}
OWN = {"self", "cls"}


def private_names(package):
    """Private attributes, methods, functions and classes in the source of a package."""
    files = Path(package.__file__).parent.rglob("*.py")
    return {name for path in files for name in MEMBERS.findall(path.read_text("utf-8"))}


def defined(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in OWN:
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return found


def uses(tree):
    """(line, owner, name) of every member that is used, and of every name imported from Pyro."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                yield node.lineno, ast.unparse(node.args[0]), node.args[1].value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pyro":
            for alias in node.names:
                yield node.lineno, node.module, alias.name


def violations(trees, names):
    """Uses of these names, unless the file defines them or, on self, any file does."""
    ours = {path: defined(tree) for path, tree in trees.items()}
    anywhere = set().union(*ours.values())
    return [
        f"{path}:{line}: {owner}.{name}"
        for path, tree in trees.items()
        for line, owner, name in uses(tree)
        if name in names and name not in (anywhere if owner in OWN else ours[path])
    ]


@functools.cache
def names_of_pyro():
    # torch.distributions, which Pyro subclasses, has a file of its own for such names.
    return private_names(pyro) - private_names(torch.distributions)


def test_pyro_has_the_names_that_the_file_uses():
    assert {"_pyro_params", "_model", "_mask", "_fulldot"} <= names_of_pyro()


def test_private_names_of_pyro_are_used_in_one_file_only():
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8"))
        for folder in ("vi_toolkit", "recipes")
        for path in (ROOT / folder).rglob("*.py")
    }
    del trees["vi_toolkit/pyro_private.py"]
    assert violations(trees, names_of_pyro()) == []


@pytest.mark.parametrize(
    "code",
    [
        "guide._model = None",
        "self._pyro_params",
        "getattr(fn, '_mask', None)",
        "from pyro.infer.util import _fulldot",
        "super()._get_traces()",
    ],
)
def test_a_use_elsewhere_is_found(code):
    assert len(violations({"a.py": ast.parse(code)}, names_of_pyro())) == 1


def test_importing_the_package_leaves_torch_and_pyro_as_they_were():
    code = """
import warnings
import arviz, pyro, torch
from torch.distributions import Distribution

def state():
    return [
        pyro.settings.get(), list(pyro.get_param_store()), Distribution._validate_args,
        list(pyro.poutine.runtime._PYRO_STACK), torch.get_default_dtype(),
        torch.get_num_threads(), torch.get_rng_state().tolist(), list(warnings.filters),
    ]

before = state()
import vi_toolkit
assert state() == before
assert not vi_toolkit.pyro_private.value_readers.cache_info().currsize
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
