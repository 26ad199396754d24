"""Which richer guide helps, and by how much: found by fitting it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyro.distributions as dist
import pyro.poutine as poutine
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal
from pyro.infer.inspect import get_dependencies
from pyro.infer.reparam import LocScaleReparam

from vi_toolkit.agreement import STANDARD_ERRORS
from vi_toolkit.choice import MOST_LATENTS
from vi_toolkit.diagnostics.pareto import psis
from vi_toolkit.errors import ConvergenceWarning, VIError
from vi_toolkit.fitting import fit as refit
from vi_toolkit.programs.sites import latent_sites
from vi_toolkit.result import Fit

if TYPE_CHECKING:
    from vi_toolkit.figures import Figure

Candidate = tuple[Callable[..., Any], Any]

LEAST_GAIN = 0.05  # nats: less is nothing to change a guide for
RANK = 20


@dataclass(frozen=True, eq=False)
class GuideSuggestion:
    """What :func:`suggest_guide` measured.

    Attributes:
        table: a row per candidate and one for the fit itself: ``ELBO`` and its standard error on
            fresh draws, ``gain`` over the fit with its own, ``k-hat``, ``effective fraction`` of
            the importance weights, ``converged``, ``seconds``.
        best: the candidate with the largest gain, None if none gains 0.05 nats for certain.
        fit: its fit; the one given if there is none.
        failed: candidate -> why it could not be fitted.
    """

    table: pd.DataFrame
    best: str | None
    fit: Fit
    failed: dict[str, str]

    @property
    def meaning(self) -> str:
        """In plain words."""
        now = self.table.iloc[0]
        if self.best is None:
            tried = ", ".join(self.table.index[1:]) or "nothing else applies"
            return f"keep the guide: no other gains {LEAST_GAIN} nats (tried: {tried})"
        row = self.table.loc[self.best]
        return (
            f"fit {self.best}: its ELBO is {row['gain']:.3f} ± {row['gain_se']:.3f} nats larger, "
            f"and k-hat {row['k-hat']:.2f} instead of {now['k-hat']:.2f}"
        )

    def plot(self) -> Figure:
        """Gain and k-hat of every candidate."""
        from vi_toolkit.figures import plot_suggestion

        return plot_suggestion(self)

    def __repr__(self) -> str:
        return f"Suggestion: {self.meaning}\n{self.table.to_string(float_format='{:.3f}'.format)}"


def suggest_guide(
    fit: Fit,
    candidates: Mapping[str, Candidate] | None = None,
    num_draws: int = 10_000,
    seed: int = 0,
) -> GuideSuggestion:
    """Fit richer guides to the same posterior, and name the one with the largest ELBO.

    The evidence is the same for all, so a larger ELBO is a smaller divergence from the posterior.
    Tried, where they apply: a full covariance (of low rank beyond 500 latents), and the same after
    writing hierarchical latents non-centred (Pyro's ``LocScaleReparam``: theta = mu + tau z), which
    makes the guide of theta depend on mu and tau as the posterior does.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        candidates: label -> (model, guide) to try instead; models with the same evidence.
        num_draws: behind every ELBO and k-hat.
        seed: of the fits and draws.

    Returns:
        A :class:`GuideSuggestion`; its ``fit`` can be used at once.

    References:
        Papaspiliopoulos, Roberts and Sköld, "A General Framework for the Parametrization of
        Hierarchical Models", 2007; Gorinova, Moore and Hoffman, "Automatic Reparameterisation of
        Probabilistic Programs", ICML 2020.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> tril = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> def model():
        ...     pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
        >>> vi.suggest_guide(vi.fit(model, AutoNormal, {}, progress=False)).best
        'AutoMultivariateNormal'
    """
    tried = _candidates(fit) if candidates is None else dict(candidates)
    rows = {"as it is": _row(fit, num_draws, seed)}
    fits: dict[str, Fit] = {}
    failed = {}
    for label, (model, guide) in tried.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                fits[label] = refit(model, guide, fit.data, seed=seed, progress=False)
            rows[label] = _row(fits[label], num_draws, seed)
        except (VIError, ValueError, RuntimeError, NotImplementedError) as error:
            failed[label] = f"{type(error).__name__}: {error}".split("\n")[0]
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("guide")
    first = table.iloc[0]
    table.insert(2, "gain", table["ELBO"] - first["ELBO"])
    both = (table["ELBO_se"] ** 2 + first["ELBO_se"] ** 2) ** 0.5
    table.insert(3, "gain_se", both.where(table.index != "as it is", 0.0))
    sure = table["gain"] - STANDARD_ERRORS * table["gain_se"]
    better = table.index[(table["gain"] > LEAST_GAIN) & (sure > 0)]
    best = str(table.loc[better, "gain"].idxmax()) if len(better) else None
    return GuideSuggestion(table, best, fits[best] if best else fit, failed)


def _row(of: Fit, num_draws: int, seed: int) -> dict[str, Any]:
    elbo, error = of.elbo_estimate(num_draws, seed)
    k = psis(of, num_draws, repetitions=4, seed=seed)
    return {
        "ELBO": elbo,
        "ELBO_se": error if math.isfinite(error) else 0.0,
        "k-hat": k.k,
        "effective fraction": k.effective_fraction,
        "converged": of.converged,
        "seconds": of.seconds,
    }


def _candidates(of: Fit) -> dict[str, Candidate]:
    size = sum(site["value"].numel() for site in latent_sites(of.workspace.model_trace).values())
    wide: Any = AutoMultivariateNormal
    if size > MOST_LATENTS["full-rank"]:
        wide = AutoLowRankMultivariateNormal(of.model, rank=RANK)
    name = wide.__name__ if isinstance(wide, type) else f"{type(wide).__name__}(rank={RANK})"
    out: dict[str, Candidate] = {}
    if of.guide_family not in ("full-rank", "low-rank"):
        out[name] = (of.model, wide)
    centred = hierarchical(of)
    if centred:
        model = poutine.reparam(of.model, config={s: LocScaleReparam(0.0) for s in centred})
        if not isinstance(wide, type):
            wide = AutoLowRankMultivariateNormal(model, rank=RANK)
        out[f"{name} with {', '.join(centred)} non-centred"] = (model, wide)
    return out


def hierarchical(of: Fit) -> list[str]:
    """Latents with a location-scale prior around other latents: those that can be non-centred."""
    with of.workspace.isolated():
        dependencies: Any = get_dependencies(of.model, model_kwargs=of.workspace.data)
    priors = dependencies["prior_dependencies"]
    latents = latent_sites(of.workspace.model_trace)
    found = []
    for name, site in latents.items():
        fn = site["fn"]
        while isinstance(fn, dist.Independent):
            fn = fn.base_dist
        parents = [p for p in priors.get(name, {}) if p != name and p in latents]
        if parents and isinstance(fn, dist.Normal | dist.StudentT):
            found.append(name)
    return found
