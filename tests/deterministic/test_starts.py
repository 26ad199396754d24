"""Where a fit starts: modes, and what to do when none can be used."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.distributions import constraints

import vi_toolkit as vi
from tests.tolerances import Z


def test_the_better_mode_is_kept_whatever_the_prior_median_leads_to():
    def model(y):
        x = pyro.sample("x", dist.Normal(-3.0, 3.0))
        # Symmetric up to the prior but for a likelihood that prefers the far mode by 20 nats.
        pyro.factor("bump", torch.logaddexp(-20 - 8 * (x + 4) ** 2, -8 * (x - 5) ** 2))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    fit = vi.fit(model, AutoNormal, {"y": torch.tensor(0.0)}, progress=False)
    assert abs(float(fit.sample(1000)["x"].mean()) - 5) < 0.5


def test_an_unbounded_density_does_not_trap_the_fit():
    """Rat tumours (Gelman et al. 2013, section 5.3): with all rates equal the density is infinite.

    Every mode found runs off there. Mean field's best member is where the mass is: its ELBO is
    within 2 nats of that of the best full-rank member, and 50 above what it is at such a mode.
    """

    def model(n, y):
        positive = dist.ImproperUniform(constraints.positive, (), ())
        a, b = pyro.sample("a", positive), pyro.sample("b", positive)
        pyro.factor("hyperprior", -2.5 * torch.log(a + b))
        with pyro.plate("groups", len(n)):
            theta = pyro.sample("theta", dist.Beta(a, b))
            pyro.sample("y", dist.Binomial(n, theta), obs=y)

    n = torch.full((20,), 20.0)
    y = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 12.0])
    full, diagonal = (
        vi.fit(model, guide, {"n": n, "y": y}, progress=False)
        for guide in (AutoMultivariateNormal, AutoNormal)
    )
    assert full.elbo_estimate()[0] - 2 < diagonal.elbo_estimate()[0] < full.elbo_estimate()[0]
    assert float(diagonal.sample(100)["a"].max()) < 1e3


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_a_model_that_raises_at_its_prior_medians_is_fitted(guide):
    """A conditional autoregression, whose precision is positive definite for |rho| < 1 only."""
    neighbours = torch.diag(torch.ones(5), 1)
    neighbours = neighbours + neighbours.T
    weights = neighbours / neighbours.sum(0).sqrt().outer(neighbours.sum(0).sqrt())

    def model(y):
        rho = pyro.sample("rho", dist.Normal(1.5, 1.0))
        field = dist.MultivariateNormal(
            torch.zeros(6), precision_matrix=torch.eye(6) - rho * weights
        )
        with pyro.plate("years", len(y)):
            pyro.sample("y", field, obs=y)

    covariance = torch.linalg.inv(torch.eye(6) - 0.3 * weights)
    y = dist.MultivariateNormal(torch.zeros(6), covariance).sample((100,))
    with pytest.raises(ValueError, match="PositiveDefinite"):
        pyro.condition(model, data={"rho": torch.tensor(1.5)})(y)
    fit = vi.fit(model, guide, {"y": y}, progress=False)
    rho = fit.sample(4000)["rho"]
    assert fit.converged
    assert abs(float(rho.mean()) - 0.3) < Z * float(rho.std())
