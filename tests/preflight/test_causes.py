"""Errors raised by the model or the guide, and densities that are not finite."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from tests.preflight.mistakes import Case, check_message
from tests.preflight.models import COUNTS, XY, N, Y, conjugate, observed, q, raises_later
from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import preflight


def _factor_nan(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -torch.log(-(mu.abs()) - 1))


def _mixed_shapes(X, y=None):
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    pyro.sample("y", dist.Normal(X @ coefficients, 1.0).to_event(1), obs=y)


def _factor_of_other_shape(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    pyro.factor("likelihood", dist.Normal(mu, 1.0).log_prob(y).sum())


def _value_dependent(y):
    """Runs at any prior draw, fails where the guide goes."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ["only", "two"][int(mu.abs() > 50) * 5]
    pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


CASES: dict[str, Case] = {
    "observation outside its support": Case(
        observed(lambda z, y: dist.Poisson(z.exp()).expand([N]).to_event(1)),
        AutoNormal,
        {"y": COUNTS - 2},
        ("'y'", "-2 at index 0", "Poisson", "integers from 0", "Correct the data"),
        "y",
    ),
    "density zero": Case(
        observed(lambda z, y: dist.LogNormal(z, 1.0).expand([N]).to_event(1)),
        AutoNormal,
        {"y": COUNTS.float()},
        ("the observation 0 at index 0", "LogNormal, (0, inf)"),
        "y",
    ),
    "factor that is nan": Case(
        _factor_nan, AutoNormal, {"y": Y}, ("model raised", "log_factor", "nan"), "mu"
    ),
    "bad constant": Case(
        observed(lambda z, y: dist.Normal(z, -1.0).expand([N]).to_event(1)),
        AutoNormal,
        {"y": Y},
        ("model raised ValueError", "'z'", "scale", "by itself"),
        "z",
    ),
    "shapes inside the model": Case(
        _mixed_shapes,
        AutoNormal,
        XY,
        ("model raised RuntimeError", "'coefficients'"),
        "coefficients",
    ),
    "shapes inside a density": Case(
        _factor_of_other_shape,
        AutoNormal,
        {"y": Y},
        ("model raised ValueError", "not broadcastable", "by itself"),
        "mu",
    ),
    "error in the model": Case(
        raises_later, AutoNormal, {"y": Y}, ("model raised KeyError", "no such column"), "y"
    ),
    "error in the guide": Case(
        conjugate,
        lambda y: pyro.sample("mu", dist.Normal(y, 1.0).to_event(3)),
        {"y": Y},
        ("guide raised ValueError",),
        None,
    ),
    "error on the guide's draws": Case(
        _value_dependent,
        q(mu=dist.Normal(1000.0, 1.0)),
        {"y": Y},
        ("model raised IndexError", "guide's draws"),
        "mu",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_the_site_and_the_remedy(name):
    check_message(CASES[name])


def test_the_error_keeps_its_cause():
    with pytest.raises(PreflightError) as caught:
        preflight(raises_later, AutoNormal, {"y": Y})
    assert isinstance(caught.value.__cause__, KeyError)
