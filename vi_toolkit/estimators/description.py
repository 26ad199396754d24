"""Estimators as plain data and back, for saved fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vi_toolkit.estimators.baselines import ControlVariate, LeaveOneOut, RunningMean
from vi_toolkit.estimators.enumerate import Enumerate
from vi_toolkit.estimators.path_derivative import PathDerivative
from vi_toolkit.estimators.reparam import Reparam
from vi_toolkit.estimators.score import Score

# Those that can be made from names and numbers; a network (Neural) or one of Pyro's ELBOs cannot.
_ESTIMATORS = {kind.__name__: kind for kind in (Reparam, PathDerivative, Score, Enumerate)}
_BASELINES = {kind.__name__: kind for kind in (RunningMean, LeaveOneOut, ControlVariate)}


def describe(value: Any) -> Any:
    """An estimator or a baseline as names and numbers; None if that is impossible."""
    if type(value) in _BASELINES.values():
        return {"kind": type(value).__name__, "options": value.options()}
    if type(value) not in _ESTIMATORS.values():
        return None
    options = value.options()
    baseline = options.get("baseline")
    if isinstance(baseline, Mapping):
        options["baseline"] = {site: describe(one) for site, one in baseline.items()}
        if any(one and not options["baseline"][site] for site, one in baseline.items()):
            return None
    elif baseline is not None:
        options["baseline"] = describe(baseline)
        if options["baseline"] is None:
            return None
    return {"kind": type(value).__name__, "options": options}


def make(description: Mapping[str, Any]) -> Any:
    """Make an estimator or a baseline from its :func:`describe`."""
    options = dict(description["options"])
    baseline = options.get("baseline")
    if baseline is not None:
        single = set(baseline) == {"kind", "options"}
        options["baseline"] = (
            make(baseline)
            if single
            else {site: one and make(one) for site, one in baseline.items()}
        )
    return {**_ESTIMATORS, **_BASELINES}[description["kind"]](**options)
