"""Variational inference in Pyro that says whether to believe it.

``fit`` runs it, ``compare`` sets it beside a reference posterior, ``Fit`` holds what came out.
"""

from vi_toolkit.comparison import Comparison, compare
from vi_toolkit.errors import (
    CompileError,
    CompileWarning,
    ConvergenceWarning,
    LoadError,
    NonFiniteError,
    NotDeterministicError,
    PreflightError,
    ReferenceError,
    VIError,
)
from vi_toolkit.estimators import Reparam
from vi_toolkit.fitting import Fit, fit
from vi_toolkit.reference import Reference
from vi_toolkit.storage import load

__all__ = [
    "Comparison",
    "CompileError",
    "CompileWarning",
    "ConvergenceWarning",
    "Fit",
    "LoadError",
    "NonFiniteError",
    "NotDeterministicError",
    "PreflightError",
    "Reference",
    "ReferenceError",
    "Reparam",
    "VIError",
    "compare",
    "fit",
    "load",
]
