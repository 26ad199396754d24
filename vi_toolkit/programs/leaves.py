"""Unconstrained parameters as one flat vector, and back."""

from __future__ import annotations

import pyro
import torch


def unique_leaves() -> list[torch.Tensor]:
    """The unconstrained parameters in Pyro's store, each tensor once.

    Some guides register a parameter under two names.
    """
    found: dict[int, torch.Tensor] = {}
    for _, leaf in pyro.get_param_store().named_parameters():
        found.setdefault(id(leaf), leaf)
    return list(found.values())


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All entries of the tensors as one new vector, without gradient."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflat(vector: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Write a vector from :func:`flat` into the tensors, in place."""
    with torch.no_grad():
        position = 0
        for t in tensors:
            t.copy_(vector[position : position + t.numel()].reshape(t.shape))
            position += t.numel()
