"""Latents, observations and the guide's sites: which are missing, misspelt or declared wrongly."""

import sys
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal

from tests.preflight.mistakes import Case, check_message
from tests.preflight.models import (
    FREE,
    GY,
    XY,
    N,
    X,
    Y,
    columns,
    conjugate,
    discrete_guided,
    enumerated_mixture,
    hide,
    hierarchical,
    local,
    normal,
    plate_guide,
    positive,
    q,
    regression,
    sequential_repeated,
)
from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import preflight


def _sequential_enumeration(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    flip = pyro.sample("flip", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu * (1 - 2 * flip), 1.0), obs=y)


@config_enumerate
def _undeclared_enumeration(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    flip = pyro.sample("flip", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(mu * (1 - 2 * flip), 1.0).expand([len(y)]), obs=y)


def _observing_guide(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y.sum())


def _second_site(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def _name_taken(y):
    pyro.param("mu", torch.tensor(0.0))
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def _second_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def _colliding_plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2, dim=-1), pyro.plate("columns", 3, dim=-1):
        pyro.sample("z", dist.Normal(mu, 1.0))


def _all_observed(y):
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1), obs=y)


def globals_of(latents):
    def model(y):
        local(y)

    model.LATENTS = latents
    return model


def _other_size(X, y):
    columns(X, y)


_other_size.LATENTS = {"coefficients": (4,)}

CASES: dict[str, Case] = {
    "missing in the guide": Case(
        regression,
        q(sigma=dist.LogNormal(0.0, 1.0)),
        XY,
        ("does not sample the model's latent 'coefficients'", 'Add pyro.sample("coefficients"'),
        "coefficients",
    ),
    "misspelt in the guide": Case(
        positive,
        q(sigmma=dist.LogNormal(0.0, 1.0)),
        {"y": Y},
        ("'sigma'", "Rename the guide's 'sigmma' to 'sigma'"),
        "sigma",
    ),
    "hidden from the autoguide": Case(
        regression,
        AutoNormal(hide(regression, "sigma")),
        XY,
        ("'sigma'", "without hiding"),
        "sigma",
    ),
    "discrete": Case(
        discrete_guided, q(**FREE), {"y": Y}, ("'flip'", "MixtureSameFamily", "enumerate"), "flip"
    ),
    "discrete, autoguide": Case(
        discrete_guided, AutoNormal, {"y": Y}, ("'flip'", "MixtureSameFamily", "enumerate"), "flip"
    ),
    "enumerated without an estimator for it": Case(
        enumerated_mixture,
        AutoNormal(hide(enumerated_mixture, "component")),
        {"y": Y},
        ("'component'", "TraceEnum_ELBO"),
        "component",
    ),
    "sequential enumeration": Case(
        _sequential_enumeration,
        q(**FREE),
        {"y": Y},
        ("'flip'", '"parallel"'),
        "flip",
        {"enumerate": True},
    ),
    "enumeration without plates": Case(
        _undeclared_enumeration,
        q(**FREE),
        {"y": Y},
        ("'y'", "pyro.plate", "to_event"),
        "y",
        {"enumerate": True},
    ),
    "extra in the guide": Case(
        conjugate, q(**FREE, tau=normal()), {"y": Y}, ("'tau'", "is_auxiliary"), "tau"
    ),
    "extra and similar": Case(
        conjugate, q(**FREE, mu2=normal()), {"y": Y}, ("'mu2'", "did you mean 'mu'"), "mu2"
    ),
    "guide samples an observation": Case(
        conjugate,
        q(**FREE, y=normal(N)),
        {"y": Y},
        ("'y', which the model observes", "Remove"),
        "y",
    ),
    "guide samples a deterministic site": Case(
        hierarchical,
        q(mu=normal(), tau=dist.LogNormal(0.0, 1.0), theta=normal(4), largest=normal()),
        GY,
        ("'largest'", "computes (pyro.deterministic)", "Remove"),
        "largest",
    ),
    "guide observes": Case(
        conjugate, _observing_guide, {"y": Y}, ("guide observes 'y'", "obs="), "y"
    ),
    "two sites of one name": Case(
        sequential_repeated, AutoNormal, {"y": Y}, ("two sites named 'z'", 'f"z_{i}"'), "z"
    ),
    "two sites of one name in the guide": Case(
        conjugate, _second_site, {"y": Y}, ("The guide has two sites named 'mu'",), "mu"
    ),
    "parameter and site of one name": Case(
        conjugate, _name_taken, {"y": Y}, ("'mu' for a parameter and", "Rename"), "mu"
    ),
    "plate made twice": Case(
        _second_plate, AutoNormal, {"y": Y}, ("plate 'observations' twice", "once"), "observations"
    ),
    "plates collide": Case(
        _colliding_plates, AutoNormal, {"y": Y}, ("'rows'", "'columns'", "dim=-2"), "columns"
    ),
    "no latent": Case(_all_observed, q(), {"y": Y}, ("no latent variable", "without obs"), None),
    "forgotten observation": Case(
        regression, AutoNormal, {"X": X}, ("'y' is None", 'Add data["y"]'), "y"
    ),
    "global latent inside a data plate": Case(
        globals_of({"mu": (), "z": ()}),
        plate_guide("observations", N),
        {"y": Y},
        ("'z' a global scalar", "inside plate 'observations'", "Move"),
        "z",
    ),
    "LATENTS names no site": Case(
        globals_of({"mu": (), "zz": ("observations",)}),
        plate_guide("observations", N),
        {"y": Y},
        ("'zz'", "Write 'z'"),
        "zz",
    ),
    "LATENTS of other dims": Case(
        globals_of({"mu": ("predictors",)}),
        plate_guide("observations", N),
        {"y": Y},
        ("'mu' with dims ('predictors',)", "shape ()"),
        "mu",
    ),
    "LATENTS of another size": Case(
        _other_size,
        AutoNormal,
        XY,
        ("'coefficients' with dims (4,)", "shape (3,)", "Correct"),
        "coefficients",
    ),
    "LATENTS is no tuple": Case(
        globals_of({"mu": "predictors"}),
        plate_guide("observations", N),
        {"y": Y},
        ("LATENTS['mu'] is a str", "tuple"),
        "mu",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_the_site_and_the_remedy(name):
    check_message(CASES[name])


def test_latents_declared_in_a_module_belong_to_its_model(monkeypatch):
    module = types.ModuleType("recipe")
    module.LATENTS = {"z": ()}
    monkeypatch.setitem(sys.modules, "recipe", module)

    def model(y):
        local(y)

    def other(y):
        local(y)

    model.__module__ = other.__module__ = "recipe"
    module.model = model
    with pytest.raises(PreflightError, match="'z' a global scalar"):
        preflight(model, AutoNormal, {"y": Y})
    with pytest.raises(PreflightError, match="'z' a global scalar"):
        preflight(poutine.scale(model, scale=2.0), AutoNormal, {"y": Y})
    preflight(other, AutoNormal, {"y": Y})
