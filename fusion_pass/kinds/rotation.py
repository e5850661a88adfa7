"""The rotation of pairs (RoPE), as a value: what is rotated and by what, the dtype of its products, and its nodes.

    complex:  out = cast?(view_as_real(view_as_complex(pairs of x) * rotation))
    real:     out = cast?(x * cos + turned(x) * sin)         turned: every pair (a, b) becomes (-b, a)
              out = every pair (a, b) becomes (a * cos - b * sin, a * sin + b * cos), with one cos and sin for a pair
    matrices: out = cast?(m[..., 0] * a + m[..., 1] * b)              m: a 2×2 matrix for each pair (a, b)

In the third form, the two elements of all pairs are joined, or written into slices of a new tensor. Or a tensor of the
products with cos is completed in place, by addcmul_, which does not round the products with sin. In the last form, the
sum may also be that of addcmul_, or torch.sum.

A pair is two neighbours, or two elements with the same index in the two halves of the last dimension. Complex numbers
are neighbours. All of this is read from the dataflow, in any order of operands. Halves and neighbours are taken by
slices, split, unbind or select, with casts up before or after them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import (
    PARTS,
    TO_SHAPE,
    VIEWS,
    addcmul,
    aten,
    before_widening,
    computed_alike,
    dtype,
    have_same_shape,
    is_call,
    is_cast,
    is_narrowing,
    is_plain_add,
    is_swap,
    is_widening,
    keeps_rows,
    other_operands,
    same_sizes,
    sole_user,
    stored_casts,
    value,
)
from fusion_pass.kinds.kind import Survey, Value
from fusion_pass.refusal import Reason

SCATTER = aten.slice_scatter.default
_OF_MATRICES = (aten.add.Tensor, aten.addcmul.default, aten.sum.dim_IntList)
ANCHORS = (aten.view_as_complex.default, aten.cat.default, SCATTER, *_OF_MATRICES)
ROTATED_NORMS = "norm_rope"  # the name of the notes that map a rotated tensor to the anchor of its norm

_EMPTY = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Rotation:
    """out = x, with the pairs of its last dimension rotated.

    by: the complex rotation, the cosines if `sin` is given, or the `matrices`, [..., Dh / 2, 2, 2]. halved: is there
    one number for each pair? is_complex: did the model multiply complex numbers? torch's complex wrapper traces these
    as cosines and sines. outs: nodes of one value: the sum, or the equal casts of it. swapped_after: do these casts
    read the sum with heads and tokens swapped? product: the real dtype of the products and of their sum; None if these
    dtypes differ, or if the op rounds differently.
    """

    anchor: Node
    x: Node
    by: Node
    sin: Node | None
    interleaved: bool
    halved: bool
    is_complex: bool
    product: torch.dtype | None
    outs: tuple[Node, ...]
    swapped_after: bool
    interior: tuple[Node, ...]  # every node after x and before `outs`
    addcmul: bool = False  # is the sum of the two products torch.addcmul?
    matrices: bool = False

    @property
    def out(self) -> Node:
        return self.outs[0]


class RotationValue(Value[Rotation]):
    """A rotation of pairs: a part of the site of the norm that it rotates or, without a norm, a row of the report."""

    name = "rope"
    anchors = ANCHORS
    is_modulated = False
    unfused = Reason.UNNORMED

    def find(self, anchor: Node) -> Rotation | None:
        """The rotation whose complex numbers, turned pairs or sum of products `anchor` makes; None if there is none.

        The user's code, then its graph in bf16:

            torch.view_as_real(torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * freqs).flatten(3)

            convert(x, f32); reshape(., [B, S, H, Dh / 2, 2]); view_as_complex; mul(., freqs); view_as_real; reshape

            a, b = x.chunk(2, -1); x * cos + torch.cat((-b, a), -1) * sin

            a, b = split(x, Dh / 2, -1); t = cat([neg(b), a], -1); add(mul(x, cos), mul(t, sin))

            out = torch.empty_like(x); out[..., 0::2] = a * cos - b * sin; out[..., 1::2] = a * sin + b * cos

            s = slice_scatter(empty, copy(slice(empty), sub(mul(a, cos), mul(b, sin))), 3, 0, end, 2);
            slice_scatter(s, copy(slice(s), add(mul(a, sin), mul(b, cos))), 3, 1, end, 2)

            pairs = x.unflatten(-1, (2, -1)).float(); out = pairs * cos[..., None, :]
            out[..., :1, :].addcmul_(-sin[..., None, :], pairs[..., 1:, :])
            out[..., 1:, :].addcmul_(sin[..., None, :], pairs[..., :1, :])

            out = mul(pairs, unsqueeze(cos, -2)); b = slice(pairs, 3, 1, end); a = slice(pairs, 3, 0, 1)
            s = slice_scatter(out, addcmul(slice(out, 3, 0, 1), neg(unsqueeze(sin, -2)), b), 3, 0, 1)
            slice_scatter(s, addcmul(slice(s, 3, 1, end), unsqueeze(sin, -2), a), 3, 1, end)

            pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
            (m[..., 0] * pairs[..., 0] + m[..., 1] * pairs[..., 1]).reshape(*x.shape).type_as(x)

            p = reshape(convert(x, f32), [B, S, H, Dh / 2, 1, 2]); a, b = select(p, 5, 0), select(p, 5, 1);
            reshape(add(mul(select(m, 5, 0), a), mul(select(m, 5, 1), b)), [B, S, H, Dh])
        """
        if is_call(anchor, aten.view_as_complex.default):
            return _complex(anchor)
        if is_call(anchor, *_OF_MATRICES):
            return _by_matrices(anchor)
        return _pairwise(anchor) or _completed(anchor) if is_call(anchor, SCATTER) else _real(anchor)

    def is_reported_elsewhere(self, found: Rotation, survey: Survey) -> bool:
        """A rotation of a norm is reported with the norm."""
        return found.x in survey.notes(ROTATED_NORMS)


ROTATION = RotationValue()


def of(x: Node) -> Rotation | None:
    """The rotation that reads x, a copy or a view of it, or x with heads and tokens swapped; None if there is none."""
    for rotation in map(ROTATION.find, _anchors_after(x)):
        if rotation is not None and between(x, rotation.x) is not None:
            return rotation
    return None


def of_a_part(x: Node) -> tuple[str, Rotation] | None:
    """What is rotated of x if a part of x is, in words, and the rotation; None if there is none."""
    for rotation in filter(None, map(ROTATION.find, _anchors_after(x))):
        node, of_rows = rotation.x, []
        while node is not x and is_call(node, *VIEWS, aten.clone.default, aten.slice.Tensor, operator.getitem):
            node = node.args[0] if is_call(node, operator.getitem) else node
            dim = (*node.args, 0, 0)[1 if is_call(node, aten.slice.Tensor) else 2]
            val = value(node.args[0])
            if is_call(node, aten.slice.Tensor, *_SPLITS) and val is not None:
                of_rows.append(dim not in (-1, val.ndim - 1))
            node = node.args[0]
        if node is x and of_rows:
            what = "some tokens or heads are" if any(of_rows) else "a part of each head is"
            return f"only {what} rotated", rotation
    return None


def between(x: Node, rotated: Node) -> tuple[Node, ...] | None:
    """The nodes from x to the rotated tensor, the last one first: views of x, then copies and swaps of heads and
    tokens. None if the rotated tensor is not made of x in this way."""
    nodes: list[Node] = []
    while rotated is not x and (is_swap(rotated) or is_call(rotated, aten.clone.default)):
        nodes.append(rotated)
        rotated = rotated.args[0]
    while rotated is not x and keeps_rows(rotated):
        nodes.append(rotated)
        rotated = rotated.args[0]
    return tuple(nodes) if rotated is x else None


def _anchors_after(x: Node) -> Iterator[Node]:
    """The anchors that read x, directly or through parts of x, casts, and the product and the sum of halves that are
    rotated separately."""
    complex_views = (aten.view_as_complex.default, aten.view_as_real.default)
    parts = (*VIEWS, *PARTS, *complex_views, aten.neg.default, aten.clone.default, aten.copy.default)
    arithmetic = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.addcmul.default)
    seen: set[Node] = set()
    pending = [(user, 2) for user in x.users]
    while pending:
        node, operations = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if is_call(node, *ANCHORS):
            yield node
        if is_cast(node) or is_call(node, *parts):
            pending += [(user, operations) for user in node.users]
        elif operations and is_call(node, *arithmetic):
            pending += [(user, operations - 1) for user in node.users]


# --- with complex numbers ---------------------------------------------------------------------------------------------


def _complex(anchor: Node) -> Rotation | None:
    nodes: list[Node] = [anchor]
    pairs = _narrowest(anchor.args[0], nodes)
    product = sole_user(anchor)
    if not is_call(pairs, *TO_SHAPE) or product is None or not is_call(product, aten.mul.Tensor):
        return None
    nodes += [pairs, product]
    x = _narrowest(pairs.args[0], nodes)
    by = next(other_operands(product, anchor))
    real = sole_user(product)
    if not isinstance(by, Node) or not _is_complex(by) or real is None or not is_call(real, aten.view_as_real.default):
        return None
    flat = sole_user(real)
    if flat is None or not is_call(flat, *TO_SHAPE) or not have_same_shape(flat, x) or not _are_pairs(pairs, x, -1):
        return None
    out, swapped_after, inside = _results(flat, [*nodes, real])
    # PyTorch's complex product contracts one of its two products into the sum. If x is on the right instead of the
    # left, this is the other product.
    rounded = dtype(real) if product.args[0] is anchor else None
    return Rotation(anchor, x, by, None, True, True, True, rounded, out, swapped_after, inside)


def _is_complex(node: Node) -> bool:
    val = value(node)
    return val is not None and val.is_complex()


# --- with cosines and sines -------------------------------------------------------------------------------------------


def _real(anchor: Node) -> Rotation | None:
    turn = _quarter_turn(anchor)
    if turn is None:
        return _pairwise(anchor)
    for product in _past_casts(turn.out, turn.nodes):
        total = sole_user(product) if is_call(product, aten.mul.Tensor) else None
        if total is None or not is_plain_add(total):
            continue
        found = _sum(anchor, turn, product, total)
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class _Turn:
    """out = every pair (a, b) of x as (-b, a)."""

    x: Node
    interleaved: bool
    out: Node
    nodes: list[Node]


def _sum(anchor: Node, turn: _Turn, product: Node, total: Node) -> Rotation | None:
    """The rotation x * cos + turned * sin, where `product` is turned * sin."""
    turned = next(arg for arg in product.args if before_widening(arg) is turn.out)
    nodes = [*turn.nodes, product]
    straight = next(other_operands(total, product))
    sin = next(other_operands(product, turned))
    if not is_call(straight, aten.mul.Tensor) or straight is product or len(straight.users) != 1:
        return None
    x, cos = straight.args[:2] if before_widening(straight.args[0]) is turn.x else straight.args[1::-1]
    if _narrowest(x, nodes) is not turn.x or not have_same_shape(total, turn.x):
        return None
    if not isinstance(cos, Node) or not isinstance(sin, Node):
        return None
    cos, sin = before_widening(cos), before_widening(sin)
    dtypes = {dtype(node) for node in (product, straight, total)}
    out, swapped_after, inside = _results(total, [*nodes, straight])
    product_dtype = dtypes.pop() if len(dtypes) == 1 else None
    return Rotation(anchor, turn.x, cos, sin, turn.interleaved, False, False, product_dtype, out, swapped_after, inside)


def _pairwise(anchor: Node) -> Rotation | None:
    """The rotation that computes the two elements of each pair separately, from halves, and joins them by a `cat` or
    writes them into slices."""
    nodes: list[Node] = []
    joined = _written(anchor, nodes) if is_call(anchor, SCATTER) else _joined(anchor, nodes)
    if joined is None:
        return None
    left, right, interleaved, flat = joined
    difference, total = (_sum_of(part, nodes) for part in (left, right))
    if difference is None or total is None or not is_call(difference, aten.sub.Tensor) or not is_plain_add(total):
        return None
    products = (*difference.args[:2], *total.args[:2])
    terms = [_term(product, nodes) for product in products]
    if None in terms:
        return None
    tables = [term[1] for term in terms if term is not None]
    (a, cos), (b, sin), *others = (term for term in terms if term is not None)
    (c, sin2), (d, cos2) = sorted(others, key=lambda term: term[0][2])
    expected = [(a[0], interleaved, index) for index in (0, 1, 0, 1)]
    x = _narrowest(a[0], nodes)
    if [a, b, c, d] != expected or not have_same_shape(flat, x) or len(difference.args) != 2 or difference.kwargs:
        return None
    if not computed_alike(cos, cos2) or not computed_alike(sin, sin2):
        return None
    cos, sin = before_widening(cos), before_widening(sin)
    dtypes = {dtype(node) for node in (difference, total, *difference.args, *total.args)}
    rounded = is_narrowing(left) or is_narrowing(right)
    stored = {dtype(left), dtype(right), dtype(flat)}
    if rounded and len(stored) > 1:
        dtypes |= stored  # rounded to several dtypes: no form does it
    # If the parts are cast before they are joined, or by a copy into slices, the result is not rounded again.
    casts = not rounded and dtype(flat) == dtype(total)
    out, swapped_after, inside = _results(flat, [*nodes, difference, total], casts)
    product_dtype = dtypes.pop() if len(dtypes) == 1 else None
    is_complex = any(is_call(node, aten.view_as_complex.default) for node in nodes)
    if is_complex and not all(product.args[1] in tables for product in products):
        product_dtype = None  # PyTorch contracts the other one of two products, see _complex
    return Rotation(anchor, x, cos, sin, interleaved, True, is_complex, product_dtype, out, swapped_after, inside)


def _completed(second: Node) -> Rotation | None:
    """The rotation of halves whose products with the cosines are completed by addcmul_, the later half by `second`."""
    first = second.args[0]
    product: Any = first.args[0] if is_call(first, SCATTER) else None
    if not is_call(product, aten.mul.Tensor):
        return None
    for pairs, cos in (product.args[:2], product.args[1::-1]):
        nodes: list[Node] = [product, first, second]
        found = [_completing(scatter, product, pairs, nodes) for scatter in (first, second)]
        split, cos = _narrowest(pairs, nodes), _below_pairs(cos)
        sines = {half[0]: half[1] for half in found if half is not None}
        if cos is None or sines.keys() != {0, 1} or not is_call(split, *TO_SHAPE):
            continue
        nodes.append(split)
        x, minus_sin, sin = _narrowest(split.args[0], nodes), sines[0], sines[1]
        minus_sin = minus_sin.args[0] if is_call(minus_sin, aten.neg.default) else None
        minus_sin, sin = (_below_pairs(table) for table in (minus_sin, sin))
        results = _flattened(second, x, nodes)
        if sin is None or not computed_alike(minus_sin, sin) or results is None:
            continue
        if not _are_pairs(split, x, -2) or not all(have_same_shape(part, second) for part in (first, product)):
            continue
        of_dtype = dtype(product) if {dtype(node) for node in nodes[1:3]} == {dtype(product)} else None
        cos, sin = before_widening(cos), before_widening(sin)
        return Rotation(second, x, cos, sin, False, True, False, of_dtype, *results, addcmul=True)
    return None


def _completing(scatter: Node, product: Node, pairs: Any, nodes: list[Node]) -> tuple[int, Node] | None:
    """(0 or 1, the table) if a scatter writes product + table * other half of the pairs into a half of a product."""
    into, added, *slicing = scatter.args
    index, completed = _of_two(into, slicing), addcmul(added)
    if index is None or completed is None or dtype(added) != dtype(into):
        return None
    half, factors, inside = completed
    # The half that the other scatter writes is not this one.
    if not _is_half(half, (into, product), index):
        return None
    for table, other in (factors, factors[::-1]):
        if _is_half(other, (pairs,), 1 - index) and isinstance(table, Node) and have_same_shape(added, half):
            nodes += [added, *inside, half, other]
            return index, table
    return None


def _is_half(node: Any, of: tuple[Any, ...], index: int) -> bool:
    """Is a node the first or second of the two rows of pairs of one of these tensors?"""
    return is_call(node, aten.slice.Tensor) and node.args[0] in of and _of_two(node.args[0], node.args[1:]) == index


def _of_two(of: Node, slicing: Sequence[Any]) -> int | None:
    """0 or 1 if a slice takes this one of two rows of pairs, [..., 2, Dh / 2]."""
    given: tuple[Any, ...] = (*slicing, *(0, None, None, 1)[len(slicing) :])
    dim, start, end, step = given
    val = value(of)
    if val is None or val.ndim < 3 or dim not in (-2, val.ndim - 2) or not known_equal(val.shape[-2], 2):
        return None
    taken = [*range(2)[start:end:step]] if all(n is None or isinstance(n, int) for n in (start, end, step)) else []
    return taken[0] if len(taken) == 1 else None


def _below_pairs(table: Any) -> Node | None:
    """The table before an unsqueeze that gives both rows of pairs the same numbers."""
    val = value(table) if is_call(table, aten.unsqueeze.default) else None
    return table.args[0] if val is not None and table.args[1] in (-2, val.ndim - 2) else None


_Results = tuple[tuple[Node, ...], bool, tuple[Node, ...]]


def _flattened(total: Node, x: Node, nodes: list[Node]) -> _Results | None:
    """The same as _results, for pairs that are put together by a reshape to the shape of x; None if they are not."""
    copy = sole_user(total)
    if copy is not None and is_call(copy, aten.clone.default):
        nodes.append(total := copy)
    flats = tuple(total.users)  # without a cast, each reader may have its own view
    if not flats or not all(is_call(flat, *TO_SHAPE) and have_same_shape(flat, x) for flat in flats):
        return None
    return _results(flats[0], nodes) if len(flats) == 1 else (flats, False, tuple(dict.fromkeys(nodes)))


def _results(total: Node, nodes: list[Node], casts: bool = True) -> _Results:
    """The result of a rotation; whether it is after a swap; and the nodes before it, with `nodes` first.

    The result is `total`, or the casts that read `total`, directly or with heads and tokens swapped.
    """
    swap = sole_user(total)
    past = (total, swap) if swap is not None and is_swap(swap) else (total,)
    stored = ((stored_casts(node), node) for node in past if casts)
    out, swapped_after = next(((out, of is not total) for out, of in stored if out != (of,)), ((total,), False))
    inside = (node for node in dict.fromkeys((*nodes, *past)) if all(node < result for result in out))
    return out, swapped_after, tuple(inside)


def _sum_of(part: Node, nodes: list[Node]) -> Node | None:
    """The sum that is joined, or whose cast is joined."""
    nodes.append(part)
    return part.args[0] if is_narrowing(part) else part


def _term(product: Any, nodes: list[Node]) -> tuple[tuple[Node, bool, int], Node] | None:
    """The half that a product reads, as `_half` describes it, and the table that multiplies this half."""
    for half, table in (product.args[:2], product.args[1::-1]) if is_call(product, aten.mul.Tensor) else ():
        tried: list[Node] = [product]
        found = _half(_narrowest(half, tried), tried)
        if found is not None and isinstance(table, Node):
            nodes += tried
            return found, table
    return None


def _quarter_turn(cat: Node) -> _Turn | None:
    """The turn that `cat` makes: (-second half, first half), or (-odd, even) as a new last dimension."""
    nodes: list[Node] = []
    joined = _joined(cat, nodes)
    if joined is None:
        return None
    left, right, interleaved, out = joined
    if not is_call(left, aten.neg.default):
        return None
    nodes.append(left)
    second, first = _half(left.args[0], nodes), _half(right, nodes)
    if second is None or first is None or second != (first[0], interleaved, 1) or first[1:] != (interleaved, 0):
        return None
    x = _narrowest(first[0], nodes)
    return _Turn(x, interleaved, out, nodes) if have_same_shape(out, x) else None


def _joined(cat: Node, nodes: list[Node]) -> tuple[Node, Node, bool, Node] | None:
    """(a, b, interleaved?, the joined tensor) if `cat` joins the halves a and b of a last dimension, or interleaves a
    and b by a new last dimension and a reshape; else None."""
    val = value(cat)
    parts = cat.args[0]
    dim = cat.args[1] if len(cat.args) > 1 else 0
    if val is None or not isinstance(parts, list | tuple) or len(parts) != 2 or dim not in (-1, val.ndim - 1):
        return None
    nodes.append(cat)
    left, right = (_below_unsqueeze(part, nodes) for part in parts)
    interleaved = left is not parts[0]
    whole = sole_user(cat) if interleaved else cat
    if interleaved != (right is not parts[1]) or whole is None or not (whole is cat or is_call(whole, *TO_SHAPE)):
        return None
    nodes.append(whole)
    return left, right, interleaved, whole


def _written(second: Node, nodes: list[Node]) -> tuple[Node, Node, bool, Node] | None:
    """The same for halves that are written into slices of one tensor, the later one by `second`."""
    first = second.args[0]
    if not is_call(first, SCATTER):
        return None
    tried: list[Node] = [first, second]
    halves = {scatter: _half_written(scatter, tried) for scatter in tried[:2]}
    found = {half[1:]: half[0] for half in halves.values() if half is not None}
    for interleaved in (False, True):
        if found.keys() == {(interleaved, 0), (interleaved, 1)}:
            base = first.args[0]
            nodes += tried if not is_call(base, *_EMPTY) else (*tried, base)
            return found[interleaved, 0], found[interleaved, 1], interleaved, second
    return None


def _half_written(scatter: Node, nodes: list[Node]) -> tuple[Node, bool, int] | None:
    """(what is written, interleaved?, 0 or 1) if a scatter writes the first or second half of a last dimension, or the
    first or second of all neighbours."""
    into, written, *slicing = scatter.args
    half = _taken(value(into), *slicing)
    if is_call(written, aten.copy.default):  # a copy casts
        nodes += [node for node in (written, written.args[0]) if is_call(node, aten.copy.default, aten.slice.Tensor)]
        if not have_same_shape(written, written.args[1]):
            return None
        written = written.args[1]
    return None if half is None or not isinstance(written, Node) else (written, *half)


def _below_unsqueeze(node: Any, nodes: list[Node]) -> Any:
    """The node before an unsqueeze(-1); the node itself if it is not an unsqueeze(-1)."""
    val = value(node) if is_call(node, aten.unsqueeze.default) else None
    if val is None or node.args[1] not in (-1, val.ndim - 1):
        return node
    nodes.append(node)
    return node.args[0]


def _half(node: Any, nodes: list[Node]) -> tuple[Node, bool, int] | None:
    """(the whole tensor, interleaved?, 0 or 1) if the node is the first or second half of a last dimension, or the
    first or second element of each pair of neighbours; else None."""
    while is_call(node, aten.clone.default):
        nodes.append(node)
        node = node.args[0]
    if is_call(node, aten.slice.Tensor):
        found = _slice(node)
    elif is_call(node, aten.select.int):
        found = _of_pairs(node.args[0], node.args[1], node.args[2], nodes)
    elif is_call(node, operator.getitem) and is_call(node.args[0], aten.unbind.int):
        unbind = node.args[0]
        nodes.append(unbind)
        found = _of_pairs(unbind.args[0], unbind.args[1] if len(unbind.args) > 1 else 0, node.args[1], nodes)
    elif is_call(node, operator.getitem) and is_call(node.args[0], *_SPLITS):
        nodes.append(node.args[0])
        found = _of_split(node.args[0], node.args[1])
    else:
        return None
    nodes.append(node)
    return found


def _slice(node: Node) -> tuple[Node, bool, int] | None:
    half = _taken(value(node.args[0]), *node.args[1:])
    return None if half is None else (node.args[0], *half)


def _taken(
    val: torch.Tensor | None, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> tuple[bool, int] | None:
    """(interleaved?, 0 or 1) if a slice takes a half of the last dimension, or every second element of it."""
    if val is None or dim not in (-1, val.ndim - 1) or not isinstance(val.shape[-1], int) or val.shape[-1] % 2:
        return None
    width = val.shape[-1]
    if not all(isinstance(n, int) or n is None for n in (start, end, step)):
        return None
    taken = range(width)[start:end:step]
    halves = (range(width // 2), range(width // 2, width))
    neighbours = (range(0, width, 2), range(1, width, 2))
    for interleaved, both in ((False, halves), (True, neighbours)):
        if taken in both:
            return interleaved, both.index(taken)
    return None


def _of_pairs(pairs: Any, dim: Any, index: Any, nodes: list[Node]) -> tuple[Node, bool, int] | None:
    """A column or row of a last dimension that a reshape has split into [half, 2] or [2, half].

    torch's complex wrapper views the pairs as complex numbers and back.
    """
    if is_call(pairs, aten.view_as_real.default) and is_call(pairs.args[0], aten.view_as_complex.default):
        nodes += [pairs, pairs.args[0]]
        pairs = _narrowest(pairs.args[0].args[0], nodes)
    val = value(pairs) if is_call(pairs, *TO_SHAPE) else None
    if val is None or not isinstance(dim, int):
        return None
    dim = dim - val.ndim if dim >= 0 else dim
    if dim not in (-1, -2) or not _are_pairs(pairs, pairs.args[0], dim):
        return None
    nodes.append(pairs)
    return pairs.args[0], dim == -1, index


def _of_split(split: Node, index: Any) -> tuple[Node, bool, int] | None:
    of, sizes, dim = (*split.args, 0)[:3]
    val = value(of)
    if val is None or dim not in (-1, val.ndim - 1):
        return None
    width = val.shape[-1]
    if not isinstance(width, int):
        return None
    sizes = [sizes, width - sizes] if isinstance(sizes, int) else sizes
    return (of, False, index) if isinstance(sizes, list | tuple) and [*sizes] == [width / 2] * 2 else None


# --- with 2×2 matrices ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """matrices * pairs, or one column of both. pairs: [..., 1, 2]. column: None for both columns."""

    matrices: Node
    pairs: Node
    column: int | None = None


def _by_matrices(total: Node) -> Rotation | None:
    """The rotation whose products with both columns of matrices are added by `total`."""
    nodes: list[Node] = [total]
    found = _summed(total, nodes) if is_call(total, aten.sum.dim_IntList) else _columns_added(total, nodes)
    if found is None:
        return None
    dtypes = {dtype(node) for node in nodes if not is_call(node, *PARTS)}
    pairs = _narrowest(found.pairs, nodes)
    x = _narrowest(pairs.args[0], nodes) if is_call(pairs, *TO_SHAPE) else None
    nodes.append(pairs)
    results = None if x is None or not _are_rows_of_pairs(pairs, x, total) else _flattened(total, x, nodes)
    if x is None or results is None:
        return None
    added_by_addcmul = addcmul(total) is not None
    # torch.addcmul rounds one of the two products: the op rounds that with the first column.
    product = None if len(dtypes) > 1 or (added_by_addcmul and found.column == 1) else dtypes.pop()
    by = before_widening(found.matrices)
    return Rotation(total, x, by, None, True, False, False, product, *results, addcmul=added_by_addcmul, matrices=True)


def _summed(total: Node, nodes: list[Node]) -> _Product | None:
    """The product of matrices and pairs whose last dimension `total` adds up."""
    if len(total.args) != 2 or total.kwargs:
        return None
    product, dims = total.args
    val = value(product) if is_call(product, aten.mul.Tensor) else None
    if val is None or dims not in ([-1], [val.ndim - 1]):
        return None
    nodes.append(product)
    for matrices, pairs in (product.args[:2], product.args[1::-1]):
        if _ends_in(matrices, 2, 2) and _ends_in(pairs, 1, 2):
            return _Product(matrices, pairs)
    return None


def _columns_added(total: Node, nodes: list[Node]) -> _Product | None:
    """The first of the two products that `total` adds: those of the first and of the second columns, in any order."""
    completed = addcmul(total)
    if completed is not None:
        base, factors, inside = completed
        nodes += inside
        products = [_factors(base, nodes), factors]
    else:
        products = [_factors(arg, nodes) for arg in total.args[:2]] if is_plain_add(total) else []
    first, second = (_columns(factors, nodes) for factors in products or ((), ()))
    other = None if first is None else replace(first, column=1 - (first.column or 0))
    return first if second is not None and second == other else None


def _factors(product: Any, nodes: list[Node]) -> Sequence[Any]:
    if not is_call(product, aten.mul.Tensor):
        return ()
    nodes.append(product)
    return product.args[:2]


def _columns(factors: Sequence[Any], nodes: list[Node]) -> _Product | None:
    """One column of matrices and the same column of pairs, if they are the factors of a product."""
    for factor, other in (factors, factors[::-1]) if len(factors) == 2 else ():
        (matrices, column), (pairs, half) = _column(factor), _column(other)
        if column == half and _ends_in(matrices, 2, 2) and _ends_in(pairs, 1, 2):
            nodes += [other] if other.args[0] is pairs else [other, other.args[0]]  # a select, or part of an unbind
            return _Product(matrices, pairs, column)
    return None


def _column(node: Any) -> tuple[Any, int | None]:
    """(the tensor, 0 or 1) if a node is a column of the last dimension, of size 2, of a tensor; else (None, None)."""
    if is_call(node, aten.select.int):
        of, dim, index = node.args
    elif is_call(node, operator.getitem) and is_call(node.args[0], aten.unbind.int):
        (of, dim), index = (*node.args[0].args, 0)[:2], node.args[1]
    else:
        return None, None
    val = value(of)
    if val is None or dim not in (-1, val.ndim - 1) or not known_equal(val.shape[-1], 2):
        return None, None
    return of, index % 2


def _ends_in(node: Any, rows: int, columns: int) -> bool:
    """Are these the last two sizes of a tensor?"""
    val = value(node) if isinstance(node, Node) else None
    return val is not None and val.ndim > 2 and known_equal(val.shape[-2], rows) and known_equal(val.shape[-1], columns)


def _are_rows_of_pairs(pairs: Node, x: Any, total: Node) -> bool:
    """Is `pairs` x with its last dimension split into [Dh / 2, 1, 2], and `total` one of [Dh / 2, 2]?"""
    parted, whole, summed = value(pairs), value(x) if isinstance(x, Node) else None, value(total)
    if parted is None or whole is None or summed is None or parted.ndim != whole.ndim + 2:
        return False
    return same_sizes(parted.shape[:-3], whole.shape[:-1]) and same_sizes(summed.shape, (*parted.shape[:-2], 2))


# --- casts and shapes -------------------------------------------------------------------------------------------------


def _narrowest(node: Any, nodes: list[Node]) -> Any:
    """The node before a chain of casts up. Adds the casts to `nodes`."""
    while is_widening(node) or _is_to_fp64(node):
        nodes.append(node)
        node = node.args[0]
    return node


def _is_to_fp64(node: Any) -> bool:
    """A cast from fp32 to fp64: numbers stay as they are. The product with a complex128 rotation has such a cast."""
    return is_cast(node) and dtype(node) == torch.float64 and dtype(node.args[0]) == torch.float32


def _past_casts(node: Node, nodes: list[Node]) -> Iterator[Node]:
    """The readers of a node, directly or through casts up. Adds the casts to `nodes`."""
    for user in list(node.users):
        if is_widening(user):
            nodes.append(user)
            yield from _past_casts(user, nodes)
        else:
            yield user


def _are_pairs(pairs: Node, of: Any, dim: int) -> bool:
    """Is `pairs` the node `of` with its last dimension split in two, of which dimension `dim` has size 2?"""
    parted, whole = value(pairs), value(of) if isinstance(of, Node) else None
    if parted is None or whole is None or parted.ndim != whole.ndim + 1:
        return False
    if not known_equal(parted.shape[dim], 2):
        return False
    return all(known_equal(m, n) for m, n in zip(parted.shape[:-2], whole.shape[:-1], strict=True))
