"""Steps on a GPU: one step, compiled for it and captured as a CUDA graph, replayed K times.

A GPU takes the steps of a small model faster than Python can ask for them. A CUDA graph is all that
one step launches, asked for at once; it finds its state where it left it, so that replays follow
one another without Python looking at a number in between. No condition can end them: a step after
the last one, or after one that was not finite, computes the first again and leaves the state alone.

This has not run on a GPU yet. The tests replay the same steps on the CPU; what they leave out is
:func:`captured`. So ``compile="auto"`` takes steps on a GPU eagerly, and ``compile=True`` asks for
this. A captured step is held against an eager one as any compiled step is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vi_toolkit.compiled.program import Tensors, compile_reason, functional, quiet
from vi_toolkit.errors import CompileError
from vi_toolkit.scope import kept_random_state

WARM_UP = 3  # runs before a capture, in which libraries set themselves up


def replay_loop(
    body: torch.fx.GraphModule,
    carried: Sequence[torch.Tensor],
    fixed: Sequence[torch.Tensor],
    checked: bool,
) -> Callable[[Tensors], Tensors]:
    """As :func:`~vi_toolkit.compiled.program.compile_loop`, for tensors on a GPU.

    Raises:
        CompileError: inductor cannot compile the step, or it cannot be captured.
    """

    def step(i: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, n = rest[: len(carried)], rest[len(carried)]
        going = i < n
        new = body(torch.where(going, i, 0), *rest)
        return tuple(torch.where(going, a, b) for a, b in zip(new, (i, *state), strict=True))

    device = carried[0].device
    # A number on the CPU, which may stand beside tensors on a GPU, would be read once and for all.
    fixed = [t.to(device) for t in fixed]
    inputs: list[Any] = [torch.zeros((), dtype=torch.long, device=device), *carried, *fixed]
    graph = functional(step, inputs)
    options = {"fallback_random": True, "assert_indirect_indexing": checked}
    try:
        with quiet(), torch.no_grad():
            compiled: Any = torch._inductor.compile(graph, inputs, options=options)
            return _Replayed(compiled, inputs[: 1 + len(carried)], fixed)
    except Exception as error:
        raise CompileError(compile_reason(error)) from error


class _Replayed:
    """A step with places of its own for what it reads and writes, and the loop around it."""

    def __init__(
        self,
        step: Callable[..., Sequence[torch.Tensor]],
        state: Sequence[torch.Tensor],
        fixed: Sequence[torch.Tensor],
    ):
        self.step = step
        self.state, self.fixed = [t.clone() for t in state], [t.clone() for t in fixed]
        self.given = [(t, t._version) for t in fixed]
        with kept_random_state():
            self.replay = captured(self._once, self.state[0].device)

    def _once(self) -> None:
        torch._foreach_copy_(self.state, list(self.step(*self.state, *self.fixed)))

    def __call__(self, inputs: Tensors) -> Tensors:
        """[*carried, *fixed] -> [i, *carried]"""
        many = len(self.state) - 1
        torch._foreach_copy_(self.state[1:], inputs[:many])
        self.state[0].zero_()
        for k, tensor in enumerate(inputs[many:]):
            before, version = self.given[k]
            if tensor is not before or tensor._version != version:
                self.fixed[k].copy_(tensor)
                self.given[k] = tensor, tensor._version
        self.replay(int(self.fixed[0]))
        return [t.clone() for t in self.state]


def captured(once: Callable[[], None], device: torch.device) -> Callable[[int], None]:
    """What ``once`` launches on a GPU, as a function that launches it so many times."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()

    def replay(times: int) -> None:
        with torch.cuda.device(device):
            for _ in range(times):
                graph.replay()

    return replay
