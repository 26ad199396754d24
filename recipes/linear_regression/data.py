"""The diabetes data of Efron, Hastie, Johnstone and Tibshirani (2004), from scikit-learn.

442 patients: age, sex, body mass index, blood pressure and six blood serum measurements at the
start; the target is a measure of disease progression one year later.
"""

import numpy as np
import pyro.poutine as poutine
import torch
from sklearn.datasets import load_diabetes

from .model import model

PREDICTORS = [
    "intercept",
    "age",
    "sex",
    "bmi",
    "blood pressure",
    "total cholesterol",
    "ldl",
    "hdl",
    "total/hdl",
    "log triglycerides",
    "glucose",
]
HELD_OUT = 100


def _rows():
    """Indices of the training and the test patients: a fixed random split, 342 and 100."""
    order = np.random.default_rng(0).permutation(442)
    return {
        "all": np.arange(442),
        "train": np.sort(order[HELD_OUT:]),
        "test": np.sort(order[:HELD_OUT]),
    }


def _raw():
    # scaled=False: the measurements in their own units. The default is already centred and scaled
    # with all 442 rows, the held-out ones included.
    return load_diabetes(return_X_y=True, scaled=False)


def load_data(split="all"):
    """The model's arguments, in float64: {"X": (n, 11), "y": (n,)}.

    split: "all" (n = 442), "train" (342) or "test" (100). Steps:
    1. each of the ten predictors minus its mean, over its sd (sex, coded 1 and 2, too);
    2. the same for the target, so that the priors are on a scale of one;
    3. a first column of ones, for the intercept.
    All means and sds are those of the 342 training rows, in every split, so nothing of the test
    rows enters a fit and scores on different splits are on one scale (see target_scale).

    >>> {name: tuple(value.shape) for name, value in load_data("test").items()}
    {'X': (100, 11), 'y': (100,)}
    """
    rows = _rows()
    if split not in rows:
        raise ValueError(f"split must be one of {', '.join(rows)}; got {split!r}")
    X, y = _raw()
    train = rows["train"]
    X = (X - X[train].mean(0)) / X[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    X = np.column_stack([np.ones(len(X)), X])[rows[split]]
    return {"X": torch.tensor(X), "y": torch.tensor(y[rows[split]])}


def target_scale():
    """(mean, sd) of the target in its own units: progression = mean + sd * y."""
    y = _raw()[1][_rows()["train"]]
    return float(y.mean()), float(y.std())


def coords():
    """Labels of the named dims: {"predictors": [...]}."""
    return {"predictors": PREDICTORS}


def simulate(seed, observations=200, predictors=5):
    """Data drawn from the model: ({"X", "y"}, truth), truth being {"variance", "coefficients"}.

    X: (observations, predictors), a column of ones and standard-normal predictors; float64.

    >>> data, truth = simulate(0, observations=30, predictors=3)
    >>> data["X"].shape, truth["coefficients"].shape
    (torch.Size([30, 3]), torch.Size([3]))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        X = torch.randn(observations, predictors, dtype=torch.float64)
        X[:, 0] = 1.0
        nodes = poutine.trace(model).get_trace(X).nodes
    truth = {name: nodes[name]["value"] for name in ("variance", "coefficients")}
    return {"X": X, "y": nodes["y"]["value"]}, truth
