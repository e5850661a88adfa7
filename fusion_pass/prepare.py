"""Rewrites before the search for sites. They do not change what the graph computes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._inductor.pattern_matcher import is_mutation_op
from torch.fx import Graph, Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import (
    TO_SHAPE,
    VIEWS,
    aten,
    dtype,
    is_call,
    is_pointwise,
    is_random,
    prims,
    readers,
    region,
    value,
)

# The operators that find the range of the values that a quantiser scales.
_RANGES = (
    aten.amax.default,
    aten.amin.default,
    aten.aminmax.default,
    aten.max.default,
    aten.max.dim,
    aten.min.default,
    aten.min.dim,
)


def drop_what_computes_nothing(graph: Graph) -> None:
    """Erases nodes that nothing needs and that would count as readers of their inputs.

    `is_pinned` of a tensor, which torch's complex wrapper leaves behind; and asserts of metadata, which torch.export
    puts in front of each cast, where the metadata of the fake tensor shows that they hold.
    """
    for node in graph.find_nodes(op="call_function", target=aten.is_pinned.default):
        if not node.users:
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        if not node.users and _holds(node):
            graph.erase_node(node)


def _holds(assertion: Node) -> bool:
    """Does an assertion about the metadata of a tensor hold, whatever its symbols stand for?"""
    val = value(assertion.args[0])
    if val is None:
        return False
    expected = dict(zip(("size", "stride", "dtype"), assertion.args[1:], strict=False)) | assertion.kwargs
    actual = {"size": val.shape, "stride": val.stride(), "dtype": val.dtype, "device": val.device, "layout": val.layout}
    return all(given is None or _equal(given, actual[name]) for name, given in expected.items())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(b, tuple | torch.Size):
        return len(a) == len(b) and all(
            not isinstance(m, Node) and known_equal(m, n) for m, n in zip(a, b, strict=True)
        )
    return bool(a == b)


def read_sizes_at_their_source(graph: Graph) -> None:
    """Replaces a size that is read from a view by the node that the view got the size from, and a size that is read
    from a concatenation by the same size of an earlier node, or by the sum of its parts' sizes.

    Then no node reads the view or the concatenation only for its size.

    The graph before and after:

        s = sym_size(x, 1); v = reshape(y, [b, s, d]); f(sym_size(v, 1))
        s = sym_size(x, 1); v = reshape(y, [b, s, d]); f(s)

        c = cat([norm(x), norm(y)], 1); f(sym_size(c, 1))
        c = cat([norm(x), norm(y)], 1); f(add(sym_size(x, 1), sym_size(y, 1)))
    """
    holders: dict[Any, tuple[Node, int | None]] | None = None
    for size in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        whole, dim = size.args
        source = whole.args[1][dim] if is_call(whole, *TO_SHAPE) else None
        if is_call(whole, aten.cat.default):
            holders = _first_holders(graph) if holders is None else holders
            source = _of_concatenation(size, holders)
        if isinstance(source, Node) and known_equal(source.meta["val"], size.meta["val"]):
            size.replace_all_uses_with(source)
            graph.erase_node(size)


def _first_holders(graph: Graph) -> dict[Any, tuple[Node, int | None]]:
    """For each symbolic size, as an expression, the first node that holds it: a number, or a dimension of a tensor."""
    holders: dict[Any, tuple[Node, int | None]] = {}
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            holders.setdefault(val.node.expr, (node, None))
        for dim, by in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
            if isinstance(by, torch.SymInt):
                holders.setdefault(by.node.expr, (node, dim))
    return holders


def _of_concatenation(size: Node, holders: dict[Any, tuple[Node, int | None]]) -> Node | None:
    """A node for a size of a concatenation that does not read the concatenation; None if there is none."""
    whole, dim = size.args
    parts, *along = whole.args
    with size.graph.inserting_before(size):
        held = _held(size.meta["val"], whole, holders)
        if held is not None or dim != (along[0] if along else 0) % whole.meta["val"].ndim:
            return held
        total = None
        for part in parts:
            by = part.meta["val"].shape[dim]
            one = by if isinstance(by, int) else _held(by, whole, holders)
            if one is None:
                return None
            total = one if total is None else _sum(total, one, size.graph)
    return total if isinstance(total, Node) else None


def _held(size: torch.SymInt, before: Node, holders: dict[Any, tuple[Node, int | None]]) -> Node | None:
    """The node of a size, which is inserted if a tensor holds the size; None if no node before `before` holds it."""
    holder, dim = holders.get(size.node.expr, (before, None))
    if not holder < before or dim is None:
        return holder if holder < before else None
    node = before.graph.call_function(aten.sym_size.int, (holder, dim))
    node.meta["val"] = size
    return node


def _sum(a: Any, b: Any, graph: Graph) -> Node:
    node = graph.call_function(operator.add, (a, b))
    node.meta["val"] = (a.meta["val"] if isinstance(a, Node) else a) + (b.meta["val"] if isinstance(b, Node) else b)
    return node


def merge_equal_quantisers(graph: Graph) -> None:
    """Merges quantisers that compute the same: the linear layers that read one value have one quantiser each, and
    Inductor's code stores the result of each.

    A quantiser ends in a cast to int8 or to an 8-bit float, and finds the range of the values that it scales. Two are
    equal if they have the same operators and constants and read the same nodes, without a mutation or a switch of
    streams between them. Results that the graph returns stay apart: their reader may write into one of them.

    The graph before and after, with torchao's linear layers:

        s = f(amax(abs(z))); q = convert(div(z, s), float8_e4m3fn); _scaled_mm(q, w, s)
        t = f(amax(abs(z))); r = convert(div(z, t), float8_e4m3fn); _scaled_mm(r, v, t)

        s = f(amax(abs(z))); q = convert(div(z, s), float8_e4m3fn); _scaled_mm(q, w, s); _scaled_mm(q, v, s)
    """
    casts = graph.find_nodes(op="call_function", target=prims.convert_element_type.default)
    casts = [cast for cast in casts if _has_8_bits(dtype(cast))]
    firsts = _first_equals(_behind(casts, _is_step))
    copies: dict[Node, Node] = {}
    for cast in casts:
        chain = {node: firsts[node] for node in _behind([cast], lambda node: firsts.get(node, node) is not node)}
        if any(is_call(node, *_RANGES) for node in chain) and not any(
            map(_is_returned_or_written, (*chain, *chain.values()))
        ):
            copies |= chain
    for node, first in copies.items():
        node.replace_all_uses_with(first)
    for node in copies:
        graph.erase_node(node)


def _has_8_bits(found: torch.dtype | None) -> bool:
    return found is not None and found.itemsize == 1 and (found.is_floating_point or found == torch.int8)


def _behind(nodes: Iterable[Node], passes: Callable[[Node], bool]) -> list[Node]:
    """These nodes and what they are computed from, as long as the nodes pass. Each of them once."""
    found = dict.fromkeys(filter(passes, nodes))
    pending = list(found)
    for node in pending:  # the list grows
        new = [source for source in node.all_input_nodes if source not in found and passes(source)]
        found |= dict.fromkeys(new)
        pending += new
    return pending


def _is_step(node: Node) -> bool:
    """Can two of these nodes be one if they read the same? Then the node computes what its inputs determine."""
    if is_call(node, operator.getitem, aten.full.default, *_RANGES) or _is_view(node):
        return True
    return is_pointwise(node) and not is_random(node)


def _is_view(node: Node) -> bool:
    return is_call(node, *VIEWS) or getattr(node.target, "is_view", False)


def _first_equals(nodes: Iterable[Node]) -> dict[Node, Node]:
    """For each node the first one of these nodes that is equal to it, which may be the node itself."""
    firsts: dict[Node, Node] = {}
    known: dict[Any, Node] = {}
    for node in sorted(nodes):
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: firsts.get(source, source))
        # As text, in which 1, 1.0 and True differ, and 0.0 and -0.0. A node is its name there.
        firsts[node] = known.setdefault((node.target, repr(args), repr(kwargs), region(node)), node)
    return firsts


def _is_returned_or_written(node: Node) -> bool:
    """Does the graph return a node or a view of it, or write into it?"""
    return any(reader.op == "output" or is_mutation_op(reader) for reader in readers(node, _is_view))
