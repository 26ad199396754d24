"""Records one step, from the guide's draws to the gradient, as a graph without any Pyro code in it.

``make_fx`` runs the step once and records every tensor operation. Three things are decided here:

* *What stays symbolic.* Pyro reads the value of the loss to report it, and looks for NaN. Both are
  answered by :class:`~vi_toolkit.compiled.bookkeeping.BookKeeping`. Reading any other random or
  parameter-dependent value is an error, because the graph would follow one branch for ever.
* *What goes in.* Tensors that the step uses from outside (parameters, data, buffers) become inputs
  of the graph. Parameters, and buffers that the step changes in place, are state; all others are
  constants, which are looked at again at each call.
* *What stays the same.* A recording runs the model, so in-place changes are undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vi_toolkit import torch_private
from vi_toolkit.compiled.bookkeeping import BookKeeping
from vi_toolkit.compiled.in_place import InPlaceChanges
from vi_toolkit.compiled.quiet import quiet
from vi_toolkit.errors import CompileError
from vi_toolkit.programs.isolation import kept_random_state
from vi_toolkit.programs.vectorise import Unchecked
from vi_toolkit.torch_private import storage_id


@dataclass
class Traced:
    """A step as a graph.

    Attributes:
        graph: (*inputs, *leaves, *buffers, *constants) -> (loss, *gradients, *new buffers).
        live: positions of the leaves that the loss depends on. Only these have gradients.
        buffers: outside tensors that the step changes in place.
        constants: all other outside tensors, and tensors with fixed values made during the step.
        fresh: whether each constant was made during the step. Its value never changes.
        read: outside tensors whose values decided what was recorded.
        loss_dtype: precision of the loss.
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

    The step is recorded once for each of ``inputs``. The recordings must agree: if they differ,
    control flow depends on chance, on the minibatch or on a counter.

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
    """Record a function without parameters, such as a log density with its gradient.

    Args:
        function: (*inputs) -> tuple of tensors. All other tensors that it uses become constants.
        inputs: two or more examples of the inputs, equal in shape.

    Raises:
        CompileError: the function cannot be recorded, its recordings differ, or it changes an
            outside tensor in place.

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


def functional(body: Callable[..., Any], example: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """Trace a function of tensors into a graph without in-place operations.

    Raises:
        CompileError: the function cannot be traced.
    """
    try:
        with quiet(), kept_random_state():
            pure = torch.func.functionalize(body, remove="mutations")
            graph = torch_private.make_fx(pure)(*example)
    except CompileError:
        raise
    except Exception as error:
        text = str(error).split("\n")[0][:200]
        raise CompileError(f"it cannot be traced ({type(error).__name__}: {text})") from error
    graph.graph.eliminate_dead_code()
    return graph


def _record(
    step: Callable[..., tuple[tuple[torch.Tensor, ...], list[int]]],
    leaves: Sequence[torch.Tensor],
    example: Sequence[torch.Tensor],
    seed: int,
) -> Traced:
    """Record ``step``: (*inputs) -> (tensors to return, positions of the live leaves)."""
    changes = InPlaceChanges((*leaves, *example))
    live: list[int] = []
    dtypes: list[torch.dtype] = []

    def recorded_step(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with changes, BookKeeping(), Unchecked():
            out, live[:] = step(*inputs)
        dtypes.append(out[0].dtype)
        return tuple(t.detach().clone() for t in out)

    try:
        with kept_random_state(), quiet():  # the model's warnings were shown when it ran eagerly
            torch.manual_seed(seed)  # so that no two recordings see the same draws
            recorded = torch_private.make_fx(recorded_step)(*example)
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(_reason(error)) from error
    finally:
        changes.undo()
    return _lift(recorded, leaves, changes, live, dtypes)


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0]
    if "get value out of a tracing tensor" in text:
        return "what the model or guide computes depends on values that change from step to step"
    return f"it cannot be traced ({type(error).__name__}: {text[:200]})"


def _lift(
    recorded: torch.fx.GraphModule,
    leaves: Sequence[torch.Tensor],
    changes: InPlaceChanges,
    live: list[int],
    dtypes: list[torch.dtype],
) -> Traced:
    """Turn the outside tensors of a recording into inputs of its graph."""
    graph = recorded.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    changed = {storage_id(t) for t, _ in changes.changed}
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
        kind = "leaf" if leaf else "buffer" if storage_id(tensor) in changed else "constant"
        kinds.append((kind, tensor, [node]))
    if len({storage_id(t) for k, t, _ in kinds if k == "buffer"}) < len(
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
            # The step changes a copy, whose final value is an output.
            first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
            with graph.inserting_before(first):
                target = graph.call_function(torch.ops.aten.clone.default, (last,))
            new_buffers.append(target)
        for node in nodes:
            node.replace_all_uses_with(target)
            graph.erase_node(node)
    out = next(n for n in graph.nodes if n.op == "output")
    out.args = ((*out.args[0], *new_buffers),)
    graph.lint()
    recorded.recompile()
    without_constants = torch.fx.GraphModule({}, graph)
    fresh = [True] * len(constants)
    return Traced(without_constants, live, buffers, constants, fresh, changes.read, dtypes[0])


def _agreed(recordings: Sequence[Traced]) -> Traced:
    """The first of several recordings of one step, which must be the same."""
    first, *others = recordings
    for other in others:
        _compare(first, other)
        # A tensor that both recordings use was not made during the step.
        first.fresh = [
            f and a is not b
            for f, a, b in zip(first.fresh, first.constants, other.constants, strict=True)
        ]
    return first


def _compare(one: Traced, other: Traced) -> None:
    """Raise CompileError if two recordings differ."""
    if one.graph.code != other.graph.code or one.live != other.live:
        raise CompileError(
            "two runs of the model and guide did different things: control flow depends on chance, "
            "on the minibatch or on Python state"
        )
    if len(one.buffers) != len(other.buffers) or any(
        a is not b for a, b in zip(one.buffers, other.buffers, strict=True)
    ):
        raise CompileError("a different tensor is changed in place at each step")
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
