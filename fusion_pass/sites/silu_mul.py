"""out = silu(a) * b: SwiGLU, a and b of one shape."""

from __future__ import annotations

import torch
from torch.fx import Node

from dit_kernels.rounding import SiluSteps, silu_steps
from fusion_pass.dataflow import (
    aten,
    before_widening,
    dtype,
    have_same_shape,
    is_call,
    is_stored,
    other_operands,
    past_views,
    sole_user,
    stored_casts,
)
from fusion_pass.report import Reason, Refused
from fusion_pass.sites.silu import Silu
from fusion_pass.sites.site import Operands, Site, Survey, check_operands, operand_dtype

KIND = "silu_mul"


def find(silu: Silu, survey: Survey) -> Site | None:
    """The site whose silu this is, as far as its dataflow tells. Raises Refused."""
    terms = past_views(silu.out)
    term = terms[-1]
    product = next((user for user in term.users if _is_product(user, term)), None)
    if product is None:
        return None  # a gate that broadcasts, a factor
    out = stored_casts(product)
    if not any(is_stored(node) for node in out):
        raise Refused(Reason.INLINE, product, kind=KIND)
    if silu.by_hand:
        raise Refused(Reason.SILU, silu.anchor, kind=KIND)
    if sole_user(term) is None:
        raise Refused(Reason.ESCAPES, term, kind=KIND)
    b = next(other_operands(product, term))
    if not have_same_shape(silu.x, term):
        raise Refused(Reason.SHAPE, term, "a view stands between the silu and its product", KIND)
    steps = SiluSteps(*(_dtype(node) for node in (silu.out, product, out[0])))
    b = next((node for node in (before_widening(b), b) if _fits(steps, silu.x, node)), None)
    if b is None:
        raise Refused(Reason.ROUNDING, product, kind=KIND)
    operands: Operands = {"a": silu.x, "b": b}
    check_operands(operands, KIND)
    return Site(
        kind=KIND,
        operands=operands,
        options={"rounding": "model", "silu_dtype": steps.silu},
        outputs=(out,),
        dtypes={"out_dtype": steps.out},
        interior=tuple(dict.fromkeys((*silu.interior, *terms, *(() if out == (product,) else (product,))))),
        anchor=product,
    )


def _is_product(node: Node, term: Node) -> bool:
    """The product of a term and something else of its shape."""
    b = next(other_operands(node, term), None) if is_call(node, aten.mul.Tensor) else None
    return b is not None and b is not term and have_same_shape(term, b)


def _fits(steps: SiluSteps, a: Node, b: Node) -> bool:
    """Are the steps of the op the steps of the graph?"""
    left, right = operand_dtype(a), operand_dtype(b)
    assert left is not None and right is not None
    return steps == silu_steps("model", left, right, steps.silu, steps.out)


def _dtype(node: Node) -> torch.dtype:
    found = dtype(node)
    if found is None:
        raise Refused(Reason.ROUNDING, node, kind=KIND)
    return found
