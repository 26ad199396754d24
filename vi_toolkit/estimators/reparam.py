"""The reparameterised gradient."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import LogNormal
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoNormal
from torch.distributions import Independent, biject_to, constraints

from vi_toolkit.errors import PreflightError
from vi_toolkit.estimators import dependencies
from vi_toolkit.estimators.divergence import kl_divergence
from vi_toolkit.estimators.particles import (
    ParticleELBO,
    Tensors,
    log_density,
    terms_of,
    trace_model_and_guide,
)
from vi_toolkit.programs.isolation import kept_random_state
from vi_toolkit.programs.sites import Site, is_drawn


class Reparam(ParticleELBO):
    r"""ELBO whose gradient is reparameterised at every site of the guide.

    With :math:`z = t_\lambda(\epsilon)` and :math:`\epsilon` free of :math:`\lambda`,

    .. math:: \nabla_\lambda \mathcal L = E_\epsilon\left[\nabla_\lambda
              \{\log p(x, t_\lambda(\epsilon)) - \log q_\lambda(t_\lambda(\epsilon))\}\right].

    Gamma, Beta and Dirichlet have no such :math:`t` in closed form. For them torch computes the
    implicit derivative, :math:`\partial z / \partial \lambda = -\partial_\lambda F_\lambda(z) /
    q(z)`, where F is the distribution function. Pyro's ``Trace_ELBO`` uses the score function for
    sites that cannot be reparameterised; here such a site is an error.

    Args:
        particles: Monte Carlo samples per gradient, vectorised.
        analytic_kl: replace log q - log p of a latent by KL(q || p) in closed form where there
            is one (:func:`~vi_toolkit.estimators.divergence.kl_divergence`) and where it is right:
            the latent's prior must not depend on anything that the guide draws given the latent.
            What each latent got is in :attr:`kl`; those that could not have it are named in one
            warning. Less noise, and less work: where ``AutoNormal`` has hundreds of thousands of
            latents, their log densities are what a step's time goes into.

    Attributes:
        kl: latent -> "analytic", or why not; filled at the first step with ``analytic_kl``.

    Raises:
        PreflightError: at the first step, if a guide site has no ``rsample``.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014; Rezende, Mohamed and
        Wierstra, "Stochastic Backpropagation", 2014; Figurnov, Mohamed and Mnih, "Implicit
        Reparameterization Gradients", 2018.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from vi_toolkit import Reparam
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     loc = pyro.param("loc", torch.tensor(2.0))
        ...     pyro.sample("z", dist.Normal(loc, 1.0))
        >>> estimator = Reparam(particles=3, analytic_kl=True)
        >>> estimator.loss_and_grads(model, guide)  # KL(N(2, 1) || N(0, 1)) = 2, without noise
        2.0
        >>> float(pyro.param("loc").grad), estimator.kl
        (2.0, {'z': 'analytic'})
    """

    def __init__(self, particles: int = 1, analytic_kl: bool = False):
        super().__init__(particles)
        self.analytic_kl = analytic_kl
        self.kl: dict[str, str] = {}

    def options(self) -> dict[str, Any]:
        return {"particles": self.num_particles, "analytic_kl": self.analytic_kl}

    def prepare(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        super().prepare(model, guide, args, kwargs)
        if not self.analytic_kl:
            return
        # An AutoNormal draws its latents independently, so none depends on another.
        found = (
            None if type(guide) is AutoNormal else dependencies.trace(model, guide, args, kwargs)
        )
        with kept_random_state(), torch.no_grad():
            model_trace, guide_trace = trace_model_and_guide(model, guide, args, kwargs)
        latents = [name for name, site in guide_trace.nodes.items() if is_drawn(site)]
        self.kl = {n: _kl_fitness(n, found, model_trace, guide_trace, guide) for n in latents}
        refused = {n: why for n, why in self.kl.items() if why != "analytic"}
        if refused:
            reasons = "; ".join(f"{n}: {why}" for n, why in refused.items())
            warnings.warn(f"No analytic KL, so it is sampled, for {reasons}", stacklevel=2)

    def one(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensors, dict[str, Any]]:
        model_trace, guide_trace = self._run(model, guide, args, kwargs)
        refuse_unreparameterised(guide_trace)
        for name, how in self.kl.items():
            if how == "analytic" and name in guide_trace.nodes:
                q, prior = guide_trace.nodes[name], _prior_name(name, guide)
                p = model_trace.nodes[prior]
                kl = scale_and_mask(_kl(name, q, prior, p), q["scale"], q["mask"])
                # Let the two terms of the latent be log p = -KL and log q = 0. The guide may have
                # two sites for it: the draw, and its value on the model's scale.
                q["log_prob"] = guide_trace.nodes[prior]["log_prob"] = torch.zeros_like(kl)
                p["log_prob"] = -kl
        tensors, terms = terms_of(model_trace, guide_trace)
        return {"terms": tensors}, {"terms": terms}

    def surrogate(
        self, elbo: torch.Tensor, tensors: Tensors, about: dict[str, Any], data: Mapping[str, Any]
    ) -> torch.Tensor:
        return elbo


def refuse_unreparameterised(guide_trace: Any) -> None:
    """Raise PreflightError if a site of the guide cannot be reparameterised."""
    for name, site in guide_trace.nodes.items():
        if not reparameterised(site):
            raise PreflightError(
                f"The guide's site {name!r} ({type(site['fn']).__name__}) cannot be "
                "reparameterised.",
                site=name,
                remedy=f"Use estimator=vi.Score(sites=[{name!r}]) (score function there, "
                "reparameterised elsewhere), or sum a discrete site out with vi.Enumerate().",
            )


def reparameterised(site: Site) -> bool:
    """Whether a guide site's value is a differentiable function of the guide's parameters."""
    return not (site["type"] == "sample" and is_drawn(site)) or bool(site["fn"].has_rsample)


def _prior_name(latent: str, guide: Any) -> str:
    return latent.removesuffix("_unconstrained") if isinstance(guide, AutoNormal) else latent


def _kl(latent: str, q: Site, prior: str, p: Site) -> torch.Tensor:
    fn = q["fn"] if prior == latent else _on_the_models_scale(q["fn"], p["fn"])
    return torch.as_tensor(kl_divergence(fn, p["fn"]))


def _on_the_models_scale(q: Any, p: Any) -> Any:
    """A guide's Gaussian of an unconstrained latent, on the scale of the latent's prior.

    That is q itself if the prior is unconstrained, a LogNormal if it is positive, else None.
    """
    support = p.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    bound = getattr(support, "lower_bound", None)
    is_above = isinstance(support, (constraints.greater_than, constraints.greater_than_eq))
    if not is_above or torch.is_tensor(bound) or bound != 0:
        return q if biject_to(p.support)(q.mean) is q.mean else None
    base, dims = q, 0
    while isinstance(base, Independent):
        base, dims = base.base_dist, dims + base.reinterpreted_batch_ndims
    return LogNormal(base.loc, base.scale).to_event(dims)


def _kl_fitness(
    latent: str,
    found: dependencies.Dependencies | None,
    model_trace: Any,
    guide_trace: Any,
    guide: Any,
) -> str:
    """Whether a latent and its prior have a usable closed-form KL.

    Args:
        found: dependencies of model and guide; None if the guide draws all latents independently.

    Returns:
        "analytic", or why not.
    """
    if found is not None and found.unreadable:
        return found.unreadable
    name, q = _prior_name(latent, guide), guide_trace.nodes[latent]
    p = model_trace.nodes.get(name)
    if p is None or p["is_observed"]:
        return "the model has no site of that name"
    if name != latent and _on_the_models_scale(q["fn"], p["fn"]) is None:
        return "the guide draws it on another scale than the model"
    # E_q[KL(q(z | u) || p(z | v))] is the ELBO's part only if q(z | u, v) = q(z | u).
    if found is not None:
        later = (found.parents["model", name] & found.descendants[latent]) - {latent}
        if later:
            later_names = ", ".join(sorted(later))
            return f"its prior depends on {later_names}, which the guide draws after it"
    if p["scale"] is not q["scale"] and not _same(p["scale"], q["scale"]):
        return "model and guide scale it differently"
    if p["mask"] is not q["mask"]:
        return "model and guide mask it differently"
    try:
        kl = _kl(latent, q, name, p)
    except NotImplementedError:
        fn = q["fn"] if name == latent else _on_the_models_scale(q["fn"], p["fn"])
        kinds = f"{type(fn).__name__} and {type(p['fn']).__name__}"
        return f"there is no closed form for {kinds}"
    if kl.shape != log_density(q).shape or kl.shape != log_density(p).shape:
        return "the shapes of the pair differ"
    return "analytic"


def _same(a: Any, b: Any) -> bool:
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
