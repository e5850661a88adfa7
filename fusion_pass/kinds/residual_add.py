"""y = x + gate * f(x), as a value: a residual add of something that is not a norm. The report lists it.

No kind grows from it: mul_add_norm_scale grows from the norm that reads y. Otherwise, Inductor computes the add in the
kernel of this norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import (
    PARTS,
    VIEWS,
    aten,
    depends_on,
    have_same_shape,
    is_call,
    is_cast,
    is_plain_add,
    keeps_rows,
    readers,
    value,
)
from fusion_pass.kinds.kind import Value
from fusion_pass.kinds.norm import NORM, square_root_of
from fusion_pass.refusal import Reason


@dataclass(frozen=True)
class ResidualAdd:
    """out = x + added, where `added` is computed from the residual x."""

    x: Node
    added: Node
    out: Node


class ResidualAddValue(Value[ResidualAdd]):
    """A residual add of something that is not a norm, whose result a norm may read."""

    name = "residual_add"
    anchors = (aten.add.Tensor,)
    is_modulated = False
    unfused = Reason.ADDED

    def find(self, anchor: Node) -> ResidualAdd | None:
        """The residual add whose sum is `anchor`; None if there is none.

        The user's code, then its graph in bf16:

            x = x + gate_msa * attn_output; h = self.norm2(x)

            p = mul(gate, h); y = add(x, p); c = convert(y, f32); var_mean(c, [2], correction=0, keepdim=True)
        """
        if not is_plain_add(anchor) or not _may_be_normed(anchor):
            return None
        val = value(anchor)
        terms = anchor.args[:2]
        if val is None or val.ndim < 3 or not all(have_same_shape(term, anchor) for term in terms):
            return None
        for residual, added in (terms, terms[::-1]):
            if depends_on([added], {_stored(residual)}) is not None and not _is_norm(added):
                return ResidualAdd(residual, added, anchor)
        return None

    def measured(self, anchor: Node) -> Node:
        """The sum."""
        return anchor


RESIDUAL_ADD = ResidualAddValue()


def _may_be_normed(y: Node) -> bool:
    """Does a norm read y, directly or through casts, views, copies, parts of y and joins?

    A block that is compiled alone returns its y, which the norm of the next block reads.
    """
    return any(
        is_call(user, aten.var_mean.correction) or square_root_of(user) is not None or user.op == "output"
        for user in readers(y, _keeps_or_joins_rows)
    )


def _keeps_or_joins_rows(node: Node) -> bool:
    return is_cast(node) or keeps_rows(node) or is_call(node, *PARTS, aten.cat.default)


def _stored(node: Any) -> Node:
    """The node before casts and views of the same rows."""
    while is_cast(node) or keeps_rows(node):
        node = node.args[0]
    return node


def _is_norm(term: Node) -> bool:
    """Is a term a norm, perhaps with factors and a shift? Follows the rows back to the root that multiplies them."""
    seen: set[Node] = set()
    pending = [term]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_call(node, *NORM.anchors):
            return True
        if is_cast(node) or is_call(node, *VIEWS, aten.clone.default):
            pending += node.all_input_nodes
        elif is_call(node, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor):
            inputs = node.all_input_nodes
            is_sum = is_call(node, aten.add.Tensor, aten.sub.Tensor)
            if not is_sum or not all(have_same_shape(arg, node) for arg in inputs) or len(inputs) < 2:
                pending += [arg for arg in inputs if have_same_shape(arg, node) or _has_one_number_a_row(arg)]
    return False


def _has_one_number_a_row(node: Node) -> bool:
    val = value(node)
    return val is not None and val.ndim > 0 and known_equal(val.shape[-1], 1)
