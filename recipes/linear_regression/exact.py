r"""Everything about the conjugate regression that has a closed form.

Notation: n observations, d predictors, prior precision V0^-1 = I / prior_scale^2,
P = X'X + V0^-1, and NIG(a, b, m, V) the law

    variance ~ InverseGamma(a, b),   coefficients | variance ~ Normal(m, variance * V).

The posterior is NIG(a_n, b_n, m_n, P^-1); the model's joint density depends on the latents only
through

    log p(y, coefficients, variance) = const - (a_n + d/2 + 1) log(variance)
        - (b_n + (coefficients - m_n)' P (coefficients - m_n) / 2) / variance,

from which all the ELBOs and optima below follow. (Gelman et al., Bayesian Data Analysis, 2013,
ch. 14; Bishop, Pattern Recognition and Machine Learning, 2006, ch. 3 and 10.)
"""

import math
from dataclasses import dataclass

import pandas as pd
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import InverseGamma, MultivariateNormal

from vi_toolkit.reference import LEVELS, Reference

from .data import load_data
from .model import A0, B0, PRIOR_SCALE


@dataclass(frozen=True)
class NormalInverseGamma:
    """NIG(a, b, m, V). a, b: scalars; m: (d,); V: (d, d); all float64 tensors."""

    a: Tensor
    b: Tensor
    m: Tensor
    V: Tensor

    def sample(self, n, seed):
        """Exact independent draws: {"variance": (n,), "coefficients": (n, d)}."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            variance = InverseGamma(self.a, self.b).sample((n,))
            noise = MultivariateNormal(torch.zeros_like(self.m), self.V).sample((n,))
        return {"variance": variance, "coefficients": self.m + variance.sqrt()[:, None] * noise}

    def moments(self):
        """(mean, covariance) of (log(variance), coefficients): shapes (1 + d,), (1 + d, 1 + d).

        log(variance) = log b - log(a Gamma(a, 1) draw) has mean log b - digamma(a) and variance
        trigamma(a). The coefficients are Student-t with 2 a degrees of freedom, so their covariance
        is b / (a - 1) V (infinite for a <= 1). The two are uncorrelated, since the coefficients'
        mean given the variance is m whatever the variance; they are not independent.
        """
        mean = torch.cat([(self.b.log() - torch.digamma(self.a))[None], self.m])
        covariance = torch.block_diag(torch.polygamma(1, self.a), self.b / (self.a - 1) * self.V)
        return mean, covariance

    def kl(self, other):
        """KL(self || other) in nats, from the chain rule: inverse gammas, then Normals given the
        variance, averaged with E[1/variance] = a / b."""
        a, b, inverse = self.a, self.b, torch.linalg.inv(other.V)
        delta = self.m - other.m
        variances = (
            (a - other.a) * torch.digamma(a)
            - torch.lgamma(a)
            + torch.lgamma(other.a)
            + other.a * (b / other.b).log()
            + a * (other.b - b) / b
        )
        coefficients = 0.5 * (
            (inverse * self.V).sum()
            - len(self.m)
            + torch.logdet(other.V)
            - torch.logdet(self.V)
            + a / b * (delta @ inverse @ delta)
        )
        return variances + coefficients

    def predictive(self, X):
        """Predictive law of each new y: a frozen scipy Student-t of 2 a degrees of freedom around
        X m, with squared scale b / a (1 + x'Vx). X: (rows, d)."""
        scale = (self.b / self.a * (1 + torch.einsum("ni,ij,nj->n", X, self.V, X))).sqrt()
        return scipy.stats.t(2 * self.a.item(), (X @ self.m).numpy(), scale.numpy())


def prior(d, a0=A0, b0=B0, prior_scale=PRIOR_SCALE):
    """The prior as a NormalInverseGamma over d coefficients."""
    eye = torch.eye(d, dtype=torch.float64)
    return NormalInverseGamma(
        eye.new_tensor(a0), eye.new_tensor(b0), eye[0] * 0, eye * prior_scale**2
    )


def posterior(X, y, a0=A0, b0=B0, prior_scale=PRIOR_SCALE):
    """The exact posterior:

    V_n = P^-1,  m_n = V_n X'y,  a_n = a0 + n/2,
    b_n = b0 + (|y - X m_n|^2 + |m_n|^2 / prior_scale^2) / 2.

    X: (n, d), y: (n,).

    >>> X = torch.ones(4, 1, dtype=torch.float64)
    >>> q = posterior(X, torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    >>> q.a.item(), q.m.item()      # the sum of y over n + 1
    (4.0, 2.0)
    """
    precision = X.T @ X + torch.eye(X.shape[1], dtype=X.dtype) / prior_scale**2
    factor = torch.linalg.cholesky(precision)
    m = torch.cholesky_solve((X.T @ y)[:, None], factor)[:, 0]
    b = b0 + 0.5 * ((y - X @ m).square().sum() + m.square().sum() / prior_scale**2)
    return NormalInverseGamma(y.new_tensor(a0 + len(y) / 2), b, m, torch.cholesky_inverse(factor))


def log_evidence(X, y, a0=A0, b0=B0, prior_scale=PRIOR_SCALE):
    """log p(y) = - n/2 log 2 pi + (log|V_n| - log|V_0|) / 2 + a0 log b0 - a_n log b_n
    + log Gamma(a_n) - log Gamma(a0)."""
    start, end = prior(X.shape[1], a0, b0, prior_scale), posterior(X, y, a0, b0, prior_scale)
    return (
        -0.5 * len(y) * math.log(2 * math.pi)
        + 0.5 * (torch.logdet(end.V) - torch.logdet(start.V))
        + start.a * start.b.log()
        - end.a * end.b.log()
        + torch.lgamma(end.a)
        - torch.lgamma(start.a)
    )


def elbo(q, X, y, a0=A0, b0=B0, prior_scale=PRIOR_SCALE):
    """ELBO of a NormalInverseGamma q: E_q[log p(y | coefficients, variance)] - KL(q || prior).

    Written without the posterior, so that log_evidence - elbo = q.kl(posterior) is a check.
    """
    log_variance = q.b.log() - torch.digamma(q.a)
    squares = q.a / q.b * (y - X @ q.m).square().sum() + (X.T @ X * q.V).sum()
    fit = -0.5 * (len(y) * (math.log(2 * math.pi) + log_variance) + squares)
    return fit - q.kl(prior(X.shape[1], a0, b0, prior_scale))


def gaussian_elbo(loc, covariance, X, y, a0=A0, b0=B0, prior_scale=PRIOR_SCALE):
    """ELBO of a Gaussian q over z = (log(variance), coefficients), the family of AutoNormal and
    AutoMultivariateNormal. loc: (1 + d,); covariance: (1 + d, 1 + d). Differentiable.

    With loc = (mu, m), covariance = [[s^2, c'], [c, S]]: weighting a Gaussian by 1 / variance =
    exp(-z_0) multiplies it by t = exp(-mu + s^2 / 2) and shifts its mean by -(s^2, c), so

    E_q[(coefficients - m_n)' P (coefficients - m_n) / variance]
        = t ((m - c - m_n)' P (m - c - m_n) + tr(P S)).
    """
    start, end = prior(X.shape[1], a0, b0, prior_scale), posterior(X, y, a0, b0, prior_scale)
    d = X.shape[1]
    P = torch.linalg.inv(end.V)
    delta = loc[1:] - covariance[0, 1:] - end.m
    t = (-loc[0] + covariance[0, 0] / 2).exp()
    # The Jacobian of variance = exp(z_0) turns the exponent a_n + d/2 + 1 into a_n + d/2.
    expected_log_joint = (
        -0.5 * (len(y) + d) * math.log(2 * math.pi)
        - 0.5 * torch.logdet(start.V)
        + start.a * start.b.log()
        - torch.lgamma(start.a)
        - (end.a + d / 2) * loc[0]
        - t * (end.b + 0.5 * (delta @ P @ delta + (P * covariance[1:, 1:]).sum()))
    )
    entropy = 0.5 * ((1 + d) * (1 + math.log(2 * math.pi)) + torch.logdet(covariance))
    return expected_log_joint + entropy


def gaussian_optimum(X, y, mean_field=False, a0=A0, b0=B0, prior_scale=PRIOR_SCALE):
    """(loc, covariance) of the best Gaussian q over (log(variance), coefficients), full-rank or
    mean-field: where every derivative of gaussian_elbo is zero.

    The best c is 0 and the best m is m_n. With t = E_q[1 / variance], the rest solves
        coefficients:   S = (t P)^-1    (mean field: S_ii = 1 / (t P_ii), the others 0)
        mu:             t (b_n + tr(P S) / 2) = a_n + d/2
        s:              s^2 t (b_n + tr(P S) / 2) = 1.
    Either S gives tr(P S) = d / t. So t = a_n / b_n, the posterior's own E[1 / variance];
    s^2 = 1 / (a_n + d/2); and mu = s^2 / 2 - log t.

    So mean field has sd_i = (a_n / b_n P_ii)^(-1/2), the sd of coefficient i when the other
    coefficients are known; the posterior's own sd is (b_n / (a_n - 1) (P^-1)_ii)^(1/2).
    """
    end = posterior(X, y, a0, b0, prior_scale)
    t, s2 = end.a / end.b, 1 / (end.a + X.shape[1] / 2)
    S = end.V / t
    if mean_field:
        S = torch.diag(1 / (t * torch.linalg.inv(end.V).diagonal()))
    return torch.cat([(s2 / 2 - t.log())[None], end.m]), torch.block_diag(s2, S)


def reference(data=None):
    """The exact posterior as a Reference, by default that of load_data(): "kind" is "exact".

    On the unconstrained scale: moments() and, with a = a_n, for log(variance) the skewness
    -polygamma(2, a) / polygamma(1, a)^(3/2) and excess kurtosis polygamma(3, a) / polygamma(1, a)^2
    (it falls as its Gamma rises, so that has the other sign), for each coefficient 0 and
    3 / (a - 2) (needs a > 2).
    """
    data = load_data() if data is None else data
    q = posterior(**data)
    mean, covariance = q.moments()
    d, a = len(q.m), q.a.item()
    labels = [f"coefficients[{i}]" for i in range(d)]
    variance = scipy.stats.invgamma(a, scale=q.b.item())
    coefficients = scipy.stats.t(2 * a, q.m, (q.b / q.a * q.V.diagonal()).sqrt())
    own = pd.DataFrame(
        {
            "name": ["variance", *labels],
            "mean": [variance.mean(), *coefficients.mean()],
            "sd": [variance.std(), *coefficients.std()],
            **{level: [variance.ppf(p), *coefficients.ppf(p)] for level, p in LEVELS.items()},
            "mean_se": 0.0,
        }
    )
    polygamma = [scipy.special.polygamma(k, a) for k in range(4)]
    return Reference.exact(
        names=["log(variance)", *labels],
        mean=mean.numpy(),
        covariance=covariance.numpy(),
        quantiles={level: [math.log(own[level][0]), *own[level][1:]] for level in LEVELS},
        skewness=[-polygamma[2] / polygamma[1] ** 1.5] + d * [0.0],
        excess_kurtosis=[polygamma[3] / polygamma[1] ** 2] + d * [3 / (a - 2)],
        sites=own.drop(columns=["25%", "75%"]).to_dict("records"),
        log_evidence=log_evidence(**data),
        made={
            "method": "Normal-inverse-gamma conjugacy, closed form",
            "command": "python -m recipes reference linear_regression",
        },
    )
