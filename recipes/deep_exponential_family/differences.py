"""Gradients through units that count: a difference in place of the derivative that there is not.

For a binary unit of probability m, and for a Poisson unit of mean m,

    d/dm E[f(z)] = E[f(1) - f(0)]        d/dm E[f(z)] = E[f(z + 1) - f(z)]

with all other units as drawn: for several units that are independent given their means, unbiased
for each of them from one joint draw (Titsias and Lazaro-Gredilla, "Local Expectation Gradients for
Black Box Variational Inference", NIPS 2015; Cong, Zhao, Bai and Carin, "GO Gradient for
Expectation-Based Objectives", ICLR 2019). The score function's gradient is a difference, too, but
between whole draws: what one unit of a hundred does is lost in what the others do.

It takes two sides. The guide's draws have their mean's gradient (:class:`Bernoulli`,
:class:`Poisson`, here). What the model computes of a layer has, for each of its units, the
difference as its derivative (:func:`~.model.with_differences`), and costs the units times what it
costs otherwise: no more here than the matrix product that it comes from. Log densities of the units
themselves need nothing: Bernoulli's is linear in z, and of the Poisson's what is not, log z!,
cancels between model and guide.
"""

import pyro.distributions as dist


class _MeansGradient:
    has_rsample = True

    def rsample(self, sample_shape=()):
        return self.sample(sample_shape) + (self.mean - self.mean.detach())


class Bernoulli(_MeansGradient, dist.Bernoulli):
    """Bernoulli whose draws have the gradient of their mean."""


class Poisson(_MeansGradient, dist.Poisson):
    """Poisson whose draws have the gradient of their mean."""
