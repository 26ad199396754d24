r"""Baselines, which are subtracted from the learning signal of a score-function gradient.

The score of a latent multiplies its learning signal R, the sum of the ELBO's terms that involve
the latent. The score has mean zero, so :math:`E[\nabla \log q(z)\,(R - b)]` is the same for every
b that does not depend on the draw z, and a good b makes the variance small. The baselines here
compute b from other things than z: from earlier steps, from the other particles, from the data.

A baseline keeps what it learns for each element of the site. Inside a data plate that is for each
datum, by its index in the plate and not by its position in the minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, torch.Tensor]


@dataclass
class Signal:
    """The input of a baseline for one score site at one step, without gradients.

    Attributes:
        site: name of the site.
        signal: R divided by the site's scale, shape (S, *elements): particles, then the site's
            plates and independent coordinates.
        scores: function without arguments. It returns a dict from each parameter of the
            distribution to the score with respect to it, shape (S, *elements, *shape of that
            parameter for one element), or None if they are unknown.
        rows: axis of ``elements`` -> (indices of the data in the minibatch, number of data).
        data: keyword arguments of model and guide.
        cut: whether ``data`` hold the minibatch only.
    """

    site: str
    signal: torch.Tensor
    scores: Callable[[], dict[str, torch.Tensor] | None]
    rows: dict[int, tuple[torch.Tensor, int]]
    data: Mapping[str, Any]
    cut: bool = False

    def full_shape(self, shape: torch.Size) -> torch.Size:
        """The shape (*elements, ...) for all the data instead of the minibatch."""
        full = list(shape)
        for axis, (_, size) in self.rows.items():
            full[axis] = size
        return torch.Size(full)

    def _index(self, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        index = []
        for axis, size in enumerate(shape):
            rows = self.rows[axis][0] if axis in self.rows else torch.arange(size)
            index.append(rows.reshape(-1, *[1] * (len(shape) - axis - 1)))
        return tuple(index)

    def get(self, kept: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The minibatch's part of a kept tensor, of the given shape."""
        return kept[self._index(shape)] if self.rows else kept

    def put(self, kept: torch.Tensor, new: torch.Tensor) -> None:
        """Write the finite entries of ``new`` into the minibatch's part of a kept tensor."""
        new = torch.where(new.isfinite(), new, self.get(kept, new.shape))
        if self.rows:
            kept.index_put_(self._index(new.shape), new)
        else:
            kept.copy_(new)


class Baseline:
    """Base class of the baselines, and a baseline of zero."""

    least_particles = 1

    def start(self, signal: Signal) -> State:
        """The tensors that the baseline keeps for one site, as they are before the first step."""
        return {}

    def __call__(
        self, signal: Signal, state: State
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the baseline of one step, and update ``state`` in place.

        Returns:
            b, which broadcasts to the signal's shape (S, *elements), and a dict of corrections:
            name of a parameter of the distribution -> tensor to subtract from the gradient with
            respect to it, shape (S, *elements, ...).
        """
        return torch.zeros((), dtype=signal.signal.dtype), {}

    def options(self) -> dict[str, Any]:
        """The arguments that the baseline was made with."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class RunningMean(Baseline):
    r"""Decaying average of the learning signal over earlier steps.

    .. math:: b_t = \frac{\sum_{s<t} \gamma^{t-1-s} \bar R_s}{\sum_{s<t} \gamma^{t-1-s}}

    where :math:`\bar R_s` is the mean over particles. Steps count for an element only if it is in
    their minibatch; at the first of them the baseline is zero.

    Args:
        decay: gamma, in [0, 1).

    References:
        Mnih and Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014.

    Example:
        >>> from vi_toolkit import RunningMean, Score
        >>> Score(baseline=RunningMean(decay=0.95))
        Score(particles=1, baseline=RunningMean(decay=0.95))
    """

    def __init__(self, decay: float = 0.9):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay!r}")
        self.decay = decay

    def options(self) -> dict[str, Any]:
        return {"decay": self.decay}

    def __repr__(self) -> str:
        return f"RunningMean(decay={self.decay})"

    def start(self, signal: Signal) -> State:
        shape = signal.full_shape(signal.signal.shape[1:])
        zeros = torch.zeros(shape, dtype=signal.signal.dtype)
        return {"sum": zeros, "weight": zeros.clone()}

    def __call__(
        self, signal: Signal, state: State
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = signal.signal.mean(0)
        total, weight = (signal.get(state[k], mean.shape).clone() for k in ("sum", "weight"))
        signal.put(state["sum"], self.decay * total + mean)
        signal.put(state["weight"], self.decay * weight + 1)
        return total / weight.clamp_min(1), {}


class LeaveOneOut(Baseline):
    r"""Mean of the learning signal over the other particles of the same step.

    .. math:: b_s = \frac{1}{S - 1} \sum_{s' \ne s} R_{s'}

    It keeps nothing from step to step, so it suits local latents of subsampled data. It needs at
    least two particles.

    References:
        Kool, van Hoof and Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019;
        Mnih and Rezende, "Variational Inference for Monte Carlo Objectives", 2016.

    Example:
        >>> from vi_toolkit import LeaveOneOut, Score
        >>> Score(particles=8, baseline=LeaveOneOut())
        Score(particles=8, baseline=LeaveOneOut())
    """

    least_particles = 2

    def __call__(
        self, signal: Signal, state: State
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        R = signal.signal
        return (R.sum(0) - R) / (len(R) - 1), {}


class ControlVariate(Baseline):
    r"""The score as a control variate, with its optimal coefficient (BBVI, 2014).

    Let :math:`h_d = \partial_{\phi_d} \log q(z_i)` be the score with respect to parameter d of
    factor i, and :math:`f_d = h_d R` the gradient. Then :math:`f_d - a h_d` has the same mean for
    every a, and the smallest variance at

    .. math:: a^* = \frac{\sum_d \mathrm{Cov}(f_d, h_d)}{\sum_d \mathrm{Var}(h_d)}
              = \frac{\sum_d E[h_d^2 R]}{\sum_d E[h_d^2]}, \qquad (E[h_d] = 0)

    with one a per factor or, without the sums, one per coordinate d. The moments are estimated from
    the other particles of the step and from earlier steps. They never include the draw that a is
    used with, which would bias the gradient by O(1/S). Where the squared correlation of f and h in
    these moments is too small, a is zero.

    A factor is one coordinate of a site: one element of its plates and independent dimensions. Its
    parameters are those of the distribution (``loc`` and ``scale``, ``logits``). If a distribution
    does not expose them, h is taken as constant, so that a is the mean of R.

    Args:
        per: "factor", as in the paper, or "coordinate", as in its authors' code for deep
            exponential families.
        memory: factor by which the weight of earlier moments shrinks each time that the element
            is in the minibatch; 0 to use the other particles of this step only, of which there
            must then be at least one.
        least_correlation: squared correlation of f and h below which a is zero; 0.5 in the
            authors' code.

    References:
        Ranganath, Gerrish and Blei, "Black Box Variational Inference", 2014; Ranganath, Tang,
        Charlin and Blei, "Deep Exponential Families", 2015 (its released code).

    Example:
        >>> from vi_toolkit import ControlVariate, Score
        >>> Score(particles=4, baseline=ControlVariate(per="coordinate"))
        Score(particles=4, baseline=ControlVariate(per='coordinate'))
    """

    def __init__(self, per: str = "factor", memory: float = 0.9, least_correlation: float = 0.5):
        if per not in ("factor", "coordinate"):
            raise ValueError(f"per must be 'factor' or 'coordinate', not {per!r}")
        if not 0 <= memory < 1:
            raise ValueError(f"memory must be in [0, 1), not {memory!r}")
        self.per, self.memory, self.least_correlation = per, memory, least_correlation
        self.least_particles = 1 if memory else 2

    def options(self) -> dict[str, Any]:
        names = ("per", "memory", "least_correlation")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        given = [f"per={self.per!r}"] if self.per != "factor" else []
        given += [f"memory={self.memory}"] if self.memory != 0.9 else []
        if self.least_correlation != 0.5:
            given.append(f"least_correlation={self.least_correlation}")
        return f"ControlVariate({', '.join(given)})"

    def _moments(self, signal: Signal) -> dict[str, torch.Tensor]:
        """h^2, h^2 R, h^2 R^2 and h R of each particle and parameter, and a count of one each."""
        scores = signal.scores()
        if scores is None:
            scores = {"": torch.ones_like(signal.signal)}
        out = {}
        for name, h in scores.items():
            extra = h.dim() - signal.signal.dim()
            R = signal.signal.reshape(*signal.signal.shape, *[1] * extra)
            out[f"{name} hh"], out[f"{name} hhR"] = h * h, h * h * R
            out[f"{name} hhRR"], out[f"{name} hR"] = h * h * R * R, h * R
        out["count"] = torch.ones_like(signal.signal)
        return out

    def start(self, signal: Signal) -> State:
        if not self.memory:
            return {}
        return {
            name: torch.zeros(signal.full_shape(m.shape[1:]), dtype=m.dtype)
            for name, m in self._moments(signal).items()
        }

    def _others(self, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over the other particles of the step."""
        return {name: m.sum(0) - m for name, m in moments.items()}

    def __call__(
        self, signal: Signal, state: State
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        moments = self._moments(signal)
        known = self._others(moments)
        for name, kept in state.items():
            earlier = signal.get(kept, moments[name].shape[1:]).clone()
            known[name] = known[name] + earlier
            signal.put(kept, self.memory * (earlier + moments[name].sum(0)))
        names = [n.removesuffix(" hh") for n in moments if n.endswith(" hh")]
        if self.per == "factor" or names == [""]:
            sums = {
                key: torch.stack([self._per_factor(known[f"{n} {key}"], signal) for n in names])
                for key in ("hh", "hhR", "hhRR")
            }
            sums = {key: parts.sum(0) for key, parts in sums.items()}
            squared = [self._per_factor(known[f"{n} hR"].square(), signal) for n in names]
            squared_sum = torch.stack(squared).sum(0)
            return self._coefficient(**sums, squared=squared_sum, n=known["count"]), {}
        scores = signal.scores() or {}
        corrections = {}
        for n in names:
            extra = known[f"{n} hh"].dim() - signal.signal.dim()
            a = self._coefficient(
                **{key: known[f"{n} {key}"] for key in ("hh", "hhR", "hhRR")},
                squared=known[f"{n} hR"].square(),
                n=known["count"].reshape(*known["count"].shape, *[1] * extra),
            )
            corrections[n] = a * scores[n]
        return torch.zeros_like(signal.signal), corrections

    def _per_factor(self, moment: torch.Tensor, signal: Signal) -> torch.Tensor:
        extra = moment.dim() - signal.signal.dim()
        return moment.flatten(-extra).sum(-1) if extra else moment

    def _coefficient(
        self,
        hh: torch.Tensor,
        hhR: torch.Tensor,
        hhRR: torch.Tensor,
        squared: torch.Tensor,
        n: torch.Tensor,
    ) -> torch.Tensor:
        """a* from sums over n draws, but 0 where corr^2 = Cov^2 / (Var f Var h) is too small.

        ``squared`` is (sum of h R)^2; Var f = (sum h^2 R^2 - squared / n) / n.
        """
        tiny = torch.finfo(hh.dtype).tiny
        variance = (hhRR - squared / n.clamp_min(1)) * hh
        supported = (n >= 2) & (hhR.square() >= self.least_correlation * variance) & (hh > 0)
        return torch.where(supported, hhR / hh.clamp_min(tiny), 0.0)


class Neural(Baseline):
    r"""A network that predicts the learning signal from the data (NVIL, 2014).

    .. math:: b_n = m + s\, C_\psi(x_n)

    where m and s are the running mean and standard deviation of R. Adam fits :math:`\psi` by the
    loss :math:`((R_n - m) / s - C_\psi(x_n))^2`, so that the network's target has unit variance
    whatever the scale of the model. (The paper also divides the learning signal by s, which
    rescales the gradient. Here the gradient stays unbiased.)

    Each site gets its own copy of the network, trained as part of the estimator's step. The network
    is neither in the parameter store nor in the optimiser of the fit.

    Args:
        net: module from ``inputs`` to one number per datum: (n, ...) -> (n, 1); or to any shape
            that broadcasts to the site's elements, such as (n, K) for K coordinates.
        inputs: name of the data entry to give to the network, with one datum per row; or a
            function from the dict of all data to such a tensor.
        learning_rate: step size of Adam.
        decay: of the running mean and variance.

    References:
        Mnih and Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014;
        Kingma and Ba, "Adam", 2015.

    Example:
        >>> import torch
        >>> from vi_toolkit import Neural, Score
        >>> Score(baseline=Neural(torch.nn.Linear(3, 1), "x"))
        Score(particles=1, baseline=Neural(Linear(in_features=3, out_features=1, bias=True), 'x'))
    """

    def __init__(
        self,
        net: torch.nn.Module,
        inputs: str | Callable[[Mapping[str, Any]], torch.Tensor],
        learning_rate: float = 0.01,
        decay: float = 0.9,
    ):
        self.net, self.inputs = net, inputs
        self.learning_rate, self.decay = learning_rate, decay

    def __repr__(self) -> str:
        return f"Neural({self.net!r}, {self.inputs!r})"

    def start(self, signal: Signal) -> State:
        state = {}
        for name, p in self.net.named_parameters():
            state[f"net {name}"] = p.detach().clone()
            for moment in ("first", "second"):
                state[f"{moment} {name}"] = torch.zeros_like(p.detach())
        for name, b in self.net.named_buffers():
            state[f"net {name}"] = b.detach().clone()
        zero = torch.zeros((), dtype=signal.signal.dtype)
        return state | {name: zero.clone() for name in ("steps", "weight", "mean", "square")}

    def __call__(
        self, signal: Signal, state: State
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        names = [name for name, _ in self.net.named_parameters()]
        weight, mean, square = (state[k].clone() for k in ("weight", "mean", "square"))
        known = weight > 0
        m = torch.where(known, mean / weight.clamp_min(1e-30), 0.0)
        variance = torch.where(known, square / weight.clamp_min(1e-30) - m * m, 1.0)
        s = variance.clamp_min(1e-12).sqrt()
        x = self._inputs(signal)
        leaves = {name: state[f"net {name}"].detach().clone().requires_grad_() for name in names}
        buffers = {name: state[f"net {name}"] for name, _ in self.net.named_buffers()}
        with torch.enable_grad():
            prediction = torch.func.functional_call(self.net, {**leaves, **buffers}, (x,))
            prediction = self._shaped(prediction, signal)
            target = (signal.signal - m) / s
            error = (target - prediction).square().mean()
            grads = torch.autograd.grad(error, [leaves[name] for name in names])
        with torch.no_grad():
            state["steps"].add_(1)
            for name, g in zip(names, grads, strict=True):
                self._adam(state, name, g)
            state["weight"].copy_(self.decay * weight + 1 - self.decay)
            state["mean"].copy_(self.decay * mean + (1 - self.decay) * signal.signal.mean())
            second = signal.signal.square().mean()
            state["square"].copy_(self.decay * square + (1 - self.decay) * second)
        return m + s * prediction.detach(), {}

    def _inputs(self, signal: Signal) -> torch.Tensor:
        data = signal.data
        if callable(self.inputs):
            x = self.inputs(data)
        elif self.inputs in data:
            x = data[self.inputs]
        else:
            raise ValueError(
                f"the baseline of site {signal.site!r} needs the data entry {self.inputs!r}, but "
                f"the entries are {sorted(data)}; pass model and guide their data by keyword"
            )
        for rows, size in signal.rows.values():
            if x.shape[0] == size and not signal.cut:
                return x[rows]
        return x

    def _shaped(self, prediction: torch.Tensor, signal: Signal) -> torch.Tensor:
        elements = signal.signal.shape[1:]
        if prediction.dim() == 2 and prediction.shape[-1] == 1 and len(elements) == 1:
            prediction = prediction[:, 0]
        try:
            torch.broadcast_to(prediction, elements)
        except RuntimeError as error:
            raise ValueError(
                f"the baseline net of site {signal.site!r} returned shape "
                f"{tuple(prediction.shape)}, which does not broadcast to the site's "
                f"{tuple(elements)}"
            ) from error
        return prediction

    def _adam(self, state: State, name: str, g: torch.Tensor) -> None:
        first, second, t = state[f"first {name}"], state[f"second {name}"], state["steps"]
        first.mul_(0.9).add_(g, alpha=0.1)
        second.mul_(0.999).addcmul_(g, g, value=0.001)
        step = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        state[f"net {name}"].sub_(self.learning_rate * step)
