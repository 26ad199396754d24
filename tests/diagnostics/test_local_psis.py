"""k-hat per datum against its known value, where the datum sets the correlation of two latents."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.support import fitted


def sums(y, s):
    """Given mu the posterior of (a_i, b_i) has correlation -1 / (1 + s_i^2), so k is its size."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a + b, s), obs=y)


DATA = {
    "y": torch.tensor([0.5, -1.0, 2.0, 0.3]).double(),
    "s": torch.tensor([3.0, 2.0, 1.0, 0.3]).double(),
}


def test_k_hat_per_datum_is_the_correlation_and_the_bad_one_is_named():
    found = vi.local_psis(fitted(sums, AutoNormal, DATA), num_draws=100_000)
    # Mean field given mu has the conditional sds. With fewer draws k-hat is biased low.
    assert found.k == pytest.approx(1 / (1 + DATA["s"].numpy() ** 2), abs=0.1)
    assert list(found.bad) == [3]
    assert "1 of 4 data in plate 'data': 3" in found.meaning
    assert found.sites == ["a", "b"]
    assert (np.diff(found.effective_fraction) < 0).all()
    axes = found.plot().axes[0]
    assert axes.get_title(loc="left") == "a, b: 1 of 4 with k-hat of 0.7 or more"
    assert [text.get_text() for text in axes.texts] == ["3"]


def test_exact_local_latents_raise_no_alarm_even_if_the_globals_are_wrong():
    def model(y):
        mu = pyro.sample("mu", dist.StudentT(3.0, 0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        loc = pyro.param("loc", torch.tensor(0.0).double())
        mu = pyro.sample("mu", dist.Normal(loc, 0.01))  # far too narrow
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal((y + mu) / 2, 0.5**0.5))

    found = vi.local_psis(fitted(model, guide, {"y": torch.randn(50).double()}, steps=1))
    assert len(found.bad) == 0
    assert np.abs(found.effective_fraction - 1).max() < 1e-6
    assert "all 50 data" in repr(found)


def test_a_plate_that_cannot_be_used_is_refused():
    fit = fitted(sums, AutoNormal, DATA)
    with pytest.raises(ValueError, match="'data'"):
        vi.local_psis(fit, plate="q")
    with pytest.raises(ValueError, match="factor per datum"):
        vi.local_psis(fitted(sums, AutoMultivariateNormal, DATA))

    def without(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ValueError, match="none"):
        vi.local_psis(fitted(without, AutoNormal, {"y": DATA["y"]}))
