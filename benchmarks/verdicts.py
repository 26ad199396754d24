"""Does the verdict know? ``vi.diagnose`` against the truth on many posteriors and guides.

The verdict is given from the fit alone. The truth comes from exact formulas, from the recipes'
references and, with a folder, from posteriordb's reference draws: "trust" if every mean is within
0.05 sd and every sd within 5 %, "trust the means only" if the means are, else "do not trust".

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
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from benchmarks.posteriordb import read_draws, read_json
from benchmarks.posteriordb_models import MODELS
from vi_toolkit.joint import Joint
from vi_toolkit.scope import borrowed_globals

GUIDES = {"full-rank": AutoMultivariateNormal, "mean-field": AutoNormal}
VERDICTS = ["trust", "trust the means only", "do not trust"]
RECIPES = ("linear_regression", "logistic_regression")


def gaussian(rho: float) -> Any:
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2).double(), covariance))

    return model


def log_gamma(shape: float) -> Any:
    def model():
        pyro.sample("rate", dist.Gamma(torch.tensor(shape).double(), 1.0))

    return model


def pairs(folder: Path | None) -> Iterator[tuple[str, str, Any, dict, Any, np.ndarray, np.ndarray]]:
    """(name, guide's name, model, data, guide, true means, true sds)."""
    for label, guide in GUIDES.items():
        for rho in (0.1, 0.5, 0.95):
            yield f"gaussian, rho={rho}", label, gaussian(rho), {}, guide, np.zeros(2), np.ones(2)
        for shape in (0.4, 2.0, 50.0):
            a = torch.tensor(shape).double()
            mean, sd = torch.digamma(a), torch.polygamma(1, a).sqrt()
            moments = np.array([float(mean)]), np.array([float(sd)])
            yield f"log gamma, shape={shape}", label, log_gamma(shape), {}, guide, *moments
    for name in RECIPES:
        recipe = importlib.import_module(f"recipes.{name}")
        reference = vi.Reference.load(str(files(f"recipes.{name}") / "reference.json"))
        for label in GUIDES:
            guide = recipe.GUIDES[label]
            moments = reference.mean, reference.sd
            yield name, label, recipe.model, recipe.load_data(), guide, *moments
    if folder is None:
        return
    for path in sorted((folder / "draws").glob("*.json.zip")):
        name = path.name.removesuffix(".json.zip")
        if name not in MODELS:
            continue
        posterior = MODELS[name]
        data = posterior.prepare(read_json(folder / "data" / f"{name.split('-', 1)[0]}.json.zip"))
        sites = posterior.to_sites(read_draws(path))
        with borrowed_globals(dtype=torch.float64):  # as vi.fit, which takes data to float64
            joint = Joint(posterior.model, data)
        u = joint.flatten({site: sites[site] for site in joint.sites}).detach().double().numpy()
        for label, guide in GUIDES.items():
            yield name, label, posterior.model, data, guide, u.mean(0), u.std(0)


def truth(fit: vi.Fit, mean: np.ndarray, sd: np.ndarray) -> tuple[str, float, float]:
    """The verdict that the reference gives, with the largest errors behind it."""
    u = fit.joint.flatten(fit.sample(100_000)).detach().double().numpy()
    error = float(np.abs((u.mean(0) - mean) / sd).max())
    ratio = u.std(0) / sd
    worst = float(ratio[np.abs(np.log(ratio)).argmax()])
    if error > 0.05:
        return VERDICTS[2], error, worst
    return VERDICTS[0 if abs(worst - 1) <= 0.05 else 1], error, worst


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.verdicts", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="default: $VI_BENCH_DATA/posteriordb, if set")
    folder = parser.parse_args(argv).folder
    if folder is None and "VI_BENCH_DATA" in os.environ:
        folder = Path(os.environ["VI_BENCH_DATA"]) / "posteriordb"
    print(
        f"{'posterior':40} {'guide':10} {'mean err':>8} {'sd ratio':>8}  {'truth':20} "
        f"{'verdict':20} {'k-hat':>5} {'LR sd ratio':>13} {'fit s':>6} {'diag s':>6}"
    )
    rows = []
    for name, label, model, data, guide, mean, sd in pairs(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vi.ConvergenceWarning)
            fit = vi.fit(model, guide, data, progress=False)
        began = time.perf_counter()
        found = vi.diagnose(fit)
        seconds = time.perf_counter() - began
        right, error, ratio = truth(fit, mean, sd)
        rows.append((right, found.verdict))
        response = ""
        if found.linear_response is not None:
            corrected = found.linear_response.sd / sd
            response = f"{corrected.min():.3f}-{corrected.max():.3f}"
        k = f"{found.pareto_k.k:.2f}" if found.pareto_k else ""
        print(
            f"{name:40} {label:10} {error:8.3f} {ratio:8.3f}  {right:20} {found.verdict:20} "
            f"{k:>5} {response:>13} {fit.seconds:6.1f} {seconds:6.1f}",
            flush=True,
        )
    table = pd.DataFrame(rows, columns=["truth", "verdict"])
    counts = pd.crosstab(table["truth"], table["verdict"])
    print("\n" + counts.reindex(index=VERDICTS, columns=VERDICTS, fill_value=0).to_string())


if __name__ == "__main__":
    main()
