"""Short Markov chains that start at the guide's draws: do they stay where the guide is?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vi_toolkit.arviz_adapter import ess, mean_se, rhat, sd_se
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.reference.draws import MAX_R_HAT, admission_faults

if TYPE_CHECKING:
    from vi_toolkit.figures import Figure
    from vi_toolkit.programs.joint import Joint

# Many, since a call's Python takes longer than its arithmetic; fewer where the data are large.
FEWEST, MOST_CHAINS, ROOM = 32, 128, 1e5
WARMUP = (25, 25, 50, 50)  # transitions thrown away; after each window the metric is adapted
FIRST, MOST = 150, 1_200  # transitions kept per chain
WANTED = 0.0125  # standard error of means and sds, in sds: four of them are 0.05
ACCEPTED = 0.9  # of the proposals; at 0.8 thirty times as many diverge on the eight schools
MOST_STEPS = 64  # leapfrog steps of one transition
DENSE = 1_000  # latents up to which the metric has correlations
MOST_WORK = 5e8  # gradients of one datum's or latent's term: a minute or two
DIVERGENT = 5e-4  # share of transitions with an energy error beyond 1,000 that is let pass


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
        guide_mean: the guide's means, (d,).
        path: means over the chains after every transition, those of the warm-up first, (n, d).
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
    num_draws: int
    acceptance: float
    steps: float
    faults: list[str]
    guide_mean: np.ndarray
    path: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        """How far the chains' means are from the guide's, in posterior sds, (d,)."""
        return (self.mean - self.guide_mean) / self.sd

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
            f"{self.chains} warm chains x {self.num_draws} draws of {len(self.names)} scalars, "
            f"{self.steps:.1f} leapfrog steps each: {self.meaning}"
        )

    def plot(self) -> Figure:
        """The chains' means on their way from the guide's, for the scalars that move most."""
        from vi_toolkit.figures import plot_chains

        return plot_chains(self)


def warm_chains(fit: Any, covariance: np.ndarray | None = None, seed: int = 0) -> WarmChains | None:
    r"""Posterior moments by many short HMC chains from draws of the guide, all run at once.

    If q is the posterior, chains that leave it invariant stay distributed as q; if it is not, their
    moments move from q's to the posterior's. Chains do not need q's weights, so this works
    where importance sampling does not: in a hundred dimensions and more. They share a step
    size and a metric, both adapted to all of them, and have trajectories of random length. There
    are 32 to 128, the fewer the larger the data. The first 150 transitions are thrown away. At
    least 150 are kept of each, and twice as many as long as moments have standard errors above
    0.0125 sd or the chains disagree, up to 1,200.

    They are held to the rules for a reference (rank R-hat < 1.01, bulk and tail ESS >= 1,000),
    but for divergences, which one in 2,000 transitions may be, since no chain has a step size of
    its own. Starts are as spread as q, so a direction in which the chains
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
    each = joint.observations + joint.dim
    chains = int(min(MOST_CHAINS, max(FEWEST, ROOM // each)))
    size = chains * each
    if size * (sum(WARMUP) + FIRST) * 5 > MOST_WORK:
        return None
    dtype = joint.start.dtype
    start = joint.flatten(fit.sample(chains, seed=seed)).detach().to(dtype)
    u = joint.flatten(fit.sample(max(4_000, 4 * joint.dim), seed=seed + 1)).detach().double()
    if covariance is None:
        metric = torch.cov(u.T).reshape(joint.dim, -1) if joint.dim <= DENSE else u.var(0)
    else:
        metric = torch.as_tensor(covariance, dtype=torch.float64)
        metric = metric if joint.dim <= DENSE else metric.diagonal()
    with fit.workspace.isolated(seeded_state(fit.derived_seed(seed, 6))), torch.no_grad():
        run = _Run(joint, start, metric.to(start))
        if joint.many_with_gradient.vectorises is False and joint.compiled is None:
            return None
        before = [u for length in WARMUP for u in run.adapted(length)]
        run.divergences, run.steps, run.rates = 0, [], []
        kept = [run.transition() for _ in range(FIRST)]
        while True:
            draws = torch.stack(kept, 1).double().numpy()
            error, r_hat = _quick(draws)
            work = size * (2 * len(kept) + sum(WARMUP)) * float(np.mean(run.steps))
            last = 2 * len(kept) > MOST or work > MOST_WORK
            # R-hat - 1 goes as 1 / draws: past this the longest run would not do.
            last |= not (r_hat - 1) * len(kept) / MOST < MAX_R_HAT - 1
            last |= run.divergences > DIVERGENT * chains * len(kept)
            if last or (error <= WANTED and r_hat < MAX_R_HAT):
                path = torch.stack(before + kept).double().mean(1).numpy()
                found = _summary(run, draws, u.mean(0).numpy(), path)
                if last or found.reliable:
                    return found
            kept += [run.transition() for _ in range(len(kept))]


def _quick(draws: np.ndarray) -> tuple[float, float]:
    """Largest standard error of a mean or sd, in sds, and largest split R-hat, (chains, n, d).

    ArviZ's ranks take seconds for a hundred scalars; this says when they are worth it.
    """
    mean, sd = draws.mean((0, 1)), draws.std((0, 1))
    half = draws.shape[1] // 2
    errors, r_hats = [], []
    for x in (draws - mean, np.abs(draws - np.median(draws, (0, 1)))):
        parts = np.concatenate([x[:, :half], x[:, half : 2 * half]])
        within = parts.var(1, ddof=1).mean(0)
        r_hats.append(np.sqrt(1 + parts.mean(1).var(0, ddof=1) / within - 1 / half).max())
    root = math.sqrt(len(draws))
    errors.append((draws.mean(1).std(0, ddof=1) / root / sd).max())
    square = ((draws - mean) ** 2).mean(1)
    errors.append((square.std(0, ddof=1) / root / (2 * sd**2)).max())
    return float(max(errors)), float(max(r_hats))


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
            # At steps of 2 leapfrog is unstable on a Gaussian, and above 1 it turns by other
            # angles than it should.
            self.log_step = min(self.log_step + (self.rates[-1] - ACCEPTED) / math.sqrt(1 + i), 0)
        x = torch.cat(past[length // 3 :])
        n, d = x.shape
        share = n / (n + 5 * d)  # a covariance of few correlated draws is noise
        new = torch.cov(x.T).reshape(d, d) if self.covariance.dim() == 2 else x.var(0)
        self.covariance = share * new + (1 - share) * self.covariance
        self._factorise()
        return past

    def transition(self) -> torch.Tensor:
        """One of every chain, in coordinates in which the metric is the identity."""
        # A quarter of a period is the best for a Gaussian; half as much more or less, because with
        # a fixed length some direction might come back to where it was.
        length = math.pi / 2 * (0.5 + float(torch.rand(())))
        steps = min(math.ceil(length / math.exp(self.log_step)), MOST_STEPS)
        step = min(length / steps, math.exp(self.log_step))
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
        moves = torch.rand_like(accept) < accept
        self.at = torch.where(moves[:, None], u, self.at)
        self.gradient = torch.where(moves[:, None], gradient, self.gradient)
        self.value = torch.where(moves, value, self.value)
        self.rates.append(float(accept.mean()))
        self.steps.append(steps)
        return self.at


def _summary(run: _Run, draws: np.ndarray, guide_mean: np.ndarray, path: np.ndarray) -> WarmChains:
    names = list(run.joint.names)
    r_hat = rhat(draws)
    bulk, tail = ess(draws, "bulk"), ess(draws, "tail")
    chains, count, d = draws.shape
    faults = admission_faults(names, r_hat, bulk, tail, 0)
    if run.divergences > DIVERGENT * chains * count:
        faults.append(f"{run.divergences} of {chains * count} transitions diverged")
    flat = draws.reshape(-1, d)
    return WarmChains(
        names=names,
        mean=flat.mean(0),
        sd=flat.std(0),
        mean_se=mean_se(draws),
        sd_se=sd_se(draws),
        r_hat=r_hat,
        bulk_ess=bulk,
        tail_ess=tail,
        divergences=run.divergences,
        chains=chains,
        num_draws=count,
        acceptance=float(np.mean(run.rates)),
        steps=float(np.mean(run.steps)),
        faults=faults,
        guide_mean=guide_mean,
        path=path,
    )
