"""y = residual + tanh(gate) * norm(x), or y = residual + norm(x)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dit_kernels.rounding import GatedSteps, gated_steps
from fusion_pass.dataflow import (
    aten,
    comes_from,
    dtype,
    have_same_shape,
    is_call,
    is_narrowing,
    is_plain_add,
    is_widening,
    keeps_rows,
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

KIND = "norm_tanh_mul_add"
ADDCMUL = "addcmul rounds the product and the sum once"


@dataclass(frozen=True)
class Gated:
    """The parts of y = residual + gate * norm; `gate` is None where there is none."""

    norm: Norm
    term: Node  # the norm in the shape in which it meets the gate, or else the residual
    gate: Operand | None
    residual: Node
    y: Node
    steps: GatedSteps
    interior: tuple[Node, ...]

    def fits(self, rounding: str, norm_dtype: torch.dtype | None) -> bool:
        """Are the steps of this form the steps of the graph?"""
        x, residual = operand_dtype(self.norm.x), operand_dtype(self.residual)
        assert x is not None and residual is not None
        weight, bias = operand_dtype(self.norm.weight), operand_dtype(self.norm.bias)
        gate = None if self.gate is None else promoting_dtype(self.gate)
        kind, root, y = self.norm.kind, self.norm.steps.root, self.steps.y
        return self.steps == gated_steps(rounding, kind, x, weight, bias, gate, residual, y, norm_dtype, root)

    def norm_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the normalised value may have been cast to."""
        return (self.norm.steps.normed, self.norm.steps.out, self.steps.product)

    @property
    def tanh(self) -> bool:
        """Is the activation of a gate left to the op?"""
        return self.gate is not None and self.gate.activated

    def operands(self) -> Operands:
        norm = self.norm
        return {
            "x": norm.x,
            "weight": norm.weight,
            "bias": norm.bias,
            "gate": self.gate,
            "residual": self.residual,
            "eps": eps_operand(norm.eps),
        }


def note(norm: Norm, survey: Survey) -> None:
    """Notes which y a norm makes, so that the norm that reads it can find its site."""
    upper = grow(norm)
    if upper is not None and (upper.gate is not None or upper.y not in survey.gated):
        survey.gated[upper.y] = norm.anchor


def find(norm: Norm, survey: Survey) -> Site | None:
    """The site whose norm this is, as far as its dataflow tells. Raises Refused."""
    gated = grow(norm)
    if gated is None or (gated.gate is None and survey.gated.get(gated.y, norm.anchor) is not norm.anchor):
        return None  # of two norms that are added, one is the residual of the other: the gated one's, if there is one
    operands = gated.operands()
    check_operands(operands, KIND)
    form = choose_form(norm.anchor, KIND, gated.norm_dtypes(), gated.fits)
    return Site(
        kind=KIND,
        operands=operands,
        like=gated.term,
        options={
            "norm": norm.kind,
            "tanh": gated.tanh,
            "rounding": form.rounding,
            "norm_dtype": form.norm_dtype,
            "root": norm.steps.root,
        },
        outputs=((gated.y,),),
        dtypes={"y_dtype": gated.steps.y},
        interior=gated.interior,
        anchor=norm.anchor,
    )


def grow(norm: Norm) -> Gated | None:
    """The residual add that reads a norm, or None where nothing of the kind stands there. Raises Refused."""
    terms = past_views(norm.out)
    reader = sole_user(terms[-1])
    if reader is None:
        return None
    if is_call(reader, aten.addcmul.default) and have_same_shape(terms[-1], reader.args[0]):
        raise Refused(Reason.ROUNDING, reader, ADDCMUL, KIND)
    if is_plain_add(reader):
        return _ungated(norm, terms, reader)
    return _gated(norm, terms, reader) if is_call(reader, aten.mul.Tensor) else None


def _ungated(norm: Norm, terms: tuple[Node, ...], y: Node) -> Gated | None:
    term = terms[-1]
    residual = _residual(term, y)
    if residual is None:
        return None
    interior = (*norm.interior, *terms)
    return Gated(norm, term, None, residual, y, _steps(norm, norm.steps.out, norm.out, y), interior)


def _gated(norm: Norm, terms: tuple[Node, ...], product: Node) -> Gated | None:
    term = terms[-1]
    gate = next(other_operands(product, term))
    products, rounded = _rounded(product)
    y = sole_user(products[-1])
    if y is None or not is_plain_add(y) or not isinstance(gate, Node) or gate is term:
        return None
    residual = _residual(products[-1], y)
    if residual is None:
        return None
    if comes_from(y, "aten.addcmul"):  # torch 2.11 takes it apart before any pass sees it
        raise Refused(Reason.ROUNDING, y, ADDCMUL, KIND)
    resolved = operand.gate(gate, term)
    steps = _steps(norm, applied_dtype(resolved, norm.steps.out, KIND), rounded, y)
    interior = (*norm.interior, *terms, *products, *resolved.absorbed)
    return Gated(norm, term, resolved, residual, y, steps, interior)


def _rounded(product: Node) -> tuple[tuple[Node, ...], Node]:
    """The product, and the casts and views that it passes on its way to the sum; and which of them is rounded.

    A cast up that the sum would make itself is none of the roundings; behind one there is no cast down.
    """
    chain, rounded = [product], product
    while (user := sole_user(chain[-1])) is not None:
        as_it_is = rounded is chain[-1]
        if not keeps_rows(user) and not (as_it_is and (is_narrowing(user) or is_widening(user))):
            break
        if as_it_is and not is_widening(user):
            rounded = user
        chain.append(user)
    return tuple(chain), rounded


def _residual(term: Node, y: Node) -> Node | None:
    """What `term` is added to, if it has its shape: a narrower operand is a bias or a shift."""
    residual = next(other_operands(y, term), None)
    return residual if residual is not term and have_same_shape(term, residual) else None


def _steps(norm: Norm, gate: torch.dtype, rounded: Node, y: Node) -> GatedSteps:
    """`gate` is the dtype that the gate is rounded to; `rounded` is the product as it is added."""
    product_dtype, y_dtype = dtype(rounded), dtype(y)
    if product_dtype is None or y_dtype is None:
        raise Refused(Reason.ROUNDING, y, kind=KIND)
    return GatedSteps(norm.steps, gate, product_dtype, y_dtype, y_dtype)
