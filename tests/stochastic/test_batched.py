"""Restarts whose steps are taken at once are the fits made one after the other."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.compiled.checks import interpret
from tests.compiled.models import regression
from tests.models import regression as conjugate
from tests.models import regression_data, regression_posterior
from tests.stochastic.restarts import fit, from_anywhere, starts_of
from tests.tolerances import Z
from vi_toolkit.compiled import steps
from vi_toolkit.compiled.batched import BatchedFits
from vi_toolkit.programs.leaves import flat
from vi_toolkit.stochastic import restarts
from vi_toolkit.stochastic.stages import ERROR_TOLERANCE


@pytest.mark.parametrize("subsample", [None, 7], ids=["full", "minibatches"])
@pytest.mark.parametrize("compiler", ["machine code", "interpreted"])
def test_fits_without_noise_are_those_made_one_after_the_other(subsample, compiler, monkeypatch):
    """A point estimate draws nothing, so that nothing but rounding may differ."""
    if compiler == "interpreted":
        monkeypatch.setattr(steps, "compile_loop", interpret)
    elif subsample:
        pytest.skip("once is enough")
    guide = from_anywhere(AutoDelta)
    # (Of 30 rows the fifth minibatch is short: it would be the next after 64 steps.)
    options = {"steps": 64, "restarts": 3, "subsample": subsample and {"data": subsample}}
    alone = fit(regression, guide, compile=False, **options)
    at_once = fit(regression, guide, compile=True, **options)
    assert len(set(np.round(alone.restarts, 6))) == 3  # they started from different places
    np.testing.assert_allclose(at_once.restarts, alone.restarts, rtol=1e-5)
    np.testing.assert_allclose(at_once.elbo, alone.elbo, rtol=2e-5)
    for name, value in alone.params.items():
        torch.testing.assert_close(at_once.params[name], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.usefixtures("interpreted")
def test_each_has_draws_of_its_own(family, monkeypatch):
    """Fits from one and the same start part at once, and their noise has no correlation."""
    guide = family(regression, init_scale=0.3)
    fits = starts_of(
        lambda: fit(regression, guide, steps=150, restarts=4, compile=True, optimizer=1e-6),
        monkeypatch,
    )
    elbos = np.array([one.elbo for one in fits])[:, 2:]
    correlation = np.corrcoef(elbos) - np.eye(4)
    assert np.abs(correlation).max() < Z / math.sqrt(elbos.shape[1])
    assert (elbos.std(1) > 0).all()


def test_left_open_each_ends_when_it_has_converged(monkeypatch):
    data = regression_data(n=20)
    mean, covariance, _ = regression_posterior(**data)
    found, ended = [], {}
    original = BatchedFits._take

    def checking(self, running, most):
        for k, one in enumerate(self.fits):
            if k not in running:
                state = [flat(one.leaves), one.block_sum.clone()]
                state += [v.clone() for p in one.leaves for v in one.optimizer.state[p].values()]
                assert all(map(torch.equal, state, ended.setdefault(k, state)))
        return original(self, running, most)

    monkeypatch.setattr(BatchedFits, "_take", checking)
    fits = starts_of(
        lambda: found.append(fit(conjugate, AutoNormal, data, restarts=3, compile=True)),
        monkeypatch,
    )
    assert all(one.converged for one in fits)
    assert len({one.step for one in fits}) > 1  # and not all at once
    assert ended  # and those that had ended stayed as they were
    assert all(len(one.elbo) == one.step for one in fits)
    for one in fits:  # whichever is kept, all are right
        loc = one.result()[: len(mean)]
        error = (loc - mean).abs() / covariance.diagonal().sqrt()
        assert float(error.max()) < 2 * ERROR_TOLERANCE
    (best,) = found
    assert best.converged and len(best.restarts) == 3
    assert best.elbo_estimate(200)[0] == pytest.approx(max(best.restarts), rel=1e-6)


@pytest.mark.usefixtures("interpreted")
def test_left_open_they_end_all_the_same(monkeypatch):
    monkeypatch.setattr(restarts, "MOST_COMPILED_STEPS", 70)
    found = fit(regression, from_anywhere(AutoNormal), restarts=2, compile=True)
    assert len(found.elbo) == 70 and not found.converged


@pytest.mark.parametrize(
    "estimator",
    [vi.Reparam(3), vi.Score(4, vi.RunningMean()), vi.Reparam(analytic_kl=True)],
    ids=repr,
)
@pytest.mark.usefixtures("interpreted")
def test_estimators(estimator, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", vi.CompileWarning)
        fits = starts_of(
            lambda: fit(
                regression,
                from_anywhere(AutoNormal),
                estimator=estimator,
                steps=50,
                restarts=3,
                compile=True,
            ),
            monkeypatch,
        )
    assert [one.step for one in fits] == [50] * 3
    states = [one.estimator.state() if hasattr(one.estimator, "state") else {} for one in fits]
    for other in states[1:]:
        assert all(other[name] is not value for name, value in states[0].items())
        different = [not torch.equal(other[name], value) for name, value in states[0].items()]
        assert any(different) or not states[0]  # each learns from its own draws


@pytest.mark.usefixtures("interpreted")
def test_the_same_seed_gives_the_same_fits():
    one, other = (
        fit(regression, from_anywhere(AutoNormal), steps=40, restarts=3, compile=True)
        for _ in range(2)
    )
    assert one.restarts == other.restarts
    np.testing.assert_array_equal(one.elbo, other.elbo)


@pytest.mark.usefixtures("interpreted")
def test_the_best_can_be_kept_on_disk_and_extended(tmp_path):
    best = fit(regression, from_anywhere(AutoNormal), steps=40, restarts=3, compile=True)
    best.save(tmp_path / "fit")
    again = vi.load(tmp_path / "fit", regression, from_anywhere(AutoNormal))
    assert again.restarts == best.restarts
    for one in (best, again):
        one.progress = False
        one.extend(10)
    assert len(best.elbo) == 50
    np.testing.assert_array_equal(best.elbo, again.elbo)


@pytest.mark.usefixtures("interpreted")
def test_a_parameter_without_elements():
    def model(y):
        empty = pyro.param("empty", torch.zeros(0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w + empty.sum(), 1.0), obs=y)

    data = {"y": torch.tensor(2.0)}
    options = {"steps": 30, "restarts": 3}
    alone, at_once = (
        fit(model, from_anywhere(AutoDelta, model), data, compile=c, **options)
        for c in (False, True)
    )
    np.testing.assert_allclose(at_once.restarts, alone.restarts, rtol=1e-5)
