"""A rotation in a spelling that no kind fuses yet, as a value: the report lists it.

slices:    out[..., 0::2] = a * cos + b * sin; out[..., 1::2] = b * cos - a * sin      as rotation.py does not read it
matrices:  out = (matrix * x[..., None, :]).sum(-1)                 the matrix is [[cos, -sin], [sin, cos]]
           out = matrix[..., 0] * x[..., 0] + matrix[..., 1] * x[..., 1]               also by addcmul
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import PARTS, VIEWS, aten, is_call, is_cast, is_plain_add, value
from fusion_pass.kinds.kind import Value
from fusion_pass.kinds.rotation import ROTATION, SCATTER
from fusion_pass.refusal import Reason


@dataclass(frozen=True)
class UnreadRotation:
    """out = x, with the pairs of its last dimension rotated."""

    x: Node
    out: Node


class UnreadRotationValue(Value[UnreadRotation]):
    """A rotation that is written into slices of a tensor, or that multiplies by 2×2 matrices."""

    name = "rope"
    anchors = (SCATTER, aten.sum.dim_IntList, aten.add.Tensor, aten.addcmul.default)
    is_modulated = False
    unfused = Reason.ROTATION

    def find(self, anchor: Node) -> UnreadRotation | None:
        """The rotation whose last step is `anchor`; None if there is none.

        The user's code, then its graph in bf16:

            out = torch.empty_like(x); out[..., 0::2] = a * cos - b * sin; out[..., 1::2] = a * sin + b * cos

            s = slice_scatter(empty, copy(slice(empty), sub(mul(a, cos), mul(b, sin))), 3, 0, end, 2);
            out = slice_scatter(s, copy(slice(s), add(mul(a, sin), mul(b, cos))), 3, 1, end, 2)

            x_ = x.reshape(*x.shape[:-1], -1, 1, 2).float(); out = (rope * x_).sum(-1)

            sum(mul(rope, convert(reshape(x, [B, S, H, Dh / 2, 1, 2]), f32)), [-1])
        """
        x = self._rotated(anchor)
        return None if x is None else UnreadRotation(x, anchor)

    def _rotated(self, anchor: Node) -> Node | None:
        if is_call(anchor, SCATTER):
            return None if ROTATION.find(anchor) else _of_slices(anchor)
        return _of_sum(anchor) if is_call(anchor, aten.sum.dim_IntList) else _of_columns(anchor)


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
    if is_call(half, aten.addcmul.default):  # added in place to the first product
        base, *factors = half.args[:3]
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


def _of_sum(anchor: Node) -> Node | None:
    """x if `anchor` is the sum over the last dimension of matrix * x."""
    product = anchor.args[0]
    val = value(product) if is_call(product, aten.mul.Tensor) else None
    if val is None or not _ends_in(val, 2, 2) or list(anchor.args[1]) not in ([-1], [val.ndim - 1]):
        return None
    return _of_matrix(product.args[:2])


def _of_columns(anchor: Node) -> Node | None:
    """x if `anchor` is the sum of two columns of matrix * x."""
    if is_call(anchor, aten.addcmul.default):
        products = [_arguments(anchor.args[0]), anchor.args[1:3]]
    else:
        products = [_arguments(arg) for arg in anchor.args[:2]] if is_plain_add(anchor) else []
    columns = [[_column(factor) for factor in product] for product in products]
    if len(columns) != 2 or not all(columns):
        return None
    first, second = columns
    of_first, of_second = ({of for of, _ in column if of is not None} for column in columns)
    if of_first != of_second or len(of_first) != 2 or {index for _, index in first} == {index for _, index in second}:
        return None
    return _of_matrix([of for of, _ in first])


def _arguments(product: Any) -> tuple[Any, ...]:
    return tuple(product.args[:2]) if is_call(product, aten.mul.Tensor) else ()


def _column(node: Any) -> tuple[Node | None, int]:
    """(the tensor, 0 or 1) if a node is a column of the last dimension, of size 2, of a tensor; else (None, 0)."""
    val = value(node.args[0]) if is_call(node, aten.select.int) else None
    if val is None or node.args[1] not in (-1, val.ndim - 1) or not known_equal(val.shape[-1], 2):
        return None, 0
    return node.args[0], node.args[2]


def _of_matrix(factors: Sequence[Any]) -> Node | None:
    """x if the factors are [..., 2, 2] and pairs of x as [..., 1, 2]."""
    vals = [value(factor) if isinstance(factor, Node) else None for factor in factors]
    for pairs, val, other in zip(factors, vals, reversed(vals), strict=True):
        if val is not None and other is not None and _ends_in(val, 1, 2) and _ends_in(other, 2, 2):
            return _whole(pairs)
    return None


def _ends_in(val: torch.Tensor, rows: int, columns: int) -> bool:
    return val.ndim >= 3 and known_equal(val.shape[-2], rows) and known_equal(val.shape[-1], columns)


def _whole(node: Any) -> Any:
    """The tensor that a node is a part, a view, a cast or the negative of."""
    while is_cast(node) or is_call(node, *PARTS, *VIEWS, aten.neg.default):
        node = node.args[0]
    return node


def _have_equal_numbers(a: Node, b: Node) -> bool:
    """Have a and b equally many elements?"""
    left, right = value(a), value(b)
    return left is not None and right is not None and known_equal(left.numel(), right.numel())
