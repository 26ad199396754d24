"""Ctrl-C waits, or is kept, and never leaves a library half made."""

import signal

import pytest
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.compiled.models import DATA, regression
from vi_toolkit.compiled import aot_cache, build
from vi_toolkit.compiled.interrupts import interrupt_deferred, interrupt_kept

pytestmark = pytest.mark.usefixtures("interruptible")


def swallowed():
    """An interrupt of which the code called makes nothing."""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_deferred_interrupt_comes_when_the_block_has_ended():
    done = []

    @interrupt_deferred()
    def interrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("then", [lambda: None, lambda: 1 / 0])
def test_an_interrupt_that_becomes_something_else_is_still_raised(then):
    @interrupt_kept()
    def interrupted():
        swallowed()
        then()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_that_raises_nothing_decides():
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    with interrupt_kept():
        signal.raise_signal(signal.SIGINT)
    assert seen


def test_other_errors_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), interrupt_kept():
        1 / 0  # noqa: B018


def test_an_interrupted_build_leaves_nothing_behind(monkeypatch, tmp_path):
    attempts = []

    def interrupted(graph, inputs, scratch, needed, options):
        attempts.append(1)
        (scratch / "step.so").write_text("half a library")
        swallowed()
        raise RuntimeError("Error in dlopen: None")

    monkeypatch.setattr(build, "_write", interrupted)
    monkeypatch.setattr(aot_cache, "_loaded", type(aot_cache._loaded)())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.warns(vi.ConvergenceWarning, match="interrupted"):
        fit = vi.fit(
            regression, AutoNormal, DATA, steps=50, compile=True, optimizer=0.02, progress=False
        )
    assert fit.interrupted and len(fit.elbo) == 1
    assert attempts == [1]  # the other way is not tried
    assert not list((tmp_path / "vi_toolkit").iterdir())
