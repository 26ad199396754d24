"""Mean gradients agree with quadrature and enumeration, and wrong estimators fail the same test."""

import pytest
import torch

import vi_toolkit as vi
from tests.estimators.checks import assert_unbiased, is_caught, mean_test
from tests.estimators.models import DATA, TOYS, B, flat, gradient, gradients
from vi_toolkit.estimators.baselines import Baseline
from vi_toolkit.estimators.particles import total

SUBSAMPLE = pytest.mark.parametrize("subsample", [None, B], ids=["full", "subsampled"])


def net():
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def neural():
    return {"z": vi.Neural(net().double(), lambda data: data["x"][:, None]), "g": None}


ESTIMATORS = {
    "reparam": lambda s: vi.Reparam(s),
    "analytic KL": lambda s: vi.Reparam(s, analytic_kl=True),
    "path derivative": lambda s: vi.PathDerivative(s),
    "naive score": lambda s: vi.Score(s, rao_blackwell=False),
    "score": lambda s: vi.Score(s),
    "score of z": lambda s: vi.Score(s, vi.RunningMean(), sites=["z"]),
    "running mean": lambda s: vi.Score(s, vi.RunningMean()),
    "leave one out": lambda s: vi.Score(s, vi.LeaveOneOut()),
    "a* per factor": lambda s: vi.Score(s, vi.ControlVariate(least_correlation=0.2)),
    "a* per coordinate": lambda s: vi.Score(
        s, vi.ControlVariate("coordinate", least_correlation=0.2)
    ),
    "neural": lambda s: vi.Score(s, neural()),
    "enumerate": lambda s: vi.Enumerate(s),
}
NEEDS_PATHS = {"reparam", "analytic KL", "path derivative"}
CASES = [
    (kind, name, particles)
    for kind in TOYS
    for name in ESTIMATORS
    for particles in (1, 64)
    if (kind == "continuous" or name not in NEEDS_PATHS)
    and (kind != "continuous" or name != "enumerate")
    and not (kind == "discrete" and name == "score of z")  # g cannot be reparameterised
    and not (name == "leave one out" and particles == 1)
    and not (name == "enumerate" and particles > 1)  # its particles are a loop
]


@SUBSAMPLE
@pytest.mark.parametrize(("kind", "name", "particles"), CASES)
def test_the_mean_is_the_exact_gradient(kind, name, particles, subsample):
    toy = TOYS[kind]
    model, guide = toy.pair(subsample)
    draws = {1: 300, 64: 40}[particles]
    found = gradients(ESTIMATORS[name](particles), model, guide, DATA, draws)
    assert_unbiased(found, flat(toy.exact_gradient()), f"{kind}, {name}")


class WithoutEntropy(vi.Reparam):
    """Biased: log q is left out."""

    def surrogate(self, elbo, tensors, about, data):
        return total(tensors, [t for t in about["terms"] if t.owner == "model"])


class ScoreWithoutEntropy(vi.Score):
    """Biased: the learning signals lack log q."""

    def _signal(self, name, tensors, about):
        tensors["factors"][name]["own"] = 0 * tensors["factors"][name]["own"]
        return super()._signal(name, tensors, about)


class OwnSamples(vi.ControlVariate):
    """Biased: a* is fitted on the very draws that it is used with."""

    def _others(self, moments):
        return {k: m.sum(0, keepdim=True).expand(m.shape) for k, m in moments.items()}


class OwnSignal(Baseline):
    """Biased: half of a draw's own signal is its baseline."""

    def __call__(self, signal, state):
        return 0.5 * signal.signal, {}


@pytest.mark.parametrize(
    ("wrong", "right", "kind"),
    [
        (WithoutEntropy(64), vi.Reparam(64), "continuous"),
        (ScoreWithoutEntropy(64), vi.Score(64), "discrete"),
        (
            vi.Score(4, OwnSamples(memory=0, least_correlation=0)),
            vi.Score(4, vi.ControlVariate(memory=0, least_correlation=0)),
            "discrete",
        ),
        (
            vi.Score(4, OwnSamples("coordinate", memory=0, least_correlation=0)),
            vi.Score(4, vi.ControlVariate("coordinate", memory=0, least_correlation=0)),
            "discrete",
        ),
        (vi.Score(64, OwnSignal()), vi.Score(64), "mixed"),
    ],
    ids=["no entropy", "score without entropy", "a* own", "a* own per coordinate", "own signal"],
)
def test_a_biased_estimator_is_caught(wrong, right, kind):
    """The same test, with the same number of draws, passes the right one and fails the wrong."""
    toy = TOYS[kind]
    model, guide = toy.pair()
    truth = flat(toy.exact_gradient())
    assert_unbiased(gradients(right, model, guide, DATA, 500), truth)
    wrong_draws = gradients(wrong, model, guide, DATA, 500)
    assert is_caught(wrong_draws, truth), mean_test(wrong_draws, truth)


@pytest.mark.parametrize("particles", [1, 5])
@SUBSAMPLE
def test_the_loss_does_not_depend_on_the_estimator(subsample, particles):
    """Same seed, same draws, same number: to the last bit, first step and later ones."""
    model, guide = TOYS["continuous"].pair(subsample)
    losses = {}
    for name, make in ESTIMATORS.items():
        if name in ("analytic KL", "enumerate") or (name == "leave one out" and particles == 1):
            continue  # those two take an expectation
        estimator = make(particles)
        torch.manual_seed(11)
        losses[name] = [gradient(estimator, model, guide, DATA)[0] for _ in range(3)]
        losses[name].append(estimator.loss(model, guide, **DATA))
    assert all(found == losses["reparam"] for found in losses.values()), losses


def test_the_mean_loss_is_the_exact_elbo_even_where_an_expectation_is_taken():
    for kind, estimator in (
        ("continuous", vi.Reparam(64, analytic_kl=True)),
        ("mixed", vi.Enumerate()),
        ("mixed", vi.Score(64)),
    ):
        toy = TOYS[kind]
        model, guide = toy.pair()
        losses = torch.tensor([estimator.loss(model, guide, **DATA) for _ in range(150)])
        assert_unbiased(losses[:, None].double(), -toy.exact_elbo(toy.parameters()).detach()[None])


def test_enumeration_is_exact_where_everything_is_discrete():
    toy = TOYS["discrete"]
    loss, found = gradient(vi.Enumerate(), *toy.pair(), DATA)
    torch.testing.assert_close(flat(found), flat(toy.exact_gradient()))
    assert loss == pytest.approx(-toy.exact_elbo(toy.parameters()).item())
