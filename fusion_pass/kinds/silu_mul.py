"""out = silu(a) * b (SwiGLU), where a and b have the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dit_kernels.families import OPS
from dit_kernels.rounding import ActivationSteps, activation_steps
from fusion_pass.dataflow import (
    aten,
    before_widening,
    dtype,
    have_same_shape,
    is_call,
    is_cast,
    is_narrowing,
    is_read_from_memory,
    other_operands,
    past_views,
    sole_user,
    stored_casts,
)
from fusion_pass.kinds import quantiser
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.kinds.silu import Silu
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Form, Operands, Output, Site, check_operands, operand_dtype


class SiluMul(Kind[Silu]):
    """out = silu(a) * b."""

    name = "silu_mul"
    is_modulated = False

    def find(self, value: Silu, survey: Survey) -> Site | None:
        """Finds the product of a silu and a tensor of its shape.

        The user's code, then its graph in bf16:

            F.silu(self.w1(x)) * self.w3(x)

            c = convert(a, f32); e = exp(neg(c)); s = convert(div(c, add(e, 1)), bf16); mul(s, b)
        """
        return _site(value, self.name)


class SiluMulQuant(SiluMul):
    """out = silu(a) * b, of which only q and s are stored. kinds/quantiser.py has the code of the user."""

    name = "silu_mul_quant"


@dataclass(frozen=True)
class Gated:
    """silu(a) * b. out: the nodes of the result: the product, or its casts. inside: the nodes that lead to them."""

    a: Node
    b: Node
    out: tuple[Node, ...]
    steps: ActivationSteps
    inside: tuple[Node, ...]

    def options(self) -> dict[str, Any]:
        """The options of the op."""
        return {"silu_dtype": self.steps.activated, "out_dtype": self.steps.out}


def product_of(silu: Silu) -> Node | None:
    """The product of a silu and a tensor of its shape; None if the silu is a gate that broadcasts, or a factor."""
    term = past_views(silu.out)[-1]
    return next((user for user in term.users if _is_product(user, term)), None)


def gated(silu: Silu, product: Node, out: tuple[Node, ...], kind: str) -> Gated:
    """What an op computes that takes the place of a product. Raises Refused if no op computes it as the model does.

    out: the nodes of the result. kind: the kind of the site, for the report.
    """
    terms = past_views(silu.out)
    term = terms[-1]
    if silu.by_hand:
        raise Refused(Reason.SILU, silu.anchor, kind=kind)
    if sole_user(term) is None:
        raise Refused(Reason.ESCAPES, term, kind=kind)
    b = next(other_operands(product, term))
    if not have_same_shape(silu.x, term):
        raise Refused(Reason.SHAPE, term, "a reshape is between the silu and its product", kind)
    steps = ActivationSteps(*(_dtype(node, kind) for node in (silu.out, product, out[0])))
    b = next((node for node in (before_widening(b), b) if _fits(steps, silu.x, node)), None)
    if b is None:
        raise Refused(Reason.ROUNDING, product, kind=kind)
    inside = (*silu.interior, *terms, *(() if out == (product,) else (product,)))
    return Gated(silu.x, b, out, steps, tuple(dict.fromkeys(inside)))


def _site(silu: Silu, kind: str) -> Site | None:
    product = product_of(silu)
    if product is None:
        return None
    quantises = OPS[kind].quantises
    out = stored_casts(product, is_narrowing if quantises else is_cast)
    row = quantiser.row_with(out, kind) if quantises else None
    if quantises and row is None:
        return None
    if not quantises and not any(map(is_read_from_memory, out)):
        raise Refused(Reason.INLINE, product, kind=kind)
    value = gated(silu, product, out, kind)
    operands: Operands = {"a": value.a, "b": value.b}
    check_operands(operands | ({} if row is None else {"before": row.before}), kind)
    found = None if row is None else row.quantisers(kind)
    return Site(
        kind=kind,
        overload="" if found is None else found.overload,
        operands=operands if row is None or found is None else operands | row.operands(found),
        options=value.options() | ({} if found is None else found.options()),
        form=Form("model", {}),
        outputs=tuple(map(Output, (out,) if found is None else found.results(out))),
        interior=value.inside if row is None or found is None else (*value.inside, *row.inside(found)),
        anchor=product,
        like=None if found is None else product,
        origin=product,
    )


def _is_product(node: Node, term: Node) -> bool:
    """Is this the product of a term and another value of the same shape?"""
    b = next(other_operands(node, term), None) if is_call(node, aten.mul.Tensor) else None
    return b is not None and b is not term and have_same_shape(term, b)


def _fits(steps: ActivationSteps, a: Node, b: Node) -> bool:
    """Are the steps of the op those of the graph?"""
    left, right = operand_dtype(a), operand_dtype(b)
    assert left is not None and right is not None
    return steps == activation_steps("model", left, right, steps.activated, steps.out)


def _dtype(node: Node, kind: str) -> torch.dtype:
    found = dtype(node)
    if found is None:
        raise Refused(Reason.ROUNDING, node, kind=kind)
    return found
