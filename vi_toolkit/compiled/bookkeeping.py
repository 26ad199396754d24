"""Answers Pyro's own questions about tensor values while a step is recorded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vi_toolkit.pyro_private import value_readers

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
            readers, caller = value_readers(), _caller(inspect.currentframe())
            if func is torch.Tensor.item and caller in readers.item:
                return args[0].detach()
            if func is torch.Tensor.__bool__ and caller in readers.nan:
                return False
            if func is torch.Tensor.register_hook and caller in readers.nan:
                return None  # the same question about the gradient
            # Enumeration drops terms of probability zero, whose cost may be infinite. How many
            # there are depends on values, so here they stay, at cost zero.
            if func is torch.Tensor.all and caller in readers.all:
                return True
            if func in _PRODUCT and caller in readers.dot:
                probability, cost = args[:2]
                args = (probability, torch.where(probability > 0, cost, 0.0))
        return func(*args, **(kwargs or {}))


def _caller(frame: FrameType | None) -> Any:
    """Code object of the function that made a call, torch's and modes' own left out.

    Args:
        frame: where the mode handles the call.
    """
    assert frame is not None  # CPython has frames
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").startswith("torch.")
        or frame.f_code.co_name == "__torch_function__"
    ):
        frame = frame.f_back
    return frame.f_code
