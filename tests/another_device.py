"""A device for tests where there is no other: the CPU under the name ``other``.

A tensor on it holds one on the CPU, every operator runs on those, and one that is given sized
tensors of both raises, as between a GPU and the CPU. (Not a device to record steps on: there is no
memory behind its tensors.)
"""

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

aten = torch.ops.aten
MIXING = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}


class Backend:
    def __getattr__(self, name):
        """No generator of its own, one device, nothing to set up."""
        answers = {"is_available": True, "is_initialized": True, "device_count": 1}
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: answers.get(name, 0 if name == "current_device" else False)


class Other(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="other:0"
        )

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


def run(operator, args, kwargs):
    given = []
    tree_map(given.append, (args, kwargs))
    sized = [x for x in given if isinstance(x, torch.Tensor) and x.dim()]
    if operator not in MIXING and len({isinstance(x, Other) for x in sized}) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device ({operator})")

    def held(x):
        if isinstance(x, torch.device) and x.type == "other":
            return torch.device("cpu")
        return x.held if isinstance(x, Other) else x

    out = operator(*tree_map(held, args), **tree_map(held, kwargs))
    to = kwargs.get("device")
    if operator is aten._to_copy.default and to is not None and torch.device(to).type == "cpu":
        return out
    arguments = operator._schema.arguments
    written = [k for k, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    if written:
        return args[written[0]] if len(written) == 1 and out is not None else out
    return tree_map(lambda x: Other(x) if isinstance(x, torch.Tensor) else x, out)


backend_registration._setup_privateuseone_for_python_backend("other", Backend())
library = torch.library.Library("_", "IMPL")
library.fallback(lambda operator, *args, **kwargs: run(operator, args, kwargs), "PrivateUse1")
