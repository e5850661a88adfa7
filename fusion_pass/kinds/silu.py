"""silu(x) as a value: c / (1 + exp(-c)), where c is x or x cast to fp32; and at most one cast of the quotient.

PyTorch decomposes F.silu in this way. A model's own x / (1 + exp(-x)) and x * sigmoid(x) are recognised, too. They
round differently: each step is rounded to x's dtype, and in fp32 the exponential is not that of F.silu. The metadata of
the nodes, where tracing notes the operator that they come from, shows which one it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fusion_pass.dataflow import (
    add_constant,
    aten,
    before_widening,
    comes_from,
    is_call,
    is_narrowing,
    other_operands,
    sole_user,
)
from fusion_pass.kinds.kind import Value


@dataclass(frozen=True)
class Silu:
    """out = silu(x)."""

    anchor: Node
    x: Node
    out: Node
    by_hand: bool
    interior: tuple[Node, ...]  # every node from the exponential, or the sigmoid, to `out`


class SiluValue(Value[Silu]):
    """silu(x), found from its exponential or its sigmoid."""

    name = "silu"
    anchors = (aten.exp.default, aten.sigmoid.default)
    is_modulated = False
    unfused = None  # an activation like any other

    def find(self, anchor: Node) -> Silu | None:
        """The silu whose exponential or sigmoid is `anchor`; None if there is none.

        The user's code, then its graph in bf16:

            F.silu(x)

            c = convert(x, f32); e = exp(neg(c)); div(c, add(e, 1)); convert(., bf16)

            x * torch.sigmoid(x)

            mul(x, sigmoid(x))
        """
        return _quotient(anchor) if is_call(anchor, aten.exp.default) else _product(anchor)


SILU = SiluValue()


def _quotient(exp: Node) -> Silu | None:
    negative = exp.args[0]
    total = sole_user(exp)
    quotient = sole_user(total) if total is not None and add_constant(total, 1.0) is exp else None
    if total is None or quotient is None or not is_call(negative, aten.neg.default):
        return None
    wide = negative.args[0]
    if not is_call(quotient, aten.div.Tensor) or quotient.args[0] is not wide or quotient.args[1] is not total:
        return None
    return _silu(exp, wide, quotient, comes_from(exp, "silu", "SiLU") is False, (negative, exp, total, quotient))


def _product(sigmoid: Node) -> Silu | None:
    product = sole_user(sigmoid)
    wide = sigmoid.args[0]
    if product is None or not is_call(product, aten.mul.Tensor) or wide not in other_operands(product, sigmoid):
        return None
    return _silu(sigmoid, wide, product, True, (sigmoid, product))


def _silu(anchor: Node, wide: Node, activated: Node, by_hand: bool, nodes: tuple[Node, ...]) -> Silu:
    cast = sole_user(activated)
    out = cast if cast is not None and is_narrowing(cast) else activated
    return Silu(anchor, before_widening(wide), out, by_hand, tuple(dict.fromkeys((*nodes, out))))
