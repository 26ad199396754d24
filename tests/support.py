"""Helpers that several tests share: short ways to fit, a stand-in for a fit, and checks."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch

import vi_toolkit as vi
from tests.models import standard
from vi_toolkit.reference.reference import Reference


def quietly(*args, **kwargs):
    """A fit that may end without having converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vi.ConvergenceWarning)
        return vi.fit(*args, progress=False, **kwargs)


def moments(fit):
    """Mean and sd under the guide, from its parameters' own draws: (mean, sd, n)."""
    n = 40_000
    u = fit.joint.flatten(fit.sample(n)).double()
    return u.mean(0), u.std(0), n


def fitted(model, guide, data=None, **options):
    return vi.fit(model, guide, {} if data is None else data, progress=False, **options)


def shifted_fit(shift, scale):
    """A fit whose guide is N(shift, scale^2) and whose posterior is N(0, 1)."""

    def guide():
        nothing = pyro.param("nothing", torch.tensor(0.0).double())
        pyro.sample("z", dist.Normal(shift + 0 * nothing, torch.tensor(scale).double()))

    return fitted(standard, guide, steps=1)


# A Gaussian posterior with correlations and with scales far apart.
NAMES = ["a", "b", "log(c)"]
MEAN = np.array([1.0, -200.0, 0.01])
CORRELATION = np.array([[1.0, 0.8, 0.3], [0.8, 1.0, 0.1], [0.3, 0.1, 1.0]])
SD = np.array([2.0, 50.0, 1e-3])
COVARIANCE = CORRELATION * np.outer(SD, SD)
MEAN_FIELD = np.diag(1 / np.linalg.inv(COVARIANCE).diagonal())  # what theory gives
EXACT = Reference.exact(NAMES, MEAN, COVARIANCE)


def gaussian_fit(mean=MEAN, covariance=COVARIANCE, family="full-rank", names=NAMES, **more):
    """As much of a fit as compare uses, with a Gaussian for its guide."""
    root = np.linalg.cholesky(covariance)

    def sample(num_draws, seed=None):
        noise = np.random.default_rng(seed).standard_normal((num_draws, len(names)))
        return {"z": torch.from_numpy(mean + noise @ root.T)}

    joint = SimpleNamespace(names=list(names), flatten=lambda draws: draws["z"])
    optimum = {"converged": True, "convergence": ""} | more
    return SimpleNamespace(joint=joint, sample=sample, guide_family=family, **optimum)


def check_latents(model, latents, data, labels):
    """Sites, shapes and plates are as `latents` says; no site is inside a plate not named there."""
    trace = poutine.trace(model).get_trace(**data)
    sites = {
        name: trace.nodes[name]
        for name in trace.stochastic_nodes
        if not isinstance(trace.nodes[name]["fn"], poutine.subsample_messenger._Subsample)
    }
    assert set(sites) == set(latents)
    for name, node in sites.items():
        dims, plates = latents[name], sorted(node["cond_indep_stack"], key=lambda f: f.dim)
        for plate in plates:
            assert plate.name in dims, f"{name} is sampled inside plate '{plate.name}'"
        shape = [plate.size for plate in plates] + list(node["fn"].event_shape)
        assert math.prod(shape) == node["value"].numel(), (
            f"{name} has a batch dimension that no plate accounts for"
        )
        assert len(dims) == len(shape), f"LATENTS gives {name} {dims}, its shape is {shape}"
        for position, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            if isinstance(dim, int):
                assert size == dim, f"LATENTS gives {name} {dims}, its shape is {shape}"
            elif position < len(plates):
                assert dim == plates[position].name
            else:
                assert dim in labels, f"coords() does not label '{dim}'"
            assert dim not in labels or len(labels[dim]) == size, f"not one label per {dim}"


def log_likelihood(model, site, latents, data):
    """log p(site | latents), in the batch shape of the site."""
    node = poutine.trace(poutine.condition(model, data=latents)).get_trace(**data).nodes[site]
    return node["fn"].log_prob(node["value"])
