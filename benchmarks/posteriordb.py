"""Are the defaults right? Fit a folder of posteriors and compare with their reference draws.

The folder is laid out like posteriordb (Magnusson et al., 2022): ``data/<dataset>.json.zip``,
``draws/<posterior>.json.zip`` (a list of chains, each a dictionary of columns) and
``draws/<posterior>.info.json``, where a posterior is called ``<dataset>-<model>``. The scoring
below uses nothing of ``vi_toolkit`` but the fit's draws and the map to the unconstrained scale, so
that it stays an independent witness.

Example::

    python -m benchmarks.posteriordb --folder path/to/posteriordb --guides full-rank,mean-field
"""

import argparse
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from benchmarks.posteriordb_models import MODELS, Columns, Posterior

GUIDES = {"full-rank": AutoMultivariateNormal, "mean-field": AutoNormal}
DRAWS = 100_000  # the Monte Carlo error of a mean is then 0.003 sd, of an sd 0.2 %
COLUMNS = {  # title -> width
    "posterior": -40,
    "guide": -10,
    "d": 4,
    "near-Gaussian": 13,
    "mean error": 10,
    "sd ratio": 8,
    "right": 5,
    "seconds": 8,
    "converged": 9,
    "MC error": 8,
}


class Score(NamedTuple):
    """How far a fit is from the reference draws, worst scalar first."""

    near_gaussian: bool
    mean_error: float  # in reference sds
    sd_ratio: float  # to the target sd

    def right(self, mean_tolerance: float, sd_tolerance: float) -> bool:
        """True when every mean and every sd lies within the tolerances of its target."""
        return self.mean_error <= mean_tolerance and abs(self.sd_ratio - 1) <= sd_tolerance


def score(fitted: np.ndarray, reference: np.ndarray, guide: str) -> Score:
    """Compare draws of a fit with reference draws, both of shape (draws, d) and unconstrained.

    The target of an sd is the reference sd s_i for a full-rank guide. A mean-field Normal fitted to
    N(m, Sigma) has variance 1 / Lambda_ii, Lambda the inverse of Sigma, so its target is r_i s_i
    with r_i = (Lambda_ii Sigma_ii)^(-1/2). Near-Gaussian: every |skewness| < 0.25 and every
    |excess kurtosis| < 0.35.

    Example: ``score(draws, draws, "full-rank")[1:] == (0.0, 1.0)``
    """
    sd = reference.std(0, ddof=1)
    standardised = (reference - reference.mean(0)) / sd
    skewness, kurtosis = (standardised**3).mean(0), (standardised**4).mean(0) - 3
    near_gaussian = bool((np.abs(skewness) < 0.25).all() and (np.abs(kurtosis) < 0.35).all())
    r = np.ones(len(sd))
    if guide == "mean-field":
        # In the scale-free form 1 / r_i^2 is the diagonal of the inverse correlation matrix.
        correlation = standardised.T @ standardised / (len(reference) - 1)
        r = np.linalg.inv(correlation).diagonal() ** -0.5
    mean_errors = np.abs(fitted.mean(0) - reference.mean(0)) / sd
    sd_ratios = fitted.std(0, ddof=1) / (r * sd)
    worst = np.abs(np.log(sd_ratios)).argmax()
    return Score(near_gaussian, float(mean_errors.max()), float(sd_ratios[worst]))


def read_json(path: Path) -> Any:
    """Parse the one JSON file inside a zip archive."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def read_draws(path: Path) -> Columns:
    """Read reference draws, the chains joined: column name -> array of shape (draws,)."""
    chains = read_json(path)
    return {
        name: np.concatenate([np.asarray(chain[name], dtype=float) for chain in chains])
        for name in chains[0]
    }


def run(
    folder: Path, name: str, posterior: Posterior, guide: str, seed: int
) -> tuple[Score, vi.Fit]:
    """Fit one posterior with default settings and score it."""
    dataset = name.split("-", 1)[0]
    data = posterior.prepare(read_json(folder / "data" / f"{dataset}.json.zip"))
    sites = posterior.to_sites(read_draws(folder / "draws" / f"{name}.json.zip"))
    fit = vi.fit(posterior.model, GUIDES[guide], data, seed=seed, progress=False)
    fitted = fit.joint.flatten(fit.sample(DRAWS, seed=seed)).detach().double().numpy()
    reference = (
        fit.joint.flatten({site: sites[site] for site in fit.joint.sites}).detach().double().numpy()
    )
    return score(fitted, reference, guide), fit


def load_models(path: Path) -> dict[str, Posterior]:
    """Import a Python file and return its dictionary MODELS."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: Posterior(*entry) for name, entry in module.MODELS.items()}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.posteriordb", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--folder", type=Path, help="default: $VI_BENCH_DATA/posteriordb")
    parser.add_argument(
        "--guides", default=",".join(GUIDES), help="comma-separated: " + ", ".join(GUIDES)
    )
    parser.add_argument(
        "--posteriors", nargs="+", metavar="NAME", help="default: all of the folder"
    )
    parser.add_argument(
        "--models", type=Path, metavar="FILE.py", help="a file with a dictionary MODELS to add"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean-tolerance", type=float, default=0.05, help="in reference sds")
    parser.add_argument(
        "--sd-tolerance", type=float, default=0.05, help="relative to the target sd"
    )
    options = parser.parse_args(argv)
    if options.folder is None:
        if "VI_BENCH_DATA" not in os.environ:
            parser.error(
                "give --folder, or set VI_BENCH_DATA to the folder that holds posteriordb/"
            )
        options.folder = Path(os.environ["VI_BENCH_DATA"]) / "posteriordb"
    options.guides = options.guides.split(",")
    if unknown := set(options.guides) - set(GUIDES):
        parser.error(f"unknown guide {', '.join(sorted(unknown))}: choose from {', '.join(GUIDES)}")
    available = sorted(
        path.name.removesuffix(".json.zip")
        for path in (options.folder / "draws").glob("*.json.zip")
    )
    if not available:
        parser.error(f"no draws/*.json.zip in {options.folder}")
    if missing := set(options.posteriors or []) - set(available):
        parser.error(f"{options.folder} has no draws of {', '.join(sorted(missing))}")
    options.posteriors = options.posteriors or available
    return options


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the number of fits that failed with an error."""
    options = arguments(argv)
    models = MODELS | (load_models(options.models) if options.models else {})
    known = [name for name in options.posteriors if name in models]
    counts = {(guide, near): [0, 0] for guide in options.guides for near in (True, False)}
    failed = 0
    print(row(*COLUMNS))
    for name in known:
        for guide in options.guides:
            try:
                result, fit = run(options.folder, name, models[name], guide, options.seed)
            except Exception as error:  # one bad posterior must not end the run
                failed += 1
                message = " ".join(str(error).split())
                print(row(name, guide), f"{type(error).__name__}: {message}", flush=True)
                continue
            right = result.right(options.mean_tolerance, options.sd_tolerance)
            count = counts[guide, result.near_gaussian]
            count[0], count[1] = count[0] + right, count[1] + 1
            cells = (
                *(name, guide, str(fit.joint.dim), yes(result.near_gaussian)),
                *(f"{result.mean_error:.3f}", f"{result.sd_ratio:.3f}", yes(right)),
                *(f"{fit.seconds:.1f}", yes(fit.converged), f"{fit.monte_carlo_error:.4f}"),
            )
            print(row(*cells), flush=True)
    for guide in options.guides:
        (near_right, near), (other_right, other) = counts[guide, True], counts[guide, False]
        print(
            f"right, {guide}: {near_right} of {near} near-Gaussian, {other_right} of {other} other"
        )
    if failed:
        print(f"failed with an error: {failed} of {len(known) * len(options.guides)} fits")
    if unknown := [name for name in options.posteriors if name not in models]:
        print("no Pyro model known (see --models): " + ", ".join(unknown))
    return failed


def row(*cells: str) -> str:
    """Lay out the first cells of a line of the table: names to the left, numbers to the right."""
    widths = list(COLUMNS.values())[: len(cells)]
    return " ".join(
        cell.ljust(-width) if width < 0 else cell.rjust(width)
        for cell, width in zip(cells, widths, strict=True)
    )


def yes(flag: bool) -> str:
    return "yes" if flag else "no"


if __name__ == "__main__":
    sys.exit(min(main(), 1))
