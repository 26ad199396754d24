"""What a baseline learns, how it is stored, and what it may not be asked for."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import vi_toolkit as vi
from tests.estimators.models import DATA, TOYS, B, Indexed, N, gradients
from tests.support import quietly

BASELINES = {
    "none": None,
    "running mean": vi.RunningMean(),
    "leave one out": vi.LeaveOneOut(),
    "control variate": vi.ControlVariate(),
    "per coordinate": vi.ControlVariate("coordinate", memory=0.8),
    "by site": {"z": vi.RunningMean(0.8)},
}


def test_a_baseline_per_datum_needs_to_know_the_datum():
    def model(y):
        with pyro.plate("n", 10, subsample=y):  # Pyro allows this: the data are the subsample
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("n", 10, subsample=y):
            pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    y = torch.tensor([0.3, 1.2])
    with pytest.raises(vi.PreflightError, match="one datum from another") as caught:
        vi.Score(1, vi.RunningMean()).loss_and_grads(model, guide, y)
    assert caught.value.site == "z"


def test_a_net_of_the_wrong_shape_or_input_is_named():
    pair = TOYS["mixed"].pair()
    wrong = vi.Neural(torch.nn.Linear(1, 3).double(), lambda data: data["x"][:, None])
    with pytest.raises(ValueError, match=r"'z'.*\(5, 3\)"):
        vi.Score(1, {"z": wrong}).loss_and_grads(*pair, **DATA)
    missing = vi.Neural(torch.nn.Linear(1, 1).double(), "images")
    with pytest.raises(ValueError, match="'images'"):
        vi.Score(1, {"z": missing}).loss_and_grads(*pair, **DATA)


@pytest.mark.parametrize("way", ["indices", "cut"])
def test_what_a_baseline_learns_belongs_to_the_datum(way):
    """Ragged minibatches (7 = 2 * 3 + 1): each datum's state counts its own visits only."""
    from vi_toolkit.programs.minibatches import PlatePlan

    cut = None if way == "indices" else ["y", "row"]
    plan = PlatePlan("n", 7, 3, cut)
    estimator = vi.Score(2, vi.RunningMean(0.5))
    visits = torch.zeros(7, dtype=torch.float64)
    model, guide = Indexed.model, Indexed.guide
    order = [[6, 0, 3], [5, 1, 2], [4], [2, 3, 6], [0, 5, 4]]
    if way == "cut":

        def model(y, row):
            with pyro.plate("n", len(y)):
                z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones((), dtype=y.dtype)))
                pyro.sample("y", dist.Normal(z, 0.5), obs=y)

        def guide(y, row):
            logits = pyro.param("logits", torch.zeros(7, dtype=y.dtype))
            with pyro.plate("n", len(y)):
                pyro.sample("z", dist.Bernoulli(logits=logits[row]))

    for rows in order:
        rows = torch.tensor(rows)
        data, handler = plan.apply(Indexed.data, rows)
        before = {k: v.clone() for k, v in estimator.state().items()}
        with handler:
            estimator.loss_and_grads(model, guide, **data)
        visits *= 1.0
        visits[rows] = 0.5 * visits[rows] + 1
        state = estimator.state()
        assert torch.equal(state["z/weight"], visits)
        untouched = [n for n in range(7) if n not in rows]
        if before:
            assert torch.equal(state["z/sum"][untouched], before["z/sum"][untouched])
            assert not torch.equal(state["z/sum"][rows], before["z/sum"][rows])
    assert not any("baseline" in name for name in pyro.get_param_store().keys())  # noqa: SIM118


@pytest.mark.parametrize("subsample", [None, {"n": 3}], ids=["full", "subsampled"])
@pytest.mark.parametrize("name", BASELINES)
def test_a_loaded_fit_continues_bit_for_bit(name, subsample, tmp_path):
    estimator = vi.Score(3, BASELINES[name])

    def fitted(steps):
        return quietly(
            Indexed.model, Indexed.guide, Indexed.data,
            estimator=estimator, steps=steps, subsample=subsample,
        )  # fmt: skip

    whole, part = fitted(60), fitted(25)
    part.save(tmp_path / "fit")
    loaded = vi.load(tmp_path / "fit", Indexed.model, Indexed.guide).extend(35)
    part.extend(35)
    for other in (part, loaded):
        assert np.array_equal(whole.elbo, other.elbo)
        assert torch.equal(whole.params["logits"], other.params["logits"])
    mine, theirs = whole.run.stages.estimator.state(), loaded.run.stages.estimator.state()
    assert mine.keys() == theirs.keys() and (mine or name in ("none", "leave one out"))
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert estimator.state() == {}  # what a fit's estimator learns is the fit's own


def test_a_net_must_be_given_again_and_then_continues_bit_for_bit(tmp_path):
    net = torch.nn.Linear(1, 1).double()
    estimator = vi.Score(2, vi.Neural(net, lambda data: data["y"][:, None]))
    options = {"estimator": estimator, "subsample": {"n": 3}}
    start = net.weight.detach().clone()
    whole = quietly(Indexed.model, Indexed.guide, Indexed.data, steps=40, **options)
    part = quietly(Indexed.model, Indexed.guide, Indexed.data, steps=15, **options)
    part.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="estimator="):
        vi.load(tmp_path / "fit", Indexed.model, Indexed.guide).extend(5)
    loaded = vi.load(tmp_path / "fit", Indexed.model, Indexed.guide, estimator=estimator)
    assert np.array_equal(loaded.extend(25).elbo, whole.elbo)
    assert torch.equal(net.weight, start)  # the caller's net is copied
    learnt = whole.run.stages.estimator.state()["z/net weight"]
    assert not torch.equal(learnt, start)


def test_a_net_reduces_variance_that_depends_on_the_data():
    """log p(y_n | z_n) has a part that x_n predicts; the net must find it."""
    x = torch.linspace(-3, 3, 40, dtype=torch.float64)

    def model(x):
        with pyro.plate("n", 40):
            z = pyro.sample("z", dist.Bernoulli(torch.full((), 0.5, dtype=x.dtype)))
            pyro.factor("y", 8 * x + 0.5 * z)

    def guide(x):
        with pyro.plate("n", 40):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.zeros(40).double())))

    variance = {}
    for name, baseline in {
        "net": vi.Neural(torch.nn.Linear(1, 1).double(), lambda d: d["x"][:, None], 0.05),
        "none": None,
    }.items():
        estimator = vi.Score(1, baseline)
        gradients(estimator, model, guide, {"x": x}, 300)
        variance[name] = float(gradients(estimator, model, guide, {"x": x}, 200).var(0).sum())
    assert variance["net"] < 0.05 * variance["none"]


def test_the_state_is_tensors_and_can_be_replaced():
    """What a tracer needs: the state as explicit tensors, updated in place."""
    model, guide = TOYS["mixed"].pair(B)
    estimator = vi.Score(2, vi.RunningMean())
    estimator.loss_and_grads(model, guide, **DATA)
    mine = {k: v.clone() for k, v in estimator.state().items()}
    assert mine["z/sum"].shape == (N,)
    estimator.load_state(mine)
    estimator.loss_and_grads(model, guide, **DATA)
    assert all(estimator.state()[k] is v for k, v in mine.items())
    assert float(mine["g/weight"]) == pytest.approx(1.9)
    with pytest.raises(ValueError, match="keeps no state"):
        vi.Reparam().load_state(mine)
