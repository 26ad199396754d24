"""Log densities and their gradients by machine code, for many evaluations of one model.

A deterministic fit and NUTS evaluate one function, log p(x, z(u)) with its gradient, hundreds to
hundreds of thousands of times. Recorded once and compiled, it needs no Python for each operation
and fewer passes over the data (``benchmarks/density.py`` measures this).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch

from vi_toolkit import torch_private
from vi_toolkit.compiled.aot_cache import check_folder, compile_graph
from vi_toolkit.compiled.in_place import InPlaceChanges
from vi_toolkit.compiled.purity import PythonSnapshot, effects
from vi_toolkit.compiled.quiet import forgetting_sources, quiet
from vi_toolkit.compiled.rewrites import hoist
from vi_toolkit.compiled.tracing import functional, trace_function
from vi_toolkit.errors import CompileError
from vi_toolkit.programs.vectorise import BAD_POINT, vmap

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


class CompiledDensity:
    """Gradients and values of a log density at several points at once.

    The machine code is compared with the function itself when it is made. It follows in-place
    changes of the data. Do not compile a model that reads other Python values on a later call.

    Args:
        log_density: (d,) -> scalar.
        example: (rows, d), points at which the density is finite.
        state: the model, whose globals and attributes must not change while it runs.
        writes: whether ``vmap`` needs :class:`~vi_toolkit.programs.vectorise.InPlaceWrites`.

    Attributes:
        rows: number of points per call.

    Raises:
        CompileError: the function cannot be recorded or compiled, or the machine code computes
            something else.

    Example:
        >>> import torch
        >>> density = CompiledDensity(lambda u: -(u**2).sum(), torch.ones(2, 3))
        >>> density(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))[1].tolist()
        [-14.0, -1.0]
    """

    @forgetting_sources()
    @quiet()
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
            with (
                pyro.validation_enabled(False),
                InPlaceChanges() as changes,
                effects() as found,
            ):
                expected = function(example)
        except BAD_POINT as error:
            text = str(error).split("\n")[0][:200]
            raise CompileError(
                f"the model does not run over many draws at once ({text})"
            ) from error
        changed = before.changed()
        changes.undo()
        if found or changes.changed or changed:
            what = f"calls {found[0]}()" if found else f"changes {changed or 'a tensor'}"
            raise CompileError(f"the model {what} when it runs")
        other = example + 0.01 * example.abs().clamp_min(0.1)
        with pyro.validation_enabled(False):
            traced = trace_function(function, [(example,), (other,)])
            graph = functional(traced.graph, [example, *traced.constants])
        self._once, each, _ = hoist(graph, 1, traced.fresh)
        self._constants = traced.constants
        self._versions: tuple[int, ...] | None = None
        self._refresh()
        self._machine_code = compile_graph(each, [example, *self._invariants])
        self._check(example, expected)

    def __call__(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients (rows, d) and values (rows,) at points (rows, d)."""
        self._refresh()
        with torch.no_grad():
            gradient, value = self._machine_code([u.detach().contiguous(), *self._invariants])
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
        """Recompute what depends on the data alone if the data have changed."""
        versions = tuple(map(torch_private.version, self._constants))
        if versions != self._versions:
            with torch.no_grad():
                self._invariants = [t.contiguous() for t in self._once(*self._constants)]
            self._versions = versions

    def _check(self, u: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
        tolerance = TOLERANCE.get(u.dtype, 1e-2)
        for mine, theirs in zip(self(u), expected, strict=True):
            good = torch.isfinite(theirs)
            error = (mine - theirs)[good].norm()
            if not bool(error <= tolerance * theirs[good].norm() + 1e-30):
                raise CompileError("the compiled density differs from the model's")
