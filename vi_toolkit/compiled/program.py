"""From a traced step to machine code: a loop of K optimiser steps per call.

The traced step, the optimiser's update, the running sum of the iterates and the ELBO's history
become the body of a ``while_loop``. Inductor compiles the loop ahead of time (AOTInductor) into
one shared library that is called with tensors only: no guards, no Python between steps.

Before that, what does not change from step to step leaves the loop and is computed once:
``lgamma(counts + 1)``, logarithms of data and the like, also where the loop only looks up
minibatches of it.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import linecache
import logging
import operator
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vi_toolkit.compiled.allocation import allocating_once
from vi_toolkit.errors import CompileError

aten = torch.ops.aten
Tensors = list[torch.Tensor]

FORMAT = "8"  # of the folders in the cache and of the loop around a body
# Elements per thread from which a loop is shared among threads: waking one takes as long as
# several thousand operations.
LEAST_SHARE = 2**14
MANY_LOOKED_UP = 2**12  # numbers from which a call of the library's product pays
_MOST_LOADED = 64
_TRUSTED = (0,)  # root
_loaded: OrderedDict[str, Callable[[Tensors], Tensors]] = OrderedDict()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Deprecations inside torch and notes of its compiler are not the user's business; the model's
    own warnings came when it ran eagerly."""
    compiler = logging.getLogger("torch._inductor")
    level = compiler.level
    compiler.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        compiler.setLevel(level)


@contextlib.contextmanager
def forgetting_sources() -> Iterator[None]:
    """torch.fx keeps the text of every graph for ever, in case a traceback wants to show it: some
    200 KB for a fit. Here that of the graphs made within is given back at the end."""
    loader = getattr(torch.fx.graph_module, "_loader", None)
    texts: dict[str, str] = getattr(loader, "eval_cache", {})
    before = set(texts)
    try:
        yield
    finally:
        for name in set(texts) - before:
            texts.pop(name, None)
            linecache.cache.pop(name, None)


def functional(body: Callable[..., Any], example: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """Trace a function of tensors once more, without in-place operations."""
    random_state = torch.get_rng_state()
    try:
        with quiet():
            graph = make_fx(torch.func.functionalize(body, remove="mutations"))(*example)
    except Exception as error:
        text = str(error).split("\n")[0][:200]
        raise CompileError(f"it cannot be traced ({type(error).__name__}: {text})") from error
    finally:
        torch.set_rng_state(random_state)
    graph.graph.eliminate_dead_code()
    return graph


# ------------------------------------------------------------- what leaves the loop

_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.detach.default,
    aten.alias.default,
}
_COSTLY = {
    aten.lgamma.default,
    aten.digamma.default,
    aten.log.default,
    aten.log1p.default,
    aten.exp.default,
    aten.expm1.default,
    aten.erf.default,
    aten.erfinv.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.pow.Tensor_Scalar,
    aten.sqrt.default,
    aten.rsqrt.default,
}
_POINTWISE = _COSTLY | {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.rsub.Scalar,
    aten.reciprocal.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten._to_copy.default,
    aten.detach.default,
    aten.alias.default,
}


_MASKS = {aten.eye.default, aten.eye.m, aten.tril.default, aten.triu.default}


def _tensors_in(node: torch.fx.Node) -> list[torch.fx.Node]:
    return node.all_input_nodes


def _random(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable
    )


def swap_lookups(graph: torch.fx.Graph) -> None:
    """``f(table[rows])`` becomes ``f(table)[rows]`` for costly pointwise f, to leave the loop."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _COSTLY:
            continue
        chain = [node]
        while chain[-1].target in _POINTWISE and len(_tensors_in(chain[-1])) == 1:
            chain.append(_tensors_in(chain[-1])[0])
        lookup = chain.pop()
        if not chain or lookup.target is not aten.index.Tensor or len(lookup.args[1]) != 1:
            continue
        table, rows = lookup.args[0], lookup.args[1]
        if table.op != "placeholder" or len(lookup.meta["val"].shape) != len(
            table.meta["val"].shape
        ):
            continue
        with graph.inserting_before(node):
            value = table
            for step in reversed(chain):
                args = tuple(value if a is _tensors_in(step)[0] else a for a in step.args)
                value = graph.call_function(step.target, args, dict(step.kwargs))
            found = graph.call_function(aten.index.Tensor, (value, rows))
        found.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(found)


def rows_at_once(graph: torch.fx.Graph) -> None:
    """``table[rows].T @ v`` becomes ``v @ table[rows]`` as a call of the library's product.

    It is the gradient of ``table[rows] @ w``. Written into a loop of the compiler's, it looks up
    one number at a time, row for row again in each column; for the library's product the rows are
    put side by side once.
    """
    for node in list(graph.nodes):
        if node.target is not aten.mv.default or not _is_turn(node.args[0]):
            continue
        table, vector = node.args[0].args[0], node.args[1]
        if table.target is not aten.index.Tensor or table.meta["val"].numel() < MANY_LOOKED_UP:
            continue
        with graph.inserting_before(node):
            row = graph.call_function(aten.unsqueeze.default, (vector, 0))
            product = graph.call_function(aten.mm.default, (row, table))
            flat = graph.call_function(aten.squeeze.dim, (product, 0))
        flat.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(flat)
        graph.erase_node(node)


def masks_from_memory(graph: torch.fx.Graph) -> None:
    """``tril(x)`` becomes ``where(mask, x, 0)``, for a mask that leaves the loop.

    In the loop the compiler works out anew, by 64-bit integers, which numbers are below a diagonal.
    """
    for node in list(graph.nodes):
        if node.target not in (aten.tril.default, aten.triu.default):
            continue
        value = node.args[0].meta["val"]
        given = {"dtype": torch.bool, "device": value.device}
        with graph.inserting_before(node):
            ones = graph.call_function(aten.full.default, (list(value.shape[-2:]), True), given)
            mask = graph.call_function(node.target, (ones, *node.args[1:]))
            kept = graph.call_function(aten.where.ScalarOther, (mask, node.args[0], 0.0))
        kept.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(kept)
        graph.erase_node(node)


def replace_draws(graph: torch.fx.Graph) -> None:
    """Write random operators in a form that inductor leaves alone and that gives torch's numbers.

    ``empty(shape).normal_()`` becomes ``randn(shape)``, one call instead of three. ``bernoulli(p)``
    becomes ``rand(shape) < p`` in p's precision, which is what torch computes; inductor's own
    decomposition compares with float32 numbers, so that in float64 other values are drawn.
    """
    for node in list(graph.nodes):
        if node.target is aten.bernoulli.default and len(node.args) == 1 and not node.kwargs:
            p = node.args[0]
            shape, kind = list(p.meta["val"].shape), {"dtype": p.meta["val"].dtype}
            device = {"device": p.meta["val"].device}
            with graph.inserting_before(node):
                uniform = graph.call_function(aten.rand.default, (shape,), kind | device)
                below = graph.call_function(aten.lt.Tensor, (uniform, p))
                draw = graph.call_function(aten._to_copy.default, (below,), kind)
        elif node.target is aten.normal_functional.default and len(node.args) == 1:
            source = node.args[0]
            while source.target in (aten.detach.default, aten.alias.default):
                source = source.args[0]
            if node.kwargs or source.target is not aten.empty.memory_format:
                continue
            given = {k: source.kwargs[k] for k in ("dtype", "device") if k in source.kwargs}
            with graph.inserting_before(node):
                draw = graph.call_function(aten.randn.default, (source.args[0],), given)
        else:
            continue
        node.replace_all_uses_with(draw)
        graph.erase_node(node)  # as a random operator it would be kept, and draw


def turn_products(graph: torch.fx.Graph) -> None:
    """``(a @ b.T).T`` becomes ``b @ a.T``: what is vectorised over fits keeps them in front.

    With the fits last, as ``torch.vmap`` leaves a product, all that follows runs over a few of them
    in its innermost loop, instead of over the data.
    """

    def turned(node: torch.fx.Node) -> torch.fx.Node:
        if _is_turn(node):
            (source,) = _tensors_in(node)
            return source
        out = graph.call_function(aten.permute.default, (node, [1, 0]))
        out.meta["val"] = node.meta["val"].t()
        return out

    for node in list(graph.nodes):
        if node.target is not aten.mm.default or not node.users:
            continue
        if not all(_is_turn(user) for user in node.users):
            continue
        with graph.inserting_before(node):
            first, second = node.args
            product = graph.call_function(aten.mm.default, (turned(second), turned(first)))
            product.meta["val"] = node.meta["val"].new_empty(node.meta["val"].t().shape)
        for user in list(node.users):
            user.replace_all_uses_with(product)
            graph.erase_node(user)
        graph.erase_node(node)


def _is_turn(node: torch.fx.Node) -> bool:
    if node.target is aten.permute.default:
        return node.args[1] == [1, 0]
    return node.target is aten.t.default


def failures_become_nan(graph: torch.fx.GraphModule) -> None:
    """A factorisation that fails makes the first output NaN, instead of raising.

    Inside a loop inductor cannot raise; a step whose loss is not finite is taken again eagerly.
    """
    out = next(n for n in graph.graph.nodes if n.op == "output")
    first, *others = out.args[0]
    for node in list(graph.graph.nodes):
        if node.target is aten._linalg_check_errors.default:
            with graph.graph.inserting_before(out):
                good = graph.graph.call_function(aten.eq.Scalar, (node.args[0], 0))
                good = graph.graph.call_function(aten.all.default, (good,))
                first = graph.graph.call_function(
                    aten.where.ScalarOther, (good, first, float("nan"))
                )
            graph.graph.erase_node(node)
    out.args = ((first, *others),)
    graph.recompile()


def hoist(
    body: torch.fx.GraphModule, variable: int, fresh: Sequence[bool]
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, list[bool]]:
    """Split a loop's body into what is computed once and what is computed each step.

    Args:
        body: graph whose first ``variable`` inputs change from step to step or call to call, and
            whose others are constants.
        fresh: for each constant whether it can have no other value (it is made by the step).

    Returns:
        (once, each, fixed): ``each`` takes the variable inputs and then the outputs of ``once``,
        which takes the constants; ``fixed`` says which of these outputs come from fresh constants
        alone.
    """
    swap_lookups(body.graph)
    rows_at_once(body.graph)
    masks_from_memory(body.graph)
    replace_draws(body.graph)
    body.graph.eliminate_dead_code()
    nodes = list(body.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    constant = set(placeholders[variable:])
    mutable = {n for n, f in zip(placeholders[variable:], fresh, strict=True) if not f}
    for node in nodes:
        if node.op == "call_function" and not _random(node):
            inputs = _tensors_in(node)
            known = all(i in constant or _free(i) for i in inputs)
            if known and (node.target in _MASKS or any(i in constant for i in inputs)):
                constant.add(node)
                if any(i in mutable for i in inputs):
                    mutable.add(node)
    each, once = torch.fx.Graph(), torch.fx.Graph()
    into_each: dict[torch.fx.Node, torch.fx.Node] = {}
    into_once: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in placeholders[:variable]:
        into_each[node] = each.placeholder(node.name)
    for node in placeholders[variable:]:
        into_once[node] = once.placeholder(node.name)
    anchor = next(reversed(each.nodes), None)
    handed: list[torch.fx.Node] = []

    def for_once(node: torch.fx.Node) -> torch.fx.Node:
        if node not in into_once:
            into_once[node] = once.node_copy(node, for_once)
        return into_once[node]

    def for_each(node: torch.fx.Node) -> torch.fx.Node:
        nonlocal anchor
        if node in into_each:
            return into_each[node]
        if node in constant and not (node.op == "call_function" and node.target in _VIEWS):
            handed.append(for_once(node))
            with each.inserting_after(anchor) if anchor else each.inserting_before():
                anchor = into_each[node] = each.placeholder(f"constant_{len(handed)}")
        else:
            for child in _tensors_in(node):
                for_each(child)
            into_each[node] = each.node_copy(node, lambda n: into_each[n])
        return into_each[node]

    for node in nodes:
        if node.op == "output":
            for child in _tensors_in(node):
                for_each(child)
            each.output(torch.fx.node.map_arg(node.args[0], lambda n: into_each[n]))
        elif node.op == "call_function" and node not in constant and not _free(node):
            for_each(node)
    once.output(tuple(handed))
    fixed = [node not in mutable for node in handed]
    return torch.fx.GraphModule({}, once), torch.fx.GraphModule({}, each), fixed


def write_in(
    each: torch.fx.GraphModule, variable: int, values: Sequence[torch.Tensor], fixed: list[bool]
) -> list[int]:
    """Write constants that are one number into the graph, where the compiler sees them.

    Returns:
        Which of ``values`` are left as inputs.
    """
    graph = each.graph
    left = []
    for k, node in enumerate([n for n in graph.nodes if n.op == "placeholder"][variable:]):
        value = values[k]
        one_number = fixed[k] and value.numel() and bool((value == value.reshape(-1)[0]).all())
        if not one_number:
            left.append(k)
            continue
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            number = graph.call_function(
                aten.full.default,
                (list(value.shape), value.reshape(-1)[0].item()),
                {"dtype": value.dtype, "device": value.device},
            )
        node.replace_all_uses_with(number)
        graph.erase_node(node)
    each.recompile()
    return left


_LOOKUPS = {aten.index.Tensor, aten.index_put.default, aten.index_select.default}
_COUNTING = {
    aten.add.Tensor,
    aten.lt.Tensor,
    aten.where.self,
    aten._to_copy.default,
    aten.full_like.default,
}


def lookups_stay_inside(graph: torch.fx.Graph, bounds: Mapping[int, int]) -> bool:
    """Whether no index of a loop's body can be out of range, so that none need be checked.

    So it is if its only integers are the loop's counter and the minibatch's indices, whose
    ``bounds`` are given by position among the inputs, and only long enough tensors are looked up.
    """
    limit: dict[torch.fx.Node, int] = {}
    for position, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        if position in bounds:
            limit[node] = bounds[position]
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        # (A list is of floats, or an operator that made it of integers was met before.)
        tensors = [n for n in _tensors_in(node) if isinstance(n.meta["val"], torch.Tensor)]
        integers = [n for n in tensors if not n.meta["val"].dtype.is_floating_point]
        if node.target in _LOOKUPS:
            table, dim, indices = node.args[0], 0, node.args[1]
            if node.target is aten.index_select.default:
                dim, indices = node.args[1], [node.args[2]]
            if len(indices) != 1 or indices[0] not in limit:
                return False
            if table.meta["val"].shape[dim] < limit[indices[0]]:
                return False
            if table in limit:
                limit[node] = limit[table]
        elif node.target in _VIEWS:
            limit.update((node, limit[n]) for n in integers if n in limit)
        elif node.target not in _COUNTING and any(
            n.meta["val"].dtype != torch.bool for n in integers
        ):
            return False
    return True


def _free(node: torch.fx.Node) -> bool:
    """Whether a node needs no tensor at all (``full``, ``arange``, ...)."""
    return node.op == "call_function" and not _tensors_in(node) and not _random(node)


# ------------------------------------------------------------- compiling the loop


def compile_loop(
    body: torch.fx.GraphModule,
    carried: Sequence[torch.Tensor],
    fixed: Sequence[torch.Tensor],
    checked: bool,
) -> Callable[[Tensors], Tensors]:
    """Compile ``while i < n: i, *carried = body(i, *carried, n, *fixed)``.

    The first of ``fixed`` is n. The same loop is compiled once per process and its library is kept
    in inductor's cache folder, where the next process finds it. ``checked``: whether the loop looks
    at every index before it uses it.

    Returns:
        Function of [*carried, *fixed] that returns [i, *carried], and may write into the carried
        tensors that it is given.

    Raises:
        CompileError: there is no working C++ compiler, or inductor cannot compile the loop.
    """
    inputs = [*carried, *fixed]
    key = _key(f"loop {len(carried)} {checked}", body, inputs)
    options = {"assert_indirect_indexing": checked}
    return _program(key, lambda: _loop(body, len(carried), len(inputs)), inputs, options)


def compile_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]
) -> Callable[[Tensors], Tensors]:
    """Compile a graph as it is, to be called with a list of tensors like ``inputs``.

    Raises:
        CompileError: there is no working C++ compiler, or inductor cannot compile it.
    """
    return _program(_key("once", graph, inputs), lambda: graph, inputs, {})


def _program(
    key: str,
    graph: Callable[[], torch.fx.GraphModule],
    inputs: Sequence[torch.Tensor],
    options: Mapping[str, Any],
) -> Callable[[Tensors], Tensors]:
    """The machine code of that name: loaded, found on disk or made."""
    if key not in _loaded:
        try:
            folder = _folder() / key
            if not (folder / "step.so").exists():
                with quiet():
                    _build(graph(), inputs, folder, options)
            runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / "step.so"), 1)
        except (KeyboardInterrupt, CompileError):
            raise
        except Exception as error:
            raise CompileError(_compile_reason(error)) from error
        _loaded[key] = runner.run
        if len(_loaded) > _MOST_LOADED:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    return _loaded[key]


def _key(kind: str, body: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> str:
    """Everything that the machine code depends on: the same key means the same program."""
    text = "\n".join(
        [
            FORMAT,
            torch.__version__,
            _machine(),
            str(torch.get_num_threads()),
            kind,
            body.code,
            *(f"{t.dtype} {tuple(t.shape)} {t.stride()} {t.device}" for t in inputs),
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _machine() -> str:
    """What the compiled instructions rely on."""
    parts = [platform.machine(), platform.system(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += [line for line in lines if line.startswith("flags")][:1]
    return " ".join(parts)


def _folder() -> Path:
    """Inside inductor's cache folder, found without importing inductor (which takes a while)."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given:
        return Path(given) / "vi_toolkit"
    user = re.sub(r"[^\w.-]", "_", getpass.getuser())
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}" / "vi_toolkit"


def check_folder() -> None:
    """Make the cache folder, before torch's own imports look for it.

    Raises:
        CompileError: it cannot be made, or is another user's, whose machine code we do not load.
    """
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompileError(_compile_reason(error)) from error
    if hasattr(os, "getuid") and folder.stat().st_uid not in (*_TRUSTED, os.getuid()):
        raise CompileError(
            f"the cache folder {folder} belongs to another user; TORCHINDUCTOR_CACHE_DIR names "
            "another"
        )


def _build(
    graph: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    folder: Path,
    options: Mapping[str, Any],
) -> None:
    """Compile into a folder of its own and move it to its place when it is complete.

    Inductor would first compile a small program for each kind of vector instructions that the
    processor has, to see whether the compiler knows it, which takes a third of the time in an empty
    cache. It is asked only if the compiler then fails.
    """
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    from torch._inductor.exc import CppCompileError

    try:
        _compile(graph, inputs, folder, {"cpp.vec_isa_ok": True, **options})
    except CppCompileError:
        valid_vec_isa_list.cache_clear()
        _compile(graph, inputs, folder, options)


def _compile(
    graph: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    folder: Path,
    further: Mapping[str, Any],
) -> None:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_aot
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    scratch = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    options = {
        "fallback_random": True,  # torch's own generator: the same draws as eagerly
        "compile_threads": 1,  # no pool of worker processes for one file
        "cpp.min_chunk_size": LEAST_SHARE,
        "aot_inductor.output_path": str(scratch / "step.so"),
        **further,
    }
    try:
        with tracing(TracingContext(mode)), torch.no_grad(), allocating_once():
            fake: list[Any] = [mode.from_tensor(t.detach(), static_shapes=True) for t in inputs]
            compile_fx_aot(graph, fake, config_patches=options)
        kept = scratch / "kept"
        kept.mkdir()
        os.rename(scratch / "step.so", kept / "step.so")
        for description in scratch.glob("*.wrapper.json"):  # of operators without C++ bindings
            os.rename(description, kept / "step.json")
        with contextlib.suppress(OSError):  # another process was first: its library is the same
            os.rename(kept, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _loop(body: torch.fx.GraphModule, carried: int, inputs: int) -> torch.fx.GraphModule:
    # Written by hand, as one comparison needs no tracing.
    test = torch.fx.Graph()
    nodes = [test.placeholder(f"arg{k}") for k in range(inputs + 1)]
    test.output(test.call_function(aten.lt.Tensor, (nodes[0], nodes[1 + carried])))
    outer = torch.fx.Graph()
    given = [outer.placeholder(f"input_{k}") for k in range(inputs)]
    start = outer.call_function(aten.full.default, ([], 0), {"dtype": torch.int64})
    root = torch.nn.Module()
    root.test = torch.fx.GraphModule({}, test)
    root.body = torch.fx.GraphModule({}, body.graph)
    loop = outer.call_function(
        torch.ops.higher_order.while_loop,
        (
            outer.get_attr("test"),
            outer.get_attr("body"),
            (start, *given[:carried]),
            tuple(given[carried:]),
        ),
    )
    outer.output(
        tuple(outer.call_function(operator.getitem, (loop, k)) for k in range(carried + 1))
    )
    return torch.fx.GraphModule(root, outer)


def _compile_reason(error: Exception) -> str:
    name, text = type(error).__name__, str(error)
    if "InvalidCxxCompiler" in name + text or "No working C++ compiler" in text:
        return "there is no working C++ compiler (set CXX to one)"
    if "CppCompileError" in name + text:
        return f"the C++ compiler failed ({text.strip().splitlines()[-1][:200]})"
    if isinstance(error, OSError):
        return f"the cache folder cannot be used ({text}); TORCHINDUCTOR_CACHE_DIR names another"
    return f"inductor cannot compile it ({name}: {(text.strip().splitlines() or [''])[0][:200]})"
