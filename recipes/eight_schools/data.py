"""The eight coaching experiments of Rubin, "Estimation in Parallel Randomized Experiments", 1981.

In each of eight high schools a randomised experiment estimated by how many points a short coaching
programme raises the SAT-V score. The estimates are regression coefficients from some 60 pupils
each, so their standard errors are treated as known. The sixteen numbers are in the paper's table 1;
Gelman et al., Bayesian Data Analysis, section 5.5, made them famous.
"""

import pyro.poutine as poutine
import torch

from .model import centred, model

SCHOOLS = ["A", "B", "C", "D", "E", "F", "G", "H"]
EFFECT = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
STANDARD_ERROR = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def load_data():
    """The model's arguments, in float64, in SAT-V points: {"sigma": (8,), "y": (8,)}.

    >>> {name: tuple(value.shape) for name, value in load_data().items()}
    {'sigma': (8,), 'y': (8,)}
    """
    return {
        "sigma": torch.tensor(STANDARD_ERROR, dtype=torch.float64),
        "y": torch.tensor(EFFECT, dtype=torch.float64),
    }


def coords():
    """Labels of the named dims: {"schools": ["A", ...]}."""
    return {"schools": SCHOOLS}


def simulate(seed, form=model):
    """Data drawn from the model at the eight standard errors: ({"sigma", "y"}, truth).

    form: `model` or `centred`; truth has its latents, and with either form mu, tau and theta.

    >>> data, truth = simulate(0)
    >>> data["y"].shape, sorted(truth)
    (torch.Size([8]), ['mu', 'tau', 'theta', 'z'])
    """
    assert form in (model, centred)
    sigma = load_data()["sigma"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nodes = poutine.trace(form).get_trace(sigma).nodes
    truth = {n: nodes[n]["value"] for n in ("mu", "tau", "z", "theta") if n in nodes}
    if form is model:
        truth["theta"] = truth["mu"] + truth["tau"] * truth["z"]
    return {"sigma": sigma, "y": nodes["y"]["value"]}, truth
