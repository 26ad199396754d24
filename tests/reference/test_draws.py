"""Summaries of draws have the right standard errors; the admission rules fire and stay silent."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from tests.reference.models import COVARIANCE
from tests.tolerances import Z
from vi_toolkit.errors import InvalidReferenceError
from vi_toolkit.programs.joint import Joint
from vi_toolkit.reference import Reference


def three(y):
    """Three latents with different supports, for their names."""
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.HalfNormal(1.0))
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("y", dist.Bernoulli(p), obs=y)


@pytest.fixture
def joint():
    return Joint(three, {"y": torch.tensor(1.0)})


def independent(chains=4, n=1000, seed=0):
    """Independent draws of the latents of ``three``, which break no rule."""
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.standard_normal((chains, n, 3)))
    return {"a": z[..., 0], "b": z[..., 1].exp(), "p": z[..., 2].sigmoid()}


def test_moments_and_standard_errors_of_independent_draws(joint):
    draws = independent()
    r = Reference.from_draws(joint, draws, {"divergences": 0})
    assert r.names == ["a", "log(b)", "logit(p)"]
    n = 4000
    # The standard errors of independent draws are sd / sqrt(n) for the mean and sd / sqrt(2 n) for
    # the sd, up to the noise of the estimated effective sample size.
    assert r.mean_se == pytest.approx(r.sd / np.sqrt(n), rel=0.15)
    assert r.sd_se == pytest.approx(r.sd / np.sqrt(2 * n), rel=0.15)
    assert r.conditional_sd_se == pytest.approx(r.sd / np.sqrt(2 * n), rel=0.15)
    assert np.abs(r.mean).max() < Z / np.sqrt(n)
    assert np.abs(r.skewness).max() < Z * np.sqrt(6 / n)
    # The standard error of a quantile is that of its rank over the density, 0.399 at the median.
    assert r.quantiles_se["50%"] == pytest.approx(0.5 / np.sqrt(n) / 0.399, rel=0.25)
    assert r.near_gaussian
    row = r.sites[1]
    assert row["name"] == "b"
    assert row["mean"] == pytest.approx(float(draws["b"].mean()))
    assert row["95%"] == pytest.approx(float(draws["b"].quantile(0.95)), rel=1e-6)


def test_conditional_sd_se_is_the_spread_over_many_references(joint):
    correlated, reported = [], []
    root = np.linalg.cholesky(COVARIANCE)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        z = torch.from_numpy(rng.standard_normal((4, 500, 3)) @ root.T)
        draws = {"a": z[..., 0], "b": z[..., 1].exp(), "p": z[..., 2].sigmoid()}
        r = Reference.from_draws(joint, draws, {"divergences": 0})
        correlated.append(r.mean_field_sd_ratio * r.sd)
        reported.append(r.conditional_sd_se)
    spread = np.std(correlated, axis=0, ddof=1)
    # The spread of 60 numbers has a relative standard error of 1 / sqrt(2 * 59).
    assert spread == pytest.approx(np.mean(reported, axis=0), rel=Z / np.sqrt(118))
    exact = np.linalg.inv(COVARIANCE).diagonal() ** -0.5
    assert np.all(np.abs(np.mean(correlated, axis=0) - exact) < Z * spread / np.sqrt(60) + 2e-3)


def stuck(draws):
    """Autocorrelated chains: every draw is repeated eight times."""
    return {k: v[:, ::8].repeat_interleave(8, dim=1) for k, v in draws.items()}


@pytest.mark.parametrize(
    ("spoil", "divergences", "complaint"),
    [
        (lambda d: d, 0, None),
        (lambda d: d | {"b": d["b"] * torch.tensor([1.0, 1, 1, 1.6])[:, None]}, 0,
         r"rank R-hat of log\(b\) is 1\.\d+ \(must be below 1\.01\)"),
        (stuck, 0, r"bulk ESS of \S+ is \d+ \(must be at least 1000\); tail ESS of"),
        (lambda d: d, 2, "2 transitions diverged"),
        (lambda d: d, None, "how many transitions diverged"),
        (lambda d: {k: v[:1] for k, v in d.items()}, 0, "two chains"),
        (lambda d: d | {"a": d["a"] * torch.tensor([1.0, 1, 1, torch.inf])[:, None]}, 0,
         "draws of a are not all finite"),
        (lambda d: d | {"p": torch.full_like(d["p"], 0.5)}, 0, r"logit\(p\) does not vary"),
    ],
)  # fmt: skip
def test_admission_rules(joint, spoil, divergences, complaint):
    made = {} if divergences is None else {"divergences": divergences}
    draws = spoil(independent())
    if complaint is None:
        r = Reference.from_draws(joint, draws, made)
        assert r.made["r_hat"] < 1.01
        assert min(r.made["bulk_ess"], r.made["tail_ess"]) >= 1000
    else:
        with pytest.raises(InvalidReferenceError, match=complaint):
            Reference.from_draws(joint, draws, made)


def test_vector_and_simplex_sites():
    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        q = pyro.sample("q", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(w.sum() + q[0], 1.0), obs=y)

    joint = Joint(model, {"y": torch.tensor(0.0)})
    rng = np.random.default_rng(0)
    draws = {
        "w": torch.from_numpy(rng.standard_normal((4, 600, 2, 2))),
        "q": torch.from_numpy(rng.dirichlet(np.ones(3), (4, 600))),
    }
    r = Reference.from_draws(joint, draws, made={"divergences": 0})
    assert r.names[:4] == ["w[0,0]", "w[0,1]", "w[1,0]", "w[1,1]"]
    assert len(r.names) == 6  # a simplex of three has two free scalars
    assert [row["name"] for row in r.sites[4:]] == ["q[0]", "q[1]", "q[2]"]
    assert r.sites[6]["mean"] == pytest.approx(float(draws["q"][..., 2].mean()))
