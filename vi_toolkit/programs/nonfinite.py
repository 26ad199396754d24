"""Finds the site and index where a log density or a gradient is not a finite number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.util import site_is_subsample

from vi_toolkit.errors import NonFiniteError


def blame(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Mapping[str, Any],
    handler: contextlib.AbstractContextManager,
    step: int,
    loss: float,
    bad_gradient: torch.Tensor | None,
) -> NonFiniteError:
    """Find the first log density or gradient that is not finite, as an error to raise.

    Args:
        model, guide, data: what the step ran.
        handler: active while they run, such as the minibatch of the step.
        step: number of the step, counted from 0.
        loss: the loss of that step.
        bad_gradient: a parameter whose gradient is not finite, if there is one.
    """
    with torch.no_grad(), handler:
        guide_trace = poutine.trace(guide).get_trace(**data)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(**data)
        found = first_non_finite(guide_trace, "guide") or first_non_finite(model_trace, "model")
    if found:
        site, index, what = found
        return NonFiniteError(
            f"The ELBO became {loss} at step {step}: {what}. The last good state is this "
            "error's .fit. A smaller learning rate, a parameter bounded away from its limit or a "
            "wider prior usually cures it.",
            site=site,
            index=index,
            step=step,
        )
    if bad_gradient is not None:
        store = pyro.get_param_store().named_parameters()
        name = next((n for n, p in store if p is bad_gradient), "?")
        assert bad_gradient.grad is not None
        index = first_index(~torch.isfinite(bad_gradient.grad))
        return NonFiniteError(
            f"The gradient of parameter {name!r} became non-finite at step {step}, index "
            f"{list(index)}, though every log density is finite (often a square root or a norm at "
            "zero). The last good state is this error's .fit.",
            site=name,
            index=index,
            step=step,
        )
    return NonFiniteError(f"The ELBO became {loss} at step {step}.", step=step)


def first_index(where: torch.Tensor) -> tuple[int, ...]:
    """Index of the first true entry; () for a scalar."""
    flat_index = int(where.reshape(-1).int().argmax())
    return tuple(int(i) for i in np.unravel_index(flat_index, tuple(where.shape) or (1,)))[
        : where.dim()
    ]


def first_non_finite(trace: Any, owner: str) -> tuple[str, tuple[int, ...], str] | None:
    """(site, index, sentence) of the first non-finite value or log density in a trace.

    Args:
        trace: of the model or guide.
        owner: "model" or "guide", for the sentence.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        value = site["value"]
        if torch.is_tensor(value) and value.is_floating_point():
            bad = ~torch.isfinite(value)
            if bad.any():
                index = first_index(bad)
                shown = float(value[index])
                return name, index, f"the {owner}'s site {name!r} is {shown} at index {list(index)}"
        log_prob = site["fn"].log_prob(value)
        bad = ~torch.isfinite(log_prob)
        if bad.any():
            index = first_index(bad)
            shown = float(log_prob[index])
            return (
                name,
                index,
                f"the log density of the {owner}'s site {name!r} is {shown} at index {list(index)}",
            )
    return None
