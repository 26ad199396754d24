"""Gradient estimators: ``pyro.infer.ELBO`` subclasses, usable with ``pyro.infer.SVI`` too."""

from vi_toolkit.estimators.baselines import ControlVariate, LeaveOneOut, Neural, RunningMean
from vi_toolkit.estimators.enumerate import Enumerate
from vi_toolkit.estimators.path_derivative import PathDerivative
from vi_toolkit.estimators.reparam import Reparam
from vi_toolkit.estimators.score import Score

__all__ = [
    "ControlVariate",
    "Enumerate",
    "LeaveOneOut",
    "Neural",
    "PathDerivative",
    "Reparam",
    "RunningMean",
    "Score",
]
