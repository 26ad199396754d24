"""Word counts in time proportional to the words that occur, not to the vocabulary.

A document is kept as (word, count) pairs. The likelihood of the words that do not occur needs no
rate of each: the sum of all rates is enough, and that is z_n times the row sums of w.
"""

import torch
from pyro.distributions import TorchDistribution, constraints

from .differences import step, with_differences
from .model import TINY


def entries(documents, dtype):
    """(document, word, count) of each pair that is not padding, each (E,): E differs by batch."""
    row, place = (documents[..., 1] > 0).nonzero(as_tuple=True)
    word, count = documents[row, place].unbind(1)
    return row, word, count.to(dtype)


def dense(documents, terms, dtype):
    """The counts (B, terms) of (word, count) pairs (B, M, 2), as model.py takes them."""
    row, word, count = entries(documents, dtype)
    return torch.zeros(len(documents), terms, dtype=dtype).index_put_((row, word), count)


class Words(TorchDistribution):
    """Independent Poisson counts of every word of the vocabulary, kept as (word, count) pairs.

    The rate of word v in document n is exposure_n ((z_n w)_v + own_v).

    z: (N, K); w: (K, V); own: (V,) or None; exposure: (N,); length: pairs per document, M; latent:
    the family of z. If z counts, the log density has differences as derivatives in z, see
    differences.py. A value is (N, M, 2), padded with (0, 0).
    """

    arg_constraints = {"z": constraints.real, "w": constraints.real}  # noqa: RUF012
    support = constraints.independent(constraints.nonnegative_integer, 2)
    has_rsample = False

    def __init__(self, z, w, own, exposure, length, latent="gamma", validate_args=None):
        self.z, self.w, self.own, self.exposure, self.latent = z, w, own, exposure, latent
        self.length = w.shape[-1] if length is None else length
        super().__init__(z.shape[:-1], (self.length, 2), validate_args=False)

    def log_prob(self, value):
        row, word, count = entries(value, self.z.dtype)
        counting = self.latent in ("bernoulli", "poisson")
        z = self.z.detach() if counting else self.z
        of_word = self.w.T.contiguous()[word]
        rate, total = (z[row] * of_word).sum(1), z @ self.w.sum(1)
        if self.own is not None:
            rate, total = rate + self.own[word], total + self.own.sum()
        rate = rate.clamp(min=TINY)
        each = count * (self.exposure[row] * rate).log() - torch.lgamma(count + 1)
        found = torch.zeros_like(total).index_add(0, row, each) - self.exposure * total
        if not counting:
            return found

        def difference():
            direction = step(z, self.latent == "bernoulli")
            moved = (direction[row] * of_word / rate[:, None]).clamp_(min=1e-6 - 1).log1p_()
            moved = torch.zeros_like(z).index_add(0, row, moved.mul_(count[:, None]))
            return direction * moved - self.exposure[:, None] * self.w.sum(1)

        return with_differences(found, self.z, difference)

    @torch.no_grad()
    def sample(self, sample_shape=()):
        rates = self.z @ self.w
        if self.own is not None:
            rates = rates + self.own
        counts = torch.poisson(self.exposure[:, None] * rates)
        count, word = counts.topk(self.length, -1)
        return torch.stack([word * (count > 0), count.long()], -1)
