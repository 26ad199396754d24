"""The fields of a reference are checked, and what follows from them is right."""

import dataclasses

import numpy as np
import pytest

from tests.reference.models import COVARIANCE
from vi_toolkit.errors import InvalidReferenceError
from vi_toolkit.reference import Reference


def test_exact_gaussian():
    r = Reference.exact(["a", "b", "c"], [1.0, 2.0, 3.0], COVARIANCE, log_evidence=-1.5)
    assert r.near_gaussian
    assert r.sd == pytest.approx([1, 1, 2])
    precision = np.linalg.inv(COVARIANCE)
    expected = (precision.diagonal() * COVARIANCE.diagonal()) ** -0.5
    assert r.mean_field_sd_ratio == pytest.approx(expected, rel=1e-12)
    assert r.quantiles["95%"] == pytest.approx(r.mean + 1.6448536 * r.sd)
    assert not r.mean_se.any()
    assert r.log_evidence == -1.5
    assert list(r.table.index) == ["a", "b", "c"]
    assert repr(r) == "Reference(exact, 3 scalars, near-Gaussian)"


def test_mean_field_ratio_does_not_depend_on_units():
    scale = np.array([1e-6, 1.0, 1e7])
    one = Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE)
    other = Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE * np.outer(scale, scale))
    assert other.mean_field_sd_ratio == pytest.approx(one.mean_field_sd_ratio, rel=1e-12)


@pytest.mark.parametrize(
    ("skewness", "kurtosis", "near"), [(0.24, -0.34, True), (-0.26, 0, False), (0, 0.36, False)]
)
def test_near_gaussian(skewness, kurtosis, near):
    r = Reference.exact(
        ["a", "b"], [0, 0], np.eye(2), skewness=[0, skewness], excess_kurtosis=[kurtosis, 0]
    )
    assert r.near_gaussian is near
    assert r.quantiles == {}  # the Normal's would be wrong


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "guess"}, "kind"),
        ({"names": ["a", "a", "c"]}, "distinct"),
        ({"mean": np.zeros(2)}, "mean must have shape"),
        ({"sd": np.array([1.0, 0.0, 2.0])}, "b does not vary"),
        ({"skewness": np.array([0.0, np.nan, 0.0])}, "skewness of b"),
        ({"quantiles": {"6%": np.zeros(3)}}, "unknown quantile"),
        ({"covariance": COVARIANCE + np.triu(np.ones((3, 3)), 1)}, "not symmetric"),
        ({"covariance": COVARIANCE * 1.1}, "diagonal"),
    ],
)
def test_inconsistent_fields_are_refused(change, complaint):
    r = Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE)
    with pytest.raises(InvalidReferenceError, match=complaint):
        dataclasses.replace(r, **change)


def test_an_invalid_reference_has_no_numbers_to_show():
    with pytest.raises(InvalidReferenceError) as caught:
        Reference.exact(["a"], [0.0], [[0.0]])
    assert caught.value.reference is None
