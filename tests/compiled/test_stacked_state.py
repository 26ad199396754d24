"""The states of several fits, stacked."""

from types import SimpleNamespace

import torch

from vi_toolkit.compiled.loop_state import LoopState
from vi_toolkit.compiled.stacked_state import SharedRows, StackedState


def test_rows_follow_the_tensors_that_they_are():
    first, second, shared = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), SharedRows()
    whole = shared.of("name", [first, second])
    whole += 1
    assert first.tolist() == [2.0, 3.0] and second.tolist() == [4.0, 5.0]
    assert shared.of("name", [first, second]) is whole
    second.data = torch.tensor([6.0, 7.0])  # as an optimiser that is loaded anew
    assert shared.of("name", [first, second]).tolist() == [[2.0, 3.0], [6.0, 7.0]]
    shared.separate()
    whole += 1
    assert first.tolist() == [2.0, 3.0] and first.untyped_storage().nbytes() == first.nbytes


def test_a_running_fit_stands_in_for_one_that_has_finished():
    """So a step of a finished fit cannot end the call for all."""
    leaves = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])]]
    traced = SimpleNamespace(live=[0])
    for (leaf,) in leaves:
        leaf.requires_grad_().grad = torch.ones(2)
    optimizers = [torch.optim.Adam(mine) for mine in leaves]
    for optimizer in optimizers:
        optimizer.step()
    states = StackedState(
        [LoopState(mine, o, traced, []) for mine, o in zip(leaves, optimizers, strict=True)]
    )
    first, second = (mine[0].detach().clone() for mine in leaves)
    sums = states.sums([None, torch.zeros(2)])
    theta, *others, elbo = states.carried(sums, torch.zeros(4))
    assert torch.equal(theta, torch.stack([second, second]))
    results = states.commit(1, [theta + 1, *others, elbo], [None, torch.zeros(2)])
    assert results[0] is None and results[1].elbo == [0.0]
    assert torch.equal(leaves[0][0], first) and torch.equal(leaves[1][0], second + 1)
    assert [float(o.state[m[0]]["step"]) for o, m in zip(optimizers, leaves, strict=True)] == [1, 2]
