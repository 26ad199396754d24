"""The sites of a Pyro trace: which are latent, observed, plates, factors or points."""

from __future__ import annotations

from typing import Any

from pyro.poutine.util import site_is_subsample


def latent_sites(trace: Any) -> dict[str, dict[str, Any]]:
    """The latent sample sites of a model's trace (plates and auxiliary sites left out)."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def observed_sites(trace: Any) -> dict[str, dict[str, Any]]:
    """The observed sample sites of a model's trace."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")  # pyro.deterministic
        and type(site["fn"]).__name__ != "Unit"  # pyro.factor
    }
