"""The structure of the code: layers, cycles, sizes of files, and who may use what is private.

Everything is read from the source, so imports under ``TYPE_CHECKING`` and inside functions count.
Each rule is a function from the root of a source tree to a list of sentences, one for each place
that breaks it. It is applied to this repository and to small trees that break it on purpose.
"""

import ast
import json
from collections import defaultdict, deque
from pathlib import Path

import pytest

from tests.source import PACKAGES, code_cells, files, imports, private_uses

ROOT = Path(__file__).parents[1]
MOST_LINES = 450

# From lowest to highest. Imports go down, or sideways within a layer. "vi_toolkit" alone is its
# __init__.py; the other names stand for a module or for a package with all that is in it.
LAYERS = [
    [
        "vi_toolkit.errors",
        "vi_toolkit.torch_private",
        "vi_toolkit.pyro_private",
        "vi_toolkit.arviz_adapter",
        "vi_toolkit.version",
        "vi_toolkit.figures",
        "vi_toolkit.look",
    ],
    ["vi_toolkit.programs"],
    ["vi_toolkit.fit_protocol"],
    [
        "vi_toolkit.estimators",
        "vi_toolkit.guides",
        "vi_toolkit.preflight",
        "vi_toolkit.compiled",
    ],
    ["vi_toolkit.machine_code"],
    [
        "vi_toolkit.deterministic",
        "vi_toolkit.stochastic",
        "vi_toolkit.conjugate",
        "vi_toolkit.reference",
    ],
    [
        "vi_toolkit.choice",
        "vi_toolkit.storage",
        "vi_toolkit.export",
        "vi_toolkit.fit_figure",
        "vi_toolkit.agreement",
    ],
    ["vi_toolkit.result"],
    ["vi_toolkit.fitting"],
    ["vi_toolkit.comparison", "vi_toolkit.diagnostics"],
    ["vi_toolkit"],
    ["recipes"],
    ["tests", "benchmarks"],
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
# The one file in which private names of a library may be used.
HOME_OF_PRIVATE = {
    "torch": "vi_toolkit/torch_private.py",
    "pyro": "vi_toolkit/pyro_private.py",
}


def place(module: str) -> str:
    """The name that stands for a module in ``LAYERS``, if it has a layer."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "vi_toolkit" else parts[0]


# ------------------------------------------------------------------ the rules


def shortest_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """The modules of a shortest cycle, each importing the next and the last the first."""
    best = None
    for start in sorted(graph):
        before, queue = {start: start}, deque([start])
        while queue:
            module = queue.popleft()
            for target in sorted(graph[module] - before.keys()):
                before[target] = module
                queue.append(target)
            if start in graph[module]:
                cycle = [module]
                while cycle[-1] != start:
                    cycle.append(before[cycle[-1]])
                if best is None or len(cycle) < len(best):
                    best = cycle[::-1]
                break
    return best


def cycles(root: Path) -> list[str]:
    """Cycles of imports, the shortest first, no two of them with an import in common."""
    edges = {(i.file.module, i.target): i for i in reversed(imports(root))}
    graph: dict[str, set[str]] = defaultdict(set)
    for importer, target in edges:
        graph[importer].add(target)
        graph[target]
    found = []
    while cycle := shortest_cycle(graph):
        links = list(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        found.append(f"A cycle of {len(cycle)} files: " + "; ".join(str(edges[x]) for x in links))
        for importer, target in links:
            graph[importer].remove(target)
    return found


def upward_imports(root: Path) -> list[str]:
    """Imports of something in a higher layer."""
    found = {}
    for each in imports(root):
        importer, target = place(each.file.module), place(each.target)
        if HEIGHT.get(importer, len(LAYERS)) < HEIGHT.get(target, -1):
            sentence = f"{each}: {target} is in a higher layer than {importer}"
            found.setdefault((each.file.path, each.line, target), sentence)
    return list(found.values())


def without_layer(root: Path) -> list[str]:
    return [
        f"{file.path} has no layer: add {place(file.module)} to LAYERS"
        for file in files(root, *PACKAGES)
        if place(file.module) not in HEIGHT
    ]


def too_long(root: Path) -> list[str]:
    found = files(root, "vi_toolkit", "recipes", "tests")
    lengths = {file.path: len(file.text.splitlines()) for file in found}
    return [
        f"{path} has {length} lines; a file has at most {MOST_LINES}"
        for path, length in lengths.items()
        if length > MOST_LINES
    ]


def private_members(root: Path) -> list[str]:
    """Uses of what another module, torch or Pyro keeps private."""
    found = []
    read = files(root, "vi_toolkit", "recipes", "benchmarks")
    trees = [(file.path, f"{file.path}:", file.tree) for file in read]
    for path, label, tree in [*trees, *(("", *cell) for cell in code_cells(root))]:
        for line, code, library in private_uses(tree):
            home = HOME_OF_PRIVATE.get(library)
            if path in HOME_OF_PRIVATE.values() and home in (path, None):
                continue  # a library's own objects do not say where they come from
            remedy = f"only {home} may use it" if home else "another module keeps it private"
            found.append(f"{label}{line} uses {code}: {remedy}")
    return found


def untyped_fits(root: Path) -> list[str]:
    """Parameters and variables named ``fit`` that may be anything."""
    found = []
    for file in files(root, "vi_toolkit", "recipes"):
        for node in ast.walk(file.tree):
            named = isinstance(node, ast.arg) and node.arg == "fit"
            named |= isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "fit"
            if named and node.annotation is not None:
                annotation = ast.unparse(node.annotation).strip("'\"")
                if annotation in ("Any", "typing.Any"):
                    found.append(f"{file.path}:{node.lineno} has fit: Any; use a Protocol")
    return found


def imports_between_tests(root: Path) -> list[str]:
    def is_test(module: str) -> bool:
        return module.startswith("tests.") and module.rpartition(".")[2].startswith("test_")

    return [
        f"{each}: shared models and helpers belong in files of their own"
        for each in imports(root)
        if is_test(each.file.module) and is_test(each.target)
    ]


# ------------------------------------------------------------------ this repository

RULES = [
    cycles,
    upward_imports,
    without_layer,
    too_long,
    private_members,
    untyped_fits,
    imports_between_tests,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule):
    problems = rule(ROOT)
    assert not problems, f"{len(problems)} times:\n" + "\n".join(problems)


# ------------------------------------------------------------------ trees that break a rule


def tree(root: Path, **texts: str) -> Path:
    """A source tree; ``vi_toolkit__errors`` is ``vi_toolkit/errors.py``."""
    for name, text in texts.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in {path.parent for path in root.rglob("*.py")} - {root}:
        (folder / "__init__.py").touch()
    return root


GUARDED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {} import x\n"
LAZY = "def f():\n    from {} import x\n"


def test_a_tree_without_faults_passes(tmp_path):
    tree(
        tmp_path,
        vi_toolkit__errors="class VIError(Exception): ...\n",
        vi_toolkit__programs__joint="from vi_toolkit.errors import VIError\n",
        vi_toolkit__programs__noise=LAZY.format("vi_toolkit.programs.joint"),
        vi_toolkit__fitting="from vi_toolkit.programs import joint, noise\n",
        recipes__a__model="import vi_toolkit as vi\nfrom recipes.a import data\n",
        tests__test_a="from recipes.a import model\n",
    )
    (tmp_path / "vi_toolkit" / "__init__.py").write_text("from vi_toolkit.fitting import fit\n")
    assert [rule(tmp_path) for rule in RULES] == [[]] * len(RULES)


@pytest.mark.parametrize("text", [GUARDED, LAZY, "import {}\n"])
def test_a_cycle_is_found(tmp_path, text):
    tree(
        tmp_path,
        vi_toolkit__programs__a="from vi_toolkit.programs import b\n",
        vi_toolkit__programs__b=text.format("vi_toolkit.programs.a"),
    )
    (found,) = cycles(tmp_path)
    assert "vi_toolkit/programs/a.py:1 imports vi_toolkit.programs.b" in found
    assert f"vi_toolkit/programs/b.py:{text.count(chr(10))} imports vi_toolkit.programs.a" in found


def test_a_cycle_through_a_package_is_found(tmp_path):
    """b is imported by its package, which a's import of c runs first."""
    tree(
        tmp_path,
        vi_toolkit__programs__a="import vi_toolkit.estimators.c\n",
        vi_toolkit__estimators__b="from vi_toolkit.programs.a import x\n",
        vi_toolkit__estimators__c="",
    )
    assert cycles(tmp_path) == []
    (tmp_path / "vi_toolkit" / "estimators" / "__init__.py").write_text("from . import b\n")
    (found,) = cycles(tmp_path)
    assert "A cycle of 3 files" in found
    assert "vi_toolkit/estimators/__init__.py:1 imports vi_toolkit.estimators.b" in found


@pytest.mark.parametrize("text", [GUARDED, LAZY, "from {} import x\n", "import_module('{}')\n"])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("vi_toolkit.programs.a", "vi_toolkit.deterministic.b"),
        ("vi_toolkit.errors", "vi_toolkit.fitting"),
        ("vi_toolkit.diagnostics.a", "recipes.b"),
        ("recipes.a", "tests.b"),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path, text, low, high):
    tree(tmp_path, **{low.replace(".", "__"): text.format(high), high.replace(".", "__"): ""})
    (found,) = upward_imports(tmp_path)
    assert found.startswith(f"{low.replace('.', '/')}.py:{text.count(chr(10))} imports {high}")
    swapped = tmp_path / "swapped"
    tree(swapped, **{high.replace(".", "__"): text.format(low), low.replace(".", "__"): ""})
    assert upward_imports(swapped) == []


def test_the_public_package_is_above_its_modules(tmp_path):
    tree(tmp_path, vi_toolkit__fitting="import vi_toolkit as vi\n")
    (found,) = upward_imports(tmp_path)
    assert "vi_toolkit/fitting.py:1 imports vi_toolkit:" in found


def test_a_file_without_a_layer_is_found(tmp_path):
    tree(tmp_path, vi_toolkit__utilities__odds="", vi_toolkit__errors="")
    found = without_layer(tmp_path)
    assert "vi_toolkit/utilities/odds.py" in found[1] and "vi_toolkit.utilities" in found[1]
    assert len(found) == 2  # it, and the __init__.py beside it


@pytest.mark.parametrize("folder", ["vi_toolkit", "recipes", "tests"])
def test_a_file_that_is_too_long_is_found(tmp_path, folder):
    tree(tmp_path, **{f"{folder}__a": "\n" * (MOST_LINES + 1), f"{folder}__b": "\n" * MOST_LINES})
    assert too_long(tmp_path) == [f"{folder}/a.py has 451 lines; a file has at most 450"]


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("from vi_toolkit.errors import _y", "import of vi_toolkit.errors._y"),
        ("from vi_toolkit import errors\nerrors._y", "errors._y"),
        ("import vi_toolkit\nvi_toolkit.errors._y", "vi_toolkit.errors._y"),
        ("def f(fit):\n    fit._isolated()", "fit._isolated"),
        ("def f(fit):\n    fit._seed = 1", "fit._seed"),
        ("def f(fit):\n    return getattr(fit, '_seed', 0)", "fit._seed (by name)"),
        ("class A:\n    def f(self):\n        self.fit._seed", "self.fit._seed"),
        ("from torch._inductor import config", "import of torch._inductor.config"),
        ("import torch\ntorch._C.x", "only vi_toolkit/torch_private.py"),
        ("from pyro.poutine import runtime as r\nr._PYRO_STACK", "only vi_toolkit/pyro_private.py"),
    ],
)
@pytest.mark.parametrize("file", ["vi_toolkit__fitting", "recipes__a", "benchmarks__a"])
def test_use_of_a_private_member_is_found(tmp_path, file, code, named):
    tree(tmp_path, **{file: code})
    (found,) = private_members(tmp_path)
    assert named in found
    assert found.startswith(f"{file.replace('__', '/')}.py:{code.count(chr(10)) + 1} ")


def test_private_members_in_a_notebook_are_found(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["fit._seed"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "fit._seed"]},
    ]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "a.ipynb").write_text(json.dumps({"cells": cells}))
    (found,) = private_members(tmp_path)
    assert found.startswith("notebooks/a.ipynb, cell 2, line 2 uses fit._seed")


@pytest.mark.parametrize(
    "code",
    [
        "from __future__ import annotations\nx.__dict__",
        "class A:\n    def __init__(self):\n        self._x = 1\n    def same(self, o): o._x",
        "class A:\n    _x: int = 0\ndef f(a): return a._x",
        "class A(B):\n    def f(self): return self._x, super()._y()",
        "def f(pair): return pair._replace(a=1)",
    ],
)
def test_private_members_of_the_same_file_are_allowed(tmp_path, code):
    assert private_members(tree(tmp_path, vi_toolkit__fitting=code)) == []


def test_each_library_has_one_file_for_its_private_names(tmp_path):
    code = "import torch\nimport pyro\ntorch._C.x\npyro.poutine.runtime._PYRO_STACK\n"
    tree(tmp_path, vi_toolkit__torch_private=code, vi_toolkit__pyro_private=code)
    assert [found.split(" uses ")[0] for found in private_members(tmp_path)] == [
        "vi_toolkit/pyro_private.py:3",
        "vi_toolkit/torch_private.py:4",
    ]


@pytest.mark.parametrize("annotation", ["Any", "typing.Any", "'Any'"])
@pytest.mark.parametrize("code", ["def f(fit: {}): ...", "class A:\n    fit: {}"])
def test_a_fit_that_may_be_anything_is_found(tmp_path, code, annotation):
    tree(tmp_path, vi_toolkit__export=code.format(annotation))
    (found,) = untyped_fits(tmp_path)
    assert found.startswith(f"vi_toolkit/export.py:{code.count(chr(10)) + 1} ")
    assert untyped_fits(tree(tmp_path, vi_toolkit__export="def f(fit: Fitted, x: Any): ...")) == []


def test_a_test_that_imports_a_test_is_found(tmp_path):
    tree(tmp_path, tests__test_a="from tests.sub.test_b import x\n", tests__sub__test_b="")
    (found,) = imports_between_tests(tmp_path)
    assert found.startswith("tests/test_a.py:1 imports tests.sub.test_b")
    assert imports_between_tests(tree(tmp_path / "2", tests__test_a="import tests.models")) == []
