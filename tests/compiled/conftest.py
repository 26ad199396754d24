"""Compiled loops that run in Python: everything is the same except the machine code."""

import signal

import pytest

from tests.compiled.checks import interpret
from vi_toolkit import machine_code
from vi_toolkit.compiled import steps


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(steps, "compile_loop", interpret)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt. (A shell lets processes in the background ignore it.)"""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def short_runs_compile(monkeypatch, interpreted):
    monkeypatch.setattr(machine_code, "LONG_RUN", 1)
