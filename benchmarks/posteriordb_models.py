"""Pyro models of five posteriordb posteriors (Magnusson et al., 2022), as a user would write them.

Predictors are on their raw scale and nothing is vectorised over particles. Each density is the one
its posteriordb name stands for; another prior would be another posterior.

Example::

    posterior = MODELS["kidiq-kidscore_momiq"]
    fit = vi.fit(posterior.model, AutoMultivariateNormal, posterior.prepare(raw))
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

Columns = dict[str, np.ndarray]
"""Reference draws as posteriordb stores them: "beta[2]", say, -> array of shape (draws,)."""


def columns_to_sites(columns: Columns) -> dict[str, Tensor]:
    """Gather the columns "beta[1]", "beta[2]", ... into a site "beta" of shape (draws, 2).

    Indices count from 1, as in Stan; "Gamma[2,1]" is an entry of a matrix. Columns without an index
    are scalar sites.

    Example: ``columns_to_sites({"a": np.zeros(9), "b[1]": np.zeros(9)})["b"].shape == (9, 1)``
    """
    entries: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for name, column in columns.items():
        matched = re.fullmatch(r"([^\[]+)(?:\[([\d,]+)\])?", name)
        if matched is None:
            raise ValueError(
                f"cannot read the column name {name!r}: expected name, name[1] or name[1,2]"
            )
        site, index = matched.groups()
        position = tuple(int(i) - 1 for i in index.split(",")) if index else ()
        entries.setdefault(site, {})[position] = np.asarray(column, dtype=np.float64)
    sites = {}
    for site, parts in entries.items():
        shape = tuple(1 + max(position) for position in zip(*parts, strict=True))
        values = np.full((len(next(iter(parts.values()))), *shape), np.nan)
        for position, column in parts.items():
            values[(slice(None), *position)] = column
        sites[site] = torch.from_numpy(values)
    return sites


class Posterior(NamedTuple):
    """A Pyro model, and how a data file becomes its arguments and reference columns its sites."""

    model: Callable[..., Any]
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    to_sites: Callable[[Columns], dict[str, Tensor]] = columns_to_sites


def _vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def eight_schools(y: Tensor, standard_error: Tensor) -> None:
    """Eight schools (Rubin, 1981), non-centred: standard Normal effects eta, scaled by tau."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, standard_error), obs=y)


def eight_schools_data(raw: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": _vector(raw["y"]), "standard_error": _vector(raw["sigma"])}


def eight_schools_sites(columns: Columns) -> dict[str, Tensor]:
    """The file holds theta = mu + tau eta; the model samples eta."""
    sites = columns_to_sites(columns)
    theta = sites.pop("theta")
    sites["eta"] = (theta - sites["mu"][:, None]) / sites["tau"][:, None]
    return sites


def kidscore_momiq(mom_iq: Tensor, kid_score: Tensor) -> None:
    """Children's scores on their mothers' IQ (Gelman and Hill, 2007, ch. 3); flat prior on beta."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("children", len(kid_score)):
        pyro.sample("kid_score", dist.Normal(beta[0] + beta[1] * mom_iq, sigma), obs=kid_score)


def kidscore_momiq_data(raw: dict[str, Any]) -> dict[str, Tensor]:
    return {name: _vector(raw[name]) for name in ("mom_iq", "kid_score")}


def linear_regression(X: Tensor, y: Tensor) -> None:
    """Linear regression, on a design with correlated (sblrc) or independent (sblri) columns."""
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([X.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def linear_regression_data(raw: dict[str, Any]) -> dict[str, Tensor]:
    return {"X": torch.tensor(raw["X"], dtype=torch.float64), "y": _vector(raw["y"])}


def gaussian_mixture(y: Tensor) -> None:
    """Two Normal components with ordered means, the indicators summed out."""
    # The ordered means have the density of two Normal(0, 2), restricted to mu_1 < mu_2. A Normal
    # pushed through the ordering transform would be another density, so the support and the
    # density are stated one after the other.
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    components = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(components, dist.Normal(mu, sigma)), obs=y)


def gaussian_mixture_data(raw: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": _vector(raw["y"])}


MODELS = {
    "eight_schools-eight_schools_noncentered": Posterior(
        eight_schools, eight_schools_data, eight_schools_sites
    ),
    "kidiq-kidscore_momiq": Posterior(kidscore_momiq, kidscore_momiq_data),
    "sblrc-blr": Posterior(linear_regression, linear_regression_data),
    "sblri-blr": Posterior(linear_regression, linear_regression_data),
    "low_dim_gauss_mix-low_dim_gauss_mix": Posterior(gaussian_mixture, gaussian_mixture_data),
}
