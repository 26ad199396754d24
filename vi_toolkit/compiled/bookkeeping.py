"""Answers Pyro's own questions about tensor values while a step is recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pyro.infer.util
import pyro.util
import torch
from torch.overrides import TorchFunctionMode


def _codes(*functions: Callable[..., Any]) -> set[Any]:
    return {f.__code__ for f in functions}


# The functions of Pyro that may ask for a value.
_ITEM = _codes(pyro.infer.util.torch_item)
_NAN = _codes(
    pyro.util.torch_isnan, pyro.util.torch_isinf, pyro.util.warn_if_nan, pyro.util.warn_if_inf
)
_ALL = _codes(pyro.infer.util.Dice.compute_expectation)
_DOT = _codes(pyro.infer.util._fulldot)

_PRODUCT = {torch.tensordot, torch.Tensor.mul}
_ASKING = _PRODUCT | {
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.register_hook,
    torch.Tensor.all,
}


class BookKeeping(TorchFunctionMode):
    """Answers questions about values that Pyro asks for reports and warnings, without a value.

    A question is recognised by the function that asks it, so the same question by a model is not
    answered here. The mode is active in one thread only.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ASKING:
            caller = _caller()
            if func is torch.Tensor.item and caller in _ITEM:
                return args[0].detach()
            if func is torch.Tensor.__bool__ and caller in _NAN:
                return False
            if func is torch.Tensor.register_hook and caller in _NAN:
                return None  # the same question about the gradient
            # Enumeration drops terms of probability zero, whose cost may be infinite. How many
            # there are depends on values, so here they stay, at cost zero.
            if func is torch.Tensor.all and caller in _ALL:
                return True
            if func in _PRODUCT and caller in _DOT:
                probability, cost = args[:2]
                args = (probability, torch.where(probability > 0, cost, 0.0))
        return func(*args, **(kwargs or {}))


def _caller() -> Any:
    """Code object of the function that made the current call, torch's and modes' own left out."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").startswith("torch.")
        or frame.f_code.co_name == "__torch_function__"
    ):
        frame = frame.f_back
    return frame.f_code
