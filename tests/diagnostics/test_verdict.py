"""The verdict is trust, trust in the means only, or no trust, each where it is right."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.models import SCHOOLS, eight_schools, gaussian
from tests.support import fitted
from tests.tolerances import Z


def test_an_exact_fit_is_trusted():
    found = vi.diagnose(fitted(gaussian(0.9), AutoMultivariateNormal), num_draws=10_000)
    assert found.verdict == "trust"
    assert not found.next_steps


def test_mean_field_is_trusted_for_its_means_and_the_correction_is_right():
    found = vi.diagnose(fitted(gaussian(0.9), AutoNormal), num_draws=20_000)
    assert found.verdict == "trust the means only"
    assert found.table["sd ratio"].to_numpy() == pytest.approx(0.19**0.5, rel=0.05)
    assert "linear_response" in found.next_steps[0]
    assert found.moments.sd == pytest.approx(1, rel=0.05)


def test_means_that_are_off_are_not_trusted():
    """A gamma posterior with shape 1.5: the best Gaussian of its log is centred elsewhere."""

    def model():
        pyro.sample("rate", dist.Gamma(0.4, 1.0))

    fit = fitted(model, AutoNormal)
    found = vi.diagnose(fit)
    # E[log rate] = digamma(0.4)
    truth = float(torch.digamma(torch.tensor(0.4)))
    off = abs(float(fit.sample(50_000)["rate"].log().mean()) - truth) / float(
        torch.polygamma(1, torch.tensor(0.4)).sqrt()
    )
    assert off > 0.05
    assert found.verdict == "do not trust"


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_the_centred_eight_schools_are_not_trusted(guide):
    found = vi.diagnose(fitted(eight_schools, guide, SCHOOLS), num_draws=20_000, chains=False)
    assert found.verdict == "do not trust"
    assert found.pareto_k.k > 0.7
    assert found.next_steps


def test_a_fit_that_has_not_converged_is_not_trusted():
    found = vi.diagnose(fitted(gaussian(0.5), AutoNormal, steps=5))
    assert found.verdict == "do not trust"
    assert found.pareto_k is None
    assert "extend" in found.next_steps[0]


def test_a_point_estimate_is_refused():
    with pytest.raises(ValueError, match="point"):
        vi.diagnose(fitted(gaussian(0.5), AutoDelta))


def test_a_seed_repeats_the_report_which_can_be_stored_and_drawn(tmp_path):
    fit = fitted(gaussian(0.9), AutoNormal)
    first, again = (vi.diagnose(fit, num_draws=2_000, seed=5) for _ in range(2))
    assert repr(first) == repr(again)
    assert json.loads(json.dumps(first.to_dict()))["verdict"] == first.verdict
    for found in (first, vi.diagnose(fitted(gaussian(0.5), AutoNormal, steps=5))):
        found.plot().savefig(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000


def test_the_diagnosis_includes_bounds_and_evidence():
    right = vi.diagnose(fitted(gaussian(0.9), AutoMultivariateNormal), num_draws=10_000)
    assert right.bounds.mean.max() < 0.01
    assert abs(right.evidence.gap) < Z * right.evidence.gap_se + 1e-3
    narrow = vi.diagnose(fitted(gaussian(0.9), AutoNormal), num_draws=20_000)
    assert narrow.bounds is None  # k-hat is 0.9
    expected = -0.5 * math.log(1 - 0.9**2)
    assert abs(narrow.evidence.gap - expected) < Z * narrow.evidence.gap_se
    assert narrow.to_dict()["gap"] == narrow.evidence.gap
    assert "evidence" in repr(narrow)
