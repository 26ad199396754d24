"""Jumps of a density are found, named, and left to the score function; steep densities are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.jumps import find_jumps

TIMES = torch.arange(20.0)
Y = torch.where(TIMES < 7, 0.0, 3.0)
Y = Y + 0.5 * torch.randn(20, generator=torch.Generator().manual_seed(0))
TABLE = torch.linspace(-3.0, 3.0, 50)


def switch_point(y):
    s = pyro.sample("s", dist.Uniform(0.0, 20.0))
    level = pyro.sample("level", dist.Normal(3.0, 1.0))
    with pyro.plate("times", 20):
        pyro.sample("y", dist.Normal(torch.where(s > TIMES, 0.0, level), 1.0), obs=y)


def sign(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("times", 20):
        pyro.sample("y", dist.Normal(torch.where(z > 0, 1.0, -1.0), 1.0), obs=y)


def rounded(y):
    z = pyro.sample("z", dist.Gamma(3.0, 0.5))
    with pyro.plate("times", 20):
        pyro.sample("y", dist.Normal(torch.floor(z), 1.0), obs=y)


def looked_up(y):
    z = pyro.sample("z", dist.Normal(25.0, 5.0))
    with pyro.plate("times", 20):
        pyro.sample("y", dist.Normal(TABLE[z.round().long().clamp(0, 49)], 1.0), obs=y)


def steep(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("times", 20):
        pyro.sample("y", dist.Normal(torch.sigmoid(1e3 * z), 1.0), obs=y)


def kinked(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("times", 20):
        pyro.sample("y", dist.Laplace(z.abs().clamp(max=1.0), 0.01), obs=y)


def bounded(y):
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    with pyro.plate("times", 20):
        pyro.sample("y", dist.StudentT(1.0, a, 0.1), obs=y)


def jumps(model):
    torch.set_default_dtype(torch.float64)
    joint = Joint(model, {"y": Y.double()})
    return find_jumps(joint, joint.start + torch.randn(256, joint.dim))


@pytest.mark.parametrize(
    ("model", "site", "places"),
    [(switch_point, "s", range(20)), (sign, "z", [0]), (rounded, "z", range(1000)),
     (looked_up, "z", [k + 0.5 for k in range(50)])],
)  # fmt: skip
def test_a_jump_is_found_where_it_is(model, site, places):
    (found,) = jumps(model)
    assert found.site == site
    assert min(abs(found.at - place) for place in places) < 1e-4
    assert abs(found.nats) > 0.1
    assert site in str(found)
    assert "vi.Score" in str(found)


def noisy(y):
    """A density estimated from random numbers of its own."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("likelihood", -((z - 1) ** 2) + 10 * float(torch.rand(())))


@pytest.mark.parametrize("model", [steep, kinked, bounded, noisy])
def test_a_density_that_is_steep_or_noisy_has_no_jump(model):
    assert jumps(model) == []


def test_a_switch_point_is_fitted_by_the_score_function():
    def model(y):
        s = pyro.sample("s", dist.Uniform(0.0, 20.0))
        with pyro.plate("times", 20):
            pyro.sample("y", dist.Normal(torch.where(s > TIMES, 0.0, 3.0), 1.0), obs=y)

    # The posterior is constant between the times: add up the intervals.
    k = torch.arange(20)
    log_p = dist.Normal(torch.where(k[:, None] >= TIMES, 0.0, 3.0), 1.0).log_prob(Y).sum(1)
    p = log_p.double().softmax(0)
    mean = float((p * (k + 0.5)).sum())
    sd = float((p * ((k + 0.5 - mean) ** 2 + 1 / 12)).sum().sqrt())
    fit = vi.fit(model, AutoNormal, {"y": Y}, progress=False)
    assert fit.method == "stochastic"
    assert "jumps in 's'" in fit.why
    assert fit.converged
    draws = fit.sample(4000)["s"].double()
    assert abs(float(draws.mean()) - mean) < 0.15 * sd
    assert 0.7 * sd < float(draws.std()) < sd  # a bell inside a box is narrower than the box


@pytest.mark.parametrize("options", [{"method": "deterministic"}, {"steps": 800}])
def test_who_asks_for_path_gradients_is_told_and_not_told_converged(options, tmp_path):
    if "steps" in options:
        options = options | {"estimator": vi.Reparam()}
    with pytest.warns(vi.ConvergenceWarning, match=r"jumps by .* where 'z' passes"):
        fit = vi.fit(sign, AutoNormal, {"y": Y}, progress=False, **options)
    assert not fit.converged
    fit.save(tmp_path / "fit")
    again = vi.load(tmp_path / "fit", sign, AutoNormal)
    assert not again.converged
    assert again.convergence == fit.convergence


def test_a_jump_is_seen_in_minibatches_too():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(torch.where(z > 0.1, 0.1, -0.1), 1.0), obs=y)

    y = torch.randn(6_000, generator=torch.Generator().manual_seed(0))
    options = {"subsample": {"rows": 50}, "steps": 20, "estimator": vi.Reparam()}
    with pytest.warns(vi.ConvergenceWarning, match=r"jumps by .* where 'z' passes 0\.1"):
        vi.fit(model, AutoNormal, {"y": y}, optimizer=0.3, progress=False, **options)
