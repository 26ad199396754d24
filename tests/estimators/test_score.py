"""The score estimator: what it refuses, where it runs, and where it converges to."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam, ClippedAdam

import vi_toolkit as vi
from tests.estimators.models import (
    DATA,
    TOYS,
    Indexed,
    conjugate_posterior,
    gradients,
    normal_guide,
)
from tests.models import regression, regression_data, regression_posterior
from tests.support import quietly
from tests.tolerances import Z

ESTIMATORS = [
    vi.Reparam(2),
    vi.PathDerivative(2),
    vi.Score(4, vi.LeaveOneOut()),
    vi.Score(4, vi.ControlVariate("coordinate")),
    vi.Score(2, vi.RunningMean(), sites=["z"]),
]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: vi.Score(0), ValueError, "positive whole number"),
        (lambda: vi.Reparam(True), ValueError, "positive whole number"),
        (lambda: vi.Enumerate(1.5), ValueError, "positive whole number"),
        (lambda: vi.Score(1, vi.LeaveOneOut()), ValueError, "particles >= 2"),
        (lambda: vi.Score(1, vi.ControlVariate(memory=0)), ValueError, "particles >= 2"),
        (lambda: vi.Score(1, "loo"), ValueError, "LeaveOneOut"),
        (lambda: vi.Score(1, vi.LeaveOneOut), ValueError, "LeaveOneOut"),
        (lambda: vi.Score(sites="z"), ValueError, "list of names"),
        (lambda: vi.ControlVariate(per="site"), ValueError, "'factor' or 'coordinate'"),
        (lambda: vi.RunningMean(1.0), ValueError, "decay"),
    ],
)
def test_wrong_arguments_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("kind", "estimator", "site", "says"),
    [
        ("mixed", vi.Reparam(), "z", "Score"),
        ("mixed", vi.PathDerivative(), "z", "Score"),
        ("mixed", vi.Score(sites=["g"]), "z", "Add it to sites"),
        ("mixed", vi.Score(sites=["zz"]), "zz", "draws g, z"),
        ("mixed", vi.Score(1, {"q": vi.RunningMean()}), "q", "where no score"),
        ("continuous", vi.Score(1, {"g": vi.RunningMean()}, sites=["z"]), "g", "where no score"),
    ],
)
def test_impossible_combinations_are_refused(kind, estimator, site, says):
    with pytest.raises(vi.PreflightError, match=says) as caught:
        estimator.loss_and_grads(*TOYS[kind].pair(), **DATA)
    assert caught.value.site == site


def test_a_point_mass_has_no_score():
    guide = AutoDelta(regression)
    data = regression_data()
    with pytest.raises(vi.PreflightError, match="point mass"):
        vi.Score().loss_and_grads(regression, guide, **data)
    with pytest.raises(vi.PreflightError, match="point mass"):
        vi.fit(regression, AutoDelta, data, estimator=vi.Score(), steps=3, progress=False)
    assert math.isfinite(vi.Reparam().loss_and_grads(regression, guide, **data))


def test_a_factor_in_the_guide_must_say_what_it_is():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        pyro.factor("jacobian", z * 0.1, has_rsample=False)

    with pytest.raises(vi.PreflightError, match="jacobian"):
        vi.Score().loss_and_grads(model, guide)


def test_the_generic_algorithm_reaches_the_exact_optimum():
    """Sample, score, log joint and nothing else (BBVI, 2014), on a model without gradients.

    At q = posterior every learning signal is the log evidence, so a leave-one-out baseline leaves
    no noise at all and the optimum is reached as exactly as one likes.
    """
    y = torch.tensor([1.0, 2.5, 0.3, -0.7], dtype=torch.float64)

    def no_gradient(y):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=y.dtype), 2.0))
        with torch.no_grad():
            likelihood = dist.Normal(mu, 1.0).log_prob(y[:, None] if mu.dim() else y).sum()
        pyro.factor("y", likelihood)

    guide = normal_guide(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    svi = SVI(
        no_gradient, guide, ClippedAdam({"lr": 0.05, "lrd": 0.998}), vi.Score(16, vi.LeaveOneOut())
    )
    for _ in range(2500):
        loss = svi.step(y)
    mean, sd = conjugate_posterior(y)
    assert abs((pyro.param("loc") - mean).item()) < 1e-3 * float(sd)
    assert abs((pyro.param("scale") / sd - 1).item()) < 1e-3
    evidence = dist.MultivariateNormal(
        torch.zeros(4).double(), torch.eye(4).double() + 4 * torch.ones(4, 4).double()
    ).log_prob(y)
    assert loss == pytest.approx(-float(evidence), abs=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS[:4], ids=repr)
@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_estimators_work_with_pyros_autoguides_and_svi(estimator, family):
    data = regression_data(n=20, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    guide = family(regression)
    guide(**data)
    pyro.set_rng_seed(1)
    many = vi.Reparam(200, analytic_kl=False)
    truth = gradients(many, regression, guide, data, 200)
    found = gradients(estimator.fresh(), regression, guide, data, 400)
    error = found.mean(0) - truth.mean(0)
    se = (found.var(0) / len(found) + truth.var(0) / len(truth)).sqrt()
    moving = se > 0  # the upper triangle of a Cholesky factor takes no part
    assert bool((error[~moving] == 0).all())
    assert float((error / se)[moving].abs().max()) < Z
    svi = SVI(regression, guide, Adam({"lr": 0.01}), loss=estimator.fresh())
    before = [svi.evaluate_loss(**data) for _ in range(50)]
    for _ in range(400):
        svi.step(**data)
    after = [svi.evaluate_loss(**data) for _ in range(50)]
    assert np.mean(after) < np.mean(before) - 5


def test_a_latent_of_autonormal_is_called_by_its_own_name():
    data = regression_data()
    guide = AutoNormal(regression)
    estimator = vi.Score(2, {"w": vi.LeaveOneOut()}, sites=["w"])
    estimator.loss_and_grads(regression, guide, **data)
    assert estimator.dependencies.coordinatewise == {"w_unconstrained": "w"}


def test_fit_chooses_the_score_estimator_where_it_must():
    """Discrete latents without asking; q can be exact, and comes near."""
    fit = quietly(Indexed.model, Indexed.guide, Indexed.data, steps=3000, optimizer=0.05)
    assert "LeaveOneOut" in repr(fit.run.settings.estimator)
    y = Indexed.y
    joint = torch.stack([dist.Normal(k, 0.5).log_prob(y) + math.log(0.5) for k in (0.0, 1.0)])
    evidence = float(joint.logsumexp(0).sum())
    elbo, se = fit.elbo_estimate(4000)
    assert evidence - 0.02 - Z * se < elbo < evidence + Z * se  # the gap is KL(q || p)


def test_a_mean_field_fit_by_score_agrees_with_theory():
    data = regression_data(n=30)
    _, _, precision = regression_posterior(**data)
    estimator = vi.Score(20, vi.LeaveOneOut())
    fit = quietly(regression, AutoNormal, data, estimator=estimator, steps=2500, optimizer=0.05)
    X, y = data["X"].double(), data["y"].double()
    marginal = torch.eye(len(y)).double() + 25 * X @ X.T
    evidence = dist.MultivariateNormal(torch.zeros(len(y)).double(), marginal).log_prob(y)
    least_kl = (precision.diagonal().log().sum() - precision.logdet()) / 2  # of a mean-field q
    elbo, se = fit.elbo_estimate(4000)
    best = float(evidence - least_kl)
    assert best - 0.05 - Z * se < elbo < best + Z * se
