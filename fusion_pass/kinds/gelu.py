"""gelu(x) as a value, in the two ways of F.gelu: with erf, and approximated with tanh.

PyTorch decomposes F.gelu in this way, in fp32. A model's own formula has the same nodes, but eager code rounds it
differently. The metadata of the nodes, where tracing notes the operator that they come from, shows which one it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusion_pass.dataflow import (
    add_constant,
    aten,
    before_widening,
    comes_from,
    dtype,
    is_call,
    is_plain_add,
    other_operands,
    sole_user,
)
from fusion_pass.kinds.kind import Value

SQRT_HALF, SQRT_2_OVER_PI, CUBIC = 0.7071067811865476, 0.7978845608028654, 0.044715


@dataclass(frozen=True)
class Gelu:
    """out = gelu(x). Not yet rounded to a 16-bit dtype."""

    anchor: Node
    x: Node
    out: Node
    approximate: str  # "none" or "tanh", as in F.gelu
    by_hand: bool
    interior: tuple[Node, ...]  # every node that computes `out` from x, or from x in fp32


class GeluValue(Value[Gelu]):
    """gelu(x), found from its erf or its tanh."""

    name = "gelu"
    anchors = (aten.erf.default, aten.tanh.default)
    is_modulated = False
    unfused = None  # Inductor computes a GELU that is not quantised

    def find(self, anchor: Node) -> Gelu | None:
        """The gelu whose erf or tanh is `anchor`; None if there is none.

        The user's code, then its graph in bf16:

            F.gelu(x)

            c = convert(x, f32); e = erf(mul(c, 0.7071)); mul(mul(c, 0.5), add(e, 1))

            F.gelu(x, approximate="tanh")

            c = convert(x, f32); t = tanh(mul(add(c, mul(mul(mul(c, c), c), 0.044715)), 0.7979))
            mul(mul(c, 0.5), add(t, 1))
        """
        with_tanh = is_call(anchor, aten.tanh.default)
        scaled = anchor.args[0]
        if with_tanh:
            wide, inner = _with_cube(_times(scaled, SQRT_2_OVER_PI))
        else:
            wide, inner = _times(scaled, SQRT_HALF), ()
        total = sole_user(anchor)
        out = None if total is None or add_constant(total, 1.0) is not anchor else sole_user(total)
        if wide is None or total is None or out is None or not is_call(out, aten.mul.Tensor):
            return None
        half = next(other_operands(out, total))
        if _times(half, 0.5) is not wide:
            return None
        interior = tuple(dict.fromkeys((half, *inner, scaled, anchor, total, out)))
        by_hand = dtype(wide) != torch.float32 or comes_from(anchor, "gelu", "GELU") is False
        return Gelu(anchor, before_widening(wide), out, "tanh" if with_tanh else "none", by_hand, interior)


GELU = GeluValue()


def _times(node: Any, number: float) -> Node | None:
    """The tensor v if the node is v * number; else None."""
    return node.args[0] if is_call(node, aten.mul.Tensor) and node.args[1] == number else None


def _with_cube(node: Node | None) -> tuple[Node | None, tuple[Node, ...]]:
    """v and the nodes that compute it, if the node is v + 0.044715 * v^3."""
    if node is None or not is_plain_add(node):
        return None, ()
    v, term = node.args
    cube = _times(term, CUBIC)
    if cube is None or not is_call(cube, aten.mul.Tensor) or cube.args[1] is not v:
        return None, ()
    square = cube.args[0]
    return (v, (square, cube, term, node)) if is_call(square, aten.mul.Tensor) and square.args == (v, v) else (None, ())
