"""When to take compiled steps, and how to be sure of them.

Compiling takes about as long as one or two thousand eager steps, whatever the model: both grow
with the number of operations. So the decision is made by the number of steps, which also makes it
the same on every run and every machine.

Three things guard against a compiled step that is no longer the model's:

* the fit's first step is taken eagerly and watched for effects and changing Python state;
* Python state is compared again at the start of each run and after each look at a stage;
* now and then (a twentieth of the time) a step is taken both ways from the same state with the
  same draws, and both must agree. If they do not, the fit goes back to where they last did.
"""

from __future__ import annotations

import copy
import time
import warnings
from typing import TYPE_CHECKING, Any

from vi_toolkit.compiled.purity import PythonSnapshot, effects
from vi_toolkit.compiled.steps import (
    MOST_STEPS_PER_CALL,
    CompiledSteps,
    Loop,
    without_interrupt,
)
from vi_toolkit.compiled.tracing import Watch
from vi_toolkit.errors import CompileError, CompileWarning
from vi_toolkit.programs.isolation import random_state, set_random_state

if TYPE_CHECKING:
    from vi_toolkit.stochastic.stages import Stochastic

LONG_RUN = 2_000  # steps from which "auto" compiles
SHARE_OF_CHECKS = 1 / 20
MOST_RECOMPILATIONS = 8
LONGEST_CALL = 0.5  # seconds between two chances to interrupt


class Accelerator:
    """Takes a fit's steps, compiled where that pays and works and eagerly elsewhere.

    Attributes:
        reason: why steps are not compiled although they should be; empty if they are.
        active: whether the last steps were compiled.
    """

    def __init__(self, fit: Stochastic, mode: str | bool):
        self.fit, self.mode = fit, mode
        self.wanted, self.active, self.reason = False, False, ""
        self.ragged_pays = False
        self.steps: CompiledSteps | None = None
        self.state: PythonSnapshot | None = None
        self.recompiled = 0
        self.per_step = 0.0
        self.compiled_seconds = self.check_seconds = 0.0
        self.unchecked = False
        self.verified: dict[str, Any] | None = None

    @property
    def compiles(self) -> bool:
        """Whether steps are being compiled (though a short minibatch may be taken eagerly)."""
        return self.wanted and not self.reason and self.steps is not None

    def begin(self, steps: int | None) -> None:
        """At the start of a run of ``steps`` steps, or of an open end."""
        from vi_toolkit.stochastic.stages import MOST_STEPS

        horizon = MOST_STEPS if steps is None else steps
        long = horizon >= LONG_RUN
        batches = self.fit.batches
        # The short last minibatch of each epoch is another program, which must pay for itself.
        self.ragged_pays = batches is None or horizon // batches.per_epoch >= LONG_RUN
        tried = all(p.device.type == "cpu" for p in self.fit.leaves)  # see compiled.replay
        self.wanted = self.mode is True or (self.mode == "auto" and long and tried)
        self.look_around()

    def look_around(self) -> None:
        """Whoever ran since (a callback, the user between two runs) may have changed things."""
        if self.state is None or self.reason or not self.wanted:
            return
        changed = self.state.changed()
        if changed and self.steps is not None:
            self.recompiled += 1
            self.steps.loops.clear()
            if self.recompiled > MOST_RECOMPILATIONS:
                self._give_up(CompileError(f"{changed} changes again and again"))

    def take(self, most: int) -> list[float]:
        """Take between one and ``most`` steps; returns their ELBOs."""
        fit = self.fit
        self.active = False
        if not self.wanted or self.reason:
            return [fit.one_step()]
        if self.state is None:
            keep = fit.step == 0
            elbo, problem = self._watched_step(keep)
            if problem:
                self._give_up(CompileError(problem))
            return [elbo] if keep else []
        try:
            return self._block(most)
        except CompileError as error:
            self._give_up(error)
            return []

    def finish(self) -> None:
        """At the end of a run: nothing leaves it unchecked."""
        if self.steps is not None and self.unchecked and not self.reason:
            step = self.fit.step
            try:
                size = self.fit.batches.next_size if self.fit.batches else None
                if size in self.steps.loops:
                    self._check(self.steps.loop(size))
            except CompileError as error:
                self._give_up(error)
                while self.fit.step < step:
                    self.fit.one_step()

    def _give_up(self, error: CompileError) -> None:
        if self.mode is True:
            raise CompileError(f"compile=True, but {error}.") from error
        self.reason, self.steps = str(error), None
        warnings.warn(
            f"The steps run eagerly, because {error}. (compile=False says so without a warning.)",
            CompileWarning,
            stacklevel=2,
        )

    def _watched_step(self, keep: bool) -> tuple[float, str | None]:
        """One eager step, and what it shows the model to do besides computing."""
        fit = self.fit
        # The estimator may settle what it works out once (plate nesting) in its first step, also
        # if it is not the fit's first.
        parts = (fit.model, fit.guide) if keep else (fit.model, fit.guide, fit.estimator)
        before = PythonSnapshot(*parts)
        place = self.bookmark()
        for _ in range(1 if keep else 2):
            with Watch() as watch, effects() as found:
                elbo = fit.one_step()
            changed = before.changed()
            if not keep:
                watch.undo()
                self.back_to(place)
            if found or not changed:
                break
        self.state = PythonSnapshot(fit.model, fit.guide, fit.estimator)
        if found:
            return elbo, (
                f"the model or guide calls {found[0]}(), which a compiled step would not repeat"
            )
        return elbo, f"{changed} changes when the model or guide runs" if changed else None

    def _block(self, most: int) -> list[float]:
        fit = self.fit
        if self.steps is None:
            self.steps = CompiledSteps(
                fit.model,
                fit.guide,
                fit.data,
                fit.estimator,
                fit.optimizer,
                fit.plan,
                fit.leaves,
            )
        batches = fit.batches
        if batches and batches.next_size < batches.batch and not self.ragged_pays:
            return [fit.one_step()]
        fit.check_parameters()
        loop = self.steps.loop(batches.next_size if batches else None)  # compiles where it must
        if self.verified is None or self.check_seconds < SHARE_OF_CHECKS * self.compiled_seconds:
            self._check(loop)
        steps = min(most, MOST_STEPS_PER_CALL)
        if self.per_step:
            steps = max(1, min(steps, int(LONGEST_CALL / self.per_step)))
        began = time.perf_counter()
        with without_interrupt():
            place = batches.state() if batches else {}
            rows = batches.several(steps) if batches else None
            steps = steps if rows is None else len(rows)
            block = loop.run(steps, rows, fit.block_sum)
            done = len(block.elbo)
            if done < steps and batches:
                batches.restore(place)
                if done:
                    batches.several(done)
            fit.step += done
            fit.in_block += done
            fit.elbo += block.elbo
            fit.block_sum = block.total
        self.active = self.unchecked = True
        if done < steps:
            return [*block.elbo, fit.one_step()]  # blames the site, or finds that all is well
        seconds = time.perf_counter() - began
        self.per_step = seconds / done
        self.compiled_seconds += seconds
        return block.elbo

    # ------------------------------------------------------------- both ways

    def bookmark(self) -> tuple[Any, ...]:
        """Where the fit is, its parameters and optimiser apart."""
        fit = self.fit
        return (
            fit.step,
            len(fit.elbo),
            fit.in_block,
            fit.block_sum.clone(),
            fit.batches.state() if fit.batches else None,
            random_state(),
        )

    def back_to(self, place: tuple[Any, ...]) -> None:
        fit = self.fit
        fit.step, length, fit.in_block, fit.block_sum, batches, random = place
        del fit.elbo[length:]
        if fit.batches:
            fit.batches.restore(batches)
        set_random_state(random)

    def _check(self, loop: Loop) -> None:
        """Compute the next step both ways, compare, and leave everything as it was.

        Raises:
            CompileError: they differ; the fit is back where they last agreed.
        """
        fit = self.fit
        began = time.perf_counter()
        place = self.bookmark()
        rows = fit.batches.several(1) if fit.batches else None
        old = [t.clone() for t in loop.carried()]
        done, compiled = loop.compute(1, rows)
        self.back_to(place)
        with Watch() as watch:
            elbo = fit.one_step()  # raises if it is not finite, as it should
        eager = [t.clone() for t in loop.carried()]
        watch.undo()
        self.back_to(place)
        assert self.state is not None
        changed = self.state.changed()
        problem = f"{changed} changes when the model or guide runs" if changed else None
        if problem is None and not (done == 1 and loop.agree(old, eager, compiled, elbo)):
            problem = (
                f"a compiled step and an eager one from the same state differ at step {fit.step}: "
                "the model or guide is no longer what was compiled, or computes with little "
                "precision"
            )
        if problem:
            if self.verified is not None:
                fit.restore(self.verified)
                set_random_state(fit.rng)
            raise CompileError(problem)
        self.verified = copy.deepcopy(fit.state() | {"rng": random_state()})
        self.unchecked = False
        self.check_seconds += time.perf_counter() - began
