"""Fits as ArviZ data, with attributes that say what the draws are and are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vi_toolkit.arviz_adapter import from_dict
from vi_toolkit.fit_protocol import FitLike
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.prototype import prototype
from vi_toolkit.programs.sites import observed_sites
from vi_toolkit.version import __version__

NOTE = (
    "Independent draws from a variational approximation, not a Markov chain: R-hat and effective "
    "sample size say nothing about how good the approximation is. Compare it with a reference."
)


def to_arviz(
    fit: FitLike,
    num_draws: int = 1000,
    seed: int = 0,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """The fit as ArviZ ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x).

    Groups: ``posterior`` (deterministic sites included), ``posterior_predictive``,
    ``log_likelihood`` and ``observed_data``, the first three at the same draws and with one chain,
    because independent draws have no chains.

    Args:
        fit: the fit.
        num_draws: number of posterior draws.
        seed: of these draws.
        dims: site -> names of its dimensions, as ArviZ takes them.
        coords: dimension name -> labels.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fit = vi.fit(model, AutoNormal, {"y": torch.ones(3)}, progress=False)
        >>> fit.to_arviz(num_draws=100)["posterior"]["mu"].shape
        (1, 100)
    """
    posterior = fit.sample(num_draws, seed=seed)
    # Draws come in the data's precision; so must what the model makes beside them.
    dtype = next((v.dtype for v in posterior.values() if v.is_floating_point()), None)
    with isolated_pyro_state(rng_state=seeded_state(seed), dtype=dtype):
        observed = {
            name: site["value"]
            for name, site in observed_sites(prototype(fit.model, fit.data)).items()
        }
    # Without observed sites there is nothing to predict or to score: only the posterior.
    predicted = fit.predict(draws=posterior, seed=seed) if observed else {}
    whole = (
        observed and not fit.workspace.summed_out
    )  # else there is no density of a datum by itself
    log_likelihood = fit.log_likelihood(draws=posterior) if whole else {}
    groups = {
        # predict returns deterministic sites too; they are functions of the posterior draws.
        "posterior": posterior | {k: v for k, v in predicted.items() if k not in observed},
        "posterior_predictive": {k: v for k, v in predicted.items() if k in observed},
        "log_likelihood": log_likelihood,
        "observed_data": observed,
    }
    arrays = {
        # A chain dimension of one in front, except for the data.
        group: {k: _numpy(v) if group == "observed_data" else _numpy(v)[None] for k, v in x.items()}
        for group, x in groups.items()
        if x
    }
    tree = from_dict(arrays, dims, coords)
    attributes = _attributes(fit, seed)
    for node in (tree, tree["posterior"]):
        node.attrs.update(attributes)
    return tree


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _attributes(fit: FitLike, seed: int) -> dict[str, Any]:
    """What a reader of the file must know; numbers and text only, so that netCDF can hold them."""
    return {
        "inference_library": "vi_toolkit",
        "inference_library_version": __version__,
        "method": fit.method,
        "guide_family": fit.guide_family or "unknown",
        "elbo": float(fit.elbo[-1]) if len(fit.elbo) else float("nan"),
        "converged": int(fit.converged),
        "monte_carlo_error": float(fit.monte_carlo_error),
        "seed": int(fit.seed),
        "draws_seed": int(seed),
        "note": NOTE,
    }
