"""Variational inference in Pyro that says whether to believe it.

``fit`` runs it, ``compare`` sets it beside a reference posterior, ``Fit`` holds what came out.
"""

from vi_toolkit.comparison import Comparison, compare
from vi_toolkit.diagnostics import (
    VSBC,
    Diagnosis,
    ErrorBounds,
    Evidence,
    LocalParetoK,
    PredictiveCheck,
    convergence,
    diagnose,
    error_bounds,
    importance_moments,
    linear_response,
    local_psis,
    log_evidence,
    pareto_k,
    predictive_check,
    psis,
    vsbc,
    when_converged,
)
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
from vi_toolkit.estimators import (
    ControlVariate,
    Enumerate,
    LeaveOneOut,
    Neural,
    PathDerivative,
    Reparam,
    RunningMean,
    Score,
)
from vi_toolkit.fitting import Fit, fit
from vi_toolkit.gradient_report import GradientReport, gradient_report
from vi_toolkit.reference import Reference
from vi_toolkit.storage import load

__all__ = [
    "VSBC",
    "Comparison",
    "CompileError",
    "CompileWarning",
    "ControlVariate",
    "ConvergenceWarning",
    "Diagnosis",
    "Enumerate",
    "ErrorBounds",
    "Evidence",
    "Fit",
    "GradientReport",
    "LeaveOneOut",
    "LoadError",
    "LocalParetoK",
    "Neural",
    "NonFiniteError",
    "NotDeterministicError",
    "PathDerivative",
    "PredictiveCheck",
    "PreflightError",
    "Reference",
    "ReferenceError",
    "Reparam",
    "RunningMean",
    "Score",
    "VIError",
    "compare",
    "convergence",
    "diagnose",
    "error_bounds",
    "fit",
    "gradient_report",
    "importance_moments",
    "linear_response",
    "load",
    "local_psis",
    "log_evidence",
    "pareto_k",
    "predictive_check",
    "psis",
    "vsbc",
    "when_converged",
]
