"""Rewrites before the search for sites. They do not change what the graph computes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import TO_SHAPE, aten, is_call, value


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
    """Replaces a size that is read from a view by the node that the view got the size from.

    Then no node reads the view only for its size.

    The graph before and after:

        s = sym_size(x, 1); v = reshape(y, [b, s, d]); f(sym_size(v, 1))
        s = sym_size(x, 1); v = reshape(y, [b, s, d]); f(s)
    """
    for size in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        view, dim = size.args
        source = view.args[1][dim] if is_call(view, *TO_SHAPE) else None
        if isinstance(source, Node) and known_equal(source.meta["val"], size.meta["val"]):
            size.replace_all_uses_with(source)
            graph.erase_node(size)
