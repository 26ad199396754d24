"""Rewrites a traced step before it is compiled.

Some rewrites keep the numbers those of eager steps: random draws that inductor would decompose
differently, and factorisations that fail. Others make the loop faster: products and masks that
inductor would write badly, and index checks that cannot fail. The largest gain is from what does
not change from step to step (``lgamma(counts + 1)``, logarithms of data). It leaves the loop and is
computed once, also if the loop only looks up minibatches of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vi_toolkit import torch_private
from vi_toolkit.torch_private import schema

aten = torch.ops.aten

MANY_LOOKED_UP = 2**12  # table size from which a call of BLAS pays

_VIEWS = {
    aten.view.default,
    torch_private.unsafe_view,
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
    torch_private.to_copy,
    aten.detach.default,
    aten.alias.default,
}


_MASKS = {aten.eye.default, aten.eye.m, aten.tril.default, aten.triu.default}


def _tensors_in(node: torch.fx.Node) -> list[torch.fx.Node]:
    return node.all_input_nodes


def _random(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch_private.OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags or schema(node.target).is_mutable
    )


def swap_lookups(graph: torch.fx.Graph) -> None:
    """Turn ``f(table[rows])`` into ``f(table)[rows]`` for costly pointwise f.

    Then ``f(table)`` can leave the loop.
    """
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


def lookups_by_blas(graph: torch.fx.Graph) -> None:
    """Turn ``table[rows].T @ v`` into ``v @ table[rows]``, by a call of BLAS.

    This is the gradient of ``table[rows] @ w``. Inductor would fuse product and lookup into a loop
    that looks up every row again for each column, one number at a time. For BLAS the rows are
    copied once.
    """
    for node in list(graph.nodes):
        if node.target is not aten.mv.default or not _is_transpose(node.args[0]):
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


def masks_as_constants(graph: torch.fx.Graph) -> None:
    """Turn ``tril(x)`` into ``where(mask, x, 0)``, whose mask can leave the loop.

    Otherwise every iteration computes, in 64-bit integers, which entries are below the diagonal.
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
    """Turn random operators into a form that inductor does not decompose, with torch's numbers.

    ``empty(shape).normal_()`` becomes ``randn(shape)``, one call instead of three. ``bernoulli(p)``
    becomes ``rand(shape) < p`` in p's precision, as torch computes it. Inductor's own decomposition
    compares with float32 numbers, and so draws other values in float64.
    """
    for node in list(graph.nodes):
        if node.target is aten.bernoulli.default and len(node.args) == 1 and not node.kwargs:
            p = node.args[0]
            shape, kind = list(p.meta["val"].shape), {"dtype": p.meta["val"].dtype}
            device = {"device": p.meta["val"].device}
            with graph.inserting_before(node):
                uniform = graph.call_function(aten.rand.default, (shape,), kind | device)
                below = graph.call_function(aten.lt.Tensor, (uniform, p))
                draw = graph.call_function(torch_private.to_copy, (below,), kind)
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
        graph.erase_node(node)  # it would still draw: random operators are never dead code


def transpose_products(graph: torch.fx.Graph) -> None:
    """Turn ``(a @ b.T).T`` into ``b @ a.T``, so that the fits stay the first dimension.

    ``torch.vmap`` makes the fits the last dimension of a product. Then the innermost loops of all
    that follows would run over a few fits instead of over the data.
    """

    def transposed(node: torch.fx.Node) -> torch.fx.Node:
        if _is_transpose(node):
            (source,) = _tensors_in(node)
            return source
        out = graph.call_function(aten.permute.default, (node, [1, 0]))
        out.meta["val"] = node.meta["val"].t()
        return out

    for node in list(graph.nodes):
        if node.target is not aten.mm.default or not node.users:
            continue
        if not all(_is_transpose(user) for user in node.users):
            continue
        with graph.inserting_before(node):
            first, second = node.args
            product = graph.call_function(aten.mm.default, (transposed(second), transposed(first)))
            product.meta["val"] = node.meta["val"].new_empty(node.meta["val"].t().shape)
        for user in list(node.users):
            user.replace_all_uses_with(product)
            graph.erase_node(user)
        graph.erase_node(node)


def _is_transpose(node: torch.fx.Node) -> bool:
    if node.target is aten.permute.default:
        return node.args[1] == [1, 0]
    return node.target is aten.t.default


def failures_become_nan(graph: torch.fx.GraphModule) -> None:
    """Let a factorisation that fails make the first output NaN instead of raising an error.

    A compiled loop cannot raise errors. A step whose loss is not finite is repeated eagerly, which
    raises the error.
    """
    out = next(n for n in graph.graph.nodes if n.op == "output")
    first, *others = out.args[0]
    for node in list(graph.graph.nodes):
        if node.target is torch_private.check_errors:
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
    """Split a loop's body into what is computed once and what is computed in each step.

    Args:
        body: graph whose first ``variable`` inputs change from step to step or from call to call;
            the others are constants.
        variable: number of inputs that change.
        fresh: for each constant whether it was made by the step, and so has only one value.

    Returns:
        (once, each, unchanging): ``once`` takes the constants. ``each`` takes the variable inputs
        and then the outputs of ``once``. ``unchanging`` says which of these outputs depend on fresh
        constants alone.
    """
    swap_lookups(body.graph)
    lookups_by_blas(body.graph)
    masks_as_constants(body.graph)
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
    anchor = next(iter(reversed(each.nodes)), None)  # torch 2.8 gives an iterable only
    outputs: list[torch.fx.Node] = []  # of ``once``

    def for_once(node: torch.fx.Node) -> torch.fx.Node:
        if node not in into_once:
            into_once[node] = once.node_copy(node, for_once)
        return into_once[node]

    def for_each(node: torch.fx.Node) -> torch.fx.Node:
        nonlocal anchor
        if node in into_each:
            return into_each[node]
        if node in constant and not (node.op == "call_function" and node.target in _VIEWS):
            outputs.append(for_once(node))
            with each.inserting_after(anchor) if anchor else each.inserting_before():
                anchor = into_each[node] = each.placeholder(f"constant_{len(outputs)}")
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
    once.output(tuple(outputs))
    unchanging = [node not in mutable for node in outputs]
    return torch.fx.GraphModule({}, once), torch.fx.GraphModule({}, each), unchanging


def inline_constants(
    each: torch.fx.GraphModule,
    variable: int,
    values: Sequence[torch.Tensor],
    unchanging: list[bool],
) -> list[int]:
    """Write unchanging constants whose entries are all the same number into the graph.

    There the compiler can simplify what is computed with them.

    Args:
        each, variable, unchanging: from :func:`hoist`, whose ``once`` has returned ``values``.

    Returns:
        Positions of the values that are still inputs.
    """
    graph = each.graph
    left = []
    for k, node in enumerate([n for n in graph.nodes if n.op == "placeholder"][variable:]):
        value = values[k]
        one_number = unchanging[k] and value.numel() and bool((value == value.reshape(-1)[0]).all())
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
    torch_private.to_copy,
    aten.full_like.default,
}


def lookups_stay_inside(graph: torch.fx.Graph, bounds: Mapping[int, int]) -> bool:
    """Whether no index in a loop's body can be out of range, so that checks can be left out.

    This holds if the only integers are the loop's counter and the minibatch's indices, and every
    tensor that is indexed by them is long enough.

    Args:
        graph: the loop's body.
        bounds: position of an input -> bound on its values, for counter and indices.
    """
    limit: dict[torch.fx.Node, int] = {}
    for position, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        if position in bounds:
            limit[node] = bounds[position]
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        # (Some values are lists. Integers in them would have been found where they were made.)
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
    """Whether a node has no tensor as input (``full``, ``arange``, ...)."""
    return node.op == "call_function" and not _tensors_in(node) and not _random(node)
