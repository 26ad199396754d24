"""The reference posterior by NUTS, with the relevances integrated out and then drawn exactly."""

from importlib.metadata import version

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal

import vi_toolkit as vi
from vi_toolkit.programs.joint import Joint

from .data import load_data
from .model import C0, D0, collapsed, model


def draw_relevance(draws, seed=0):
    """A draw of relevance given each draw of coefficients and variance: shape of coefficients."""
    rate = D0 + draws["coefficients"].square() / (2 * draws["variance"][..., None])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.distributions.Gamma(C0 + 0.5, rate).sample()


def whitened_chains(joint, fit, chains, num_draws, warmup, seed, progress):
    """NUTS in coordinates whitened by a full-rank fit: draws, and a record of how they were made.

    The draws are {site: (chains, num_draws, ...)}. With u = mean + L v, mean and L L' those of the
    fit, the posterior of v is near a standard Normal, whatever the scales and correlations of u,
    and NUTS needs few steps. A linear change of variables does not change the posterior, so a poor
    fit costs time only (Hoffman et al., "NeuTra-lizing Bad Geometry", 2019, with a linear map).
    """
    u = joint.flatten(fit.sample(20_000, seed=seed)).double()
    mean, tril = u.mean(0), torch.linalg.cholesky(u.T.cov())

    def potential(v):
        return -joint.log_density(mean + tril @ v)

    compiled = torch.jit.trace(potential, torch.zeros(joint.dim).double(), check_trace=False)
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(chains)]
    collected, divergences = [], 0
    with torch.random.fork_rng(devices=[]):
        for chain_seed in seeds:
            torch.manual_seed(chain_seed)
            # Starts two sds out: over-dispersed, so that R-hat can tell.
            start = {"v": 2 * torch.randn(joint.dim, dtype=torch.float64)}
            kernel = NUTS(potential_fn=lambda z: compiled(z["v"]), target_accept_prob=0.9)
            sampler = MCMC(
                kernel, num_draws, warmup, initial_params=start, disable_progbar=not progress
            )
            sampler.run()
            collected.append(sampler.get_samples()["v"])
            divergences += len(sampler.diagnostics()["divergences"]["chain 0"])
    v = torch.stack(collected)
    made = {
        "method": "NUTS, Pyro's, in coordinates whitened by a full-rank fit",
        "chains": chains,
        "num_draws": num_draws,
        "warmup": warmup,
        "chain_seeds": seeds,
        "target_accept": 0.9,
        "divergences": divergences,
        "versions": {name: version(name) for name in ("pyro-ppl", "torch", "arviz", "numpy")},
    }
    flat = joint.unflatten((mean + v @ tril.T).flatten(0, 1))
    return {name: value.unflatten(0, (chains, num_draws)) for name, value in flat.items()}, made


def reference(chains=4, num_draws=1500, warmup=300, seed=0, progress=True):
    """vi.Reference of the training split; what `python -m recipes reference` writes to disk."""
    data = load_data()
    fit = vi.fit(collapsed, AutoMultivariateNormal, data, seed=seed, progress=progress)
    by_chain, made = whitened_chains(
        Joint(collapsed, data), fit, chains, num_draws, warmup, seed, progress
    )
    by_chain["relevance"] = draw_relevance(by_chain, seed)
    made["method"] += ", the relevances integrated out; these drawn given the others"
    made["command"] = "python -m recipes reference linear_regression_ard"
    return vi.Reference.from_draws(Joint(model, data), by_chain, made)
