"""Ctrl-C where it must wait, and where torch would turn it into something else."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Hold an interrupt back until the block ends, so that it never meets half-written state."""
    handler = _handler()
    if handler is None:
        yield
        return
    waiting: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *args: waiting.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if waiting:
        handler(*waiting[0])


@contextlib.contextmanager
def interrupt_kept() -> Iterator[None]:
    """Leave the block by KeyboardInterrupt if one was raised in it.

    An interrupt also ends the C++ compiler's process. torch may then report a failed compilation or
    a missing library instead of the interrupt.
    """
    handler = _handler()
    if handler is None:
        yield
        return
    interrupted = False

    def note(*args: Any) -> None:
        nonlocal interrupted
        try:
            handler(*args)
        except KeyboardInterrupt:
            interrupted = True
            raise

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupted:
        raise KeyboardInterrupt


def _handler() -> Any:
    """What an interrupt calls in this thread; None if it calls nothing in Python."""
    if threading.current_thread() is not threading.main_thread():
        return None
    handler = signal.getsignal(signal.SIGINT)
    return handler if callable(handler) else None
