"""Every test starts from the same state and leaves nothing behind."""

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported anywhere: there may be no display

import pyro
import pytest
import torch
from matplotlib import pyplot as plt

pytest.register_assert_rewrite(
    "tests.support", "tests.estimators.checks", "tests.preflight.mistakes"
)


@pytest.fixture(autouse=True)
def same_state_for_every_test():
    """Empty parameter store, fixed seed, validation, one thread, then dtype and figures reset."""
    dtype = torch.get_default_dtype()
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)  # torch, numpy and random
    pyro.enable_validation(True)
    yield
    torch.set_default_dtype(dtype)
    plt.close("all")
