"""z = norm(x) * (1 + scale)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dit_kernels.rounding import ScaledSteps, scaled_steps
from fusion_pass.dataflow import (
    aten,
    dtype,
    is_call,
    is_narrowing,
    is_plain_add,
    other_operands,
    same_shape,
    sole_user,
    value,
)
from fusion_pass.report import Reason, Refused
from fusion_pass.sites import operand
from fusion_pass.sites.norm import Norm, eps_operand
from fusion_pass.sites.operand import Operand
from fusion_pass.sites.site import Site, Survey, applied_dtype, choose_form, operand_dtype, promoting_dtype

KIND = "norm_scale"


@dataclass(frozen=True)
class Scaled:
    """The parts of z = norm * scale. `z` are nodes of one value: the product, or the equal casts that read it."""

    norm: Norm
    scale: Operand
    z: tuple[Node, ...]
    steps: ScaledSteps
    interior: tuple[Node, ...]

    def fits(self, rounding: str, norm_dtype: torch.dtype | None) -> bool:
        """Are the steps of this form the steps of the graph?"""
        x = operand_dtype(self.norm.x)
        assert x is not None
        weight, bias = operand_dtype(self.norm.weight), operand_dtype(self.norm.bias)
        scale = promoting_dtype(self.scale)
        return self.steps == scaled_steps(rounding, "rms", x, weight, bias, scale, self.steps.z, norm_dtype)

    def norm_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the normalised value may have been cast to."""
        return (self.norm.steps.normed, self.norm.steps.out)


def find(norm: Norm, survey: Survey) -> Site | None:
    """The site whose norm this is, as far as its dataflow tells. Raises Refused."""
    scaled = grow(norm)
    if scaled is None:
        return None
    form = choose_form(norm.anchor, KIND, scaled.norm_dtypes(), scaled.fits)
    return Site(
        kind=KIND,
        operands={
            "x": norm.x,
            "weight": norm.weight,
            "bias": norm.bias,
            "scale": scaled.scale,
            "eps": eps_operand(norm.eps),
        },
        options={"add_one": scaled.scale.activated, "rounding": form.rounding, "norm_dtype": form.norm_dtype},
        outputs=(scaled.z,),
        dtypes={"z_dtype": scaled.steps.z},
        interior=scaled.interior,
        anchor=norm.anchor,
    )


def grow(norm: Norm) -> Scaled | None:
    """The product with a scale that reads a norm, or None where nothing of the kind stands there. Raises Refused."""
    product = sole_user(norm.out)
    if product is None or not is_call(product, aten.mul.Tensor):
        return None
    scale = next(other_operands(product, norm.out))
    like, val = value(norm.x), value(product)
    if not isinstance(scale, Node) or scale is norm.out or like is None or val is None or not same_shape(val, like):
        return None
    follows = sole_user(product)
    if follows is not None and (is_plain_add(follows) or is_call(follows, aten.mul.Tensor)):
        raise Refused(Reason.FOLLOWED, follows, kind=KIND)
    if operand.gate(scale, norm.x).activated:
        return None  # a gate, and the residual add that it belongs to is not there
    resolved = operand.scale(scale, norm.x)
    z = _stored(product)
    steps = _steps(norm, resolved, product, z[0])
    inside = norm.interior if z == (product,) else (*norm.interior, product)
    return Scaled(norm, resolved, z, steps, (*inside, *resolved.absorbed))


def _stored(product: Node) -> tuple[Node, ...]:
    """The product; or, where all that reads it are equal casts down from fp32, those."""
    casts = tuple(product.users)
    equal = casts and all(is_narrowing(cast) and dtype(cast) == dtype(casts[0]) for cast in casts)
    return casts if equal else (product,)


def _steps(norm: Norm, scale: Operand, product: Node, z: Node) -> ScaledSteps:
    product_dtype, z_dtype = dtype(product), dtype(z)
    if product_dtype is None or z_dtype is None:
        raise Refused(Reason.ROUNDING, product, kind=KIND)
    return ScaledSteps(norm.steps, applied_dtype(scale, norm.steps.out, KIND), product_dtype, z_dtype)
