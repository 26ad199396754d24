"""Records what a step does to tensors that exist outside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vi_toolkit import torch_private
from vi_toolkit.errors import CompileError
from vi_toolkit.torch_private import schema, storage_id

aten = torch.ops.aten


class InPlaceChanges(torch_private.TorchDispatchMode):
    """Records which outside tensors a step changes in place, so that the changes can be undone.

    Also records the tensors whose values decide what the step computes. A value may be read if it
    is the same at every step, that is, if it comes from data alone. It becomes part of the
    recording.

    Args:
        state: tensors whose values differ from step to step (parameters, minibatch indices).

    Attributes:
        changed: (tensor, value before the first change) of each changed tensor.
        read: outside tensors that the values read were computed from.

    Example:
        >>> import torch
        >>> total = torch.zeros(2)
        >>> with InPlaceChanges() as changes:
        ...     total += torch.ones(2)
        >>> changes.undo()
        >>> total
        tensor([0., 0.])
    """

    def __init__(self, state: Sequence[torch.Tensor] = ()):
        super().__init__()
        self.state = {storage_id(t) for t in state}
        self.changed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.read: list[torch.Tensor] = []
        self._inside: set[int] = set()  # memory allocated by the step
        self._alive: list[torch.Tensor] = []  # so that no memory is used twice
        self._sources: dict[int, list[torch.Tensor]] = {}  # of what is computed from data alone

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch_private.local_scalar:
            return self._value(args[0], func)
        for argument, value in zip(schema(func).arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    self._note_change(tensor)
        if func is aten.lift_fresh.default:  # a constant made here, by torch.tensor(...)
            self._note_made(args[0], [])
        out = func(*args, **kwargs)
        given = [t for a in (*args, *kwargs.values()) for t in _tensors(a)]
        sources = self._sources_of_result(func, given)
        for tensor in _tensors(out):
            if not any(storage_id(a) == storage_id(tensor) for a in given):
                self._note_made(tensor, sources)
            elif sources is None:
                self._sources.pop(storage_id(tensor), None)
        return out

    def undo(self) -> None:
        """Put back what the step changed in place."""
        with torch.no_grad():
            for tensor, before in reversed(self.changed):
                tensor.copy_(before)

    def _note_made(self, tensor: torch.Tensor, sources: list[torch.Tensor] | None) -> None:
        self._inside.add(storage_id(tensor))
        self._alive.append(tensor)
        if sources is not None:
            self._sources[storage_id(tensor)] = sources

    def _note_change(self, tensor: torch.Tensor) -> None:
        self._sources.pop(storage_id(tensor), None)
        if storage_id(tensor) in self._inside:
            return
        if storage_id(tensor) in self.state:
            raise CompileError("the model or guide changes a parameter in place")
        if not any(tensor is t for t, _ in self.changed):
            self.changed.append((tensor, tensor.detach().clone()))

    def _sources_of_result(self, func: Any, given: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """The outside tensors a result is computed from; None if it differs from step to step."""
        if torch.Tag.nondeterministic_seeded in func.tags or schema(func).is_mutable:
            return None
        found: list[torch.Tensor] = []
        for tensor in given:
            of_one = self._sources_of(tensor)
            if of_one is None:
                return None
            found += [t for t in of_one if not any(t is f for f in found)]
        return found

    def _sources_of(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        where = storage_id(tensor)
        if where in self._inside:
            return self._sources.get(where)
        if where in self.state or any(storage_id(t) == where for t, _ in self.changed):
            return None
        return [tensor]

    def _value(self, tensor: torch.Tensor, func: Any) -> Any:
        sources = self._sources_of(tensor)
        if sources is None:
            if storage_id(tensor) in self.state:
                raise CompileError("the value of a parameter decides what is computed")
            return func(tensor)  # raises an error while tracing
        self.read += sources
        with torch_private.disable_modes():
            return tensor.item()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return []
