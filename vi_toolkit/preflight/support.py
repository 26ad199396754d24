"""Supports: where a distribution's draws can be, and whether the guide's lie inside the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to, transforms

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import words
from vi_toolkit.programs.sites import Site, core

# Sets whose entries depend on each other, so that no box lies inside: constraint -> in words.
# The first that fits counts, so a smaller set comes first.
_JOINT = {
    "simplex": "the simplex",
    "positive_ordered_vector": "positive ordered vectors",
    "ordered_vector": "ordered vectors",
    "corr_cholesky": "Cholesky factors of correlation matrices",
    "unit_lower_cholesky": "unit lower-triangular matrices",
    "lower_cholesky": "lower Cholesky factors",
    "lower_triangular": "lower-triangular matrices",
    "corr_matrix": "correlation matrices",
    "positive_definite": "positive definite matrices",
    "sphere": "the unit sphere",
    "one_hot": "one-hot vectors",
}
_USUAL = {
    "the simplex": "dist.Dirichlet(concentration)",
    "(0, inf)": "dist.LogNormal(loc, scale)",
    "(0, 1)": "dist.Beta(concentration1, concentration0)",
}


def distribution_name(fn: Any) -> str:
    return type(core(fn)).__name__


def stated(fn: Any) -> Any:
    """The support that a distribution states, entry-wise if it can be; None if it states none."""
    try:
        return _strip(fn.support)
    except (AttributeError, NotImplementedError):
        return None


def _strip(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_discrete(fn: Any) -> bool:
    try:
        return bool(stated(fn).is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _joint(fn: Any) -> str | None:
    """The constraint's name, if the entries of an event depend on each other."""
    support = stated(fn)
    return next((n for n in _JOINT if isinstance(support, type(getattr(constraints, n)))), None)


@dataclass
class Box:
    """Entry-wise bounds: the support of a scalar, or of entries that are free of each other."""

    lower: Any = -torch.inf
    upper: Any = torch.inf
    discrete: bool = False

    def bounds(self) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(self.lower).float(), torch.as_tensor(self.upper).float()

    def inside(self, other: Box) -> bool:
        (lower, upper), (least, most) = self.bounds(), other.bounds()
        try:  # with a slack, since a bound computed twice may differ in the last digit
            return bool(
                (lower >= least - 1e-5 * least.abs().nan_to_num(0, 0).clamp_min(1)).all()
                and (upper <= most + 1e-5 * most.abs().nan_to_num(0, 0).clamp_min(1)).all()
            )
        except RuntimeError:  # bounds that do not broadcast: shapes are another check's matter
            return True

    def __str__(self) -> str:
        lower, upper = (_text(bound) for bound in self.bounds())
        if self.discrete:
            return f"integers from {lower}" + ("" if upper == "inf" else f" to {upper}")
        return f"({lower}, {upper})"


def _text(bound: Tensor) -> str:
    ends = [bound.min().item(), bound.max().item()]
    # A sigmoid stops at the smallest positive float.
    texts = [f"{end if abs(end) > 1e-30 else 0.0:.4g}" for end in ends]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]}...{texts[1]}"


def _box(support: Any) -> Box | None:
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        box = _box(_strip(support.base_constraint))
        # Bounds that differ between components have a dimension that values do not have.
        return box if box and all(bound.numel() == 1 for bound in box.bounds()) else None
    if isinstance(support, type(constraints.real)):
        return Box()
    if isinstance(support, type(constraints.boolean)):
        return Box(0, 1, discrete=True)
    ends = [getattr(support, f"{end}_bound", None) for end in ("lower", "upper")]
    if ends == [None, None] or support.event_dim:
        return None
    lower, upper = ends
    return Box(
        -torch.inf if lower is None else lower,
        torch.inf if upper is None else upper,
        support.is_discrete,
    )


def support_box(fn: Any) -> Box | None:
    """The box that a distribution's draws fill; None if that is not known.

    The support of a TransformedDistribution is its last codomain, which for an affine map is the
    whole line whatever went in: follow the bounds through the transforms instead. Distributions
    with a name of their own (LogNormal, Gumbel, ...) state their support.
    """
    fn = core(fn)
    if getattr(type(fn), "support", None) is not TransformedDistribution.support:
        return _box(stated(fn))
    box = support_box(fn.base_dist)
    if box is None:
        return None
    try:  # increasing or decreasing in each entry, so the bounds go to the bounds
        ends = [transforms.ComposeTransform(fn.transforms)(end) for end in box.bounds()]
        if not any(torch.isnan(end).any() for end in ends):
            return Box(torch.minimum(*ends), torch.maximum(*ends))
    except (IndexError, RuntimeError, TypeError, ValueError):  # mixes the entries of a vector
        pass
    # A permutation, say, keeps whatever bounds there were, and states the whole line.
    return _box(stated(fn)) if Box().inside(box) else None


def describe(fn: Any) -> str:
    """The support in words."""
    return str(support_box(fn) or _JOINT.get(_joint(fn) or "") or stated(fn))


def entry_dims(fn: Any) -> int:
    """How many dimensions ``outside`` adds to the batch shape: an event's, if it is a box."""
    return fn.event_dim if _box(stated(fn)) else 0


def outside(fn: Any, value: Tensor, edge: bool = False) -> Tensor | None:
    """What lies outside a support by more than rounding; None if that is not known.

    Entry by entry for bounds, else event by event. The edge of an interval counts as outside only
    if asked: exp underflows to 0 and a sigmoid rounds to 1.
    """
    support = stated(fn)
    box = _box(support)
    if box and not box.discrete and not edge:
        return ~((value >= box.lower) & (value <= box.upper))
    if _joint(fn) == "simplex":  # torch allows 1e-6, which a long float32 sum exceeds
        return (value < 0).any(-1) | ((value.sum(-1) - 1).abs() > 1e-3)
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        if box is None:  # its check wants a value inside all components, where one is enough
            return None
        support = _strip(support.base_constraint)
    try:
        return ~(support if box else fn.support).check(value)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None


def _replacement(fn: Any) -> str:
    """A distribution for a guide of a latent with this prior."""
    if describe(fn) in _USUAL:
        return _USUAL[describe(fn)]
    box, constraint = support_box(fn), _joint(fn)
    if box and not (box.discrete or Box().inside(box)):
        ends = [_text(bound) for bound in box.bounds()]
        lower, upper = ("bound" if "..." in end else end for end in ends)
        constraint = f"interval({lower}, {upper})"
        if upper == "inf":
            constraint = f"greater_than({lower})"
        elif lower == "-inf":
            constraint = f"less_than({upper})"
    try:
        biject_to(stated(fn))
    except NotImplementedError:
        constraint = None
    if constraint is None:
        return f"the model's kind of distribution, {distribution_name(fn)},"
    return (
        "dist.TransformedDistribution(dist.Normal(loc, scale), "
        f"torch.distributions.biject_to(constraints.{constraint}))"
    )


def set_up_on(guide: Any) -> Mapping[str, Any]:
    """Site -> the prior whose support an autoguide took when it was set up."""
    parts = guide.modules() if isinstance(guide, AutoGuide) else ()
    return {
        name: site["fn"]
        for part in parts
        if isinstance(part, AutoGuide) and not isinstance(part, AutoGuideList | AutoCallable)
        if part.prototype_trace is not None
        for name, site in part.prototype_trace.nodes.items()
        if site.get("type") == "sample" and not site["is_observed"]
    }


def check_support(name: str, model: Site, guide: Site, prototype: Any, autoguide: str) -> None:
    """Whether the guide's draws of a latent lie in the model's support.

    An autoguide maps onto the support of the ``prototype`` that it was set up on.
    """
    p, q = model["fn"], guide["fn"]
    if isinstance(core(p), dist.Delta):
        return
    at_fault, remedy = distribution_name(q), f"Use {_replacement(p)} in the guide."
    ours, theirs, discrete = support_box(p), support_box(q), is_discrete(q)
    if isinstance(core(q), dist.Delta):
        theirs = None  # a point: it is the draw that counts
    if prototype is not None:
        theirs, discrete = _box(stated(prototype)), is_discrete(prototype)
        at_fault, remedy = autoguide, "Build it anew from this model."
        if type(core(p)).support is TransformedDistribution.support:
            remedy = "Sample the base distribution and transform the draw in the model."
    fits = not theirs or (ours and theirs.inside(ours) and ours.discrete == discrete)
    if (ours or _joint(p)) and not fits:
        raise PreflightError(
            f"At site '{name}' the guide's {at_fault} has support {theirs}, which is not inside "
            f"that of the model's {distribution_name(p)}, {describe(p)}.",
            name,
            remedy,
        )
    same = _joint(p) and _joint(p) == _joint(q) and not isinstance(core(q), dist.Delta)
    out = None if prototype is not None or same else outside(p, guide["value"])
    if out is not None and out.any():
        raise PreflightError(
            f"The guide's draw {words.item(guide['value'], out)} of '{name}' lies outside the "
            f"support of the model's {distribution_name(p)}, {describe(p)}.",
            name,
            "Constrain what the guide returns there, e.g. with pyro.param(..., constraint=...) or "
            "biject_to(the model's support).",
        )


def check_fixed_support(name: str, one: Site, other: Site, autoguide: str) -> None:
    """Whether a support that an autoguide fixed at its set-up moves with other latents."""
    if any(f.full_size not in (None, f.size) for f in one["cond_indep_stack"]):
        return  # two different minibatches
    first, second = (_box(stated(site["fn"])) for site in (one, other))
    if first and second and not (first.inside(second) and second.inside(first)):
        raise PreflightError(
            f"The support of '{name}' depends on other latents, {first} in one draw and {second} "
            f"in another, but {autoguide} fixes it at set-up.",
            name,
            f"Sample a '{name}_unit' of fixed support and compute '{name}' from it, or write the "
            "guide by hand.",
        )
