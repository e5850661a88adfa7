"""Rewrites before the search for sites. They do not change what the graph computes."""

from __future__ import annotations

from torch.fx import Graph, Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import aten, is_call


def read_sizes_at_their_source(graph: Graph) -> None:
    """Replaces a size that is read from a view by the node that the view got the size from.

    Then no node reads the view only for its size.

    The graph before and after:

        s = sym_size(x, 1); v = reshape(y, [b, s, d]); f(sym_size(v, 1))
        s = sym_size(x, 1); v = reshape(y, [b, s, d]); f(s)
    """
    for size in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        view, dim = size.args
        source = view.args[1][dim] if is_call(view, aten.reshape.default, aten.view.default) else None
        if isinstance(source, Node) and known_equal(source.meta["val"], size.meta["val"]):
            size.replace_all_uses_with(source)
            graph.erase_node(size)
