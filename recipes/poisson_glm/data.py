"""Visits to a doctor in the RAND Health Insurance Experiment, from statsmodels (public domain).

20,190 person-years of families that were randomly given insurance plans with different
coinsurance, 1974 to 1982 (Manning et al., "Health Insurance and the Demand for Medical Care",
1987). The target is the number of outpatient visits in the year. statsmodels carries the subset of
Cameron and Trivedi, Microeconometrics, 2005, without identifiers, so that the years of one person
cannot be told apart: every row is treated as a person.
"""

import numpy as np
import pyro.poutine as poutine
import torch
from statsmodels.datasets import randhie

from .model import mixed, model

PREDICTORS = {
    "lncoins": "log coinsurance",
    "idp": "individual deductible",
    "lpi": "log incentive payment",
    "fmde": "log max. expenditure",
    "physlm": "physical limitation",
    "disea": "chronic diseases",
    "hlthg": "health good",
    "hlthf": "health fair",
    "hlthp": "health poor",
}
SAMPLE = 100  # rows of the mixed model


def load_data(split="cells"):
    """A form's arguments, in float64. Predictors are centred and scaled with the mean and sd of all
    20,190 rows in every split; health "excellent" is what good, fair and poor are compared with.

    - "cells", the default, for `model`: rows with the same predictors made one. X: (2760, 9), y:
      (2760,) their visits in total, exposure: (2760,) how many they are. A sum of independent
      Poissons is Poisson, so this loses nothing that the model could use.
    - "all", for `model` too: X: (20190, 9), y: (20190,).
    - "sample", for `mixed`, with a latent for each row: X: (100, 9), y: (100,), 100 rows chosen
      at random once.

    >>> {name: tuple(value.shape) for name, value in load_data().items()}
    {'X': (2760, 9), 'y': (2760,), 'exposure': (2760,)}
    """
    table = randhie.load_pandas().data
    X = table[list(PREDICTORS)].to_numpy(dtype=np.float64)
    X = (X - X.mean(0)) / X.std(0)
    y = table["mdvis"].to_numpy(dtype=np.float64)
    if split == "cells":
        X, cell, count = np.unique(X, axis=0, return_inverse=True, return_counts=True)
        total = np.bincount(cell.ravel(), y)
        return {
            "X": torch.tensor(X),
            "y": torch.tensor(total),
            "exposure": torch.tensor(count, dtype=torch.float64),
        }
    if split == "sample":
        rows = np.sort(np.random.default_rng(0).choice(len(y), SAMPLE, replace=False))
        X, y = X[rows], y[rows]
    elif split != "all":
        raise ValueError(f"split must be one of cells, all, sample; got {split!r}")
    return {"X": torch.tensor(X), "y": torch.tensor(y)}


def coords():
    """Labels of the named dims: {"predictors": ["log coinsurance", ...]}."""
    return {"predictors": list(PREDICTORS.values())}


def simulate(seed, observations=300, predictors=3, form=model):
    """Data drawn from `model` or `mixed`: (arguments of the form, truth with the form's latents).

    X: (observations, predictors), independent standard Normal; float64. The coefficients are a
    quarter of a draw of their prior, whose own draws give some people millions of visits.

    >>> data, truth = simulate(0, observations=30, predictors=2)
    >>> data["X"].shape, truth["coefficients"].shape
    (torch.Size([30, 2]), torch.Size([2]))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = {"X": torch.randn(observations, predictors, dtype=torch.float64)}
        truth = {
            "intercept": 0.5 + 0.25 * torch.randn((), dtype=torch.float64),
            "coefficients": 0.25 * torch.randn(predictors, dtype=torch.float64),
        }
        if form is mixed:
            truth["sd"] = 0.5 + torch.rand((), dtype=torch.float64)
        else:
            data["exposure"] = torch.randint(1, 6, (observations,)).double()
        nodes = poutine.trace(poutine.condition(form, truth)).get_trace(**data).nodes
    if form is mixed:
        truth["log_rate"] = nodes["log_rate"]["value"]
    return data | {"y": nodes["y"]["value"]}, truth
