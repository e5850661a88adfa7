"""z = norm(x) * (1 + scale), or, behind a residual add, z = norm(x)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.fx import Node

from dit_kernels.rounding import ScaledSteps, scaled_steps
from fusion_pass.dataflow import (
    aten,
    dtype,
    have_same_shape,
    is_call,
    is_narrowing,
    is_stored,
    other_operands,
    past_views,
    sole_user,
)
from fusion_pass.report import Reason, Refused
from fusion_pass.sites import operand
from fusion_pass.sites.norm import Norm, eps_operand
from fusion_pass.sites.operand import Operand
from fusion_pass.sites.site import (
    Operands,
    Site,
    Survey,
    applied_dtype,
    check_operands,
    choose_form,
    operand_dtype,
    promoting_dtype,
)

KIND = "norm_scale"


@dataclass(frozen=True)
class Scaled:
    """The parts of z = norm * scale; `scale` is None where there is none.

    `z` are nodes of one value: the product, or the equal casts that read it.
    """

    norm: Norm
    term: Node  # the norm in the shape in which it meets the scale
    scale: Operand | None
    z: tuple[Node, ...]
    steps: ScaledSteps
    interior: tuple[Node, ...]

    def fits(self, rounding: str, norm_dtype: torch.dtype | None) -> bool:
        """Are the steps of this form the steps of the graph?"""
        x = operand_dtype(self.norm.x)
        assert x is not None
        weight, bias = operand_dtype(self.norm.weight), operand_dtype(self.norm.bias)
        scale = None if self.scale is None else promoting_dtype(self.scale)
        kind, root, z = self.norm.kind, self.norm.steps.root, self.steps.z
        steps = scaled_steps(rounding, kind, x, weight, bias, scale, z, norm_dtype, root)
        return self.steps == steps if self.scale is not None else _roundings(self.steps) == _roundings(steps)

    @property
    def add_one(self) -> bool:
        """Is the 1 of a scale left to the op?"""
        return self.scale is not None and self.scale.activated

    def norm_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the normalised value may have been cast to."""
        return (self.norm.steps.normed, self.norm.steps.out)


def _roundings(steps: ScaledSteps) -> tuple[Any, ...]:
    """The dtypes that a norm without a scale takes in turn: whether the norm or z makes the last cast is no matter."""
    norm = steps.norm
    chain = (norm.stat, norm.normed, norm.weighted, norm.biased, norm.out, steps.product, steps.z)
    return (norm.root, *chain[:3], *(dtype for dtype, _ in groupby(chain[3:])))


def find(norm: Norm, survey: Survey) -> Site | None:
    """The site whose norm this is, as far as its dataflow tells. Raises Refused."""
    scaled = grow(norm)
    if scaled is None:
        return None
    operands: Operands = {
        "x": norm.x,
        "weight": norm.weight,
        "bias": norm.bias,
        "scale": scaled.scale,
        "eps": eps_operand(norm.eps),
    }
    check_operands(operands, KIND)
    form = choose_form(norm.anchor, KIND, scaled.norm_dtypes(), scaled.fits)
    return Site(
        kind=KIND,
        operands=operands,
        like=scaled.term,
        options={
            "norm": norm.kind,
            "add_one": scaled.add_one,
            "rounding": form.rounding,
            "norm_dtype": form.norm_dtype,
            "root": norm.steps.root,
        },
        outputs=(scaled.z,),
        dtypes={"z_dtype": scaled.steps.z},
        interior=scaled.interior,
        anchor=norm.anchor,
    )


def grow(norm: Norm) -> Scaled | None:
    """The product with a scale that reads a norm, or None where nothing of the kind stands there. Raises Refused."""
    terms = past_views(norm.out)
    term, product = terms[-1], sole_user(terms[-1])
    if product is None or not is_call(product, aten.mul.Tensor):
        return None
    scale = next(other_operands(product, term))
    if not isinstance(scale, Node) or scale is term or not have_same_shape(term, product):
        return None
    z = _stored(product)
    if not any(is_stored(node) for node in z):
        raise Refused(Reason.FOLLOWED, next(iter(past_views(z[0])[-1].users), product), kind=KIND)
    if operand.gate(scale, term).activated:
        return None  # a gate, and the residual add that it belongs to is not there
    resolved = operand.scale(scale, term)
    steps = _steps(norm, applied_dtype(resolved, norm.steps.out, KIND), product, z[0])
    inside = (*norm.interior, *terms) if z == (product,) else (*norm.interior, *terms, product)
    return Scaled(norm, term, resolved, z, steps, (*inside, *resolved.absorbed))


def unscaled(norm: Norm) -> Scaled | None:
    """The norm itself as z, where something reads it from memory.

    A norm that only the same kernel of Inductor reads would be written and read again: one row more each way.
    """
    z = _stored(norm.out)
    if not any(is_stored(node) for node in z):
        return None
    inside = tuple(node for node in norm.interior if node not in z)
    return Scaled(norm, norm.out, None, z, _steps(norm, norm.steps.out, norm.out, z[0]), inside)


def _stored(product: Node) -> tuple[Node, ...]:
    """The product; or, where all that reads it are equal casts down from fp32, those."""
    casts = tuple(product.users)
    equal = casts and all(is_narrowing(cast) and dtype(cast) == dtype(casts[0]) for cast in casts)
    return casts if equal else (product,)


def _steps(norm: Norm, scale: torch.dtype, product: Node, z: Node) -> ScaledSteps:
    """`scale` is the dtype that the scale is rounded to."""
    product_dtype, z_dtype = dtype(product), dtype(z)
    if product_dtype is None or z_dtype is None:
        raise Refused(Reason.ROUNDING, product, kind=KIND)
    return ScaledSteps(norm.steps, scale, product_dtype, z_dtype)
