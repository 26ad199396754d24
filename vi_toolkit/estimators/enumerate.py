"""Exact sums over discrete latents."""

from __future__ import annotations

import logging
from typing import Any

from pyro.infer import TraceEnum_ELBO, config_enumerate


class Enumerate(TraceEnum_ELBO):
    r"""ELBO in which every discrete latent with finite support is summed out.

    .. math:: \nabla_\lambda \mathcal L = \nabla_\lambda \sum_z q_\lambda(z)
              \{\log p(x, z) - \log q_\lambda(z)\}

    For a guide with discrete sites only, this is the exact gradient; continuous sites are drawn
    and reparameterised. Discrete sites that only the model has are summed out of the likelihood.
    The sum over sites that depend on each other grows as a product of their support sizes; sites
    separated by a plate stay apart. A thin layer over Pyro's ``TraceEnum_ELBO``, which spares
    ``infer={"enumerate": "parallel"}`` at every site.

    Args:
        particles: Monte Carlo samples of the continuous sites per gradient; one is enough where
            there are none.

    Raises:
        ValueError: by Pyro, where sites to sum over are not within plates or independent dims.

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
        """The same estimator, with no model seen."""
        return Enumerate(**self.options())

    def _guess_max_plate_nesting(self, *args: Any) -> None:
        logger = logging.getLogger("pyro.infer.elbo")  # it announces its guess
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            super()._guess_max_plate_nesting(*args)
        finally:
            logger.setLevel(level)

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        # Innermost, so that Pyro's own handlers see the sites configured.
        return super()._get_traces(config_enumerate(model), config_enumerate(guide), args, kwargs)
