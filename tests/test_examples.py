"""Every example in a docstring or in the README runs as it stands."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("vi_toolkit", "recipes")
    for path in (ROOT / package).rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=options).failed == 0


def test_readme_examples_run(tmp_path, monkeypatch):
    """In order and in one session, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    session = {"__name__": "__main__"}
    readme = (ROOT / "README.md").read_text("utf-8")
    for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(compile(code, "README.md", "exec"), session)
