"""Compiled loops that run in Python."""

import pytest

from tests.compiled.checks import interpret
from vi_toolkit.compiled import steps


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(steps, "compile_loop", interpret)
