"""Runs a block in isolation: with its own parameter store, random state and default dtype.

Pyro's parameters, torch's random generators and torch's default dtype belong to the whole process.
A fit changes them while it runs and then puts them back as they were, even after an error.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pyro
import torch
from pyro.params.param_store import ParamStoreDict

from vi_toolkit.pyro_private import global_store_as

# Pyro's handler stack belongs to the whole process as well, so threads take turns.
_LOCK = threading.RLock()
GPU_STATE_BYTES = 16  # size of the state of a GPU's generator: seed and offset


@contextlib.contextmanager
def isolated_pyro_state(
    store: ParamStoreDict | None = None,
    rng_state: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
) -> Iterator[ParamStoreDict]:
    """Run a block with its own parameter store, random state and default dtype.

    Args:
        store: parameters to work on, updated in place; a new, empty store if None.
        rng_state: state of torch's generators to start from (:func:`random_state`); the caller's if
            None.
        dtype: default floating dtype; the caller's if None.
        validate: whether Pyro checks the arguments and samples of distributions.

    Yields:
        The store in use.
    """
    store = ParamStoreDict() if store is None else store
    with _LOCK, global_store_as(store):
        their_rng = random_state()
        their_dtype = torch.get_default_dtype()
        try:
            if rng_state is not None:
                set_random_state(rng_state)
            if dtype is not None:
                torch.set_default_dtype(dtype)
            with pyro.validation_enabled(validate):
                yield store
        finally:
            torch.set_default_dtype(their_dtype)
            set_random_state(their_rng)


def random_state() -> torch.Tensor:
    """State of torch's default generators: the CPU's and, once CUDA is in use, each GPU's."""
    return _joined([torch.get_rng_state(), *_of_gpus()])


def set_random_state(state: torch.Tensor) -> None:
    """Set a state from :func:`random_state`, perhaps of a process with more or fewer GPUs."""
    cpu, gpus = torch.get_rng_state().numel(), _of_gpus()
    if state.numel() == cpu:
        torch.set_rng_state(state)
        return
    torch.set_rng_state(state[:cpu].clone())
    for device, one in enumerate(state[cpu:].view(-1, GPU_STATE_BYTES)[: len(gpus)]):
        torch.cuda.set_rng_state(one.clone(), device)


def seeded_state(seed: int) -> torch.Tensor:
    """The state that :func:`random_state` has after ``torch.manual_seed(seed)``."""
    devices = ["cpu", *(f"cuda:{k}" for k in range(len(_of_gpus())))]
    return _joined([torch.Generator(d).manual_seed(seed).get_state() for d in devices])


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Run a block, then put the random generators back to where they were before it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _of_gpus() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _joined(states: list[torch.Tensor]) -> torch.Tensor:
    # Without a GPU this must be no operator: a step being recorded would record it too.
    return torch.cat(states) if len(states) > 1 else states[0]
