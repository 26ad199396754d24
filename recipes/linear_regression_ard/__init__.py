"""Linear regression with automatic relevance determination: which of 64 predictors matter?

    variance ~ InverseGamma(1, 1),   relevance_i ~ Gamma(1, 1)
    coefficient_i | relevance_i, variance ~ Normal(0, sqrt(variance / relevance_i))
    y | coefficients, variance ~ Normal(X coefficients, sqrt(variance))

After MacKay, "Bayesian Non-Linear Modeling for the Prediction Competition", 1994; the first example
of Kucukelbir et al., "Automatic Differentiation Variational Inference", 2017, who simulated 10,000
rows with 250 predictors, half of them null (`simulate`). The real data are the diabetes study with
its 64 squares and products; 100 of 442 patients are held out.

>>> import vi_toolkit as vi
>>> from pyro.infer.autoguide import AutoMultivariateNormal
>>> from recipes.linear_regression_ard import collapsed, coords, load_data
>>> fit = vi.fit(collapsed, AutoMultivariateNormal, load_data(), progress=False)
>>> w = fit.sample(1000)["coefficients"]
>>> coords()["predictors"][int((w.mean(0) / w.std(0)).argmax())]
'bmi'
"""

from .data import compress, coords, load_data, simulate
from .guide import GUIDES, conditional, full_rank, guide, mean_field, of_collapsed
from .mcmc import draw_relevance, reference
from .model import LATENTS, collapsed, model

__all__ = [
    "GUIDES",
    "LATENTS",
    "collapsed",
    "compress",
    "conditional",
    "coords",
    "draw_relevance",
    "full_rank",
    "guide",
    "load_data",
    "mean_field",
    "model",
    "of_collapsed",
    "reference",
    "simulate",
]
