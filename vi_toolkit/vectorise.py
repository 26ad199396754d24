"""Run a function of one draw over many draws at once.

Users write models for one draw (``X @ coefficients``). ``torch.func.vmap`` runs such a model over
a batch of draws without asking them to rewrite it; where it cannot (data-dependent control flow,
an operator without a batching rule), a loop gives the same answer more slowly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from vi_toolkit.noise import UnsupportedNoise

# What a model may raise at a point where its density does not exist (a Cholesky factor of an
# indefinite matrix, an overflow caught by an assertion of its own).
BAD_POINT = (torch.linalg.LinAlgError, ValueError, RuntimeError, ArithmeticError)


class Batched:
    """``f`` over the leading dimension of its arguments.

    Args:
        f: function of tensors (one draw) returning a pytree of tensors.
        chunk: draws per call of ``vmap``, to bound memory; None for all at once.
        random: whether ``f`` draws random numbers (a different one for each draw).
        bad_point: what stands for the result where ``f`` raises one of :data:`BAD_POINT`; if None
            the error goes up.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        chunk: int | None = None,
        random: bool = False,
        bad_point: Callable[[], Any] | None = None,
    ):
        self.f = f
        self.chunk = chunk
        self.random = random
        self.bad_point = bad_point
        self.vectorises: bool | None = None  # unknown until the first call
        self.why_not = ""

    def __call__(self, *args: torch.Tensor) -> Any:
        n = args[0].shape[0]
        chunk = self.chunk or n
        parts = [
            self._call_chunk(*(a[i : i + chunk] for a in args)) for i in range(0, max(n, 1), chunk)
        ]
        if len(parts) == 1:
            return parts[0]
        return pytree.tree_map(lambda *xs: torch.cat(xs), *parts)

    def _call_chunk(self, *args: torch.Tensor) -> Any:
        if self.vectorises is not False:
            try:
                with warnings.catch_warnings():
                    # "There is a performance drop because we have not yet implemented ..."
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    # Structural checks of a model on its tensors' values would fail under vmap.
                    out = torch.func.vmap(
                        self.f, randomness="different" if self.random else "error"
                    )(*args)
                self.vectorises = True
                return out
            except UnsupportedNoise:
                raise
            except BAD_POINT as error:
                # One bad point fails the whole batch, so the loop below is also how the good
                # points of a mixed batch are found. Only a batch that works in the loop without
                # a single bad point shows that it was vmap that failed.
                self.why_not = f"{type(error).__name__}: {error}".split("\n")[0]
        rows, bad = [], 0
        for i in range(args[0].shape[0]):
            try:
                rows.append(self.f(*(a[i] for a in args)))
            except BAD_POINT:
                if self.bad_point is None:
                    raise
                bad += 1
                rows.append(self.bad_point())
        if self.vectorises is None and not bad:
            self.vectorises = False
        return pytree.tree_map(lambda *xs: torch.stack(xs), *rows)
