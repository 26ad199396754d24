"""Takes a fit's steps by machine code, and makes sure that they stay the model's steps.

A compiled step contains no Python, so it would silently go on as it was compiled if the model
changed. Three checks guard against that:

* The first step is taken eagerly, and inspected for side effects and for Python values that change.
* Python values are compared again at the start of each run and after each stage check.
* From time to time (a twentieth of the run time) one step is computed both ways, from the same
  state with the same draws. If the results differ, the fit goes back to where they last agreed and
  continues eagerly.
"""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

from vi_toolkit.compiled.in_place import InPlaceChanges
from vi_toolkit.compiled.interrupts import interrupt_deferred
from vi_toolkit.compiled.purity import PythonSnapshot, effects
from vi_toolkit.compiled.running_fit import RunningFit, checkpoint, rollback
from vi_toolkit.compiled.steps import LONGEST_CALL, MOST_STEPS_PER_CALL, CompiledSteps, Loop
from vi_toolkit.errors import CompileError, CompileWarning
from vi_toolkit.programs.isolation import random_state, set_random_state

SHARE_OF_CHECKS = 1 / 20
MOST_RECOMPILATIONS = 8


class Accelerator:
    """Takes a fit's steps by machine code, or eagerly where that does not work.

    Args:
        fit: the fit, whose parameters are in use.
        insist: raise :class:`~vi_toolkit.CompileError` where the steps cannot be compiled; if false
            a :class:`~vi_toolkit.CompileWarning` gives the reason, and the steps are eager.

    Attributes:
        active: whether the last steps were compiled.
        reason: why steps are no longer compiled; empty if they are.
    """

    def __init__(self, fit: RunningFit, insist: bool):
        self.fit, self.insist = fit, insist
        self.active, self.reason = False, ""
        self.steps: CompiledSteps | None = None
        self._python: PythonSnapshot | None = None
        self._short_batches = True
        self._recompiled = 0
        self._seconds_per_step = 0.0
        self._compiled_seconds = self._check_seconds = 0.0
        self._unchecked = False
        self._verified: dict[str, Any] | None = None

    @property
    def compiles(self) -> bool:
        """Whether steps are being compiled (a short minibatch may still be eager)."""
        return not self.reason and self.steps is not None

    def begin(self, short_batches: bool) -> None:
        """Start a run.

        Args:
            short_batches: whether to compile steps on the short minibatch that ends an epoch. They
                need machine code of their own.
        """
        self._short_batches = short_batches
        self.recheck_python()

    def recheck_python(self) -> None:
        """Recompile if Python values have changed. Call it whenever user code may have run."""
        if self._python is None or self.reason:
            return
        changed = self._python.changed()
        if changed and self.steps is not None:
            self._recompiled += 1
            self.steps.loops.clear()
            if self._recompiled > MOST_RECOMPILATIONS:
                self._give_up(CompileError(f"{changed} changes again and again"))

    def advance(self, most: int) -> list[float]:
        """Take at most ``most`` steps; returns their ELBOs, which may be none."""
        fit = self.fit
        self.active = False
        if self.reason:
            return [fit.one_step()]
        if self._python is None:
            keep = fit.step == 0
            elbo, problem = self._inspected_step(keep)
            if problem:
                self._give_up(CompileError(problem))
            return [elbo] if keep else []
        try:
            return self._compiled_steps(most)
        except CompileError as error:
            self._give_up(error)
            return []

    def finish(self) -> None:
        """End a run: check the steps taken since the last check."""
        if self.steps is None or not self._unchecked or self.reason:
            return
        step = self.fit.step
        size = self.fit.batches.next_size if self.fit.batches else None
        try:
            if size in self.steps.loops:
                self._check(self.steps.loop(size))
        except CompileError as error:
            self._give_up(error)
            while self.fit.step < step:
                self.fit.one_step()

    def _give_up(self, error: CompileError) -> None:
        if self.insist:
            raise CompileError(f"compile=True, but {error}.") from error
        self.reason, self.steps = str(error), None
        warnings.warn(
            f"The steps run eagerly, because {error}. (Pass compile=False to silence this "
            "warning.)",
            CompileWarning,
            stacklevel=2,
        )

    def _inspected_step(self, keep: bool) -> tuple[float, str | None]:
        """Take an eager step, and find out what model and guide do besides computing.

        Args:
            keep: whether the step counts. If not, everything is put back afterwards.

        Returns:
            The step's ELBO, and why steps cannot be compiled, or None.
        """
        fit = self.fit
        # In its first step an estimator may store what it works out once (the nesting of plates).
        # If this is the first step of a loaded fit, the change is harmless: a second step shows.
        parts = (fit.model, fit.guide) if keep else (fit.model, fit.guide, fit.estimator)
        before = PythonSnapshot(*parts)
        start = checkpoint(fit)
        for _ in range(1 if keep else 2):
            with InPlaceChanges() as changes, effects() as found:
                elbo = fit.one_step()
            changed = before.changed()
            if not keep:
                changes.undo()
                rollback(fit, start)
            if found or not changed:
                break
        self._python = PythonSnapshot(fit.model, fit.guide, fit.estimator)
        if found:
            return elbo, (
                f"the model or guide calls {found[0]}(), which a compiled step would not repeat"
            )
        return elbo, f"{changed} changes when the model or guide runs" if changed else None

    def _compiled_steps(self, most: int) -> list[float]:
        fit = self.fit
        if self.steps is None:
            self.steps = CompiledSteps(fit)
        batches = fit.batches
        if batches and batches.next_size < batches.batch and not self._short_batches:
            return [fit.one_step()]
        fit.check_parameters()
        loop = self.steps.loop(batches.next_size if batches else None)  # compiles if necessary
        if self._verified is None or self._check_seconds < SHARE_OF_CHECKS * self._compiled_seconds:
            self._check(loop)
        steps = min(most, MOST_STEPS_PER_CALL)
        if self._seconds_per_step:
            steps = max(1, min(steps, int(LONGEST_CALL / self._seconds_per_step)))
        began = time.perf_counter()
        with interrupt_deferred():
            before = batches.state() if batches else {}
            indices = batches.several(steps) if batches else None
            steps = steps if indices is None else len(indices)
            taken = loop.advance(steps, indices, fit.block_sum)
            done = len(taken.elbo)
            if done < steps and batches:
                batches.restore(before)
                if done:
                    batches.several(done)
            fit.step += done
            fit.in_block += done
            fit.elbo += taken.elbo
            fit.block_sum = taken.iterate_sum
        self.active = self._unchecked = True
        if done < steps:
            # An eager step names the site that is not finite, or finds that all is well.
            return [*taken.elbo, fit.one_step()]
        seconds = time.perf_counter() - began
        self._seconds_per_step = seconds / done
        self._compiled_seconds += seconds
        return taken.elbo

    def _check(self, loop: Loop) -> None:
        """Compute the next step both ways and compare; nothing is changed.

        Raises:
            CompileError: the results differ. The fit is back where they last agreed.
        """
        fit = self.fit
        began = time.perf_counter()
        start = checkpoint(fit)
        indices = fit.batches.several(1) if fit.batches else None
        old = [t.clone() for t in loop.carried()]
        done, compiled = loop.compute(1, indices)
        rollback(fit, start)
        with InPlaceChanges() as changes:
            elbo = fit.one_step()  # raises if it is not finite, as it should
        eager = [t.clone() for t in loop.carried()]
        changes.undo()
        rollback(fit, start)
        assert self._python is not None
        changed = self._python.changed()
        problem = f"{changed} changes when the model or guide runs" if changed else None
        if problem is None and not (done == 1 and loop.agree(old, eager, compiled, elbo)):
            problem = (
                f"a compiled step and an eager one from the same state differ at step {fit.step}: "
                "the model or guide has changed since it was compiled, or it loses precision"
            )
        if problem:
            if self._verified is not None:
                fit.restore(self._verified)
                set_random_state(fit.rng)
            raise CompileError(problem)
        self._verified = copy.deepcopy(fit.state() | {"rng": random_state()})
        self._unchecked = False
        self._check_seconds += time.perf_counter() - began
