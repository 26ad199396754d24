"""Optimiser updates as pure functions, for the optimisers of torch whose step can be compiled.

Each rule repeats the arithmetic of its ``torch.optim`` class in the same order, so that a compiled
step and an eager one differ by rounding only. What depends on the step number or the learning rate
(bias corrections, decoupled weight decay) is computed in double precision outside the graph and is
an input of it, as *coefficients*. So no schedule has to be compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vi_toolkit.errors import CompileError

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """How one parameter group is updated.

    Attributes:
        slots: names of the per-parameter state in ``optimizer.state``.
        coefficients: (learning rate, number of the step, counted from 1) -> numbers; or arrays
            of numbers, for an array of steps.
        update: (parameters, gradient, slots, coefficients) -> (parameters, slots). All are flat
            vectors of the same length, except the coefficients, which are 0-dimensional.
        counted: whether ``optimizer.state`` counts steps under "step".
    """

    slots: tuple[str, ...]
    coefficients: Callable[[float, Any], list[Any]]
    update: Callable[[torch.Tensor, torch.Tensor, Tensors, Tensors], tuple[torch.Tensor, Tensors]]
    counted: bool


def rule_for(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Rule:
    """The update rule of one parameter group.

    Raises:
        CompileError: there is no rule for this optimiser or one of its options.

    Example:
        >>> import torch
        >>> p = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.SGD([p], lr=0.5)
        >>> rule = rule_for(optimizer, optimizer.param_groups[0])
        >>> c = torch.tensor(rule.coefficients(0.5, 1.0)).unbind()
        >>> rule.update(p.detach(), torch.ones(2), [], c)
        (tensor([-0.5000, -0.5000]), [])
    """
    kind = type(optimizer)
    make = _RULES.get(kind)
    if make is None:
        names = ", ".join(k.__name__ for k in _RULES)
        raise CompileError(f"the optimiser {kind.__name__} is not one of {names}")
    if group.get("differentiable") or isinstance(group["lr"], torch.Tensor):
        raise CompileError(f"{kind.__name__} has a tensor as learning rate, or is differentiable")
    return make(group)


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """The settings that are written into the compiled step. (The learning rate is not.)"""
    return {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}


def _adam(group: dict[str, Any]) -> Rule:
    beta1, beta2 = (float(b) for b in group["betas"])
    eps, decay = float(group["eps"]), float(group["weight_decay"])
    decoupled = bool(group.get("decoupled_weight_decay", False))
    amsgrad, sign = bool(group["amsgrad"]), -1 if group["maximize"] else 1

    def coefficients(rate: float, step: Any) -> list[Any]:
        return [
            rate / (1 - beta1**step),
            (1 - beta2**step) ** 0.5,
            1 - rate * decay if decoupled else 1.0,
        ]

    def update(
        p: torch.Tensor, g: torch.Tensor, slots: Tensors, c: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        g = sign * g if sign < 0 else g
        if decay and decoupled:
            p = p * c[2]
        elif decay:
            g = g + decay * p
        first, second = slots[:2]
        first = first + (1 - beta1) * (g - first)
        second = second * beta2 + (1 - beta2) * (g * g)
        largest = torch.maximum(slots[2], second) if amsgrad else second
        p = p - c[0] * (first / (largest.sqrt() / c[1] + eps))
        return p, [first, second, largest] if amsgrad else [first, second]

    names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if amsgrad else ())
    return Rule(names, coefficients, update, counted=True)


def _sgd(group: dict[str, Any]) -> Rule:
    momentum, dampening = float(group["momentum"]), float(group["dampening"])
    decay, nesterov = float(group["weight_decay"]), bool(group["nesterov"])
    sign = -1 if group["maximize"] else 1

    def update(
        p: torch.Tensor, g: torch.Tensor, slots: Tensors, c: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        g = sign * g if sign < 0 else g
        if decay:
            g = g + decay * p
        if not momentum:
            return p - c[0] * g, []
        buffer = slots[0] * momentum + (1 - dampening) * g
        return p - c[0] * (g + momentum * buffer if nesterov else buffer), [buffer]

    names = ("momentum_buffer",) if momentum else ()
    return Rule(names, lambda rate, step: [rate], update, counted=False)


def _rmsprop(group: dict[str, Any]) -> Rule:
    alpha, eps = float(group["alpha"]), float(group["eps"])
    momentum, decay = float(group["momentum"]), float(group["weight_decay"])
    centred, sign = bool(group["centered"]), -1 if group["maximize"] else 1

    def update(
        p: torch.Tensor, g: torch.Tensor, slots: Tensors, c: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        g = sign * g if sign < 0 else g
        if decay:
            g = g + decay * p
        square = slots[0] * alpha + (1 - alpha) * (g * g)
        new = [square]
        if centred:
            mean = slots[len(new)] + (1 - alpha) * (g - slots[len(new)])
            new.append(mean)
            root = (square - mean * mean).sqrt() + eps
        else:
            root = square.sqrt() + eps
        if not momentum:
            return p - c[0] * (g / root), new
        buffer = slots[len(new)] * momentum + g / root
        return p - c[0] * buffer, [*new, buffer]

    names: tuple[str, ...] = ("square_avg",)
    names += ("grad_avg",) if centred else ()
    names += ("momentum_buffer",) if momentum else ()
    return Rule(names, lambda rate, step: [rate], update, counted=True)


_RULES: dict[type, Callable[[dict[str, Any]], Rule]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.SGD: _sgd,
    torch.optim.RMSprop: _rmsprop,
}
