"""The path derivative: the reparameterised gradient without the score term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.poutine as poutine
import torch

from vi_toolkit.estimators.particles import Given, ParticleELBO, Tensors, log_density, terms_of
from vi_toolkit.estimators.reparam import refuse_unreparameterised
from vi_toolkit.programs.sites import is_drawn, is_term


class PathDerivative(ParticleELBO):
    r"""ELBO whose gradient follows the draws only ("sticking the landing").

    The guide's parameters enter the ELBO twice, through the draw :math:`z = t_\lambda(\epsilon)`
    and through the density :math:`\log q_\lambda`. The second contributes the score, whose mean is
    zero. The gradient without it,

    .. math:: \hat g = \nabla_\lambda \{\log p(x, t_\lambda(\epsilon))
              - \log q_{\bar\lambda}(t_\lambda(\epsilon))\}, \quad \bar\lambda
              \text{ held constant},

    is unbiased too, and exactly zero for every draw if q is the posterior. Far from the optimum it
    can have a larger variance than :class:`~vi_toolkit.Reparam`;
    :func:`~vi_toolkit.gradient_report` measures both.

    Args:
        particles: Monte Carlo samples per gradient, vectorised.

    Raises:
        PreflightError: at the first step, if a guide site has no ``rsample``.
        NotImplementedError: a flow in the guide has no inverse, which log q at a given draw needs.

    References:
        Roeder, Wu and Duvenaud, "Sticking the Landing: Simple, Lower-Variance Gradient Estimators
        for Variational Inference", 2017.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from vi_toolkit import PathDerivative
        >>> def model():
        ...     pyro.sample("z", dist.Normal(1.0, 2.0))
        >>> def guide():  # starts at the exact answer
        ...     loc = pyro.param("loc", torch.tensor(1.0))
        ...     pyro.sample("z", dist.Normal(loc, 2.0))
        >>> _ = PathDerivative().loss_and_grads(model, guide)
        >>> float(pyro.param("loc").grad)
        0.0
    """

    def one(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensors, dict[str, Any]]:
        model_trace, guide_trace = self._run(model, guide, args, kwargs)
        refuse_unreparameterised(guide_trace)
        tensors, terms = terms_of(model_trace, guide_trace)
        # log q at these draws, held constant, depends on the parameters through the density only.
        # The rows of subsampled plates are held as well.
        held = {
            name: site["value"].detach()
            for name, site in guide_trace.nodes.items()
            if site["type"] == "sample" and (is_drawn(site) or not is_term(site))
        }
        with Given(held):
            again = poutine.trace(guide).get_trace(*args, **kwargs)
        score = [log_density(site).sum() for site in again.nodes.values() if is_term(site)]
        return {"terms": tensors, "score": torch.stack(score).sum()}, {"terms": terms}

    def surrogate(
        self, elbo: torch.Tensor, tensors: Tensors, about: dict[str, Any], data: Mapping[str, Any]
    ) -> torch.Tensor:
        return elbo + tensors["score"]
