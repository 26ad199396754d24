"""``vi_toolkit.__all__`` is complete and sorted, and every name in it exists."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import vi_toolkit as vi


@pytest.mark.parametrize("name", vi.__all__)
def test_every_name_exists(name):
    assert getattr(vi, name) is not None


def test_import_star_works_in_a_fresh_process():
    code = "from vi_toolkit import *; print(*sorted(dir()))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert set(vi.__all__) <= set(done.stdout.split())


def test_the_list_is_sorted():
    """Constants, then classes, then functions, each by the alphabet."""
    assert vi.__all__ == sorted(vi.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert len(set(vi.__all__)) == len(vi.__all__)


def test_the_list_is_complete():
    public = {
        name
        for name, value in vars(vi).items()
        if name[0] != "_" and not isinstance(value, ModuleType)
    }
    assert public <= set(vi.__all__)
