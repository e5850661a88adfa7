"""The norm, as a value: its input, weight, eps, the dtype of each of its steps, and its nodes.

    rms:    rstd = rsqrt(mean(c * c) + eps)           c is x, or x cast to fp32
            out  = cast?(cast?(x * rstd) * weight + bias)
    layer:  rstd = rsqrt(var(c) + eps)                as PyTorch decomposes F.layer_norm
            out  = cast?((c - mean(c)) * rstd * weight + bias)

All of this is read from the dataflow, in any order of operands:

- The square is pow, mul or square.
- The mean is a mean, or a sum divided by D.
- x is multiplied by rsqrt, or by pow(-0.5) if PyTorch computes it as rsqrt; or x is multiplied by the reciprocal of a
  square root; or x is divided by a square root. These three round differently.
- eps is a constant or a 0-d tensor.
- There is keepdim, or a later unsqueeze.
- Views that keep the rows may be between all these.

The dataflow does not show whether F.layer_norm was called, and whether it was called on a 16-bit x or on an x that the
model had cast up. PyTorch computes these differently on a CPU. The metadata of the nodes, where tracing notes the
operator that they come from, shows which one it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from dit_kernels.arguments import known_equal
from dit_kernels.rounding import NormSteps
from fusion_pass.dataflow import (
    HALVES,
    RESHAPES,
    VIEWS,
    aten,
    comes_from,
    dtype,
    is_call,
    is_cast,
    is_narrowing,
    is_plain_add,
    is_pointwise,
    keeps_rows,
    keeps_sums,
    other_operands,
    readers,
    same_shape,
    same_value,
    sole_user,
    through_casts,
    through_widening,
    under_views,
    value,
)
from fusion_pass.kinds.kind import Value
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Operand, View

MEANS = (aten.mean.dim, aten.sum.dim_IntList, aten.mean.default, aten.sum.default)
REDUCTIONS = (*MEANS, aten.var.correction, aten.var_mean.correction)
OVERFLOWS = (
    "x*x is computed in fp16, as in the model's own code, and overflows if |x| >= 256: the norm is then 0. "
    'rounding="fp32" squares in fp32'
)


@dataclass(frozen=True)
class Norm:
    """out = norm(x) * weight + bias, over the last dimension."""

    kind: str  # "rms" or "layer"
    anchor: Node
    x: Node
    weight: Node | Operand | None  # as [D]
    bias: Node | Operand | None
    eps: float | Node
    out: Node
    steps: NormSteps
    interior: tuple[Node, ...]  # every node that the norm alone needs, from the square to `out`
    # The same norm if a computed [D], as in (1 + w) * n, is read as its weight. In this norm, that [D] is a scale.
    with_computed_weight: Norm | None = None

    @property
    def remark(self) -> str:
        """What the report should say about the rounding of the norm, or ""."""
        return OVERFLOWS if self.kind == "rms" and self.steps.stat == torch.float16 else ""


@dataclass(frozen=True)
class _Statistic:
    """rstd = rsqrt(mean(measured * measured) + eps), or rsqrt(var(measured) + eps). If x is divided by a square root,
    `rstd` is that root."""

    kind: str
    measured: Node
    mean: Node | None  # of a layer norm
    eps: float | Node
    rstd: Node
    root: str  # one of dit_kernels.rounding.ROOTS
    nodes: tuple[Node, ...]


class NormValue(Value[Norm]):
    """A norm, found from its root."""

    name = "norm"
    anchors = (aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.sqrt.default)
    is_modulated = True
    unfused = Reason.ALONE

    def find(self, anchor: Node) -> Norm | None:
        """The norm whose reciprocal root is `anchor`, or None if there is no norm. Raises Refused.

        The user's code, then its graph in bf16:

            (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight

            c = convert(x, f32); pow(c, 2); mean(., [-1], True); add(., eps); r = rsqrt(.);
            mul(x, r); convert(., bf16); mul(., weight)

            F.layer_norm(x, (D,), weight, bias, eps)

            c = convert(x, f32); var, mean = var_mean(c, [-1], correction=0, keepdim=True);
            mul(sub(c, mean), rsqrt(add(var, eps))); mul(., weight); add(., bias); convert(., bf16)
        """
        statistic = _statistic(anchor)
        return None if statistic is None else _norm(statistic, anchor)

    def measured(self, anchor: Node) -> Node:
        """The tensor whose rows the statistic of an anchor is computed from; the anchor itself if that tensor is not
        found."""
        node = anchor
        while (val := value(node)) is None or val.ndim == 0 or known_equal(val.shape[-1], 1):
            if not isinstance(node.args[0] if node.args else None, Node):
                return anchor
            node = node.args[0]
        return through_widening(square_root_of(node) or node)

    def has_gates(self, graph: Graph) -> bool:
        """Does any product read a tanh, as the gates of these models do? (A GELU adds 1 to its tanh first.)"""
        tanhs = graph.find_nodes(op="call_function", target=aten.tanh.default)
        return any(is_call(user, aten.mul.Tensor) for tanh in tanhs for user in readers(tanh, _is_view))


NORM = NormValue()


def _is_view(node: Node) -> bool:
    return is_call(node, *VIEWS, aten.expand.default)


# --- before the root: the statistic ----------------------------------------------------------------------------------


def _statistic(anchor: Node) -> _Statistic | None:
    variance = _under_root(anchor)
    if variance is None:
        return None
    nodes = [anchor]
    variance = _drop_keepdim(variance, nodes)
    mean, eps = _split_eps(variance)
    if mean is not variance:
        nodes.append(variance)
    mean = _drop_keepdim(mean, nodes)
    moments = _layer_norm_moments(mean, nodes)
    measured = moments[0] if moments is not None else _squared(mean, nodes)
    if measured is None:
        _refuse_statistic(variance)
        return None
    _check_eps(eps)
    _check_power(anchor)
    kind, centre = ("rms", None) if moments is None else ("layer", moments[1])
    rstd, root = _raise_keepdim(anchor, nodes), "rsqrt"
    if _is_square_root(anchor):
        rstd, root = _inverse(rstd, nodes)
    return _Statistic(kind, measured, centre, eps, rstd, root, tuple(nodes))


def _under_root(anchor: Node) -> Node | None:
    """v if the anchor is v ** -0.5, or a square root of v that something is divided by; else None."""
    under = anchor.args[0]
    if not isinstance(under, Node):
        return None
    if _is_square_root(anchor):
        if _is_divided_by(anchor):
            return under
        if _is_inverse_of_squares(under):
            raise Refused(Reason.ROOT, under, "the reciprocal is taken before the root")
        return None
    is_reciprocal = is_call(anchor, aten.rsqrt.default) or anchor.args[1] == -0.5
    return under if is_reciprocal else None


def _is_square_root(node: Node) -> bool:
    return is_call(node, aten.sqrt.default) or (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 0.5)


def _is_divided_by(root: Node) -> bool:
    """Is anything divided by a root, or by a view or a pointwise function of it that still has one number for each
    row?"""
    pending = [root]
    for node in pending:
        for user in node.users:
            if _divides(user, node):
                return True
            val = value(user)
            is_scalar = val is not None and val.ndim > 0 and known_equal(val.shape[-1], 1) and is_pointwise(user)
            if is_scalar or is_cast(user) or is_call(user, aten.expand.default, aten.clone.default, *VIEWS):
                pending.append(user)
    return False


def _divides(node: Node, root: Node) -> bool:
    return _is_reciprocal(node) or (is_call(node, aten.div.Tensor) and node.args[1] is root)


def _is_reciprocal(node: Any) -> bool:
    """Is this 1 / v? PyTorch also computes v ** -1 as 1 / v."""
    return is_call(node, aten.reciprocal.default) or (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -1)


def _is_inverse_of_squares(node: Node) -> bool:
    """Is this a number times 1 / v, or 1 / v, where v is computed from a sum of squares?"""
    reduction = _reduction_under(node) if _is_reciprocal(node) or _is_reciprocal(_factor(node)[0]) else None
    return reduction is not None and square_root_of(reduction.args[0]) is not None


def _inverse(root: Node, nodes: list[Node]) -> tuple[Node, str]:
    """(the reciprocal of a square root, "reciprocal"); without a reciprocal, (the root, "quotient"): x is divided by
    the root."""
    user = sole_user(root)
    if user is not None and not _divides(user, root):
        raise Refused(Reason.ROOT, user)
    if user is None or not _is_reciprocal(user):
        return root, "quotient"
    nodes.append(user)
    product = sole_user(user)
    if product is not None and is_call(product, aten.mul.Tensor) and product.args[1] == 1:  # PyTorch's 1 / root
        nodes.append(product)
        user = product
    return _raise_keepdim(user, nodes), "reciprocal"


def _split_eps(variance: Node) -> tuple[Node, float | Node]:
    """mean and eps of `mean + eps`, in either order; eps is 0 if nothing is added."""
    if not is_plain_add(variance):
        return variance, 0.0
    left, right = variance.args[:2]
    if isinstance(left, Node) and isinstance(right, Node):
        # A tensor for eps is 0-d; the mean has the rank of x.
        first, second = value(left), value(right)
        return (right, left) if first is not None and second is not None and first.ndim < second.ndim else (left, right)
    mean, eps = (left, right) if isinstance(left, Node) else (right, left)
    return (mean, float(eps)) if isinstance(mean, Node) and isinstance(eps, int | float) else (variance, 0.0)


def _check_eps(eps: float | Node) -> None:
    if isinstance(eps, float):
        if not eps >= 0:
            raise Refused(Reason.EPS, detail=f"it is {eps}")
        return
    val = value(eps)
    if val is None or val.ndim != 0 or val.device.type != "cpu" or not val.is_floating_point():
        raise Refused(Reason.EPS, eps)


def _check_power(anchor: Node) -> None:
    """In 16 bits, v ** -0.5 and rsqrt(v) differ in the last bit on a CPU, but not on a GPU."""
    val = value(anchor)
    by_power = is_call(anchor, aten.pow.Tensor_Scalar) and anchor.args[1] == -0.5
    if by_power and (val is None or (val.dtype in HALVES and not val.is_cuda)):
        raise Refused(Reason.ROUNDING, anchor, "a power in 16 bits, on a CPU")


def eps_operand(eps: float | Node) -> float | Node:
    """eps as the op takes it: without casts to fp32, which the op makes itself."""
    while isinstance(eps, Node) and is_cast(eps) and dtype(eps) == torch.float32:
        eps = eps.args[0]
    return eps


def _is_last_unsqueeze(node: Node) -> bool:
    """Does a node, by any view operator, add a dimension of 1 after the existing dimensions?"""
    before, after = (value(node.args[0]), value(node)) if is_call(node, *RESHAPES) else (None, None)
    if before is None or after is None or after.ndim != before.ndim + 1:
        return False
    return all(known_equal(m, n) for m, n in zip((*before.shape, 1), after.shape, strict=True))


def _drop_keepdim(node: Node, nodes: list[Node]) -> Node:
    """The node before an unsqueeze(-1) that is written instead of keepdim=True. Adds the unsqueeze to `nodes`."""
    while _is_last_unsqueeze(node):
        nodes.append(node)
        node = node.args[0]
    return node


def _raise_keepdim(node: Node, nodes: list[Node]) -> Node:
    """The node after an unsqueeze(-1) that is written instead of keepdim=True: the product with x reads it."""
    _, *unsqueezed = _with_keepdim(node)
    nodes += unsqueezed
    return unsqueezed[-1] if unsqueezed else node


def _with_keepdim(node: Node) -> list[Node]:
    chain = [node]
    while (user := sole_user(chain[-1])) is not None and _is_last_unsqueeze(user):
        chain.append(user)
    return chain


def _squared(mean: Node, nodes: list[Node]) -> Node | None:
    """c if the node is mean(c * c) over the last dimension; None if it is another statistic. Raises Refused."""
    reduction = _drop_keepdim(_factor(mean)[0] or mean, nodes)
    if not is_call(reduction, aten.mean.dim, aten.sum.dim_IntList):
        return None
    square = reduction.args[0]
    squared = square_root_of(square)
    if is_cast(square) and square_root_of(through_casts(square)) is not None:
        raise Refused(Reason.ROUNDING, square, "the squares are cast")
    val = value(square)
    if squared is None or val is None or reduction.kwargs.get("dtype") not in (None, val.dtype):
        return None
    if not _over_last(reduction, val):
        raise Refused(Reason.DIMENSION, reduction)
    if not (is_call(mean, aten.mean.dim) or _divides_by_number(mean, reduction, val)):
        raise Refused(Reason.MEAN, mean)
    nodes += dict.fromkeys((mean, reduction, square))
    return squared


def _refuse_statistic(node: Any) -> None:
    """Raises Refused if pointwise operations compute a node from a reduction over a tensor: this is a norm of some
    kind."""
    reduction = _reduction_under(node)
    reduced, statistic = None if reduction is None else value(reduction.args[0]), value(node)
    if reduction is None or reduced is None or statistic is None:
        return
    if same_shape(statistic, reduced):
        return  # a value for each element is not a statistic, even if it is computed from a mean
    if not _over_last(reduction, reduced):
        raise Refused(Reason.DIMENSION, reduction)
    raise Refused(Reason.MEAN if is_call(reduction, *MEANS) else Reason.LAYER_NORM, reduction)


def _reduction_under(node: Any) -> Node | None:
    """The reduction over a tensor from which pointwise operations compute a node. First operands are searched first."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if not isinstance(current, Node) or current in seen:
            continue
        if is_call(current, *REDUCTIONS):
            return current
        seen.add(current)
        if is_pointwise(current) or is_call(current, operator.getitem, aten.expand.default, *VIEWS):
            pending.extend(reversed(current.args))
    return None


def _factor(node: Node) -> tuple[Node | None, float]:
    """(v, f) if the node is v * f or v / (1 / f), where f is a number; else (None, 1)."""
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor) or not isinstance(node.args[0], Node):
        return None, 1.0
    number = node.args[1]
    if not isinstance(number, int | float) or not number:
        return None, 1.0
    return node.args[0], float(number) if is_call(node, aten.mul.Tensor) else 1.0 / number


def _divides_by_number(quotient: Node, total: Node, summed: torch.Tensor) -> bool:
    """Is the quotient total / D as torch.mean computes it?

    On a CPU, torch.mean divides by D. On a GPU, it multiplies by 1 / D, and so does a division by a number. In 16 bits,
    torch.mean rounds once, while a sum and its quotient round twice.
    """
    d = summed.shape[-1]
    if not is_call(total, aten.sum.dim_IntList) or summed.dtype in HALVES or not isinstance(d, int) or d == 0:
        return False
    exact = is_call(quotient, aten.div.Tensor) or summed.is_cuda or d & (d - 1) == 0
    return exact and _factor(quotient)[1] == 1.0 / d


def _over_last(reduction: Node, reduced: torch.Tensor) -> bool:
    """Does it reduce the last dimension and no other?"""
    dims = reduction.args[1] if len(reduction.args) > 1 else None
    return isinstance(dims, list | tuple) and len(dims) == 1 and dims[0] in (-1, reduced.ndim - 1) and reduced.ndim > 0


def square_root_of(square: Node) -> Node | None:
    if is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return square.args[0]
    if is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1]:
        return square.args[0]
    return square.args[0] if is_call(square, aten.square.default) else None


def _layer_norm_moments(variance: Node, nodes: list[Node]) -> tuple[Node, Node] | None:
    """(c, mean of c) if the node is the variance of c over the last dimension; else None. Raises Refused."""
    both = variance.args[0] if is_call(variance, operator.getitem) and variance.args[1] == 0 else None
    if not isinstance(both, Node) or not is_call(both, aten.var_mean.correction):
        return None
    measured = value(both.args[0])
    if measured is None or not _over_last(both, measured):
        return None
    if _is_of_layer_norm(both) is False or both.kwargs.get("correction") != 0 or not both.kwargs.get("keepdim"):
        raise Refused(Reason.LAYER_NORM, variance)
    means = [user for user in both.users if is_call(user, operator.getitem) and user.args[1] == 1]
    if len(means) != 1:
        raise Refused(Reason.LAYER_NORM, variance)
    nodes += [variance, both, means[0]]
    return both.args[0], means[0]


# --- after the root: the product, weight, bias and casts -------------------------------------------------------------


def _norm(statistic: _Statistic, anchor: Node) -> Norm:
    product = sole_user(statistic.rstd)
    if product is None:
        raise Refused(Reason.ESCAPES, statistic.rstd)
    if is_cast(product):
        raise Refused(Reason.ROUNDING, product)
    operation = aten.div.Tensor if statistic.root == "quotient" else aten.mul.Tensor
    if not is_call(product, operation) or (statistic.root == "quotient" and product.args[1] is not statistic.rstd):
        raise Refused(Reason.NOT_NORMALISED, product)
    operand = next(other_operands(product, statistic.rstd))
    nodes = [*statistic.nodes, product]
    if statistic.mean is not None:
        nodes.append(operand)
        operand = _centred(operand, statistic.mean)
    if not same_value(operand, statistic.measured):
        raise Refused(Reason.NOT_NORMALISED, product)
    x = through_widening(_before_copy(statistic))
    _check_shapes(statistic.measured, statistic.rstd, product)
    norm, other = (_affine(statistic, anchor, x, product, [*nodes], computed) for computed in (False, True))
    return norm if other.out is norm.out else replace(norm, with_computed_weight=other)


def _centred(node: Any, mean: Node) -> Any:
    """c if the node is c - mean; else None."""
    is_difference = is_call(node, aten.sub.Tensor) and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1
    return node.args[0] if is_difference and node.args[1] is mean else None


def _called_on(statistic: _Statistic, x: Node) -> torch.dtype | None:
    """The dtype in which the statistics are computed; for F.layer_norm, the dtype of its input."""
    cast = _before_copy(statistic)
    of_layer_norm = statistic.kind == "layer" and cast is not x and _is_of_layer_norm(cast) is True
    return dtype(x if of_layer_norm else cast)


def _before_copy(statistic: _Statistic) -> Node:
    """The measured tensor before a copy. F.layer_norm reads a contiguous copy of a tensor that is not contiguous. An
    RMSNorm may read a copy, too, if the sums over its rows are the same."""
    node = statistic.measured
    copies = is_call(node, aten.clone.default) and (statistic.kind == "layer" or keeps_sums(node))
    return node.args[0] if copies else node


def _is_of_layer_norm(node: Node) -> bool | None:
    """Does a node come from F.layer_norm? None if its origin is not known."""
    return comes_from(node, "native_layer_norm", "layer_norm", "LayerNorm")


def _check_shapes(measured: Node, rstd: Node, product: Node) -> None:
    """Checks [..., D] * [..., 1] -> [..., D]. Without keepdim, the same operations divide each row by the root of
    another row."""
    rows, root, normed = value(measured), value(rstd), value(product)
    if rows is None or root is None or normed is None or rows.ndim == 0:
        raise Refused(Reason.SHAPE, product)
    if not isinstance(rows.shape[-1], int):
        raise Refused(Reason.WIDTH, measured)
    if root.ndim == 0 or not known_equal(root.shape[-1], 1) or not same_shape(normed, rows):
        raise Refused(Reason.DIMENSION, product)


def _affine(
    statistic: _Statistic, anchor: Node, x: Node, product: Node, nodes: list[Node], computed_weight: bool
) -> Norm:
    """The norm that starts with x * rstd: follows the product with the weight, the sum with the bias, and the casts.

    computed_weight: may a computed [D] be the weight, whatever follows it?
    """
    weight = bias = None
    normed = weighted = biased = dtype(product)
    narrowed = False
    out = product
    while (user := sole_user(out)) is not None:
        if is_narrowing(user) and not narrowed:
            narrowed = True
            if weight is None and bias is None and statistic.kind == "rms":
                normed = weighted = biased = dtype(user)
        elif statistic.kind == "layer" and _is_of_layer_norm(user) is False and not keeps_rows(user):
            break  # the model's own product or sum is rounded separately
        elif weight is None and bias is None and (row := _weight(user, out, x, computed_weight)) is not None:
            weight, narrowed = row, False
            weighted = biased = dtype(user)
        elif bias is None and not (weight is not None and narrowed) and (row := _added_row(user, out, x)) is not None:
            bias, biased, narrowed = row, dtype(user), False
        elif not keeps_rows(user):  # a copy is followed: F.rms_norm makes its result contiguous
            break
        out = user
        nodes.append(out)
    while keeps_rows(out):  # views and copies after the norm do not belong to it
        out = nodes.pop().args[0]
    stat, last = _called_on(statistic, x), dtype(out)
    tensors = [node for node in statistic.nodes if value(node) is not None]  # not var_mean, which returns two tensors
    if len({dtype(node) for node in tensors}) != 1:
        raise Refused(Reason.ROUNDING, anchor)
    if stat is None or normed is None or weighted is None or biased is None or last is None:
        raise Refused(Reason.ROUNDING, anchor)
    steps = NormSteps(stat, normed, weighted, biased, last, statistic.root)
    rows = (_as_column(weight), _as_column(bias))
    return Norm(statistic.kind, anchor, x, *rows, statistic.eps, out, steps, tuple(nodes))


def _as_column(row: Node | None) -> Node | Operand | None:
    """A parameter of [1, .., D] as [D]."""
    val = None if row is None else value(row)
    if row is None or val is None or val.ndim == 1:
        return row
    return Operand(row, (View(aten.reshape.default, ([val.shape[-1]],)),))


def _weight(user: Node, operand: Node, x: Node, computed: bool) -> Node | None:
    """The row that multiplies `operand`, if it is a weight. A row that is computed (1 + w), or is not [D], is a gate or
    a scale, unless another product follows."""
    row = _row_operand(user, aten.mul.Tensor, operand, x)
    if row is None or computed or _is_own(row, user):
        return row
    while (follows := sole_user(user)) is not None and (is_cast(follows) or keeps_rows(follows)):
        user = follows
    return row if follows is not None and is_call(follows, aten.mul.Tensor) else None


def _added_row(user: Node, operand: Node, x: Node) -> Node | None:
    """The [D] bias that is added to `operand`."""
    row = _row_operand(user, aten.add.Tensor, operand, x) if is_plain_add(user) else None
    return row if row is not None and _is_own(row, user) else None


def _row_operand(user: Node, target: Any, operand: Node, x: Node) -> Node | None:
    """The other operand of `user`, if it is a [D], which may be written as [1, .., D]."""
    row = next(other_operands(user, operand), None) if is_call(user, target) else None
    val, like = value(row) if isinstance(row, Node) else None, value(x)
    if not isinstance(row, Node) or val is None or like is None or not val.ndim:
        return None
    if not known_equal(val.shape[-1], like.shape[-1]) or not all(known_equal(size, 1) for size in val.shape[:-1]):
        return None
    bare = under_views(row)
    return row if _is_one_dimensional(row) and not _is_one_dimensional(bare) else bare


def _is_one_dimensional(row: Node) -> bool:
    val = value(row)
    return val is not None and val.ndim == 1


def _is_own(row: Node, user: Node) -> bool:
    """Does a row belong to the norm? It does if it is a [D] input of the graph or a cast of one, or if F.layer_norm
    reads it."""
    given = _is_one_dimensional(row) and through_casts(row).op in ("placeholder", "get_attr")
    return given or _is_of_layer_norm(user) is True
