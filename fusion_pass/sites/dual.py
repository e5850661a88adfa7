"""y = residual + tanh(gate) * norm(x) and z = norm(y) * (1 + scale), the second norm reading y.

Either of gate and scale may be absent.
"""

from __future__ import annotations

from torch.fx import Node

from fusion_pass.dataflow import have_same_shape, under_views
from fusion_pass.report import Reason, Refused
from fusion_pass.sites import gated, norm, scaled
from fusion_pass.sites.gated import Gated
from fusion_pass.sites.norm import Norm, eps_operand
from fusion_pass.sites.scaled import Scaled
from fusion_pass.sites.site import Form, Operands, Site, Survey, check_operands, choose_form

KIND = "norm_tanh_mul_add_norm_scale"


def find(second: Norm, survey: Survey) -> Site | None:
    """The two-output site whose second norm this is, as far as its dataflow tells. Raises Refused."""
    y = under_views(second.x)
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
        lambda rounding, norm_dtype: upper.fits(rounding, norm_dtype) and _second_form(lower, rounding) is not None,
    )
    second_form = _second_form(lower, form.rounding)
    assert second_form is not None
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
            "norm_dtype2": second_form.norm_dtype,
            "root": second.steps.root,
        },
        outputs=((upper.y,), lower.z),
        dtypes={"y_dtype": upper.steps.y, "z_dtype": lower.steps.z},
        interior=(*upper.interior, *lower.interior),
        anchor=upper.norm.anchor,
    )


def _second_form(lower: Scaled, rounding: str) -> Form | None:
    """This form with the dtype that the second norm is cast to, or None if it is not the form of that."""
    fitting = (dtype for dtype in (None, *lower.norm_dtypes()) if lower.fits(rounding, dtype))
    return next((Form(rounding, dtype) for dtype in fitting), None)


def _like(upper: Gated, lower: Scaled) -> Node:
    """Where gate and scale are met in other shapes of one tensor, there is none that both broadcast to."""
    if lower.scale is None:
        return upper.term
    if upper.gate is None:
        return lower.term
    if not have_same_shape(upper.term, lower.term):
        raise Refused(Reason.SHAPE, lower.term, "the scale's is another than the gate's", KIND)
    return upper.term
