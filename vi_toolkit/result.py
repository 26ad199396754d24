"""``Fit``: what was found, and how to use it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO

from vi_toolkit import storage
from vi_toolkit.deterministic.families import guide_family
from vi_toolkit.deterministic.run import DeterministicRun
from vi_toolkit.errors import LoadError, NonFiniteError
from vi_toolkit.estimators import Reparam
from vi_toolkit.export import to_arviz
from vi_toolkit.figures import Figure
from vi_toolkit.fit_figure import plot_fit
from vi_toolkit.preflight.data import check_arguments, check_data
from vi_toolkit.programs.guide_draws import (
    derived_seed,
    elbo_estimate,
    guide_draws,
    weighted_draws,
)
from vi_toolkit.programs.integers import as_integer
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.prediction import (
    pointwise_log_likelihood,
    predictions,
    row_latents,
)
from vi_toolkit.programs.sites import latent_sites
from vi_toolkit.programs.workspace import Draws, Workspace
from vi_toolkit.stochastic.run import Settings, StochasticRun

DEFAULT_RATE = 0.02  # Adam's first step size; annealed from there


class Fit:
    """A fitted guide, with its history and everything needed to use, save and continue it.

    Attributes:
        model, data: as given.
        guide: the fit's own copy.
        method: "deterministic" or "stochastic"; ``why`` gives the reason.
        elbo: numpy array, the ELBO (larger is better) per step, in nats: an estimate per step of
            the stochastic method, the fixed-draw value per quasi-Newton iteration of the other.
        converged: whether the optimum was reached to 0.02 posterior sds.
        convergence: the same in words.
        monte_carlo_error: largest Monte Carlo error of the solution, in posterior sds.
        guide_family: "mean-field", "full-rank", "low-rank", "point", or None for any other guide.
        restarts: final ELBO estimate of each restart, if there are several.
        seed, seconds, versions: how it was made.
        interrupted: whether Ctrl-C ended it.
        workspace: model, guide and data in a parameter store of their own
            (:class:`~vi_toolkit.programs.workspace.Workspace`), for diagnostics.
        run: where the optimisation stands
            (:class:`~vi_toolkit.deterministic.run.DeterministicRun` or
            :class:`~vi_toolkit.stochastic.run.StochasticRun`).
    """

    def __init__(
        self,
        workspace: Workspace,
        run: DeterministicRun | StochasticRun,
        why: str,
        seed: int,
        progress: bool,
    ):
        self.workspace, self.run = workspace, run
        self.why, self.seed, self.progress = why, seed, progress
        self.seconds = 0.0
        self.interrupted = False
        self.restarts: list[float] = []
        self.versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "numpy": np.__version__,
            "vi_toolkit": _own_version(),
        }

    # ---------------------------------------------------------------- what it found

    @property
    def model(self) -> Callable[..., Any]:
        return self.workspace.model

    @property
    def data(self) -> dict[str, Any]:
        return self.workspace.given_data

    @property
    def guide(self) -> Any:
        return self.workspace.guide

    @property
    def method(self) -> str:
        return self.run.method

    @property
    def guide_family(self) -> str | None:
        known = guide_family(self.guide)
        if known is None and self.workspace.latents and self.workspace.draws_nothing:
            return "point"
        return known

    @property
    def joint(self) -> Joint:
        """The model's unconstrained log joint density."""
        return self.workspace.joint

    @property
    def elbo(self) -> np.ndarray:
        return self.run.elbo

    @property
    def converged(self) -> bool:
        return self.run.converged

    @property
    def monte_carlo_error(self) -> float:
        return self.run.error

    @property
    def convergence(self) -> str:
        stopped = "It was interrupted. " if self.interrupted and not self.converged else ""
        return stopped + self.run.convergence

    @property
    def params(self) -> Draws:
        """The variational (and model) parameters, name -> constrained value."""
        with self.workspace.isolated():
            return {n: v.detach().clone() for n, v in pyro.get_param_store().items()}

    def __repr__(self) -> str:
        workspace = self.workspace
        sites = latent_sites(workspace.first_traces[1]).items()
        latents = {name: workspace.shape(site) for name, site in sites}
        shown = ", ".join(f"{n}{list(s) if s else ''}" for n, s in list(latents.items())[:8])
        more = f" and {len(latents) - 8} more" if len(latents) > 8 else ""
        guide = self.guide_family or getattr(self.guide, "__name__", type(self.guide).__name__)
        return (
            f"Fit of {getattr(self.model, '__name__', type(self.model).__name__)} "
            f"by guide {guide}\n"
            f"  latents      {shown}{more}\n"
            f"  method       {self.method} ({self.why})\n"
            f"  ELBO         {self.run.last_elbo}\n"
            f"  convergence  {self.convergence}\n"
            f"  time         {self.seconds:.1f} s, seed {self.seed}"
        )

    def plot(self) -> Figure:
        """Figure with the ELBO's history and the posterior marginals."""
        return plot_fit(self)

    # ---------------------------------------------------------------- using it

    def derived_seed(self, seed: int | None, purpose: int) -> int:
        """A seed for one purpose, from ``seed`` or the fit's own."""
        return derived_seed(self.seed if seed is None else seed, purpose)

    def sample(self, num_draws: int = 1000, seed: int | None = None) -> Draws:
        """Draws from the guide.

        Args:
            num_draws: number of draws.
            seed: of the draws; the fit's own seed if None, so that repeated calls agree.

        Returns:
            Latent site -> tensor of shape (num_draws, *site shape), on the model's scale.
        """
        num_draws = as_integer("the number of draws", num_draws, 1)
        return guide_draws(self.workspace, num_draws, self.derived_seed(seed, 1))

    def predict(
        self,
        num_draws: int = 1000,
        data: Mapping[str, Any] | None = None,
        draws: Draws | None = None,
        seed: int | None = None,
        same_rows: bool | None = None,
        redraw: Collection[str] = (),
    ) -> Draws:
        """Draws from the posterior predictive distribution.

        Every observed site is drawn anew, also those for which ``data`` has values: predict does
        not condition on new observations. Latents keep their posterior draws, except for those that
        each row has for itself (a latent inside all plates of an observed site): new rows get new
        ones from the model. The effects of groups are kept, so that new rows of a known group are
        predicted with its effect; a group that the fit has not seen is an error, unless ``redraw``
        names the effect or its plate.

        Args:
            num_draws: number of draws.
            data: arguments for the model at new inputs (leave the observed one out, or None); the
                fit's own data if None.
            draws: posterior draws to use, as from :meth:`sample`; fresh ones if None.
            seed: of the draws.
            same_rows: whether the rows of ``data`` are those of the fit, so that their own latents
                are kept; if None, they are if ``data`` is None.
            redraw: further latents, or plates with all their latents, to draw anew.

        Returns:
            Observed and deterministic site -> tensor of shape (num_draws, *site shape).
        """
        if isinstance(num_draws, Mapping):
            raise TypeError("the first argument is the number of draws: write predict(data=...)")
        draws = self.sample(num_draws, seed) if draws is None else draws
        if data is not None:
            check_data(data)
            check_arguments("model", self.model, data)
        if same_rows is None:
            same_rows = data is None
        anew = set(redraw) | set(() if same_rows else row_latents(self.workspace))
        return predictions(self.workspace, draws, data, anew, self.derived_seed(seed, 2))

    def log_likelihood(self, draws: Draws | None = None, num_draws: int = 1000) -> Draws:
        """Pointwise log likelihood at posterior draws.

        Args:
            draws: posterior draws; fresh ones if None.
            num_draws: number of draws if none are given.

        Returns:
            Observed site -> tensor of shape (draws, *batch shape), in nats.
        """
        draws = self.sample(num_draws) if draws is None else draws
        return pointwise_log_likelihood(self.workspace, draws)

    def elbo_estimate(self, num_draws: int = 1000, seed: int | None = None) -> tuple[float, float]:
        """The ELBO on the full data from fresh draws.

        Returns:
            (mean, standard error), in nats.
        """
        num_draws = as_integer("the number of draws", num_draws, 2)
        estimator = self.run.stages.estimator if isinstance(self.run, StochasticRun) else None
        return elbo_estimate(self.workspace, num_draws, self.derived_seed(seed, 3), estimator)

    def log_weights(self, num_draws: int = 1000, seed: int | None = None) -> torch.Tensor:
        """log p(x, z) - log q(z) at draws from the guide: shape (num_draws,), in nats."""
        return self.weighted_sample(num_draws, seed)[1]

    def weighted_sample(
        self, num_draws: int = 1000, seed: int | None = None
    ) -> tuple[Draws, torch.Tensor]:
        """Draws from the guide, as from :meth:`sample`, and the log weight of each.

        Returns:
            (draws, log p(x, z) - log q(z)): the weights turn averages over the guide into averages
            over the posterior, as far as :func:`~vi_toolkit.psis` says that they can.
        """
        num_draws = as_integer("the number of draws", num_draws, 2)
        return weighted_draws(self.workspace, num_draws, self.derived_seed(seed, 3))

    def to_arviz(self, num_draws: int = 1000, **options: Any) -> Any:
        """ArviZ InferenceData (0.x) or DataTree (1.x); see :func:`vi_toolkit.export.to_arviz`."""
        return to_arviz(self, num_draws=num_draws, **options)

    # ---------------------------------------------------------------- going on, saving

    def extend(self, steps: int | None = None) -> Fit:
        """Go on from where the fit stopped, bit for bit as if it had never stopped.

        (Equal to rounding only where ``compile="auto"`` compiles a long run and not a short one.)

        Args:
            steps: further steps of the stochastic method. The deterministic method takes none: it
                solves again with twice as many fresh draws, until it has converged.

        Returns:
            The fit itself.
        """
        began = time.monotonic()
        self.interrupted = False
        try:
            self.interrupted = self.run.extend(steps, self.progress)
        except NonFiniteError as error:
            error.fit = self
            raise
        self.seconds += time.monotonic() - began
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fit to one file that :func:`~vi_toolkit.load` reads.

        The file appears whole or not at all, and holds the data too, so that the fit can predict
        and be continued wherever it is loaded. Model and guide are code and are not stored.

        Args:
            path: where to; ``.safetensors`` is appended if it is missing.

        Raises:
            TypeError: an entry of the data is neither a tensor nor something JSON can hold.
        """
        workspace = self.workspace
        content = {name: getattr(self, name) for name in _STORED}
        content |= {
            "method": self.method,
            "seed": self.seed,
            "precision": str(workspace.dtype).removeprefix("torch."),
            "data": self.data,
            "params": workspace.values,
            "state": self.run.state(),
        }
        storage.write(path, content)


_STORED = ("why", "seconds", "interrupted", "restarts", "versions")


def load(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *,
    estimator: ELBO | None = None,
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None,
) -> Fit:
    """Read a fit written by :meth:`Fit.save`.

    Args:
        path: the file.
        model, guide: what was fitted; the guide as it was given to :func:`~vi_toolkit.fit`.
        estimator, optimizer: the same, if they were given as objects; only ``extend`` needs them.

    Returns:
        The fit, which samples, predicts and extends as the saved one would have.

    Raises:
        LoadError: the file is missing, corrupt, truncated or not a fit, or belongs to another
            model or guide.
    """
    content = storage.read(path)
    state = content["state"]
    try:
        subsample = (state or {}).get("subsample")
        workspace = Workspace(model, guide, content["data"], content["seed"], subsample)
        workspace.reset(getattr(torch, content["precision"]))
        workspace.set_up()
    except Exception as error:
        raise LoadError(
            f"The model and guide given do not run on the data in {path} "
            f"({type(error).__name__}: {error}): they are not the ones that were saved."
        ) from error
    _check_parameters(path, content["params"], workspace.initial)
    workspace.load_params(content["params"])
    run: DeterministicRun | StochasticRun
    if content["method"] == "stochastic":
        default = Settings(Reparam(), DEFAULT_RATE)
        run = StochasticRun.restored(
            workspace, content["seed"], state, estimator, optimizer, default
        )
    else:
        run = DeterministicRun(workspace, content["seed"])
        if state is not None:
            run.restore(state)
    fit = Fit(workspace, run, content["why"], content["seed"], progress=False)
    for name in _STORED:
        setattr(fit, name, content[name])
    return fit


def _check_parameters(
    path: str | os.PathLike[str],
    saved: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
) -> None:
    missing, extra = sorted(set(saved) - set(expected)), sorted(set(expected) - set(saved))
    if missing or extra:
        raise LoadError(
            f"{path} belongs to another model or guide: the file has the parameters {missing} "
            f"that these lack, and lacks {extra}."
        )
    for name, value in saved.items():
        if value.shape != expected[name].shape:
            raise LoadError(
                f"{path} belongs to another model or guide: parameter {name!r} has shape "
                f"{tuple(value.shape)} in the file and {tuple(expected[name].shape)} here."
            )


def _own_version() -> str:
    try:
        return importlib.metadata.version("vi-recipes")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
