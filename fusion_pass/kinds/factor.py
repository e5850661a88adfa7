"""A factor of a norm (a gate or a scale) as an operand: what the op reads, and which activation the op computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from fusion_pass.dataflow import RESHAPES, add_constant, aten, broadcasts_to, is_call, sole_user, value
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Operand, View, operand_dtype


def _under_tanh(node: Node) -> Node | None:
    return node.args[0] if is_call(node, aten.tanh.default) else None


def _under_one_plus(node: Node) -> Node | None:
    return add_constant(node, 1.0)


_UNDER: dict[str, Callable[[Node], Node | None]] = {"tanh": _under_tanh, "one_plus": _under_one_plus}


def is_one_plus(node: Node) -> bool:
    """Does the graph show that 1 is added to a factor?"""
    while is_call(node, *RESHAPES, aten.expand.default):
        node = node.args[0]
    return _under_one_plus(node) is not None


def resolve(node: Node, x: Node, activation: str | None = None) -> Operand:
    """The operand for `node`, which broadcasts to x. Raises Refused if it does not broadcast.

    activation: "tanh" or "one_plus". The op computes it if the graph shows it and its result is read once. The graph,
    and what the op reads:

        expand(reshape(tanh(g)))   reshape(g); the op computes the tanh
        expand(reshape(t))         reshape(t)
    """
    given, expands = _unexpanded(node, x)
    if activation is None:
        return Operand(given)
    views: list[Node] = []
    current = given
    while is_call(current, *RESHAPES) and sole_user(current) is not None:
        views.insert(0, current)
        current = current.args[0]
    source = _UNDER[activation](current)
    read_once = all(sole_user(n) is not None for n in (current, *expands))
    if source is None or not read_once or value(source) is None:
        return Operand(given)
    inserted = tuple(View(view.target, view.args[1:]) for view in views)
    return Operand(source, inserted, (current, *views, *expands), activation)


def _unexpanded(node: Node, x: Node) -> tuple[Node, list[Node]]:
    """The operand before it was expanded, and the expansions. The kernel broadcasts by itself, while Inductor would
    write an expanded input to memory."""
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


def promoting_dtype(operand: Operand) -> torch.dtype | None:
    """The dtype that a factor has in type promotion. None if the factor is 0-d: it does not promote."""
    val = value(operand.source)
    return None if val is None or val.ndim == 0 else val.dtype


def applied_dtype(operand: Operand, out: torch.dtype, kind: str) -> torch.dtype:
    """The dtype that a factor is rounded to before it is multiplied by a norm of dtype `out`.

    A 0-d factor does not promote. Raises Refused if it has another dtype than `out`: that would be a separate chain.
    """
    applied = operand_dtype(operand.applied)
    if applied is None or (promoting_dtype(operand) is None and applied != out):
        raise Refused(Reason.ROUNDING, operand.applied, "the factor is no tensor, or is 0-d with another dtype", kind)
    return applied
