"""Gradients through units that count: a difference in place of the derivative that there is not.

For a binary unit of probability m, and for a Poisson unit of mean m,

    d/dm E[f(z)] = E[f(1) - f(0)]        d/dm E[f(z)] = E[f(z + 1) - f(z)]

with all other units as drawn: for several units that are independent given their means, unbiased
for each of them from one joint draw (Titsias and Lazaro-Gredilla, "Local Expectation Gradients for
Black Box Variational Inference", NIPS 2015; Cong, Zhao, Bai and Carin, "GO Gradient for
Expectation-Based Objectives", ICLR 2019). The score function's gradient is a difference, too, but
between whole draws: what one unit of a hundred does is lost in what the others do.

It takes two sides. The guide's draws have their mean's gradient (:class:`Bernoulli`,
:class:`Poisson`). What the model computes of a layer has, for each of its units, the difference as
its derivative (:func:`with_differences`), and costs the units times what it costs otherwise: no
more here than the matrix product that it comes from. Log densities of the units themselves need
nothing: Bernoulli's is linear in z, and of the Poisson's what is not, log z!, cancels between model
and guide.
"""

import pyro.distributions as dist
import torch


class _MeansGradient:
    has_rsample = True

    def rsample(self, sample_shape=()):
        with torch.no_grad():
            z = self.sample(sample_shape)
        return z + (self.mean - self.mean.detach())


class Bernoulli(_MeansGradient, dist.Bernoulli):
    """Bernoulli whose draws have the gradient of their mean."""


class Poisson(_MeansGradient, dist.Poisson):
    """Poisson whose draws have the gradient of their mean."""


def step(z, binary):
    """Which way each unit can go: up, or down where it is binary and on."""
    return 1 - 2 * z if binary else torch.ones_like(z)


def with_differences(value, z, difference):
    """`value` (...,), a function of z (..., K), with derivatives `difference` (..., K) in z.

    difference: a function that returns them, called if there is somebody to ask for them.
    """
    if not z.requires_grad:
        return value
    with torch.no_grad():
        slope = difference()
    return value + ((z - z.detach()) * slope).sum(-1)
