"""Finds out how a model takes minibatches of a plate, and checks that the answer is right."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide

from vi_toolkit.errors import PreflightError
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.minibatches import FAILURES, PlatePlan, plans
from vi_toolkit.programs.sites import latent_sites, plate_dims
from vi_toolkit.programs.workspace import Workspace


def minibatch_plan(workspace: Workspace, name: str, batch: int) -> PlatePlan:
    """Find out how the model takes minibatches of ``batch`` rows of the plate ``name``.

    Tries the plate's indices first, then data cut to the minibatch. A way is right if every site
    in the plate has one entry per row, is scaled by N / batch, and has the same log density per
    row as on all the data.

    Raises:
        PreflightError: there is no such plate, or neither way works.
    """
    large = workspace.large_plate
    if large is not None and (large.name, large.batch) == (name, batch):
        with contextlib.suppress(*FAILURES):  # the error below explains it on the whole data
            check_minibatch_densities(workspace, large)
            return large
    sizes = {
        frame.name: frame.full_size or frame.size
        for site in workspace.model_trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    }
    if name not in sizes:
        raise PreflightError(
            f"The model has no sample site in a plate {name!r}.",
            site=name,
            remedy="subsample= takes one of " + (", ".join(map(repr, sizes)) or "no plate") + ".",
        )
    size = sizes[name]
    guide = workspace.guide
    dims = _autoguide_plates(guide) if isinstance(guide, AutoGuide) else {}
    if name in dims:
        # The plate that the guide would make itself insists on the full size.
        guide.create_plates = lambda *a, **k: pyro.plate(name, size, dim=dims[name])
    failures = []
    for plan in plans(workspace.data, name, size, batch):
        try:
            with pyro.validation_enabled(True):
                trace, model_trace = workspace.trace(plan)
                model_trace.compute_log_prob()
                trace.compute_log_prob()
            plan.check(model_trace)
            check_minibatch_densities(workspace, plan)
            return plan
        except FAILURES as error:
            failures.append(f"{type(error).__name__}: {error}".split("\n")[0].rstrip("."))
    raise PreflightError(
        f"The plate {name!r} cannot be subsampled. Given indices: {failures[0]}. Given data "
        f"cut to the minibatch: {failures[1]}.",
        site=name,
        remedy=f"Write `with pyro.plate({name!r}, N) as i:` and use i to index data and local "
        "parameters in model and guide.",
    )


def _autoguide_plates(guide: AutoGuide) -> dict[str, int]:
    """Name -> dimension of the plates around the latents of an autoguide that has run."""
    if guide.prototype_trace is None:
        return {}
    sites = latent_sites(guide.prototype_trace).values()
    return {name: dim for site in sites for name, dim in plate_dims(site).items()}


def check_minibatch_densities(workspace: Workspace, plan: PlatePlan) -> None:
    """Check that the log density of a row does not depend on the other rows.

    Raises:
        ValueError: it does, because the model computes something from all rows (a mean, say).
    """
    if workspace.summed_out:
        return  # the next run would draw other values
    rows = torch.arange(plan.batch)
    more: PlatePlan | None = None  # all rows
    if workspace.large_plate is not None:
        more = plan.with_batch(2 * plan.batch)
    size = plan.size if more is None else more.batch
    values = (workspace.first_traces if more is None else workspace.trace(more))[1]
    whole: dict[str, torch.Tensor] = {}
    part: dict[str, torch.Tensor] = {}
    for name in workspace.latents:
        site: Any = values.nodes[name]
        whole[name] = part[name] = site["value"]
        for frame in site["cond_indep_stack"]:
            dim = frame.dim - site["fn"].event_dim if frame.dim is not None else 0
            if frame.name == plan.name and site["value"].shape[dim] == size:
                part[name] = site["value"].index_select(dim, rows.to(site["value"].device))
    cut, full = _scored(workspace, plan, part), _scored(workspace, more, whole)
    for name, site in cut.nodes.items():
        frames = [f for f in site.get("cond_indep_stack", ()) if f.name == plan.name]
        if site["type"] != "sample" or not frames or frames[0].dim is None:
            continue
        there = full.nodes[name]["unscaled_log_prob"]
        if there.dim() < -frames[0].dim or there.shape[frames[0].dim] != size:
            continue
        here = site["unscaled_log_prob"]
        there = there.index_select(frames[0].dim, rows.to(there.device))
        if not torch.allclose(here, there, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"site {name!r} has one density in a minibatch and another in the full data: the "
                "model computes something from all rows (a mean, say), which a minibatch changes"
            )


def _scored(workspace: Workspace, plan: PlatePlan | None, values: dict[str, torch.Tensor]) -> Any:
    """Trace of the model at these latents, with log densities, on a plan's first minibatch."""
    data: Mapping[str, Any] = workspace.data
    handler: contextlib.AbstractContextManager = contextlib.nullcontext()
    if plan is not None:
        data, handler = plan.apply(workspace.data, torch.arange(plan.batch))
    conditioned = poutine.condition(workspace.model, data=values)
    with workspace.isolated(seeded_state(workspace.seed)), torch.no_grad(), handler:
        trace: Any = poutine.trace(conditioned).get_trace(**data)
        trace.compute_log_prob()
    return trace
