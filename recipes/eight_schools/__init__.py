"""Eight schools, centred and non-centred: the hierarchical model that mean field gets wrong.

    mu ~ Normal(0, 5),   tau ~ HalfCauchy(5)
    theta_j | mu, tau ~ Normal(mu, tau)            centred; or non-centred:
    theta_j = mu + tau z_j,   z_j ~ Normal(0, 1)
    y_j | theta_j ~ Normal(theta_j, sigma_j)       for eight schools, sigma_j known

Both forms are the same model of y; as posteriors to approximate they are not alike. exact.py
integrates the posterior exactly (given tau everything is Normal). The data are the coaching
experiments of Rubin, "Estimation in Parallel Randomized Experiments", 1981.

>>> import vi_toolkit as vi
>>> from recipes.eight_schools import guide, load_data, model, reference
>>> fit = vi.fit(model, guide, load_data(), progress=False)
>>> comparison = vi.compare(fit, reference())
>>> comparison.verdict
'trust'
"""

from .data import coords, load_data, simulate
from .exact import reference
from .guide import CENTRED_GUIDES, GUIDES, conditional, full_rank, guide, mean_field
from .model import CENTRED_LATENTS, LATENTS, centred, model

__all__ = [
    "CENTRED_GUIDES",
    "CENTRED_LATENTS",
    "GUIDES",
    "LATENTS",
    "centred",
    "conditional",
    "coords",
    "full_rank",
    "guide",
    "load_data",
    "mean_field",
    "model",
    "reference",
    "simulate",
]
