"""Short Markov chains that start at draws of the guide: does their distribution change?"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import arviz as az
import matplotlib
import numpy as np
import torch

from vi_toolkit.figures import COLOURS, GREY, LIMIT, REFERENCE, STYLE, Figure
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.joint import Joint
from vi_toolkit.reference.reference import MAX_R_HAT, MIN_ESS, admission_faults, each_scalar
from vi_toolkit.result import Fit

# Many chains, because a call spends more time in Python than on arithmetic; fewer for large data.
FEWEST, MOST_CHAINS, ROOM = 32, 128, 1e5
WARMUP = (25, 25, 50, 50)  # transitions thrown away; the metric is adapted after each window
FIRST, MOST = 150, 1_200  # transitions kept per chain
WANTED = 0.0125  # standard error of means and sds, in sds: four of them are 0.05
ACCEPTED = 0.9  # acceptance rate; at 0.8 the eight schools have thirty times as many divergences
MOST_LEAPFROG_STEPS = 64  # of one transition
DENSE = 1_000  # latents up to which the metric has correlations
MOST_WORK = 5e8  # gradients of one datum's or latent's term: a minute or two
DIVERGENT = 5e-4  # largest share of transitions with an energy error beyond 1,000
MOST_LINES = 6  # scalars in the figure


@dataclass(frozen=True, eq=False)
class WarmChains:
    """Posterior moments by chains that started at draws of the guide.

    Attributes:
        names: names of the scalars on the unconstrained scale, (d,).
        mean, sd: posterior means and sds, (d,).
        mean_se, sd_se: their Monte Carlo standard errors (ArviZ's), (d,).
        r_hat, bulk_ess, tail_ess: rank-normalised, over all chains, (d,).
        divergences: number of kept transitions whose energy error exceeds 1,000.
        num_chains: number of chains.
        num_draws: number of draws kept of each chain.
        acceptance: mean acceptance probability.
        leapfrog_steps: mean number of leapfrog steps of a transition.
        faults: reasons why the moments cannot be used; empty if they can.
        guide_mean: the guide's means, (d,).
        path: means over the chains after each transition, including the warm-up, (n, d).
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
    num_chains: int
    num_draws: int
    acceptance: float
    leapfrog_steps: float
    faults: list[str]
    guide_mean: np.ndarray
    path: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        """Distance of the chains' means from the guide's, in posterior sds, (d,)."""
        return (self.mean - self.guide_mean) / self.sd

    @property
    def reliable(self) -> bool:
        """Whether the chains meet a reference's limits on R-hat and effective sample size."""
        return not self.faults

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        if self.faults:
            return f"the chains cannot be used: {self.faults[0]}"
        return (
            f"the chains agree (largest R-hat {self.r_hat.max():.4f}, smallest bulk ESS "
            f"{self.bulk_ess.min():.0f})"
        )

    def __repr__(self) -> str:
        return (
            f"{self.num_chains} warm chains x {self.num_draws} draws of {len(self.names)} scalars, "
            f"{self.leapfrog_steps:.1f} leapfrog steps each: {self.meaning}"
        )

    def plot(self) -> Figure:
        """Figure with the chains' means over time, from the guide's on, and R-hat per scalar.

        The means are in posterior sds, for the six scalars that move most. The grey band is two
        standard errors of a mean over the chains and a slice of time. If the guide is right, the
        means start inside the band, near zero.
        """
        order = np.argsort(-np.abs(self.moved))[:MOST_LINES]
        edges = [0]
        while edges[-1] < len(self.path):  # slices that grow, because most happens at the beginning
            edges.append(min(max(edges[-1] + 1, int(1.5 * edges[-1])), len(self.path)))
        slices = [np.arange(a, b) for a, b in itertools.pairwise(edges)]
        when = [0.6, *(float(np.sqrt((s[0] + 1) * (s[-1] + 1))) for s in slices)]
        means = np.stack([self.guide_mean, *(self.path[s].mean(0) for s in slices)])
        moved = (means - self.mean) / self.sd
        # Effective draws of one transition.
        rate = self.bulk_ess.min() / (self.num_chains * self.num_draws)
        counts = np.array([1, *(len(s) for s in slices)])
        noise = 2 / np.sqrt(self.num_chains * np.maximum(1, min(rate, 1) * counts))
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(9, 3.2), layout="constrained")
            left, right = figure.subplots(1, 2, width_ratios=(2, 1))
            left.fill_between(when, -noise, noise, color=REFERENCE, lw=0)
            left.axvline(sum(WARMUP), **LIMIT)
            for k, i in enumerate(order):
                left.plot(when, moved[:, i], color=COLOURS[k], lw=1.3, label=self.names[i])
                left.plot(when[:1], moved[:1, i], "o", ms=4, color=COLOURS[k])
            left.annotate(
                "kept from here", (sum(WARMUP), 0.02), (3, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=7.5, color=GREY,
            )  # fmt: skip
            left.set_xscale("log")
            left.set_xticks([0.6, 1, 10, 100, 1000], ["guide", "1", "10", "100", "1000"])
            left.minorticks_off()
            left.set_xlim(0.5, len(self.path))
            left.set_xlabel("transition")
            left.set_ylabel("mean of the chains (posterior sds)")
            left.set_title("Do the chains leave the guide?")
            figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=MOST_LINES)
            right.plot(self.bulk_ess, self.r_hat, "o", ms=3.5, alpha=0.7, color=COLOURS[0])
            right.axhline(MAX_R_HAT, **LIMIT)
            right.axvline(MIN_ESS, **LIMIT)
            right.set_xscale("log")
            right.set_xlabel("bulk ESS")
            right.set_ylabel("rank R-hat")
            right.set_title("usable" if self.reliable else "not usable")
        return figure


def warm_chains(fit: Fit, covariance: np.ndarray | None = None, seed: int = 0) -> WarmChains | None:
    """Posterior moments by many short HMC chains, run in parallel from draws of the guide.

    The chains leave the posterior unchanged. If the guide q is the posterior, their distribution
    therefore stays that of q; if it is not, their moments move from q's to the posterior's. Chains
    do not need the weights of q, so they work where importance sampling fails, in a hundred
    dimensions and more.

    There are 32 to 128 chains, fewer if the data are large. They share a step size and a metric,
    which are adapted to all of them, and their trajectories have random lengths. The first 150
    transitions are thrown away and at least 150 are kept per chain. That number is doubled, up to
    1,200, while moments have standard errors above 0.0125 sd or the chains disagree.

    The moments must pass the rules for a reference (rank R-hat < 1.01, bulk and tail ESS >= 1,000).
    The exception is that one transition in 2,000 may diverge, because no chain has a step size of
    its own. The starts are as spread as q, so a direction in which the chains have hardly moved has
    a large R-hat. Chains that mix well within q do not find mass that they rarely reach, such as
    mass behind a barrier or a narrow neck, and in particular other modes
    (:func:`~vi_toolkit.missed_modes`).

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data, without discrete latents.
        covariance: covariance for the first metric, (d, d), such as that of linear response; the
            guide's if None.
        seed: of starts and chains.

    Returns:
        A :class:`WarmChains`; None if the chains would take minutes (more than 5e8 gradients of one
        datum's term) or if the model cannot be evaluated at many draws at once.

    References:
        Duane, Kennedy, Pendleton and Roweth, "Hybrid Monte Carlo", 1987; Hoffman and Sountsov,
        "Tuning-Free Generalized Hamiltonian Monte Carlo", AISTATS 2022 (adaptation over
        chains); Margossian et al., "Nested R-hat", Bayesian Analysis, 2024 (many short chains);
        Yao et al., "Yes, but Did It Work?", ICML 2018 (the question).

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> tril = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> def model():
        ...     pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
        >>> fit = vi.fit(model, AutoNormal, {}, progress=False)  # its sds are 0.6, the right ones 1
        >>> vi.warm_chains(fit).sd.round(1)
        array([1., 1.])
    """
    joint = fit.joint
    each = joint.observations + joint.dim
    num_chains = int(min(MOST_CHAINS, max(FEWEST, ROOM // each)))
    size = num_chains * each
    if size * (sum(WARMUP) + FIRST) * 5 > MOST_WORK:
        return None
    dtype = joint.start.dtype
    start = joint.flatten(fit.sample(num_chains, seed=seed)).detach().to(dtype)
    u = joint.flatten(fit.sample(max(4_000, 4 * joint.dim), seed=seed + 1)).detach().double()
    if covariance is None:
        metric = torch.cov(u.T).reshape(joint.dim, -1) if joint.dim <= DENSE else u.var(0)
    else:
        metric = torch.as_tensor(covariance, dtype=torch.float64)
        metric = metric if joint.dim <= DENSE else metric.diagonal()
    with fit.workspace.isolated(seeded_state(fit.derived_seed(seed, 6))), torch.no_grad():
        chains = _Chains(joint, start, metric.to(start))
        if joint.many_with_gradient.vectorises is False and joint.compiled is None:
            return None
        before = [u for length in WARMUP for u in chains.adapt(length)]
        chains.divergences, chains.leapfrog_steps, chains.rates = 0, [], []
        kept = [chains.transition() for _ in range(FIRST)]
        while True:
            draws = torch.stack(kept, 1).double().numpy()
            error, r_hat = _error_and_r_hat(draws)
            leapfrog_steps = float(np.mean(chains.leapfrog_steps))
            work = size * (2 * len(kept) + sum(WARMUP)) * leapfrog_steps
            last = 2 * len(kept) > MOST or work > MOST_WORK
            # R-hat - 1 falls as 1 / draws: beyond this, even the longest run would not suffice.
            last |= not (r_hat - 1) * len(kept) / MOST < MAX_R_HAT - 1
            last |= chains.divergences > DIVERGENT * num_chains * len(kept)
            if last or (error <= WANTED and r_hat < MAX_R_HAT):
                path = torch.stack(before + kept).double().mean(1).numpy()
                found = _summary(chains, draws, u.mean(0).numpy(), path)
                if last or found.reliable:
                    return found
            kept += [chains.transition() for _ in range(len(kept))]


def _error_and_r_hat(draws: np.ndarray) -> tuple[float, float]:
    """Largest standard error of a mean or sd, in sds, and largest split R-hat, (chains, n, d).

    The standard errors come from the spread over the chains, and R-hat is taken without ranks:
    ranks and effective sample sizes take seconds for a hundred scalars. These numbers tell when
    they are worth computing.
    """
    mean, sd = draws.mean((0, 1)), draws.std((0, 1))
    half, root = draws.shape[1] // 2, math.sqrt(len(draws))
    r_hats = []
    for x in (draws - mean, np.abs(draws - np.median(draws, (0, 1)))):
        halves = np.concatenate([x[:, :half], x[:, half : 2 * half]])
        r_hats.append(each_scalar(az.rhat, halves, method="identity").max())
    square = ((draws - mean) ** 2).mean(1)
    mean_error = (draws.mean(1).std(0, ddof=1) / root / sd).max()
    sd_error = (square.std(0, ddof=1) / root / (2 * sd**2)).max()
    return float(max(mean_error, sd_error)), float(max(r_hats))


class _Chains:
    """HMC chains that run in parallel: positions (chains, d), a common step size and metric."""

    def __init__(self, joint: Joint, start: torch.Tensor, covariance: torch.Tensor):
        self.joint, self.position, self.covariance = joint, start, covariance
        self.gradient, self.value = self._density(start)
        self.log_step = math.log(0.5 / joint.dim**0.25)  # falls with d as in Beskos et al., 2013
        self.divergences = 0
        self.rates: list[float] = []
        self.leapfrog_steps: list[int] = []
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

    def adapt(self, length: int) -> list[torch.Tensor]:
        """Transitions that adapt the step size, and the metric at their end; the positions."""
        past = []
        for i in range(length):
            past.append(self.transition())
            # On a Gaussian, leapfrog is unstable with a step size of 2, and above 1 the angle by
            # which it turns is wrong.
            self.log_step = min(self.log_step + (self.rates[-1] - ACCEPTED) / math.sqrt(1 + i), 0)
        x = torch.cat(past[length // 3 :])
        n, d = x.shape
        share = n / (n + 5 * d)  # the covariance of few, correlated draws is noisy
        new = torch.cov(x.T).reshape(d, d) if self.covariance.dim() == 2 else x.var(0)
        self.covariance = share * new + (1 - share) * self.covariance
        self._factorise()
        return past

    def transition(self) -> torch.Tensor:
        """One transition of every chain; the new positions (chains, d)."""
        # A quarter of a period is best for a Gaussian. The length varies by half of that, because
        # with a fixed length some direction might return to its start.
        length = math.pi / 2 * (0.5 + float(torch.rand(())))
        count = min(math.ceil(length / math.exp(self.log_step)), MOST_LEAPFROG_STEPS)
        step = min(length / count, math.exp(self.log_step))
        p = torch.randn_like(self.position)
        before = self.value - 0.5 * p.square().sum(1)
        u, gradient, value = self.position, self.gradient, self.value
        for _ in range(count):
            p = p + 0.5 * step * self._white(gradient)
            u = u + step * self._latent(p)
            gradient, value = self._density(u)
            p = p + 0.5 * step * self._white(gradient)
        change = value - 0.5 * p.square().sum(1) - before
        self.divergences += int((~(change > -1_000)).sum())
        accept = change.nan_to_num(nan=-math.inf).clamp_max(0).exp()
        moves = torch.rand_like(accept) < accept
        self.position = torch.where(moves[:, None], u, self.position)
        self.gradient = torch.where(moves[:, None], gradient, self.gradient)
        self.value = torch.where(moves, value, self.value)
        self.rates.append(float(accept.mean()))
        self.leapfrog_steps.append(count)
        return self.position


def _summary(
    chains: _Chains, draws: np.ndarray, guide_mean: np.ndarray, path: np.ndarray
) -> WarmChains:
    names = list(chains.joint.names)
    r_hat = each_scalar(az.rhat, draws)
    bulk, tail = each_scalar(az.ess, draws), each_scalar(az.ess, draws, method="tail")
    num_chains, num_draws, d = draws.shape
    faults = admission_faults(names, r_hat, bulk, tail, 0)
    if chains.divergences > DIVERGENT * num_chains * num_draws:
        faults.append(f"{chains.divergences} of {num_chains * num_draws} transitions diverged")
    flat = draws.reshape(-1, d)
    return WarmChains(
        names=names,
        mean=flat.mean(0),
        sd=flat.std(0),
        mean_se=each_scalar(az.mcse, draws),
        sd_se=each_scalar(az.mcse, draws, method="sd"),
        r_hat=r_hat,
        bulk_ess=bulk,
        tail_ess=tail,
        divergences=chains.divergences,
        num_chains=num_chains,
        num_draws=num_draws,
        acceptance=float(np.mean(chains.rates)),
        leapfrog_steps=float(np.mean(chains.leapfrog_steps)),
        faults=faults,
        guide_mean=guide_mean,
        path=path,
    )
