"""What the tests of restarts share."""

import warnings

import vi_toolkit as vi
from tests.compiled.models import DATA, regression
from vi_toolkit.compiled.batched import BatchedFits

OPTIONS = {"method": "stochastic", "progress": False, "optimizer": 0.02, "seed": 3}


def at_random(site):
    return site["fn"].sample()


def from_anywhere(family, model=regression):
    return family(model, init_loc_fn=at_random)


def fit(model, guide, data=DATA, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vi.ConvergenceWarning)
        return vi.fit(model, guide, data, **OPTIONS | options)


def starts_of(one, monkeypatch):
    """The running fits of all restarts, as :class:`BatchedFits` is given them."""
    seen = []
    original = BatchedFits.__init__

    def keeping(self, fits, *others):
        seen.extend(fits)
        original(self, fits, *others)

    with monkeypatch.context() as patch:
        patch.setattr(BatchedFits, "__init__", keeping)
        one()
    return seen


def counting(monkeypatch):
    made = []
    original = BatchedFits.__init__

    def noting(self, fits, *others):
        made.append(len(fits))
        original(self, fits, *others)

    monkeypatch.setattr(BatchedFits, "__init__", noting)
    return made


def has_memory_of_its_own(one):
    tensors = [*one.leaves, one.block_sum]
    tensors += [v for p in one.leaves for v in one.optimizer.state[p].values()]
    return all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
