"""A room of its own for a fit: parameter store, random state, default dtype.

Pyro keeps parameters, and torch its generator and default dtype, in process-wide places. A fit
borrows them for as long as it runs and puts them back as they were, whatever happens.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pyro
import torch
from pyro.params.param_store import ParamStoreDict

# Pyro's handler stack is process-wide as well, so two fits in two threads take turns.
_LOCK = threading.RLock()
GPU_STATE_BYTES = 16  # bytes of the state of a GPU's generator: seed and offset


@contextlib.contextmanager
def isolated_pyro_state(
    store: ParamStoreDict | None = None,
    rng_state: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
) -> Iterator[ParamStoreDict]:
    """Run a block with its own parameter store, random state and default dtype.

    Args:
        store: parameters to work on; they are updated in place. A fresh store if None.
        rng_state: state of torch's generators to start from (:func:`random_state`); the caller's if
            None.
        dtype: default floating dtype; the caller's if None.
        validate: whether Pyro checks the arguments and samples of distributions.

    Yields:
        The store in use.
    """
    store = ParamStoreDict() if store is None else store
    with _LOCK:
        live = pyro.get_param_store()
        theirs = (live._params, live._param_to_name, live._constraints)
        their_rng = random_state()
        their_dtype = torch.get_default_dtype()
        live._params = store._params
        live._param_to_name = store._param_to_name
        live._constraints = store._constraints
        try:
            if rng_state is not None:
                set_random_state(rng_state)
            if dtype is not None:
                torch.set_default_dtype(dtype)
            with pyro.validation_enabled(validate):
                yield store
        finally:
            # The dictionaries may have been replaced (pyro.clear_param_store) inside the block.
            store._params = live._params
            store._param_to_name = live._param_to_name
            store._constraints = live._constraints
            live._params, live._param_to_name, live._constraints = theirs
            torch.set_default_dtype(their_dtype)
            set_random_state(their_rng)


def random_state() -> torch.Tensor:
    """State of torch's default generators: the CPU's and, once CUDA is in use, each GPU's."""
    return _joined([torch.get_rng_state(), *_of_gpus()])


def set_random_state(state: torch.Tensor) -> None:
    """Set what :func:`random_state` gave, here or in a process with more or fewer GPUs."""
    cpu, gpus = torch.get_rng_state().numel(), _of_gpus()
    if state.numel() == cpu:
        torch.set_rng_state(state)
        return
    torch.set_rng_state(state[:cpu].clone())
    for device, one in enumerate(state[cpu:].view(-1, GPU_STATE_BYTES)[: len(gpus)]):
        torch.cuda.set_rng_state(one.clone(), device)


def seeded_state(seed: int) -> torch.Tensor:
    """:func:`random_state` after ``torch.manual_seed(seed)``."""
    devices = ["cpu", *(f"cuda:{k}" for k in range(len(_of_gpus())))]
    return _joined([torch.Generator(d).manual_seed(seed).get_state() for d in devices])


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever is drawn in the block, the generators go on from where they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _of_gpus() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _joined(states: list[torch.Tensor]) -> torch.Tensor:
    # (No operator where none is needed: a step that is being recorded would have it in it.)
    return torch.cat(states) if len(states) > 1 else states[0]
