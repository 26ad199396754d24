"""Checks of which sites model and guide have, and which ``LATENTS`` declares."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import words
from vi_toolkit.preflight.data import signature
from vi_toolkit.preflight.runs import Run
from vi_toolkit.preflight.support import distribution_name, is_discrete
from vi_toolkit.programs.sites import Site, is_deterministic, plates
from vi_toolkit.pyro_private import unwrap


def check_latents(model: Run) -> None:
    """Check that the model has a latent."""
    if not model.latents:
        observed = f" (observed: {words.listed(model.observed)})" if model.observed else ""
        raise PreflightError(
            f"The model has no latent variable{observed}.",
            remedy="Sample what is to be inferred with pyro.sample(name, prior), without obs.",
        )


def check_declared(model: Callable[..., Any], run: Run) -> None:
    """Check the latents against ``LATENTS``, if the model has one."""
    for name, dims in _declared(model).items():
        if name not in run.sites:
            twin = words.nearest(name, run.latents)
            raise PreflightError(
                f"LATENTS names '{name}', which is no site of the model (its latents: "
                f"{words.listed(run.latents)}).",
                name,
                f"Write '{twin}' there." if twin else "Remove it there.",
            )
        if name not in run.latents:
            continue  # made deterministic or observed by an effect handler
        if not isinstance(dims, tuple | list):
            raise PreflightError(
                f"LATENTS['{name}'] is {words.a(dims)}.",
                name,
                'Give a tuple of dims: () for a scalar, ("groups",) for a plate.',
            )
        site = run.latents[name]
        for plate in plates(site):
            if plate not in dims:
                what = f"of dims {tuple(dims)}" if dims else "a global scalar"
                raise PreflightError(
                    f"LATENTS declares '{name}' {what}, but the model samples it inside plate "
                    f"'{plate}'.",
                    name,
                    f"Move its pyro.sample out of the plate, or add '{plate}' to its "
                    "dims if each member has its own.",
                )
        fn, shape = site["fn"], tuple(site["fn"].shape())
        if len(shape) != len(dims):
            # A plate at dim=-2 leaves a dimension of size 1 on its right, which is not declared.
            kept = {frame.dim + len(fn.batch_shape) for frame in plates(site).values()}
            batch = [n for i, n in enumerate(fn.batch_shape) if n > 1 or i in kept]
            shape = (*batch, *fn.event_shape)
        wrong = any(d != n for d, n in zip(dims, shape, strict=False) if isinstance(d, int))
        if len(shape) != len(dims) or wrong:
            raise PreflightError(
                f"LATENTS declares '{name}' with dims {tuple(dims)}, but the model samples it "
                f"with shape {tuple(shape)}.",
                name,
                "Correct the one or the other: a name or size for each dimension.",
            )


def _declared(model: Any) -> Mapping[str, Any]:
    """``LATENTS`` of the model, or of the module whose ``model`` it is; else empty."""
    fn = unwrap(model)
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(latents := getattr(fn, "LATENTS", None), Mapping):
        return latents
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    latents = getattr(module, "LATENTS", None)
    # A module may hold several models; its LATENTS belong to the one that is named `model`.
    return latents if isinstance(latents, Mapping) and getattr(module, "model", fn) is fn else {}


def unobserved(model: Callable[..., Any], run: Run, data: Mapping[str, Any]) -> str | None:
    """The text of a warning if there are data but no observed site, else None.

    Raises:
        PreflightError: the model observes nothing, because an argument is None.
    """
    if run.observed:
        return None
    known = signature(model)
    for p in known.parameters.values() if known else ():
        if p.default is None and data.get(p.name) is None:
            raise PreflightError(
                f"The model observes nothing: its argument '{p.name}' is None.",
                p.name,
                f"Add {words.entry(p.name)}.",
            )
    if not data:
        return None
    return (
        "The model observes nothing, so the posterior is the prior. If the data are observations, "
        "pass them to pyro.sample with obs=."
    )


def check_guide(guide: Run, reparameterised: bool | None, enumerated: bool) -> None:
    """Check that the guide observes nothing, draws no nan, and can be reparameterised if need be.

    Args:
        guide: a run of it.
        reparameterised: whether the estimator needs gradients through the draws.
        enumerated: whether sites marked for enumeration are summed out.
    """
    for name, site in guide.sites.items():
        infer, value = site["infer"], site["value"]
        if site["is_observed"]:
            if not is_deterministic(site) and not infer.get("is_auxiliary"):
                raise PreflightError(
                    f"The guide observes '{name}'.",
                    name,
                    "Remove its obs=: the data belong in the model, and a guide only samples "
                    "latents.",
                )
            continue
        nan = torch.isnan(value) if isinstance(value, Tensor) else torch.zeros(())
        if nan.any():
            raise PreflightError(
                f"The guide's draw of '{name}' is nan{words.at(words.first(nan))}.",
                name,
                "Check the initial values of the parameters it depends on.",
            )
        summed_out = enumerated and infer.get("enumerate")
        if reparameterised and not summed_out and not site["fn"].has_rsample:
            raise PreflightError(
                f"The guide's {distribution_name(site['fn'])} at site '{name}' has no "
                "reparameterised draws, which this estimator needs.",
                name,
                "Use another distribution there, or a score-function estimator: "
                "estimator=pyro.infer.Trace_ELBO().",
            )


def missing_discrete(name: str, site: Site | None, automatic: bool = False) -> PreflightError:
    """The error for a discrete latent that the guide does not sample.

    Args:
        name: of the latent.
        site: the model's site, if it is known.
        automatic: whether the guide is one of Pyro's autoguides.
    """
    steps = ["fit with estimator=pyro.infer.TraceEnum_ELBO()"]
    if automatic:
        steps.insert(0, f'hide it from the autoguide by poutine.block(model, hide=["{name}"])')
    if site is None or site["infer"].get("enumerate") != "parallel":
        steps.insert(0, 'mark it infer={"enumerate": "parallel"}')
    return PreflightError(
        f"The model's latent '{name}' is discrete and the guide does not sample it.",
        name,
        f"Sum it out of the model, e.g. with dist.MixtureSameFamily, or {' and '.join(steps)}.",
    )


def check_sites(model: Run, guide: Run, enumerated: bool, automatic: bool) -> None:
    """Check that the guide samples the model's latents, and nothing else.

    Args:
        model, guide: runs of both.
        enumerated: whether latents marked for enumeration are summed out.
        automatic: whether the guide is one of Pyro's autoguides.
    """
    latents, sampled = model.latents, guide.latents
    extra = [
        name
        for name, site in sampled.items()
        if name not in latents and not site["infer"].get("is_auxiliary")
    ]
    asked = {name: site["infer"].get("enumerate") for name, site in latents.items()}
    missing = [n for n in latents if n not in sampled]
    if enumerated:
        missing = [n for n in missing if asked[n] != "parallel"]
    for name in missing:
        if enumerated and asked[name] == "sequential":
            raise PreflightError(
                f"The model's latent '{name}' asks for sequential enumeration, which works only "
                "for sites of the guide.",
                name,
                'Use infer={"enumerate": "parallel"}.',
            )
        if is_discrete(latents[name]["fn"]):
            raise missing_discrete(name, latents[name])
    if missing:
        name, others = missing[0], missing[1:]
        remedy = f'Add pyro.sample("{name}", ...) to the guide.'
        if twin := words.nearest(name, extra):
            remedy = f"Rename the guide's '{twin}' to '{name}'."
        elif automatic:
            remedy = "Build the autoguide from this model, without hiding the site."
        raise PreflightError(
            f"The guide does not sample the model's latent '{name}'"
            f"{f' (nor {words.listed(others)})' if others else ''}.",
            name,
            remedy,
        )
    for name in extra:
        if name in model.sites:
            computed = is_deterministic(model.sites[name])
            how = "computes (pyro.deterministic)" if computed else "observes"
            raise PreflightError(
                f"The guide samples '{name}', which the model {how}.",
                name,
                "Remove it from the guide.",
            )
        twin = words.nearest(name, latents)
        raise PreflightError(
            f"The guide samples '{name}', which is no site of the model"
            f"{f'; did you mean {twin!r}?' if twin else '.'}",
            name,
            'Remove or rename it, or mark it infer={"is_auxiliary": True}.',
        )
