"""Compiled optimiser steps: an SVI step as one graph without Python, many steps per call.

``vi.fit(..., compile="auto")`` uses them. :class:`CompiledSteps` is what stands behind it;
:mod:`~vi_toolkit.compiled.tracing` records a step, :mod:`~vi_toolkit.compiled.rewrites` rewrites it,
:mod:`~vi_toolkit.compiled.aot_cache` makes machine code of it, by
:mod:`~vi_toolkit.compiled.build`; :mod:`~vi_toolkit.compiled.accelerator` decides when, and
together with :mod:`~vi_toolkit.compiled.purity` sees to it that a compiled step stays the
model's.
:mod:`~vi_toolkit.compiled.batched` takes the steps of several restarts at once.

What runs eagerly, and why:

* control flow on values that change from step to step (latents, parameters, minibatches), which
  includes shapes that depend on them (the spline flows of Pyro): one recording cannot follow it;
* models that print, read a clock, draw from numpy or ``random``, or change Python state when they
  run: a compiled step would not repeat it;
* estimators without a ``differentiable_loss`` (Pyro's RenyiELBO, TraceGraph_ELBO);
* optimisers other than Adam, AdamW, SGD and RMSprop, and a learning rate that is a tensor;
* parameters of different precisions or on different devices;
* on a GPU, unless ``compile=True`` asks for it: :mod:`~vi_toolkit.compiled.replay` has not run on
  one yet;
* no C++ compiler, unless the program is in the cache from an earlier run.

What runs in turn, of several restarts: all of that, guides that close over a network or a tensor
of the caller's (all restarts would change it), guides that make something for themselves when they
are made (the permutations of Pyro's AutoIAFNormal), more than a million parameters together, and
fits with a ``stop`` of the caller's.
"""

from vi_toolkit.compiled.steps import MOST_STEPS_PER_CALL, CompiledSteps

__all__ = ["MOST_STEPS_PER_CALL", "CompiledSteps"]
