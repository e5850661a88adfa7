"""A rotation in a spelling that no kind fuses yet, as a value: the report lists it.

out[..., 0::2] = a * cos + b * sin; out[..., 1::2] = b * cos - a * sin                 rotation.py does not read it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import PARTS, VIEWS, addcmul, aten, is_call, is_cast, value
from fusion_pass.kinds.kind import Value
from fusion_pass.kinds.rotation import ROTATION, SCATTER
from fusion_pass.refusal import Reason


@dataclass(frozen=True)
class UnreadRotation:
    """out = x, with the pairs of its last dimension rotated."""

    x: Node
    out: Node


class UnreadRotationValue(Value[UnreadRotation]):
    """A rotation that is written into slices of a tensor."""

    name = "rope"
    anchors = (SCATTER,)
    is_modulated = False
    unfused = Reason.ROTATION

    def find(self, anchor: Node) -> UnreadRotation | None:
        """The rotation whose last step is `anchor`; None if there is none.

        The user's code, then its graph in bf16:

            out = torch.empty_like(x); out[..., 0::2] = a * cos - b * sin; out[..., 1::2] = a * sin + b * cos

            s = slice_scatter(empty, copy(slice(empty), sub(mul(a, cos), mul(b, sin))), 3, 0, end, 2);
            out = slice_scatter(s, copy(slice(s), add(mul(a, sin), mul(b, cos))), 3, 1, end, 2)
        """
        x = None if ROTATION.find(anchor) else _of_slices(anchor)
        return None if x is None else UnreadRotation(x, anchor)


UNREAD_ROTATION = UnreadRotationValue()


def _of_slices(second: Node) -> Node | None:
    """x if `second` and the scatter before it write the two halves of a rotation into slices of one tensor."""
    first = second.args[0]
    if not is_call(first, SCATTER) or first.args[2] != second.args[2]:
        return None
    read = [_factors(scatter.args[1]) for scatter in (first, second)]
    if read[0] != read[1] or len(read[0]) != 3:  # x, cosines and sines
        return None
    return next((node for node in read[0] if _have_equal_numbers(node, second)), None)


def _factors(half: Any) -> set[Node]:
    """The tensors whose parts are multiplied in a sum of two products; none if `half` is another operation."""
    half = half.args[1] if is_call(half, aten.copy.default) else half
    completed = addcmul(half)
    if completed is not None:  # added in place to the first product
        base, factors, _ = completed
        products = [_written_first(_whole(base))]
    elif is_call(half, aten.sub.Tensor, aten.add.Tensor):
        factors, products = [], list(half.args[:2])
    else:
        return set()
    if not all(is_call(product, aten.mul.Tensor) for product in products):
        return set()
    return {_whole(factor) for factor in (*factors, *(arg for product in products for arg in product.args))}


def _written_first(node: Any) -> Any:
    """The tensor before slices of it were written."""
    while is_call(node, SCATTER):
        node = _whole(node.args[0])
    return node


def _whole(node: Any) -> Any:
    """The tensor that a node is a part, a view, a cast or the negative of."""
    while is_cast(node) or is_call(node, *PARTS, *VIEWS, aten.neg.default):
        node = node.args[0]
    return node


def _have_equal_numbers(a: Node, b: Node) -> bool:
    """Have a and b equally many elements?"""
    left, right = value(a), value(b)
    return left is not None and right is not None and known_equal(left.numel(), right.numel())
