"""The random numbers of a guide, taken out of its hands.

A reparameterised guide is a deterministic function of its parameters and of base noise. To fix
that noise (deterministic VI), or to draw it for many samples at once under ``torch.func.vmap``
(sampling), something must stand between the guide and torch's generators. A
``TorchFunctionMode`` does this without touching any global: it is scoped and thread-local.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from scipy import special
from torch.distributions import Beta, Dirichlet, Independent
from torch.overrides import TorchFunctionMode

from vi_toolkit import torch_private
from vi_toolkit.errors import VIError

# Random functions whose results are not a smooth function of the distribution's parameters.
_DISCRETE = {torch.bernoulli, torch.multinomial, torch.poisson, torch.binomial, torch.randint}


class UnsupportedNoise(ValueError):
    """A guide draws from a distribution whose base noise cannot be fixed."""


class FunctionalNoise(TorchFunctionMode):
    """Turn random fills into functions that ``vmap`` can batch, with another draw for each row."""

    def __enter__(self):
        self._sites = _DirichletSites()
        self._sites.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._sites.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_ and len(args) == 1 and not kwargs:
            return torch.randn_like(args[0])
        if func is torch.Tensor.exponential_ and len(args) == 1 and not kwargs:
            return -torch.log1p(-torch.rand_like(args[0]))
        if func is torch.Tensor.uniform_ and len(args) == 1 and not kwargs:
            return torch.rand_like(args[0])
        return func(*args, **kwargs)


class _DirichletSites(Messenger):
    """Draw Beta and Dirichlet sites by a function that ``vmap`` can batch, unlike torch's own.

    The draws and their implicit gradient are torch's.
    """

    def __init__(self) -> None:
        super().__init__()
        names = ("sample_dirichlet", "dirichlet_grad")
        self._available = all(torch_private.optional(name) is not None for name in names)

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while isinstance(fn, Independent):
            fn = fn.base_dist
        if msg["done"] or msg["is_observed"] or not self._available:
            return
        if isinstance(fn, Beta):
            concentration = torch.stack([fn.concentration1, fn.concentration0], -1)
        elif isinstance(fn, Dirichlet):
            concentration = fn.concentration
        else:
            return
        # A tensor that is the same for all rows would be drawn from once, for all of them.
        each_row = 0 * torch.rand((), dtype=concentration.dtype, device=concentration.device)
        value = _ImplicitDirichlet.apply(concentration + each_row)
        msg["value"] = value[..., 0] if isinstance(fn, Beta) else value
        msg["done"] = True


class _ImplicitDirichlet(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(concentration):
        return torch_private.sample_dirichlet(concentration)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, grad):
        concentration, x = ctx.saved_tensors
        total = concentration.sum(-1, True).expand_as(concentration)
        slope = torch_private.dirichlet_grad(x, concentration, total)
        return slope * (grad - (x * grad).sum(-1, True))

    @staticmethod
    def vmap(info, in_dims, concentration):
        return _ImplicitDirichlet.apply(concentration.movedim(in_dims[0], 0).contiguous()), 0


class RecordNoise(TorchFunctionMode):
    """Count how much base noise one run of a guide asks for (``total`` uniform numbers).

    Raises:
        UnsupportedNoise: the guide's noise cannot be held fixed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        try:
            self._gamma = torch_private.standard_gamma
            self._dirichlet = torch_private.sample_dirichlet
        except VIError as error:
            # Gamma draws could not be recognised, and their noise would not be fixed.
            raise UnsupportedNoise(str(error)) from error

    def _serve(self, like: torch.Tensor) -> torch.Tensor:
        self.total += like.numel()
        return torch.rand_like(like).clamp(1e-6, 1 - 1e-6)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_ and len(args) == 1 and not kwargs:
            return torch.special.ndtri(self._serve(args[0]))
        if func in (torch.Tensor.uniform_, torch.rand_like) and len(args) == 1:
            return self._serve(args[0])
        if func is torch.Tensor.exponential_ and len(args) == 1 and not kwargs:
            return -torch.log1p(-self._serve(args[0]))
        if func is torch.rand:
            return self._serve(torch.empty(*args, **kwargs))
        if func is torch.randn:
            return torch.special.ndtri(self._serve(torch.empty(*args, **kwargs)))
        if func is torch.normal and len(args) == 2:
            mean, sd = args
            return mean + sd * torch.special.ndtri(self._serve(mean))
        if func is self._gamma:
            return _GammaQuantile.apply(args[0], self._serve(args[0]))
        if func is self._dirichlet:
            gamma = _GammaQuantile.apply(args[0], self._serve(args[0]))
            return gamma / gamma.sum(-1, keepdim=True)
        if func in _DISCRETE:
            raise UnsupportedNoise(
                f"the guide draws from torch.{func.__name__}, which no change of base noise "
                "makes differentiable"
            )
        return func(*args, **kwargs)


class FixedNoise(RecordNoise):
    """Serve given numbers, in the order in which the guide asks for them.

    Args:
        normals: shape (total,), the base noise of one draw, as standard normal numbers (a request
            for uniform numbers gets their distribution function).
    """

    def __init__(self, normals: torch.Tensor):
        super().__init__()
        self.normals = normals

    def _serve(self, like: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr(self._take(like)).clamp(1e-300, 1 - 1e-16)

    def _take(self, like: torch.Tensor) -> torch.Tensor:
        n = like.numel()
        if self.total + n > self.normals.shape[-1]:
            raise UnsupportedNoise(
                "the guide asks for more random numbers in one run than in another: its structure "
                "is not fixed"
            )
        z = self.normals[..., self.total : self.total + n].reshape(like.shape)
        self.total += n
        return z.to(like.dtype)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A normal request must not lose digits on the way through the uniform.
        if func is torch.Tensor.normal_ and len(args) == 1 and not kwargs:
            return self._take(args[0])
        if func is torch.randn:
            return self._take(torch.empty(*args, **kwargs))
        if func is torch.normal and len(args) == 2:
            mean, sd = args
            return mean + sd * self._take(mean)
        return super().__torch_function__(func, types, args, kwargs)


class _GammaQuantile(torch.autograd.Function):
    """z = F^-1(u; concentration), the gamma quantile, a smooth function of the concentration.

    torch's own rejection sampler is not smooth at a fixed seed, and its implicit derivative is an
    approximation good to 1e-4, which would stall a quasi-Newton method; a central difference of
    SciPy's quantile is good to 1e-9.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(concentration, u):
        return _gamma_quantile(concentration.detach(), u.detach())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        concentration, u = (t.detach().double() for t in ctx.saved_tensors)
        h = 1e-5 * concentration
        above, below = (_gamma_quantile(concentration + s * h, u) for s in (1, -1))
        return grad * ((above - below) / (2 * h)).to(grad.dtype), None

    @staticmethod
    def vmap(info, in_dims, concentration, u):
        def move(x: torch.Tensor, dim: int | None) -> torch.Tensor:
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        batched = torch.broadcast_tensors(move(concentration, in_dims[0]), move(u, in_dims[1]))
        return _GammaQuantile.apply(*batched), 0


def _gamma_quantile(concentration: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    z = special.gammaincinv(concentration.cpu().numpy(), u.cpu().numpy())
    z = np.maximum(z, np.finfo(np.float64).tiny)
    return torch.as_tensor(z, dtype=concentration.dtype, device=concentration.device)


def fixed_normals(num_draws: int, dim: int, seed: int, offset: int = 0) -> torch.Tensor:
    """Quasi-random standard normal draws with exactly zero mean and identity covariance.

    Scrambled Sobol points through the normal quantile, made antithetic (so that every odd moment
    is exact) and, where there are enough of them, linearly mapped so that the second moments are
    exact too. An ELBO over them is therefore exact for a quadratic log density.

    Args:
        num_draws: number of draws, even.
        dim: length of one draw.
        seed, offset: name the scramble; another offset is an independent set.

    Returns:
        (draws, dim), float64.
    """
    half = num_draws // 2
    seed = int(np.random.SeedSequence([seed, offset]).generate_state(1)[0])
    if dim <= 21201:  # what torch's direction numbers cover
        engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
        u = engine.draw(half, dtype=torch.float64).clamp(1e-10, 1 - 1e-10)
        x = torch.special.ndtri(u)
    else:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(half, dim, generator=generator, dtype=torch.float64)
    if half > dim:
        covariance = x.T @ x / half
        x = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), x.T, upper=False).T
    else:  # too few for a full covariance: exact variances at least
        x = x / x.pow(2).mean(0).sqrt()
    return torch.cat([x, -x])
