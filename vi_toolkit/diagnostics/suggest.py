"""Richer guides, fitted to the same posterior: which one helps, and by how much."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pyro.poutine as poutine
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal
from pyro.infer.inspect import get_dependencies
from pyro.infer.reparam import LocScaleReparam

from vi_toolkit.agreement import STANDARD_ERRORS
from vi_toolkit.choice import MOST_LATENTS
from vi_toolkit.diagnostics.pareto import USABLE, psis
from vi_toolkit.errors import ConvergenceWarning, VIError
from vi_toolkit.figures import COLOURS, GREY, INK, LIMIT, STYLE, Figure
from vi_toolkit.fitting import fit as refit
from vi_toolkit.programs.sites import latent_sites
from vi_toolkit.result import Fit

Candidate = tuple[Callable[..., Any], Any]  # model and guide

LEAST_GAIN = 0.05  # nats; a smaller gain is no reason to change the guide
RANK = 20


@dataclass(frozen=True, eq=False)
class GuideSuggestion:
    """What :func:`suggest_guide` measured.

    Attributes:
        table: a row per candidate and one for the fit itself, with ``ELBO`` from fresh draws and
            ``ELBO_se``, ``gain`` over the fit and ``gain_se``, ``k-hat`` and ``effective fraction``
            of the importance weights, ``converged`` and ``seconds``.
        best: name of the candidate with the largest gain; None if no gain is both above 0.05 nats
            and statistically significant.
        fit: the fit of the best candidate; the given one if there is none.
        failed: candidate -> the error that ended its fit.
    """

    table: pd.DataFrame
    best: str | None
    fit: Fit
    failed: dict[str, str]

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        now = self.table.iloc[0]
        if self.best is None:
            tried = ", ".join(self.table.index[1:]) or "none, because nothing else applies"
            return f"keep the guide: no other gains {LEAST_GAIN} nats (tried: {tried})"
        row = self.table.loc[self.best]
        return (
            f"fit {self.best}: its ELBO is {row['gain']:.3f} ± {row['gain_se']:.3f} nats larger, "
            f"and its k-hat is {row['k-hat']:.2f} instead of {now['k-hat']:.2f}"
        )

    def __repr__(self) -> str:
        return f"Suggestion: {self.meaning}\n{self.table.to_string(float_format='{:.3f}'.format)}"

    def plot(self) -> Figure:
        """Figure with the gain of every candidate, in nats, and its k-hat."""
        table = self.table.iloc[::-1]
        heights = np.arange(len(table))
        labels = ["\n".join(textwrap.wrap(str(name), 34)) for name in table.index]
        colours = [COLOURS[2 if name == self.best else 0] for name in table.index]
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(8.2, 1.2 + 0.5 * len(table)), layout="constrained")
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
            left.barh(heights, table["gain"], height=0.5, color=colours)
            left.errorbar(table["gain"], heights, xerr=2 * table["gain_se"], fmt="none", ecolor=INK,
                          lw=1)  # fmt: skip
            left.axvline(0, color=GREY, lw=0.8)
            left.set_yticks(heights, labels)
            left.set_ylim(-0.6, len(table) - 0.4)
            left.set_xlabel("ELBO over that of the fit (nats)")
            left.set_title(f"Best: {self.best}" if self.best else "None is better")
            right.scatter(table["k-hat"], heights, c=colours, s=22)
            right.axvline(USABLE, **LIMIT)
            k = table["k-hat"]
            right.set_xlim(min(0, 1.1 * float(k.min())), max(1, 1.1 * float(k.max())))
            right.tick_params(axis="y", length=0)
            right.set_xlabel("k-hat")
        return figure


def suggest_guide(
    fit: Fit,
    candidates: Mapping[str, Candidate] | None = None,
    num_draws: int = 10_000,
    seed: int = 0,
) -> GuideSuggestion:
    """Fit richer guides to the same posterior and name the one with the largest ELBO.

    All candidates have the same evidence, so a larger ELBO means a smaller divergence from the
    posterior. By default the candidates are a full covariance (of low rank beyond 500 latents), and
    the same with hierarchical latents written non-centred (Pyro's ``LocScaleReparam``:
    theta = mu + tau z). Non-centring makes the guide of theta depend on mu and tau, as the
    posterior does. Each is tried only if it applies.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        candidates: label -> (model, guide) to try instead; the models must have the same evidence.
        num_draws: number of draws behind every ELBO and k-hat.
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
    candidates = _default_candidates(fit) if candidates is None else candidates
    rows = {"as it is": _row(fit, num_draws, seed)}
    fits: dict[str, Fit] = {}
    failed = {}
    for label, (model, guide) in candidates.items():
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


def _row(fit: Fit, num_draws: int, seed: int) -> dict[str, Any]:
    elbo, elbo_se = fit.elbo_estimate(num_draws, seed)
    k = psis(fit, num_draws, repetitions=4, seed=seed)
    return {
        "ELBO": elbo,
        "ELBO_se": elbo_se if math.isfinite(elbo_se) else 0.0,
        "k-hat": k.k,
        "effective fraction": k.effective_fraction,
        "converged": fit.converged,
        "seconds": fit.seconds,
    }


def _default_candidates(fit: Fit) -> dict[str, Candidate]:
    """The richer guides that apply to a fit: label -> (model, guide)."""
    sites = latent_sites(fit.workspace.model_trace).values()
    size = sum(site["value"].numel() for site in sites)
    wide: Any = AutoMultivariateNormal
    if size > MOST_LATENTS["full-rank"]:
        wide = AutoLowRankMultivariateNormal(fit.model, rank=RANK)
    name = wide.__name__ if isinstance(wide, type) else f"{type(wide).__name__}(rank={RANK})"
    out: dict[str, Candidate] = {}
    if fit.guide_family not in ("full-rank", "low-rank"):
        out[name] = (fit.model, wide)
    centred = hierarchical(fit)
    if centred:
        model = poutine.reparam(fit.model, config={s: LocScaleReparam(0.0) for s in centred})
        if not isinstance(wide, type):
            wide = AutoLowRankMultivariateNormal(model, rank=RANK)
        out[f"{name} with {', '.join(centred)} non-centred"] = (model, wide)
    return out


def hierarchical(fit: Fit) -> list[str]:
    """Latents that can be non-centred: their prior has a location and scale from other latents."""
    workspace = fit.workspace
    with workspace.isolated():
        dependencies: Any = get_dependencies(fit.model, model_kwargs=workspace.data)
    priors = dependencies["prior_dependencies"]
    latents = latent_sites(workspace.model_trace)
    found = []
    for name, site in latents.items():
        fn = site["fn"]
        while isinstance(fn, dist.Independent):
            fn = fn.base_dist
        parents = [p for p in priors.get(name, {}) if p != name and p in latents]
        if parents and isinstance(fn, dist.Normal | dist.StudentT):
            found.append(name)
    return found
