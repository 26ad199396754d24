"""Deep exponential families for text: topics, topics of topics, and predictions of unseen words.

    z_L ~ Gamma,  z_l | z_(l+1) ~ Gamma(shape_l, mean z_(l+1) w_l),  x | z_1 ~ Poisson(z_1 w_0)

The model of Ranganath, Tang, Charlin and Blei, "Deep Exponential Families", AISTATS 2015, with its
other families too (binary, Poisson and Gaussian units). model.py is the page of the paper, in plain
torch. `variant` gives it for one family and some widths with a faster evaluation of the same
density; `model` is the default variant, and VARIANTS has the rows of the paper's table. The data
are paragraphs of the State of the Union addresses, 1790 to 2026. A model of words is judged by
words it has not seen: evaluate.py has the protocol. exact.py computes exact answers for small
models.

The guide reads documents by collapsed variational inference (guide.py, collapsed.py), and units
that count are fitted by differences (differences.py). The posterior has many modes, so predictions
are averaged over several starts. benchmarks/README.md compares them with latent Dirichlet
allocation.

>>> import torch, vi_toolkit as vi
>>> from recipes.deep_exponential_family import Guide, simulate, variant
>>> data, _ = simulate(0, documents=100, terms=30)
>>> fit = vi.fit(variant((5, 2)), Guide((5, 2)), data, subsample={"documents": 50}, steps=20,
...              optimizer=0.02, progress=False)
>>> fit.sample(3)["z1"].shape
torch.Size([3, 100, 5])
"""

from .data import arguments, coords, load_data, simulate
from .guide import GUIDES, Guide, guide, lognormal_factors
from .mcmc import reference, reference_problem
from .model import LATENTS
from .variants import VARIANTS, model, variant

__all__ = [
    "GUIDES",
    "LATENTS",
    "VARIANTS",
    "Guide",
    "arguments",
    "coords",
    "guide",
    "load_data",
    "lognormal_factors",
    "model",
    "reference",
    "reference_problem",
    "simulate",
    "variant",
]
