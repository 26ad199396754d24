"""``fit``: one call from a Pyro model and guide to a posterior."""

from __future__ import annotations

import contextlib
import math
import operator
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuide,
    AutoLaplaceApproximation,
)
from pyro.optim import PyroOptim
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.util import site_is_subsample
from tqdm.auto import tqdm

from vi_toolkit.deterministic.families import FAMILY_OF, set_parameter, write_to_guide
from vi_toolkit.deterministic.modes import find_modes
from vi_toolkit.deterministic.objective import FamilyProblem, GuideProblem, Problem, noise_needed
from vi_toolkit.deterministic.run import Progress, run
from vi_toolkit.deterministic.solver import GRADIENT_TOLERANCE
from vi_toolkit.deterministic.starts import family_starter, first_problem, warm_started
from vi_toolkit.errors import (
    CompileError,
    CompileWarning,
    ConvergenceWarning,
    NonFiniteError,
    NotDeterministicError,
    PreflightError,
)
from vi_toolkit.estimators import LeaveOneOut, Reparam, Score
from vi_toolkit.estimators.particles import is_drawn
from vi_toolkit.estimators.reparam import reparameterised
from vi_toolkit.machine_code import batched_fits, batching_pays, compile_joint
from vi_toolkit.preflight import preflight
from vi_toolkit.preflight.data import check_arguments, check_data
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.joint import Joint, indices
from vi_toolkit.programs.leaves import flat, unflat
from vi_toolkit.programs.minibatches import FAILURES, PlatePlan, plan_of_large_plate, plans
from vi_toolkit.programs.noise import FunctionalNoise, UnsupportedNoise
from vi_toolkit.programs.nonfinite import first_non_finite
from vi_toolkit.programs.private_guide import private_guide
from vi_toolkit.programs.prototype import prototype
from vi_toolkit.programs.sites import latent_sites, observed_sites
from vi_toolkit.programs.vectorise import Batched
from vi_toolkit.stochastic import stages
from vi_toolkit.stochastic.stages import Stochastic

Model = Callable[..., Any]
Draws = dict[str, torch.Tensor]

DEFAULT_RATE = 0.02  # Adam's first step size; annealed from there
# Where "auto" stops believing in fixed draws.
MOST_LATENTS = {"full-rank": 500, "low-rank": 5_000, "mean-field": 20_000}
MOST_GUIDE_PARAMETERS = 2_000
MOST_FIRST_WORK = 2e8  # draws times observations of the first round
COMPILED_WORK = 4e6  # the same, from which a compiled log density pays for its compilation


def fit(
    model: Model,
    guide: Model | type[AutoGuide],
    data: Mapping[str, Any],
    *,
    estimator: ELBO | None = None,
    optimizer: float | Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None,
    method: str = "auto",
    steps: int | None = None,
    seed: int = 0,
    subsample: Mapping[str, int] | None = None,
    stop: Callable[[Stochastic], bool] | None = None,
    average: bool = True,
    compile: str | bool = "auto",
    restarts: int = 1,
    progress: bool = True,
) -> Fit:
    r"""Fit a guide to the posterior of a Pyro model by maximising the ELBO.

    .. math:: \mathcal L(\lambda) = E_{q_\lambda(z)}[\log p(x, z) - \log q_\lambda(z)]
              = \log p(x) - \mathrm{KL}(q_\lambda \,\|\, p(z \mid x))

    Two methods stand behind the one call. *Deterministic* fixes the guide's base noise and
    optimises to convergence: the default for full data, differentiable models and guides of
    moderate size; it needs no tuning. *Stochastic* takes annealed, averaged gradient steps, for
    everything else. ``Fit.method`` says which ran and ``Fit.why`` gives the reason.

    The caller's parameter store, random state and default dtype are left as they were, the guide
    is copied, and the same seed gives the same fit bit for bit.

    Args:
        model: called as ``model(**data)``.
        guide: called as ``guide(**data)``; an ``AutoGuide`` class is built on the model first.
        data: keyword arguments of model and guide.
        estimator: a ``pyro.infer.ELBO``; :class:`~vi_toolkit.Reparam` if every guide site can be
            reparameterised, else the score function where it must be,
            ``Score(8, LeaveOneOut(), sites=...)``. Other than ``Reparam`` implies the stochastic
            method.
        optimizer: first step size of Adam, or a function from parameters to a
            ``torch.optim.Optimizer``; implies the stochastic method.
        method: ``"auto"``, ``"deterministic"`` or ``"stochastic"``.
        steps: number of optimiser steps; None lets convergence decide. Implies stochastic.
        seed: of everything random.
        subsample: plate name -> minibatch size. Implies stochastic.
        stop: called with the running fit each time a stage is looked at (after 640 steps, 1,280,
            2,560, ...); ends the fit when true.
        average: report the average of the last window of iterates rather than the last iterate.
        compile: whether to compile. ``True`` insists, ``False`` never does, ``"auto"`` does where
            it pays, and goes on eagerly, with a warning, where it cannot be done. Stochastic fits
            on the CPU are compiled if ``steps`` is None or at least 2,000; the draws are the same
            either way, and so is the fit, to rounding. The log density of a deterministic fit is
            compiled if the draws of the first round times the observations number at least four
            million.
        restarts: independent starts; the fit with the best ELBO is kept, and the ELBOs of all are
            in ``Fit.restarts``. The deterministic method always tries 16, and takes this many times
            16. Compiled steps of stochastic restarts are taken at once if they have at most a
            million parameters together and there is no ``stop``; the draws then differ from those
            of each restart run separately.
        progress: show a progress bar.

    Returns:
        A :class:`Fit`. An interrupt (Ctrl-C) also returns the fit, as it stands.

    Raises:
        PreflightError: model, guide and data do not fit together.
        NonFiniteError: the ELBO or its gradient is not finite; carries the last good state.
        NotDeterministicError: ``method="deterministic"`` where it cannot be had.
        CompileError: ``compile=True``, and it cannot be done; says why.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoMultivariateNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> fit = vi.fit(model, AutoMultivariateNormal, {"y": y}, progress=False)
        >>> round(float(fit.sample(1000)["mu"].mean()), 1)
        2.0
    """
    if method not in ("auto", "deterministic", "stochastic"):
        raise ValueError(f"method must be 'auto', 'deterministic' or 'stochastic', not {method!r}")
    steps, restarts = _whole("steps", steps, 1), _whole("restarts", restarts, 1) or 1
    seed = _whole("seed", seed, 0) or 0
    if isinstance(estimator, type):
        raise TypeError(f"estimator is a class: write {estimator.__name__}()")
    if isinstance(optimizer, PyroOptim):
        raise TypeError(
            "optimizer is one of pyro.optim, which keeps parameters to itself: give the first step "
            "size of Adam, or lambda params: torch.optim.Adam(params, lr=0.01)"
        )
    if compile not in ("auto", True, False):
        raise ValueError(f"compile must be 'auto', True or False, not {compile!r}")
    if subsample is not None and (not isinstance(subsample, Mapping) or len(subsample) != 1):
        raise ValueError("subsample takes one plate: {'name of the plate': minibatch size}")

    began = time.monotonic()
    dtype = _float_dtype(data)
    with isolated_pyro_state(rng_state=seeded_state(seed), dtype=dtype):
        preflight(
            model,
            guide,
            data,
            subsample=subsample,
            reparameterised=isinstance(estimator, Reparam),
            enumerate=estimator is not None and "Enum" in type(estimator).__name__,
        )

    result = Fit(model, guide, data, dtype, seed, progress, subsample)
    if not result._values:
        raise PreflightError(
            "Neither guide nor model has a parameter, so there is nothing to fit.",
            remedy='Give the guide\'s distributions parameters: loc = pyro.param("loc", ...).',
        )
    asked = {
        "steps": steps is not None,
        "subsample": subsample is not None,
        "optimizer": optimizer is not None,
        "estimator": estimator is not None and not isinstance(estimator, Reparam),
        "stop": stop is not None,
    }
    stochastic_only = [name for name, given in asked.items() if given]
    if method == "deterministic" and stochastic_only:
        raise NotDeterministicError(
            f"{' and '.join(stochastic_only)} belong to the stochastic method: leave them out, or "
            "ask for method='stochastic'."
        )
    if method == "stochastic":
        result.method, result.why = "stochastic", "asked for"
    elif stochastic_only:
        result.method = "stochastic"
        result.why = f"{' and '.join(stochastic_only)} given"
    else:
        obstacle = result._set_up_deterministic(limits=method == "auto")
        if obstacle is None:
            result.method = "deterministic"
            result.why = (
                "asked for"
                if method == "deterministic"
                else "full data, a differentiable model and a reparameterised guide"
            )
        elif method == "deterministic":
            raise NotDeterministicError(
                f"The deterministic method cannot be had: {obstacle}. Use method='stochastic'."
            )
        else:
            result.method, result.why = "stochastic", obstacle

    result._compile = compile
    if result.method == "deterministic":
        result._run_deterministic(restarts)
    else:
        result._run_stochastic(estimator, optimizer, steps, subsample, stop, average, restarts)
    result.seconds = time.monotonic() - began
    if result.interrupted or (not result.converged and steps is None):
        warnings.warn(result.convergence, ConvergenceWarning, stacklevel=2)
    return result


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
        family: "mean-field", "full-rank", "low-rank", "point", or None for any other guide.
        restarts: final ELBO estimate of each restart of the stochastic method.
        seed, seconds, versions: how it was made.
        interrupted: whether Ctrl-C ended it.
    """

    def __init__(
        self,
        model: Model,
        guide: Model | type[AutoGuide],
        data: Mapping[str, Any],
        dtype: torch.dtype,
        seed: int,
        progress: bool,
        subsample: Mapping[str, int] | None = None,
    ):
        self.model = model
        self.data = dict(data)
        self.seed = seed
        self.progress = progress
        self.method, self.why = "", ""
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
        self._given_guide = guide
        self._dtype = self._user_dtype = dtype
        self._store = ParamStoreDict()
        self._values: dict[str, torch.Tensor] = {}
        self._own: set[int] = set()
        self._stochastic: Stochastic | None = None
        self._iterate = torch.empty(0)  # of the stochastic method, where its last step ended
        self._progress: Progress | None = None
        self._joint: Joint | None = None
        self._cannot_extend = ""
        self._compile: str | bool = "auto"
        self._subsample = dict(subsample) if subsample else None
        self._set_up(dtype)

    # ---------------------------------------------------------------- set-up

    def _set_up(self, dtype: torch.dtype) -> None:
        """A fresh store and guide at the given precision, with every parameter registered."""
        self._dtype = dtype
        self._data = _cast(self.data, dtype)
        self.guide = private_guide(self.model, self._given_guide)
        if isinstance(self.guide, torch.nn.Module):
            self.guide.to(dtype)
        self._whole_traces: tuple[Any, Any] | None = None
        with self._isolated(seeded_state(self.seed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first run will show them
            self._large = plan_of_large_plate(self.model, self._data, self._subsample)
        try:
            self._first_traces = self._run_once()
            if self._large and isinstance(self.guide, AutoGuide) and self._drawn_in(self._large):
                raise ValueError("an autoguide's own rows start at values of the whole data")
        except FAILURES:
            if self._large is None:
                raise
            self._large, self.guide = None, private_guide(self.model, self._given_guide)
            if isinstance(self.guide, torch.nn.Module):
                self.guide.to(dtype)
            self._first_traces = self._run_once()
        own = self.guide.parameters() if isinstance(self.guide, torch.nn.Module) else ()
        self._own = {id(p) for p in own}
        self._values = {n: p.detach().clone() for n, p in self._store.named_parameters()}
        self._initial = dict(self._values)
        self.family = _family_name(self.guide)

    def _run_once(self) -> tuple[Any, Any]:
        """Traces of guide and model, of one minibatch of a large plate; registers parameters."""
        self._store = ParamStoreDict()
        self._values = {}
        return self._traces(self._large)

    def _traces(self, plan: PlatePlan | None) -> tuple[Any, Any]:
        data: Mapping[str, Any] = self._data
        handler: contextlib.AbstractContextManager = contextlib.nullcontext()
        if plan is not None:
            data, handler = plan.apply(self._data, torch.arange(plan.batch))
        with self._isolated(seeded_state(self.seed)), torch.no_grad(), handler:
            trace: Any = poutine.trace(self.guide).get_trace(**data)
            replayed = poutine.replay(self.model, trace=trace)
            return trace, poutine.trace(replayed).get_trace(**data)

    def _drawn_in(self, plan: PlatePlan) -> bool:
        sites = latent_sites(self._first_traces[1]).values()
        return any(f.name == plan.name for site in sites for f in site["cond_indep_stack"])

    def _whole(self) -> tuple[Any, Any]:
        """The traces on the whole data: of a large plate only where somebody asks for them."""
        if self._large is None:
            return self._first_traces
        if self._whole_traces is None:
            self._whole_traces = self._traces(None)
        return self._whole_traces

    @property
    def _guide_trace(self) -> Any:
        return self._whole()[0]

    @property
    def _model_trace(self) -> Any:
        return self._whole()[1]

    def _shape(self, site: Any) -> tuple[int, ...]:
        """Of a site's value on the whole data."""
        shape = list(site["value"].shape)
        for frame in site["cond_indep_stack"]:
            if self._large and frame.name == self._large.name and frame.dim is not None:
                dim = frame.dim - site["fn"].event_dim
                if len(shape) >= -dim and shape[dim] == self._large.batch:
                    shape[dim] = self._large.size
        return tuple(shape)

    @contextlib.contextmanager
    def _isolated(self, rng_state: torch.Tensor | None = None) -> Iterator[None]:
        """The fit's own parameter store, dtype and random state, for as long as the block runs.

        Parameters that belong to the caller (a network the guide closes over, a tensor given to
        ``pyro.param``) hold the fit's values inside the block only.
        """
        with isolated_pyro_state(self._store, rng_state, self._dtype):
            leaves = {n: p for n, p in self._store.named_parameters() if id(p) not in self._own}
            theirs = {n: p.detach().clone() for n, p in leaves.items()}
            with torch.no_grad():
                for name, leaf in leaves.items():
                    if name in self._values:
                        leaf.copy_(self._values[name])
            try:
                yield
            finally:
                with torch.no_grad():
                    for name, leaf in leaves.items():
                        leaf.copy_(theirs[name])

    def _keep(self) -> None:
        """Take the store's present values as the fit's own. Inside :meth:`_isolated`."""
        self._values = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}

    def _set_up_deterministic(self, limits: bool) -> str | None:
        """Prepare the deterministic method; returns what stands in its way, or None."""
        obstacle = self._obstacle(limits)
        if obstacle is not None:
            return obstacle
        if self._dtype != torch.float64:
            native = self._dtype
            try:
                self._set_up(torch.float64)
                with self._isolated(seeded_state(self.seed)):
                    finite = self._make_joint().gradients(self.joint.start[None])
                    if not torch.is_tensor(finite[1]):
                        raise RuntimeError
            except (RuntimeError, ValueError, TypeError):
                # (NotImplementedError is a RuntimeError.) A tensor of the model's own is single
                # precision and will not mix with double.
                self._joint = None
                self._set_up(native)
        with self._isolated(seeded_state(self.seed)):
            try:
                joint = self._make_joint()
            except NotImplementedError as error:  # a support without a bijection to the reals
                return str(error).split("\n")[0]
            if joint.dim == 0:
                return "the model has no continuous latent"
            if limits:
                size = sum(p.numel() for p in self._store._params.values())
                if self.family in MOST_LATENTS:
                    if joint.dim > MOST_LATENTS[self.family]:
                        return (
                            f"{joint.dim} latents are too many for fixed draws with a "
                            f"{self.family} guide"
                        )
                elif size > max(200, min(MOST_GUIDE_PARAMETERS, 30 * joint.dim)):
                    return (
                        f"the guide has {size} parameters for {joint.dim} latents, which would "
                        "fit themselves to fixed draws"
                    )
                draws = max(128, 8 * joint.dim)
                if draws * joint.observations > MOST_FIRST_WORK:
                    return (
                        f"{joint.observations} observations at {draws} draws per evaluation "
                        "would be slow"
                    )
            if self.family is None:
                try:
                    noise_needed(self.guide, self._data)
                except UnsupportedNoise as error:
                    return str(error)
        return None

    def _obstacle(self, limits: bool) -> str | None:
        for name, site in self._model_trace.nodes.items():
            if site["type"] == "param":
                return f"the model has a parameter of its own ({name!r})"
        for name, site in self._guide_trace.nodes.items():
            if not reparameterised(site):
                return f"the guide's site {name!r} cannot be reparameterised"
            if is_drawn(site) and site["fn"].support.is_discrete:  # with a gradient of its own
                return f"the guide's site {name!r} is discrete"
        traces: tuple[Any, ...] = (self._guide_trace, self._model_trace)
        for trace in traces:
            for name, site in trace.nodes.items():
                if site["type"] != "sample":
                    continue
                if site_is_subsample(site) and len(site["value"]) < getattr(site["fn"], "size", 0):
                    return f"the plate {name!r} is subsampled"
                if site["infer"].get("enumerate"):
                    return f"the site {name!r} is enumerated"
        devices = {v.device.type for v in self._data.values() if torch.is_tensor(v)}
        if devices - {"cpu"}:
            return f"the data are on {', '.join(sorted(devices - {'cpu'}))}"
        missing = set(latent_sites(self._model_trace)) - set(self._guide_trace.nodes)
        if missing:
            return f"the guide lacks {', '.join(sorted(missing))}"
        return None

    def _make_joint(self) -> Joint:
        if self._joint is None:
            self._joint = Joint(self.model, self._data)
        return self._joint

    @property
    def joint(self) -> Joint:
        """The model's unconstrained log joint density (:class:`~vi_toolkit.programs.joint.Joint`)."""
        if self._joint is None:
            with self._isolated(seeded_state(self.seed)):
                self._make_joint()
        assert self._joint is not None
        return self._joint

    # ---------------------------------------------------------------- deterministic

    def _run_deterministic(self, restarts: int, rounds: int | None = None) -> None:
        bar = tqdm(disable=not self.progress, desc="fit", bar_format="{desc} [{elapsed}]")

        def report(message: str) -> None:
            if self.progress:
                bar.set_description_str(f"fit: {message}")

        def checkpoint(progress: Progress) -> None:
            self._write_solution(progress)

        try:
            with self._isolated(seeded_state(self.seed)):
                self._compile_density(report)
                if self._progress is None:
                    problem = self._first_problem(16 * restarts, report)
                    self._progress = Progress(problem)
                    self._write_solution(self._progress)
                run(
                    self._progress,
                    self.seed,
                    self.joint.observations,
                    self._dtype,
                    rounds,
                    report,
                    checkpoint,
                )
                self._keep()
        except KeyboardInterrupt:
            if self._progress is None:
                raise  # still looking for modes: there is nothing to return
            self.interrupted = True
        finally:
            bar.close()
        if self._progress is not None and self._progress.rounds == 0 and not self.interrupted:
            self._raise_non_finite()

    def _compile_density(self, report: Callable[[str], None]) -> None:
        work = self.joint.observations * max(128, 8 * self.joint.dim)
        wanted = self._compile == "auto" and work >= COMPILED_WORK
        if self._compile is True or (wanted and self.family is not None):
            report("compiling the log density")
            compile_joint(self.joint, insist=self._compile is True)

    def _first_problem(self, starts: int, report: Callable[[str], None]) -> Problem:
        joint = self.joint
        kind = type(self.guide)
        if kind in FAMILY_OF:
            family, isotropic = family_starter(kind, getattr(self.guide, "rank", None))
            problem = first_problem(joint, family, isotropic, starts, self.seed, report)
            if problem is None:
                self._raise_non_finite()
            assert problem is not None
            return problem
        report("looking for modes")
        modes = find_modes(joint, starts, self.seed, report=report)
        noise = noise_needed(self.guide, self._data)
        if modes and kind is AutoLaplaceApproximation:
            set_parameter(self.guide, "loc", modes[0].location)
        if modes and kind is AutoDelta:
            for name, value in joint.unflatten(modes[0].location).items():
                set_parameter(self.guide, name, value)
        general = GuideProblem(self.model, self.guide, self._data, joint, noise)
        return warm_started(general, modes, self.seed) if noise else general

    def _write_solution(self, progress: Progress) -> None:
        """Put the solution into the guide's parameters (inside the room)."""
        if isinstance(progress.problem, FamilyProblem):
            write_to_guide(self.guide, self.joint, progress.problem.q)
        elif isinstance(progress.problem, GuideProblem):
            unflat(progress.problem.origin, progress.problem.leaves)
        self._keep()

    def _raise_non_finite(self) -> None:
        with self._isolated(seeded_state(self.seed)):
            trace = prototype(self.model, self._data)
            found = first_non_finite(trace, "model")
        where = found[2] if found else "its log joint density is not finite"
        raise NonFiniteError(
            f"No start has a finite ELBO: at the prior medians, {where}. Check the data against "
            "the likelihood's support, and the priors' scales.",
            site=found[0] if found else None,
            index=found[1] if found else None,
            step=0,
        )

    # ---------------------------------------------------------------- stochastic

    def _run_stochastic(
        self,
        estimator: ELBO | None,
        optimizer: float | Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None,
        steps: int | None,
        subsample: Mapping[str, int] | None,
        stop: Callable[[Stochastic], bool] | None,
        average: bool,
        restarts: int,
    ) -> None:
        if self._dtype != self._user_dtype:  # the other method was tried first
            self._joint = None
            self._set_up(self._user_dtype)
        self._prepare_stochastic(estimator, optimizer, average, subsample)
        seeds = [self.seed + 7919 * k for k in range(restarts)]
        starts = None
        pays = batching_pays(self._compile, steps, restarts, self._values.values())
        if restarts > 1 and stop is None and pays:
            try:
                starts = self._run_batched(steps, seeds)
            except CompileError as error:
                warnings.warn(
                    f"The restarts run one after the other, because {error}.",
                    CompileWarning,
                    stacklevel=4,
                )
                self._start_over(seeds[0])
        if starts is None:
            starts = []
            for k, seed in enumerate(seeds):
                if k:
                    self._start_over(seed)
                self._start_stochastic(seed)
                self._advance(steps, stop, f"fit {k + 1}/{restarts}" if restarts > 1 else "fit")
                starts.append(self._snapshot())
                if self.interrupted:
                    break
        if len(starts) > 1:
            self._keep_best(starts)

    def _keep_best(self, starts: list[tuple[Any, ...]]) -> None:
        for start in starts:
            self._return_to(start)
            if self.interrupted:  # no time for more
                last = start[-1].elbo[-100:]
                self.restarts.append(float(np.mean(last)) if last else math.nan)
            else:
                self.restarts.append(self.elbo_estimate(200)[0])
        self._return_to(starts[int(np.argmax(np.nan_to_num(self.restarts, nan=-np.inf)))])

    def _start_over(self, seed: int) -> None:
        """A guide and parameters of another seed; the fit's own seed stays."""
        kept, self.seed = self.seed, seed
        try:
            self._set_up(self._user_dtype)
        finally:
            self.seed = kept

    def _run_batched(self, steps: int | None, seeds: list[int]) -> list[tuple[Any, ...]]:
        """All restarts at once; their snapshots.

        Raises:
            CompileError: they cannot be batched.
        """
        starts = []
        for k, seed in enumerate(seeds):
            if k:
                self._start_over(seed)
            self._start_stochastic(seed)
            starts.append(self._snapshot())

        @contextlib.contextmanager
        def isolated(k: int) -> Iterator[None]:
            # No parameter is the caller's, or two fits would share it, which is refused.
            self._return_to(starts[k])
            with isolated_pyro_state(self._store, None, self._dtype):
                yield

        bar = tqdm(total=steps, disable=not self.progress, desc=f"{len(seeds)} fits", unit="step")

        def report(done: int, error: float) -> None:
            bar.update(done)
            if math.isfinite(error):
                bar.set_postfix_str(f"error {error:.2f} posterior sds", refresh=False)

        failed = None
        try:
            fits = [start[-1] for start in starts]
            batched_fits(fits, isolated, stages.MOST_COMPILED_STEPS).advance(steps, report)
        except KeyboardInterrupt:
            self.interrupted = True
        except NonFiniteError as error:
            error.fit, failed = self, self._stochastic
            raise
        finally:
            bar.close()
            for k, start in enumerate(starts):
                running = start[-1]
                with isolated(k):
                    self._iterate = flat(running.leaves)
                    unflat(running.result(), running.leaves)
                    self._keep()
                    starts[k] = self._snapshot()
            for start in starts:
                if start[-1] is failed:
                    self._return_to(start)
        return starts

    def _prepare_stochastic(
        self,
        estimator: ELBO | None,
        optimizer: float | Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None,
        average: bool,
        subsample: Mapping[str, int] | None,
    ) -> None:
        if estimator is None:
            sites = self._first_traces[0].nodes.items()
            discrete = [name for name, site in sites if not reparameterised(site)]
            estimator = Score(8, LeaveOneOut(), sites=discrete) if discrete else Reparam()
        self._estimator = estimator
        self._optimizer = DEFAULT_RATE if optimizer is None else optimizer
        self._average = average
        self._subsample = dict(subsample) if subsample else None

    def _snapshot(self) -> tuple[Any, ...]:
        return self.guide, self._store, self._values, self._own, self._iterate, self._stochastic

    def _return_to(self, snapshot: tuple[Any, ...]) -> None:
        self.guide, self._store, self._values, self._own, *running = snapshot
        self._iterate, self._stochastic = running

    def _start_stochastic(self, seed: int) -> None:
        plan = None
        if self._subsample:
            ((name, batch),) = self._subsample.items()
            plan = self._plan(name, batch)
        with self._isolated(seeded_state(seed)):
            self._stochastic = Stochastic(
                self.model,
                self.guide,
                self._data,
                # What an estimator learns belongs to one fit.
                self._estimator.fresh() if hasattr(self._estimator, "fresh") else self._estimator,
                self._optimizer,
                plan,
                seed,
                self._average,
                self._compile,
            )

    def _plan(self, name: str, batch: int) -> PlatePlan:
        """Find out how the model takes minibatches of a plate."""
        if self._large is not None and (self._large.name, self._large.batch) == (name, batch):
            with contextlib.suppress(*FAILURES):  # said below
                self._check_minibatch_densities(self._large)
                return self._large
        sizes = {
            frame.name: frame.full_size or frame.size
            for site in self._model_trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
        }
        if name not in sizes:
            raise PreflightError(
                f"The model has no sample site in a plate {name!r}.",
                site=name,
                remedy="subsample= takes one of "
                + (", ".join(map(repr, sizes)) or "no plate")
                + ".",
            )
        size = sizes[name]
        if isinstance(self.guide, AutoGuide) and name in getattr(
            self.guide, "_prototype_frames", {}
        ):
            # The guide's own plate would insist on the full size.
            dim = self.guide._prototype_frames[name].dim
            self.guide.create_plates = lambda *a, **k: pyro.plate(name, size, dim=dim)
        failures = []
        for plan in plans(self._data, name, size, batch):
            try:
                with pyro.validation_enabled(True):
                    trace, model_trace = self._traces(plan)
                    model_trace.compute_log_prob()
                    trace.compute_log_prob()
                plan.check(model_trace)
                self._check_minibatch_densities(plan)
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

    def _check_minibatch_densities(self, plan: PlatePlan) -> None:
        """What a datum adds to the log density must not depend on which others are there."""
        if self.summed_out():
            return  # summed out: the next run would draw others
        rows = torch.arange(plan.batch)
        more: PlatePlan | None = None  # all rows
        if self._large is not None:
            more = plan.with_batch(2 * plan.batch)

        def scored(plan: PlatePlan | None, values: Draws) -> Any:
            data: Mapping[str, Any] = self._data
            handler: contextlib.AbstractContextManager = contextlib.nullcontext()
            if plan is not None:
                data, handler = plan.apply(self._data, torch.arange(plan.batch))
            conditioned = poutine.condition(self.model, data=values)
            with self._isolated(seeded_state(self.seed)), torch.no_grad(), handler:
                trace: Any = poutine.trace(conditioned).get_trace(**data)
                trace.compute_log_prob()
            return trace

        size = plan.size if more is None else more.batch
        values = (self._first_traces if more is None else self._traces(more))[1]
        whole: Draws = {}
        part: Draws = {}
        for name in self._latents():
            site: Any = values.nodes[name]
            whole[name] = part[name] = site["value"]
            for frame in site["cond_indep_stack"]:
                dim = frame.dim - site["fn"].event_dim if frame.dim is not None else 0
                if frame.name == plan.name and site["value"].shape[dim] == size:
                    part[name] = site["value"].index_select(dim, rows.to(site["value"].device))
        cut, full = scored(plan, part), scored(more, whole)
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
                    f"site {name!r} has another density in a minibatch than in the full data: the "
                    "model computes something from all rows (a mean, say), which a minibatch "
                    "changes"
                )

    def _advance(
        self,
        steps: int | None,
        stop: Callable[[Stochastic], bool] | None = None,
        description: str = "fit",
    ) -> None:
        running = self._stochastic
        assert running is not None
        bar = tqdm(total=steps, disable=not self.progress, desc=description, unit="step")
        smooth = 0.0

        def report(step: int, elbos: list[float], error: float) -> None:
            nonlocal smooth
            for elbo in elbos:
                smooth = 0.98 * smooth + 0.02 * elbo if smooth else elbo
            bar.update(len(elbos))
            if step % 50 < len(elbos):
                bar.set_postfix_str(f"ELBO {smooth:.2f}", refresh=False)

        try:
            with self._isolated():
                # The iterate goes on from where it was, which is not the average reported.
                if running.step:
                    unflat(self._iterate, running.leaves)
                try:
                    running.advance(steps, report, stop)
                finally:
                    self._iterate = flat(running.leaves)
                    unflat(running.result(), running.leaves)
                    self._keep()
        except KeyboardInterrupt:
            self.interrupted = True
        except NonFiniteError as error:
            error.fit = self
            raise
        finally:
            bar.close()

    # ---------------------------------------------------------------- what it found

    @property
    def elbo(self) -> np.ndarray:
        if self._stochastic is not None:
            return np.asarray(self._stochastic.elbo)
        return np.asarray(self._progress.elbo if self._progress else [])

    @property
    def converged(self) -> bool:
        if self._stochastic is not None:
            return self._stochastic.converged
        return self._progress is not None and self._progress.converged

    @property
    def monte_carlo_error(self) -> float:
        if self._stochastic is not None:
            return self._stochastic.error
        return self._progress.error if self._progress else math.inf

    @property
    def convergence(self) -> str:
        """How far to believe that this is the optimum, in one sentence."""
        error = self.monte_carlo_error
        stopped = "It was interrupted. " if self.interrupted else ""
        known = f"{error:.3f}" if math.isfinite(error) else "not known"
        if self._stochastic is not None:
            s = self._stochastic
            if self.converged:
                return f"converged after {s.step} steps: Monte Carlo error {error:.3f} sd"
            return (
                f"{stopped}Not converged after {s.step} steps: the averaged iterate's Monte Carlo "
                f"error is {known}, wanted 0.02 posterior sds. Continue with fit.extend(steps)."
            )
        p = self._progress
        if p is None or p.rounds == 0:
            return f"{stopped}Nothing was optimised yet."
        if self.converged:
            return (
                f"converged with {p.num_draws} draws: Monte Carlo error {error:.4f} sd, largest "
                f"gradient {p.gradient:.0e} per sd"
            )
        reason = (
            f"the largest gradient is {p.gradient:.1e} per sd"
            if p.gradient > GRADIENT_TOLERANCE
            else f"the Monte Carlo error is {known}, wanted 0.02 posterior sds"
        )
        return f"{stopped}Not converged with {p.num_draws} draws: {reason}. See fit.extend()."

    @property
    def params(self) -> Draws:
        """The variational (and model) parameters, name -> constrained value."""
        with self._isolated():
            return {n: v.detach().clone() for n, v in pyro.get_param_store().items()}

    def __repr__(self) -> str:
        latents = {n: self._shape(s) for n, s in latent_sites(self._first_traces[1]).items()}
        shown = ", ".join(f"{n}{list(s) if s else ''}" for n, s in list(latents.items())[:8])
        more = f" and {len(latents) - 8} more" if len(latents) > 8 else ""
        guide = self.family or getattr(self.guide, "__name__", type(self.guide).__name__)
        elbo = f"{self.elbo[-1]:.2f}" if len(self.elbo) else "none yet"
        if self._stochastic is not None and len(self.elbo):
            tail = self.elbo[-400:]
            elbo = f"{tail.mean():.2f} (mean of the last {len(tail)} steps)"
        return (
            f"Fit of {getattr(self.model, '__name__', type(self.model).__name__)} "
            f"by guide {guide}\n"
            f"  latents      {shown}{more}\n"
            f"  method       {self.method} ({self.why})\n"
            f"  ELBO         {elbo}\n"
            f"  convergence  {self.convergence}\n"
            f"  time         {self.seconds:.1f} s, seed {self.seed}"
        )

    # ---------------------------------------------------------------- using it

    def _out(self, value: torch.Tensor) -> torch.Tensor:
        """Results come in the caller's precision, whatever was used inside."""
        return value.to(self._user_dtype) if value.is_floating_point() else value

    def _chunk(self) -> int:
        size = sum(
            math.prod(self._shape(s))
            for trace in self._first_traces
            for s in trace.nodes.values()
            if s["type"] == "sample" and torch.is_tensor(s["value"])
        )
        return max(1, int(1e7 // max(size, 1)))

    def sample(self, n: int = 1000, seed: int | None = None) -> Draws:
        """Draws from the guide.

        Args:
            n: number of draws.
            seed: of the draws; the fit's own seed if None, so that repeated calls agree.

        Returns:
            Latent site -> tensor of shape (n, *site shape), on the model's scale.
        """
        n = _whole("the number of draws", n, 1) or 1
        names = self._latents()

        def one(_: torch.Tensor) -> Draws:
            with FunctionalNoise():
                trace = poutine.trace(self.guide).get_trace(**self._data)
            return {name: trace.nodes[name]["value"] for name in names}

        with self._isolated(seeded_state(self._seed(seed, 1))), torch.no_grad():
            draws = Batched(one, self._chunk(), random=True)(torch.zeros(n))
        return {k: self._out(v) for k, v in draws.items()}

    def _latents(self) -> list[str]:
        """Latents that the guide draws: all but those that the estimator sums out."""
        guide, model = self._first_traces
        return [n for n in latent_sites(model) if n in guide.nodes]

    def summed_out(self) -> list[str]:
        """Latents without draws, because the estimator sums over them (enumeration)."""
        guide, model = self._first_traces
        return [n for n in latent_sites(model) if n not in guide.nodes]

    def _needs_the_guide(self, what: str) -> None:
        if self.summed_out():
            raise ValueError(
                f"{what} needs a density of {self.summed_out()[0]!r}, which was summed out and "
                "which the guide does not draw. Give the guide a site for it, or write the sum "
                "into the model's likelihood."
            )

    def _needs_whole_plates(self) -> None:
        """A plate with a subsample_size of its own holds other rows on every run."""
        for name, site in self._first_traces[1].nodes.items():
            if self._large is not None and name == self._large.name:
                continue
            size = site["fn"].size if site_is_subsample(site) else 0
            if size and len(site["value"]) < size:
                raise ValueError(
                    f"The plate {name!r} holds {len(site['value'])} of its {size} rows, others on "
                    "every run, because the model gives it a subsample_size. Leave that out and "
                    f"fit with subsample={{{name!r}: {len(site['value'])}}}: the fit then knows "
                    "the rows, and uses all of them afterwards."
                )

    def _seed(self, seed: int | None, purpose: int) -> int:
        entropy = [self.seed if seed is None else seed, purpose]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def predict(
        self,
        n: int = 1000,
        data: Mapping[str, Any] | None = None,
        draws: Draws | None = None,
        seed: int | None = None,
    ) -> Draws:
        """Draws from the posterior predictive distribution.

        Args:
            n: number of draws.
            data: arguments for the model at new inputs (leave the observed one out, or None); the
                fit's own data if None.
            draws: posterior draws to use, as from :meth:`sample`; n fresh ones if None.
            seed: of the draws.

        Returns:
            Observed and deterministic site -> tensor of shape (n, *site shape).
        """
        if isinstance(n, Mapping):
            raise TypeError("the first argument is the number of draws: write predict(data=...)")
        draws = self.sample(n, seed) if draws is None else draws
        inputs = self._data
        if data is not None:
            check_data(data)
            check_arguments("model", self.model, data)
            inputs = _cast(data, self._dtype)
        self._needs_whole_plates()
        latent = set(latent_sites(self._first_traces[1]))

        def one(draw: Draws) -> Draws:
            conditioned = poutine.condition(poutine.uncondition(self.model), data=draw)
            with FunctionalNoise():
                trace: Any = poutine.trace(conditioned).get_trace(**inputs)
            return {
                name: site["value"]
                for name, site in trace.nodes.items()
                if site["type"] == "sample"
                and name not in latent
                and type(site["fn"]).__name__ not in ("_Subsample", "Unit")
            }

        try:
            out = self._over_draws(one, draws, random=True, seed=self._seed(seed, 2))
        except (TypeError, KeyError, IndexError, ValueError, RuntimeError, AttributeError) as error:
            if data is None:
                raise
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise PreflightError(
                f"The model does not run on the new data: {reason}",
                remedy="It is called as model(**data), with the posterior's draws for its latents: "
                f"give what the fit was given ({', '.join(self.data)}), with as many columns and "
                "no group that the fit has not seen; leave out or set to None what is observed.",
            ) from error
        if not out:
            raise ValueError(self._nothing_observed())
        return out

    def _nothing_observed(self) -> str:
        factors = [
            name
            for name, site in self._first_traces[1].nodes.items()
            if site["type"] == "sample" and type(site["fn"]).__name__ == "Unit"
        ]
        through = f" Its likelihood is the factor {factors[0]!r}." if factors else ""
        return (
            "The model observes no site, so there is nothing to predict or to score."
            + through
            + " Write the likelihood as a distribution: pyro.sample(..., obs=y)."
        )

    def log_likelihood(self, draws: Draws | None = None, n: int = 1000) -> Draws:
        """Pointwise log likelihood at posterior draws.

        Args:
            draws: posterior draws; n fresh ones if None.
            n: number of draws if none are given.

        Returns:
            Observed site -> tensor of shape (draws, *batch shape), in nats.
        """
        self._needs_the_guide("The log likelihood")
        self._needs_whole_plates()
        draws = self.sample(n) if draws is None else draws
        names = list(observed_sites(self._first_traces[1]))
        if not names:
            raise ValueError(self._nothing_observed())

        def one(draw: Draws) -> Draws:
            conditioned = poutine.condition(self.model, data=draw)
            trace: Any = poutine.trace(conditioned).get_trace(**self._data)
            sites = {name: trace.nodes[name] for name in names}
            return {
                name: s["fn"].log_prob(s["value"]).expand(s["fn"].batch_shape)
                for name, s in sites.items()
            }

        return self._over_draws(one, draws, random=False, seed=0)

    def _over_draws(
        self, one: Callable[[Draws], Draws], draws: Draws, random: bool, seed: int
    ) -> Draws:
        names = [n for n in draws if n in latent_sites(self._first_traces[1])]
        with self._isolated(seeded_state(seed)), torch.no_grad():
            cast = _cast(draws, self._dtype)
            batched = Batched(
                lambda *values: one(dict(zip(names, values, strict=True))), self._chunk(), random
            )
            out = batched(*(cast[name] for name in names))
        return {k: self._out(v) for k, v in out.items()}

    def elbo_estimate(self, n: int = 1000, seed: int | None = None) -> tuple[float, float]:
        """The ELBO on the full data from n fresh draws.

        Returns:
            (mean, standard error), in nats.
        """
        if self.summed_out() and self._stochastic:
            # The latents that the estimator sums out have no draws to weigh.
            estimator = self._stochastic.estimator
            with self._isolated(seeded_state(self._seed(seed, 3))), torch.no_grad():
                losses = [estimator.loss(self.model, self.guide, **self._data) for _ in range(n)]
            values = -torch.tensor(losses, dtype=torch.float64)
        else:
            values = self.log_weights(n, seed).double()
        return float(values.mean()), float(values.std() / math.sqrt(n))

    def log_weights(self, n: int = 1000, seed: int | None = None) -> torch.Tensor:
        """log p(x, z) - log q(z) at n draws from the guide: shape (n,), in nats."""
        return self.weighted_sample(n, seed)[1]

    def weighted_sample(self, n: int = 1000, seed: int | None = None) -> tuple[Draws, torch.Tensor]:
        """n draws from the guide, as from :meth:`sample`, and the log weight of each.

        Returns:
            (draws, log p(x, z) - log q(z)): the weights turn averages over the guide into averages
            over the posterior, as far as :func:`~vi_toolkit.psis` says that they can.
        """
        n = _whole("the number of draws", n, 2) or 2
        self._needs_the_guide("An importance weight")
        self._needs_whole_plates()
        names = self._latents()

        def one(_: torch.Tensor) -> tuple[Draws, torch.Tensor]:
            with FunctionalNoise():
                trace = poutine.trace(self.guide).get_trace(**self._data)
                model = poutine.trace(poutine.replay(self.model, trace=trace))
                model_trace = model.get_trace(**self._data)
            values = {name: trace.nodes[name]["value"] for name in names}
            return values, model_trace.log_prob_sum() - trace.log_prob_sum()

        with self._isolated(seeded_state(self._seed(seed, 3))), torch.no_grad():
            draws, weights = Batched(one, self._chunk(), random=True)(torch.zeros(n))
        return {k: self._out(v) for k, v in draws.items()}, weights

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
        if self._cannot_extend:
            raise ValueError(self._cannot_extend)
        if self._stochastic is not None:
            if steps is None or steps < 1:
                raise ValueError("extend(steps) needs the number of further steps")
            self._advance(steps)
        else:
            if steps is not None:
                raise ValueError(
                    "this fit is deterministic: call extend() without steps to solve again with "
                    "twice the draws, or fit with steps= for stochastic steps"
                )
            done = self._progress.rounds if self._progress else 0
            self._run_deterministic(1, rounds=done + 1 if self.converged else None)
        self.seconds += time.monotonic() - began
        return self

    def save(self, path: Any) -> None:
        """Write the fit to one file (see :mod:`vi_toolkit.storage`)."""
        from vi_toolkit.storage import save

        save(self, path)

    def to_arviz(self, num_draws: int = 1000, **options: Any) -> Any:
        """ArviZ InferenceData (0.x) or DataTree (1.x); see :func:`vi_toolkit.export.to_arviz`."""
        from vi_toolkit.export import to_arviz

        return to_arviz(self, num_draws=num_draws, **options)

    def plot(self) -> Any:
        """Figure with the ELBO's history and the posterior marginals."""
        from vi_toolkit.figures import plot_fit

        return plot_fit(self)


# -------------------------------------------------------------------- helpers


def _family_name(guide: Any) -> str | None:
    declared = getattr(guide, "family", None)
    if isinstance(declared, str):
        return declared
    if type(guide) is AutoDelta:
        return "point"
    family = FAMILY_OF.get(type(guide))
    return family.name if family else None


def _float_dtype(data: Any) -> torch.dtype:
    if isinstance(data, Mapping):
        for value in data.values():
            if torch.is_tensor(value) and value.is_floating_point():
                return value.dtype
    return torch.get_default_dtype()


def _cast(data: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in data.items()
    }


def _whole(name: str, value: Any, least: int) -> int | None:
    """A whole number of any integer type, at least ``least``; None stays None."""
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return number


def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vi-recipes")
    except PackageNotFoundError:
        return "not installed"


__all__ = ["Fit", "fit", "indices"]
