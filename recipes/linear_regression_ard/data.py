"""The diabetes data of Efron, Hastie, Johnstone and Tibshirani (2004) with 64 predictors, from
scikit-learn, and simulated data as in Kucukelbir et al. (2017).

The 64 are those of section 4 of "Least Angle Regression": the ten measurements of 442 patients, 9
squares (sex has none) and 45 products. Most of them are surely useless; which ones is the question.
"""

import itertools

import numpy as np
import pyro.poutine as poutine
import torch
from sklearn.datasets import load_diabetes

from .model import model

MEASUREMENTS = ["age", "sex", "bmi", "bp", "tc", "ldl", "hdl", "tch", "ltg", "glu"]
HELD_OUT = 100


def load_data(split="train"):
    """The model's arguments, in float64: {"X": (n, 64), "y": (n,)}.

    split: "train" (n = 342, the default), "test" (100) or "all" (442). The split and the target's
    scale are those of linear_regression: predictors and target are centred and scaled by the
    training rows' means and sds, in every split; squares and products are of the standardised
    measurements, and standardised again. Both being centred, no intercept is needed.

    >>> {name: tuple(value.shape) for name, value in load_data("test").items()}
    {'X': (100, 64), 'y': (100,)}
    """
    order = np.random.default_rng(0).permutation(442)
    rows = {
        "all": np.arange(442),
        "train": np.sort(order[HELD_OUT:]),
        "test": np.sort(order[:HELD_OUT]),
    }
    if split not in rows:
        raise ValueError(f"split must be one of {', '.join(rows)}; got {split!r}")
    X, y = load_diabetes(return_X_y=True, scaled=False)
    train = rows["train"]

    def standardised(columns):
        return (columns - columns[train].mean(0)) / columns[train].std(0)

    X = standardised(X)
    X = standardised(np.column_stack([X] + [X[:, i] * X[:, j] for i, j in _pairs()]))
    return {"X": torch.tensor(X[rows[split]]), "y": torch.tensor(standardised(y)[rows[split]])}


def _pairs():
    sex = MEASUREMENTS.index("sex")
    pairs = itertools.combinations_with_replacement(range(len(MEASUREMENTS)), 2)
    return [pair for pair in pairs if pair != (sex, sex)]


def coords():
    """Labels of the named dims: {"predictors": ["age", ..., "age^2", "age:sex", ...]}."""
    names = [
        f"{MEASUREMENTS[i]}^2" if i == j else f"{MEASUREMENTS[i]}:{MEASUREMENTS[j]}"
        for i, j in _pairs()
    ]
    return {"predictors": MEASUREMENTS + names}


def simulate(seed, observations=10_000, predictors=250, null=0.5, variance=1.0):
    """Data from the model in which a share `null` of the coefficients is zero.

    The example of Kucukelbir et al., section 5.1: 250 regressors, half of them without predictive
    power. X: (observations, predictors), independent standard Normal; float64. Returns ({"X", "y"},
    truth), truth being variance, relevance and coefficients; where the coefficient is zero the
    relevance is infinite.

    >>> data, truth = simulate(0, observations=30, predictors=4)
    >>> data["X"].shape, int((truth["coefficients"] == 0).sum())
    (torch.Size([30, 4]), 2)
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        X = torch.randn(observations, predictors, dtype=torch.float64)
        fixed = poutine.condition(model, {"variance": X.new_tensor(variance)})
        prior = poutine.trace(fixed).get_trace(X[:1]).nodes
        relevant = torch.randperm(predictors) >= round(null * predictors)
        truth = {
            "variance": X.new_tensor(variance),
            "relevance": prior["relevance"]["value"].where(relevant, torch.inf),
            "coefficients": prior["coefficients"]["value"] * relevant,
        }
        y = X @ truth["coefficients"] + variance**0.5 * torch.randn(observations).double()
    return {"X": X, "y": y}, truth


def compress(X, y):
    """The model's arguments for rotated data of at most as many rows as columns; same posterior.

    With X = Q R and Q orthonormal, y is Q'y, (d,), in the columns' space, and a rest outside of it:
    |y - X w|^2 = |Q'y - R w|^2 + rest, in n - d further dimensions. So the likelihood of 10,000
    rows costs as much as that of 250, and differs by a constant factor.

    >>> data = simulate(0, observations=1_000, predictors=4)[0]
    >>> {name: getattr(value, "shape", value) for name, value in compress(**data).items()}
    {'X': torch.Size([4, 4]), 'y': torch.Size([4]), 'rest': torch.Size([]), 'rest_count': 996}
    """
    Q, R = torch.linalg.qr(X)
    inside = Q.T @ y
    rest = (y - Q @ inside).square().sum()
    return {"X": R, "y": inside, "rest": rest, "rest_count": len(X) - X.shape[1]}
