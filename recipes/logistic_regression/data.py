"""The Wisconsin diagnostic breast-cancer data of Street, Wolberg and Mangasarian (1993), from
scikit-learn.

569 fine-needle aspirates of breast masses. Ten properties of the cell nuclei in each image (radius,
texture, perimeter, ...), each as the mean, the standard error and the "worst" (mean of the three
largest) over the nuclei, make 30 predictors. The target is the diagnosis.
"""

import numpy as np
import pyro.poutine as poutine
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

from .model import model


def _rows(target):
    """Row numbers of the splits: a fixed random quarter, stratified by diagnosis, is held out."""
    everything = np.arange(len(target))
    train, test = train_test_split(everything, test_size=0.25, stratify=target, random_state=0)
    return {"all": everything, "train": np.sort(train), "test": np.sort(test)}


def load_data(split="train"):
    """The model's arguments, in float64: {"X": (n, 30), "y": (n,)}.

    split: "train" (n = 426, the default), "test" (143) or "all" (569). y is 1 for malignant (37% in
    every split) and 0 for benign; scikit-learn codes it the other way round. Each predictor is
    centred and scaled with the mean and sd of the 426 training rows, in every split.

    The default, and the reference posterior, is the training split, so that held-out scores of a
    fit to `load_data()` are honest.

    >>> {name: tuple(value.shape) for name, value in load_data("test").items()}
    {'X': (143, 30), 'y': (143,)}
    """
    bunch = load_breast_cancer()
    rows = _rows(bunch.target)
    if split not in rows:
        raise ValueError(f"split must be one of {', '.join(rows)}; got {split!r}")
    train = bunch.data[rows["train"]]
    X = (bunch.data - train.mean(0)) / train.std(0)
    malignant = 1.0 - bunch.target
    return {"X": torch.tensor(X[rows[split]]), "y": torch.tensor(malignant[rows[split]])}


def coords():
    """Labels of the named dims: {"predictors": ["mean radius", ...]}."""
    return {"predictors": [str(name) for name in load_breast_cancer().feature_names]}


def simulate(seed, observations=400, predictors=5):
    """Data drawn from the model: ({"X", "y"}, truth), truth being {"intercept", "coefficients"}.

    X: (observations, predictors), independent standard Normal; float64.

    >>> data, truth = simulate(0, observations=30, predictors=3)
    >>> data["X"].shape, truth["coefficients"].shape
    (torch.Size([30, 3]), torch.Size([3]))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        X = torch.randn(observations, predictors, dtype=torch.float64)
        nodes = poutine.trace(model).get_trace(X).nodes
    truth = {name: nodes[name]["value"] for name in ("intercept", "coefficients")}
    return {"X": X, "y": nodes["y"]["value"]}, truth
