"""Which method fits a model, guide and data, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vi_toolkit.deterministic.families import guide_family
from vi_toolkit.deterministic.objective import noise_needed
from vi_toolkit.errors import NotDeterministicError
from vi_toolkit.estimators.reparam import reparameterised
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.noise import UnsupportedNoise
from vi_toolkit.programs.sites import is_drawn, is_partial_plate, latent_sites
from vi_toolkit.programs.workspace import Workspace

# Beyond these, method="auto" leaves fixed draws.
MOST_LATENTS = {"full-rank": 500, "low-rank": 5_000, "mean-field": 20_000}
MOST_GUIDE_PARAMETERS = 2_000
MOST_FIRST_WORK = 2e8  # draws times observations of the first round


@dataclass(frozen=True)
class Choice:
    """The method, "deterministic" or "stochastic", and the reason in words."""

    method: str
    why: str


def choose(workspace: Workspace, method: str, stochastic_only: Sequence[str]) -> Choice:
    """The method for a fit; the workspace is in double precision where it is deterministic.

    Args:
        workspace: set up.
        method: "auto", "deterministic" or "stochastic".
        stochastic_only: arguments that the caller gave and only the stochastic method has.

    Raises:
        NotDeterministicError: ``method="deterministic"``, and something stands in its way.
    """
    if method == "deterministic" and stochastic_only:
        raise NotDeterministicError(
            f"{' and '.join(stochastic_only)} belong to the stochastic method: leave them out, or "
            "ask for method='stochastic'."
        )
    if method == "stochastic":
        return Choice("stochastic", "asked for")
    if stochastic_only:
        return Choice("stochastic", f"{' and '.join(stochastic_only)} given")
    obstacle = _obstacle(workspace) or _take_to_double(workspace, limits=method == "auto")
    if obstacle is None and method == "deterministic":
        return Choice("deterministic", "asked for")
    if obstacle is None:
        return Choice(
            "deterministic", "full data, a differentiable model and a reparameterised guide"
        )
    if method == "deterministic":
        raise NotDeterministicError(
            f"The deterministic method cannot be had: {obstacle}. Use method='stochastic'."
        )
    return Choice("stochastic", obstacle)


def _obstacle(workspace: Workspace) -> str | None:
    """What the sites of model and guide have against fixed draws; None if nothing."""
    model_trace, guide_trace = workspace.model_trace, workspace.guide_trace
    for name, site in model_trace.nodes.items():
        if site["type"] == "param":
            return f"the model has a parameter of its own ({name!r})"
    for name, site in guide_trace.nodes.items():
        if not reparameterised(site):
            return f"the guide's site {name!r} cannot be reparameterised"
        if is_drawn(site) and site["fn"].support.is_discrete:  # with a gradient of its own
            return f"the guide's site {name!r} is discrete"
    for trace in (guide_trace, model_trace):
        for name, site in trace.nodes.items():
            if is_partial_plate(site):
                return f"the plate {name!r} is subsampled"
            if site["type"] == "sample" and site["infer"].get("enumerate"):
                return f"the site {name!r} is enumerated"
    devices = {v.device.type for v in workspace.data.values() if torch.is_tensor(v)} - {"cpu"}
    if devices:
        return f"the data are on {', '.join(sorted(devices))}"
    missing = set(latent_sites(model_trace)) - set(guide_trace.nodes)
    if missing:
        return f"the guide lacks {', '.join(sorted(missing))}"
    return None


def _take_to_double(workspace: Workspace, limits: bool) -> str | None:
    """Take the workspace to double precision where model and guide run there.

    Returns what its log joint density has against fixed draws, or None.
    """
    if workspace.dtype != torch.float64:
        workspace.reset(torch.float64)
    try:
        with workspace.isolated(seeded_state(workspace.seed)):
            _, values = workspace.joint.gradients(workspace.joint.start[None])
        workspace.first_traces  # noqa: B018  (sets it up where that is still to be done)
        if not torch.is_tensor(values):
            raise RuntimeError("the density is not a tensor")
    except (RuntimeError, ValueError, TypeError):
        # A tensor of the model's own is single precision and will not mix with double.
        # (NotImplementedError is a RuntimeError.)
        if workspace.given_dtype != torch.float64:
            workspace.reset(workspace.given_dtype)
            workspace.set_up()
    try:
        joint = workspace.joint
    except NotImplementedError as error:  # a support without a bijection to the reals
        return str(error).split("\n")[0]
    if joint.dim == 0:
        return "the model has no continuous latent"
    family = guide_family(workspace.guide)
    if limits:
        size = sum(value.numel() for value in workspace.values.values())
        if family in MOST_LATENTS:
            if joint.dim > MOST_LATENTS[family]:
                return f"{joint.dim} latents are too many for fixed draws with a {family} guide"
        elif size > max(200, min(MOST_GUIDE_PARAMETERS, 30 * joint.dim)):
            return (
                f"the guide has {size} parameters for {joint.dim} latents, which would "
                "fit themselves to fixed draws"
            )
        draws = max(128, 8 * joint.dim)
        if draws * joint.observations > MOST_FIRST_WORK:
            return (
                f"{joint.observations} observations at {draws} draws per evaluation would be slow"
            )
    if family is None:
        try:
            with workspace.isolated(seeded_state(workspace.seed)):
                noise_needed(workspace.guide, workspace.data)
        except UnsupportedNoise as error:
            return str(error)
    return None
