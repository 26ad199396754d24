"""Variational inference in Pyro that says whether to believe it.

``fit`` runs it, ``compare`` sets it beside a reference posterior, ``Fit`` holds what came out.
"""

from vi_toolkit.comparison import compare, plot_comparisons
from vi_toolkit.diagnostics.bounds import error_bounds
from vi_toolkit.diagnostics.chains import warm_chains
from vi_toolkit.diagnostics.convergence import convergence
from vi_toolkit.diagnostics.evidence import log_evidence
from vi_toolkit.diagnostics.gradient_report import gradient_report
from vi_toolkit.diagnostics.linear_response import linear_response
from vi_toolkit.diagnostics.local_psis import local_psis
from vi_toolkit.diagnostics.missed_modes import missed_modes
from vi_toolkit.diagnostics.pareto import pareto_k, psis
from vi_toolkit.diagnostics.predictive import predictive_check
from vi_toolkit.diagnostics.suggest import suggest_guide
from vi_toolkit.diagnostics.verdict import diagnose
from vi_toolkit.diagnostics.vsbc import vsbc
from vi_toolkit.errors import (
    CompileError,
    CompileWarning,
    ConvergenceWarning,
    InvalidReferenceError,
    LoadError,
    NonFiniteError,
    NotDeterministicError,
    PreflightError,
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
from vi_toolkit.fitting import fit
from vi_toolkit.reference.reference import Reference
from vi_toolkit.result import Fit, load
from vi_toolkit.version import __version__

__all__ = [
    "CompileError",
    "CompileWarning",
    "ControlVariate",
    "ConvergenceWarning",
    "Enumerate",
    "Fit",
    "InvalidReferenceError",
    "LeaveOneOut",
    "LoadError",
    "Neural",
    "NonFiniteError",
    "NotDeterministicError",
    "PathDerivative",
    "PreflightError",
    "Reference",
    "Reparam",
    "RunningMean",
    "Score",
    "VIError",
    "__version__",
    "compare",
    "convergence",
    "diagnose",
    "error_bounds",
    "fit",
    "gradient_report",
    "linear_response",
    "load",
    "local_psis",
    "log_evidence",
    "missed_modes",
    "pareto_k",
    "plot_comparisons",
    "predictive_check",
    "psis",
    "suggest_guide",
    "vsbc",
    "warm_chains",
]
