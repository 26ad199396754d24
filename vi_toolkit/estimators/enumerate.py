"""Exact sums over discrete latents."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

from pyro.infer import TraceEnum_ELBO, config_enumerate


@contextlib.contextmanager
def _without_announcement(elbo: TraceEnum_ELBO) -> Iterator[None]:
    """Keep Pyro from logging its guess of the number of plates, which it makes at the first run."""
    if not math.isinf(elbo.max_plate_nesting):
        yield
        return
    logger = logging.getLogger("pyro.infer.elbo")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _marked(method: Callable[..., Any]) -> Callable[..., Any]:
    """One of Pyro's methods, with every discrete site of model and guide marked for enumeration."""

    @functools.wraps(method)
    def with_marks(self: Enumerate, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        with _without_announcement(self):
            return method(self, config_enumerate(model), config_enumerate(guide), *args, **kwargs)

    return with_marks


class Enumerate(TraceEnum_ELBO):
    r"""ELBO in which every discrete latent with finite support is summed out.

    .. math:: \nabla_\lambda \mathcal L = \nabla_\lambda \sum_z q_\lambda(z)
              \{\log p(x, z) - \log q_\lambda(z)\}

    If all sites of the guide are discrete, this gradient is exact. Continuous sites are drawn and
    reparameterised. Discrete sites that only the model has are summed out of the likelihood. The
    cost of sites that depend on each other is the product of their support sizes; sites in
    different rows of a plate do not multiply. This is Pyro's ``TraceEnum_ELBO``, without the need
    for ``infer={"enumerate": "parallel"}`` at every site.

    Args:
        particles: Monte Carlo samples of the continuous sites per gradient; one is enough if there
            are no such sites.

    Raises:
        ValueError: from Pyro, if a batch dimension of a summed site belongs to no plate.

    References:
        Obermeyer et al., "Tensor Variable Elimination for Plated Factor Graphs", 2019.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from vi_toolkit import Enumerate
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.5))
        >>> def guide():
        ...     logit = pyro.param("logit", torch.tensor(0.0))
        ...     pyro.sample("z", dist.Bernoulli(logits=logit))
        >>> abs(Enumerate().loss_and_grads(model, guide))  # q = p: the ELBO is log p(x) = 0
        0.0
    """

    def __init__(self, particles: int = 1):
        if not isinstance(particles, int) or particles < 1:
            raise ValueError(f"particles must be a positive whole number, not {particles!r}")
        super().__init__(num_particles=particles)

    def __repr__(self) -> str:
        return f"Enumerate(particles={self.num_particles})"

    def options(self) -> dict[str, Any]:
        """The arguments that the estimator was made with."""
        return {"particles": self.num_particles}

    def fresh(self) -> Enumerate:
        """The same estimator, before it has seen a model."""
        return Enumerate(**self.options())

    loss = _marked(TraceEnum_ELBO.loss)
    differentiable_loss = _marked(TraceEnum_ELBO.differentiable_loss)
    loss_and_grads = _marked(TraceEnum_ELBO.loss_and_grads)
    compute_marginals = _marked(TraceEnum_ELBO.compute_marginals)
    sample_posterior = _marked(TraceEnum_ELBO.sample_posterior)
