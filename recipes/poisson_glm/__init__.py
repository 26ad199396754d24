"""Poisson regression and the Poisson mixed model: visits to a doctor, and what mean field loses.

    intercept ~ Normal(0, 2.5),   coefficients ~ Normal(0, 1)
    y | intercept, coefficients ~ Poisson(exp(intercept + X coefficients))

and, since people with the same predictors differ, `mixed`:

    sd ~ HalfNormal(1),   log_rate_n ~ Normal(intercept + X_n coefficients, sd)
    y_n | log_rate_n ~ Poisson(exp(log_rate_n))

The mixed model is the example with which Giordano, Broderick and Jordan, "Linear Response Methods
for Accurate Covariance Estimates from Mean Field Variational Bayes", 2015, show that the sds mean
field gets wrong can be had from the same fit. optimum.py has the best Gaussians in closed form. The
data are the RAND Health Insurance Experiment, 20,190 person-years.

>>> import vi_toolkit as vi
>>> from recipes.poisson_glm import coords, guide, load_data, model
>>> fit = vi.fit(model, guide, load_data(), progress=False)
>>> i = coords()["predictors"].index("chronic diseases")
>>> bool((fit.sample(1000)["coefficients"][:, i] > 0.2).all())
True
"""

from .data import coords, load_data, simulate
from .guide import GUIDES, full_rank, guide, mean_field, mixed_mean_field
from .mcmc import MIXED_REFERENCE, mixed_reference, reference
from .model import LATENTS, MIXED_LATENTS, mixed, model

__all__ = [
    "GUIDES",
    "LATENTS",
    "MIXED_LATENTS",
    "MIXED_REFERENCE",
    "coords",
    "full_rank",
    "guide",
    "load_data",
    "mean_field",
    "mixed",
    "mixed_mean_field",
    "mixed_reference",
    "model",
    "reference",
    "simulate",
]
