"""Keeps from the user what torch says, and returns the memory that it takes, while compiling."""

from __future__ import annotations

import contextlib
import linecache
import logging
import warnings
from collections.abc import Iterator

from vi_toolkit import torch_private


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings and the log of torch's compiler.

    The warnings are deprecations inside torch, in particular of ``torch.jit.script``, which the
    import of inductor and forward-mode derivatives call. The model's own warnings were shown when
    it ran eagerly.
    """
    log = torch_private.compiler_log()
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def forgetting_sources() -> Iterator[None]:
    """Delete the source text of graphs made in the block.

    torch.fx keeps the text of each graph for ever, in case a traceback wants to show it. For a fit
    these are some 200 KB.
    """
    texts: dict[str, str] = torch_private.optional("graph_sources") or {}
    before = set(texts)
    try:
        yield
    finally:
        for name in set(texts) - before:
            texts.pop(name, None)
            linecache.cache.pop(name, None)
