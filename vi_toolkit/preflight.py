"""Checks made before step one: do model, guide and data fit together?

Pyro reports most of these mistakes late and from deep inside torch, and some of them never. Here
each is one :class:`~vi_toolkit.errors.PreflightError` that names the site and what to change.
A correct model must pass, so a check that depends on where the latents happen to be (a density
that is not finite, a matrix that is not positive definite) raises only if it fails everywhere.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import itertools
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to, transforms

from vi_toolkit.errors import PreflightError
from vi_toolkit.scope import borrowed_globals, seeded_state

Site = Any  # a message of Pyro's trace: its name, fn, value, plates, ...

# A density must be non-finite, or raise, at all of these before it counts as a mistake.
GUIDE_DRAWS = 10
PRIOR_DRAWS = 5


def preflight(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Mapping[str, Any],
    subsample: Mapping[str, int] | None = None,
    reparameterised: bool | None = None,
    enumerate: bool = False,
) -> None:
    """Raise :class:`PreflightError` if model, guide and data do not fit together.

    Runs the model two to four times and the guide once (more only when something is wrong), with
    Pyro's validation on and in its own parameter store, random state and default dtype, so that
    nothing of the caller's changes.

    Args:
        model: Pyro model, called as ``model(**data)``. If it carries ``model.LATENTS``, or is the
            ``model`` of a module with ``LATENTS`` (site name -> tuple of dims: () for a global
            scalar, a string for a plate or a named dimension, an int for a size), its latents are
            checked against that.
        guide: Pyro guide, called as ``guide(**data)``; an autoguide class means ``guide(model)``.
        data: keyword arguments. Their float tensors must be finite: fill in what is missing and
            mask it in the model. They must also share one dtype, which becomes the default dtype
            for the checks, so that a model's own constants follow its data.
        subsample: plate name -> minibatch size.
        reparameterised: True if the estimator needs gradients through the guide's draws.
        enumerate: whether latents marked ``infer={"enumerate": "parallel"}`` are summed out, and
            so may be missing in the guide.

    Raises:
        PreflightError: with ``site`` and ``remedy``.

    Warns:
        UserWarning: if there are data but no observed site. This is no error, because a density
            written without observations (a known target, say) is a legitimate model whose data
            are its constants; an argument left at None, however, is a forgotten observation and
            raises.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mean", dist.Normal(0.0, 1.0))
        >>> preflight(model, guide, {"y": torch.zeros(3)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vi_toolkit.errors.PreflightError: The guide does not sample the model's latent 'mu'. ...
    """
    for role, fn in (("model", model), ("guide", guide)):
        if not callable(fn):
            raise PreflightError(
                f"The {role} is {_a(fn)}, which cannot be called.",
                remedy=f"Pass a function or PyroModule to be called as {role}(**data).",
            )
    _check_data(data)
    data = dict(data)
    guide = private_guide(model, guide)
    _check_signature("model", model, data)
    _check_signature("guide", guide, data)
    floats = {v.dtype for _, _, v in _tensors(data) if v.is_floating_point() and v.dim()}
    usual = floats & {torch.float32, torch.float64}
    dtype = usual.pop() if usual else None
    with (
        borrowed_globals(rng_state=seeded_state(0), dtype=dtype, validate=True),
        warnings.catch_warnings(),
        poutine.block(),
    ):
        warnings.simplefilter("ignore")  # the fit itself will show them
        checks = _Checks(model, guide, data, reparameterised, enumerate)
        warning = checks.run(subsample or {})
    if warning:
        warnings.warn(warning, UserWarning, stacklevel=2)


# --- the data -------------------------------------------------------------------------------------


def _tensors(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    """Every strided tensor in the data: its key, the expression that reaches it, itself."""

    def walk(key: str, label: str, value: Any) -> Iterator[tuple[str, str, Tensor]]:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield key, label, value
        elif isinstance(value, Mapping):
            for name, part in value.items():
                yield from walk(key, f"{label}[{name!r}]", part)
        elif isinstance(value, list | tuple):
            for i, part in zip(itertools.count(), value):
                if not isinstance(part, int | float | str):
                    yield from walk(key, f"{label}[{i}]", part)

    for key, value in data.items():
        yield from walk(key, _entry(key), value)


def _arrays(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    """Numpy arrays and pandas objects among the data, as tensors where they hold numbers."""
    for key, value in data.items():
        if isinstance(value, np.ndarray) or hasattr(value, "to_numpy"):
            array = np.asarray(value)
            if array.dtype.kind in "fiub":
                yield key, _entry(key), torch.from_numpy(np.array(array, dtype=float))


def _check_data(data: Any) -> None:
    if not isinstance(data, Mapping):
        raise PreflightError(
            f"data is {_a(data)}, but model and guide are called as model(**data).",
            remedy='Pass a dict of arguments, e.g. {"X": X, "y": y}.',
        )
    for key in data:
        if not isinstance(key, str):
            raise PreflightError(
                f"data has the key {key!r}, which is {_a(key)}.",
                site=str(key),
                remedy="Its keys are names of the model's arguments: make them strings.",
            )
    tensors = list(_tensors(data))
    numbers = [*tensors, *_arrays(data)]
    for key, label, value in numbers:
        if value.numel() == 0:
            raise PreflightError(
                f"{label} is empty (shape {_shape(value.shape)}).",
                site=key,
                remedy="Look at the filter or split that made it, or leave it out.",
            )
    # A scalar on the CPU mixes with any device, and a scalar of any float dtype with any other.
    sized = [entry for entry in tensors if entry[2].dim()]
    floats = [entry for entry in sized if entry[2].is_floating_point()]
    for attribute, group in (("device", sized), ("dtype", floats)):
        for key, label, value in group[1:]:
            one, other = getattr(group[0][2], attribute), getattr(value, attribute)
            if one != other:
                on, to = ("on ", f'"{one}"') if attribute == "device" else ("", str(one))
                raise PreflightError(
                    f"{group[0][1]} is {on}{_plain(one)} but {label} is {on}{_plain(other)}.",
                    site=key,
                    remedy=f"Use one {attribute}, e.g. {label}.to({to}).",
                )
    for key, label, value in numbers:
        if not value.is_floating_point() or value.is_meta:
            continue
        bad = ~torch.isfinite(value)
        if bad.any():
            index, count = _first(bad), int(bad.sum())
            values = f"{count} values that are not finite, the first" if count > 1 else "the value"
            raise PreflightError(
                f"{label} has {values} {value[index].item()}{_at(index)}.",
                site=key,
                remedy="Drop or impute what is missing, or fill it with any valid number and leave "
                "it out of the density with poutine.mask.",
            )


# --- the signatures -------------------------------------------------------------------------------


def _handler(fn: Any) -> tuple[Messenger | None, Any]:
    """The outermost effect handler of a callable such as ``poutine.block(model)``, and the rest."""
    inner = fn.func if isinstance(fn, functools.partial) else None
    if isinstance(inner, functools.partial) and len(inner.args) == 2:
        handler, rest = inner.args
        if isinstance(handler, Messenger):
            return handler, rest
    return None, fn


def _unwrap(fn: Any) -> Any:
    """The function inside all effect handlers."""
    handler, inner = _handler(fn)
    return fn if handler is None else _unwrap(inner)


def _signature(fn: Any) -> inspect.Signature | None:
    fn = _unwrap(fn)
    if isinstance(fn, Messenger):  # a guide made of effects passes everything to its model
        return None
    if isinstance(fn, torch.nn.Module):
        fn = fn.forward
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return None


def _check_signature(role: str, fn: Any, data: Mapping[str, Any]) -> None:
    signature = _signature(fn)
    if signature is None:
        return
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    unknown = [key for key in data if key not in names]
    for p in named:
        if p.default is p.empty and p.name not in data:
            twin = _nearest(p.name, unknown)
            keys = f"its keys: {', '.join(data)}" if data else "it is empty"
            raise PreflightError(
                f"The {role} needs the argument '{p.name}', which data does not have ({keys}).",
                site=p.name,
                remedy=f'Rename {_entry(twin)} to "{p.name}".'
                if twin
                else f"Add {_entry(p.name)}.",
            )
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        key = unknown[0]
        remedy = f"Remove {_entry(key)} or add the argument."
        if role == "guide":
            remedy = f"Give the guide the model's arguments: def guide({', '.join(data)})."
        elif twin := _nearest(key, [n for n in names if n not in data]):
            remedy = f'Rename {_entry(key)} to "{twin}".'
        raise PreflightError(
            f"The {role} has no argument '{key}' (it takes {', '.join(names) or 'none'}).",
            site=key,
            remedy=remedy,
        )


# --- running model and guide ----------------------------------------------------------------------


@dataclass
class _Run:
    """One run of the model or guide: its sample sites so far, and what stopped it."""

    sites: dict[str, Site] = field(default_factory=dict)
    minibatches: dict[str, Site] = field(default_factory=dict)  # the plates' own sites
    plates: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # size, subsample size
    error: Exception | None = None
    last: str | None = None  # the last site begun
    problems: dict[str, str] = field(default_factory=dict)  # site -> why its density is not finite

    def latents(self) -> dict[str, Site]:
        return {name: site for name, site in self.sites.items() if not site["is_observed"]}

    def subsamples(self) -> bool:
        return any(len(s["value"]) < self.plates[n][0] for n, s in self.minibatches.items())

    def observed(self) -> dict[str, Site]:
        return {
            name: site
            for name, site in self.sites.items()
            if site["is_observed"] and not site["infer"].get("_deterministic")
        }


class _Record(Messenger):
    """Note each site before it is drawn, so that a run that fails says how far it came."""

    def __init__(self, run: _Run):
        super().__init__()
        self.run = run

    def _pyro_sample(self, msg: Site) -> None:
        if not site_is_subsample(msg):
            self.run.last = msg["name"]
        else:
            batch = msg["fn"].subsample_size
            batch = None if batch is None else int(batch)
            self.run.plates[msg["name"]] = (int(msg["fn"].size), batch)


class _Start(Messenger):
    """Values for latents: the middle of the unconstrained space, or draws from the prior.

    An improper prior cannot be drawn from; a standard Normal on the unconstrained scale stands in.
    """

    def __init__(self, data: Mapping[str, Any], prior: bool = False):
        super().__init__()
        self.prior = prior
        self.device = next((value.device for _, _, value in _tensors(data)), None)

    def _pyro_sample(self, msg: Site) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        fn = msg["fn"]
        try:
            with torch.no_grad():
                draw = fn(*msg["args"], **msg["kwargs"])
        except NotImplementedError:
            draw = None
        if draw is None or not self.prior:
            try:
                transform = biject_to(fn.support)
                if draw is None:
                    shape = transform.inverse_shape(fn.shape())
                    make = torch.randn if self.prior else torch.zeros
                    draw = transform(make(shape, device=self.device))
                else:
                    draw = transform(torch.zeros_like(transform.inv(draw)))
            except (AttributeError, NotImplementedError):  # discrete, or no bijection known
                if draw is None:
                    raise
        msg["value"] = draw


class _Replay(Messenger):
    """The guide's values and minibatches for the model's latents."""

    def __init__(self, guide: _Run):
        super().__init__()
        self.guide = guide

    def _pyro_sample(self, msg: Site) -> None:
        sites = self.guide.minibatches if site_is_subsample(msg) else self.guide.sites
        site = sites.get(msg["name"])
        if site is not None and not msg["is_observed"] and not site["is_observed"]:
            msg["value"] = site["value"]
            msg["done"] = True


def _run(fn: Callable[..., Any], data: Mapping[str, Any], *handlers: Messenger) -> _Run:
    """Trace ``fn(**data)``; an exception ends up in the result with the sites before it."""
    run = _Run()
    tracer = poutine.trace()
    try:
        with ExitStack() as stack:
            for handler in (tracer, _Record(run), *handlers):
                stack.enter_context(handler)
            fn(**data)
    except Exception as error:
        run.error = error
    nodes = tracer.trace.nodes
    messenger = _unwrap(fn)
    if isinstance(messenger, GuideMessenger) and run.error is None:
        # Such a guide runs the model; its own trace holds only what the guide samples.
        nodes = messenger.get_traces()[1].nodes
    for name, site in nodes.items():
        if site["type"] == "sample":
            (run.minibatches if site_is_subsample(site) else run.sites)[name] = site
    return run


def _run_model(model: Callable[..., Any], data: Mapping[str, Any], *handlers: Messenger) -> _Run:
    """As ``_run``, and the density of every site."""
    run = _run(model, data, *handlers)
    if run.error is None:
        for name, site in run.sites.items():
            run.last = name
            try:
                problem = _density_problem(site)
            except Exception as error:
                run.error = error
                break
            if problem:
                run.problems[name] = problem
    return run


def _density_problem(site: Site) -> str | None:
    """Why the log density at a site is not finite, or None if it is. Sets site["log_prob"]."""
    fn, value = site["fn"], site["value"]
    if site["infer"].get("_deterministic") or isinstance(value, int | float):
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"the observation is {_a(value)}, not a tensor")
    try:
        log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    except ValueError:
        if _clash(site):
            raise
        # Outside the support somewhere: that may be masked, or no more than rounding.
        try:
            log_prob = _unvalidated(fn).log_prob(value, *site["args"], **site["kwargs"])
        except (RuntimeError, ValueError, IndexError):
            log_prob = torch.full(fn.batch_shape, torch.nan)
        outside = _outside(fn, value)
        if outside is not None:
            events = outside.flatten(-_entries_of(fn)).any(-1) if _entries_of(fn) else outside
            log_prob = torch.where(events, -torch.inf, log_prob)
    site["log_prob"] = log_prob
    bad = ~torch.isfinite(scale_and_mask(log_prob, site["scale"], site["mask"]))
    if not bad.any():
        return None
    outside = _outside(fn, value, edge=True) if site["is_observed"] else None
    if outside is not None:
        outside = outside & bad.reshape(bad.shape + (1,) * _entries_of(fn))
        if outside.any():
            index = _first(outside)
            return (
                f"the observation {_item(value, outside, index)}{_at(index)} lies outside the "
                f"support of {_name(fn)}, {_support_text(fn)}"
            )
    index = _first(bad)
    return f"its log density is {log_prob.expand(bad.shape)[index].item():g}{_at(index)}"


def _unvalidated(fn: Any) -> Any:
    """A distribution that does not check the values whose density it is asked for."""
    fn = copy.copy(fn)
    fn._validate_args = False
    for part in ("base_dist", "_component_distribution"):
        if hasattr(fn, part):
            setattr(fn, part, _unvalidated(getattr(fn, part)))
    return fn


def _numerical(error: Exception | None) -> bool:
    """Whether an error depends on where the latents are, so that other draws may do without it."""
    if isinstance(error, torch.linalg.LinAlgError | ArithmeticError):
        return not isinstance(error, ZeroDivisionError)  # Pyro's complaint about an empty plate
    signs = (
        "to satisfy the constraint",
        "to be within the support",
        "positive-definite",
        "positive definite",
        "singular",
        "contains either `inf`, `nan` or element < 0",
    )
    return isinstance(error, ValueError | RuntimeError) and any(s in str(error) for s in signs)


def _passed(runs: list[_Run]) -> bool:
    """Whether each site's density was finite in one run at least."""
    complete = [set(run.problems) for run in runs if run.error is None]
    return bool(complete) and not set.intersection(*complete)


# --- words ----------------------------------------------------------------------------------------


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def _at(index: tuple[int, ...]) -> str:
    return f" at index {index[0] if len(index) == 1 else index}" if index else ""


def _entry(key: Any) -> str:
    return f'data["{key}"]'


def _first(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in bad.nonzero()[0])


def _item(value: Tensor, flags: Tensor, index: tuple[int, ...]) -> str:
    """The entry or event of a value that a flag stands for."""
    event = value.shape[value.dim() - (flags.dim() < value.dim()) * (value.dim() - flags.dim()) :]
    item = value.expand(flags.shape + event)[index]
    return f"{item.item():g}" if item.numel() == 1 else str(item.flatten().tolist()[:4])


def _line(error: BaseException | None) -> str:
    text = " ".join(str(error).split()).partition(" Trace Shapes:")[0] or "no message"
    return text if len(text) <= 200 else text[:197] + "..."


def _list(names: Any) -> str:
    names = [f"'{n}'" for n in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _name(fn: Any) -> str:
    return type(_core(fn)).__name__


def _nearest(name: str, names: Any) -> str | None:
    # difflib rates case as heavily as any other letter.
    lower = {str(n).lower(): str(n) for n in names}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    return lower[close[0]] if close else None


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _shape(shape: Any) -> str:
    return str(tuple(shape))


# --- shapes and supports --------------------------------------------------------------------------


def _plates(site: Site) -> dict[str, Any]:
    """Vectorised plates around a site, by name."""
    return {f.name: f for f in site["cond_indep_stack"] if f.vectorized}


def _undeclared(site: Site, shape: Any) -> dict[int, int]:
    """Batch dimensions (counted from the right) that belong to no plate, and their sizes."""
    declared = {f.dim for f in _plates(site).values()}
    sizes = {i - len(shape): n for i, n in zip(range(len(shape)), shape, strict=True)}
    return {dim: n for dim, n in sizes.items() if n > 1 and dim not in declared}


def _clash(site: Site) -> bool:
    """Whether a value cannot be one of its distribution, by shape alone."""
    fn, value = site["fn"], site["value"]
    if not isinstance(value, Tensor):
        return False
    split = value.dim() - fn.event_dim
    if split < 0 or value.shape[split:] != fn.event_shape:
        return True
    sizes = zip(reversed(value.shape[:split]), reversed(fn.batch_shape), strict=False)
    return any(a != b and 1 not in (a, b) for a, b in sizes)


def _core(fn: Any) -> Any:
    """A distribution without the wrappers that change neither its family nor its support."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _support(fn: Any) -> Any:
    """A distribution's support without ``constraints.independent`` around it."""
    try:
        return _strip(fn.support)
    except (AttributeError, NotImplementedError):
        return None


def _strip(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _is_discrete(support: Any) -> bool:
    try:
        return bool(support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


# Sets whose entries depend on each other, so that no box lies inside: name -> constraint.
_JOINT_KINDS = {
    "the simplex": "simplex",
    "positive ordered vectors": "positive_ordered_vector",
    "ordered vectors": "ordered_vector",
    "Cholesky factors of correlation matrices": "corr_cholesky",
    "unit lower-triangular matrices": "unit_lower_cholesky",
    "lower Cholesky factors": "lower_cholesky",
    "lower-triangular matrices": "lower_triangular",
    "correlation matrices": "corr_matrix",
    "positive definite matrices": "positive_definite",
    "the unit sphere": "sphere",
    "one-hot vectors": "one_hot",
}
_BOUNDED = (
    constraints.greater_than,
    constraints.greater_than_eq,
    constraints.less_than,
    constraints.interval,
    constraints.half_open_interval,
    constraints.integer_interval,
    type(constraints.nonnegative_integer),
)


def _kind(support: Any) -> str | None:
    for kind, name in _JOINT_KINDS.items():
        if isinstance(support, type(getattr(constraints, name))):
            return kind
    return None


@dataclass
class _Box:
    """Entry-wise bounds: the support of a scalar, or of entries that are free of each other."""

    lower: Any = -torch.inf
    upper: Any = torch.inf
    discrete: bool = False

    def bounds(self) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(self.lower).float(), torch.as_tensor(self.upper).float()

    def inside(self, other: _Box) -> bool:
        (lower, upper), (least, most) = self.bounds(), other.bounds()
        try:  # with a slack, since a bound computed twice may differ in the last digit
            return bool(
                (lower >= least - 1e-5 * least.abs().nan_to_num(0, 0).clamp_min(1)).all()
                and (upper <= most + 1e-5 * most.abs().nan_to_num(0, 0).clamp_min(1)).all()
            )
        except RuntimeError:  # bounds that do not broadcast: shapes are another check's matter
            return True

    def unbounded(self) -> bool:
        return _Box().inside(self)

    def __str__(self) -> str:
        lower, upper = (
            f"{bound.min().item():g}" + ("" if bound.min() == bound.max() else ", ...")
            for bound in self.bounds()
        )
        return f"integers from {lower} to {upper}" if self.discrete else f"({lower}, {upper})"


def _box(support: Any) -> _Box | None:
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        box = _box(_strip(support.base_constraint))
        # Bounds that differ between components have a dimension that values do not have.
        return box if box and all(bound.numel() == 1 for bound in box.bounds()) else None
    if isinstance(support, type(constraints.real)):
        return _Box()
    if isinstance(support, type(constraints.boolean)):
        return _Box(0, 1, discrete=True)
    if isinstance(support, _BOUNDED):
        lower = getattr(support, "lower_bound", -torch.inf)
        return _Box(lower, getattr(support, "upper_bound", torch.inf), support.is_discrete)
    return None


def _reach(fn: Any) -> _Box | None:
    """The box that a distribution's draws fill; None if that is not known.

    The support of a TransformedDistribution is its last codomain, which for an affine map is the
    whole line whatever went in: follow the bounds through the transforms instead. Distributions
    with a name of their own (LogNormal, Gumbel, ...) state their support.
    """
    fn = _core(fn)
    if getattr(type(fn), "support", None) is not TransformedDistribution.support:
        return _box(_support(fn))
    box = _reach(fn.base_dist)
    for transform in fn.transforms:
        box = _image(transform, box)
    return box


def _image(transform: Any, box: _Box | None) -> _Box | None:
    """Image of a box under a transform."""
    if isinstance(transform, transforms.ComposeTransform):
        for part in transform.parts:
            box = _image(part, box)
        return box
    if isinstance(transform, transforms.IndependentTransform):
        return _image(transform.base_transform, box)
    domain, codomain = _box(_strip(transform.domain)), _box(_strip(transform.codomain))
    entrywise = transform.domain.event_dim == transform.codomain.event_dim == 0
    if box and domain and entrywise and transform.bijective and not domain.inside(box):
        # Increasing or decreasing in each entry, so the bounds go to the bounds.
        ends = [transform(end) for end in box.bounds()]
        if box.inside(domain) and not any(torch.isnan(end).any() for end in ends):
            return _Box(torch.minimum(*ends), torch.maximum(*ends))
    if codomain and codomain.unbounded() and not (box and box.unbounded()):
        return None  # a permutation, say, which keeps whatever bounds there were
    return codomain


def _support_text(fn: Any) -> str:
    box = _reach(fn)
    return str(box) if box else _kind(_support(fn)) or str(_support(fn))


def _entries_of(fn: Any) -> int:
    """How many dimensions ``_outside`` adds to the batch shape: an event's, if it is a box."""
    return fn.event_dim if _box(_support(fn)) else 0


def _outside(fn: Any, value: Tensor, edge: bool = False) -> Tensor | None:
    """What lies outside a support by more than rounding; None if that is not known.

    Entry by entry for bounds, else event by event. The edge of an interval counts as outside only
    if asked: exp underflows to 0 and a sigmoid rounds to 1.
    """
    support = _support(fn)
    box = _box(support)
    if box and not box.discrete and not edge:
        return ~((value >= box.lower) & (value <= box.upper))
    if _kind(support) == "the simplex":  # torch allows 1e-6, which a long float32 sum exceeds
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
    box, kind = _reach(fn), _kind(_support(fn))
    if kind == "the simplex":
        return "dist.Dirichlet(concentration)"
    if str(box) == "(0, inf)":
        return "dist.LogNormal(loc, scale)"
    if str(box) == "(0, 1)":
        return "dist.Beta(concentration1, concentration0)"
    if kind:
        constraint = _JOINT_KINDS[kind]
    elif box is None or box.discrete or box.unbounded():
        return "the model's own kind of distribution"
    else:
        lower, upper = str(box)[1:-1].split(", ", 1)
        constraint = f"interval({lower}, {upper})"
        if "inf" in (lower, upper):
            constraint = f"greater_than({lower})"
        elif "-inf" in (lower, upper):
            constraint = f"less_than({upper})"
    return (
        "dist.TransformedDistribution(dist.Normal(loc, scale), "
        f"torch.distributions.biject_to(constraints.{constraint}))"
    )


# --- the guide ------------------------------------------------------------------------------------


def private_guide(model: Callable[..., Any], guide: Any) -> Any:
    """A copy of the guide that a fit or a check may set up and change.

    Functions are returned as they are; an autoguide class is built on the model. Two shortcomings
    of Pyro's autoguides are mended: copying makes the copy and the original forget their model,
    and their starting values are drawn from the prior, which an improper prior does not allow.
    """
    if isinstance(guide, type) and issubclass(guide, AutoGuide):
        guide = guide(model)
    if not isinstance(guide, torch.nn.Module):
        return guide
    autos = [m for m in guide.modules() if isinstance(m, AutoGuide)]
    kept = [(auto._model, auto.master) for auto in autos]
    # Prototypes are only read once they are there, and may hold tensors that cannot be copied.
    shared = {id(auto.prototype_trace): auto.prototype_trace for auto in autos}
    try:
        twin = copy.deepcopy(guide, shared)
    finally:
        for auto, (its_model, master) in zip(autos, kept, strict=True):
            auto._model, auto.master = its_model, master
    copies = [m for m in twin.modules() if isinstance(m, AutoGuide)]
    for auto, ((fn,), _) in zip(copies, kept, strict=True):
        handler, inner = _handler(fn)
        if isinstance(handler, InitMessenger):
            fn = InitMessenger(functools.partial(_first_value, handler.init_fn))(inner)
        auto._model = (fn,)
    return twin


def _first_value(init: Callable[[Site], Tensor], site: Site) -> Tensor:
    try:
        return init(site)
    except NotImplementedError:  # no draws from an improper prior
        transform = biject_to(site["fn"].support)
        return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


def _set_up_on(guide: Any) -> dict[str, Any]:
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


# --- exceptions of model and guide ----------------------------------------------------------------

# What Pyro says -> site, sentence, remedy.
_PYRO_SAYS = [
    (
        r"Multiple sample sites named '(?P<site>.+)'",
        "The {role} has two sites named '{site}'.",
        'Give each its own name, e.g. f"{site}_{{i}}" inside a loop.',
    ),
    (
        r"^(?P<site>\S+) is already in the trace as a",
        "The {role} uses the name '{site}' for a parameter and for a sample site.",
        "Rename one of them.",
    ),
    (
        r"Shape mismatch inside plate\('(?P<plate>.+)'\) at site (?P<site>\S+) "
        r"dim (?P<dim>-\d+), (?P<size>\d+) vs (?P<actual>\d+)",
        "In the {role}, plate '{plate}' has size {size} but site '{site}' inside it has size "
        "{actual} in dimension {dim}.",
        'Size the plate by the data, pyro.plate("{plate}", {actual}), or move a dimension that is '
        "not the plate's into .to_event(1).",
    ),
    (
        r'at plates "(?P<site>.+)" and "(?P<other>.+)", collide at dim=(?P<dim>-\d+)',
        "In the {role}, plates '{site}' and '{other}' both claim dimension {dim}.",
        "Give each its own, e.g. dim=-1 and dim=-2.",
    ),
    (
        r"does not support sequential pyro.plate",
        "The {role} {guide} cannot have a latent inside a loop over a plate.",
        "Write the plate as a context, `with pyro.plate(...):`, or write the guide by hand.",
    ),
]
_DISCRETE_REMEDY = (
    'Mark it infer={{"enumerate": "parallel"}}, hide it from an autoguide with poutine.block('
    'model, hide=["{site}"]) and fit with estimator=pyro.infer.TraceEnum_ELBO(), or sum it out of '
    "the model, e.g. with dist.MixtureSameFamily."
)


def _missing_discrete(name: str) -> PreflightError:
    return PreflightError(
        f"The model's latent '{name}' is discrete and the guide does not sample it.",
        site=name,
        remedy=_DISCRETE_REMEDY.format(site=name),
    )


def _as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a list, array or pandas object; floats in the default dtype."""
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if dtype is None and tensor.is_floating_point():
        dtype = torch.get_default_dtype()
    return tensor.to(dtype) if dtype else tensor


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return _plain(value.dtype)
    module = type(value).__module__.partition(".")[0]
    return f"a {'' if module == 'builtins' else module + '.'}{type(value).__name__}"


# --- the checks -----------------------------------------------------------------------------------


class _Checks:
    """The checks that need model and guide to run."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: dict[str, Any],
        reparameterised: bool | None,
        enumerated: bool,
    ):
        self.model = model
        self.guide = guide
        self.data = data
        self.reparameterised = reparameterised
        self.enumerated = enumerated
        self.automatic = isinstance(guide, AutoGuide)
        self.sites: dict[str, Site] = {}  # the model's, from the first run that went through

    def run(self, subsample: Mapping[str, int]) -> str | None:
        """All checks; returns a warning, if there is one."""
        runs = []
        for prior in (False, True, True):
            runs.append(self._model_alone(prior))
            if runs[-1].error is None:
                self._check_model(runs[-1], subsample)
                break
            if not _numerical(runs[-1].error):
                raise self._explained("model", runs[-1]) from runs[-1].error
        guide = self._run_guide()
        self._check_guide(guide)
        replayed = self._replay(guide)
        runs.append(replayed)
        known = runs[0] if len(runs) == 2 else runs[-2]
        if known.error is not None:
            self._check_densities(runs)
            known = next(run for run in runs if run.error is None)
            self._check_model(known, subsample)
        self._check_sites(known, guide)
        self._check_plates(known, guide)
        if self.automatic:
            runs.append(self._model_alone(prior=True))
            self._check_fixed_supports(known, runs[-1])
        for name, site in guide.latents().items():
            if name in known.sites:
                # Bounds may follow another latent, and sizes the guide's minibatch: then compare
                # with the model at the guide's own draw, as far as it got there.
                there = replayed.sites.get(name, known.sites[name])
                self._check_site(name, there if guide.subsamples() else known.sites[name], site)
                self._check_support(name, there, site)
        if replayed.error is not None and not _numerical(replayed.error):
            raise self._explained("model", replayed, " and the guide's draws") from replayed.error
        self._check_densities(runs)
        return self._unobserved(known)

    def _model_alone(self, prior: bool, data: dict[str, Any] | None = None) -> _Run:
        return _run_model(self.model, data or self.data, _Start(self.data, prior))

    def _run_guide(self) -> _Run:
        guide = _Run()
        for validate in (True, False, False):
            # An autoguide runs the model, and a fit does so without validation.
            with pyro.validation_enabled(validate):
                guide = _run(self.guide, self.data)
            if not _numerical(guide.error):
                break
        if guide.error is not None:
            raise self._explained("guide", guide) from guide.error
        return guide

    def _replay(self, guide: _Run) -> _Run:
        return _run_model(self.model, self.data, _Start(self.data, prior=True), _Replay(guide))

    # -- errors of a run

    def _explained(self, role: str, run: _Run, when: str = "") -> PreflightError:
        """The sentence for an exception that the model or guide raised."""
        error, text = run.error, str(run.error)
        guide = type(self.guide).__name__ if role == "guide" and self.automatic else ""
        for pattern, message, remedy in _PYRO_SAYS:
            if match := re.search(pattern, text):
                groups = {"site": run.last, **match.groupdict(), "role": role, "guide": guide}
                if groups["site"] in run.plates and "two sites" in message:
                    message = "The {role} makes the plate '{site}' twice."
                    remedy = (
                        'Make it once, plate = pyro.plate("{site}", ...), and enter it again with '
                        "`with plate:`."
                    )
                return PreflightError(
                    message.format(**groups), site=groups["site"], remedy=remedy.format(**groups)
                )
        if match := re.search(r"cannot handle discrete sample site '(.+?)'", text):
            return _missing_discrete(match[1])
        if "size cannot be zero" in text and run.plates:
            name = list(run.plates)[-1]
            return PreflightError(
                f"Plate '{name}' of the {role} has size 0.",
                site=name,
                remedy="Size it by data that are not empty.",
            )
        if "does not support sampling" in text:
            improper = [n for n, s in self.sites.items() if _name(s["fn"]) == "ImproperUniform"]
            return PreflightError(
                f"The {role} {guide} draws from the improper prior of {_list(improper)}.",
                site=improper[0] if improper else None,
                remedy="Use AutoNormal or AutoMultivariateNormal, which do not, or a proper prior.",
            )
        if role == "model" and run.last in run.sites and _clash(run.sites[run.last]):
            return self._clash_error(run.last, run.sites[run.last])
        if not guide and not when and not _numerical(error):
            for conversion in self._conversions(role, run):
                return conversion
        remedy = f"Run {role}(**data) by itself to find the line."
        if "same device" in text:
            remedy = "Put the data and everything the model makes on one device."
        elif when:
            remedy = "Compare the shapes and values that the guide returns with the model's own."
        after = f", at or after site '{run.last}'" if run.last else ""
        line = _line(error)
        return PreflightError(
            f"The {role}{' ' * bool(guide)}{guide} raised {type(error).__name__} when run on the "
            f"data{when}{after}: {line}{'' if line[-1] in '.!?' else '.'}",
            site=run.last,
            remedy=remedy,
        )

    def _clash_error(self, name: str, site: Site) -> PreflightError:
        fn, frames = site["fn"], _plates(site).values()
        inside = "".join(f", inside plate '{f.name}' of size {f.size}" for f in frames)
        return PreflightError(
            f"{'Observed site' if site['is_observed'] else 'Site'} '{name}' has a value of shape "
            f"{_shape(site['value'].shape)}, but its distribution has batch shape "
            f"{_shape(fn.batch_shape)} and event shape {_shape(fn.event_shape)}{inside}.",
            site=name,
            remedy="Size plates and parameters by the data, e.g. "
            'pyro.plate("observations", len(y)), and index the data by the plate if it subsamples.',
        )

    def _conversions(self, role: str, run: _Run) -> Iterator[PreflightError]:
        """Entries of the data that, were they of another type, would let the run go through."""
        default = torch.get_default_dtype()
        other = torch.float32 if default == torch.float64 else torch.float64
        floating = ".double()" if default == torch.float64 else ".float()"
        arrays: dict[str, str] = {}  # entry -> how to make it a tensor
        integers, floats, short = {}, {}, {}
        for key, value in self.data.items():
            if isinstance(value, Tensor):
                if value.is_floating_point():
                    floats[key] = f"{_entry(key)}.to({other})"
                    short[key] = f"{_entry(key)}.to({default})"
                else:
                    integers[key] = _entry(key) + floating
            elif hasattr(value, "to_numpy"):
                arrays[key] = f"torch.as_tensor({_entry(key)}.to_numpy())"
            elif isinstance(value, np.ndarray | list | tuple):
                arrays[key] = f"torch.as_tensor({_entry(key)})"
        float_arrays = {key: make + floating for key, make in arrays.items()}
        for makes, dtype, needs in (
            (arrays, None, "needs a tensor"),
            (integers, default, "needs floats"),
            (float_arrays, default, "needs a float tensor"),
            (short, default, f"computes in {_plain(default)}"),
            (floats, other, f"computes in {_plain(other)}"),
        ):
            # Floats share one dtype, so they change together.
            least = len(makes) if needs.startswith("computes") else 1
            keys = self._smallest(role, list(makes), dtype, least)
            if keys:
                types = dict.fromkeys(_what(self.data[key]) for key in keys)
                yield PreflightError(
                    f"{' and '.join(map(_entry, keys))} {'are' if len(keys) > 1 else 'is'} "
                    f"{' and '.join(types)} where the {role} {needs} "
                    f"({type(run.error).__name__}: {_line(run.error)}).",
                    site=keys[0],
                    remedy=f"Pass {' and '.join(makes[key] for key in keys)}.",
                )

    def _smallest(
        self, role: str, keys: list[str], dtype: torch.dtype | None, least: int
    ) -> list[str]:
        """The smallest set of entries, of ``least`` at least, that lets the run go through."""
        for size in range(least, min(len(keys), max(least, 4)) + 1):
            for some in itertools.islice(itertools.combinations(keys, size), 16):
                try:
                    changed = {key: _as_tensor(self.data[key], dtype) for key in some}
                except (TypeError, ValueError, RuntimeError):
                    continue
                data = {**self.data, **changed}
                alone = (
                    self._model_alone(False, data) if role == "model" else _run(self.guide, data)
                )
                if alone.error is None or _numerical(alone.error):
                    return list(some)
        return []

    # -- the model by itself

    def _check_model(self, run: _Run, subsample: Mapping[str, int]) -> None:
        self.sites = run.sites
        if not run.latents():
            observed = f" (observed: {_list(run.observed())})" if run.observed() else ""
            raise PreflightError(
                f"The model has no latent variable{observed}.",
                remedy="Sample what is to be inferred with pyro.sample(name, prior), without obs.",
            )
        for name, site in run.sites.items():
            if "log_prob" in site and site["is_observed"]:
                self._check_broadcast(name, site)
            if self.enumerated and not site["infer"].get("_deterministic"):
                for dim, size in _undeclared(site, site["fn"].batch_shape).items():
                    raise PreflightError(
                        f"Site '{name}' has batch shape {_shape(site['fn'].batch_shape)} but no "
                        f"plate for dimension {dim}, which enumeration needs.",
                        site=name,
                        remedy=f'Sample it inside pyro.plate("...", {size}, dim={dim}), or call '
                        ".to_event(1) if the entries are one event.",
                    )
        self._check_subsample(run, subsample)
        self._check_latents(run)

    def _check_broadcast(self, name: str, site: Site) -> None:
        """An observation of shape (n,) against a mean of shape (n, 1) counts n^2 terms."""
        fn, shape = site["fn"], site["value"].shape
        batch = (1,) * 20 + tuple(shape[: len(shape) - fn.event_dim])
        for dim, size in _undeclared(site, site["log_prob"].shape).items():
            if batch[dim] == 1 and max(batch) > 1 and type(fn).__name__ != "Unit":
                raise PreflightError(
                    f"Observed site '{name}' has a value of shape {_shape(shape)}, but its "
                    f"distribution has batch shape {_shape(fn.batch_shape)}, so that every "
                    f"observation is counted {size} times.",
                    site=name,
                    remedy="Give the distribution's parameters the observation's shape, e.g. "
                    "mean.squeeze(-1).",
                )

    def _check_subsample(self, run: _Run, subsample: Mapping[str, int]) -> None:
        for name, batch in subsample.items():
            if name not in run.plates:
                twin = _nearest(name, run.plates)
                raise PreflightError(
                    f"subsample names the plate '{name}', which the model does not have (it has "
                    f"{_list(run.plates) or 'none'}).",
                    site=name,
                    remedy=f"Write '{twin}'." if twin else "Name a plate of the model.",
                )
            size = run.plates[name][0]
            try:
                good = not isinstance(batch, bool) and 1 <= operator.index(batch) <= size
            except TypeError:
                good = False
            if not good:
                raise PreflightError(
                    f"subsample asks for {batch!r} of the {size} in plate '{name}'.",
                    site=name,
                    remedy=f"Give a whole number from 1 to {size}.",
                )

    def _check_latents(self, run: _Run) -> None:
        latents = run.latents()
        for name, dims in _declared_latents(self.model).items():
            if name not in run.sites:
                twin = _nearest(name, latents)
                raise PreflightError(
                    f"LATENTS names '{name}', which is no site of the model (its latents: "
                    f"{_list(latents)}).",
                    site=name,
                    remedy=f"Write '{twin}' there." if twin else "Remove it there.",
                )
            if name not in latents:
                continue  # made deterministic or observed by an effect handler
            if not isinstance(dims, tuple | list):
                raise PreflightError(
                    f"LATENTS['{name}'] is {_a(dims)}.",
                    site=name,
                    remedy='Give a tuple of dims: () for a scalar, ("groups",) for a plate.',
                )
            site = latents[name]
            for plate in _plates(site):
                if plate not in dims:
                    what = f"of dims {tuple(dims)}" if dims else "a global scalar"
                    raise PreflightError(
                        f"LATENTS declares '{name}' {what}, but the model samples it inside plate "
                        f"'{plate}'.",
                        site=name,
                        remedy=f"Move its pyro.sample out of the plate, or add '{plate}' to its "
                        "dims if each member has its own.",
                    )
            shape, batch = tuple(site["fn"].shape()), tuple(site["fn"].batch_shape)
            if len(shape) != len(dims):
                # A plate at dim=-2 leaves a dimension of size 1 on its right: nobody declares it.
                plates = {f.dim for f in _plates(site).values()}
                kept = [n for i, n in zip(range(-len(batch), 0), batch, strict=True) if i in plates]
                kept = [*_undeclared(site, batch).values(), *kept]
                shape = (*kept, *site["fn"].event_shape)
            wrong = any(d != n for d, n in zip(dims, shape, strict=False) if isinstance(d, int))
            if len(shape) != len(dims) or wrong:
                raise PreflightError(
                    f"LATENTS declares '{name}' with dims {tuple(dims)}, but the model samples it "
                    f"with shape {_shape(shape)}.",
                    site=name,
                    remedy="Correct the one or the other: a name or size for each dimension.",
                )

    def _unobserved(self, run: _Run) -> str | None:
        """A warning for data that are not observed; an observation left out is an error."""
        if run.observed():
            return None
        signature = _signature(self.model)
        for p in signature.parameters.values() if signature else ():
            if p.default is None and self.data.get(p.name) is None:
                raise PreflightError(
                    f"The model observes nothing: its argument '{p.name}' is None.",
                    site=p.name,
                    remedy=f"Add {_entry(p.name)}.",
                )
        if not self.data:
            return None
        return (
            "The model observes nothing, so the posterior is the prior; if the data are meant as "
            "observations, pass them with obs= in pyro.sample."
        )

    # -- the guide, and the two together

    def _check_guide(self, guide: _Run) -> None:
        for name, site in guide.sites.items():
            infer, value = site["infer"], site["value"]
            if site["is_observed"]:
                if not infer.get("_deterministic") and not infer.get("is_auxiliary"):
                    raise PreflightError(
                        f"The guide observes '{name}'.",
                        site=name,
                        remedy="Remove its obs=: data enter through the model, and a guide only "
                        "samples latents.",
                    )
                continue
            if isinstance(value, Tensor) and torch.isnan(value).any():
                raise PreflightError(
                    f"The guide's draw of '{name}' is nan{_at(_first(torch.isnan(value)))}.",
                    site=name,
                    remedy="Check the initial values of the parameters it depends on.",
                )
            enumerated = self.enumerated and infer.get("enumerate")
            if self.reparameterised and not enumerated and not site["fn"].has_rsample:
                raise PreflightError(
                    f"The guide's {_name(site['fn'])} at site '{name}' has no reparameterised "
                    "draws, which this estimator needs.",
                    site=name,
                    remedy="Use another distribution there, or a score-function estimator such as "
                    "pyro.infer.Trace_ELBO().",
                )

    def _check_sites(self, model: _Run, guide: _Run) -> None:
        latents, sampled = model.latents(), guide.latents()
        extra = [
            name
            for name, site in sampled.items()
            if name not in latents and not site["infer"].get("is_auxiliary")
        ]
        enumerated = {
            name: site["infer"].get("enumerate") if self.enumerated else None
            for name, site in latents.items()
        }
        missing = [n for n in latents if n not in sampled and enumerated[n] != "parallel"]
        for name in missing:
            if enumerated[name] == "sequential":
                raise PreflightError(
                    f"The model's latent '{name}' asks for sequential enumeration, which works "
                    "only for sites of the guide.",
                    site=name,
                    remedy='Use infer={"enumerate": "parallel"}.',
                )
            if _is_discrete(_support(latents[name]["fn"])):
                raise _missing_discrete(name)
        if missing:
            name, others = missing[0], missing[1:]
            remedy = f'Add pyro.sample("{name}", ...) to the guide.'
            if twin := _nearest(name, extra):
                remedy = f"Rename the guide's '{twin}' to '{name}'."
            elif self.automatic:
                remedy = "Build the autoguide from this model, without hiding the site."
            raise PreflightError(
                f"The guide does not sample the model's latent '{name}'"
                f"{f' (nor {_list(others)})' if others else ''}.",
                site=name,
                remedy=remedy,
            )
        for name in extra:
            if name in model.sites:
                computed = model.sites[name]["infer"].get("_deterministic")
                how = "computes (pyro.deterministic)" if computed else "observes"
                raise PreflightError(
                    f"The guide samples '{name}', which the model {how}.",
                    site=name,
                    remedy="Remove it from the guide.",
                )
            twin = _nearest(name, latents)
            raise PreflightError(
                f"The guide samples '{name}', which is no site of the model"
                f"{f'; did you mean {twin!r}?' if twin else '.'}",
                site=name,
                remedy='Remove or rename it, or mark it infer={"is_auxiliary": True}.',
            )

    def _check_plates(self, model: _Run, guide: _Run) -> None:
        for name in guide.plates.keys() & model.plates.keys():
            (size, batch), (guide_size, guide_batch) = model.plates[name], guide.plates[name]
            if size != guide_size:
                remedy = f'Write pyro.plate("{name}", {size}) in the guide too.'
                if self.automatic:
                    remedy = "The autoguide was set up on other data: build a new one."
                raise PreflightError(
                    f"Plate '{name}' has size {size} in the model and {guide_size} in the guide.",
                    site=name,
                    remedy=remedy,
                )
            if None not in (batch, guide_batch) and batch != guide_batch:
                raise PreflightError(
                    f"Plate '{name}' has subsample_size {batch} in the model and {guide_batch} in "
                    "the guide.",
                    site=name,
                    remedy="Use the same in both.",
                )

    def _check_site(self, name: str, model: Site, guide: Site) -> None:
        """Plates and shape of one latent."""
        p, q = model["fn"], guide["fn"]
        for plate, frame in _plates(model).items():
            if plate not in _plates(guide):
                twin = _nearest(plate, _plates(guide))
                raise PreflightError(
                    f"The model samples '{name}' inside plate '{plate}', the guide does not"
                    f"{f' (it is inside {twin!r})' if twin else ''}.",
                    site=name,
                    remedy=f'Sample it inside `with pyro.plate("{plate}", '
                    f"{frame.full_size or frame.size}):` in the guide, as in the model.",
                )
        # Leading dimensions of size 1 do not count: broadcasting adds and drops them.
        batch, guide_batch = (
            tuple(itertools.dropwhile(lambda n: n == 1, fn.batch_shape)) for fn in (p, q)
        )
        if p.event_shape == q.event_shape and batch == guide_batch:
            return
        missing = p.event_dim - q.event_dim
        if name in _set_up_on(self.guide):
            remedy = "The autoguide was set up on other data or another model: build a new one."
        elif missing > 0 and isinstance(_core(q), dist.Delta):
            remedy = f"Write dist.Delta(..., event_dim={p.event_dim}) in the guide."
        elif missing > 0 and q.shape()[-p.event_dim :] == p.event_shape:
            remedy = f"Call .to_event({missing}) on the guide's distribution."
        elif missing >= 0:
            remedy = f"Give the guide's parameters the shape {_shape(p.shape())}"
            remedy += f" and call .to_event({missing})." if missing else "."
        else:
            event = f"with .to_event({p.event_dim})" if p.event_dim else "without .to_event"
            remedy = (
                f"Sample it {event} in the guide, inside the model's plates; a joint draw over a "
                "plate is an auxiliary site whose entries go to dist.Delta inside the plate."
            )
        raise PreflightError(
            f"Site '{name}' has batch shape {_shape(p.batch_shape)} and event shape "
            f"{_shape(p.event_shape)} in the model, {_shape(q.batch_shape)} and "
            f"{_shape(q.event_shape)} in the guide.",
            site=name,
            remedy=remedy,
        )

    def _check_support(self, name: str, model: Site, guide: Site) -> None:
        p, q = model["fn"], guide["fn"]
        if isinstance(_core(p), dist.Delta):
            return
        box, kind = _reach(p), _kind(_support(p))
        prototype = _set_up_on(self.guide).get(name)
        if prototype is not None:  # an autoguide maps onto the support it was shown
            reach, guide_kind = _box(_support(prototype)), _kind(_support(prototype))
            discrete = _is_discrete(_support(prototype))
        else:
            reach, guide_kind, discrete = _reach(q), _kind(_support(q)), _is_discrete(_support(q))
        is_point = prototype is None and isinstance(_core(q), dist.Delta)
        fits = not reach or (box and reach.inside(box) and box.discrete == discrete)
        if (kind or box) and not fits and not is_point:
            family, remedy = _name(q), f"Use {_replacement(p)} in the guide."
            if prototype is not None:
                family, remedy = type(self.guide).__name__, "Build it anew from this model."
                if type(_core(p)).support is TransformedDistribution.support:
                    remedy = "Sample the base distribution and transform the draw in the model."
            raise PreflightError(
                f"At site '{name}' the guide's {family} has support {reach}, which is not inside "
                f"that of the model's {_name(p)}, {_support_text(p)}.",
                site=name,
                remedy=remedy,
            )
        if prototype is not None or (kind and kind == guide_kind and not is_point):
            return
        outside = _outside(p, guide["value"])
        if outside is not None and outside.any():
            index = _first(outside)
            raise PreflightError(
                f"The guide's draw {_item(guide['value'], outside, index)} of '{name}'{_at(index)} "
                f"lies outside the support of the model's {_name(p)}, {_support_text(p)}.",
                site=name,
                remedy="Constrain what the guide returns there, e.g. with "
                "pyro.param(..., constraint=...) or biject_to(the model's support).",
            )

    def _check_fixed_supports(self, one: _Run, other: _Run) -> None:
        """Whether a support that an autoguide fixed at its set-up moves with other latents."""
        for name in _set_up_on(self.guide).keys() & one.sites.keys() & other.sites.keys():
            sites = one.sites[name], other.sites[name]
            if any(f.full_size not in (None, f.size) for f in _plates(sites[0]).values()):
                continue  # two different minibatches
            a, b = (_box(_support(site["fn"])) for site in sites)
            if a and b and not (a.inside(b) and b.inside(a)):
                raise PreflightError(
                    f"The support of '{name}' depends on other latents ({a} in one draw, {b} in "
                    f"another), but {type(self.guide).__name__} fixes it when it is set up.",
                    site=name,
                    remedy=f"Sample a '{name}_unit' with a fixed support and compute '{name}' from "
                    "it with pyro.deterministic, or write the guide by hand.",
                )

    def _check_densities(self, runs: list[_Run]) -> None:
        """A density that is finite nowhere. Starts are many, so one good draw is enough."""
        for i in range(GUIDE_DRAWS + PRIOR_DRAWS):
            if _passed(runs):
                return
            if i < PRIOR_DRAWS:
                runs.append(self._model_alone(prior=True))
            elif (guide := _run(self.guide, self.data)).error is None:
                runs.append(self._replay(guide))
        if _passed(runs):
            return
        complete = [run for run in runs if run.error is None]
        if not complete:
            raise self._explained("model", runs[0]) from runs[0].error
        last = complete[-1]
        name = next(n for n in last.problems if all(n in run.problems for run in complete))
        site, fn = last.sites[name], _name(last.sites[name]["fn"])
        remedy = f"Check the parameters of its {fn}, or start the guide elsewhere."
        if site["is_observed"]:
            remedy = f"Correct the data, or use another distribution than {fn}."
        if fn == "Unit":
            remedy = "Check what the pyro.factor adds up."
        raise PreflightError(
            f"At the {'observed' if site['is_observed'] else 'latent'} site '{name}', "
            f"{last.problems[name]}, in every one of {len(complete)} draws of the prior and the "
            "guide.",
            site=name,
            remedy=remedy,
        )


def _declared_latents(model: Any) -> Mapping[str, Any]:
    """``LATENTS`` of the model or of its module, where ``model`` is the module's model."""
    fn = _unwrap(model)
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(latents := getattr(fn, "LATENTS", None), Mapping):
        return latents
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    latents = getattr(module, "LATENTS", None)
    # A module may hold several models; its LATENTS are those of `model`.
    return latents if isinstance(latents, Mapping) and getattr(module, "model", fn) is fn else {}
