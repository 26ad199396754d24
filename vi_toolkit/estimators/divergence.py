r"""KL divergences in closed form that torch does not have: of a LogNormal from positive priors.

A Gaussian on a latent's log, which is what ``AutoNormal`` uses for a positive latent, is a
LogNormal(m, s), whose entropy is :math:`m + \tfrac12 \log(2 \pi e s^2)` and whose moments are
:math:`E[\log x] = m` and :math:`E[x^k] = \exp(k m + k^2 s^2 / 2)` (Johnson, Kotz and Balakrishnan,
"Continuous Univariate Distributions", 1994, chapter 14). That gives :math:`KL = -H(q) - E_q[\log
p]` wherever log p is made of powers and the logarithm:

===================  =============================================================================
prior                :math:`-E_q[\log p(x)]`
===================  =============================================================================
Gamma(a, b)          :math:`\log\Gamma(a) - a \log b - (a - 1) m + b\, E[x]`
Exponential(b)       the same with a = 1
InverseGamma(a, b)   :math:`\log\Gamma(a) - a \log b + (a + 1) m + b\, E[x^{-1}]`
HalfNormal(s0)       :math:`\tfrac12 \log(\pi s_0^2 / 2) + E[x^2] / (2 s_0^2)`
===================  =============================================================================

They are in torch's own table, so that ``torch.distributions.kl_divergence`` finds them:

>>> import torch, pyro.distributions as dist
>>> import vi_toolkit
>>> torch.distributions.kl_divergence(dist.LogNormal(0.0, 1.0), dist.Exponential(1.0))
tensor(0.2298)
"""

from __future__ import annotations

import math

import pyro.distributions as pyro_dist
import torch
from torch.distributions import Exponential, Gamma, HalfNormal, LogNormal
from torch.distributions.kl import register_kl


def _moment(q: LogNormal, k: int) -> torch.Tensor:
    return (k * q.loc + k**2 / 2 * q.scale.square()).exp()


def _negative_entropy(q: LogNormal) -> torch.Tensor:
    return -(q.loc + q.scale.log() + (1 + math.log(2 * math.pi)) / 2)


@register_kl(LogNormal, Gamma)
def _from_gamma(q: LogNormal, p: Gamma) -> torch.Tensor:
    a, b = p.concentration, p.rate
    return _negative_entropy(q) + a.lgamma() - a * b.log() - (a - 1) * q.loc + b * _moment(q, 1)


@register_kl(LogNormal, Exponential)
def _from_exponential(q: LogNormal, p: Exponential) -> torch.Tensor:
    return _negative_entropy(q) - p.rate.log() + p.rate * _moment(q, 1)


@register_kl(LogNormal, pyro_dist.InverseGamma)
def _from_inverse_gamma(q: LogNormal, p: pyro_dist.InverseGamma) -> torch.Tensor:
    a, b = p.concentration, p.rate
    return _negative_entropy(q) + a.lgamma() - a * b.log() + (a + 1) * q.loc + b * _moment(q, -1)


@register_kl(LogNormal, HalfNormal)
def _from_half_normal(q: LogNormal, p: HalfNormal) -> torch.Tensor:
    log_density = (math.pi / 2 * p.scale.square()).log() / 2
    return _negative_entropy(q) + log_density + _moment(q, 2) / (2 * p.scale.square())
