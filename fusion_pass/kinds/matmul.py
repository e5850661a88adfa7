"""The linear layer that makes an operand of an activation, read backwards from this operand.

The user's code, then its graph, where x is [B, S, K] and w is [N, K]:

    F.linear(x, w, bias)

    addmm(bias, reshape(x, [B * S, K]), permute(w, [1, 0])); reshape(., [B, S, N])

    a, b = F.linear(x, w).chunk(2, dim=-1)

    y = reshape(mm(reshape(x, [B * S, K]), permute(w, [1, 0])), [B, S, N])
    p = split(y, N / 2, -1); a = getitem(p, 0); b = getitem(p, 1)

The op of the second layer reads slices of w, which are views. If x is not contiguous, PyTorch has a matmul for each
batch item, and rounds before it adds the bias. The op would copy x, so such a layer is no site.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.fx import Node

from dit_kernels.arguments import MATRIX, TOKENS, Role, known_equal
from fusion_pass.dataflow import (
    RESHAPES,
    aten,
    dtype,
    is_call,
    is_joined,
    is_read_from_memory,
    is_widening,
    keeps_rows,
    same_sizes,
    value,
)
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Operand, View


@dataclass(frozen=True)
class Matmul:
    """A matmul that makes an operand.

    columns: those of the result that are the operand, from the first to one behind the last; None: all of them. path:
    the nodes from the operand back to the matmul, both of them included.
    """

    node: Node
    columns: tuple[int, int] | None
    path: tuple[Node, ...]

    @property
    def x(self) -> Node:
        """The input: [tokens, K]."""
        x: Node = self.node.args[-2]
        return x

    @property
    def w(self) -> Node | Operand:
        """The weight: [N, K]. If the operand is a part of the result, these rows of the weight."""
        w: Node = self.node.args[-1].args[0]
        return self._rows(w)

    @property
    def bias(self) -> Node | Operand | None:
        return self._rows(self.node.args[0]) if is_call(self.node, aten.addmm.default) else None

    def _rows(self, t: Node) -> Node | Operand:
        if self.columns is None:
            return t
        return Operand(t, (View(aten.slice.Tensor, (0, *self.columns)),))


def behind(operand: Any) -> Matmul | None:
    """The matmul that makes an operand, behind views and copies that keep the rows, and behind parts of its result.
    None if something else makes the operand."""
    path: list[Node] = []
    columns: tuple[int, int] | None = None
    node = operand
    while not is_call(node, aten.mm.default, aten.addmm.default) and not _is_of_one_weight(node):
        part = None if keeps_rows(node) else _part(node)
        if part is not None:
            first, last = part.columns if columns is None else (column + part.columns[0] for column in columns)
            columns = first, last
            path += part.nodes
        elif keeps_rows(node):
            path.append(node)
        else:
            return None
        node = path[-1].args[0]
    return Matmul(node, columns, (*path, node))


def _is_of_one_weight(node: Any) -> bool:
    """Is this a matmul for each batch item, all of them with one weight?"""
    return is_call(node, aten.bmm.default) and is_call(node.args[1], aten.expand.default)


class _Part(NamedTuple):
    """A part of a tensor: its columns, and the nodes that select it."""

    columns: tuple[int, int]
    nodes: tuple[Node, ...]


def _part(node: Any) -> _Part | None:
    """The columns that a node selects of another tensor; None if it selects none, or if their numbers are symbols."""
    nodes: tuple[Node, ...] = (node,)
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.split.Tensor, aten.split_with_sizes.default):
        split, index = node.args
        nodes += (split,)
        source, sizes = split.args[:2]
        dim, before = (*split.args[2:], 0)[0], sizes[:index] if isinstance(sizes, list) else index * [sizes]
    elif is_call(node, aten.slice.Tensor) and len(node.args) < 5:
        source = node.args[0]
        dim, before = (*node.args[1:], 0)[0], [(*node.args[2:], None)[0] or 0]
    else:
        return None
    whole, val = value(source), value(node)
    if whole is None or val is None or dim % whole.ndim != whole.ndim - 1:
        return None
    if not all(type(size) is int for size in (*before, whole.shape[-1], val.shape[-1])):
        return None
    first = sum(before)
    first = max(0, first + whole.shape[-1]) if first < 0 else first  # a slice may count from the end, or from before 0
    return _Part((first, first + val.shape[-1]), nodes)


def check(matmul: Matmul, kind: str) -> None:
    """Raises Refused unless an op can compute the matmul. kind: the kind of the site, for the report."""
    obstacle = next(_obstacles(matmul.node), None)
    if obstacle is not None:
        raise Refused(Reason.MATMUL, matmul.node, obstacle, kind)


def _obstacles(node: Node) -> Iterator[str]:
    if is_call(node, aten.bmm.default):
        yield "its input is not contiguous, so that each batch item has a matmul of its own"
        return
    *biases, x, permuted = node.args
    is_permuted = is_call(permuted, aten.permute.default) and [dim % 2 for dim in permuted.args[1]] == [1, 0]
    w = permuted.args[0] if is_permuted else None
    if w is None or not _lies(w, MATRIX, x):
        yield "the weight is stored as [K, N]"
    if not _lies(x, TOKENS, x):
        yield "the op would have to copy its input"
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        yield "its result or its bias is multiplied by a number"
    for bias in biases:
        val, result = value(bias), value(node)
        if val is None or result is None or val.ndim != 1 or not known_equal(val.shape[0], result.shape[1]):
            yield "its bias is not one number for each column"
    if {dtype(given) for given in (*biases, w, node) if given is not None} != {dtype(x)}:
        yield "its operands have different dtypes"


def _lies(node: Node, role: Role, first: Node) -> bool:
    """Does a kernel take this operand where it is? first: the op's first operand."""
    val, of = value(node), value(first)
    return val is not None and of is not None and role.laid(val.shape, val.stride(), of.shape, known_equal) is not None


def tokens(matmul: Matmul, result: Node) -> Node:
    """What the op reads as x. If the input of the matmul is a view of a tensor with the leading sizes of the site's
    result, it is this tensor: then the op's own result has the shape of the site's."""
    node = matmul.x
    while not _has_leading_sizes(node, result):
        if not is_call(node, *RESHAPES) or not keeps_rows(node):
            return matmul.x
        node = node.args[0]
    return node if _lies(node, TOKENS, node) else matmul.x


def like(matmul: Matmul, x: Node, result: Node) -> Node | None:
    """The site's `like`: the matmul, or None if the op's result for x has the shape of the site's result."""
    return None if _has_leading_sizes(x, result) else matmul.node


def _has_leading_sizes(node: Node, result: Node) -> bool:
    """Does a node have all sizes of the result but the last, and are there such sizes?"""
    val, of = value(node), value(result)
    return val is not None and of is not None and val.ndim > 1 and same_sizes(val.shape[:-1], of.shape[:-1])


def is_written(results: Sequence[Node], viewed: bool) -> bool:
    """Is a result stored, or written by the op into its part of a joined tensor? viewed: is it a view of the op's
    result? Then the part would be a copy of it."""
    return any(map(is_read_from_memory, results)) or (not viewed and all(map(is_joined, results)))


def inside(operand: Node, matmul: Matmul) -> tuple[Node, ...]:
    """The nodes that a site takes over in front of an activation: from the matmul to the operand, and the casts of the
    operand up to fp32."""
    casts = [operand]
    for node in casts:  # the list grows
        casts += [user for user in node.users if is_widening(user)]
    return (*matmul.path, *casts[1:])


def check_closed(interior: Iterable[Node], results: Iterable[Node], kind: str) -> None:
    """Raises Refused if something outside the site reads a node inside it. kind: the kind of the site, for the
    report."""
    nodes = tuple(interior)
    known = {*nodes, *results}
    for node in nodes:
        if not known.issuperset(node.users):
            raise Refused(Reason.MATMUL, node, "something else reads its result", kind)
