"""Shapes, plates and minibatches that do not fit together."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from tests.preflight.mistakes import Case, check_message
from tests.preflight.models import (
    FREE,
    XY,
    N,
    Y,
    conjugate,
    local,
    normal,
    observed,
    plate_guide,
    q,
)


def forgets(X, y=None):
    pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(X.sum(-1), 1.0).to_event(1), obs=y)


def _subsampling(size):
    def run(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("observations", len(y), subsample_size=size) as i:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            if size == 4:
                pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    return run


def _fixed_plate(X, y=None):
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("observations", 10):
        pyro.sample("y", dist.Normal(X @ coefficients, 1.0), obs=y)


def _short_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", 10):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def _empty_plate(y):
    with pyro.plate("groups", len(y) - N):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def _forgets_to_index(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y), subsample_size=4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def _column(X, y=None):
    """The mean has shape (n, 1), the observation (n,)."""
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(X @ coefficients, 1.0), obs=y)


CASES: dict[str, Case] = {
    "shape": Case(
        forgets,
        q(coefficients=normal(2).to_event(1)),
        XY,
        ("'coefficients'", "event shape (3,) in the model", "(2,) in the guide", "shape (3,)"),
        "coefficients",
    ),
    "batch for event": Case(
        forgets,
        q(coefficients=normal(3)),
        XY,
        ("batch shape () and event shape (3,)", "Call .to_event(1)"),
        "coefficients",
    ),
    "event for batch": Case(
        local,
        plate_guide("observations", N, normal(N, 2).to_event(1)),
        {"y": Y},
        ("'z'", "without .to_event"),
        "z",
    ),
    "Delta without event_dim": Case(
        forgets,
        q(coefficients=dist.Delta(torch.zeros(3))),
        XY,
        ("event shape (3,)", "event_dim=1"),
        "coefficients",
    ),
    "scalar for a vector": Case(
        forgets,
        q(coefficients=normal()),
        XY,
        ("'coefficients'", "shape (3,)", "to_event(1)"),
        "coefficients",
    ),
    "plate missing in the guide": Case(
        local,
        q(**FREE, z=normal(N)),
        {"y": Y},
        ("'z' inside plate 'observations'", f'with pyro.plate("observations", {N})'),
        "z",
    ),
    "joint draw over a plate": Case(
        local,
        q(**FREE, z=normal(N).to_event(1)),
        {"y": Y},
        ("'z' inside plate 'observations'", "is_auxiliary", "dist.Delta"),
        "z",
    ),
    "plate misspelt in the guide": Case(
        local, plate_guide("observation", N), {"y": Y}, ("it is inside 'observation'",), "z"
    ),
    "plate size": Case(
        local,
        plate_guide("observations", 8),
        {"y": Y},
        ("'observations'", f"{N} in the model and 8 in the guide", f"{N}) in the guide"),
        "observations",
    ),
    "minibatch size": Case(
        _subsampling(4),
        _subsampling(3),
        {"y": Y},
        ("4 in the model and 3 in the guide", "same"),
        "observations",
    ),
    "plate and data": Case(
        _fixed_plate,
        AutoNormal,
        XY,
        ("plate 'observations' has size 10", f"'y' inside it has size {N}", f"{N})"),
        "y",
    ),
    "plate and observation": Case(
        _short_plate,
        AutoNormal,
        {"y": Y},
        ("Observed site 'y'", f"({N},)", "plate 'observations' of size 10", "len(y)"),
        "y",
    ),
    "empty plate": Case(
        _empty_plate, AutoNormal, {"y": Y}, ("Plate 'groups'", "size 0", "Size it"), "groups"
    ),
    "minibatch and observation": Case(
        _forgets_to_index,
        AutoNormal,
        {"y": Y},
        ("'y'", f"({N},)", "plate 'observations' of size 4", "obs=y[i]"),
        "y",
    ),
    "observation broadcast": Case(
        _column, AutoNormal, XY, ("'y'", f"counted {N} times", "squeeze"), "y"
    ),
    "subsample, misspelt": Case(
        conjugate,
        AutoNormal,
        {"y": Y},
        ("'observation'", "Write 'observations'"),
        "observation",
        {"subsample": {"observation": 5}},
    ),
    "subsample without plates": Case(
        observed(lambda z, y: dist.Normal(z, 1.0).expand([N]).to_event(1)),
        AutoNormal,
        {"y": Y},
        ("it has none",),
        "observations",
        {"subsample": {"observations": 5}},
    ),
    "subsample of nothing": Case(
        conjugate,
        AutoNormal,
        {"y": Y},
        ("asks for 0", f"from 1 to {N}"),
        "observations",
        {"subsample": {"observations": 0}},
    ),
    "subsample of more": Case(
        conjugate,
        AutoNormal,
        {"y": Y},
        ("asks for 99", f"from 1 to {N}"),
        "observations",
        {"subsample": {"observations": 99}},
    ),
    "subsample of a fraction": Case(
        conjugate,
        AutoNormal,
        {"y": Y},
        ("asks for 0.5", "whole number"),
        "observations",
        {"subsample": {"observations": 0.5}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_the_site_and_the_remedy(name):
    check_message(CASES[name])
