"""The reference posterior by NUTS, and what it predicts for the held-out patients."""

import vi_toolkit as vi
from vi_toolkit.programs.joint import Joint
from vi_toolkit.reference import nuts_draws

from .data import load_data
from .evaluate import predictive_logits
from .model import model


def reference(chains=4, num_draws=4000, warmup=1000, seed=0, progress=True):
    """vi.Reference of the training split; what `python -m recipes reference` writes to disk.

    The predictions for the 143 test patients are kept beside the moments, in
    `made["test_predictive_logits"]`: the held-out score of NUTS needs the draws themselves, which
    are not stored. full_mass, since the posterior is strongly correlated.
    """
    data = {k: v.double() for k, v in load_data().items()}
    by_chain, made = nuts_draws(
        model, data, chains, num_draws, warmup, seed, progress, full_mass=True
    )
    logits = predictive_logits(
        {name: value.flatten(0, 1) for name, value in by_chain.items()}, load_data("test")["X"]
    )
    made |= {
        "test_predictive_logits": [float(f"{x:.6g}") for x in logits],
        "command": "python -m recipes reference logistic_regression",
    }
    return vi.Reference.from_draws(Joint(model, data), by_chain, made)
