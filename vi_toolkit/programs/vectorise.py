"""Run a function of one draw over many draws at once.

Users write models for one draw (``X @ coefficients``). ``torch.func.vmap`` runs such a model over
a batch of draws without asking them to rewrite it. It refuses models that write into tensors of
their own (``mean = torch.zeros(n); mean[0] = ...``), of which there are many, some in
``torch.distributions`` itself; :class:`InPlaceWrites` helps it over these. Where nothing helps
(data-dependent control flow, an operator without a batching rule), a loop gives the same answer
more slowly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vi_toolkit import torch_private
from vi_toolkit.programs.noise import UnsupportedNoise

# What a model may raise at a point where its density does not exist (a Cholesky factor of an
# indefinite matrix, an overflow caught by an assertion of its own).
BAD_POINT = (torch.linalg.LinAlgError, ValueError, RuntimeError, ArithmeticError)


class InPlaceWrites(TorchFunctionMode):
    """Let ``vmap`` batch a function that writes into tensors which it makes itself.

    A fresh tensor is the same for all draws, so ``vmap`` cannot write one draw's numbers into it:
    here it gets a batch dimension at once. A write through a boolean mask, whose size depends on
    the mask, becomes a choice between old and new.

    Args:
        zero: a batched scalar zero.
    """

    FRESH = frozenset(
        {torch.zeros, torch.ones, torch.full, torch.empty, torch.zeros_like, torch.ones_like}
        | {torch.full_like, torch.empty_like, torch.Tensor.new_zeros, torch.Tensor.new_ones}
        | {torch.Tensor.new_full, torch.Tensor.new_empty, torch.Tensor.clone, torch.clone}
    )

    def __init__(self, zero: torch.Tensor):
        super().__init__()
        self.zero = zero

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__:
            tensor, index, value = args
            masked = torch.is_tensor(index) and index.dtype == torch.bool
            if masked and (not torch.is_tensor(value) or value.dim() == 0):
                shape = index.shape + (1,) * (tensor.dim() - index.dim())
                tensor.copy_(torch.where(index.reshape(shape), value, tensor))
                return None
        out = func(*args, **(kwargs or {}))
        if func in self.FRESH and out.dtype.is_floating_point:
            out = out + self.zero.to(out.dtype)
        return out


class Unchecked(TorchFunctionMode):
    """Skip the value checks of distributions that were made while validation was on.

    Distributions made inside a fit have no such checks. ``vmap`` and a tracer cannot branch on a
    value.
    """

    def __init__(self) -> None:
        super().__init__()
        self._check = torch_private.optional("is_all_true")  # which only distributions call

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is self._check:
            return True
        return func(*args, **(kwargs or {}))


def vmap(f: Callable[..., Any], writes: bool = False, randomness: str = "error") -> Callable:
    """``torch.func.vmap`` of an :class:`Unchecked` f, with :class:`InPlaceWrites` if ``writes``."""

    def unchecked(*args: torch.Tensor) -> Any:
        with Unchecked():
            return f(*args)

    if not writes:
        return torch.func.vmap(unchecked, randomness=randomness)

    def with_writes(zero: torch.Tensor, *args: torch.Tensor) -> Any:
        with InPlaceWrites(zero):
            return unchecked(*args)

    batched = torch.func.vmap(with_writes, randomness=randomness)
    return lambda *args: batched(torch.zeros(len(args[0])), *args)


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
        self.writes = False  # whether it takes InPlaceWrites
        self.why_not = ""

    def __call__(self, *args: torch.Tensor) -> Any:
        n = args[0].shape[0]
        chunk = self.chunk or n
        parts = [
            self._call_chunk(*(a[i : i + chunk] for a in args)) for i in range(0, max(n, 1), chunk)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch_private.tree_map(lambda *xs: torch.cat(xs), *parts)

    def _call_chunk(self, *args: torch.Tensor) -> Any:
        for writes in (False, True):
            if self.vectorises is False or (self.writes and not writes):
                continue
            try:
                with warnings.catch_warnings():
                    # "There is a performance drop because we have not yet implemented ..."
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    # Structural checks of a model on its tensors' values would fail under vmap.
                    randomness = "different" if self.random else "error"
                    out = vmap(self.f, writes, randomness)(*args)
                self.vectorises, self.writes = True, writes
                return out
            except UnsupportedNoise:
                raise
            except BAD_POINT as error:
                # One bad point fails the whole batch, so the loop below is also how the good
                # points of a mixed batch are found. Only a batch that works in the loop without
                # a single bad point shows that it was vmap that failed.
                self.why_not = f"{type(error).__name__}: {error}".split("\n")[0]
                if self.vectorises:
                    break
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
        return torch_private.tree_map(lambda *xs: torch.stack(xs), *rows)
