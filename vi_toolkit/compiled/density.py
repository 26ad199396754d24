"""Log joint densities and their gradients as machine code, for many evaluations of one model.

A deterministic fit and NUTS evaluate one function, log p(x, z(u)) with its gradient, hundreds to
hundreds of thousands of times. Recorded once and compiled, it costs no Python per operation and
fewer passes over the data (``benchmarks/density.py`` measures it).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch

from vi_toolkit.compiled.aot_cache import (
    check_folder,
    compile_graph,
    forgetting_sources,
    functional,
    quiet,
)
from vi_toolkit.compiled.purity import PythonSnapshot, effects
from vi_toolkit.compiled.rewrites import hoist
from vi_toolkit.compiled.tracing import Watch, trace_function
from vi_toolkit.errors import CompileError, CompileWarning
from vi_toolkit.programs.vectorise import BAD_POINT, vmap

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


class CompiledDensity:
    """Gradients and values of a log density at ``rows`` points, compiled.

    The program is checked against the function itself when it is made. It follows changes of the
    data in place; a model that reads other Python state on a later call must not be compiled.

    Args:
        log_density: (d,) -> scalar.
        example: (rows, d), points at which the density is finite.
        state: model, whose globals and attributes must not change while it runs.
        writes: whether ``vmap`` needs :class:`~vi_toolkit.programs.vectorise.InPlaceWrites`.

    Raises:
        CompileError: it cannot be recorded or compiled, or does not give the function's numbers.

    Example:
        >>> import torch
        >>> density = CompiledDensity(lambda u: -(u**2).sum(), torch.ones(2, 3))
        >>> density(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))[1].tolist()
        [-14.0, -1.0]
    """

    @forgetting_sources()
    def __init__(
        self,
        log_density: Callable[[torch.Tensor], torch.Tensor],
        example: torch.Tensor,
        state: Any = None,
        writes: bool = False,
    ):
        check_folder()
        self.rows = len(example)
        function = vmap(torch.func.grad_and_value(log_density), writes)
        example = example.detach().clone()
        before = PythonSnapshot(state)
        try:
            with quiet(), pyro.validation_enabled(False), Watch() as watch, effects() as found:
                expected = function(example)
        except BAD_POINT as error:
            text = str(error).split("\n")[0][:200]
            raise CompileError(
                f"the model does not run over many draws at once ({text})"
            ) from error
        changed = before.changed()
        watch.undo()
        if found or watch.changed or changed:
            what = f"calls {found[0]}()" if found else f"changes {changed or 'a tensor'}"
            raise CompileError(f"the model {what} when it runs")
        other = example + 0.01 * example.abs().clamp_min(0.1)
        with quiet(), pyro.validation_enabled(False):
            traced = trace_function(function, [(example,), (other,)])
            graph = functional(traced.graph, [example, *traced.constants])
        once, each, _ = hoist(graph, 1, traced.fresh)
        self.once, self.constants = once, traced.constants
        self.versions: tuple[int, ...] | None = None
        self._refresh()
        self.program = compile_graph(each, [example, *self.invariants])
        self._check(example, expected)

    def __call__(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients (rows, d) and values (rows,) at points (rows, d)."""
        self._refresh()
        with torch.no_grad():
            gradient, value = self.program([u.detach().contiguous(), *self.invariants])
        return gradient, value

    def many(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients (S, d) and values (S,) at any number of points (S, d)."""
        count = len(u)
        missing = -count % self.rows
        if missing:
            u = torch.cat([u, u[-1:].expand(missing, -1)])
        parts = [self(part) for part in u.split(self.rows)]
        gradients, values = (torch.cat(x)[:count] for x in zip(*parts, strict=True))
        return gradients, values

    def _refresh(self) -> None:
        versions = tuple(t._version for t in self.constants)
        if versions != self.versions:
            with torch.no_grad():
                self.invariants = [t.contiguous() for t in self.once(*self.constants)]
            self.versions = versions

    def _check(self, u: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
        tolerance = TOLERANCE.get(u.dtype, 1e-2)
        for mine, theirs in zip(self(u), expected, strict=True):
            good = torch.isfinite(theirs)
            error = (mine - theirs)[good].norm()
            if not bool(error <= tolerance * theirs[good].norm() + 1e-30):
                raise CompileError("the compiled density differs from the model's")


def compiled_density(
    log_density: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor, **options: Any
) -> CompiledDensity | None:
    """The compiled density; None, after a warning that says why, where there can be none."""
    try:
        return CompiledDensity(log_density, example, **options)
    except CompileError as error:
        warnings.warn(
            f"The log density is evaluated eagerly, because {error}.", CompileWarning, stacklevel=2
        )
        return None
