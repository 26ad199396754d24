"""Voters of 1996 from the American National Election Studies, with statsmodels (public domain).

944 respondents of the 1996 study who said whom they would vote for, Clinton or Dole. Predictors are
age, the size of their town, and how often they watch the news; groups are party identification in
seven steps, education in seven and household income in twenty-four.
"""

import numpy as np
import pyro.poutine as poutine
import torch
from sklearn.model_selection import train_test_split
from statsmodels.datasets import anes96

from .model import LEVELS, model

PREDICTORS = ["age", "logpopul", "TVnews"]
PARTIES = [
    "strong Democrat",
    "weak Democrat",
    "leaning Democrat",
    "independent",
    "leaning Republican",
    "weak Republican",
    "strong Republican",
]
SCHOOLING = [
    "8 grades",
    "some high school",
    "high school",
    "some college",
    "college degree",
    "master's",
    "PhD",
]


def load_data(split="train"):
    """The model's arguments: {"X": (n, 3), "y": (n,)} in float64, and "party", "education" and
    "income": (n,), group numbers from 0.

    split: "train" (n = 708, the default), "test" (236) or "all" (944); the quarter held out is
    chosen at random once, stratified by the vote. y is 1 for Dole. X is centred and scaled by the
    training mean and sd in every split. Groups without a training row keep their number.

    >>> {name: tuple(value.shape) for name, value in load_data("test").items()}
    {'X': (236, 3), 'party': (236,), 'education': (236,), 'income': (236,), 'y': (236,)}
    """
    table = anes96.load_pandas().data
    everything = np.arange(len(table))
    train, test = train_test_split(
        everything, test_size=0.25, stratify=table["vote"], random_state=0
    )
    rows = {"all": everything, "train": np.sort(train), "test": np.sort(test)}
    if split not in rows:
        raise ValueError(f"split must be one of {', '.join(rows)}; got {split!r}")
    X = table[PREDICTORS].to_numpy(dtype=np.float64)
    X = (X - X[train].mean(0)) / X[train].std(0)
    groups = {
        "party": table["PID"],
        "education": table["educ"] - 1,
        "income": table["income"] - 1,
    }
    chosen = rows[split]
    data = {"X": torch.tensor(X[chosen])}
    data |= {k: torch.tensor(v.to_numpy(dtype=np.int64)[chosen]) for k, v in groups.items()}
    return data | {"y": torch.tensor(table["vote"].to_numpy(dtype=np.float64)[chosen])}


def coords():
    """Labels of the named dims. Income has the survey's numbers, 1 (under $3,000) to 24."""
    return {
        "predictors": ["age", "log town size", "TV news"],
        "party": PARTIES,
        "education": SCHOOLING,
        "income": [str(i + 1) for i in range(LEVELS["income"])],
    }


def simulate(seed, observations=600, predictors=3):
    """Data drawn from the model: (its arguments, truth with all its latents).

    X: (observations, predictors), independent standard Normal; groups drawn uniformly; float64.

    >>> data, truth = simulate(0, observations=30)
    >>> data["X"].shape, truth["party_effect"].shape
    (torch.Size([30, 3]), torch.Size([7]))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = {"X": torch.randn(observations, predictors, dtype=torch.float64)}
        data |= {name: torch.randint(size, (observations,)) for name, size in LEVELS.items()}
        nodes = poutine.trace(model).get_trace(**data).nodes
    truth = {
        name: node["value"]
        for name, node in nodes.items()
        if node["type"] == "sample" and name not in (*LEVELS, "voters", "y")
    }
    return data | {"y": nodes["y"]["value"]}, truth
