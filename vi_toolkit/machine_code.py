"""The way to machine code: compiles a fit's steps or a log density where that pays.

This is the only module that imports :mod:`vi_toolkit.compiled`, and it does so when something is to
be compiled. If the import fails, because a version of torch has moved what the compiler needs, fits
run eagerly and say why.

Compiling takes about as long as one or two thousand eager steps, whatever the model is, because
both times grow with its number of operations. So the number of steps decides whether
``compile="auto"`` compiles. The decision is the same on every run and every machine.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vi_toolkit.errors import CompileError, CompileWarning
from vi_toolkit.programs.joint import Joint, MachineCode

if TYPE_CHECKING:
    from vi_toolkit.compiled.accelerator import Accelerator
    from vi_toolkit.compiled.batched import BatchedFits
    from vi_toolkit.compiled.running_fit import RunningFit

LONG_RUN = 2_000  # number of steps from which "auto" compiles
MOST_BATCHED_PARAMETERS = 2**20  # of all restarts together
ROWS = 16  # points per call of a compiled log density: few enough to stay in the cache


# ------------------------------------------------------------- steps


class Stepper(Protocol):
    """Takes the steps of a stochastic fit.

    Attributes:
        compiles: whether steps are being compiled.
    """

    @property
    def compiles(self) -> bool: ...

    def begin(self, steps: int | None) -> None:
        """Start a run of ``steps`` steps, or of an open number if None."""

    def advance(self, most: int) -> list[float]:
        """Take at most ``most`` steps; returns their ELBOs, which may be none."""

    def recheck_python(self) -> None:
        """Recompile if user code, which may have run since the last step, has changed the model."""

    def finish(self) -> None:
        """End a run: check the steps taken since the last check."""


def stepper(fit: RunningFit, mode: str | bool, most_steps: int) -> Stepper:
    """What takes the steps of a fit.

    Args:
        fit: the fit; its parameters are in use whenever the stepper is called.
        mode: False never compiles. ``"auto"`` compiles runs of at least :data:`LONG_RUN` steps on
            the CPU, and goes on eagerly, with a warning, where that fails. True compiles every run,
            and raises :class:`~vi_toolkit.CompileError` where that fails.
        most_steps: length of a run whose number of steps is open.
    """
    return EagerSteps(fit) if mode is False else MixedSteps(fit, mode, most_steps)


class EagerSteps:
    """A :class:`Stepper` that takes one eager step at a time."""

    compiles = False

    def __init__(self, fit: RunningFit):
        self.fit = fit

    def begin(self, steps: int | None) -> None:
        pass

    def advance(self, most: int) -> list[float]:
        return [self.fit.one_step()]

    def recheck_python(self) -> None:
        pass

    def finish(self) -> None:
        pass


class MixedSteps:
    """A :class:`Stepper` that compiles the steps of some runs, see :func:`stepper`.

    Attributes:
        accelerator: takes the compiled steps; None if no run has been compiled.
    """

    def __init__(self, fit: RunningFit, mode: str | bool, most_steps: int):
        self.fit, self.insist, self.most_steps = fit, mode is True, most_steps
        self.accelerator: Accelerator | None = None
        self._failed = False
        self._eager = EagerSteps(fit)
        self._current: EagerSteps | Accelerator = self._eager  # in the current run

    @property
    def compiles(self) -> bool:
        return self._current.compiles

    def begin(self, steps: int | None) -> None:
        horizon = self.most_steps if steps is None else steps
        on_cpu = _on_cpu(self.fit.leaves)
        if self.insist and not on_cpu:
            raise CompileError("compile=True, but only steps on the CPU are compiled.")
        wanted = self.insist or (horizon >= LONG_RUN and on_cpu)
        if wanted and self.accelerator is None and not self._failed:
            self._make_accelerator()
        self._current = self._eager
        if wanted and self.accelerator is not None:
            batches = self.fit.batches
            short_batches = batches is None or horizon // batches.per_epoch >= LONG_RUN
            self.accelerator.begin(short_batches)
            self._current = self.accelerator

    def advance(self, most: int) -> list[float]:
        return self._current.advance(most)

    def recheck_python(self) -> None:
        self._current.recheck_python()

    def finish(self) -> None:
        self._current.finish()

    def _make_accelerator(self) -> None:
        try:
            with _import_errors_explained():
                from vi_toolkit.compiled.accelerator import Accelerator
        except CompileError as error:
            self._failed = True
            _go_on_eagerly("The steps run", error, self.insist)
        else:
            self.accelerator = Accelerator(self.fit, self.insist)


# ------------------------------------------------------------- restarts


def batching_pays(
    mode: str | bool, steps: int | None, restarts: int, leaves: Iterable[torch.Tensor]
) -> bool:
    """Whether to take the steps of all restarts at once.

    Args:
        mode: as in :func:`stepper`.
        steps: number of steps of each; None if convergence decides.
        restarts: number of fits.
        leaves: the parameters of one of them.
    """
    leaves = list(leaves)
    if restarts * sum(p.numel() for p in leaves) > MOST_BATCHED_PARAMETERS or not _on_cpu(leaves):
        return False
    long = steps is None or steps * restarts >= LONG_RUN
    return mode is True or (mode == "auto" and long)


def batched_fits(
    fits: Sequence[RunningFit],
    isolated: Callable[[int], contextlib.AbstractContextManager[object]],
    most_steps: int,
) -> BatchedFits:
    """Several fits whose steps are taken at once, by ``advance(steps, report)``.

    Args:
        fits: fits that have taken no step and differ only in parameter values and seeds.
        isolated: number of a fit -> context in which its parameters are in use.
        most_steps: number of steps at which a fit ends that has not converged.

    Raises:
        CompileError: the fits cannot be batched. They have been modified; rebuild them.
    """
    with _import_errors_explained():
        from vi_toolkit.compiled.batched import BatchedFits
    return BatchedFits(fits, isolated, most_steps)


# ------------------------------------------------------------- log densities


def density(
    log_density: Callable[[torch.Tensor], torch.Tensor],
    example: torch.Tensor,
    *,
    state: Any = None,
    writes: bool = False,
    insist: bool = False,
) -> MachineCode | None:
    """Gradients and values of a log density by machine code.

    Args:
        log_density: (d,) -> scalar.
        example: (rows, d), points at which the density is finite.
        state: the model, whose globals and attributes must not change while it runs.
        writes: whether ``vmap`` needs :class:`~vi_toolkit.programs.vectorise.InPlaceWrites`.
        insist: raise an error where the density cannot be compiled.

    Returns:
        The compiled density; None, after a warning, if it cannot be compiled.

    Raises:
        CompileError: ``insist``, and it cannot be compiled.
    """
    try:
        with _import_errors_explained():
            from vi_toolkit.compiled.density import CompiledDensity
        return CompiledDensity(log_density, example, state, writes)
    except CompileError as error:
        _go_on_eagerly("The log density is evaluated", error, insist)
        return None


def compile_joint(joint: Joint, insist: bool = False) -> None:
    """Let a log joint density evaluate its gradients by machine code, if it can be compiled.

    Args:
        joint: the density.
        insist: raise an error where it cannot be compiled.

    Raises:
        CompileError: ``insist``, and it cannot be compiled.
    """
    if joint.compiled is not None:
        return
    example = joint.start.expand(ROWS, -1)
    joint.many_with_gradient(example)  # finds out how vmap can batch the model
    joint.compiled = density(
        joint.log_density,
        example,
        state=joint.model,
        writes=joint.many_with_gradient.writes,
        insist=insist,
    )


# ------------------------------------------------------------- helpers


def _on_cpu(leaves: Iterable[torch.Tensor]) -> bool:
    return all(p.device.type == "cpu" for p in leaves)


@contextlib.contextmanager
def _import_errors_explained() -> Iterator[None]:
    """Turn any error of an import into a CompileError."""
    try:
        yield
    except CompileError:
        raise
    except Exception as error:
        text = (str(error).splitlines() or [""])[0][:200]
        raise CompileError(
            f"the compiler cannot be imported ({type(error).__name__}: {text})"
        ) from error


def _go_on_eagerly(what: str, error: CompileError, insist: bool) -> None:
    if insist:
        raise CompileError(f"compile=True, but {error}.") from error
    warnings.warn(
        f"{what} eagerly, because {error}. (Pass compile=False to silence this warning.)",
        CompileWarning,
        stacklevel=3,
    )
