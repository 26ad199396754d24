"""Compiled optimiser steps: an SVI step as one graph without Python, many steps per call.

``vi.fit(..., compile="auto")`` uses them. :class:`CompiledSteps` is what stands behind it;
:mod:`~vi_toolkit.compiled.tracing` records a step, :mod:`~vi_toolkit.compiled.program` makes
machine code of it, :mod:`~vi_toolkit.compiled.watching` makes sure that it stays true.
"""

from vi_toolkit.compiled.steps import MOST_STEPS_PER_CALL, CompiledSteps

__all__ = ["MOST_STEPS_PER_CALL", "CompiledSteps"]
