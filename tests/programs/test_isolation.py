"""A room of its own for a fit: what is borrowed, and given back."""

import pytest
import torch

from vi_toolkit.programs import isolation


@pytest.mark.parametrize(("made", "known"), [(2, 2), (2, 1), (1, 2), (0, 2), (2, 0)])
def test_the_state_of_the_generators_holds_those_of_the_gpus(monkeypatch, made, known):
    """As many as there are; kept in a process with some, a state can be set in one with others."""

    def pretend(number, first):
        states = {
            k: torch.full((isolation.GPU_STATE_BYTES,), first + k, dtype=torch.uint8)
            for k in range(number)
        }
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states.values()))
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, k: states.update({k: s}))
        return states

    pretend(made, 1)
    kept = isolation.random_state()
    drawn = torch.rand(3)
    states = pretend(known, 7)
    isolation.set_random_state(kept)
    assert torch.equal(torch.rand(3), drawn)
    found = [int(s[0]) for s in states.values()]
    assert found == [1 + k if k < made else 7 + k for k in range(known)]
