"""Checks that the tests of several recipes share."""

import math

import pyro.poutine as poutine


def check_latents(model, latents, data, labels):
    """Asserts that the model's sites have the shapes and plates of `latents`, and no others."""
    trace = poutine.trace(model).get_trace(**data)
    sites = {
        name: trace.nodes[name]
        for name in trace.stochastic_nodes
        if not isinstance(trace.nodes[name]["fn"], poutine.subsample_messenger._Subsample)
    }
    assert set(sites) == set(latents)
    for name, node in sites.items():
        dims, plates = latents[name], sorted(node["cond_indep_stack"], key=lambda f: f.dim)
        for plate in plates:
            assert plate.name in dims, f"{name} is sampled inside plate '{plate.name}'"
        shape = [plate.size for plate in plates] + list(node["fn"].event_shape)
        assert math.prod(shape) == node["value"].numel(), (
            f"{name} has a batch dimension that no plate accounts for"
        )
        assert len(dims) == len(shape), f"LATENTS gives {name} {dims}, its shape is {shape}"
        for position, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            if isinstance(dim, int):
                assert size == dim, f"LATENTS gives {name} {dims}, its shape is {shape}"
            elif position < len(plates):
                assert dim == plates[position].name
            else:
                assert dim in labels, f"coords() does not label '{dim}'"
            assert dim not in labels or len(labels[dim]) == size, f"not one label per {dim}"


def log_likelihood(model, site, latents, data):
    """log p(site | latents), in the batch shape of the site."""
    node = poutine.trace(poutine.condition(model, data=latents)).get_trace(**data).nodes[site]
    return node["fn"].log_prob(node["value"])
