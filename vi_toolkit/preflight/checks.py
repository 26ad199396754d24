"""Checks that run model and guide, ordered so that the cause of a mistake is found first."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide

from vi_toolkit.preflight import shapes, sites, support
from vi_toolkit.preflight.causes import cause, density_error
from vi_toolkit.preflight.data import tensors
from vi_toolkit.preflight.runs import Run, model_runs, numerical, passed, run_model, trace_run
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.workspace import Workspace


class Checks:
    """The checks of one workspace; :func:`~vi_toolkit.preflight.preflight` has the arguments."""

    def __init__(
        self,
        workspace: Workspace,
        subsample: Mapping[str, int],
        reparameterised: bool | None,
        enumerated: bool,
    ):
        self.workspace, self.subsample = workspace, subsample
        self.reparameterised, self.enumerated = reparameterised, enumerated

    def on_all_data(self, double: bool) -> str | None:
        """Run all checks, and return the text of a warning or None.

        The model alone runs at the precision of the data. Guide and model together then run in
        double precision if ``double``, and at the precision of the data if that fails.
        """
        workspace = self.workspace
        alone = self.model_alone(workspace.given_data)
        native = workspace.dtype
        if double and native != torch.float64:
            workspace.reset(torch.float64)
            try:
                return self.guide_and_model(alone, workspace.data)
            except Exception:  # a real mistake shows again at the precision of the data
                workspace.reset(native)
        return self.guide_and_model(alone, workspace.data)

    def model_alone(self, data: dict[str, Any]) -> list[Run]:
        """Run the model at draws of the prior, until a run does not fail numerically."""
        workspace, model = self.workspace, self.workspace.model
        runs: list[Run] = []
        # The workspace's store stays empty: its parameters must start where the guide's first run
        # puts them.
        floats = {v.dtype for _, _, v in tensors(data) if v.is_floating_point() and v.dim()}
        usual = floats & {torch.float32, torch.float64}
        dtype = usual.pop() if usual else None
        with isolated_pyro_state(rng_state=seeded_state(0), dtype=dtype, validate=True):
            for attempt in model_runs(model, workspace.unused().guide, data):
                runs.append(attempt)
                if not numerical(attempt.error):
                    break
            alone = runs[-1]
            if alone.error is not None:
                stopped = runs[0] if numerical(alone.error) else alone
                raise cause("model", stopped, data, partial(run_model, model)) from stopped.error
            sites.check_latents(alone)
            shapes.check_broadcast(alone)
            if self.enumerated:
                shapes.check_enumerable(alone)
            shapes.check_subsample(alone, self.subsample)
            sites.check_declared(model, alone)
        return runs

    def guide_and_model(self, before: list[Run], data: dict[str, Any]) -> str | None:
        """Check the guide, and the model at its draws; keep their traces in the workspace.

        Args:
            before: the runs from :meth:`model_alone`.
            data: the workspace's data, or a minibatch of them.

        Returns:
            The text of a warning, or None.
        """
        workspace, model, guide = self.workspace, self.workspace.model, self.workspace.guide
        alone, runs = before[-1], list(before)
        automatic = isinstance(guide, AutoGuide)
        autoguide = type(guide).__name__ if automatic else ""
        with workspace.isolated(seeded_state(workspace.seed), validate=True):
            drawn = _run_guide(guide, data)
            if drawn.error is not None:
                raise cause(
                    "guide", drawn, data, partial(trace_run, guide), autoguide, alone
                ) from drawn.error
            sites.check_guide(drawn, self.reparameterised, self.enumerated)
            replayed = run_model(model, data, drawn)
            sites.check_sites(alone, drawn, self.enumerated, automatic)
            shapes.check_plates(alone, drawn, automatic)
            prototypes = support.set_up_on(guide)
            if automatic:
                runs.append(run_model(model, data))
                for name in prototypes.keys() & alone.sites.keys() & runs[-1].sites.keys():
                    one, other = alone.sites[name], runs[-1].sites[name]
                    support.check_fixed_support(name, one, other, autoguide)
            for name, site in drawn.latents.items():
                if name in alone.sites:
                    # Bounds may depend on another latent, and sizes on the guide's minibatch, so
                    # compare with the model at the guide's own draw, if its run got that far.
                    there = replayed.sites.get(name, alone.sites[name])
                    shapes.check_shape(name, there, site, name in prototypes)
                    support.check_support(name, there, site, prototypes.get(name), autoguide)
            if replayed.error is not None and not numerical(replayed.error):
                again = partial(run_model, model)
                raise cause("model", replayed, data, again) from replayed.error
            runs.append(replayed)
            further = model_runs(model, guide, data)
            while not passed(runs):  # a fit tries many starts, so one good draw is enough
                attempt = next(further, None)
                if attempt is None:
                    raise density_error(runs)
                runs.append(attempt)
            warning = sites.unobserved(model, alone, data)
        if replayed.error is None:
            workspace.keep_traces(drawn.trace, replayed.trace)
        return warning


def _run_guide(guide: Any, data: Mapping[str, Any]) -> Run:
    for validate in (True, False, False):
        # An autoguide runs the model, which may pass only without validation, as in a fit.
        with pyro.validation_enabled(validate):
            drawn = trace_run(guide, data)
        if not numerical(drawn.error):
            break
    return drawn
