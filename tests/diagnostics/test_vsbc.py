"""Simulation-based calibration: silent where the guide is right or merely narrow, loud on bias."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from recipes.logistic_regression import model as logistic_regression
from recipes.logistic_regression import simulate
from tests.diagnostics.test_diagnostics import SCHOOLS, eight_schools, fitted
from tests.models import regression
from tests.tolerances import Z
from vi_toolkit.deterministic.replications import fit_replications
from vi_toolkit.diagnostics.vsbc import PriorPredictive, symmetry_test
from vi_toolkit.programs.isolation import isolated_pyro_state
from vi_toolkit.programs.joint import Joint


def inside(n, reached):
    """P(a fair walk stays strictly within +-reached for n steps), step by step."""
    mass = {0: 1.0}
    for _ in range(n):
        after = {}
        for place, p in mass.items():
            for there in (place - 1, place + 1):
                if abs(there) < reached:
                    after[there] = after.get(there, 0) + p / 2
        mass = after
    return sum(mass.values())


@pytest.mark.parametrize(("n", "low"), [(10, 9), (11, 7), (60, 38), (7, 7), (50, 25)])
def test_symmetry_test_is_exact(n, low):
    """With all small p first the walk goes up to ``low`` and no further."""
    off = np.linspace(0.4, 0.1, n)  # distances from 1/2, the largest first
    p = 0.5 + np.where(np.arange(n) < low, -off, off)
    assert symmetry_test(p) == pytest.approx(1 - inside(n, low), abs=1e-12)


def test_symmetry_test_keeps_its_level_and_ignores_width():
    """Its false alarms are few whatever the shape, as long as it is symmetric."""
    rng = np.random.default_rng(0)
    for shape in (1.0, 0.3, 4.0):
        found = np.array([symmetry_test(rng.beta(shape, shape, 150)) for _ in range(1_000)])
        for level in (0.05, 0.2):
            assert (found <= level).mean() < level + Z * np.sqrt(level * (1 - level) / 1_000)
    assert symmetry_test(rng.beta(2.0, 3.0, 300)) < 1e-3
    assert symmetry_test(np.full(10, 0.5)) == 1


PREDICTORS = torch.tensor([[1.0, 0.9], [-1.0, -1.1], [0.5, 0.4], [0.3, -0.1]]).double()


def test_silent_on_an_exact_posterior():
    data = {"X": PREDICTORS, "y": torch.zeros(4).double()}
    found = vi.vsbc(regression, AutoMultivariateNormal, data, replications=300)
    assert found.batched
    assert found.unconverged == 0
    assert found.biased == []
    assert "no bias" in repr(found)
    # p is uniform: E p^2 = 1/3, with variance 1/5 - 1/9 = 4/45.
    assert (found.p**2).mean(0) == pytest.approx(1 / 3, abs=Z * np.sqrt(4 / 45 / 300))


def test_silent_on_a_guide_that_is_only_too_narrow_but_its_spread_says_so():
    data = {"X": PREDICTORS, "y": torch.zeros(4).double()}
    found = vi.vsbc(regression, AutoNormal, data, replications=300)
    assert found.biased == []
    # p = Phi(t / r), t ~ N(0, 1), has variance asin(s / (1 + s)) / 2 pi with s = 1 / r^2: for a
    # Gaussian posterior r^2 = 1 / (Lambda_ii Sigma_ii).
    precision = PREDICTORS.T @ PREDICTORS + torch.eye(2) / 25
    s = (precision.diagonal() * torch.linalg.inv(precision).diagonal()).numpy()
    expected = np.sqrt(12 * np.arcsin(s / (1 + s)) / (2 * np.pi))
    assert (expected > 1.3).all()
    # |p - 1/2| <= 1/2, so the variance of (p - 1/2)^2 is at most v (1/4 - v).
    v = expected**2 / 12
    error = Z * np.sqrt(v * (0.25 - v) / 300)
    assert np.abs(((found.p - 0.5) ** 2).mean(0) - v).max() < error.max()


def test_fires_on_the_centred_eight_schools(tmp_path):
    found = vi.vsbc(eight_schools, AutoNormal, SCHOOLS, replications=120)
    assert found.biased == ["log(tau)"]
    assert found.p_values[1] < 1e-3
    assert found.table.loc["log(tau)", "guide is"] == "too high"
    assert "too high" in repr(found)
    found.plot().savefig(tmp_path / "vsbc.png")
    assert (tmp_path / "vsbc.png").stat().st_size > 10_000


def one_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def shifted(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("mu", dist.Normal(y.mean() * len(y) / (1 + len(y)) + 0.4 + 0 * loc, 0.4))


def test_any_other_guide_goes_one_by_one():
    """Five data: the posterior sd is 0.41, so this guide is a whole sd too high."""
    options = {"replications": 60, "progress": False}
    found = vi.vsbc(one_mean, shifted, {"y": torch.zeros(5)}, steps=1, **options)
    assert not found.batched
    assert found.biased == ["mu"]
    assert "too high" in found.meaning
    again = vi.vsbc(one_mean, shifted, {"y": torch.zeros(5)}, steps=1, **options)
    assert (found.p == again.p).all()


def test_a_simulator_of_ones_own():
    """The recipe's, with predictors that differ between data sets as well."""
    found = vi.vsbc(
        logistic_regression,
        AutoMultivariateNormal,
        replications=40,
        simulate=lambda r: simulate(r, observations=60, predictors=2),
    )
    assert found.batched
    assert found.biased == []
    assert found.p.shape == (40, 3)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_fits_at_once_are_those_of_fit(guide):
    """To the Monte Carlo errors that both promise, 0.05 and 0.02 sd."""
    runs = [simulate(r, observations=50, predictors=2)[0] for r in range(3)]
    joint = Joint(logistic_regression, runs[0])
    entries = {name: torch.stack([run[name] for run in runs]) for name in ("X", "y")}
    with isolated_pyro_state(dtype=torch.float64):
        found = fit_replications(joint, entries, guide is AutoMultivariateNormal)
    assert found.converged.all()
    for r, run in enumerate(runs):
        fit = fitted(logistic_regression, guide, run)
        mean, sd = fit.run.progress.problem.moments()
        assert ((found.mean[r] - mean) / sd).abs().max() < 0.07
        assert (found.sd[r] / sd).log().abs().max() < 0.07


def test_whole_numbers_are_replaced_as_well_and_constant_twins_are_told_apart():
    def counts(x, y):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Poisson(rate + 0 * x), obs=y)

    zeros = torch.zeros(30, dtype=torch.long)
    data = {"x": zeros.clone(), "y": zeros}
    first, latents = PriorPredictive(counts, data)(0)
    assert first["y"].dtype == torch.long
    assert not first["x"].any()
    assert (
        abs(float(first["y"].double().mean() - latents["rate"]))
        < Z * (float(latents["rate"]) / 30) ** 0.5
    )
    found = vi.vsbc(counts, AutoMultivariateNormal, data, replications=60)
    assert found.batched
    # The posterior of 30 counts is nearly Normal; had y stayed zero p would be near one always.
    assert found.biased == []


def test_single_precision_constants_go_one_by_one():
    constant = torch.ones(5)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(constant @ mu.expand(5, 1), 5.0).to_event(1), obs=y)

    found = vi.vsbc(
        model, AutoNormal, {"y": torch.zeros(1)}, replications=3, progress=False, steps=2
    )
    assert not found.batched
    assert np.isfinite(found.p).all()


def improper(y):
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


def factored(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("f", -mu.abs())
    pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


def autoregression(y):
    rho = pyro.sample("rho", dist.Normal(0.0, 1.0))
    past = torch.cat([torch.zeros(1), y[:-1]])
    pyro.sample("y", dist.Normal(rho * past, 1.0).to_event(1), obs=y)


def logged(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y.log())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (improper, "drawn from its prior"),
        (factored, "factor 'f'"),
        (autoregression, "depends on the observations"),
        (logged, "not an argument"),
        (lambda y: pyro.sample("mu", dist.Normal(0.0, 1.0)), "observes no site"),
    ],
)
def test_models_that_cannot_make_their_own_data_are_refused(model, said):
    with pytest.raises(vi.PreflightError, match=said) as error:
        vi.vsbc(model, AutoNormal, {"y": torch.tensor([1.0, 2.0, 4.0])})
    assert "simulate=" in str(error.value) or "proper" in str(error.value)


def test_prior_predictive_draws_and_leaves_the_callers_state_alone():
    y = torch.zeros(2_000)
    state = torch.get_rng_state()
    data, latents = PriorPredictive(one_mean, {"y": y}, seed=3)(7)
    assert torch.equal(torch.get_rng_state(), state)
    assert not y.any()
    assert abs(float(data["y"].mean() - latents["mu"])) < Z / 2_000**0.5
    again, _ = PriorPredictive(one_mean, {"y": y}, seed=3)(7)
    assert torch.equal(data["y"], again["y"])
