"""What a site of a Pyro trace is: latent, observed, a plate, a factor or a point mass.

A *site* is one node of a trace: a dict with the keys ``type``, ``name``, ``fn``, ``value``,
``is_observed``, ``infer``, ``cond_indep_stack`` and more.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.infer.inspect import site_is_deterministic
from pyro.poutine.util import site_is_subsample

Site = Any


def is_plate(site: Site) -> bool:
    """Whether the site is a plate's choice of rows, not a random variable of the model."""
    return site["type"] == "sample" and site_is_subsample(site)


def is_partial_plate(site: Site) -> bool:
    """Whether the site is a plate that holds only some of its rows."""
    return is_plate(site) and len(site["value"]) < getattr(site["fn"], "size", 0)


def is_factor(site: Site) -> bool:
    """Whether the site is a ``pyro.factor``: a term of the log density, without a value."""
    return site["type"] == "sample" and isinstance(core(site["fn"]), dist.Unit)


def is_deterministic(site: Site) -> bool:
    """Whether the site is a ``pyro.deterministic``: a value computed from others."""
    return bool(site_is_deterministic(site))


def is_point(site: Site) -> bool:
    """Whether the site's distribution is a point mass, so that its value is not random."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def is_drawn(site: Site) -> bool:
    """Whether a guide draws a random value here."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not is_plate(site)
        and not is_point(site)
    )


def is_term(site: Site) -> bool:
    """Whether the site adds a term to the log density."""
    return site["type"] == "sample" and not is_plate(site)


def plates(site: Site) -> dict[str, Any]:
    """Name -> frame of the vectorised plates around a site."""
    return {f.name: f for f in site["cond_indep_stack"] if f.vectorized}


def plate_dims(site: Site) -> dict[str, int]:
    """Name -> dimension of the vectorised plates around a site."""
    return {name: frame.dim for name, frame in plates(site).items()}


def core(fn: Any) -> Any:
    """The distribution inside wrappers that change neither its family nor its support."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def latent_sites(trace: Any) -> dict[str, Site]:
    """Name -> site of the latents in a model's trace; plates are no latents."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not is_plate(site)
    }


def observed_sites(trace: Any) -> dict[str, Site]:
    """Name -> site of the data in a model's trace; factors and computed values are no data."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not (is_plate(site) or is_deterministic(site) or is_factor(site))
    }
