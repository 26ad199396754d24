"""The reparameterised gradient."""

from __future__ import annotations

from typing import Any

from pyro.infer import Trace_ELBO

from vi_toolkit.errors import PreflightError


class Reparam(Trace_ELBO):
    r"""ELBO whose gradient is reparameterised at every site of the guide.

    With :math:`z = t_\lambda(\epsilon)` and :math:`\epsilon` free of :math:`\lambda`,

    .. math:: \nabla_\lambda \mathcal L = E_\epsilon\left[\nabla_\lambda
              \{\log p(x, t_\lambda(\epsilon)) - \log q_\lambda(t_\lambda(\epsilon))\}\right].

    Unlike Pyro's ``Trace_ELBO``, of which it is a kind, it never mixes in the score function: a
    guide site that cannot be reparameterised is an error that names it.

    Args:
        particles: Monte Carlo samples per gradient.

    Raises:
        PreflightError: at the first step, if a guide site has no ``rsample``.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014; Rezende, Mohamed and
        Wierstra, "Stochastic Backpropagation", 2014.

    Example:
        >>> from vi_toolkit import Reparam
        >>> Reparam(particles=4)
        Reparam(particles=4)
    """

    def __init__(self, particles: int = 1):
        if not isinstance(particles, int) or particles < 1:
            raise ValueError(f"particles must be a positive whole number, not {particles!r}")
        super().__init__(num_particles=particles)

    def __repr__(self) -> str:
        return f"Reparam(particles={self.num_particles})"

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for name, site in guide_trace.nodes.items():
            if not reparameterised(site):
                raise PreflightError(
                    f"The guide's site {name!r} ({type(site['fn']).__name__}) cannot be "
                    "reparameterised.",
                    site=name,
                    remedy="Use estimator=pyro.infer.Trace_ELBO() (score function), or enumerate "
                    "the site with pyro.infer.TraceEnum_ELBO().",
                )
        return model_trace, guide_trace


def reparameterised(site: dict[str, Any]) -> bool:
    """Whether a guide site's value is a differentiable function of the guide's parameters."""
    if site["type"] != "sample" or site["is_observed"] or type(site["fn"]).__name__ == "_Subsample":
        return True
    return bool(site["fn"].has_rsample)
