"""The table of a rotation as an operand: rows whose numbers are adjacent in memory.

A model may take every second column of a table. A kernel then needs a copy, which is made once for all sites that read
the table.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import TO_SHAPE, are_rows, aten, is_call, region, same_shape, value
from fusion_pass.site import ORIGIN, Operand, View

_FORMAT = {"memory_format": torch.contiguous_format}


class Copy(View):
    """A contiguous copy of a table. One node, right behind the table, serves all sites."""

    def __init__(self) -> None:
        super().__init__(aten.clone.default, ())

    def of(self, val: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the copy."""
        copied: torch.Tensor = self.target(val, **_FORMAT)
        return copied

    def insert(self, node: Node, graph: Graph) -> Node:
        """Inserts the copy behind the first node that is equal to `node`."""
        table = _first_alike(node)
        made = next((user for user in table.users if is_call(user, self.target) and user.kwargs == _FORMAT), None)
        if made is not None:
            return made
        inputs = graph.find_nodes(op="placeholder")
        with graph.inserting_after(max(table, *inputs[-1:])):
            made = graph.call_function(self.target, (table,), dict(_FORMAT))
        made.meta = {key: table.meta[key] for key in ORIGIN if key in table.meta}
        made.meta["val"] = self.of(table.meta["val"])
        return made


def dense(table: Node) -> Operand:
    """A table, or a copy of it if the numbers of its rows are apart in memory."""
    val = value(table)
    return Operand(table) if val is None or are_rows(val) else Operand(table, (Copy(),))


def _first_alike(node: Node) -> Node:
    """The first of the equal parts that a graph takes of one tensor, e.g. in every layer."""
    if not is_call(node, aten.slice.Tensor, aten.select.int):
        return node
    parts = (user for user in node.args[0].users if user.target == node.target)
    return min(p for p in parts if (p.args, p.kwargs) == (node.args, node.kwargs) and region(p) == region(node))


class _Merged(View):
    """The last dimensions merged into one, e.g. of two [B, S, H, n] as [B, S, H · n]."""

    def __init__(self, dims: int) -> None:
        super().__init__(aten.reshape.default, (dims,))

    def of(self, val: torch.Tensor) -> torch.Tensor:
        """This view of a fake tensor."""
        (dims,) = self.args
        return val.reshape(*val.shape[:-dims], math.prod(val.shape[-dims:]))

    def insert(self, node: Node, graph: Graph) -> Node:
        """Inserts the view, and before it the nodes of symbolic sizes."""
        made = self.of(node.meta["val"])
        sizes: list[int | Node] = []
        for dim, size in enumerate(made.shape):
            if not isinstance(size, int):
                of = graph.call_function(aten.sym_size.int, (node, dim))
                of.meta["val"] = size
                size = of
            sizes.append(size)
        view = graph.call_function(self.target, (node, sizes))
        view.meta = {key: node.meta[key] for key in ORIGIN if key in node.meta}
        view.meta["val"] = made
        return view


def joined_heads(table: Node, *views: View) -> Operand:
    """A table of each head, [B, S, H, n] after `views`, as [B, S, H · n]: the tensor that it is a view of, if that is
    one."""
    source = table.args[0] if not views and is_call(table, *TO_SHAPE) else None
    val, joined = value(table), None if source is None else value(source)
    if source is not None and joined is not None and val is not None and same_shape(_Merged(2).of(val), joined):
        return dense(source)
    return Operand(table, (*views, _Merged(2)))


def flat(matrices: Node) -> Operand:
    """2×2 matrices, [..., Dh / 2, 2, 2], as rows of 2 * Dh numbers."""
    val = value(matrices)
    packed = val is None or all(map(known_equal, val.stride()[-3:], (4, 2, 1)))
    return Operand(matrices, (_Merged(3),) if packed else (Copy(), _Merged(3)))
