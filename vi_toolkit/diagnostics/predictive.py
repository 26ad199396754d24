"""Posterior predictive checks: does the fitted model make data like the data?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.stats
from scipy.special import logsumexp

from vi_toolkit.diagnostics.pareto import USABLE, smoothed, smoothed_with_shape
from vi_toolkit.programs.sites import observed_sites

if TYPE_CHECKING:
    from vi_toolkit.figures import Figure

NEARLY_ALL = 0.9  # of the draws
LEVEL = 0.05  # chance of a false alarm, all checks together
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
        site: the observed site.
        table: a row per statistic T: its value at the data, mean and sd at replicated data, and
            ``p value``, P(T(replicated) > T(data)) with half of the ties.
        statistic_values: statistic -> its values at the replicated data, (draws,).
        observed: the data, (n,).
        replicated: (draws, n).
        pit: leave-one-out probability integral transform of every datum, (n,), uniform if the model
            is right (discrete data randomised); None where a datum is a vector.
        probability: leave-one-out P(y = 1) of binary data, (n,); else None.
        calibration_p_value: that ``pit`` is uniform (Kolmogorov and Smirnov) or ``probability``
            calibrated (Spiegelhalter).
        elpd_loo, elpd_loo_se: expected log predictive density of left-out data, in nats, summed.
        p_loo: effective number of parameters.
        pareto_k: of every datum's weights, (n,).
        effective_fraction: effective share of the draws for every datum, (n,). With k-hat of 0.7 or
            more and less than 0.9 of the draws (nearly constant weights have no tail to speak of),
            the datum's part of ``elpd_loo``, ``pit`` and ``probability`` means nothing.
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
        """Checks that the model fails: two-sided p value below 0.05 over the number of checks."""
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
        """In plain words."""
        if self.failed:
            parts = []
            for name in self.failed:
                if name == "calibration":
                    p = self.calibration_p_value
                    parts.append(f"its predictions are miscalibrated (p value {p:.1e})")
                    continue
                row = self.table.loc[name]
                parts.append(
                    f"the {name} of the data is {row['data']:.4g}, that of replicated data "
                    f"{row['replicated']:.4g} ± {row['replicated sd']:.2g}"
                )
            said = "the model does not make such data: " + "; ".join(parts)
        else:
            said = f"replicated data look like {self.site!r} by {', '.join(self.table.index)}"
            if self.loo_reliable and np.isfinite(self.calibration_p_value):
                said += ", and left-out data are predicted with the right uncertainty"
        off = int(self.lost.sum())
        if off:
            said += f". k-hat is 0.7 or more for {off} of {len(self.pareto_k)} data"
            said += (
                ", whose part in leave-one-out is not known"
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
        """Replicated data, test statistics, calibration and k-hat per datum."""
        from vi_toolkit.figures import plot_predictive

        return plot_predictive(self)


def predictive_check(
    fit: Any,
    statistics: Mapping[str, Callable[[np.ndarray], Any]] | None = None,
    site: str | None = None,
    num_draws: int | None = None,
    seed: int = 0,
) -> PredictiveCheck:
    r"""Compare data with what the fitted model predicts: Box's question, not the guide's error.

    Test statistics are compared with those of replicated data. Calibration and predictive density
    are those of left-out data, by Pareto-smoothed importance weights of draws from the guide q,

    .. math:: w_i \propto \frac{p(x, z)}{q(z)\, p(x_i \mid z)},

    which correct for the guide as well as for the datum: where they can be used (k-hat below 0.7),
    the result is that of the posterior.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        statistics: name -> function of one set of data, an array of the site's shape; None for
            mean, sd, minimum and maximum (of binary data, the mean).
        site: the observed site, if there are several.
        num_draws: of the posterior; None for 4,000, or fewer (at least 1,000) of more than 5,000 data.
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
        raise ValueError(f"the model observes {', '.join(densities)}: say which with site=")
    site = site or next(iter(densities))
    if site not in densities:
        raise ValueError(f"no observed site {site!r}; there are {', '.join(densities)}")
    observed = observed_sites(fit.workspace.model_trace)[site]["value"].double().cpu().numpy()
    replicated = fit.predict(draws=posterior, seed=seed)[site].double().cpu().numpy()
    log_p = densities[site].double().cpu().numpy()
    scalar = log_p.shape[1:] == observed.shape
    log_p = log_p.reshape(num_draws, -1)
    binary = scalar and bool(np.isin(observed, (0, 1)).all() and np.isin(replicated, (0, 1)).all())
    if statistics is None:
        statistics = {"mean": np.mean} if binary else STATISTICS

    log_w = weights.double().cpu().numpy()
    leave_one_out = [smoothed_with_shape(log_w - column) for column in log_p.T]
    w = np.stack([weight for weight, _, _ in leave_one_out])  # (n, draws)
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
        y, made = observed.reshape(-1), replicated.reshape(num_draws, -1)
        below, ties = (w.T * (made < y)).sum(0), (w.T * (made == y)).sum(0)
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
        pareto_k=np.array([k for _, k, _ in leave_one_out]),
        effective_fraction=np.array([fraction for _, _, fraction in leave_one_out]),
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
    r"""Two-sided p value that binary y (n,) have these probabilities (n,).

    The Brier score :math:`\sum (y - p)^2` less its expectation, over its sd, is about a standard
    Normal.

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
