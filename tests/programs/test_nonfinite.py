"""A density that is not finite is traced to its site, its index and its step."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi


def test_a_non_finite_elbo_names_site_index_and_step_and_keeps_the_last_good_state():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("observations", len(y)):
            # Past 1.5 the square root has no value; the factor pushes a there.
            pyro.sample("y", dist.Normal((1.5 - a * y).sqrt(), 1.0), obs=y)
            pyro.factor("push", 50 * a)

    def guide(y):
        pyro.sample("a", dist.Delta(pyro.param("at", torch.tensor(0.0))))

    data = {"y": torch.tensor([0.0, 1.0])}
    with pytest.raises(vi.NonFiniteError) as caught:
        vi.fit(model, guide, data, steps=500, optimizer=0.05, progress=False)
    error = caught.value
    assert error.site == "y" and error.index == (1,) and error.step is not None
    assert "'y'" in str(error) and f"step {error.step}" in str(error)
    assert error.fit is not None
    assert len(error.fit.elbo) == error.step
    assert all(torch.isfinite(v).all() for v in error.fit.params.values())


def test_no_finite_start_is_an_error_that_names_the_site():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Poisson(a.exp()), obs=y)

    with pytest.raises((vi.NonFiniteError, vi.PreflightError), match="'y'"):
        vi.fit(model, AutoNormal, {"y": torch.tensor([1.0, -2.0])}, progress=False)
