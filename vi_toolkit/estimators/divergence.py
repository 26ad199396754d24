r"""KL divergences in closed form, torch's and those of a LogNormal from four positive priors.

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
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as pyro_dist
import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import sum_rightmost
from torch.distributions import (
    Exponential,
    Gamma,
    HalfNormal,
    Independent,
    LogNormal,
    TransformedDistribution,
)


def kl_divergence(q: Any, p: Any) -> torch.Tensor:
    """KL(q || p) in closed form, of shape ``q.batch_shape``.

    torch's table of closed forms with the four of this module beside it. Importing this module
    does not change that table: ``torch.distributions.kl_divergence`` and Pyro's
    ``TraceMeanField_ELBO`` know what they knew before.

    Args:
        q, p: distributions, which may be independent, masked or transformed in the same way.

    Raises:
        NotImplementedError: the pair has no closed form here or in torch.

    Example:
        >>> import pyro.distributions as dist
        >>> from vi_toolkit.estimators.divergence import kl_divergence
        >>> kl_divergence(dist.LogNormal(0.0, 1.0), dist.Exponential(1.0))
        tensor(0.2298)
    """
    if isinstance(q, LogNormal):
        for prior, from_prior in _FROM_PRIOR.items():
            if isinstance(p, prior):
                return from_prior(q, p)
    try:
        return torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        # torch unwraps distributions too, but looks the pairs inside up in its own table only.
        if isinstance(q, Independent) and isinstance(p, Independent):
            shared = min(q.reinterpreted_batch_ndims, p.reinterpreted_batch_ndims)
            return sum_rightmost(kl_divergence(_less(q, shared), _less(p, shared)), shared)
        if isinstance(q, MaskedDistribution) and isinstance(p, MaskedDistribution):
            return _masked(kl_divergence(q.base_dist, p.base_dist), q, p)
        if (
            isinstance(q, TransformedDistribution)
            and isinstance(p, TransformedDistribution)
            and q.transforms == p.transforms
            and q.event_shape == p.event_shape
        ):
            return kl_divergence(q.base_dist, p.base_dist)
        raise


def _less(fn: Independent, dims: int) -> Any:
    """`fn` with its last `dims` event dimensions as batch dimensions."""
    rest = fn.reinterpreted_batch_ndims - dims
    return Independent(fn.base_dist, rest) if rest else fn.base_dist


def _masked(kl: torch.Tensor, q: MaskedDistribution, p: MaskedDistribution) -> torch.Tensor:
    """`kl` with zeros where q or p is masked.

    Pyro keeps masks to itself but applies them to divergences, so let it apply them to one that it
    knows: that of a point mass from a distribution whose log density is -kl.
    """
    q, p = copy.copy(q), copy.copy(p)
    q.base_dist = pyro_dist.Delta(kl.new_empty((*kl.shape, 0)), event_dim=1)
    p.base_dist = pyro_dist.Unit(-kl, validate_args=False)
    return torch.distributions.kl_divergence(q, p)


def _moment(q: LogNormal, k: int) -> torch.Tensor:
    return (k * q.loc + k**2 / 2 * q.scale.square()).exp()


def _negative_entropy(q: LogNormal) -> torch.Tensor:
    return -(q.loc + q.scale.log() + (1 + math.log(2 * math.pi)) / 2)


def _from_gamma(q: LogNormal, p: Gamma) -> torch.Tensor:
    a, b = p.concentration, p.rate
    return _negative_entropy(q) + a.lgamma() - a * b.log() - (a - 1) * q.loc + b * _moment(q, 1)


def _from_exponential(q: LogNormal, p: Exponential) -> torch.Tensor:
    return _negative_entropy(q) - p.rate.log() + p.rate * _moment(q, 1)


def _from_inverse_gamma(q: LogNormal, p: pyro_dist.InverseGamma) -> torch.Tensor:
    a, b = p.concentration, p.rate
    return _negative_entropy(q) + a.lgamma() - a * b.log() + (a + 1) * q.loc + b * _moment(q, -1)


def _from_half_normal(q: LogNormal, p: HalfNormal) -> torch.Tensor:
    log_density = (math.pi / 2 * p.scale.square()).log() / 2
    return _negative_entropy(q) + log_density + _moment(q, 2) / (2 * p.scale.square())


_FROM_PRIOR: dict[type, Callable[[LogNormal, Any], torch.Tensor]] = {
    Gamma: _from_gamma,
    Exponential: _from_exponential,
    pyro_dist.InverseGamma: _from_inverse_gamma,
    HalfNormal: _from_half_normal,
}
