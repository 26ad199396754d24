"""The score-function gradient, for all sites or together with the reparameterised one."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch.distributions import Distribution, Independent

from vi_toolkit.errors import PreflightError
from vi_toolkit.estimators import dependencies
from vi_toolkit.estimators.baselines import Baseline, Signal
from vi_toolkit.estimators.particles import (
    Detach,
    ParticleELBO,
    Tensors,
    Term,
    pointwise,
    terms_of,
    total,
    trace_model_and_guide,
)
from vi_toolkit.estimators.reparam import reparameterised
from vi_toolkit.programs.isolation import kept_random_state
from vi_toolkit.programs.sites import Site, is_drawn, plate_dims


class Score(ParticleELBO):
    r"""ELBO whose gradient uses the score function, at every site of the guide or at some.

    .. math:: \nabla_\lambda \mathcal L = E_q\Big[\sum_i \nabla_\lambda \log q_\lambda(z_i)\,
              (R_i - b_i)\Big], \qquad R_i = \sum_{t \ni z_i} t(x, z)

    This gradient needs only the value of the model's log density. Draws are held constant even
    where they could be reparameterised, so latents may be discrete, and the likelihood need not be
    differentiable. R_i is the sum of those terms t of log p - log q that involve z_i or a latent
    that the guide draws given z_i; the product of the score with any other term has mean zero.
    Terms are left out for each element of a plate by itself and, if a site has independent
    coordinates, its own log q and prior for each coordinate by itself
    (:mod:`vi_toolkit.estimators.dependencies` describes how they are found). The baseline b_i
    (:mod:`vi_toolkit.estimators.baselines`) reduces the variance further.

    Sites that are not in ``sites`` are reparameterised. A point mass (``Delta``, as in
    ``AutoDelta``) has no score; its gradient goes through its parameters.

    Args:
        particles: Monte Carlo samples per gradient, vectorised.
        baseline: one baseline for all sites, a dict from site to baseline, or None.
        rao_blackwell: whether to leave out the terms that do not involve z_i.
        sites: sites of the guide that use the score; None for all. A latent of ``AutoNormal`` may
            be given by its name in the model.

    Raises:
        ValueError: a baseline needs more particles.
        PreflightError: at the first step, if ``sites`` has a name that is no site of the guide, if
            a site that is not in ``sites`` cannot be reparameterised, if no site has a score, or if
            a baseline needs the index of each datum and a plate does not tell it.

    References:
        Ranganath, Gerrish and Blei, "Black Box Variational Inference", 2014; Paisley, Blei and
        Jordan, "Variational Bayesian Inference with Stochastic Search", 2012; Schulman et al.,
        "Gradient Estimation Using Stochastic Computation Graphs", 2015.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from vi_toolkit import LeaveOneOut, Score
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     logit = pyro.param("logit", torch.tensor(0.0))
        ...     pyro.sample("z", dist.Bernoulli(logits=logit))
        >>> estimator = Score(particles=20_000, baseline=LeaveOneOut())
        >>> _ = estimator.loss_and_grads(model, guide)
        >>> round(float(pyro.param("logit").grad), 2)  # KL'(logit) = (0 - logit(0.3)) / 4
        0.21
    """

    def __init__(
        self,
        particles: int = 1,
        baseline: Baseline | Mapping[str, Baseline] | None = None,
        rao_blackwell: bool = True,
        sites: Iterable[str] | None = None,
    ):
        super().__init__(particles)
        if isinstance(sites, str):
            raise ValueError(f"sites must be a list of names, such as [{sites!r}]")
        for one in baseline.values() if isinstance(baseline, Mapping) else [baseline]:
            if not isinstance(one, Baseline | None):
                raise ValueError(
                    f"baseline must be one of RunningMean(), LeaveOneOut(), ControlVariate(), "
                    f"Neural(net, inputs) or None, not {one!r}"
                )
            if one is not None and particles < one.least_particles:
                raise ValueError(
                    f"{one!r} learns from the other particles: it needs particles >= "
                    f"{one.least_particles}, not {particles}"
                )
        self.baseline = baseline
        self.rao_blackwell = rao_blackwell
        self.sites = None if sites is None else list(sites)
        self.dependencies: dependencies.Dependencies | None = None
        self._seen: tuple[Any, ...] | None = None
        self._chosen: set[str] = set()
        self._baselines: dict[str, Baseline] = {}
        self._state: dict[str, dict[str, torch.Tensor]] = {}

    def options(self) -> dict[str, Any]:
        return {
            "particles": self.num_particles,
            "baseline": self.baseline,
            "rao_blackwell": self.rao_blackwell,
            "sites": self.sites,
        }

    # -- state

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of the baselines, which they update in place: "site/name" -> tensor."""
        return {f"{s}/{n}": t for s, named in self._state.items() for n, t in named.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as the state of the baselines; they are not copied."""
        self._state = {}
        for key, tensor in state.items():
            site, name = key.rsplit("/", 1)
            self._state.setdefault(site, {})[name] = tensor

    # -- before the first step

    def prepare(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        super().prepare(model, guide, args, kwargs)
        self.dependencies = dependencies.trace(model, guide, args, kwargs)
        with kept_random_state(), torch.no_grad():
            _, guide_trace = trace_model_and_guide(model, guide, args, kwargs)
        drawn = {n: s for n, s in guide_trace.nodes.items() if is_drawn(s)}
        self._chosen = self._choose(drawn)
        baselines = self.baseline
        if isinstance(baselines, Mapping):
            self._baselines = {}
            for name, one in baselines.items():
                site = _resolve(name, drawn)
                if site is None or site not in self._chosen:
                    raise PreflightError(
                        f"There is a baseline for {name!r}, where no score is used.",
                        site=name,
                        remedy=f"Sites with a score: {', '.join(sorted(self._chosen))}.",
                    )
                if one is not None:
                    self._baselines[site] = one
        else:
            self._baselines = dict.fromkeys(self._chosen, baselines) if baselines else {}

    def _choose(self, drawn: Mapping[str, Site]) -> set[str]:
        if not drawn:
            raise PreflightError(
                "The guide draws nothing, so no site has a score: every site is a point mass.",
                remedy="Use vi.Reparam(), whose gradient goes through the point's parameters.",
            )
        if self.sites is None:
            return set(drawn)
        chosen = set()
        for name in self.sites:
            found = _resolve(name, drawn)
            if found is None:
                raise PreflightError(
                    f"The guide draws no site {name!r}, so it has no score there.",
                    site=name,
                    remedy=f"It draws {', '.join(sorted(drawn))}.",
                )
            chosen.add(found)
        for name, site in drawn.items():
            if name not in chosen and not reparameterised(site):
                raise PreflightError(
                    f"The guide's site {name!r} ({type(site['fn']).__name__}) is not in sites, but "
                    "cannot be reparameterised.",
                    site=name,
                    remedy="Add it to sites.",
                )
        return chosen

    # -- one step

    def one(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensors, dict[str, Any]]:
        detach = Detach(self._chosen)
        model_trace, guide_trace = self._run(model, guide, args, kwargs, detach)
        seen = tuple((n, tuple(plate_dims(s))) for n, s in guide_trace.nodes.items() if is_drawn(s))
        seen += tuple(n for n, s in model_trace.nodes.items() if s["type"] == "sample")
        if self._seen is not None and seen != self._seen:
            self.prepare(model, guide, args, kwargs)  # the sites have changed since
        self._seen = seen
        factors: dict[str, dict[str, Any]] = {}
        facts: dict[str, dict[str, Any]] = {}
        assert self.dependencies is not None
        for name, site in guide_trace.nodes.items():
            if not is_drawn(site) or name not in self._chosen:
                continue
            log_q, dims = pointwise(site)
            site["log_prob"] = _scaled(log_q, site, dims).sum(tuple(range(-dims, 0)))
            if not dims:
                site["log_prob"] = _scaled(log_q, site, 0)
            factors[name] = {"log_q": log_q, "own": -_scaled(log_q.detach(), site, dims)}
            prior = self.dependencies.coordinatewise.get(name) if self.rao_blackwell else None
            if prior is not None:
                log_p, _ = pointwise(model_trace.nodes[prior])
                factors[name]["prior"] = _scaled(log_p.detach(), model_trace.nodes[prior], dims)
            if name in self._baselines:
                fn, parameters = own_parameters(site["fn"])
                factors[name]["parameters"] = parameters
                factors[name]["value"] = site["value"]
                facts[name] = {"fn": fn}
            facts.setdefault(name, {}).update(
                dims=dims, plates=plate_dims(site), scale=site["scale"], prior=prior
            )
            if name in self._baselines:
                facts[name]["rows"], facts[name]["cut"] = self._rows(site, guide_trace, dims)
        tensors, terms = terms_of(model_trace, guide_trace)
        return {"terms": tensors, "factors": factors}, {"terms": terms, "factors": facts}

    def _rows(
        self, site: Site, guide_trace: Any, dims: int
    ) -> tuple[dict[int, tuple[torch.Tensor, int]], bool]:
        """The subsampled plates around a site.

        Returns:
            Axis -> (indices of the data, number of data), and whether the data were cut to them.
        """
        rows, cut = {}, False
        given = site["infer"].get("vi_rows", {})  # set where fit cuts the data to a minibatch
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                continue
            axis = frame.dim - dims
            if frame.name in given:
                rows[axis], cut = given[frame.name], True
                continue
            node = guide_trace.nodes.get(frame.name)
            if node is None or not site_is_subsample(node) or frame.size == frame.full_size == -1:
                continue
            indices, size = node["value"], node["fn"].size
            if frame.size == size and node["fn"].subsample_size is None:
                continue
            if not torch.is_tensor(indices) or indices.is_floating_point() or indices.dim() != 1:
                raise PreflightError(
                    f"The plate {frame.name!r} around {site['name']!r} is subsampled by something "
                    "other than indices, so a baseline cannot tell one datum from another.",
                    site=site["name"],
                    remedy="Give the plate subsample=indices or subsample_size=, or use a "
                    "baseline without memory: LeaveOneOut().",
                )
            rows[axis] = (indices, size)
        return rows, cut

    def surrogate(
        self, elbo: torch.Tensor, tensors: Tensors, about: dict[str, Any], data: Mapping[str, Any]
    ) -> torch.Tensor:
        # The gradient of log q of a score site has mean zero, so it is left out.
        kept = [t for t in about["terms"] if t.owner == "model" or t.name not in self._chosen]
        surrogate = total(tensors, kept).sum()
        for name, facts in about["factors"].items():
            factor = tensors["factors"][name]
            signal = self._signal(name, tensors, about)
            surrogate = surrogate + (factor["log_q"] * signal).sum()
            if name in self._baselines:
                surrogate = surrogate - self._baseline(name, factor, facts, signal, data)
        return surrogate

    def _signal(self, name: str, tensors: Tensors, about: dict[str, Any]) -> torch.Tensor:
        """R of one site, of shape (S, *batch shape, *independent dims), without gradient."""
        assert self.dependencies is not None
        factor, facts = tensors["factors"][name], about["factors"][name]
        shape, dims = factor["log_q"].shape, facts["dims"]
        batch = shape[1 : len(shape) - dims]
        signal = torch.zeros_like(factor["log_q"].detach())
        for term in about["terms"]:
            key = (term.owner, term.name)
            if self.rao_blackwell and key == ("guide", name) and not self.dependencies.unreadable:
                signal = signal + factor["own"]
            elif self.rao_blackwell and key == ("model", facts["prior"]):
                signal = signal + factor["prior"]
            elif not self.rao_blackwell or (name, key) in self.dependencies.involved:
                shared = (
                    self.dependencies.involved[name, key] if self.rao_blackwell else frozenset()
                )
                part = tensors["terms"][f"{term.owner}/{term.name}"].detach()
                part = _sum_to(term, part, shared, batch)
                part = part.reshape(*part.shape, *[1] * dims)
                signal = signal + part if term.owner == "model" else signal - part
        return signal

    def _baseline(
        self,
        name: str,
        factor: Tensors,
        facts: dict[str, Any],
        signal: torch.Tensor,
        data: Mapping[str, Any],
    ) -> torch.Tensor:
        """What the baseline subtracts from the surrogate, shape ()."""
        baseline = self._baselines[name]
        elements = signal.dim() - 1
        rows = {axis % elements: found for axis, found in facts["rows"].items()}

        def scores() -> dict[str, torch.Tensor] | None:
            return scores_of(facts["fn"], factor["parameters"], factor["value"])

        seen = Signal(name, signal / facts["scale"], scores, rows, data, facts["cut"])
        with torch.no_grad():
            if name not in self._state:
                self._state[name] = baseline.start(seen)
            b, corrections = baseline(seen, self._state[name])
        off = (factor["log_q"] * (b * facts["scale"])).sum()
        for parameter, h in corrections.items():
            off = off + (factor["parameters"][parameter] * (h * facts["scale"])).sum()
        return off


def _resolve(name: str, drawn: Mapping[str, Site]) -> str | None:
    return next((n for n in (name, f"{name}_unconstrained") if n in drawn), None)


def _scaled(log_prob: torch.Tensor, site: Site, dims: int) -> torch.Tensor:
    scale, mask = site["scale"], site["mask"]
    if torch.is_tensor(scale) and scale.dim():
        scale = scale.reshape(*scale.shape, *[1] * dims)
    if torch.is_tensor(mask) and mask.dim():
        mask = mask.reshape(*mask.shape, *[1] * dims)
    return torch.as_tensor(scale_and_mask(log_prob, scale, mask)).expand(log_prob.shape)


def _sum_to(
    term: Term, log_prob: torch.Tensor, shared: frozenset[str], batch: torch.Size
) -> torch.Tensor:
    """Sum a term over all but the shared plates.

    Args:
        term: its description.
        log_prob: its log density, shape (S, *its batch shape).
        shared: names of the plates that stay.
        batch: batch shape of the latent.

    Returns:
        Shape (S, ...), which broadcasts to (S, *batch).
    """
    keep = {term.plates[name] for name in shared}
    over = [d for d in range(1 - log_prob.dim(), 0) if d not in keep]
    if over:
        log_prob = log_prob.sum(over, keepdim=True)
    inner = log_prob.shape[1:]
    if len(inner) > len(batch):  # those on the left were summed, as shared plates are in batch
        inner = inner[len(inner) - len(batch) :]
    return log_prob.reshape(log_prob.shape[0], *[1] * (len(batch) - len(inner)), *inner)


# A distribution takes one of these and computes the others when they are asked for.
_ALTERNATIVES = ("probs", "logits", "scale_tril", "covariance_matrix", "precision_matrix")


def own_parameters(fn: Any) -> tuple[type | None, dict[str, torch.Tensor]]:
    """Class and parameters of the distribution of one coordinate of a site.

    Returns:
        (class, name -> parameter), or (None, {}) if the distribution does not expose them.
    """
    while isinstance(fn, Independent):
        fn = fn.base_dist
    kind = type(fn)
    accepted = inspect.signature(kind.__init__).parameters
    # The one that was given is the first among the attributes.
    given = next((name for name in vars(fn) if name in _ALTERNATIVES), None)
    parameters = {}
    for name in fn.arg_constraints if isinstance(fn, Distribution) else ():
        if name not in accepted or hasattr(fn, "base_dist"):
            return None, {}
        if name in _ALTERNATIVES and name != given:
            continue
        value = getattr(fn, name)
        if not torch.is_tensor(value):
            return None, {}
        parameters[name] = value
    return (kind, parameters) if parameters else (None, {})


def scores_of(
    kind: type | None, parameters: Mapping[str, torch.Tensor], value: torch.Tensor
) -> dict[str, torch.Tensor] | None:
    """d log q / d parameter for every particle and element; None if there are no parameters."""
    if kind is None:
        return None
    with torch.enable_grad():
        leaves = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
        log_q = kind(**leaves, validate_args=False).log_prob(value)
        grads = torch.autograd.grad(log_q.sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))
