"""One stage in a graph: term + act(factor) * norm(v). Factor and term may be absent.

Lines of the user's code, and the graph of each in bf16, where n is the norm that kinds/norm.py finds:

    y = residual + gate.tanh() * norm(x)       t = tanh(gate); p = mul(t, n); y = add(residual, p)
    y = residual + norm(x)                     y = add(residual, n)
    z = norm(x) * (1 + scale)                  s = add(scale, 1); z = mul(n, s)
    z = norm(x)                                z = n

Operands may be on either side. Views that keep the rows, and casts, may be in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.fx import Node

from dit_kernels.rounding import StageSteps, stage_steps
from fusion_pass.dataflow import (
    aten,
    comes_from,
    dtype,
    have_same_shape,
    is_call,
    is_narrowing,
    is_plain_add,
    is_read_from_memory,
    is_stored,
    is_widening,
    keeps_rows,
    other_operands,
    past_views,
    sole_user,
    stored_casts,
)
from fusion_pass.kinds import factor as factors
from fusion_pass.kinds import quantiser
from fusion_pass.kinds.norm import Norm
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Operand, operand_dtype

ADDED, SCALED = "norm_tanh_mul_add", "norm_scale"  # the kinds that a refusal names: with a term, and without
ADDCMUL = "addcmul rounds once, after the product and the sum"


@dataclass(frozen=True)
class StageInGraph:
    """The parts of out = term + act(factor) * norm.

    out: nodes of one value: the result, or the equal casts of the result. like: the norm, in the shape in which it is
    multiplied by the factor; without a factor, in the shape in which it is added to the term.
    """

    norm: Norm
    like: Node
    factor: Operand | None
    term: Node | None
    out: tuple[Node, ...]
    steps: StageSteps
    interior: tuple[Node, ...]

    def norm_dtypes(self, form: str) -> list[torch.dtype | None]:
        """The dtypes to which the norm may be cast so that the steps of this form are the steps of the graph."""
        candidates = (None, self.steps.norm.normed, self.steps.norm.out, self.steps.product)
        return [norm_dtype for norm_dtype in dict.fromkeys(candidates) if self._fits(form, norm_dtype)]

    def _fits(self, form: str, norm_dtype: torch.dtype | None) -> bool:
        x = operand_dtype(self.norm.x)
        assert x is not None
        steps = stage_steps(
            form,
            self.norm.kind,
            x,
            operand_dtype(self.norm.weight),
            operand_dtype(self.norm.bias),
            None if self.factor is None else factors.promoting_dtype(self.factor),
            operand_dtype(self.term),
            self.steps.out,
            norm_dtype,
            self.norm.steps.root,
        )
        if self.factor is None and self.term is None:
            return _roundings(self.steps) == _roundings(steps)
        return self.steps == steps


def _roundings(steps: StageSteps) -> tuple[Any, ...]:
    """The sequence of dtypes of a bare norm. The last cast may belong to the norm or to the stage: the result is the
    same."""
    norm = steps.norm
    chain = (norm.stat, norm.normed, norm.weighted, norm.biased, norm.out, steps.product, steps.out)
    return (norm.root, *chain[:3], *(dtype for dtype, _ in groupby(chain[3:])))


def grow(norm: Norm, quantises: bool = False) -> StageInGraph | None:
    """The stage of a norm with a term or a factor or both; None if there is no such stage. Raises Refused.

    quantises: the stage with a factor whose result a quantiser reads. Nothing needs to read it from memory.
    """
    shapes = past_views(norm.out)
    reader = sole_user(shapes[-1])
    if reader is None:
        return None
    if is_call(reader, aten.addcmul.default) and have_same_shape(shapes[-1], reader.args[0]):
        raise Refused(Reason.ROUNDING, reader, ADDCMUL, ADDED)
    if is_plain_add(reader):
        return None if quantises else _with_term(norm, shapes, reader)
    return _with_factor(norm, shapes, reader, quantises) if is_call(reader, aten.mul.Tensor) else None


def bare(norm: Norm, quantises: bool = False) -> StageInGraph | None:
    """The norm itself as a stage; None if no node reads it from memory, or with `quantises`, if no quantiser reads it.

    If only the same kernel of Inductor reads the norm, an op would add a write and a read of each row. The same holds
    if the norm is only joined with other tensors: the kernel of Inductor writes into the joined tensor.
    """
    out = stored_casts(norm.out, is_narrowing)
    if not (quantiser.follow(out) if quantises else any(map(is_read_from_memory, out))):
        return None
    inside = tuple(node for node in norm.interior if node not in out)
    steps = _steps(norm, norm.steps.out, norm.out, out[0], False)
    return StageInGraph(norm, norm.out, None, None, out, steps, inside)


def _with_term(norm: Norm, shapes: tuple[Node, ...], y: Node) -> StageInGraph | None:
    term = _term(shapes[-1], y)
    if term is None:
        return None
    steps = _steps(norm, norm.steps.out, norm.out, y, True)
    return StageInGraph(norm, shapes[-1], None, term, (y,), steps, (*norm.interior, *shapes))


def _with_factor(norm: Norm, shapes: tuple[Node, ...], product: Node, quantises: bool) -> StageInGraph | None:
    like = shapes[-1]
    factor = next(other_operands(product, like))
    if not isinstance(factor, Node) or factor is like:
        return None
    products, rounded = _rounded(product)
    y = sole_user(products[-1])
    term = _term(products[-1], y) if y is not None and is_plain_add(y) else None
    if y is None or term is None or factors.is_one_plus(factor):  # 1 + s is a scale, and the addend a shift
        return _scaled(norm, shapes, product, factor, quantises)
    if quantises:
        return None
    if comes_from(y, "addcmul"):  # torch 2.11 decomposes addcmul before any pass sees it
        raise Refused(Reason.ROUNDING, y, ADDCMUL, ADDED)
    operand = factors.resolve(factor, like, "tanh")
    steps = _steps(norm, factors.applied_dtype(operand, norm.steps.out, ADDED), rounded, y, True)
    interior = (*norm.interior, *shapes, *products, *operand.absorbed)
    return StageInGraph(norm, like, operand, term, (y,), steps, interior)


def _scaled(norm: Norm, shapes: tuple[Node, ...], product: Node, factor: Node, quantises: bool) -> StageInGraph | None:
    """The stage of a product with a factor, to which nothing is added. Raises Refused if no node reads the product from
    memory. With `quantises`, a quantiser must read it instead."""
    like = shapes[-1]
    if not have_same_shape(like, product):
        return None
    z = stored_casts(product, is_narrowing)
    if quantises and not quantiser.follow(z):
        return None
    if not quantises and not any(map(is_stored, z)):
        raise Refused(Reason.FOLLOWED, next(iter(past_views(z[0])[-1].users), product), kind=SCALED)
    if factors.resolve(factor, like, "tanh").activation is not None:
        return None  # a gate without a residual add
    if not quantises and not any(map(is_read_from_memory, z)):
        raise Refused(Reason.INLINE, z[0], kind=SCALED)
    operand = factors.resolve(factor, like, "one_plus")
    steps = _steps(norm, factors.applied_dtype(operand, norm.steps.out, SCALED), product, z[0], False)
    inside = (*norm.interior, *shapes) if z == (product,) else (*norm.interior, *shapes, product)
    return StageInGraph(norm, like, operand, None, z, steps, (*inside, *operand.absorbed))


def _rounded(product: Node) -> tuple[tuple[Node, ...], Node]:
    """The product, with the casts and views between it and the sum; and the one of them that has the rounded value.

    A cast up that the sum would make itself does not round. A cast down after such a cast up is not followed.
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


def _term(added: Node, y: Node) -> Node | None:
    """The other operand of a sum, if it has the shape of `added`. A narrower operand is a bias or a shift."""
    term = next(other_operands(y, added), None)
    return term if term is not added and have_same_shape(added, term) else None


def _steps(norm: Norm, factor: torch.dtype, product: Node, out: Node, has_term: bool) -> StageSteps:
    """factor: the dtype that the factor is rounded to. product: the product as it is added or stored."""
    product_dtype, out_dtype = dtype(product), dtype(out)
    if product_dtype is None or out_dtype is None:
        raise Refused(Reason.ROUNDING, out, kind=ADDED if has_term else SCALED)
    return StageSteps(norm.steps, factor, product_dtype, out_dtype if has_term else product_dtype, out_dtype)
