"""Hierarchical logistic regression: who voted for Dole, by party, education and income.

    intercept ~ Normal(0, 2.5),   coefficients ~ Normal(0, 1),   sds ~ LogNormal(0, 1)
    effect of party j ~ Normal(0, party_sd);   of education and income likewise, non-centred
    y ~ Bernoulli(logit = intercept + X coefficients + the effects of the voter's groups)

The model of polls of Gelman and Hill, Data Analysis Using Regression and Multilevel/Hierarchical
Models, 2007, chapter 14, and an example of Kucukelbir et al., "Automatic Differentiation
Variational Inference", 2017. The data are 944 voters of the American National Election Study of
1996, of which 236 are held out.

>>> import vi_toolkit as vi
>>> from recipes.hierarchical_logistic_regression import guide, load_data, model
>>> fit = vi.fit(model, guide, load_data(), progress=False)
>>> effects = fit.sample(1000)["party_effect"].mean(0)
>>> bool((effects.diff() > -0.3).all())     # from strong Democrat to strong Republican
True
"""

from .data import coords, load_data, simulate
from .guide import GUIDES, full_rank, guide, mean_field
from .mcmc import reference
from .model import LATENTS, LEVELS, model

__all__ = [
    "GUIDES",
    "LATENTS",
    "LEVELS",
    "coords",
    "full_rank",
    "guide",
    "load_data",
    "mean_field",
    "model",
    "reference",
    "simulate",
]
