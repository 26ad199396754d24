"""One step, from the guide's sample to the gradient, as a graph without any Pyro code in it.

``make_fx`` runs the step once and records every tensor operation. Three things are settled here:

* *What stays symbolic.* Pyro reads the value of the loss to report it, and looks for NaN. Both are
  replaced while tracing, in this thread only, by a ``TorchFunctionMode`` that goes by the code
  object that asks. Any other reading of a random or parameter-dependent value is an error: the
  recorded graph would follow one branch for ever.
* *What goes in.* Tensors that the step picks up from outside (parameters, data, buffers) are
  lifted by identity: parameters and whatever the step changes in place become state, all others
  inputs. Nothing that can change is a constant of the graph.
* *What comes out the same way.* A trace runs the model, so what it changed in place is put back.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.infer.util
import pyro.util
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vi_toolkit.errors import CompileError
from vi_toolkit.programs.isolation import kept_random_state
from vi_toolkit.programs.vectorise import Unchecked

aten = torch.ops.aten


def _codes(*functions: Callable[..., Any]) -> set[Any]:
    return {f.__code__ for f in functions}


# Who may ask for a value, and what it gets instead.
_ITEM = _codes(pyro.infer.util.torch_item)
_NAN = _codes(
    pyro.util.torch_isnan, pyro.util.torch_isinf, pyro.util.warn_if_nan, pyro.util.warn_if_inf
)
_ALL = _codes(pyro.infer.util.Dice.compute_expectation)
_DOT = _codes(pyro.infer.util._fulldot)


class BookKeeping(TorchFunctionMode):
    """Pyro's own looks at tensor values, answered without a value."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ASKING:
            asks = _asker()
            if func is torch.Tensor.item and asks in _ITEM:
                return args[0].detach()
            if func is torch.Tensor.__bool__ and asks in _NAN:
                return False
            if func is torch.Tensor.register_hook and asks in _NAN:
                return None  # the same question about the gradient
            # Enumeration leaves out the terms of probability zero, whose cost may be infinite: a
            # selection whose size depends on values. Here they stay in, at cost zero.
            if func is torch.Tensor.all and asks in _ALL:
                return True
            if func in _PRODUCT and asks in _DOT:
                probability, cost = args[:2]
                args = (probability, torch.where(probability > 0, cost, 0.0))
        return func(*args, **(kwargs or {}))


_PRODUCT = {torch.tensordot, torch.Tensor.mul}
_ASKING = _PRODUCT | {
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.register_hook,
    torch.Tensor.all,
}


def _asker() -> Any:
    """Code object of the function that made the present call, neither torch's nor another mode."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").startswith("torch.")
        or frame.f_code.co_name == "__torch_function__"
    ):
        frame = frame.f_back
    return frame.f_code


class Watch(TorchDispatchMode):
    """Notes what a step changes of the outside, and which values it reads.

    A value that is the same at every step (of data, or computed from data alone) may be read; it
    becomes part of what was recorded, and the tensors it comes from are kept in ``read``.

    Args:
        state: tensors whose values differ from step to step (parameters, minibatch indices).
    """

    def __init__(self, state: Sequence[torch.Tensor] = ()):
        super().__init__()
        self.state = {_storage(t) for t in state}
        self.inside: set[int] = set()
        self.alive: list[torch.Tensor] = []  # so that no storage's address is used twice
        self.changed: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor, value before)
        self.sources: dict[int, list[torch.Tensor]] = {}  # of what is computed from data alone
        self.read: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._value(args[0], func)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    self._note(tensor)
        if func is aten.lift_fresh.default:  # a constant made here, by torch.tensor(...)
            self._keep(args[0], [])
        out = func(*args, **kwargs)
        given = [t for a in (*args, *kwargs.values()) for t in _tensors(a)]
        sources = self._sources(func, given)
        for tensor in _tensors(out):
            if not any(_storage(a) == _storage(tensor) for a in given):
                self._keep(tensor, sources)
            elif sources is None:
                self.sources.pop(_storage(tensor), None)
        return out

    def _keep(self, tensor: torch.Tensor, sources: list[torch.Tensor] | None) -> None:
        self.inside.add(_storage(tensor))
        self.alive.append(tensor)
        if sources is not None:
            self.sources[_storage(tensor)] = sources

    def _sources(self, func: Any, given: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """The outside tensors a result comes from; None if it differs from step to step."""
        if torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable:
            return None
        found: list[torch.Tensor] = []
        for tensor in given:
            of_one = self._origin(tensor)
            if of_one is None:
                return None
            found += [t for t in of_one if not any(t is f for f in found)]
        return found

    def _origin(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        where = _storage(tensor)
        if where in self.inside:
            return self.sources.get(where)
        if where in self.state or any(_storage(t) == where for t, _ in self.changed):
            return None
        return [tensor]

    def _value(self, tensor: torch.Tensor, func: Any) -> Any:
        sources = self._origin(tensor)
        if sources is None:
            if _storage(tensor) in self.state:
                raise CompileError("the value of a parameter decides what is computed")
            return func(tensor)  # raises while tracing
        self.read += sources
        with _disable_current_modes():
            return tensor.item()

    def _note(self, tensor: torch.Tensor) -> None:
        self.sources.pop(_storage(tensor), None)
        if _storage(tensor) in self.inside:
            return
        if _storage(tensor) in self.state:
            raise CompileError("the model or guide changes a parameter in place")
        if not any(tensor is t for t, _ in self.changed):
            self.changed.append((tensor, tensor.detach().clone()))

    def undo(self) -> None:
        """Put back what the step changed in place."""
        with torch.no_grad():
            for tensor, before in reversed(self.changed):
                tensor.copy_(before)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return []


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass
class Traced:
    """A step as a graph.

    Attributes:
        graph: (*inputs, *leaves, *buffers, *constants) -> (loss, *gradients, *new buffers).
        live: positions of the leaves that the loss depends on; only these have gradients.
        buffers: outside tensors that the step changes in place.
        constants: all other outside tensors, and constants made during the step.
        fresh: whether each constant was made during the step (its value is part of the program).
        read: outside tensors whose values decided what was recorded.
    """

    graph: torch.fx.GraphModule
    live: list[int]
    buffers: list[torch.Tensor]
    constants: list[torch.Tensor]
    fresh: list[bool]
    read: list[torch.Tensor]
    loss_dtype: torch.dtype


def trace_step(
    loss: Callable[..., torch.Tensor],
    leaves: Sequence[torch.Tensor],
    inputs: Sequence[Sequence[torch.Tensor]],
) -> Traced:
    """Record ``loss`` and its gradient.

    The step is recorded once for each of ``inputs`` and the recordings must agree, so that control
    flow that depends on chance, on the minibatch or on a counter is found.

    Args:
        loss: (*inputs) -> scalar, a differentiable function of the leaves.
        leaves: parameters.
        inputs: two or more examples of the inputs, equal in shape.

    Raises:
        CompileError: the step cannot be recorded, or its recordings differ.

    Example:
        >>> import torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> x = torch.tensor([1.0, 3.0])
        >>> traced = trace_step(lambda: (w * x + torch.randn(2)).sum(), [w], [(), ()])
        >>> [tuple(t.shape) for t in traced.graph(w, x)]  # loss and gradient
        [(), (2,)]
        >>> trace_step(lambda: w.sum() if w.sum() > 1 else 2 * w.sum(), [w], [(), ()])
        Traceback (most recent call last):
        vi_toolkit.errors.CompileError: what the model or guide computes depends on values that ...
    """

    def step(*given: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], list[int]]:
        value = loss(*given)
        if not torch.is_tensor(value) or not value.requires_grad:
            raise CompileError("the loss does not depend on any parameter")
        gradients = torch.autograd.grad(value, list(leaves), allow_unused=True)
        live = [k for k, g in enumerate(gradients) if g is not None]
        return (value, *(g for g in gradients if g is not None)), live

    first = _agreed([_record(step, leaves, x, seed) for seed, x in enumerate(inputs)])
    for constant, fresh in zip(first.constants, first.fresh, strict=True):
        if constant.requires_grad and not fresh:
            raise CompileError(
                "the model or guide uses a tensor that requires a gradient and is not registered "
                "as a parameter (pyro.param or pyro.module)"
            )
    return first


def trace_function(
    function: Callable[..., tuple[torch.Tensor, ...]],
    inputs: Sequence[Sequence[torch.Tensor]],
) -> Traced:
    """Record a function of tensors that has no parameters: log densities and their gradients.

    Args:
        function: (*inputs) -> tuple of tensors; what else it uses is picked up from outside.
        inputs: two or more examples of the inputs, equal in shape.

    Raises:
        CompileError: it cannot be recorded, its recordings differ, or it changes a tensor of the
            outside in place.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 3.0])
        >>> traced = trace_function(lambda u: (u * x,), [(torch.ones(2),), (torch.zeros(2),)])
        >>> traced.graph(torch.tensor([2.0, 2.0]), x)
        (tensor([2., 6.]),)
    """

    def step(*given: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], list[int]]:
        return function(*given), []

    first = _agreed([_record(step, (), x, seed) for seed, x in enumerate(inputs)])
    if first.buffers:
        raise CompileError("the model changes a tensor in place")
    return first


def _record(
    step: Callable[..., tuple[tuple[torch.Tensor, ...], list[int]]],
    leaves: Sequence[torch.Tensor],
    example: Sequence[torch.Tensor],
    seed: int,
) -> Traced:
    """``step``: (*inputs) -> (tensors to return, positions of the live leaves)."""
    watch = Watch((*leaves, *example))
    live: list[int] = []
    dtypes: list[torch.dtype] = []

    def recorded_step(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with watch, BookKeeping(), Unchecked():
            out, live[:] = step(*inputs)
        dtypes.append(out[0].dtype)
        return tuple(t.detach().clone() for t in out)

    try:
        with kept_random_state(), warnings.catch_warnings():
            torch.manual_seed(seed)  # so that no two recordings see the same draws
            warnings.simplefilter("ignore")  # they came when the step ran eagerly
            recorded = make_fx(recorded_step)(*example)
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(_reason(error)) from error
    finally:
        watch.undo()
    return _lift(recorded, len(example), leaves, watch, live, dtypes)


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0]
    if "get value out of a tracing tensor" in text:
        return "what the model or guide computes depends on values that change from step to step"
    return f"it cannot be traced ({type(error).__name__}: {text[:200]})"


def _lift(
    recorded: torch.fx.GraphModule,
    inputs: int,
    leaves: Sequence[torch.Tensor],
    watch: Watch,
    live: list[int],
    dtypes: list[torch.dtype],
) -> Traced:
    """Turn the tensors that a recording picked up into inputs of its graph."""
    graph = recorded.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    changed = {_storage(t) for t, _ in watch.changed}
    buffers: list[torch.Tensor] = []
    constants: list[torch.Tensor] = []
    users: list[list[torch.fx.Node]] = []  # of each leaf, buffer and constant, in that order
    kinds: list[tuple[str, torch.Tensor, list[torch.fx.Node]]] = []
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        tensor = getattr(recorded, node.target)
        known = next((k for k in kinds if k[1] is tensor), None)
        if known is not None:
            known[2].append(node)
            continue
        leaf = any(tensor is p for p in leaves)
        kind = "leaf" if leaf else "buffer" if _storage(tensor) in changed else "constant"
        kinds.append((kind, tensor, [node]))
    if len({_storage(t) for k, t, _ in kinds if k == "buffer"}) < len(
        [k for k in kinds if k[0] == "buffer"]
    ):
        raise CompileError("two tensors that share memory are changed in place")
    for parameter in leaves:
        users.append(next((n for k, t, n in kinds if t is parameter), []))
    for kind, tensor, nodes in kinds:
        if kind == "buffer":
            buffers.append(tensor)
            users.append(nodes)
    for kind, tensor, nodes in kinds:
        if kind == "constant":
            constants.append(tensor)
            users.append(nodes)
    last = placeholders[-1] if placeholders else None
    new_buffers = []
    for k, nodes in enumerate(users):
        with graph.inserting_after(last) if last else graph.inserting_before():
            last = graph.placeholder(f"outside_{k}")
        target = last
        if len(leaves) <= k < len(leaves) + len(buffers):
            # The step changes a copy, whose final value comes out.
            first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
            with graph.inserting_before(first):
                target = graph.call_function(aten.clone.default, (last,))
            new_buffers.append(target)
        for node in nodes:
            node.replace_all_uses_with(target)
            graph.erase_node(node)
    out = next(n for n in graph.nodes if n.op == "output")
    out.args = ((*out.args[0], *new_buffers),)
    graph.lint()
    recorded.recompile()
    outside = torch.fx.GraphModule({}, graph)  # without the constants
    fresh = [True] * len(constants)
    return Traced(outside, live, buffers, constants, fresh, watch.read, dtypes[0])


def _agreed(recordings: Sequence[Traced]) -> Traced:
    """The first of several recordings of one step, which must be the same."""
    first, *others = recordings
    for other in others:
        _same(first, other)
        # What both recordings have in common lies outside.
        first.fresh = [
            f and a is not b
            for f, a, b in zip(first.fresh, first.constants, other.constants, strict=True)
        ]
    return first


def _same(one: Traced, other: Traced) -> None:
    if one.graph.code != other.graph.code or one.live != other.live:
        raise CompileError(
            "two runs of the model and guide did different things: control flow depends on chance, "
            "on the minibatch or on Python state"
        )
    if len(one.buffers) != len(other.buffers) or any(
        a is not b for a, b in zip(one.buffers, other.buffers, strict=True)
    ):
        raise CompileError("a tensor that is changed in place is another one at each step")
    for a, b in zip(one.constants, other.constants, strict=True):
        if a is not b and (
            a.dtype != b.dtype
            or a.shape != b.shape
            or not torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())
        ):
            raise CompileError(
                "two runs of the model and guide used different constants: a number from Python "
                "changes from step to step"
            )
