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


mean_field = AutoNormal(model, init_loc_fn=start, init_scale=0.1)
point = AutoDelta(model, init_loc_fn=start)
guide = mean_field
GUIDES = {"mean-field": mean_field, "point": point}
