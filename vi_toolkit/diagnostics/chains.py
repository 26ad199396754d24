"""Short Markov chains that start at the guide's draws: do they stay where the guide is?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import arviz as az
import numpy as np
import torch

from vi_toolkit.reference import MAX_R_HAT, MIN_ESS, admission_faults, each_scalar
from vi_toolkit.scope import seeded_state

if TYPE_CHECKING:
    from vi_toolkit.joint import Joint
    from vi_toolkit.plots import Figure

CHAINS = 32
WARMUP = (50, 50, 50, 50)  # transitions thrown away; after each window the metric is adapted
FIRST, MOST = 250, 2_000  # transitions kept per chain
WANTED = 0.0125  # standard error of means and sds, in sds: four of them are 0.05
ACCEPTED = 0.8  # of the proposals, on average over the chains
MOST_STEPS = 64  # leapfrog steps of one transition
DENSE = 1_000  # latents up to which the metric has correlations
MOST_WORK = 5e8  # gradients of one datum's or latent's term: a minute or two
DIVERGENT = 1e-3  # share of transitions with an energy error beyond 1,000 that is let pass
SLICE = 25  # transitions averaged for the figure


@dataclass(frozen=True, eq=False)
class WarmChains:
    """Posterior moments by chains that started at draws of the guide.

    Attributes:
        names: of the scalars on the unconstrained scale, (d,).
        mean, sd: of the posterior, (d,).
        mean_se, sd_se: their Monte Carlo standard errors (ArviZ's), (d,).
        r_hat, bulk_ess, tail_ess: rank-normalised, over all chains, (d,).
        divergences: kept transitions whose energy error exceeds 1,000.
        chains, draws: how many, and draws kept of each.
        acceptance, steps: mean acceptance probability and leapfrog steps of a transition.
        faults: what forbids to use the moments; empty if nothing does.
        path: means over the chains and over slices of 25 transitions, the warm-up's first,
            (slices, d).
    """

    names: list[str]
    mean: np.ndarray
    sd: np.ndarray
    mean_se: np.ndarray
    sd_se: np.ndarray
    r_hat: np.ndarray
    bulk_ess: np.ndarray
    tail_ess: np.ndarray
    divergences: int
    chains: int
    draws: int
    acceptance: float
    steps: float
    faults: list[str]
    path: np.ndarray

    @property
    def reliable(self) -> bool:
        """Whether the chains agree as those of a reference must: R-hat < 1.01, ESS >= 1,000."""
        return not self.faults

    @property
    def meaning(self) -> str:
        """In plain words."""
        if self.faults:
            return f"the chains have not arrived: {self.faults[0]}"
        return (
            f"the chains agree (largest R-hat {self.r_hat.max():.4f}, smallest bulk ESS "
            f"{self.bulk_ess.min():.0f})"
        )

    def __repr__(self) -> str:
        return (
            f"{self.chains} warm chains x {self.draws} draws of {len(self.names)} scalars, "
            f"{self.steps:.1f} leapfrog steps each: {self.meaning}"
        )

    def plot(self) -> Figure:
        """Where the chains' mean goes from the guide's draws on, for the scalars that move most."""
        from vi_toolkit.plots import plot_chains

        return plot_chains(self)


def warm_chains(fit: Any, covariance: np.ndarray | None = None, seed: int = 0) -> WarmChains | None:
    r"""Posterior moments by 32 short HMC chains from draws of the guide, all run at once.

    If q is the posterior, chains that leave it invariant stay distributed as q; if it is not, their
    moments move from q's to the posterior's. Chains do not need q's weights, so this works
    where importance sampling does not: in a hundred dimensions and more. The chains share a
    step size and a metric, both adapted to all of them, and have trajectories of random length. The
    first 200 transitions are thrown away. At least 250 are kept of each, and twice as many
    as long as moments have standard errors above 0.0125 sd or the chains disagree, up to 2,000.

    They are held to the rules for a reference (rank R-hat < 1.01, bulk and tail ESS >= 1,000),
    but for divergences, of which one in a thousand transitions may be, since no chain has a
    step size of its own. Starts are as spread as q, so a direction in which the chains
    have hardly moved has a large R-hat. What they cannot see: mass outside q that is
    reached rarely, over a barrier or through a neck, while they mix well inside; other modes above
    all (:func:`~vi_toolkit.missed_modes`).

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data, without discrete latents.
        covariance: of the first metric, (d, d), such as a linear response; the guide's if None.
        seed: of starts and chains.

    Returns:
        A :class:`WarmChains`; None where they would take minutes (more than 5e8 gradients of one
        datum's term) or the model cannot be evaluated at many draws at once.

    References:
        Duane, Kennedy, Pendleton and Roweth, "Hybrid Monte Carlo", 1987; Hoffman and Sountsov,
        "Tuning-Free Generalized Hamiltonian Monte Carlo", AISTATS 2022 (adaptation over
        chains); Margossian et al., "Nested R-hat", Bayesian Analysis, 2024 (many short chains);
        Yao et al., "Yes, but Did It Work?", ICML 2018, for the question.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> tril = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> def model():
        ...     pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
        >>> fit = vi.fit(model, AutoNormal, {}, progress=False)  # sds 0.6, where 1 is right
        >>> vi.warm_chains(fit).sd.round(1)
        array([1., 1.])
    """
    joint: Joint = fit.joint
    size = CHAINS * (joint.observations + joint.dim)
    if size * (sum(WARMUP) + FIRST) * 5 > MOST_WORK:
        return None
    dtype = joint.start.dtype
    start = joint.flatten(fit.sample(CHAINS, seed=seed)).detach().to(dtype)
    if covariance is None:
        u = joint.flatten(fit.sample(max(4_000, 4 * joint.dim), seed=seed + 1)).detach().double()
        metric = torch.cov(u.T).reshape(joint.dim, -1) if joint.dim <= DENSE else u.var(0)
    else:
        metric = torch.as_tensor(covariance, dtype=torch.float64)
        metric = metric if joint.dim <= DENSE else metric.diagonal()
    with fit._room(seeded_state(fit._seed(seed, 6))), torch.no_grad():
        run = _Run(joint, start, metric.to(dtype))
        if joint.many_with_gradient.vectorises is False and joint.compiled is None:
            return None
        before = [u for length in WARMUP for u in run.adapted(length)]
        run.divergences, run.steps, run.rates = 0, [], []
        kept = [run.transition() for _ in range(FIRST)]
        while True:
            draws = torch.stack(kept, 1).double().numpy()
            found = _summary(run, torch.stack(before, 1).double().numpy(), draws)
            error = max((found.mean_se / found.sd).max(), (found.sd_se / found.sd).max())
            if (found.reliable and error <= WANTED) or _in_vain(found):
                return found
            more = 2 * len(kept) + sum(WARMUP)
            if 2 * len(kept) > MOST or size * more * found.steps > MOST_WORK:
                return found
            kept += [run.transition() for _ in range(len(kept))]


def _in_vain(found: WarmChains) -> bool:
    """Whether even the longest run would not do: R-hat - 1 goes as 1 / draws, the ESS as draws."""
    times = MOST / found.draws
    return not (
        (found.r_hat.max() - 1) / times < MAX_R_HAT - 1
        and min(found.bulk_ess.min(), found.tail_ess.min()) * times >= MIN_ESS
        and found.divergences <= DIVERGENT * found.chains * found.draws
    )


class _Run:
    """Chains in step: positions (chains, d), a common step size and metric."""

    def __init__(self, joint: Joint, at: torch.Tensor, covariance: torch.Tensor):
        self.joint, self.at, self.covariance = joint, at, covariance
        self.gradient, self.value = self._density(at)
        self.log_step = math.log(0.5 / joint.dim**0.25)  # the rate of Beskos et al., 2013
        self.divergences = 0
        self.rates: list[float] = []
        self.steps: list[int] = []
        self._factorise()

    def _density(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradient, value = self.joint.gradients(u)
        bad = ~(torch.isfinite(value) & torch.isfinite(gradient).all(1))
        return gradient.masked_fill(bad[:, None], 0.0), value.masked_fill(bad, -math.inf)

    def _factorise(self) -> None:
        if self.covariance.dim() == 2:
            self.scale, info = torch.linalg.cholesky_ex(self.covariance)
            if not int(info):
                return
            self.covariance = self.covariance.diagonal()
        self.scale = self.covariance.clamp_min(1e-12).sqrt()

    def _latent(self, v: torch.Tensor) -> torch.Tensor:
        return v @ self.scale.T if self.scale.dim() == 2 else v * self.scale

    def _white(self, g: torch.Tensor) -> torch.Tensor:
        return g @ self.scale if self.scale.dim() == 2 else g * self.scale

    def adapted(self, length: int) -> list[torch.Tensor]:
        """Transitions that move the step size, and at their end the metric."""
        past = []
        for i in range(length):
            past.append(self.transition())
            self.log_step += (self.rates[-1] - ACCEPTED) / math.sqrt(1 + i)
        x = torch.cat(past[length // 3 :])
        n, d = x.shape
        share = n / (n + 5 * d)  # a covariance of few correlated draws is noise
        new = torch.cov(x.T).reshape(d, d) if self.covariance.dim() == 2 else x.var(0)
        self.covariance = share * new + (1 - share) * self.covariance
        self._factorise()
        return past

    def transition(self) -> torch.Tensor:
        """One of every chain, in coordinates in which the metric is the identity."""
        step = math.exp(self.log_step)
        # A quarter of a period is the best for a Gaussian; half as much more or less, because with
        # a fixed length some direction might come back to where it was.
        length = math.pi / 2 * (0.5 + float(torch.rand(())))
        steps = min(max(1, math.ceil(length / step)), MOST_STEPS)
        p = torch.randn_like(self.at)
        before = self.value - 0.5 * p.square().sum(1)
        u, gradient, value = self.at, self.gradient, self.value
        for _ in range(steps):
            p = p + 0.5 * step * self._white(gradient)
            u = u + step * self._latent(p)
            gradient, value = self._density(u)
            p = p + 0.5 * step * self._white(gradient)
        change = value - 0.5 * p.square().sum(1) - before
        self.divergences += int((~(change > -1_000)).sum())
        accept = change.nan_to_num(nan=-math.inf).clamp_max(0).exp()
        moves = torch.rand(len(u), dtype=u.dtype) < accept
        self.at = torch.where(moves[:, None], u, self.at)
        self.gradient = torch.where(moves[:, None], gradient, self.gradient)
        self.value = torch.where(moves, value, self.value)
        self.rates.append(float(accept.mean()))
        self.steps.append(steps)
        return self.at


def _summary(run: _Run, before: np.ndarray, draws: np.ndarray) -> WarmChains:
    names = list(run.joint.names)
    r_hat = each_scalar(az.rhat, draws)
    bulk, tail = each_scalar(az.ess, draws), each_scalar(az.ess, draws, method="tail")
    chains, count, d = draws.shape
    many = run.divergences > DIVERGENT * chains * count
    flat = draws.reshape(-1, d)
    whole = np.concatenate([before, draws], 1).mean(0)
    return WarmChains(
        names=names,
        mean=flat.mean(0),
        sd=flat.std(0),
        mean_se=each_scalar(az.mcse, draws),
        sd_se=each_scalar(az.mcse, draws, method="sd"),
        r_hat=r_hat,
        bulk_ess=bulk,
        tail_ess=tail,
        divergences=run.divergences,
        chains=chains,
        draws=count,
        acceptance=float(np.mean(run.rates)),
        steps=float(np.mean(run.steps)),
        faults=admission_faults(names, r_hat, bulk, tail, run.divergences if many else 0),
        path=whole[: len(whole) // SLICE * SLICE].reshape(-1, SLICE, d).mean(1),
    )
