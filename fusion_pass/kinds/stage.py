"""One stage in a graph: term + act(factor) * norm(v). Norm, factor and term may be absent.

Lines of the user's code, and the graph of each in bf16, where n is the norm that kinds/norm.py finds:

    y = residual + gate.tanh() * norm(x)       t = tanh(gate); p = mul(t, n); y = add(residual, p)
    y = residual + norm(x)                     y = add(residual, n)
    y = residual + gate * x                    p = mul(gate, x); y = add(residual, p)
    z = norm(x) * (1 + scale)                  s = add(scale, 1); z = mul(n, s)
    z = norm(x) * (1 + scale) + shift          s = add(scale, 1); m = mul(n, s); z = add(m, shift)
    z = norm(x)                                z = n

Operands may be on either side. Views that keep the rows, and casts, may be in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch.fx import Node

from dit_kernels.rounding import NormSteps, StageSteps, stage_steps
from fusion_pass.dataflow import (
    HALVES,
    aten,
    before_widening,
    broadcasts_to,
    comes_from,
    dtype,
    have_same_shape,
    is_call,
    is_cast,
    is_narrowing,
    is_plain_add,
    is_read_from_memory,
    is_stored,
    is_widening,
    keeps_rows,
    keeps_sums,
    other_operands,
    past_views,
    same_shape,
    sole_user,
    stored_casts,
    through_widening,
    value,
    whole_of_parts,
)
from fusion_pass.kinds import factor as factors
from fusion_pass.kinds import quantiser
from fusion_pass.kinds.norm import Norm
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Operand, operand_dtype

# The kinds that a refusal names: with a residual and a norm, with a residual alone, and without a residual.
ADDED, MUL_ADDED, SCALED = "norm_tanh_mul_add", "mul_add_norm_scale", "norm_scale"
ADDCMUL = "addcmul rounds once, after the product and the sum"


@dataclass(frozen=True)
class StageInGraph:
    """The parts of out = term + act(factor) * norm(x); without a norm, of out = term + act(factor) * x.

    out: nodes of one value: the result, or the equal casts of the result. like: the norm, in the shape in which it is
    multiplied by the factor; without a factor, in the shape in which it is added to the term. term: a node if it is a
    residual; an operand if it is a shift, which broadcasts.
    """

    x: Node
    norm: Norm | None
    like: Node
    factor: Operand | None
    term: Node | Operand | None
    out: tuple[Node, ...]
    steps: StageSteps
    interior: tuple[Node, ...]

    @property
    def has_residual(self) -> bool:
        return isinstance(self.term, Node)

    @property
    def rows(self) -> list[Node]:
        """The operands that are rows: x and a residual."""
        return [self.x, *([self.term] if isinstance(self.term, Node) else [])]

    @property
    def is_modulated(self) -> bool:
        """Does an operand broadcast to `like`?"""
        return self.factor is not None or isinstance(self.term, Operand)

    def norm_dtypes(self, form: str) -> list[torch.dtype | None]:
        """The dtypes to which the norm may be cast so that the steps of this form are the steps of the graph. Without a
        norm, [None] if they are."""
        norm = self.steps.norm
        candidates = (None,) if norm is None else (None, norm.normed, norm.out, self.steps.product)
        return [norm_dtype for norm_dtype in dict.fromkeys(candidates) if self._fits(form, norm_dtype)]

    def _fits(self, form: str, norm_dtype: torch.dtype | None) -> bool:
        x, norm = operand_dtype(self.x), self.norm
        assert x is not None
        steps = stage_steps(
            form,
            None if norm is None else norm.kind,
            x,
            None if norm is None else operand_dtype(norm.weight),
            None if norm is None else operand_dtype(norm.bias),
            None if self.factor is None else factors.promoting_dtype(self.factor),
            factors.promoting_dtype(self.term) if isinstance(self.term, Operand) else operand_dtype(self.term),
            self.steps.out,
            norm_dtype,
            "rsqrt" if norm is None else norm.steps.root,
        )
        if self.factor is None and self.term is None:
            return _roundings(self.steps) == _roundings(steps)
        return self.steps == steps


def _roundings(steps: StageSteps) -> tuple[Any, ...]:
    """The sequence of dtypes of a bare norm. The last cast may belong to the norm or to the stage: the result is the
    same."""
    norm = steps.norm
    assert norm is not None
    chain = (norm.stat, norm.normed, norm.weighted, norm.biased, norm.out, steps.product, steps.out)
    return (norm.root, *chain[:3], *(dtype for dtype, _ in groupby(chain[3:])))


def grow(norm: Norm, quantises: bool = False) -> StageInGraph | None:
    """The stage of a norm with a term or a factor or both; None if there is no such stage. Raises Refused.

    quantises: the stage without a residual whose result a quantiser reads. Nothing needs to read it from memory.
    """
    shapes = past_views(norm.out)
    reader = sole_user(shapes[-1])
    if reader is None:
        return None
    if is_call(reader, aten.addcmul.default) and have_same_shape(shapes[-1], reader.args[0]):
        raise Refused(Reason.ROUNDING, reader, ADDCMUL, ADDED)
    if is_plain_add(reader):
        with_residual = None if quantises else _with_residual(norm, shapes, reader)
        return with_residual or _with_shift(norm, shapes, quantises)
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
    steps = _steps(norm.steps, norm.steps.out, norm.out, norm.out, out[0], SCALED)
    return StageInGraph(norm.x, norm, norm.out, None, None, out, steps, inside)


def before(norm: Norm) -> StageInGraph | None:
    """The stage without a norm whose result y a norm reads; None if there is none. Raises Refused.

    Whatever computes x and the residual, and whatever else reads y, is no obstacle. Nor are slices of y that are joined
    again, as between two single blocks of FLUX.1.
    """
    read = norm.x
    # F.layer_norm reads a copy of rows whose elements lie apart, and sums it in the order in which the op sums y.
    while keeps_sums(read) or (norm.kind == "layer" and keeps_rows(read)):
        read = read.args[0]
    parted = whole_of_parts(read)
    if parted is None:
        return _added(read)
    y, slices = parted
    found = _added(y)
    if found is None:
        return None
    inside = tuple(part for part in slices if sole_user(part) is not None)
    return replace(found, out=(y, read), interior=(*found.interior, *inside))


def _added(y: Node) -> StageInGraph | None:
    """The stage without a norm whose result is y; None if there is none. Raises Refused."""
    total = y.args[0] if is_narrowing(y) else y
    if not is_plain_add(total) or comes_from(total, "addcmul") or (total is not y and sole_user(total) is not y):
        return None
    left, right = total.args[:2]
    if left is right or not have_same_shape(left, total) or not have_same_shape(right, total):
        return None
    for term, residual in ((right, left), (left, right)):
        gated = _gated(term, residual, total, y)
        if gated is not None:
            return gated
    x, residual = through_widening(right), through_widening(left)
    read = dtype(x)
    if read is None:
        return None
    inside = () if total is y else (total,)
    return StageInGraph(x, None, right, None, residual, (y,), _steps(None, read, x, total, y, MUL_ADDED), inside)


def _gated(term: Node, residual: Node, total: Node, y: Node) -> StageInGraph | None:
    """The stage whose sum with a residual is `total`, if the other term is a product with a gate."""
    product = term
    while keeps_rows(product) or is_cast(product):
        product = product.args[0]
    if not is_call(product, aten.mul.Tensor) or not all(isinstance(operand, Node) for operand in product.args):
        return None
    products, rounded = _rounded(product)
    if sole_user(products[-1]) is not total:
        return None
    rows = [operand for operand in product.args if have_same_shape(operand, product)]
    if not rows or product.args[0] is product.args[1]:
        return None
    # The product of two 16-bit numbers is exact in fp32, so it may be computed in 16 bits if it is rounded to 16 bits.
    given = before_widening if dtype(rounded) in HALVES else lambda node: node
    factored = ((row, factors.resolve(given(next(other_operands(product, row))), row, "tanh")) for row in rows)
    # Both operands may have a row for each token: the gate is the one with a tanh, or the one that was expanded.
    like, gate = min(factored, key=lambda pair: pair[1].activation is None and _has_every_row(pair[1], pair[0]))
    x, read = through_widening(like), dtype(through_widening(like))
    if read is None:
        return None
    steps = _steps(None, factors.applied_dtype(gate, read, MUL_ADDED), rounded, total, y, MUL_ADDED)
    interior = (*products, *gate.absorbed, *(() if total is y else (total,)))
    return StageInGraph(x, None, like, gate, through_widening(residual), (y,), steps, interior)


def _with_residual(norm: Norm, shapes: tuple[Node, ...], y: Node) -> StageInGraph | None:
    residual = _residual(shapes[-1], y)
    if residual is None:
        return None
    steps = _steps(norm.steps, norm.steps.out, norm.out, y, y, ADDED)
    return StageInGraph(norm.x, norm, shapes[-1], None, residual, (y,), steps, (*norm.interior, *shapes))


def _with_shift(norm: Norm, shapes: tuple[Node, ...], quantises: bool) -> StageInGraph | None:
    shifted = _shifted(shapes[-1], None)
    if shifted is None:
        return None
    total, shift = shifted
    z = stored_casts(total, is_narrowing)
    if not (quantiser.follow(z) if quantises else any(map(is_read_from_memory, z))):
        return None
    steps = _steps(norm.steps, norm.steps.out, norm.out, total, z[0], SCALED)
    inside = () if z == (total,) else (total,)
    return StageInGraph(norm.x, norm, shapes[-1], None, shift, z, steps, (*norm.interior, *shapes, *inside))


def _with_factor(norm: Norm, shapes: tuple[Node, ...], product: Node, quantises: bool) -> StageInGraph | None:
    like = shapes[-1]
    factor = next(other_operands(product, like))
    if not isinstance(factor, Node) or factor is like:
        return None
    products, rounded = _rounded(product)
    y = sole_user(products[-1])
    residual = _residual(products[-1], y) if y is not None and is_plain_add(y) else None
    if y is None or residual is None or factors.is_one_plus(factor):  # 1 + s is a scale, and the addend a shift
        return _scaled(norm, shapes, products, rounded, quantises)
    if quantises:
        return None
    if comes_from(y, "addcmul"):  # torch 2.11 decomposes addcmul before any pass sees it
        raise Refused(Reason.ROUNDING, y, ADDCMUL, ADDED)
    operand = factors.resolve(factor, like, "tanh")
    steps = _steps(norm.steps, factors.applied_dtype(operand, norm.steps.out, ADDED), rounded, y, y, ADDED)
    interior = (*norm.interior, *shapes, *products, *operand.absorbed)
    return StageInGraph(norm.x, norm, like, operand, residual, (y,), steps, interior)


def _scaled(
    norm: Norm, shapes: tuple[Node, ...], products: tuple[Node, ...], rounded: Node, quantises: bool
) -> StageInGraph | None:
    """The stage of a product with a factor, or of the sum of this product and a shift. Raises Refused if no node reads
    the result from memory. With `quantises`, a quantiser must read it instead."""
    like, product = shapes[-1], products[0]
    if not have_same_shape(like, product):
        return None
    factor = next(other_operands(product, like))
    shifted = _shifted(products[-1], factor) if have_same_shape(products[-1], like) else None
    if shifted is None:
        products, rounded = (product,), product
    total, shift = shifted or (product, None)
    z = stored_casts(total, is_narrowing)
    if quantises and not quantiser.follow(z):
        return None
    if not quantises and not any(map(is_stored, z)):
        raise Refused(Reason.FOLLOWED, next(iter(past_views(z[0])[-1].users), product), kind=SCALED)
    if factors.resolve(factor, like, "tanh").activation is not None:
        return None  # a gate without a residual add
    if not quantises and not any(map(is_read_from_memory, z)):
        raise Refused(Reason.INLINE, z[0], kind=SCALED)
    operand = factors.resolve(factor, like, "one_plus")
    steps = _steps(norm.steps, factors.applied_dtype(operand, norm.steps.out, SCALED), rounded, total, z[0], SCALED)
    inside = [node for node in (*norm.interior, *shapes, *products, total) if node not in z]
    return StageInGraph(norm.x, norm, like, operand, shift, z, steps, (*inside, *operand.absorbed))


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


def _residual(added: Node, y: Node) -> Node | None:
    """The other operand of a sum, if it has the shape of `added`. A narrower operand is a bias or a shift."""
    term = next(other_operands(y, added), None)
    return term if term is not added and have_same_shape(added, term) else None


def _shifted(rows: Node, factor: Node | None) -> tuple[Node, Operand] | None:
    """The sum of rows and a shift, and the shift; None if no shift is added.

    factor: what the rows were multiplied by. An operand with a row for each token is a shift only if the factor has one
    for each token, too; otherwise it is a residual.
    """
    total = sole_user(rows)
    addend = next(other_operands(total, rows), None) if total is not None and is_plain_add(total) else None
    if total is None or not isinstance(addend, Node) or addend is rows or not have_same_shape(rows, total):
        return None
    if comes_from(total, "addcmul") or not all(
        _broadcasts(node, rows) for node in (addend, factor) if node is not None
    ):
        return None
    shift = factors.resolve(addend, rows)
    scales_every_row = factor is not None and _has_every_row(factors.resolve(factor, rows), rows)
    return None if _has_every_row(shift, rows) and not scales_every_row else (total, shift)


def _broadcasts(node: Node, rows: Node) -> bool:
    val, like = value(node), value(rows)
    return val is not None and like is not None and broadcasts_to(val, like)


def _has_every_row(operand: Operand, rows: Node) -> bool:
    """Does an operand that broadcasts to rows have as many rows as they?"""
    val, like = operand.value(), value(rows)
    return val is not None and like is not None and same_shape(val, like)


def _steps(norm: NormSteps | None, factor: torch.dtype, product: Node, total: Node, out: Node, kind: str) -> StageSteps:
    """factor: the dtype that the factor is rounded to. product: the product as it is added or stored. total: its sum
    with the term, or the product. kind: of the site, for the report."""
    product_dtype, sum_dtype, out_dtype = dtype(product), dtype(total), dtype(out)
    if product_dtype is None or sum_dtype is None or out_dtype is None:
        raise Refused(Reason.ROUNDING, out, kind=kind)
    return StageSteps(norm, factor, product_dtype, sum_dtype, out_dtype)
