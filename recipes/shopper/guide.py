"""Mean-field guides for Shopper."""

import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_median

from .model import model

EMBEDDINGS = ("attributes", "interaction", "preference", "season_effect", "season")


def start(site):
    """Where a guide's means start: embeddings small and random, everything else at its median.

    (With all embeddings at zero, all their gradients are zero: the derivative of a product is the
    other factor.)
    """
    shape = site["fn"].shape()
    if site["name"] in EMBEDDINGS:
        return 0.1 * torch.randn(shape)
    return init_to_median(site, num_samples=50)


# Recommended. 270,000 latents leave no room for correlations, and predictions average out most of
# the errors of mean field. The positive latents (price terms and rates of habits) are LogNormal
# here: reparameterised by one multiplication, where the Gammas of the paper's guide need implicit
# gradients. At a shape of ten or more, the two distributions are nearly the same. Against NUTS,
# without embeddings, the means are right and the sds are 0.26 to 0.87 of the true ones. With few
# enough latents, vi.linear_response(fit) corrects the sds.
mean_field = AutoNormal(model, init_loc_fn=start, init_scale=0.1)

# The baseline: the posterior's mode on the model's own scale.
point = AutoDelta(model, init_loc_fn=start)

guide = mean_field
GUIDES = {"mean-field": mean_field, "point": point}
