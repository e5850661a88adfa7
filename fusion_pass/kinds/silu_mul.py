"""out = silu(a) * b (SwiGLU), where a and b have the same shape."""

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
    is_read_from_memory,
    other_operands,
    past_views,
    sole_user,
    stored_casts,
)
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.kinds.silu import Silu
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Form, Operands, Output, Site, check_operands, operand_dtype

KIND = "silu_mul"


class SiluMul(Kind[Silu]):
    """out = silu(a) * b."""

    name = KIND
    is_modulated = False

    def find(self, value: Silu, survey: Survey) -> Site | None:
        """Finds the product of a silu and a tensor of its shape.

        The user's code, then its graph in bf16:

            F.silu(self.w1(x)) * self.w3(x)

            c = convert(a, f32); e = exp(neg(c)); s = convert(div(c, add(e, 1)), bf16); mul(s, b)
        """
        return _site(value)


def _site(silu: Silu) -> Site | None:
    terms = past_views(silu.out)
    term = terms[-1]
    product = next((user for user in term.users if _is_product(user, term)), None)
    if product is None:
        return None  # the silu is a gate that broadcasts, or a factor
    out = stored_casts(product)
    if not any(map(is_read_from_memory, out)):
        raise Refused(Reason.INLINE, product, kind=KIND)
    if silu.by_hand:
        raise Refused(Reason.SILU, silu.anchor, kind=KIND)
    if sole_user(term) is None:
        raise Refused(Reason.ESCAPES, term, kind=KIND)
    b = next(other_operands(product, term))
    if not have_same_shape(silu.x, term):
        raise Refused(Reason.SHAPE, term, "a reshape is between the silu and its product", KIND)
    steps = SiluSteps(*(_dtype(node) for node in (silu.out, product, out[0])))
    b = next((node for node in (before_widening(b), b) if _fits(steps, silu.x, node)), None)
    if b is None:
        raise Refused(Reason.ROUNDING, product, kind=KIND)
    operands: Operands = {"a": silu.x, "b": b}
    check_operands(operands, KIND)
    return Site(
        kind=KIND,
        operands=operands,
        options={"silu_dtype": steps.silu, "out_dtype": steps.out},
        form=Form("model", {}),
        outputs=(Output(out),),
        interior=tuple(dict.fromkeys((*silu.interior, *terms, *(() if out == (product,) else (product,))))),
        anchor=product,
    )


def _is_product(node: Node, term: Node) -> bool:
    """Is this the product of a term and another value of the same shape?"""
    b = next(other_operands(node, term), None) if is_call(node, aten.mul.Tensor) else None
    return b is not None and b is not term and have_same_shape(term, b)


def _fits(steps: SiluSteps, a: Node, b: Node) -> bool:
    """Are the steps of the op those of the graph?"""
    left, right = operand_dtype(a), operand_dtype(b)
    assert left is not None and right is not None
    return steps == silu_steps("model", left, right, steps.silu, steps.out)


def _dtype(node: Node) -> torch.dtype:
    found = dtype(node)
    if found is None:
        raise Refused(Reason.ROUNDING, node, kind=KIND)
    return found
