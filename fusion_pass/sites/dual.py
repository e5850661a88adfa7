"""y = residual + tanh(gate) * norm(x) and z = norm(y) * (1 + scale), the second norm reading y.

Either of gate and scale may be absent.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusion_pass.dataflow import have_same_shape, keeps_sums
from fusion_pass.report import Reason, Refused
from fusion_pass.sites import gated, norm, scaled
from fusion_pass.sites.gated import Gated
from fusion_pass.sites.norm import Norm, eps_operand
from fusion_pass.sites.scaled import Scaled
from fusion_pass.sites.site import Operands, Site, Survey, check_operands, choose_form

KIND = "norm_tanh_mul_add_norm_scale"


def find(second: Norm, survey: Survey) -> Site | None:
    """The two-output site whose second norm this is, as far as its dataflow tells. Raises Refused."""
    y = second.x
    while keeps_sums(y):
        y = y.args[0]
    anchor = survey.gated.get(y)
    first = None if anchor is None or anchor._erased else norm.find(anchor)
    upper = None if first is None else gated.grow(first)
    if first is None or upper is None or upper.y is not y:
        return None
    lower = scaled.grow(second) or scaled.unscaled(second)
    if lower is None:
        return None
    if (first.kind, first.steps.root) != (second.kind, second.steps.root):
        raise Refused(Reason.KINDS, second.anchor, kind=KIND)
    eps, eps2 = eps_operand(upper.norm.eps), eps_operand(second.eps)
    if isinstance(eps, float) != isinstance(eps2, float):
        raise Refused(Reason.EPS, second.anchor, "one eps is a constant, the other a tensor", KIND)
    operands: Operands = {
        **upper.operands(),
        "weight2": second.weight,
        "bias2": second.bias,
        "scale": lower.scale,
        "eps2": eps2,
    }
    check_operands(operands, KIND)
    form = choose_form(
        second.anchor,
        KIND,
        upper.norm_dtypes(),
        lambda rounding, norm_dtype: upper.fits(rounding, norm_dtype) and bool(_second_dtypes(lower, rounding)),
    )
    return Site(
        kind=KIND,
        operands=operands,
        like=_like(upper, lower),
        options={
            "norm": second.kind,
            "tanh": upper.tanh,
            "add_one": lower.add_one,
            "rounding": form.rounding,
            "norm_dtype": form.norm_dtype,
            "norm_dtype2": _second_dtypes(lower, form.rounding)[0],
            "root": second.steps.root,
        },
        outputs=((upper.y,), lower.z),
        dtypes={"y_dtype": upper.steps.y, "z_dtype": lower.steps.z},
        interior=(*upper.interior, *lower.interior),
        anchor=upper.norm.anchor,
    )


def _second_dtypes(lower: Scaled, rounding: str) -> list[torch.dtype | None]:
    """The dtypes that the second norm may be cast to in this form: none where it is not of this form."""
    return [dtype for dtype in (None, *lower.norm_dtypes()) if lower.fits(rounding, dtype)]


def _like(upper: Gated, lower: Scaled) -> Node:
    """Where gate and scale are met in other shapes of one tensor, there is none that both broadcast to."""
    if lower.scale is None:
        return upper.term
    if upper.gate is None:
        return lower.term
    if not have_same_shape(upper.term, lower.term):
        raise Refused(Reason.SHAPE, lower.term, "the scale's is another than the gate's", KIND)
    return upper.term
