"""Rewritten graphs compute the same numbers, with less in the loop."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from tests.compiled.checks import assert_same, both, interpret
from tests.compiled.models import Y
from vi_toolkit.compiled import rewrites, steps
from vi_toolkit.compiled.rewrites import lookups_stay_inside, transpose_products
from vi_toolkit.compiled.tracing import functional


def test_a_factorisation_that_fails_makes_the_loss_nan():
    def loss(matrix):
        return torch.linalg.cholesky(matrix).diagonal().log().sum(), matrix.trace()

    good, bad = 4 * torch.eye(3), torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    graph = functional(loss, [good])
    with pytest.raises(torch.linalg.LinAlgError):
        graph(bad)
    rewrites.failures_become_nan(graph)
    torch.testing.assert_close(graph(good), loss(good))
    value, trace = graph(bad)
    assert value.isnan() and trace == 3


def test_what_does_not_change_leaves_the_loop(monkeypatch):
    """lgamma(counts + 1) of all data is computed once, also where minibatches of it are used."""
    seen = []
    monkeypatch.setattr(steps, "compile_loop", lambda *a: (seen.append(a), interpret(*a))[1])
    counts = Y.abs().round()

    def model(y):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 30) as i:
            pyro.sample("y", dist.Poisson(rate), obs=y[i])

    assert_same(*both(model, AutoNormal, {"y": counts}, number=12, subsample={"data": 10}))
    body, _, fixed, checked = seen[0]
    assert not checked  # only its own minibatches are looked up
    assert "lgamma" not in body.code
    assert any(t.shape == (30,) and torch.equal(t, torch.lgamma(counts + 1)) for t in fixed)
    assert body.code.count("aten.randn") == 1 and "normal_functional" not in body.code


def loop_of(function, variable, constants):
    """(once, each) of a function of variable inputs and then constants, and what each gives."""
    graph = functional(function, [*variable, *constants])
    expected = graph(*variable, *constants)
    once, each, _ = rewrites.hoist(graph, len(variable), [False] * len(constants))
    given = once(*constants)
    for found, right in zip(each(*variable, *given), expected, strict=True):
        torch.testing.assert_close(found, right, equal_nan=True)
    return [str(n.target) for n in each.graph.nodes if n.op == "call_function"]


def test_the_gradient_of_a_lookup_is_a_product_by_blas():
    table, rows = torch.randn(500, 60), torch.randint(0, 500, (100,))
    v, w = torch.randn(100), torch.randn(60)

    def function(rows, v, w, table):
        return table[rows] @ w, table[rows].T @ v, table.exp()[rows].T @ v

    left = loop_of(function, [rows, v, w], [table])
    assert left.count("aten.mm.default") == 2 and left.count("aten.mv.default") == 1
    assert "aten.exp.default" not in left
    few = loop_of(function, [rows[:10], v[:10], w], [table])
    assert "aten.mm.default" not in few


def test_masks_are_made_once():
    def function(x, c):
        strict = x.tril(-1)
        return strict + torch.eye(5) + c, strict.tril().triu(-2), torch.where(c > 0, x, 1.0).triu(1)

    x = torch.randn(5, 5)
    x[0, 4] = torch.nan  # above the diagonal, where nobody looks
    left = loop_of(function, [x], [torch.randn(5, 5)])
    assert not {"aten.tril.default", "aten.triu.default", "aten.eye.default"} & set(left)


def test_products_of_several_fits_keep_the_fits_first():
    A, B = torch.randn(30, 4), torch.randn(5, 4)

    def function(A, B):
        scores = torch.func.vmap(lambda b: A @ b)(B)
        return scores, torch.func.vmap(lambda s: A.T @ s)(scores.tanh()), A.T @ A

    graph = functional(function, [A, B])
    before = graph(A, B)
    transpose_products(graph.graph)
    graph.graph.lint()
    graph.recompile()
    for one, other in zip(graph(A, B), before, strict=True):
        torch.testing.assert_close(one, other)
    shapes = [n.meta["val"].shape for n in graph.graph.nodes if "mm" in str(n.target)]
    assert shapes == [(5, 30), (5, 4), (4, 4)]


def body_of(function, *inputs):
    return functional(function, inputs).graph


def test_indices_need_no_check_if_they_cannot_be_out_of_range():
    i, rows = torch.tensor(0), torch.arange(6).reshape(2, 3)
    table, group = torch.randn(10), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1])

    def lookup(i, rows, table):
        chosen = rows.index_select(0, i.reshape(1))[0]
        return i + 1, table[chosen] + 1, table.index_put((chosen,), table[:3])

    graph = body_of(lookup, i, rows, table)
    assert lookups_stay_inside(graph, {0: 2, 1: 10})
    assert not lookups_stay_inside(graph, {0: 3, 1: 10})  # more steps than rows
    assert not lookups_stay_inside(graph, {0: 2, 1: 11})  # a plate larger than the table
    assert not lookups_stay_inside(graph, {0: 2})

    def by_group(i, rows, table, group):
        return table[group[rows[0]]]

    assert not lookups_stay_inside(body_of(by_group, i, rows, table, group), {0: 2, 1: 10})
    by_value = body_of(lambda i, rows, table: table[(table.sigmoid() * 9).long()], i, rows, table)
    assert not lookups_stay_inside(by_value, {0: 2, 1: 10})
    shifted = body_of(lambda i, rows, table: table[rows[0] + 5], i, rows, table)
    assert not lookups_stay_inside(shifted, {0: 2, 1: 10})
    assert lookups_stay_inside(body_of(lambda i, rows, table: table.exp(), i, rows, table), {0: 2})
