"""Bayesian logistic regression with Normal priors: is this breast mass malignant?

    intercept ~ Normal(0, 2.5),   coefficients ~ Normal(0, 1)
    y | intercept, coefficients ~ Bernoulli(logit = intercept + X coefficients)

The first model of every course whose posterior has no closed form. one_datum.py shows why with a
single datum, where quadrature knows the answer; optimum.py knows the best Gaussian for any data;
evaluate.py scores predictions. The data are the Wisconsin diagnostic breast-cancer study of Street,
Wolberg and Mangasarian, "Nuclear feature extraction for breast tumor diagnosis", 1993: 30
standardised predictors of 569 patients, of which 143 are held out.

>>> import vi_toolkit as vi
>>> from recipes.logistic_regression import coords, guide, load_data, model
>>> fit = vi.fit(model, guide, load_data(), progress=False)
>>> i = coords()["predictors"].index("worst texture")
>>> bool((fit.sample(1000)["coefficients"][:, i] > 0).double().mean() > 0.95)
True
"""

from .data import coords, load_data, simulate
from .guide import GUIDES, full_rank, guide, mean_field
from .mcmc import reference
from .model import LATENTS, model

__all__ = [
    "GUIDES",
    "LATENTS",
    "coords",
    "full_rank",
    "guide",
    "load_data",
    "mean_field",
    "model",
    "reference",
    "simulate",
]
