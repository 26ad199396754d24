"""Optimiser steps and log densities as machine code: no Python between steps, many steps per call.

:mod:`vi_toolkit.machine_code` is the way in; no other module imports this package. A step goes
through it like this:

1. :mod:`~vi_toolkit.compiled.tracing` records a step as a graph, under
   :mod:`~vi_toolkit.compiled.bookkeeping` and :mod:`~vi_toolkit.compiled.in_place`.
2. :mod:`~vi_toolkit.compiled.rewrites` rewrites the graph and moves constants out of the loop,
   :mod:`~vi_toolkit.compiled.updates` adds the optimiser's update.
3. :mod:`~vi_toolkit.compiled.aot_cache` finds the machine code of the loop, or has it made by
   :mod:`~vi_toolkit.compiled.build` and :mod:`~vi_toolkit.compiled.allocation`.
4. :mod:`~vi_toolkit.compiled.steps` calls it, with the state that
   :mod:`~vi_toolkit.compiled.loop_state` gathers from the fit and writes back.
5. :mod:`~vi_toolkit.compiled.accelerator` does this for a running fit, and checks that the compiled
   step is still the model's, with :mod:`~vi_toolkit.compiled.purity`.
   :mod:`~vi_toolkit.compiled.batched` does it for several restarts at once, whose states
   :mod:`~vi_toolkit.compiled.stacked_state` stacks.

:mod:`~vi_toolkit.compiled.density` compiles log densities instead of steps.

Some fits run eagerly:

* Control flow depends on values that change from step to step (latents, parameters, minibatches),
  or shapes do (the spline flows of Pyro). One recording cannot follow it.
* The model prints, reads a clock, draws from numpy or ``random``, or changes Python state when it
  runs. A compiled step would not repeat that.
* The estimator has no ``differentiable_loss`` (Pyro's RenyiELBO and TraceGraph_ELBO).
* The optimiser is not Adam, AdamW, SGD or RMSprop, or its learning rate is a tensor.
* The parameters differ in precision, or are not on the CPU.
* There is no C++ compiler, and the machine code is not in the cache from an earlier run.

Some restarts run one after the other: those of fits that run eagerly; those whose guides close over
one network or tensor, which all fits would change; and those whose guides make something for
themselves when they are constructed (the permutations of Pyro's AutoIAFNormal).
"""

from vi_toolkit.compiled.steps import MOST_STEPS_PER_CALL, CompiledSteps

__all__ = ["MOST_STEPS_PER_CALL", "CompiledSteps"]
