"""Quantisers of rows in a graph: z becomes q in FP8, and s, the scale of each row, which the matmul reads.

dit_kernels/rounding.py has the steps. The code of two users, and their graphs for a bf16 z:

    s = (z.abs().amax(-1, keepdim=True) / 448.0).float()                  # torchao
    q = (z.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

        a = amax(abs(z), [-1], True); s = convert(div(a, 448.0), f32)
        q = convert(clamp_max(clamp_min(div(convert(z, f32), s), -448.0), 448.0), float8_e4m3fn)

    s = (z.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-12)  # by hand
    q = (z * s.reciprocal()).to(torch.float8_e4m3fn)

        a = convert(amax(abs(z), [-1], True), f32); s = clamp_min(div(a, 448.0), 1e-12)
        q = convert(mul(z, reciprocal(s)), float8_e4m3fn)

With a static scale, which is a number, a parameter or another input of the graph with one element:

    q = torch.clamp(z / input_scale, -448.0, 448.0).to(torch.float8_e4m3fn)

        q = convert(clamp_max(clamp_min(div(z, input_scale), -448.0), 448.0), float8_e4m3fn)

    q = (z * (1.0 / input_scale).to(torch.bfloat16)).to(torch.float8_e4m3fn)

        f = convert(mul(reciprocal(input_scale), 1.0), bf16); q = convert(mul(z, f), float8_e4m3fn)

The pass follows views that keep the rows and casts up to fp32 between these nodes. Each linear layer has its own
quantiser. Another layer may read z itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch.fx import Node

from dit_kernels.arguments import KERNEL_DTYPES, known_equal
from dit_kernels.families.rows import quant_overload
from dit_kernels.rounding import FP8, LARGEST, QuantSteps, StaticSteps
from fusion_pass.dataflow import (
    HALVES,
    PARTS,
    RESHAPES,
    VIEWS,
    aten,
    dtype,
    is_call,
    is_cast,
    is_narrowing,
    is_pointwise,
    is_read_from_memory,
    is_widening,
    keeps_rows,
    readers,
    same_sizes,
    value,
)
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import PLAIN_TENSORS, Operands

# The bounds of a clamp, by its operator: the positions of the lower one and of the upper one.
_CLAMPS = {aten.clamp_min.default: (1, None), aten.clamp_max.default: (None, 1), aten.clamp.default: (1, 2)}
_SCALING = (*VIEWS, *_CLAMPS, aten.div.Tensor, aten.mul.Tensor, aten.clone.default)  # what is between z and its cast
_NARROW = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))
_FORM = "its steps are not those of a form that the ops know"
_ONE_A_ROW = "it does not compute one scale for each row"


@dataclass(frozen=True)
class Quantisers:
    """Equal quantisers of one value.

    q, s: the nodes of the quantised rows, and those of their scales; no s if the scale is static. interior: the nodes
    between the value and these. static_scale: a static scale, or the node that holds it; None: the value is cast as it
    is. keeps: does something else read the value, too, from memory?
    """

    steps: QuantSteps | StaticSteps
    q: tuple[Node, ...]
    s: tuple[Node, ...]
    interior: tuple[Node, ...]
    static_scale: Node | float | None = None
    keeps: bool = False

    @property
    def overload(self) -> str:
        """The name of the overload of an op that quantises in this way."""
        return quant_overload(isinstance(self.steps, StaticSteps), self.keeps)

    def operands(self) -> Operands:
        """The operands of an op that quantises in this way, beside those of the op without a quantiser."""
        return {"static_scale": self.static_scale} if isinstance(self.steps, StaticSteps) else {}

    def options(self) -> dict[str, Any]:
        """The options of an op that quantises in this way."""
        steps = self.steps
        if isinstance(steps, StaticSteps):
            given = {"scaling": steps.scaling, "factor_dtype": steps.factor, "scaled_dtype": steps.scaled}
            return given | {"clamp": steps.clamp}
        return {
            "s_dtype": steps.scale,
            "fmax": steps.fmax,
            "smallest_amax": steps.smallest_amax,
            "smallest_scale": steps.smallest_scale,
            "reciprocal": steps.reciprocal,
            "clamp": steps.clamp,
        }

    def results(self, z: tuple[Node, ...]) -> list[tuple[Node, ...]]:
        """The nodes of each result of an op that quantises in this way, from z on. z: the nodes of the value."""
        return [nodes for nodes in (z if self.keeps else (), self.q, self.s) if nodes]

    def inside(self, z: tuple[Node, ...]) -> tuple[Node, ...]:
        """The nodes that go away and are no result. z: the nodes of the value."""
        return self.interior if self.keeps else (*z, *self.interior)


@dataclass(frozen=True)
class Row:
    """What is quantised: a value alone, or [before, value]. z: the nodes of the value. nodes: those of the row."""

    z: tuple[Node, ...]
    nodes: tuple[Node, ...]
    before: Node | None = None

    def quantisers(self, kind: str) -> Quantisers:
        """The quantisers that read the row. Raises Refused if an op cannot compute them. kind: as for `behind`."""
        found = behind(self.nodes, kind)
        if found.keeps and self.before is not None:
            raise Refused(Reason.QUANTISER, self.nodes[0], "something else reads the concatenated row", kind)
        if found.overload and self.before is not None:
            raise Refused(Reason.QUANTISER, self.nodes[0], "the scale of a concatenated row is static", kind)
        return found

    def operands(self, found: Quantisers) -> Operands:
        """The operands of an op that quantises the row, beside those of the op without a quantiser."""
        return found.operands() | ({} if found.overload else {"before": self.before})

    def inside(self, found: Quantisers) -> tuple[Node, ...]:
        """The nodes from the value on that go away and are no result."""
        return (*(() if self.before is None else self.z), *found.inside(self.nodes))


def row_with(z: tuple[Node, ...], kind: str) -> Row | None:
    """The quantised row that a value is in; None if no quantiser follows. Raises Refused if an op cannot compute it.

    z: nodes of one value. kind: the kind of the site, for the report. The user's code, then its graph:

        self.proj_out(torch.cat([attention, z], dim=2))

        r = cat([attention, z], 2); a = amax(abs(r), [-1], True); ...
    """
    if follow(z):
        return Row(z, z)
    users = dict.fromkeys(user for node in z for user in node.users)
    joined = next((user for user in users if is_call(user, aten.cat.default) and follow((user,))), None)
    if joined is None:
        return None
    parts, rank = joined.args[0], joined.meta["val"].ndim
    detail = ""
    if len(users) > 1:
        detail = "something else reads the value"
    elif joined.args[1:] not in ((-1,), (rank - 1,)):
        detail = "tensors are concatenated along another dimension than the last"
    elif len(parts) != 2 or parts[1] not in z or parts[0] in z:
        detail = "the quantised row is not one other tensor and then the value"
    elif dtype(parts[0]) != dtype(joined) or dtype(parts[1]) != dtype(joined):
        detail = "the concatenated tensors have different dtypes"
    if detail:
        raise Refused(Reason.QUANTISER, joined, detail, kind)
    return Row(z, (joined,), parts[0])


def follow(z: Sequence[Node]) -> bool:
    """Is a value scaled and cast to an 8-bit float?"""
    return next(_casts(z), None) is not None


def behind(z: Sequence[Node], kind: str) -> Quantisers:
    """The quantisers that read a value. Raises Refused if an op cannot compute them, or if something else reads the
    value and does not read it from memory.

    z: nodes of one value. kind: the kind of the site, for the report.
    """
    try:
        first, *others = (_match(cast, z) for cast in _casts(z))
        for other in others:
            if other.steps != first.steps:
                raise _refusal(other.q[0], "the layers that read the value quantise it in different ways")
            if other.static_scale != first.static_scale:
                raise _refusal(other.q[0], "the layers that read the value have static scales of their own")
            nodes = {name: getattr(first, name) + getattr(other, name) for name in ("q", "s", "interior")}
            first = replace(first, **nodes)
        return _closed(z, first)
    except Refused as refusal:
        refusal.kind = kind
        raise


def _casts(z: Sequence[Node]) -> Iterator[Node]:
    """The casts to an 8-bit float of a value, which may be scaled and clamped before."""
    seen: set[Node] = set()
    pending = [user for node in z for user in node.users]
    for node in pending:  # the list grows
        if node in seen:
            continue
        seen.add(node)
        if is_cast(node) and dtype(node) in _NARROW:
            yield node
        elif is_cast(node) or is_call(node, *_SCALING):
            pending += node.users


def _closed(z: Sequence[Node], found: Quantisers) -> Quantisers:
    """The quantisers without the casts and views of the value that something else reads, too.

    Raises Refused unless other readers of the value read it from memory, nothing else reads what is computed inside the
    quantisers, and only the matmuls that read q read s.
    """
    inside = {*found.q, *found.s, *found.interior}
    same_rows = [*z]
    for node in same_rows:  # the list grows
        same_rows += [user for user in node.users if user in inside and _is_same_rows(user)]
    for node in reversed(same_rows):  # what a shared node is computed from remains, too
        if not inside.issuperset(node.users):
            inside.discard(node)
    others = [user for node in z for user in node.users if user not in inside]
    if others and not any(is_read_from_memory(node, inside) for node in z):
        raise _refusal(others[0], "something else reads the value")
    interior = tuple(node for node in found.interior if node in inside)
    for node in interior:
        for user in node.users:
            if user not in inside:
                raise _refusal(user, "something else reads a value inside the quantiser")
    matmuls = set(_readers(found.q))
    if not matmuls or any(map(is_pointwise, matmuls)):
        raise _refusal(found.q[0], "Inductor computes with the quantised rows")
    for reader in _readers(found.s):
        if reader not in inside and reader not in matmuls:
            raise _refusal(reader, "something other than the matmul reads the scale")
    return replace(found, interior=interior, keeps=bool(others))


def _is_same_rows(node: Node) -> bool:
    return is_widening(node) or keeps_rows(node)


def _readers(nodes: Sequence[Node]) -> Iterator[Node]:
    """The nodes that read one of these, directly or through views and copies."""
    return chain.from_iterable(readers(node, _is_view_or_copy) for node in nodes)


def _is_view_or_copy(node: Node) -> bool:
    return is_call(node, *VIEWS, *PARTS, aten.expand.default, aten.clone.default)


# --- one quantiser ----------------------------------------------------------------------------------------------------


def _match(cast: Node, z: Sequence[Node]) -> Quantisers:
    """The quantiser that ends in a cast, read backwards. Raises Refused if its steps fit no form."""
    if dtype(cast) != FP8:
        raise _refusal(cast, f"to {str(dtype(cast)).removeprefix('torch.')}")
    scaled, clamps = _under_clamps(cast.args[0], z)
    found = _match_static(scaled, z) or _match_dynamic(scaled, z)
    interior = tuple(dict.fromkeys((*clamps, *found.interior)))
    clamp = any(is_call(node, *_CLAMPS) for node in clamps)
    return replace(found, steps=replace(found.steps, clamp=clamp), q=(cast,), interior=interior)


def _match_dynamic(quotient: Node, z: Sequence[Node]) -> Quantisers:
    """The quantiser that scales a value by the largest number of each row. quotient: what is clamped and cast."""
    rows, divisor, reciprocal = _operands(quotient)
    scale, s, widened = _scale(divisor)
    amax, steps = _steps_to_amax(scale)
    between = (*_path(rows, z), *_path(amax[-1].args[0], z))
    if not _is_row_of(divisor, rows):
        raise _refusal(quotient, _ONE_A_ROW)
    divisions = [i for i, node in enumerate(steps) if is_call(node, aten.div.Tensor)]
    if len(divisions) != 1 or not s or dtype(quotient) != torch.float32:
        raise _refusal(quotient, _FORM)
    division = steps[divisions[0]]
    after, before = steps[: divisions[0] + 1], steps[divisions[0] + 1 :]
    halves = {found for node in after if (found := dtype(node)) in HALVES}
    exact = {dtype(z[0]), torch.float32}
    fmax = division.args[1]
    if len(halves) > 1 or not {dtype(node) for node in (amax[0], *before)} <= exact or not _is_exact(fmax, division):
        raise _refusal(division, _FORM)
    passed = (quotient, *reciprocal, *widened, *steps, *amax, *between)
    return Quantisers(
        steps=QuantSteps(
            scale=next(iter(halves), torch.float32),
            fmax=float(fmax),
            smallest_amax=_least(before),
            smallest_scale=_least(after),
            reciprocal=bool(reciprocal),
            clamp=False,
        ),
        q=(),
        s=s,
        interior=tuple(node for node in passed if node not in s),
    )


def _under_clamps(node: Any, z: Sequence[Node]) -> tuple[Node, list[Node]]:
    """What is clamped to +-LARGEST, if anything clamps it; and the clamps, casts and views behind it.

    PyTorch clamps 16-bit numbers in fp32: the casts around the clamp change nothing.
    """
    passed = _passed(node, lambda n: n not in z and (is_call(n, *_CLAMPS) or _is_same_rows(n) or is_narrowing(n)))
    under = passed[-1].args[0] if passed else node
    clamps = [node for node in passed if is_call(node, *_CLAMPS)]
    lower, upper = ([bound for clamp in clamps if (bound := _bounds(clamp)[side]) is not None] for side in (0, 1))
    narrowed = {dtype(node) for node in passed if is_narrowing(node)}
    if (lower, upper) not in (([], []), ([-LARGEST], [LARGEST])) or not narrowed <= {dtype(under)}:
        raise _refusal(node, _FORM)
    return under, passed


def _bounds(clamp: Node) -> list[Any]:
    """The lower and the upper bound; None for one that is absent."""
    return [None if at is None or at >= len(clamp.args) else clamp.args[at] for at in _CLAMPS[clamp.target]]


# --- a static scale ---------------------------------------------------------------------------------------------------


def _match_static(scaled: Node, z: Sequence[Node]) -> Quantisers | None:
    """The quantiser that scales a value by a given number, or by none; None if the scale is computed. Raises Refused.

    scaled: what is clamped and cast.
    """
    path = _path_to(scaled, z)
    if path is not None:
        return Quantisers(StaticSteps("quotient", torch.float32, torch.float32, False), (), (), tuple(path))
    if not is_call(scaled, aten.div.Tensor, aten.mul.Tensor):
        return None
    for rows, factor in (scaled.args[:2], reversed(scaled.args[:2])):
        path = _path_to(rows, z)
        if path is None or (is_call(scaled, aten.div.Tensor) and rows is not scaled.args[0]):
            continue
        scale, inverse, roundings = _given(factor) if isinstance(factor, Node) else (float(factor), False, set())
        if scale is None:
            return None
        divides, of_scaled = is_call(scaled, aten.div.Tensor), dtype(scaled)
        if of_scaled is None or (divides and inverse):
            raise _refusal(scaled, _FORM)
        scaling = "quotient" if divides else "reciprocal" if inverse else "product"
        if isinstance(factor, Node):
            _check_given(scale, z)
            factor_dtype = _factor_dtype(factor, roundings, scaled)
        else:
            factor_dtype = torch.float32
            if divides and not _is_on_cpu(scaled):  # a GPU multiplies by the reciprocal of a number
                scaling = "reciprocal"
        return Quantisers(StaticSteps(scaling, factor_dtype, of_scaled, False), (), (), (scaled, *path), scale)
    return None


def _given(factor: Node) -> tuple[Node | None, bool, set[torch.dtype]]:
    """The input of the graph that a factor is read from, whether the factor is its reciprocal, and the dtypes that the
    factor is rounded to. No input if the factor is computed in another way."""
    passed = _passed(factor, lambda node: _is_one_element(node) or is_narrowing(node) or _is_itself(node))
    node = passed[-1].args[0] if passed else factor
    inverse = is_call(node, aten.reciprocal.default)
    if inverse:
        before = _passed(node.args[0], _is_one_element)
        passed, node = [*passed, node], before[-1].args[0] if before else node.args[0]
    roundings = (dtype(n) for n in passed if is_narrowing(n) or is_call(n, aten.reciprocal.default))
    halves = {found for found in roundings if found is not None and found in HALVES}
    return (None if node.op == "call_function" else node), inverse, halves


def _is_one_element(node: Any) -> bool:
    """Is this a view of a scale, or its cast up to fp32?"""
    return is_call(node, *RESHAPES, aten.expand.default) or is_widening(node)


def _factor_dtype(factor: Node, roundings: set[torch.dtype], scaled: Node) -> torch.dtype:
    """The dtype that a factor is rounded to. Raises Refused if it is rounded twice.

    scaled: the product or quotient. If it has 16 bits, and a 0-d factor has more, PyTorch rounds the factor to these 16
    bits first; but on a CPU, it does not if the factor is the second operand.
    """
    of_scaled = dtype(scaled)
    kept = _is_on_cpu(scaled) and factor is scaled.args[1]
    if of_scaled in HALVES and of_scaled != dtype(factor) and not kept:
        roundings = {*roundings, of_scaled}
    if len(roundings) > 1:
        raise _refusal(scaled, _FORM)
    return next(iter(roundings), torch.float32)


def _is_on_cpu(node: Node) -> bool:
    val = value(node)
    return val is not None and val.device.type == "cpu"


def _check_given(scale: Node, z: Sequence[Node]) -> None:
    """Raises Refused unless an op takes this input of the graph as a static scale."""
    val, of_z = value(scale), value(z[0])
    if val is None or of_z is None or val.dtype not in KERNEL_DTYPES or type(val) not in PLAIN_TENSORS:
        raise _refusal(scale, "the ops do not take its static scale")
    if not all(known_equal(size, 1) for size in val.shape):
        raise _refusal(scale, "its static scale has more than one element")
    if val.device != of_z.device:
        raise _refusal(scale, "its static scale is on another device")


# --- a scale for each row ---------------------------------------------------------------------------------------------


def _operands(quotient: Node) -> tuple[Node, Node, tuple[Node, ...]]:
    """The rows; what divides them; and the nodes that compute its reciprocal, if the rows are multiplied by it."""
    if len(quotient.all_input_nodes) == 2:
        left, right = quotient.all_input_nodes
        if is_call(quotient, aten.div.Tensor):
            return left, right, ()
        for rows, factor in ((left, right), (right, left)) if is_call(quotient, aten.mul.Tensor) else ():
            passed = _passed(factor, lambda node: is_call(node, *RESHAPES) or _is_itself(node))
            inverse = passed[-1].args[0] if passed else factor
            if is_call(inverse, aten.reciprocal.default) and dtype(inverse) == torch.float32:
                return rows, inverse.args[0], (*passed, inverse)
    raise _refusal(quotient, _FORM)


def _is_itself(node: Any) -> bool:
    """Is this a product with 1? Python's 1.0 / s is reciprocal(s) * 1.0."""
    return is_call(node, aten.mul.Tensor) and isinstance(node.args[1], int | float) and node.args[1] == 1


def _scale(divisor: Node) -> tuple[Node, tuple[Node, ...], tuple[Node, ...]]:
    """The scale as it is rounded; the nodes that hold it in fp32; and the nodes between."""
    passed = _passed(divisor, lambda node: is_call(node, *RESHAPES) or is_widening(node))
    scale: Node = passed[-1].args[0] if passed else divisor
    if dtype(scale) == torch.float32:
        return scale, (scale,), ()
    narrow = [scale]
    for node in narrow:  # the list grows
        narrow += [user for user in node.users if is_call(user, *RESHAPES)]
    return scale, tuple(user for node in narrow for user in node.users if is_widening(user)), tuple(narrow)


def _steps_to_amax(scale: Any) -> tuple[list[Node], list[Node]]:
    """The largest absolute value of a row, from its maximum to its absolute value; and the steps from the scale back
    to the maximum."""
    steps = _passed(scale, lambda node: is_cast(node) or _is_step(node))
    largest = steps[-1].args[0] if steps else scale
    picked = [largest] if is_call(largest, operator.getitem) and largest.args[1] == 0 else []
    maximum = largest.args[0] if picked else largest
    if is_call(maximum, aten.amax.default, aten.max.dim) and len(maximum.args) > 1:
        dims = maximum.args[1] if isinstance(maximum.args[1], Sequence) else [maximum.args[1]]
        source = value(maximum.args[0])
        inside = _passed(maximum.args[0], lambda node: is_widening(node) or keeps_rows(node))
        absolute = inside[-1].args[0] if inside else maximum.args[0]
        if source is not None and list(dims) in ([-1], [source.ndim - 1]) and is_call(absolute, aten.abs.default):
            return [*picked, maximum, *inside, absolute], steps
    raise _refusal(largest if isinstance(largest, Node) else scale, _ONE_A_ROW)


def _is_step(node: Any) -> bool:
    """Is this a view, a least value, or a division by a number?"""
    if is_call(node, *_CLAMPS):
        least, most = _bounds(node)
        return most is None and isinstance(least, int | float) and math.isfinite(least)
    return is_call(node, *RESHAPES) or (is_call(node, aten.div.Tensor) and isinstance(node.args[1], int | float))


def _least(steps: Sequence[Node]) -> float | None:
    """The least value that the clamps among these steps allow; None if there is none. steps: the last one first."""
    least, rounded = 0.0, torch.float32
    for node in steps:
        rounded = found if (found := dtype(node)) in HALVES else rounded
        if is_call(node, *_CLAMPS):
            least = max(least, _rounded(_bounds(node)[0], rounded))
    return least or None


def _rounded(number: float, to: torch.dtype | None) -> float:
    return float(torch.tensor(number, dtype=torch.float32).to(to))


def _is_exact(fmax: float, division: Node) -> bool:
    """Is this a positive number that the dtype of the division holds?"""
    return 0 < fmax < math.inf and _rounded(fmax, dtype(division)) == fmax


def _path(node: Node, z: Sequence[Node]) -> list[Node]:
    """The nodes from here back to the value: casts up, and views that keep the rows."""
    passed = _path_to(node, z)
    if passed is None:
        raise _refusal(node, _ONE_A_ROW)
    return passed


def before_same_rows(node: Any) -> Any:
    """The node before casts up and views that keep the rows."""
    passed = _passed(node, _is_same_rows)
    return passed[-1].args[0] if passed else node


def _path_to(node: Any, z: Sequence[Node]) -> list[Node] | None:
    passed = _passed(node, lambda node: node not in z and _is_same_rows(node))
    return passed if (passed[-1].args[0] if passed else node) in z else None


def _passed(node: Any, passes: Callable[[Any], bool]) -> list[Node]:
    """A chain of nodes, each the first argument of the one before, as long as they pass."""
    passed: list[Node] = []
    while passes(node):
        passed.append(node)
        node = node.args[0]
    return passed


def _is_row_of(divisor: Node, rows: Node) -> bool:
    """Does the divisor have one element for each row?"""
    left, right = value(divisor), value(rows)
    return left is not None and right is not None and right.ndim > 0 and same_sizes(left.shape, (*right.shape[:-1], 1))


def _refusal(node: Node, detail: str) -> Refused:
    return Refused(Reason.QUANTISER, node, detail)
