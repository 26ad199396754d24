"""The reference posterior by NUTS, and what it predicts for the held-out patients."""

from importlib.metadata import version

import numpy as np
import torch
from pyro.infer import MCMC, NUTS

import vi_toolkit as vi
from vi_toolkit.joint import Joint

from .data import load_data
from .evaluate import predictive_logits
from .model import model


def reference(chains=4, draws=4000, warmup=1000, seed=0, progress=True):
    """vi.Reference of the training split; what `python -m recipes reference` writes to disk.

    The predictions for the 143 test patients are kept beside the moments, in
    `made["test_predictive_logits"]`: the held-out score of NUTS needs the draws themselves, which
    are not stored. full_mass, since the posterior is strongly correlated; a compiled gradient,
    since Pyro's own would take twice the time.
    """
    data = load_data()
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(chains)]
    collected, divergences = [], 0
    with torch.random.fork_rng(devices=[]):
        for chain_seed in seeds:
            torch.manual_seed(chain_seed)
            kernel = NUTS(model, full_mass=True, jit_compile=True, ignore_jit_warnings=True)
            sampler = MCMC(kernel, draws, warmup, disable_progbar=not progress)
            sampler.run(**data)
            collected.append(sampler.get_samples())
            divergences += len(sampler.diagnostics()["divergences"]["chain 0"])
    by_chain = {name: torch.stack([c[name] for c in collected]) for name in collected[0]}
    logits = predictive_logits(
        {name: value.flatten(0, 1) for name, value in by_chain.items()}, load_data("test")["X"]
    )
    made = {
        "method": "NUTS, Pyro's",
        "chains": chains,
        "draws": draws,
        "warmup": warmup,
        "chain_seeds": seeds,
        "full_mass": True,
        "divergences": divergences,
        "versions": {name: version(name) for name in ("pyro-ppl", "torch", "arviz", "numpy")},
        "test_predictive_logits": [float(f"{x:.6g}") for x in logits],
        "command": "python -m recipes reference logistic_regression",
    }
    return vi.Reference.from_draws(Joint(model, data), by_chain, "nuts", made)
