"""Bayesian linear regression with unknown noise variance: the recipe whose answer is known.

    variance ~ InverseGamma(a0, b0)
    coefficients | variance ~ Normal(0, sqrt(variance) * prior_scale)
    y | coefficients, variance ~ Normal(X coefficients, sqrt(variance))

The Normal-inverse-gamma prior is conjugate, so posterior, log evidence, and even the best
mean-field and full-rank approximations have closed forms (exact.py): whatever a fit says here can
be checked to the last digit. The data are the diabetes study of Efron, Hastie, Johnstone and
Tibshirani, "Least Angle Regression", 2004: 442 patients, ten predictors, disease progression after
one year.

>>> import vi_toolkit as vi
>>> from recipes.linear_regression import guide, load_data, model, reference
>>> fit = vi.fit(model, guide, load_data(), progress=False)
>>> comparison = vi.compare(fit, reference())
>>> comparison.verdict
'trust'
"""

from .data import PREDICTORS, coords, load_data, simulate, target_scale
from .exact import reference
from .guide import GUIDES, exact_family, full_rank, guide, mean_field
from .model import LATENTS, model

__all__ = [
    "GUIDES",
    "LATENTS",
    "PREDICTORS",
    "coords",
    "exact_family",
    "full_rank",
    "guide",
    "load_data",
    "mean_field",
    "model",
    "reference",
    "simulate",
    "target_scale",
]
