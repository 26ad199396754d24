"""Simulation-based calibration of 200 replications: what it finds, and what it costs.

The logistic regression recipe at its real size (426 x 30) and the eight schools. The cost is given
in seconds and as a ratio to as many calls of ``vi.fit``, of which a few are run for the estimate.

Example::

    python -m benchmarks.vsbc
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from recipes.logistic_regression import load_data
from recipes.logistic_regression import model as logistic_regression
from vi_toolkit.diagnostics.prior_predictive import PriorPredictive

SINGLE_FITS = 3
SCHOOLS = {
    "y": torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]).double(),
    "standard_error": torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]).double(),
}


def centred(y: torch.Tensor, standard_error: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, standard_error), obs=y)


def non_centred(y: torch.Tensor, standard_error: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, standard_error), obs=y)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.vsbc", description=__doc__.split("\n")[0])
    parser.add_argument("--replications", type=int, default=200)
    count = parser.parse_args(argv).replications
    warnings.simplefilter("ignore", vi.ConvergenceWarning)
    cases: list[tuple[str, Any, dict]] = [
        ("logistic regression, 426 x 30", logistic_regression, load_data()),
        ("eight schools, centred", centred, SCHOOLS),
        ("eight schools, non-centred", non_centred, SCHOOLS),
    ]
    for name, model, data in cases:
        for guide in (AutoNormal, AutoMultivariateNormal):
            wall, cpu = time.perf_counter(), time.process_time()
            found = vi.vsbc(model, guide, data, replications=count)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            simulate, single = PriorPredictive(model, data), []
            for r in range(SINGLE_FITS):
                began = time.process_time()
                vi.fit(model, guide, simulate(r)[0], progress=False)
                single.append(time.process_time() - began)
            spread = found.table["spread"]
            print(
                f"{name}, {guide.__name__}: {wall:.0f} s ({cpu:.0f} s of CPU); {count} single fits "
                f"would take {count * statistics.median(single) / cpu:.0f} times the CPU\n"
                f"  {found}\n  spread {spread.min():.2f} to {spread.max():.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
