"""Shopper's fast density equals the model's own, in value and gradient."""

import inspect

import pytest
import torch

from recipes.shopper import ALL_SITES, PAPER, TERMS, choices, fast_model, model, simulate
from tests.support import check_latents, log_likelihood
from vi_toolkit.programs.joint import Joint

SMALL = {"size": 3, "price_size": 2, "season_size": 2, "shuffle": False}
EACH = [(), *((term,) for term in TERMS), PAPER, TERMS]
OPTIONS = {
    "as the items come": {},
    "in random order": {"shuffle": True},
    "without checkout": {"checkout": False},
    "given the rest": {"rest": True},
    "thinking ahead": {"look_ahead": True},
    "thinking ahead, in random order": {"look_ahead": True, "shuffle": True},
    "one versus each": {"negatives": 9},
    "one versus four": {"negatives": 4, "shuffle": True},
    "one versus four, without checkout": {"negatives": 4, "checkout": False},
    "one versus four, given the rest": {"negatives": 4, "rest": True},
    "one versus four, thinking ahead": {"negatives": 4, "look_ahead": True},
}


def simulated(terms):
    """Trips to eight items by households with a past, which counts these trips too."""
    data, truth = simulate(2, trips=40, items=8, **SMALL, terms=terms)
    trip, place = torch.nonzero(data["baskets"] >= 0, as_tuple=True)
    where = data["household"][trip], data["baskets"][trip, place]
    data["history"] = torch.randint(3, data["history"].shape).double()
    data["history"].index_put_(where, torch.ones(len(trip)).double(), accumulate=True)
    return data, truth


def density_and_gradient(model, data):
    joint = Joint(model, data)
    point = 0.3 * torch.randn(joint.dim, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(1)  # the same order and the same rivals
    density = joint.log_density(point.requires_grad_())
    density.backward()
    return density.detach(), point.grad


@pytest.mark.parametrize("most", [choices.MOST_UTILITIES, 40], ids=["at once", "in blocks"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("terms", EACH, ids=lambda terms: "+".join(terms) or "intercepts")
def test_fast_density_is_that_of_the_model(terms, option, most, monkeypatch):
    monkeypatch.setattr(choices, "MOST_UTILITIES", most)
    data = simulated(terms)[0] | OPTIONS[option]
    slow, fast = density_and_gradient(model, data), density_and_gradient(fast_model, data)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-11)


def test_many_trips_in_parts_have_the_density_of_the_model(monkeypatch):
    monkeypatch.setattr("recipes.shopper.fast.MOST_TRIPS", 7)
    data, truth = simulated(TERMS)
    slow = log_likelihood(model, "baskets", truth, data)
    torch.testing.assert_close(log_likelihood(fast_model, "baskets", truth, data), slow)


def test_fast_model_has_the_sites_and_arguments_of_the_model():
    check_latents(
        fast_model,
        ALL_SITES,
        simulated(TERMS)[0],
        {"vector": "abc", "prices": "ab", "seasons": "ab"},
    )
    assert inspect.signature(fast_model) == inspect.signature(model)


def test_a_choice_whose_probability_underflows_has_its_log(monkeypatch):
    data, truth = simulated(TERMS)
    truth["intercept"] = truth["intercept"] * 1e4
    slow = log_likelihood(model, "baskets", truth, data)
    assert bool((slow < -1e3).any())
    monkeypatch.setattr(choices, "MOST_UTILITIES", 40)
    fast = log_likelihood(fast_model, "baskets", truth, data)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-9)


def test_choices_of_unequal_weight_have_their_gradient_in_blocks(monkeypatch):
    data, u = simulate(2, trips=12, items=8, **SMALL, terms=TERMS)
    u = {name: u[name] for name in choices.IN_UTILITIES}
    held = data["baskets"] >= 0
    trip, bought = held.nonzero()[:, 0], data["baskets"][held]
    barred = (bought[1:] != bought[:-1]).nonzero()[:, 0]
    made = trip, bought, barred, bought[barred + 1]
    data["history"] = data["history"].float()  # counts, whatever the precision of the rest
    trips = tuple(data[name] for name in ("household", "week", "log_price", "history"))
    mean = torch.randn(len(trip), u["interaction"].shape[1]).double()

    def gradients(weight, own, mean):
        inputs = {name: value.clone().requires_grad_() for name, value in u.items()}
        mean = None if mean is None else mean.clone().requires_grad_()
        log_prob = choices.choice_log_prob(inputs, mean, trips, own, made)
        among = [*inputs.values(), *([] if mean is None else [mean])]
        return torch.autograd.grad(log_prob @ weight, among, allow_unused=True)

    for weight in (torch.full((len(trip),), 2.0), torch.arange(float(len(trip)))):
        for given in (((trip, bought), mean), (None, None)):
            plain = gradients(weight.double(), *given)
            with monkeypatch.context() as patch:
                patch.setattr(choices, "MOST_UTILITIES", 60)  # a few rows a block
                for one, other in zip(gradients(weight.double(), *given), plain, strict=True):
                    other = torch.zeros_like(one) if other is None else other
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
