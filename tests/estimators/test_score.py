"""The score estimator in use: what it refuses, where it runs, where it goes."""

import math
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam, ClippedAdam
from torch.distributions import constraints

import vi_toolkit as vi
from tests.estimators.checks import assert_unbiased
from tests.estimators.models import DATA, TOYS, B, N, flat, gradient, gradients
from tests.models import regression, regression_data, regression_posterior
from tests.test_fitting import quietly
from tests.tolerances import Z

ESTIMATORS = [
    vi.Reparam(2),
    vi.PathDerivative(2),
    vi.Score(4, vi.LeaveOneOut()),
    vi.Score(4, vi.ControlVariate("coordinate")),
    vi.Score(2, vi.RunningMean(), sites=["z"]),
]


# ------------------------------------------------------------------ refusals


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
def test_wrong_arguments(make, error, says):
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
def test_combinations_that_cannot_be(kind, estimator, site, says):
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


def test_a_baseline_per_datum_needs_to_know_the_datum():
    def model(y):
        with pyro.plate("n", 10, subsample=y):  # Pyro allows this: the data are the subsample
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("n", 10, subsample=y):
            pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    y = torch.tensor([0.3, 1.2])
    with pytest.raises(vi.PreflightError, match="one datum from another") as caught:
        vi.Score(1, vi.RunningMean()).loss_and_grads(model, guide, y)
    assert caught.value.site == "z"


def test_a_factor_in_the_guide_must_say_what_it_is():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        pyro.factor("jacobian", z * 0.1, has_rsample=False)

    with pytest.raises(vi.PreflightError, match="jacobian"):
        vi.Score().loss_and_grads(model, guide)


def test_a_net_of_the_wrong_shape_or_input_is_named():
    pair = TOYS["mixed"].pair()
    wrong = vi.Neural(torch.nn.Linear(1, 3).double(), lambda data: data["x"][:, None])
    with pytest.raises(ValueError, match=r"'z'.*\(5, 3\)"):
        vi.Score(1, {"z": wrong}).loss_and_grads(*pair, **DATA)
    missing = vi.Neural(torch.nn.Linear(1, 1).double(), "images")
    with pytest.raises(ValueError, match="'images'"):
        vi.Score(1, {"z": missing}).loss_and_grads(*pair, **DATA)


# ------------------------------------------------------------------ where the theory is exact


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def normal_guide(loc, scale):
    def guide(y):
        m = pyro.param("loc", loc.clone())
        s = pyro.param("scale", scale.clone(), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(m, s))

    return guide


def conjugate_posterior(y):
    precision = 1 / 4 + len(y)
    return y.sum() / precision, torch.tensor(precision, dtype=y.dtype).rsqrt()


@pytest.mark.parametrize("particles", [1, 4])
def test_the_path_derivative_is_zero_at_the_posterior(particles):
    y = torch.tensor([1.0, 2.5, 0.3, -0.7], dtype=torch.float64)
    guide = normal_guide(*conjugate_posterior(y))
    found = gradient(vi.PathDerivative(particles), conjugate, guide, {"y": y})[1]
    assert float(flat(found).abs().max()) < 1e-13
    noisy = gradient(vi.Reparam(particles), conjugate, guide, {"y": y})[1]
    assert float(flat(noisy).abs().max()) > 1e-3  # the score term alone


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


@pytest.mark.parametrize("kind", ["Gamma", "Beta", "Dirichlet"])
@pytest.mark.parametrize("particles", [1, 20])
def test_implicit_and_score_gradients_agree_with_the_exact_kl(kind, particles):
    """minus ELBO = KL(q || prior), whose gradient torch has in closed form."""
    ones = torch.ones((), dtype=torch.float64)
    prior, start = {
        "Gamma": (dist.Gamma(2 * ones, 3 * ones), [1.5 * ones, 2 * ones]),
        "Beta": (dist.Beta(2 * ones, 3 * ones), [1.5 * ones, 2 * ones]),
        "Dirichlet": (
            dist.Dirichlet(torch.tensor([2.0, 1, 3]).double()),
            [torch.tensor([1.5, 2, 1]).double()],
        ),
    }[kind]

    def q():
        return getattr(dist, kind)(
            *(
                pyro.param(f"p{k}", value.clone(), constraint=constraints.positive)
                for k, value in enumerate(start)
            )
        )

    def model():
        pyro.sample("z", prior)

    def guide():
        pyro.sample("z", q())

    q()
    leaves = dict(sorted(pyro.get_param_store().named_parameters()))
    kl = torch.distributions.kl_divergence(q(), prior)
    truth = flat(dict(zip(leaves, torch.autograd.grad(kl, list(leaves.values())), strict=True)))
    draws = {1: 600, 20: 80}[particles]
    for estimator in (
        vi.Reparam(particles),
        vi.PathDerivative(particles),
        vi.Score(particles, vi.ControlVariate()),
    ):
        assert_unbiased(gradients(estimator, model, guide, {}, draws), truth, repr(estimator))
    exact = gradient(vi.Reparam(1, analytic_kl=True), model, guide, {})[1]
    torch.testing.assert_close(flat(exact), truth)


# ------------------------------------------------------------------ analytic KL: where not


def kl_of(model, guide, *args):
    estimator = vi.Reparam(analytic_kl=True)
    if not hasattr(guide, "prototype_trace"):
        estimator.prepare(model, guide, args, {})
    return estimator.kl


def test_analytic_kl_is_refused_with_a_reason():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.LogNormal(0.0, 1.0))

    def guide():
        b = pyro.sample("b", dist.Normal(pyro.param("m", torch.tensor(0.3)), 1.0))
        pyro.sample("a", dist.Normal(0.5 * b, 1.0))  # given b: b's prior depends on what follows
        pyro.sample("c", dist.Gamma(2.0, 1.0))

    with pytest.warns(UserWarning, match="No analytic KL"):
        found = kl_of(model, guide)
    assert found["a"] == "analytic"
    assert "depends on a" in found["b"]
    assert "no closed form for Gamma and LogNormal" in found["c"]


# ------------------------------------------------------------------ in use


@pytest.mark.parametrize("estimator", ESTIMATORS[:4], ids=repr)
@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_with_pyros_autoguides_and_plain_svi(estimator, family):
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


def test_a_latent_of_autonormal_goes_by_its_name():
    data = regression_data()
    guide = AutoNormal(regression)
    estimator = vi.Score(2, {"w": vi.LeaveOneOut()}, sites=["w"])
    estimator.loss_and_grads(regression, guide, **data)
    assert estimator.dependencies.coordinatewise == {"w_unconstrained": "w"}


class Indexed:
    """Bernoulli latents, one per datum, in the two ways that fit subsamples."""

    y = torch.tensor([0.2, 1.4, -0.3, 0.9, 1.8, 0.1, 0.4], dtype=torch.float64)
    data: ClassVar = {"y": y, "row": torch.arange(7)}

    @staticmethod
    def model(y, row):
        with pyro.plate("n", len(y)) as i:
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones((), dtype=y.dtype)))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[i])

    @staticmethod
    def guide(y, row):
        logits = pyro.param("logits", torch.zeros(7, dtype=y.dtype))
        with pyro.plate("n", len(y)) as i:
            pyro.sample("z", dist.Bernoulli(logits=logits[row[i]]))


@pytest.mark.parametrize("way", ["indices", "cut"])
def test_what_a_baseline_learns_belongs_to_the_datum(way):
    """Ragged minibatches (7 = 2 * 3 + 1): each datum's state counts its own visits only."""
    from vi_toolkit.programs.minibatches import PlatePlan

    cut = None if way == "indices" else ["y", "row"]
    plan = PlatePlan("n", 7, 3, cut)
    estimator = vi.Score(2, vi.RunningMean(0.5))
    visits = torch.zeros(7, dtype=torch.float64)
    model, guide = Indexed.model, Indexed.guide
    order = [[6, 0, 3], [5, 1, 2], [4], [2, 3, 6], [0, 5, 4]]
    if way == "cut":

        def model(y, row):
            with pyro.plate("n", len(y)):
                z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones((), dtype=y.dtype)))
                pyro.sample("y", dist.Normal(z, 0.5), obs=y)

        def guide(y, row):
            logits = pyro.param("logits", torch.zeros(7, dtype=y.dtype))
            with pyro.plate("n", len(y)):
                pyro.sample("z", dist.Bernoulli(logits=logits[row]))

    for rows in order:
        rows = torch.tensor(rows)
        data, handler = plan.apply(Indexed.data, rows)
        before = {k: v.clone() for k, v in estimator.state().items()}
        with handler:
            estimator.loss_and_grads(model, guide, **data)
        visits *= 1.0
        visits[rows] = 0.5 * visits[rows] + 1
        state = estimator.state()
        assert torch.equal(state["z/weight"], visits)
        untouched = [n for n in range(7) if n not in rows]
        if before:
            assert torch.equal(state["z/sum"][untouched], before["z/sum"][untouched])
            assert not torch.equal(state["z/sum"][rows], before["z/sum"][rows])
    assert not any("baseline" in name for name in pyro.get_param_store().keys())  # noqa: SIM118


BASELINES = {
    "none": None,
    "running mean": vi.RunningMean(),
    "leave one out": vi.LeaveOneOut(),
    "control variate": vi.ControlVariate(),
    "per coordinate": vi.ControlVariate("coordinate", memory=0.8),
    "by site": {"z": vi.RunningMean(0.8)},
}


@pytest.mark.parametrize("subsample", [None, {"n": 3}], ids=["full", "subsampled"])
@pytest.mark.parametrize("name", BASELINES)
def test_a_loaded_fit_goes_on_bit_for_bit(name, subsample, tmp_path):
    estimator = vi.Score(3, BASELINES[name])

    def fitted(steps):
        return quietly(
            Indexed.model, Indexed.guide, Indexed.data,
            estimator=estimator, steps=steps, subsample=subsample,
        )  # fmt: skip

    whole, part = fitted(60), fitted(25)
    part.save(tmp_path / "fit")
    loaded = vi.load(tmp_path / "fit", Indexed.model, Indexed.guide).extend(35)
    part.extend(35)
    for other in (part, loaded):
        assert np.array_equal(whole.elbo, other.elbo)
        assert torch.equal(whole.params["logits"], other.params["logits"])
    mine, theirs = whole._stochastic.estimator.state(), loaded._stochastic.estimator.state()
    assert mine.keys() == theirs.keys() and (mine or name in ("none", "leave one out"))
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert estimator.state() == {}  # what a fit's estimator learns is the fit's own


def test_a_net_is_asked_for_again_and_then_goes_on_bit_for_bit(tmp_path):
    net = torch.nn.Linear(1, 1).double()
    estimator = vi.Score(2, vi.Neural(net, lambda data: data["y"][:, None]))
    options = {"estimator": estimator, "subsample": {"n": 3}}
    start = net.weight.detach().clone()
    whole = quietly(Indexed.model, Indexed.guide, Indexed.data, steps=40, **options)
    part = quietly(Indexed.model, Indexed.guide, Indexed.data, steps=15, **options)
    part.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="estimator="):
        vi.load(tmp_path / "fit", Indexed.model, Indexed.guide).extend(5)
    loaded = vi.load(tmp_path / "fit", Indexed.model, Indexed.guide, estimator=estimator)
    assert np.array_equal(loaded.extend(25).elbo, whole.elbo)
    assert torch.equal(net.weight, start)  # the caller's net is copied
    learnt = whole._stochastic.estimator.state()["z/net weight"]
    assert not torch.equal(learnt, start)


def test_fit_takes_the_score_where_it_must():
    """Discrete latents without asking; q can be exact, and comes near."""
    fit = quietly(Indexed.model, Indexed.guide, Indexed.data, steps=3000, optimizer=0.05)
    assert "LeaveOneOut" in repr(fit._estimator)
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


def test_a_net_reduces_variance_that_depends_on_the_data():
    """log p(y_n | z_n) has a part that x_n predicts; the net must find it."""
    x = torch.linspace(-3, 3, 40, dtype=torch.float64)

    def model(x):
        with pyro.plate("n", 40):
            z = pyro.sample("z", dist.Bernoulli(torch.full((), 0.5, dtype=x.dtype)))
            pyro.factor("y", 8 * x + 0.5 * z)

    def guide(x):
        with pyro.plate("n", 40):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.zeros(40).double())))

    variance = {}
    for name, baseline in {
        "net": vi.Neural(torch.nn.Linear(1, 1).double(), lambda d: d["x"][:, None], 0.05),
        "none": None,
    }.items():
        estimator = vi.Score(1, baseline)
        gradients(estimator, model, guide, {"x": x}, 300)
        variance[name] = float(gradients(estimator, model, guide, {"x": x}, 200).var(0).sum())
    assert variance["net"] < 0.05 * variance["none"]


def test_state_is_tensors_and_can_be_swapped():
    """What a tracer needs: the state as explicit tensors, updated in place."""
    model, guide = TOYS["mixed"].pair(B)
    estimator = vi.Score(2, vi.RunningMean())
    estimator.loss_and_grads(model, guide, **DATA)
    mine = {k: v.clone() for k, v in estimator.state().items()}
    assert mine["z/sum"].shape == (N,)
    estimator.load_state(mine)
    estimator.loss_and_grads(model, guide, **DATA)
    assert all(estimator.state()[k] is v for k, v in mine.items())
    assert float(mine["g/weight"]) == pytest.approx(1.9)
    with pytest.raises(ValueError, match="keeps no state"):
        vi.Reparam().load_state(mine)
