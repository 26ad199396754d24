"""Data that no run can use, arguments that do not match, and types that the model cannot take."""

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from tests.preflight.mistakes import Case, check_message
from tests.preflight.models import (
    BINARY,
    COUNTS,
    XY,
    N,
    X,
    Y,
    columns,
    conjugate,
    conjugate_guide,
    density,
    horseshoe,
    regression,
    regression_guide,
    simplex,
)
from vi_toolkit.preflight import preflight


def with_nan(*indices):
    bad = Y.clone()
    bad[list(indices)] = float("nan")
    return bad


class _Scaled(torch.nn.Module):
    """Has single-precision weights, whatever the data."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, X, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + self.linear(X)[:, 0], 1.0).to_event(1), obs=y)


CASES: dict[str, Case] = {
    "data is no dict": Case(conjugate, AutoNormal, [Y], ("a list", '{"X": X'), None),
    "key is no string": Case(conjugate, AutoNormal, {1: Y}, ("key 1", "strings"), "1"),
    "guide cannot be called": Case(conjugate, None, {"y": Y}, ("The guide is a NoneType",), None),
    "missing argument": Case(regression, AutoNormal, {"y": Y}, ("'X'", 'Add data["X"]'), "X"),
    "misspelt argument": Case(
        regression, AutoNormal, {"x": X, "y": Y}, ("'X'", 'Rename data["x"] to "X"'), "X"
    ),
    "unexpected argument": Case(
        conjugate, AutoNormal, {"y": Y, "weights": Y}, ("'weights'", "takes y", "Remove"), "weights"
    ),
    "misspelt optional argument": Case(
        regression, AutoNormal, {"X": X, "Y": Y}, ("'Y'", 'Rename data["Y"] to "y"'), "Y"
    ),
    "guide's arguments": Case(
        regression, conjugate_guide, XY, ("guide has no argument 'X'", "def guide(X, y)"), "X"
    ),
    "guide needs more": Case(
        conjugate, regression_guide, {"y": Y}, ("The guide needs the argument 'X'",), "X"
    ),
    "one nan": Case(conjugate, AutoNormal, {"y": with_nan(4)}, ("nan at index 4", "mask"), "y"),
    "several nans": Case(
        conjugate, AutoNormal, {"y": with_nan(2, 7)}, ("2 values", "nan at index 2"), "y"
    ),
    "infinity": Case(conjugate, AutoNormal, {"y": Y / 0}, (f"{N} values", "inf at index 0"), "y"),
    "nan inside a list": Case(
        conjugate, AutoNormal, {"y": [Y, with_nan(0)]}, ("nan at index 0",), "y"
    ),
    "nan in an array": Case(
        conjugate, AutoNormal, {"y": with_nan(3).numpy()}, ("nan at index 3",), "y"
    ),
    "empty": Case(regression, AutoNormal, {"X": X[:0], "y": Y}, ("is empty", "filter"), "X"),
    "two devices": Case(
        regression,
        AutoNormal,
        {"X": X, "y": Y.to("meta")},
        ('data["X"] is on cpu but data["y"] is on meta', '.to("cpu")'),
        "y",
    ),
    "two dtypes": Case(
        regression,
        AutoNormal,
        {"X": X, "y": Y.double()},
        ("float32", "float64", 'data["y"].to(torch.float32)'),
        "y",
    ),
    "integers": Case(
        regression,
        AutoNormal,
        {"X": X.round().long(), "y": Y},
        ('data["X"] is int64', "floats", 'Pass data["X"].float()'),
        "X",
    ),
    "integers, float64": Case(
        regression,
        AutoNormal,
        {"X": X.round().long(), "y": Y.double()},
        ('Pass data["X"].double()',),
        "X",
    ),
    "integer observations": Case(
        horseshoe, AutoNormal, {"X": X, "y": BINARY.long()}, ('Pass data["y"].float()',), "y"
    ),
    "boolean observations": Case(
        horseshoe, AutoNormal, {"X": X, "y": BINARY.bool()}, ("bool", 'data["y"].float()'), "y"
    ),
    "integers twice": Case(
        horseshoe,
        AutoNormal,
        {"X": X.long(), "y": BINARY.long()},
        ('data["X"].float() and data["y"].float()',),
        "X",
    ),
    "integers in the guide": Case(
        simplex,
        lambda counts: pyro.sample("probs", dist.Dirichlet(counts @ torch.eye(5))),
        {"counts": COUNTS[:5]},
        ("the guide needs floats", 'data["counts"].float()'),
        "counts",
    ),
    "array": Case(
        regression,
        AutoNormal,
        {"X": X, "y": Y.numpy()},
        ("a numpy.ndarray", 'torch.as_tensor(data["y"])'),
        "y",
    ),
    "list": Case(
        regression,
        AutoNormal,
        {"X": X, "y": Y.tolist()},
        ("a list", 'torch.as_tensor(data["y"])'),
        "y",
    ),
    "integer array": Case(
        regression,
        AutoNormal,
        {"X": X.round().long().numpy(), "y": Y},
        ('torch.as_tensor(data["X"]).float()',),
        "X",
    ),
    "table": Case(
        regression,
        AutoNormal,
        {"X": pd.DataFrame(X.numpy()), "y": Y},
        ("a pandas.DataFrame", 'torch.as_tensor(data["X"].to_numpy())'),
        "X",
    ),
    "weights of another dtype": Case(
        _Scaled(),
        AutoNormal,
        {"X": X.double(), "y": Y.double()},
        ("float64", "computes in float32", "to(torch.float32)"),
        "X",
    ),
    "half precision": Case(
        columns,
        AutoNormal,
        {"X": X.bfloat16(), "y": Y.bfloat16()},
        ("are bfloat16", "computes in float32", 'data["y"].to(torch.float32)'),
        "X",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_the_site_and_the_remedy(name):
    check_message(CASES[name])


def test_data_that_are_not_observed_cause_a_warning():
    with pytest.warns(UserWarning, match="observes nothing"):
        preflight(density, AutoNormal, {"covariance": torch.eye(2)})
