"""Does the verdict know? ``vi.diagnose`` against the truth on many posteriors and guides.

The verdict is given from the fit alone. The truth comes from exact formulas, from the recipes'
references and, with a folder, from posteriordb's reference draws: "trust" if every mean is within
0.05 sd and every sd within 5 %, "trust the means only" if the means are, else "do not trust". As in
`vi.compare` a limit is 4 standard errors of the reference where that is more.

``by`` is what the diagnosis judged by (weights of the guide or of a wider t, or short chains),
``its errors`` the largest error of a mean that this gave, in sds, and the sd ratio furthest from 1.

Example::

    python -m benchmarks.verdicts --folder path/to/posteriordb
"""

import argparse
import importlib
import os
import time
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from benchmarks.posteriordb import read_draws, read_json
from benchmarks.posteriordb_models import MODELS
from recipes import eight_schools, linear_regression_ard, poisson_glm
from vi_toolkit.programs.isolation import isolated_pyro_state
from vi_toolkit.programs.joint import Joint

GUIDES = {"full-rank": AutoMultivariateNormal, "mean-field": AutoNormal}
VERDICTS = ["trust", "trust the means only", "do not trust"]
RECIPES = {
    "linear_regression": GUIDES,
    "logistic_regression": GUIDES,
    "eight_schools": ("conditional", "full-rank", "mean-field"),
    "hierarchical_logistic_regression": GUIDES,
    "linear_regression_ard": ("conditional", "full-rank", "mean-field"),
    "poisson_glm": GUIDES,
}


def gaussian(rho: float) -> Any:
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2).double(), covariance))

    return model


def log_gamma(shape: float) -> Any:
    def model():
        pyro.sample("rate", dist.Gamma(torch.tensor(shape).double(), 1.0))

    return model


class Truth(NamedTuple):
    """Moments of a posterior and their standard errors, (d,) each."""

    mean: np.ndarray
    sd: np.ndarray
    mean_se: Any = 0.0
    sd_se: Any = 0.0

    def verdict(self, fit: vi.Fit) -> tuple[str, float, float]:
        """The verdict that the truth gives, with the largest errors behind it."""
        u = fit.joint.flatten(fit.sample(100_000)).detach().double().numpy()
        error = np.abs((u.mean(0) - self.mean) / self.sd)
        ratio = u.std(0) / self.sd
        worst = float(ratio[np.abs(np.log(ratio)).argmax()])
        means = (error <= np.maximum(0.05, 4 * self.mean_se / self.sd)).all()
        limit = np.maximum(np.log(1.05), 4 * self.sd_se / self.sd)
        sds = (np.abs(np.log(ratio)) <= limit).all()
        verdict = VERDICTS[2] if not means else VERDICTS[0 if sds else 1]
        return verdict, float(error.max()), worst


def pairs(folder: Path | None) -> Iterator[tuple[str, str, Any, dict, Any, Truth]]:
    """(name, guide's name, model, data, guide, truth)."""
    for label, guide in GUIDES.items():
        for rho in (0.1, 0.5, 0.95):
            of = Truth(np.zeros(2), np.ones(2))
            yield f"gaussian, rho={rho}", label, gaussian(rho), {}, guide, of
        for shape in (0.4, 2.0, 50.0):
            a = torch.tensor(shape).double()
            mean, sd = torch.digamma(a), torch.polygamma(1, a).sqrt()
            of = Truth(np.array([float(mean)]), np.array([float(sd)]))
            yield f"log gamma, shape={shape}", label, log_gamma(shape), {}, guide, of
    for name, labels in RECIPES.items():
        recipe = importlib.import_module(f"recipes.{name}")
        reference = vi.Reference.load(str(files(f"recipes.{name}") / "reference.json"))
        of = Truth(reference.mean, reference.sd, reference.mean_se, reference.sd_se)
        for label in labels:
            yield name, label, recipe.model, recipe.load_data(), recipe.GUIDES[label], of
    # Forms of the recipes' models: a funnel, one integrated by hand, one with a latent per datum.
    exact = eight_schools.reference("centred")
    for label, guide in eight_schools.CENTRED_GUIDES.items():
        data = eight_schools.load_data()
        of = Truth(exact.mean, exact.sd)
        yield "eight_schools, centred", label, eight_schools.centred, data, guide, of
    reference = vi.Reference.load(str(files("recipes.linear_regression_ard") / "reference.json"))
    keep = [i for i, n in enumerate(reference.names) if not n.startswith("log(relevance)")]
    parts = (reference.mean, reference.sd, reference.mean_se, reference.sd_se)
    of = Truth(*(part[keep] for part in parts))
    data = linear_regression_ard.load_data()
    own = {"conditional": linear_regression_ard.of_collapsed}
    for label, guide in (own | GUIDES).items():
        yield (
            "linear_regression_ard, collapsed",
            label,
            linear_regression_ard.collapsed,
            data,
            guide,
            of,
        )
    reference = vi.Reference.load(poisson_glm.MIXED_REFERENCE)
    of = Truth(reference.mean, reference.sd, reference.mean_se, reference.sd_se)
    data = poisson_glm.load_data("sample")
    yield (
        "poisson_glm, mixed",
        "mean-field",
        poisson_glm.mixed,
        data,
        poisson_glm.mixed_mean_field,
        of,
    )
    if folder is None:
        return
    for path in sorted((folder / "draws").glob("*.json.zip")):
        name = path.name.removesuffix(".json.zip")
        if name not in MODELS:
            continue
        posterior = MODELS[name]
        data = posterior.prepare(read_json(folder / "data" / f"{name.split('-', 1)[0]}.json.zip"))
        sites = posterior.to_sites(read_draws(path))
        with isolated_pyro_state(dtype=torch.float64):  # as vi.fit, which takes data to float64
            joint = Joint(posterior.model, data)
        u = joint.flatten({site: sites[site] for site in joint.sites}).detach().double().numpy()
        root = np.sqrt(len(u))  # thinned: as good as independent
        of = Truth(u.mean(0), u.std(0), u.std(0) / root, u.std(0) / root / np.sqrt(2))
        for label, guide in GUIDES.items():
            yield name, label, posterior.model, data, guide, of


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.verdicts", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="default: $VI_BENCH_DATA/posteriordb, if set")
    parser.add_argument("--only", default="", help="posteriors whose name contains this")
    options = parser.parse_args(argv)
    folder = options.folder
    if folder is None and "VI_BENCH_DATA" in os.environ:
        folder = Path(os.environ["VI_BENCH_DATA"]) / "posteriordb"
    print(
        f"{'posterior':40} {'guide':11} {'mean err':>8} {'sd ratio':>8}  {'truth':20} "
        f"{'verdict':20} {'k-hat':>5} {'by':8} {'its errors':11} {'LR sd ratio':>13} {'fit s':>6} "
        f"{'diag s':>6}"
    )
    rows = []
    for name, label, model, data, guide, of in pairs(folder):
        if options.only not in name:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vi.ConvergenceWarning)
            fit = vi.fit(model, guide, data, progress=False)
        began = time.perf_counter()
        found = vi.diagnose(fit)
        seconds = time.perf_counter() - began
        right, error, ratio = of.verdict(fit)
        rows.append((right, found.verdict))
        response = ""
        if found.linear_response is not None:
            corrected = found.linear_response.sd / of.sd
            response = f"{corrected.min():.3f}-{corrected.max():.3f}"
        k = f"{found.pareto_k.k:.2f}" if found.pareto_k else ""
        by, estimated = "nothing", ""
        if found.moments is not None:
            by = "chains" if found.chains else found.moments.proposal.split()[-1]
            # How far the diagnosis's own moments are from the truth.
            gap = np.abs((found.moments.mean - of.mean) / of.sd).max()
            spread = found.moments.sd / of.sd
            estimated = f"{gap:.3f} {spread[np.abs(np.log(spread)).argmax()]:.3f}"
        print(
            f"{name:40} {label:11} {error:8.3f} {ratio:8.3f}  {right:20} {found.verdict:20} "
            f"{k:>5} {by:8} {estimated:11} {response:>13} {fit.seconds:6.1f} {seconds:6.1f}",
            flush=True,
        )
    table = pd.DataFrame(rows, columns=["truth", "verdict"])
    counts = pd.crosstab(table["truth"], table["verdict"])
    print("\n" + counts.reindex(index=VERDICTS, columns=VERDICTS, fill_value=0).to_string())


if __name__ == "__main__":
    main()
