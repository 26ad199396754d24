"""Which guides earn their place? ELBO, errors against reference draws, k-hat and time of each.

Eight schools centred and non-centred, and posteriordb's regressions and mixture, by Pyro's own
guides, by the toolkit's fits after non-centring, and by Pathfinder (Zhang, Carpenter, Gelman and
Vehtari, 2022), written here as a guide to be measured and nowhere else.

Example::

    VI_BENCH_DATA=path/to/folder python -m benchmarks.guides --flow-steps 4000
"""

import argparse
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import scipy.optimize
import torch
from pyro.distributions.transforms import affine_coupling, iterated
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam

import vi_toolkit as vi
from benchmarks.posteriordb import read_draws, read_json
from benchmarks.posteriordb_models import MODELS
from recipes import linear_regression
from recipes.linear_regression.exact import posterior as exact_posterior
from vi_toolkit.deterministic import starts
from vi_toolkit.deterministic.families import FullRank
from vi_toolkit.deterministic.objective import FamilyProblem
from vi_toolkit.deterministic.rounds import Progress, solve_rounds
from vi_toolkit.deterministic.starts import ranked
from vi_toolkit.diagnostics.pareto import smoothed
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.sites import latent_sites

NUM_DRAWS = 20_000


def centred_eight_schools(y: torch.Tensor, standard_error: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, standard_error), obs=y)


def structured(model: Any, data: dict) -> Any:
    """Every latent Normal, its mean linear in all latents before it."""
    names = list(latent_sites(poutine.trace(model).get_trace(**data)))
    return AutoStructured(
        model,
        conditionals=dict.fromkeys(names, "normal"),
        dependencies={
            name: dict.fromkeys(names[:i], "linear") for i, name in enumerate(names) if i
        },
    )


def non_centred(model: Any) -> Any:
    return poutine.reparam(model, config={"theta": LocScaleReparam(0.0)})


class Auxiliary(torch.nn.Module):
    r"""A mean-field guide whose parameters depend on auxiliary variables that are then ignored.

    q(u) = \int q(u | a) q(a) da has no density in closed form, so a reverse model r(a | u) joins
    the model, and the ELBO of the two together, which is the ELBO of q(u) minus
    E_q KL(q(a | u) || r(a | u)), is maximised. Both start so that this is mean field's ELBO.

    Ranganath, Tran and Blei, "Hierarchical Variational Models", ICML 2016; Maaloe, Sonderby,
    Sonderby and Winther, "Auxiliary Deep Generative Models", ICML 2016.

    Args:
        joint: of the model, whose unconstrained vector is the one latent ``u`` of :meth:`model`.
        mean, sd: of a mean-field fit, (d,).
        size: of a.
        hidden: units of either network.
    """

    def __init__(
        self, joint: Joint, mean: torch.Tensor, sd: torch.Tensor, size: int = 2, hidden: int = 20
    ):
        super().__init__()
        self.joint, self.size, self.mean, self.sd = joint, size, mean, sd

        def network(inputs: int, outputs: int) -> torch.nn.Module:
            last = torch.nn.Linear(hidden, 2 * outputs)
            torch.nn.init.zeros_(last.bias)
            last.weight.data *= 0.01
            return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.Tanh(), last)

        self.forward_net = network(size, joint.dim)
        self.reverse_net = network(joint.dim, size)

    def model(self) -> None:
        pyro.module("auxiliary", self)
        d = self.joint.dim
        flat = dist.Normal(torch.zeros(d), 1.0).to_event(1).mask(False)
        u = pyro.sample("u", flat)
        with poutine.block():  # its sites are in the factor already
            log_density = self.joint.log_density(u)
        pyro.factor("joint", log_density)
        loc, log_scale = self.reverse_net((u - self.mean) / self.sd).chunk(2, -1)
        pyro.sample("a", dist.Normal(loc, log_scale.exp()).to_event(1))

    def guide(self) -> None:
        pyro.module("auxiliary", self)
        a = pyro.sample("a", dist.Normal(torch.zeros(self.size), 1.0).to_event(1))
        shift, log_stretch = self.forward_net(a).chunk(2, -1)
        loc, scale = self.mean + self.sd * shift, self.sd * log_stretch.exp()
        pyro.sample("u", dist.Normal(loc, scale).to_event(1))


def auxiliary(model: Any, data: dict) -> Auxiliary:
    start = vi.fit(model, AutoNormal, data, progress=False)
    joint = Joint(model, data)
    u = joint.flatten(start.sample(20_000))
    torch.manual_seed(0)
    return Auxiliary(joint, u.mean(0), u.std(0))


def guides(
    name: str, model: Any, data: dict, flow_steps: int
) -> Iterator[tuple[str, Any, Any, dict]]:
    """(label, model, guide, options of the fit)."""
    yield "mean field", model, AutoNormal, {}
    yield "full rank", model, AutoMultivariateNormal, {}
    if "eight" in name:
        yield "structured, linear", model, structured(model, data), {}
        yield "hierarchical messenger", model, AutoHierarchicalNormalMessenger(model), {}
    if name == "eight schools, centred":
        yield "mean field, theta non-centred", non_centred(model), AutoNormal, {}
        yield "full rank, theta non-centred", non_centred(model), AutoMultivariateNormal, {}
    if flow_steps and ("eight" in name or name == "linear_regression"):
        both = auxiliary(model, data)
        many = vi.Reparam(particles=10)
        options = {"steps": flow_steps, "optimizer": 0.005, "estimator": many, "compile": False}
        yield "auxiliary variables (bound)", both.model, both.guide, options
    if flow_steps and "eight" in name:
        options = {"steps": flow_steps, "optimizer": 0.01}
        yield "IAF", model, AutoIAFNormal(model, hidden_dim=[20], num_transforms=2), options
        coupling = partial(affine_coupling, hidden_dims=[20])
        yield (
            "coupling flow",
            model,
            AutoNormalizingFlow(model, partial(iterated, 4, coupling)),
            options,
        )


def posteriors(folder: Path) -> Iterator[tuple[str, Any, dict, dict]]:
    """(name, model, data, reference draws by site)."""
    for key, posterior in MODELS.items():
        raw = read_json(folder / "data" / f"{key.split('-', 1)[0]}.json.zip")
        columns = read_draws(folder / "draws" / f"{key}.json.zip")
        data = posterior.prepare(raw)
        sites = posterior.to_sites(columns)
        if not key.startswith("eight"):
            yield key, posterior.model, data, sites
            continue
        yield "eight schools, non-centred", posterior.model, data, sites
        theta = sites["mu"][:, None] + sites["tau"][:, None] * sites["eta"]
        centred = {"mu": sites["mu"], "tau": sites["tau"], "theta": theta}
        yield "eight schools, centred", centred_eight_schools, data, centred
    data = linear_regression.load_data()
    exact = exact_posterior(**data)
    yield "linear_regression", linear_regression.model, data, exact.sample(NUM_DRAWS, seed=0)


def errors(
    u: np.ndarray, reference: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """Largest error of a mean in reference sds, and the sd ratio furthest from one."""
    mean = np.average(u, 0, weights)
    sd = np.sqrt(np.average((u - mean) ** 2, 0, weights))
    ratio = sd / reference.std(0)
    error = np.abs((mean - reference.mean(0)) / reference.std(0)).max()
    return float(error), float(ratio[np.abs(np.log(ratio)).argmax()])


# ------------------------------------------------------------------ Pathfinder


def path_gaussians(joint: Joint, start: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(mean, covariance) at every point of an L-BFGS path, by the BFGS update of its steps.

    Dense, because the posteriors here are small: the paper's factored form is the same matrix.
    """
    path = []

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        gradient, value = joint.gradients(torch.as_tensor(x)[None])
        if not torch.isfinite(value).all() or not torch.isfinite(gradient).all():
            return 1e100, np.zeros_like(x)
        return -float(value), -gradient[0].numpy()

    def keep(x: np.ndarray) -> None:
        path.append((x.copy(), objective(x)[1]))

    keep(start.numpy())
    scipy.optimize.minimize(
        objective, start.numpy(), jac=True, method="L-BFGS-B", callback=keep,
        options={"maxiter": 1_000, "maxcor": 6, "ftol": 1e-12},
    )  # fmt: skip
    d = len(start)
    inverse, found = np.eye(d), []
    for (x0, g0), (x1, g1) in itertools.pairwise(path):
        s, y = x1 - x0, g1 - g0
        if s @ y > 1e-12 * (y @ y):  # the paper's condition for an update
            if not found:
                inverse = np.eye(d) * (s @ y) / (y @ y)
            left = np.eye(d) - np.outer(s, y) / (s @ y)
            inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
            inverse = (inverse + inverse.T) / 2
            found.append((torch.as_tensor(x1 - inverse @ g1), torch.as_tensor(inverse.copy())))
    return found


def pathfinder(joint: Joint, paths: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Draws of the best Gaussian of each path, their log weights, and the best one's ELBO."""
    generator = torch.Generator().manual_seed(seed)
    draws, log_weights, best = [], [], -np.inf
    for _ in range(paths):
        start = 4 * torch.rand(joint.dim, generator=generator, dtype=torch.float64) - 2  # Stan's
        chosen, chosen_elbo = None, -np.inf
        for mean, covariance in path_gaussians(joint, start):
            tril, bad = torch.linalg.cholesky_ex(covariance)
            if int(bad):
                continue
            q = dist.MultivariateNormal(mean, scale_tril=tril)
            noise = torch.randn(25, joint.dim, generator=generator, dtype=torch.float64)
            u = mean + noise @ tril.T
            elbo = float((joint.log_densities(u) - q.log_prob(u)).mean())
            if np.isfinite(elbo) and elbo > chosen_elbo:
                chosen, chosen_elbo = (q, mean, tril), elbo
        if chosen is None:
            continue
        q, mean, tril = chosen
        noise = torch.randn(NUM_DRAWS, joint.dim, generator=generator, dtype=torch.float64)
        u = mean + noise @ tril.T
        weights = joint.log_densities(u) - q.log_prob(u)
        weights = torch.where(torch.isfinite(weights), weights, -torch.inf)
        draws.append(u)
        log_weights.append(weights)
        best = max(best, float(weights.mean()))
    return torch.cat(draws).numpy(), torch.cat(log_weights).numpy(), best


def compared_starts(name: str, model: Any, data: dict) -> str:
    """CPU seconds and final ELBO of the full-rank fit from its own starts and from Pathfinder's."""
    spent = []

    def timed(*arguments: Any) -> Any:
        began = time.process_time()
        out = own_starts(*arguments)
        spent.append(time.process_time() - began)
        return out

    own_starts, starts.first_problem = starts.first_problem, timed
    try:
        of = vi.fit(model, AutoMultivariateNormal, data, progress=False)
    finally:
        starts.first_problem = own_starts
    pyro.enable_validation(False)
    joint, began = Joint(model, data), time.process_time()
    generator = torch.Generator().manual_seed(0)
    problems = []
    for _ in range(4):
        start = 4 * torch.rand(joint.dim, generator=generator) - 2
        for mean, covariance in path_gaussians(joint, start):
            tril, bad = torch.linalg.cholesky_ex(covariance)
            if not int(bad):
                problems.append(FamilyProblem(joint, FullRank(mean, tril)))
    z = torch.randn(25, joint.dim, generator=generator)
    best = ranked(problems, z)[0]
    seconds = time.process_time() - began
    end = solve_rounds(
        Progress(best),
        0,
        joint.observations,
        torch.float64,
        None,
        lambda m: None,
        lambda p: None,
    )
    return (
        f"{name:36} own starts {spent[0]:6.2f} s, ELBO {of.elbo[-1]:.3f}; "
        f"Pathfinder {seconds:6.2f} s, ELBO {end.elbo[-1]:.3f}"
    )


# ------------------------------------------------------------------ the table

COLUMNS = {
    "posterior": "<27", "guide": "<30", "ELBO": ">9", "se": ">6", "k-hat": ">6", "mean err": ">8",
    "sd ratio": ">8", "seconds": ">8",
}  # fmt: skip


def row(name: str, label: str, *numbers: float) -> str:
    digits = (3, 3, 2, 3, 3, 1)
    cells = [name, label, *(f"{x:.{n}f}" for x, n in zip(numbers, digits, strict=True))]
    return " ".join(f"{c:{w}}" for c, w in zip(cells, COLUMNS.values(), strict=True))


def fitted_row(name: str, label: str, of: vi.Fit, sites: dict, to_u: Callable) -> str:
    draws = of.sample(NUM_DRAWS)
    if "u" not in draws and (missing := set(sites) - set(draws)):
        made = of.predict(draws=draws)
        draws |= {site: made[site] for site in missing}
    elbo, se = of.elbo_estimate(NUM_DRAWS)
    k = vi.psis(of, num_draws=10_000).k
    return row(name, label, elbo, se, k, *errors(to_u(draws), to_u(sites)), of.seconds)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.guides", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="default: $VI_BENCH_DATA/posteriordb")
    parser.add_argument("--flow-steps", type=int, default=4_000, help="0 leaves them out")
    parser.add_argument("--paths", type=int, default=8)
    parser.add_argument("--only", default="", help="posteriors whose name contains this")
    parser.add_argument("--starts", action="store_true", help="compare starts of full rank instead")
    options = parser.parse_args(argv)
    folder = options.folder or Path(os.environ.get("VI_BENCH_DATA", ".")) / "posteriordb"
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore", vi.ConvergenceWarning)
    if options.starts:
        for name, model, data, _ in posteriors(folder):
            if options.only in name:
                print(compared_starts(name, model, data), flush=True)
        return
    print(" ".join(f"{name:{width}}" for name, width in COLUMNS.items()))
    for name, model, data, sites in posteriors(folder):
        if options.only not in name:
            continue
        joint = Joint(model, data)

        def to_u(draws: dict, joint: Joint = joint) -> np.ndarray:
            if "u" in draws:  # auxiliary variables: all latents in one vector
                return draws["u"].numpy()
            values = {site: draws[site].double() for site in joint.sites}
            return joint.flatten(values).detach().numpy()

        for label, own, guide, settings in guides(name, model, data, options.flow_steps):
            try:
                of = vi.fit(own, guide, data, progress=False, **settings)
                print(fitted_row(name, label, of, sites, to_u), flush=True)
            except Exception as error:  # one guide that cannot must not end the run
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                print(f"{name:27} {label:30} {reason[:100]}", flush=True)
        pyro.enable_validation(False)
        for paths in (1, options.paths):
            began = time.perf_counter()
            u, log_weights, elbo = pathfinder(joint, paths, seed=0)
            seconds = time.perf_counter() - began
            k = vi.pareto_k(log_weights).k
            reference = to_u(sites)
            label = f"Pathfinder, {paths} path{'s' * (paths > 1)}"
            print(row(name, label, elbo, 0, k, *errors(u, reference), seconds), flush=True)
            weighted = errors(u, reference, smoothed(log_weights))
            print(row(name, label + " + PSIS", elbo, 0, k, *weighted, seconds), flush=True)


if __name__ == "__main__":
    main()
