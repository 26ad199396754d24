"""Reference posteriors by NUTS: of the regression, and of the mixed model.

In the mixed model NUTS samples the eleven global latents with the people's log rates integrated
out, person by person, by the trapezoidal rule; the log rates are then drawn one by one from their
conditionals given the globals. That is the same posterior as sampling all 111 latents at once, in a
tenth of the dimensions.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import vi_toolkit as vi
from vi_toolkit.programs.joint import Joint

from .data import load_data
from .model import linear_predictor, mixed, model, person_sd

MIXED_REFERENCE = Path(__file__).with_name("mixed_reference.json")

# Nodes u of log_rate = eta + sd u. The likelihood's width in u is about 1 / (sd sqrt(y)): 0.16 for
# the largest count of the sample, 29. There the trapezoidal rule with step h = 0.1 is off by a
# factor of 2 exp(-2 pi^2 (width / h)^2), below 1e-20 (Trefethen and Weideman, 2014).
_NODES = torch.arange(-7.0, 7.05, 0.1, dtype=torch.float64)
_LOG_WEIGHTS = dist.Normal(0.0, 1.0).log_prob(_NODES) + np.log(0.1)


def _log_terms(eta, sd, y):
    """log of weight x likelihood at every node: (people, nodes). eta, y: (people,); sd: ()."""
    log_rate = eta[:, None] + sd * _NODES
    poisson = y[:, None] * log_rate - log_rate.exp() - torch.lgamma(y + 1)[:, None]
    return poisson + _LOG_WEIGHTS


def marginal(X, y):
    """`mixed` with the log rates integrated out. A Pyro model of intercept, coefficients and sd."""
    eta, sd = linear_predictor(X), person_sd(X)
    pyro.factor("y", _log_terms(eta, sd, y).logsumexp(1).sum())


def log_rates(draws, X, y, seed=0):
    """A draw of log_rate given each draw of the globals: (draws, people).

    By inverting the distribution function on the nodes, linearly between them.
    """
    generator = torch.Generator().manual_seed(seed)
    eta = draws["intercept"][:, None] + draws["coefficients"] @ X.T
    out = torch.empty_like(eta)
    for i, sd in enumerate(draws["sd"]):
        cumulative = _log_terms(eta[i], sd, y).softmax(1).cumsum(1)
        u = torch.rand(len(y), 1, generator=generator, dtype=torch.float64)
        above = torch.searchsorted(cumulative, u).clamp(1, len(_NODES) - 1)
        low, high = cumulative.gather(1, above - 1), cumulative.gather(1, above)
        # The mass between two nodes belongs half to each: node k's own interval is centred on it.
        fraction = ((u - low) / (high - low).clamp_min(1e-300)).clamp(0, 1) - 0.5
        node = _NODES[above] + 0.1 * fraction
        out[i] = eta[i] + sd * node[:, 0]
    return out


def _chains(form, data, chains, num_draws, warmup, seed, progress):
    """Draws by Pyro's NUTS, {site: (chains, num_draws, ...)}, and a record of how they were made.

    full_mass, since coefficients of related predictors are correlated; jit_compile, since running
    the model's Python at every step would take most of the time.
    """
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(chains)]
    collected, divergences = [], 0
    with torch.random.fork_rng(devices=[]):
        for chain_seed in seeds:
            torch.manual_seed(chain_seed)
            kernel = NUTS(form, full_mass=True, jit_compile=True, ignore_jit_warnings=True)
            sampler = MCMC(kernel, num_draws, warmup, disable_progbar=not progress)
            sampler.run(**data)
            collected.append(sampler.get_samples())
            divergences += len(sampler.diagnostics()["divergences"]["chain 0"])
    made = {
        "method": "NUTS, Pyro's",
        "chains": chains,
        "num_draws": num_draws,
        "warmup": warmup,
        "chain_seeds": seeds,
        "full_mass": True,
        "divergences": divergences,
        "versions": {name: version(name) for name in ("pyro-ppl", "torch", "arviz", "numpy")},
    }
    return {name: torch.stack([c[name] for c in collected]) for name in collected[0]}, made


def reference(chains=4, num_draws=1000, warmup=300, seed=0, progress=True):
    """vi.Reference of `model` on all people; what `python -m recipes reference` writes to disk."""
    data = load_data()
    by_chain, made = _chains(model, data, chains, num_draws, warmup, seed, progress)
    made["command"] = "python -m recipes reference poisson_glm"
    return vi.Reference.from_draws(Joint(model, data), by_chain, made)


def mixed_reference(chains=4, num_draws=1500, warmup=400, seed=0, progress=True):
    """vi.Reference of `mixed` on the sample; what `python -m recipes.poisson_glm.mcmc` writes."""
    data = load_data("sample")
    by_chain, made = _chains(marginal, data, chains, num_draws, warmup, seed, progress)
    flat = {name: value.flatten(0, 1) for name, value in by_chain.items()}
    by_chain["log_rate"] = log_rates(flat, **data, seed=seed).unflatten(0, (chains, num_draws))
    made["method"] += ", of the globals with the log rates integrated out; these drawn given those"
    made["command"] = "python -m recipes.poisson_glm.mcmc"
    return vi.Reference.from_draws(Joint(mixed, data), by_chain, made)


if __name__ == "__main__":
    mixed_reference().save(MIXED_REFERENCE)
