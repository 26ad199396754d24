"""Which parameters a distribution was given, and their scores."""

import pyro.distributions as dist
import pytest
import torch

from vi_toolkit.estimators.score import own_parameters, scores_of

HALF = torch.tensor([0.3, 0.6])
MATRIX = torch.tensor([[2.0, 0.0], [0.5, 1.0]])


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (dist.Bernoulli, {"probs": HALF}),
        (dist.Bernoulli, {"logits": HALF}),
        (dist.Categorical, {"logits": HALF - HALF.logsumexp(-1)}),
        (dist.Geometric, {"probs": HALF}),
        (dist.Normal, {"loc": HALF, "scale": HALF}),
        (dist.MultivariateNormal, {"loc": HALF, "scale_tril": MATRIX}),
        (dist.MultivariateNormal, {"loc": HALF, "covariance_matrix": MATRIX @ MATRIX.T}),
    ],
)
def test_the_given_parameters_are_found_even_after_others_were_computed(kind, given):
    fn = kind(**given)
    for name in fn.arg_constraints:
        getattr(fn, name)
    found_kind, found = own_parameters(fn.to_event(len(fn.batch_shape)))
    assert found_kind is kind
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert torch.allclose(found[name], value)
    scores = scores_of(kind, found, fn.sample())
    assert {name: h.shape for name, h in scores.items()} == {n: t.shape for n, t in given.items()}


def test_hidden_parameters_are_not_guessed():
    hidden = dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.ExpTransform())
    assert own_parameters(hidden) == (None, {})
    assert own_parameters(dist.OneHotCategorical(HALF)) == (None, {})
