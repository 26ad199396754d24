"""Changes between and during runs: a compiled step never stays what it was."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.compiled.checks import accelerator_of, assert_same, interpret
from tests.compiled.models import DATA, X, Y, coin, coin_guide, log_normal, regression
from vi_toolkit.compiled import steps

temperature = 1.0


sizes = {"n": 30}


def tempered(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    n = sizes["n"]
    with pyro.plate("data", n), poutine.scale(scale=temperature):
        pyro.sample("y", dist.Normal(X[:n] @ w, 1.0), obs=y[:n])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("what", ["global", "plate size", "rate"])
def test_changes_by_a_callback_are_followed(what, monkeypatch):
    """A callback changes a global, a plate's size or the learning rate in mid-fit."""
    optimizers = []

    def adam(leaves):
        optimizers.append(torch.optim.Adam(leaves, lr=0.02))
        return optimizers[-1]

    def callback(look):
        if what == "global":
            monkeypatch.setitem(globals(), "temperature", 0.5)
        elif what == "plate size":
            monkeypatch.setitem(sizes, "n", 20)
        else:
            optimizers[-1].param_groups[0]["lr"] = 0.1
        return False

    fits = []
    for compile in (False, True):
        fits.append(
            vi.fit(
                tempered,
                AutoNormal,
                DATA,
                steps=700,
                optimizer=adam,
                compile=compile,
                callback=callback,
                progress=False,
            )
        )
        monkeypatch.undo()
        monkeypatch.setattr(steps, "compile_loop", interpret)
    assert_same(*fits, 1e-3)
    before, after = fits[1].elbo[600:640].mean(), fits[1].elbo[640:].mean()
    assert what == "rate" or after > before + 3  # fewer or weaker terms: a higher ELBO


@pytest.mark.usefixtures("interpreted")
def test_data_changed_between_two_runs_are_seen():
    """Also where their values decided a shape, or left the loop as constants."""

    def model(counts, group):
        rates = pyro.sample(
            "rates", dist.Gamma(2.0, 1.0).expand([int(group.max()) + 1]).to_event(1)
        )
        with pyro.plate("data", 30):
            pyro.sample("counts", dist.Poisson(rates[group]), obs=counts)

    fits = []
    for compile in (False, True):
        data = {"counts": Y.abs().round(), "group": (X[:, 0] > 0).long()}
        fit = vi.fit(model, AutoNormal, data, steps=20, compile=compile, progress=False)
        fit.workspace.data["counts"].add_(7.0)
        fits.append(fit.extend(20))
    assert_same(*fits)
    assert fits[1].elbo[20:].mean() < fits[1].elbo[:20].mean() - 20


@pytest.mark.usefixtures("interpreted")
def test_a_buffer_that_the_model_changes_is_state():
    class Noise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, w):
            self.calls += 1
            self.mean.mul_(0.9).add_(0.1 * w.detach())
            return 0.1 * self.mean

    fits = []
    for compile in (False, True):
        module = Noise()

        def model(X, y, module=module):
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            with pyro.plate("data", 30):
                pyro.sample("y", dist.Normal(X @ (w + module(w)), 1.0), obs=y)

        fits.append(
            vi.fit(
                model, AutoNormal, DATA, steps=50, compile=compile, optimizer=0.02, progress=False
            )
        )
        fits[-1].module = module
    assert_same(*fits)
    eager, compiled = (fit.module for fit in fits)
    assert eager.calls == compiled.calls  # traces and checks leave no mark
    torch.testing.assert_close(compiled.mean, eager.mean, rtol=1e-4, atol=1e-5)


class Baseline(Trace_ELBO):
    """Score function with a running mean, kept in tensors changed in place."""

    def __init__(self):
        super().__init__()
        self.mean, self.count = torch.zeros(()), torch.zeros(())

    def differentiable_loss(self, model, guide, *args, **kwargs):
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            log_p, log_q = model_trace.log_prob_sum(), guide_trace.log_prob_sum()
            cost = (log_q - log_p).detach()
            surrogate = log_q * (cost - self.mean)
            self.count += 1
            self.mean += (cost - self.mean) / self.count
        return cost + surrogate - surrogate.detach()

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()


@pytest.mark.usefixtures("interpreted")
def test_an_estimator_with_buffers():
    fits, estimators = [], [Baseline(), Baseline()]
    for compile, estimator in zip((False, True), estimators, strict=True):
        fits.append(
            vi.fit(
                coin,
                coin_guide,
                DATA,
                steps=50,
                estimator=estimator,
                compile=compile,
                optimizer=0.02,
                progress=False,
            )
        )
    assert_same(*fits)
    assert estimators[0].count == estimators[1].count == 50
    torch.testing.assert_close(estimators[1].mean, estimators[0].mean)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.usefixtures("interpreted")
def test_an_estimator_that_settles_something_goes_on_compiled_from_a_file(tmp_path):
    options = {"estimator": vi.Score(4, vi.RunningMean()), "optimizer": 0.02, "progress": False}
    fit = vi.fit(regression, AutoNormal, DATA, steps=40, compile=True, **options)
    fit.save(tmp_path / "fit")
    loaded = vi.load(tmp_path / "fit", regression, AutoNormal)
    assert np.array_equal(fit.extend(20).elbo, loaded.extend(20).elbo)
    assert accelerator_of(loaded).active


def test_a_parameter_replaced_from_outside_raises_as_it_does_eagerly():
    def callback(look):
        pyro.get_param_store()["loc"] = torch.ones(3)
        return False

    for compile in (False, True):
        with pytest.raises(ValueError, match="'loc' appeared only at step"):
            vi.fit(
                regression,
                log_normal,
                DATA,
                steps=700,
                callback=callback,
                compile=compile,
                progress=False,
            )
