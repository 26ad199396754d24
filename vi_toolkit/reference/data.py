"""Data for a reference: in double precision on the CPU, and checked against the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine

from vi_toolkit.preflight.causes import cause
from vi_toolkit.preflight.data import check_arguments, check_data
from vi_toolkit.preflight.runs import numerical, run_model
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state


def in_double(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with every tensor on the CPU and every floating tensor in float64.

    NUTS and quadrature evaluate one small density after another, which is fastest on the CPU.
    """

    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.cpu().double() if x.is_floating_point() else x.cpu()

    return {name: moved(x) for name, x in data.items()}


def checked(model: Callable[..., Any], data: Any) -> dict[str, Any]:
    """The data from :func:`in_double`, once the model has run on them.

    Raises:
        PreflightError: the data cannot be passed to the model, or the model raises on them.
    """
    if isinstance(data, Mapping):
        data = in_double(data)  # before the checks, because mixed precision does no harm here
    check_data(data)
    check_arguments("model", model, data)
    with (
        isolated_pyro_state(rng_state=seeded_state(0), dtype=torch.float64, validate=True),
        warnings.catch_warnings(),
        poutine.block(),
    ):
        warnings.simplefilter("ignore")
        attempt = run_model(model, data)
        # A numerical error at one draw from the prior does not rule out a good posterior.
        if attempt.error is not None and not numerical(attempt.error):
            raise cause("model", attempt, data, partial(run_model, model)) from attempt.error
    return dict(data)
