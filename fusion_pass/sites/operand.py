"""Gates and scales as operands: what the op reads, and whether tanh or the 1 is absorbed into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fusion_pass.dataflow import RESHAPES, add_constant, aten, broadcasts_to, is_call, sole_user, value
from fusion_pass.report import Reason, Refused


@dataclass(frozen=True)
class View:
    """A call that gives a view of its first argument."""

    target: Any
    args: tuple[Any, ...]

    def of(self, val: torch.Tensor) -> torch.Tensor:
        """The view of a fake tensor."""
        return self.target(val, *map_arg(self.args, lambda node: node.meta["val"]))


ORIGIN = ("stack_trace", "nn_module_stack", "custom")  # what a node that is made takes over from the one it stands for
SWAP = View(aten.permute.default, ([0, 2, 1, 3],))  # of [B, S, H, Dh] to [B, H, S, Dh], and back


@dataclass(frozen=True)
class Operand:
    """`source` with `views` applied to it; `absorbed` are the nodes that the op replaces."""

    source: Node
    views: tuple[View, ...]
    absorbed: tuple[Node, ...]

    @property
    def activated(self) -> bool:
        """Is the tanh, or the 1, left to the op?"""
        return bool(self.absorbed)

    @property
    def applied(self) -> Node:
        """The node whose value enters the product: after the tanh, or the 1, whoever computes it."""
        return self.absorbed[0] if self.absorbed else self.source

    def value(self) -> torch.Tensor | None:
        """The fake tensor that the op reads."""
        val = value(self.source)
        for view in self.views:
            val = val if val is None else view.of(val)
        return val

    def materialise(self, graph: Graph) -> Node:
        """The node that the op reads, made where the graph inserts now."""
        node = self.source
        for view in self.views:
            node = view_of(node, view, graph)
        return node


def view_of(node: Node, view: View, graph: Graph) -> Node:
    """A view of a node, made where the graph inserts now."""
    made = graph.call_function(view.target, (node, *view.args))
    made.meta = {k: node.meta[k] for k in ORIGIN if k in node.meta}
    made.meta["val"] = view.of(node.meta["val"])
    return made


def gate(node: Node, x: Node) -> Operand:
    """A gate: tanh is absorbed where it is visible and used once."""
    return _operand(node, x, lambda n: n.args[0] if is_call(n, aten.tanh.default) else None)


def scale(node: Node, x: Node) -> Operand:
    """A scale: the 1 is absorbed where it is visible and used once."""
    return _operand(node, x, lambda n: add_constant(n, 1.0))


def _operand(node: Node, x: Node, inner: Callable[[Node], Node | None]) -> Operand:
    given, expands = _unexpanded(node, x)
    views: list[Node] = []
    current = given
    while is_call(current, *RESHAPES) and sole_user(current) is not None:
        views.insert(0, current)
        current = current.args[0]
    source = inner(current)
    read_once = all(sole_user(n) is not None for n in (current, *expands))
    if source is None or not read_once or value(source) is None:
        return Operand(given, (), ())
    made = tuple(View(view.target, view.args[1:]) for view in views)
    return Operand(source, made, (current, *views, *expands))


def _unexpanded(node: Node, x: Node) -> tuple[Node, list[Node]]:
    """The operand before it was expanded, and the expansions: broadcasting is the kernel's, and Inductor would write an
    expanded input out."""
    like = value(x)
    expands: list[Node] = []
    while is_call(node, aten.expand.default):
        val = value(node.args[0])
        if val is None or like is None or not broadcasts_to(val, like):
            break
        expands.append(node)
        node = node.args[0]
    val = value(node)
    if val is None or like is None or not broadcasts_to(val, like):
        raise Refused(Reason.SHAPE, node)
    return node, expands
