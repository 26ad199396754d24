"""Whether to believe a fit: one diagnostic per file, and :func:`diagnose`, which climbs them."""

from vi_toolkit.diagnostics.bounds import ErrorBounds, error_bounds
from vi_toolkit.diagnostics.chains import WarmChains, warm_chains
from vi_toolkit.diagnostics.convergence import Convergence, convergence
from vi_toolkit.diagnostics.evidence import Evidence, log_evidence
from vi_toolkit.diagnostics.importance import ImportanceMoments, importance_moments
from vi_toolkit.diagnostics.linear_response import LinearResponse, linear_response
from vi_toolkit.diagnostics.local_psis import LocalParetoK, local_psis
from vi_toolkit.diagnostics.missed_modes import MissedMode, missed_modes
from vi_toolkit.diagnostics.pareto import ParetoK, pareto_k, psis
from vi_toolkit.diagnostics.predictive import PredictiveCheck, predictive_check
from vi_toolkit.diagnostics.suggest import GuideSuggestion, suggest_guide
from vi_toolkit.diagnostics.verdict import Diagnosis, diagnose
from vi_toolkit.diagnostics.vsbc import VSBC, vsbc

__all__ = [
    "VSBC",
    "Convergence",
    "Diagnosis",
    "ErrorBounds",
    "Evidence",
    "GuideSuggestion",
    "ImportanceMoments",
    "LinearResponse",
    "LocalParetoK",
    "MissedMode",
    "ParetoK",
    "PredictiveCheck",
    "WarmChains",
    "convergence",
    "diagnose",
    "error_bounds",
    "importance_moments",
    "linear_response",
    "local_psis",
    "log_evidence",
    "missed_modes",
    "pareto_k",
    "predictive_check",
    "psis",
    "suggest_guide",
    "vsbc",
    "warm_chains",
]
