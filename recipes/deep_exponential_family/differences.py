"""Gradients through units that count: a difference in place of the derivative that does not exist.

For a binary unit of probability m, and for a Poisson unit of mean m,

    d/dm E[f(z)] = E[f(1) - f(0)]        d/dm E[f(z)] = E[f(z + 1) - f(z)]

with all other units as drawn. If the units are independent given their means, one joint draw gives
an unbiased estimate for each of them (Titsias and Lazaro-Gredilla, "Local Expectation Gradients for
Black Box Variational Inference", NIPS 2015; Cong, Zhao, Bai and Carin, "GO Gradient for
Expectation-Based Objectives", ICLR 2019). The score function's gradient also compares values of f,
but between whole draws, where the effect of one unit is lost among those of a hundred others.

The method has two sides. In the guide, a draw has the gradient of its mean (:class:`Bernoulli`,
:class:`Poisson`). In the model, what is computed from a layer has the difference as its derivative
in each unit (:func:`with_differences`). :class:`Below` does that for the next layer, and
:class:`~.words.Words` for the words. Computing all differences of a layer costs its number of units
times one evaluation in general. Here it costs no more than the matrix product z w, from which they
come. The log densities of the units themselves need no differences: Bernoulli's is linear in z, and
the part of the Poisson's that is not linear, log z!, cancels between model and guide.
"""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints


class _MeansGradient:
    has_rsample = True

    def rsample(self, sample_shape=()):
        return self.sample(sample_shape) + (self.mean - self.mean.detach())


class Bernoulli(_MeansGradient, dist.Bernoulli):
    """Bernoulli whose draws have the gradient of their mean."""


class Poisson(_MeansGradient, dist.Poisson):
    """Poisson whose draws have the gradient of their mean."""


def step(z, binary):
    """The step from z to the value it is compared with: up, or down if z is binary and on."""
    return 1 - 2 * z if binary else torch.ones_like(z)


def with_differences(value, z, difference):
    """`value` (...,), a function of z (..., K), with derivatives `difference` (..., K) in z.

    difference: a function that returns them. It is called only if z asks for a gradient.
    """
    if not z.requires_grad:
        return value
    with torch.no_grad():
        slope = difference()
    return value + ((z - z.detach()) * slope).sum(-1)


class Below(TorchDistribution):
    """Units below a layer that counts: independent, with the distribution `conditional`(z w).

    z: (N, K), the layer above, in which the log density has differences as derivatives; w: (K, J).
    """

    arg_constraints = {"z": constraints.real, "w": constraints.real}  # noqa: RUF012
    has_rsample = False

    def __init__(self, z, w, conditional, binary, validate_args=None):
        self.z, self.w, self.conditional, self.binary = z, w, conditional, binary
        self.base = conditional(z.detach() @ w)
        super().__init__(z.shape[:-1], w.shape[-1:], validate_args=False)

    @property
    def support(self):
        return constraints.independent(self.base.support, 1)

    @property
    def mean(self):
        return self.base.mean

    def expand(self, batch_shape, _instance=None):
        z = self.z.expand(*batch_shape, self.z.shape[-1])
        return Below(z, self.w, self.conditional, self.binary)

    def log_prob(self, value):
        def difference():
            direction = step(self.z, self.binary)
            s = (self.z @ self.w)[..., None, :] + direction[..., None] * self.w
            value_ = value.detach()
            moved = self.conditional(s).log_prob(value_[..., None, :]).sum(-1)
            return direction * (moved - self.base.log_prob(value_).sum(-1, keepdim=True))

        return with_differences(self.base.log_prob(value).sum(-1), self.z, difference)

    def sample(self, sample_shape=()):
        return self.base.sample(sample_shape)
