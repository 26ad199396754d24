"""The copy of a guide that a fit works on shares nothing with the original."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.preflight.models import GY, list_guide, parts
from tests.tolerances import Z
from vi_toolkit.programs.private_guide import private_guide


def test_a_private_guide_leaves_the_original_untouched():
    guide = list_guide()
    twin = private_guide(parts, guide)
    twin(**GY)
    assert guide.prototype_trace is None
    assert [part.model is not None for part in guide] == [True] * 3
    assert all(part.master() is guide for part in guide)
    assert all(part.master() is twin for part in twin)


Y = {"y": torch.tensor([1.0, 1.5, 1.6, 2.0, 0.3])}


def location_scale(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, s), obs=y)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda auto: lambda y: auto(y),
        lambda auto: poutine.scale(auto, 1.0),
        lambda auto: poutine.block(auto, hide=[]),
    ],
    ids=["function", "scale", "block"],
)
def test_functions_around_an_autoguide_are_guides(wrapped):
    plain = vi.fit(location_scale, AutoNormal, Y, progress=False)
    fit = vi.fit(location_scale, wrapped(AutoNormal(location_scale)), Y, progress=False)
    assert fit.converged
    for name in ("mu", "s"):
        mine, theirs = (f.sample(20_000)[name].log() if name == "s" else f.sample(20_000)[name]
                        for f in (fit, plain))  # fmt: skip
        error = float(theirs.std()) * (2 / 20_000) ** 0.5
        assert abs(float(mine.mean() - theirs.mean())) < Z * error + 0.02 * float(theirs.std())


@pytest.mark.parametrize(
    "factory",
    [functools.partial(AutoNormal, init_scale=0.01), lambda model: AutoNormal(model)],
    ids=["partial", "lambda"],
)
def test_factories_of_guides_are_called_on_the_model(factory, tmp_path):
    fit = vi.fit(location_scale, factory, Y, progress=False)
    assert fit.converged
    assert isinstance(fit.guide, AutoNormal)
    fit.save(tmp_path / "fit")
    again = vi.load(tmp_path / "fit", location_scale, factory)
    assert torch.equal(again.sample(2)["mu"], fit.sample(2)["mu"])


def test_a_guide_with_an_argument_called_model_is_no_factory():
    def by_name(model):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=model)

    def guide(model):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    fit = vi.fit(by_name, guide, {"model": torch.tensor(2.0)}, progress=False)
    assert float(fit.params["loc"]) == pytest.approx(1.0, abs=0.02)


def test_a_plate_without_a_size_takes_that_of_its_sites():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("plate"):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = vi.fit(model, AutoNormal, Y, progress=False)
    precision = 5 + 1 / 25
    assert float(fit.params["AutoNormal.locs.mu"]) == pytest.approx(6.4 / precision, abs=1e-2)
    assert float(fit.params["AutoNormal.scales.mu"]) == pytest.approx(precision**-0.5, rel=0.02)
