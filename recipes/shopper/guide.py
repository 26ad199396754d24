"""Mean-field guides for Shopper."""

import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_median

from .model import model


def start(site):
    """Where a guide's means start: embeddings small and random, everything else at its median.

    (At zero all embeddings' gradients are zero: a product's derivative is the other factor.)
    """
    shape = site["fn"].shape()
    if site["name"] in ("attributes", "interaction", "preference", "season_effect", "season"):
        return 0.1 * torch.randn(shape)
    return init_to_median(site, num_samples=50)


# Recommended. 270,000 latents leave no room for correlations, and predictions average most of
# what mean field gets wrong. The positive price terms (and the habits' rates) are LogNormal, which
# is what a Gaussian on their logs is: reparameterised by one multiplication, where the Gammas of
# the paper need implicit gradients; at a shape of ten or more the two can hardly be told apart.
# Against NUTS, without embeddings: the means are right, the sds 0.26 to 0.87 of what they should
# be; vi.linear_response(fit) gives the widths back where there are few enough latents for it.
mean_field = AutoNormal(model, init_loc_fn=start, init_scale=0.1)

# The baseline: the posterior's mode on the model's own scale.
point = AutoDelta(model, init_loc_fn=start)

guide = mean_field
GUIDES = {"mean-field": mean_field, "point": point}
