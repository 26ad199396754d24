"""Posterior predictive checks: does the fitted model generate data like the observed data?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from scipy.special import logsumexp

from vi_toolkit.diagnostics.pareto import USABLE, smoothed, smoothed_with_shape
from vi_toolkit.figures import (
    COLOURS,
    LIMIT,
    REFERENCE,
    REFERENCE_CORE,
    STYLE,
    Figure,
    hide_y_axis,
)
from vi_toolkit.programs.prediction import observation_weights
from vi_toolkit.programs.sites import observed_sites
from vi_toolkit.result import Fit

NEARLY_ALL = 0.9  # of the draws
LEVEL = 0.05  # probability of a false alarm, over all checks together
CURVES = 50  # replicated data sets in the figure
STATISTICS: dict[str, Callable[[np.ndarray], Any]] = {
    "mean": np.mean,
    "sd": np.std,
    "minimum": np.min,
    "maximum": np.max,
}


@dataclass(frozen=True, eq=False)
class PredictiveCheck:
    """What :func:`predictive_check` found for one observed site with n data.

    Attributes:
        site: name of the observed site.
        table: a row per statistic T, with its value at the data, mean and sd at replicated data,
            and ``p value``, P(T(replicated) > T(data)) plus half of the probability of a tie.
        statistic_values: statistic -> its values at the replicated data, (draws,).
        observed: the data, (n,).
        replicated: replicated data, (draws, n).
        pit: leave-one-out probability integral transform of each datum, (n,), which is uniform if
            the model is right (randomised for discrete data). None if a datum is a vector or
            binary.
        probability: leave-one-out P(y = 1) of binary data, (n,); else None.
        calibration_p_value: p value of the hypothesis that ``pit`` is uniform (Kolmogorov and
            Smirnov) or that ``probability`` is calibrated (Spiegelhalter).
        elpd_loo, elpd_loo_se: expected log predictive density of left-out data, in nats, summed.
        p_loo: effective number of parameters.
        pareto_k: k-hat of each datum's weights, (n,).
        effective_fraction: effective sample size over the number of draws for each datum, (n,). If
            k-hat is 0.7 or more and this is below 0.9, the datum's terms in ``elpd_loo``, ``pit``
            and ``probability`` mean nothing. (Nearly constant weights have no tail to speak of.)
    """

    site: str
    table: pd.DataFrame
    statistic_values: dict[str, np.ndarray]
    observed: np.ndarray
    replicated: np.ndarray
    pit: np.ndarray | None
    probability: np.ndarray | None
    calibration_p_value: float
    elpd_loo: float
    elpd_loo_se: float
    p_loo: float
    pareto_k: np.ndarray
    effective_fraction: np.ndarray

    @property
    def lost(self) -> np.ndarray:
        """Whether each datum's leave-one-out weights cannot be used, (n,)."""
        return (self.pareto_k >= USABLE) & (self.effective_fraction < NEARLY_ALL)

    @property
    def failed(self) -> list[str]:
        """Checks that the model fails, with a two-sided p value below 0.05 / number of checks."""
        tails = {name: 2 * min(p, 1 - p) for name, p in self.table["p value"].items()}
        if self.loo_reliable and np.isfinite(self.calibration_p_value):
            tails["calibration"] = self.calibration_p_value
        return [str(name) for name, p in tails.items() if p < LEVEL / len(tails)]

    @property
    def loo_reliable(self) -> bool:
        """Whether the leave-one-out weights of at least 99 % of the data can be used."""
        return bool(self.lost.mean() <= 0.01)

    @property
    def meaning(self) -> str:
        """The result in a sentence or two."""
        if self.failed:
            parts = []
            for name in self.failed:
                if name == "calibration":
                    p = self.calibration_p_value
                    parts.append(f"its predictions are miscalibrated (p value {p:.1e})")
                    continue
                row = self.table.loc[name]
                parts.append(
                    f"the {name} of the data is {row['data']:.4g}, but that of replicated data is "
                    f"{row['replicated']:.4g} ± {row['replicated sd']:.2g}"
                )
            said = "the model does not generate data like these: " + "; ".join(parts)
        else:
            said = f"replicated data look like {self.site!r} in {', '.join(self.table.index)}"
            if self.loo_reliable and np.isfinite(self.calibration_p_value):
                said += ", and left-out data are predicted with the right uncertainty"
        off = int(self.lost.sum())
        if off:
            said += f". k-hat is 0.7 or more for {off} of {len(self.pareto_k)} data"
            said += (
                ", whose leave-one-out predictions cannot be used"
                if self.loo_reliable
                else ": leave-one-out says nothing here"
            )
        return said

    def __repr__(self) -> str:
        lines = [f"Predictive check: {self.meaning}."]
        if self.loo_reliable:
            lines.append(
                f"  elpd by leave-one-out {self.elpd_loo:.1f} ± {self.elpd_loo_se:.1f} nats, "
                f"{self.p_loo:.1f} effective parameters, largest k-hat {self.pareto_k.max():.2f}"
            )
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Figure of replicated data, calibration, k-hat per datum, and the test statistics."""
        statistics = list(self.table.index)[:4]
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(9, 5.2), layout="constrained")
            rows: Any = figure.subfigures(2, 1)
            first, second, third = rows[0].subplots(1, 3)
            _draw_replicated(first, self)
            _draw_calibration(second, self)
            lost, data = self.lost, np.arange(len(self.pareto_k))
            third.plot(data[~lost], self.pareto_k[~lost], ".", ms=3, color=COLOURS[0])
            third.plot(data[lost], self.pareto_k[lost], ".", ms=5, color=COLOURS[1])
            third.axhline(USABLE, **LIMIT)
            third.set_title(f"k-hat of leaving one out: {int(lost.sum())} lost")
            third.set_xlabel("datum")
            grid = rows[1].subplots(1, max(len(statistics), 3))
            for axes, name in zip(grid, statistics, strict=False):
                row, values = self.table.loc[name], self.statistic_values[name]
                low, high = np.quantile(values, (0.001, 0.999))
                axes.hist(values[(values >= low) & (values <= high)], 30, color=REFERENCE_CORE)
                axes.axvline(row["data"], color=COLOURS[1 if name in self.failed else 0], lw=1.8)
                axes.set_title(f"{name}: p = {row['p value']:.3f}")
                hide_y_axis(axes)
            for axes in grid[len(statistics) :]:
                axes.set_axis_off()
            figure.suptitle(
                f"{self.site}: data (colour) beside replicated data (grey)",
                x=0.01, ha="left", fontsize=10.5,
            )  # fmt: skip
        return figure


def predictive_check(
    fit: Fit,
    statistics: Mapping[str, Callable[[np.ndarray], Any]] | None = None,
    site: str | None = None,
    num_draws: int | None = None,
    seed: int = 0,
) -> PredictiveCheck:
    r"""Compare the data with data that the fitted model generates.

    This asks whether the model is right (Box's question), not how good the guide is. Test
    statistics of the data are compared with those of replicated data. Calibration and predictive
    density are those of left-out data, by Pareto-smoothed importance weights of draws from the
    guide q,

    .. math:: w_i \propto \frac{p(x, z)}{q(z)\, p(x_i \mid z)}.

    Observations that ``poutine.mask`` hides are left out. With ``poutine.scale`` the datum that is
    left out takes its scaled likelihood with it, and is then predicted as one ordinary datum.
    The weights correct for the guide as well as for the missing datum. Where they can be used
    (k-hat below 0.7), the result is therefore that of the exact posterior.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        statistics: name -> function of one data set, an array of the site's shape; None for mean,
            sd, minimum and maximum (for binary data, the mean).
        site: name of the observed site, if there are several.
        num_draws: number of posterior draws; None for 4,000, or fewer (at least 1,000) if there are
            more than 5,000 data.
        seed: of these draws.

    Raises:
        ValueError: no such site.

    References:
        Box, "Sampling and Bayes' Inference in Scientific Modelling and Robustness", 1980; Gelman,
        Meng and Stern, 1996; Magnusson, Andersen, Jonasson and Vehtari, "Bayesian Leave-One-Out
        Cross-Validation for Large Data", ICML 2019; Czado, Gneiting and Held, 2009 (PIT of counts);
        Spiegelhalter, "Probabilistic Prediction in Patient Management", 1986.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fit = vi.fit(model, AutoNormal, {"y": 3 * torch.randn(50)}, progress=False)
        >>> "sd" in vi.predictive_check(fit).failed
        True
    """
    num_draws = num_draws or int(np.clip(2e7 / max(fit.joint.observations, 1), 1_000, 4_000))
    posterior, weights = fit.weighted_sample(num_draws, seed=seed)
    densities = fit.log_likelihood(draws=posterior)
    if site is None and len(densities) > 1:
        raise ValueError(f"the model observes {', '.join(densities)}: name one of them with site=")
    site = site or next(iter(densities))
    if site not in densities:
        raise ValueError(f"no observed site {site!r}; there are {', '.join(densities)}")
    observed = observed_sites(fit.workspace.model_trace)[site]["value"].double().cpu().numpy()
    replicated = fit.predict(draws=posterior, seed=seed)[site].double().cpu().numpy()
    log_p = densities[site].double().cpu().numpy()
    scalar = log_p.shape[1:] == observed.shape
    counts = observation_weights(fit.workspace)[site].double().cpu().numpy()
    seen = counts > 0
    if not seen.all():  # what a mask hides is no observation
        observed, replicated, log_p = observed[seen], replicated[:, seen], log_p[:, seen]
    log_p, counts = log_p.reshape(num_draws, -1), counts[seen].reshape(-1)
    binary = scalar and bool(np.isin(observed, (0, 1)).all() and np.isin(replicated, (0, 1)).all())
    if statistics is None:
        statistics = {"mean": np.mean} if binary else STATISTICS

    log_w = weights.double().cpu().numpy()
    w, k, fraction = smoothed_with_shape(log_w - (counts * log_p).T)  # w is (n, draws)
    with np.errstate(divide="ignore"):
        smooth = np.log(w)
    elpd = logsumexp(smooth + log_p.T, 1)
    lpd = logsumexp(log_p.T, 1, b=smoothed(log_w))

    pit = probability = None
    p_value = np.nan
    if binary:
        flat = observed.reshape(-1)
        probability = np.where(flat == 1, np.exp(elpd), -np.expm1(np.minimum(elpd, 0)))
        p_value = spiegelhalter(probability, flat)
    elif scalar:
        y, drawn = observed.reshape(-1), replicated.reshape(num_draws, -1)
        below, ties = (w.T * (drawn < y)).sum(0), (w.T * (drawn == y)).sum(0)
        pit = below + np.random.default_rng(seed).uniform(size=len(y)) * ties
        p_value = float(scipy.stats.kstest(pit, "uniform").pvalue)

    values = {
        name: np.array([float(statistic(y)) for y in replicated])
        for name, statistic in statistics.items()
    }
    at_data = {name: float(statistic(observed)) for name, statistic in statistics.items()}
    return PredictiveCheck(
        site=site,
        table=_compared(at_data, values),
        statistic_values=values,
        observed=observed.reshape(-1),
        replicated=replicated.reshape(num_draws, -1),
        pit=pit,
        probability=probability,
        calibration_p_value=float(p_value),
        elpd_loo=float(elpd.sum()),
        elpd_loo_se=float(np.sqrt(len(elpd) * elpd.var())),
        p_loo=float((lpd - elpd).sum()),
        pareto_k=k,
        effective_fraction=fraction,
    )


def _compared(at_data: dict[str, float], values: dict[str, np.ndarray]) -> pd.DataFrame:
    rows = {}
    for name, here in at_data.items():
        there = values[name]
        rows[name] = {
            "data": here,
            "replicated": there.mean(),
            "replicated sd": there.std(),
            "p value": float((there > here).mean() + 0.5 * (there == here).mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("statistic")


def spiegelhalter(probability: np.ndarray, y: np.ndarray) -> float:
    r"""Two-sided p value of the hypothesis that binary y (n,) have these probabilities (n,).

    Under it the Brier score :math:`\sum (y - p)^2`, minus its expectation and divided by its sd, is
    approximately a standard Normal variable.

    Example:
        >>> p = np.full(1000, 0.9)
        >>> spiegelhalter(p, (np.arange(1000) % 10 > 0).astype(float)) > 0.9
        True
        >>> spiegelhalter(p, (np.arange(1000) % 10 > 1).astype(float)) < 1e-6
        True
    """
    lean = 1 - 2 * probability
    variance = float((lean**2 * probability * (1 - probability)).sum())
    if variance == 0:
        return float("nan")
    z = float(((y - probability) * lean).sum()) / np.sqrt(variance)
    return float(2 * scipy.stats.norm.sf(abs(z)))


def _draw_replicated(axes: Axes, found: PredictiveCheck) -> None:
    """Empirical distribution functions, which suit counts and need no bandwidth."""
    n, shown = len(found.observed), found.replicated[:CURVES]
    heights = (np.arange(n) + 0.5) / n
    for y in shown:
        axes.plot(np.sort(y), heights, drawstyle="steps", color=REFERENCE_CORE, lw=0.5, alpha=0.6)
    axes.plot(np.sort(found.observed), heights, drawstyle="steps", color=COLOURS[0], lw=1.6)
    low, high = np.quantile(np.concatenate([shown.ravel(), found.observed]), (0.002, 0.998))
    low, high = min(low, found.observed.min()), max(high, found.observed.max())
    margin = 0.05 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.set_title("Distribution function")
    axes.set_xlabel(found.site)


def _draw_calibration(axes: Axes, found: PredictiveCheck) -> None:
    if found.probability is not None:
        p, y = found.probability, found.observed
        axes.plot([0, 1], [0, 1], color="#AAAAAA", lw=0.8)
        groups = np.array_split(np.argsort(p, kind="stable"), min(10, max(2, len(p) // 10)))
        mean = np.array([p[g].mean() for g in groups])
        frequency = np.array([y[g].mean() for g in groups])
        se = np.array([np.sqrt((p[g] * (1 - p[g])).sum()) / len(g) for g in groups])
        axes.errorbar(mean, frequency, yerr=2 * se, fmt="o", ms=4, lw=1, color=COLOURS[0])
        axes.set_xlabel("predicted, left out")
        axes.set_ylabel("observed frequency")
    elif found.pit is not None:
        bins = min(20, max(5, len(found.pit) // 10))
        axes.hist(found.pit, np.linspace(0, 1, bins + 1).tolist(), color=COLOURS[0])
        expected = len(found.pit) / bins
        spread = 2 * np.sqrt(expected * (1 - 1 / bins))
        axes.axhspan(max(expected - spread, 0), expected + spread, color=REFERENCE, lw=0, zorder=0)
        axes.set_xlabel("PIT, left out")
        axes.set_yticks([])
    else:
        axes.set_axis_off()
        return
    axes.set_title(f"Calibration: p = {found.calibration_p_value:.3f}")
