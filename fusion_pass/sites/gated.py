"""y = residual + tanh(gate) * norm(x), or y = residual + norm(x)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dit_kernels.rounding import GatedSteps, gated_steps
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

KIND = "norm_tanh_mul_add"


@dataclass(frozen=True)
class Gated:
    """The parts of y = residual + gate * norm; `gate` is None where there is none."""

    norm: Norm
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
        kind, y = self.norm.kind, self.steps.y
        return self.steps == gated_steps(rounding, kind, x, weight, bias, gate, residual, y, norm_dtype)

    def norm_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the normalised value may have been cast to."""
        return (self.norm.steps.normed, self.norm.steps.out, self.steps.product)

    @property
    def tanh(self) -> bool:
        """Is the activation of a gate left to the op?"""
        return self.gate is not None and self.gate.activated

    def operands(self) -> dict[str, Node | Operand | float | None]:
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
    form = choose_form(norm.anchor, KIND, gated.norm_dtypes(), gated.fits)
    return Site(
        kind=KIND,
        operands=gated.operands(),
        options={"norm": norm.kind, "tanh": gated.tanh, "rounding": form.rounding, "norm_dtype": form.norm_dtype},
        outputs=((gated.y,),),
        dtypes={"y_dtype": gated.steps.y},
        interior=gated.interior,
        anchor=norm.anchor,
    )


def grow(norm: Norm) -> Gated | None:
    """The residual add that reads a norm, or None where nothing of the kind stands there. Raises Refused."""
    reader = sole_user(norm.out)
    if reader is None:
        return None
    if is_plain_add(reader):
        return _ungated(norm, reader)
    return _gated(norm, reader) if is_call(reader, aten.mul.Tensor) else None


def _ungated(norm: Norm, y: Node) -> Gated | None:
    residual = _residual(norm, norm.out, y)
    if residual is None:
        return None
    return Gated(norm, None, residual, y, _steps(norm, norm.steps.out, norm.out, y), norm.interior)


def _gated(norm: Norm, product: Node) -> Gated | None:
    gate = next(other_operands(product, norm.out))
    rounded = sole_user(product)
    rounded = rounded if rounded is not None and is_narrowing(rounded) else product
    y = sole_user(rounded)
    if y is None or not is_plain_add(y) or not isinstance(gate, Node) or gate is norm.out:
        return None
    residual = _residual(norm, rounded, y)
    if residual is None:
        return None
    resolved = operand.gate(gate, norm.x)
    steps = _steps(norm, applied_dtype(resolved, norm.steps.out, KIND), rounded, y)
    interior = dict.fromkeys((*norm.interior, product, rounded, *resolved.absorbed))
    return Gated(norm, resolved, residual, y, steps, tuple(interior))


def _residual(norm: Norm, term: Node, y: Node) -> Node | None:
    """What `term` is added to, if it has the shape of x: a narrower operand is a bias or a shift."""
    residual = next(other_operands(y, term), None)
    val = value(residual) if isinstance(residual, Node) and residual is not term else None
    like = value(norm.x)
    return residual if val is not None and like is not None and same_shape(val, like) else None


def _steps(norm: Norm, gate: torch.dtype, rounded: Node, y: Node) -> GatedSteps:
    """`gate` is the dtype that the gate is rounded to; `rounded` is the product as it is added."""
    product_dtype, y_dtype = dtype(rounded), dtype(y)
    if product_dtype is None or y_dtype is None:
        raise Refused(Reason.ROUNDING, y, kind=KIND)
    return GatedSteps(norm.steps, gate, product_dtype, y_dtype, y_dtype)
