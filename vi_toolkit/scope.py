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


@contextlib.contextmanager
def borrowed_globals(
    store: ParamStoreDict | None = None,
    rng_state: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
) -> Iterator[ParamStoreDict]:
    """Run a block with its own parameter store, random state and default dtype.

    Args:
        store: parameters to work on; they are updated in place. A fresh store if None.
        rng_state: state of torch's CPU generator to start from; the caller's if None.
        dtype: default floating dtype; the caller's if None.
        validate: whether Pyro checks the arguments and samples of distributions.

    Yields:
        The store in use.
    """
    store = ParamStoreDict() if store is None else store
    with _LOCK:
        live = pyro.get_param_store()
        theirs = (live._params, live._param_to_name, live._constraints)
        their_rng = torch.get_rng_state()
        their_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        their_dtype = torch.get_default_dtype()
        live._params = store._params
        live._param_to_name = store._param_to_name
        live._constraints = store._constraints
        try:
            if rng_state is not None:
                torch.set_rng_state(rng_state)
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
            torch.set_rng_state(their_rng)
            if their_cuda is not None:
                torch.cuda.set_rng_state_all(their_cuda)


def seeded_state(seed: int) -> torch.Tensor:
    """State of torch's CPU generator after ``torch.manual_seed(seed)``."""
    return torch.Generator().manual_seed(seed).get_state()
