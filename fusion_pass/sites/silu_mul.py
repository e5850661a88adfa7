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
    sole_user,
    stored_casts,
)
from fusion_pass.report import Reason, Refused
from fusion_pass.sites.silu import Silu
from fusion_pass.sites.site import Operands, Site, Survey, check_operands, operand_dtype

KIND = "silu_mul"


def find(silu: Silu, survey: Survey) -> Site | None:
    """The site whose silu this is, as far as its dataflow tells. Raises Refused."""
    product = sole_user(silu.out)
    if product is None or not is_call(product, aten.mul.Tensor):
        return None
    b = next(other_operands(product, silu.out))
    if b is silu.out or not have_same_shape(silu.x, b):
        return None  # a gate that broadcasts, a factor
    out = stored_casts(product)
    if not any(is_stored(node) for node in out):
        raise Refused(Reason.INLINE, product, kind=KIND)
    if silu.by_sigmoid:
        raise Refused(Reason.SIGMOID, silu.anchor, kind=KIND)
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
        interior=silu.interior if out == (product,) else (*silu.interior, product),
        anchor=product,
    )


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
