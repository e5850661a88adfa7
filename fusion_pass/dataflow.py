"""A small vocabulary for reading an FX graph of ATen operations: casts, views, commutative operands, constants."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
prims = torch.ops.prims

ADD = (aten.add.Tensor, aten.add.Scalar)
RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
VIEWS = (*RESHAPES, aten.permute.default)
HALVES = (torch.bfloat16, torch.float16)
# A split or an unbind gives several parts, and getitem one of them.
PARTS = (
    aten.slice.Tensor,
    aten.select.int,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    operator.getitem,
)


def is_call(node: Any, *targets: Any) -> bool:
    """Is this value the result of one of these operators?"""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value(node: Node) -> torch.Tensor | None:
    """The fake tensor that stands for a node's result, where it is one tensor."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def dtype(node: Node) -> torch.dtype | None:
    val = value(node)
    return None if val is None else val.dtype


def comes_from(node: Node, operator_name: str) -> bool:
    """Is it a part of what an operator was decomposed into? By name: a cached graph holds a copy of the operator."""
    return str(node.meta.get("original_aten")).startswith(operator_name)


def is_size(node: Node) -> bool:
    """Does a node hold a size that is a symbol, or is computed from symbols?"""
    return isinstance(node.meta.get("val"), torch.SymInt)


def is_cast(node: Any) -> bool:
    """A change of dtype and of nothing else."""
    return is_call(node, prims.convert_element_type.default)


def through_casts(node: Any) -> Any:
    """What a chain of casts started from."""
    while is_cast(node):
        node = node.args[0]
    return node


def is_widening(node: Any) -> bool:
    """A cast from a 16-bit float to fp32: the value stays what it was."""
    return is_cast(node) and dtype(node) == torch.float32 and dtype(node.args[0]) in HALVES


def is_narrowing(node: Any) -> bool:
    """A cast from fp32 to a 16-bit float: the value is rounded."""
    return is_cast(node) and dtype(node) in HALVES and dtype(node.args[0]) == torch.float32


def keeps_rows(node: Any) -> bool:
    """Another shape or a copy of the same rows: what is computed row by row may be computed before it or after it."""
    if not is_call(node, *RESHAPES, aten.clone.default) and not _drops_a_dimension(node):
        return False
    before, after = value(node.args[0]), value(node)
    if before is None or after is None or not before.ndim or not after.ndim:
        return False
    return known_equal(before.shape[-1], after.shape[-1])


def _drops_a_dimension(node: Any) -> bool:
    """x[:, 0], of a dimension of 1 that is not the last."""
    val = value(node.args[0]) if is_call(node, aten.select.int) else None
    return val is not None and node.args[1] not in (-1, val.ndim - 1) and known_equal(val.shape[node.args[1]], 1)


def under_views(node: Any) -> Any:
    """What a node is another shape of."""
    while keeps_rows(node):
        node = node.args[0]
    return node


def past_views(node: Node) -> tuple[Node, ...]:
    """The node, and the other shapes, or fp32, that it is brought into before anything else reads it."""
    chain = [node]
    while (user := sole_user(chain[-1])) is not None and (keeps_rows(user) or is_widening(user)):
        chain.append(user)
    return tuple(chain)


def lies_in_rows(node: Node) -> bool:
    """Do the elements of a row stand side by side? A CPU sums such rows in one order, wherever they are; others not."""
    val = value(node)
    return val is not None and are_rows(val)


def are_rows(t: torch.Tensor) -> bool:
    return t.ndim > 0 and (known_equal(t.shape[-1], 1) or known_equal(t.stride(-1), 1))


def in_memory(t: torch.Tensor) -> list[int]:
    """The dimensions that are not 1, from the outermost in memory to the innermost. Adds no guard."""
    dims = [dim for dim, size in enumerate(t.shape) if not known_equal(size, 1)]
    strides = t.stride()
    return sorted(dims, key=lambda dim: -_hint(strides[dim]))


def _hint(size: int | torch.SymInt) -> int:
    """The size that a symbol had in the first call; 0 where it had none."""
    return size if isinstance(size, int) else size.node.hint or 0


def keeps_sums(node: Any) -> bool:
    """Another shape or a copy of rows, in which these lie as they did: sums over them are the same to the last bit."""
    return keeps_rows(node) and lies_in_rows(node) == lies_in_rows(node.args[0])


def through_widening(node: Any) -> Any:
    """What has the same rows as the node before it was cast up to fp32."""
    narrow = node
    while is_widening(node) or keeps_sums(node):
        widened, node = is_widening(node), node.args[0]
        narrow = node if widened else narrow
    return narrow


def before_widening(node: Any) -> Any:
    """What was cast up to fp32, in the same shape."""
    while is_widening(node):
        node = node.args[0]
    return node


def same_value(a: Any, b: Any) -> bool:
    """Are a and b the same value, up to casts that change nothing and equal views?"""
    return have_same_shape(a, b) and under_views(through_widening(a)) is under_views(through_widening(b))


def other_operands(node: Node, operand: Node) -> Iterator[Any]:
    """What stands opposite `operand` in a commutative operation, for each side on which it stands."""
    left, right = node.args[:2]
    if left is operand:
        yield right
    if right is operand:
        yield left


def is_plain_add(node: Any) -> bool:
    """a + b, without the factor `alpha`."""
    return is_call(node, *ADD) and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2


def add_constant(node: Any, number: float) -> Node | None:
    """The tensor v where the node is v + number."""
    if is_plain_add(node) and isinstance(node.args[0], Node) and _is_number(node.args[1], number):
        return node.args[0]
    return None


def _is_number(arg: Any, number: float) -> bool:
    return isinstance(arg, int | float) and not isinstance(arg, bool) and float(arg) == number


def stream(node: Node) -> Any:
    """The stream that the model has put a node on; 0 is the default one."""
    return node.meta.get("custom", {}).get("stream", 0)


def sole_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_pointwise(node: Node) -> bool:
    """Would Inductor compute this node where it is read, instead of storing it?"""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_cast(node)


def is_stored(node: Node) -> bool:
    """Does anything read the node from memory, instead of computing on in the kernel that makes it?"""
    past = (*VIEWS, *PARTS, aten.expand.default, aten.clone.default)
    readers = (user for user in node.users if not is_size(user))
    return any(is_stored(user) if is_call(user, *past) else not is_pointwise(user) for user in readers)


def is_only_joined(node: Node) -> bool:
    """Is all that reads the node a concatenation, into whose result the kernel that makes it writes?"""
    users = node.users
    return all(is_only_joined(user) if is_call(user, *VIEWS) else is_call(user, aten.cat.default) for user in users)


def stored_casts(node: Node) -> tuple[Node, ...]:
    """The node; or, where all that reads it are equal casts to what an op can give, those."""
    casts = tuple(node.users)
    equal = casts and all(is_cast(cast) and dtype(cast) == dtype(casts[0]) for cast in casts)
    return casts if equal and dtype(casts[0]) in (*HALVES, torch.float32) else (node,)


def computed_alike(a: Any, b: Any, proven: set[tuple[Node, Node]] | None = None) -> bool:
    """Are a and b one value, computed once, or twice from the same by views and pointwise operations?"""
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and a == b
    proven = set() if proven is None else proven
    if a is b or (a, b) in proven:
        return True
    if a.target != b.target or len(a.args) != len(b.args) or a.kwargs != b.kwargs or region(a) != region(b):
        return False
    if not is_call(a, *VIEWS, aten.expand.default, aten.slice.Tensor, aten.select.int) and not is_pointwise(a):
        return False
    seeded = torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ())
    if seeded or not all(computed_alike(m, n, proven) for m, n in zip(a.args, b.args, strict=True)):
        return False
    proven.add((a, b))
    return True


def region(node: Node) -> tuple[int, Any]:
    """What may stand together: between nodes of one region no mutation stands, and no switch of streams."""
    from torch._inductor.pattern_matcher import get_mutation_region_id

    return get_mutation_region_id(node.graph, node), stream(node)


def readers(node: Node) -> Iterator[Node]:
    """What reads a node's value to compute with it, past copies of it, views and pointwise operations."""
    copies = (*VIEWS, aten.expand.default, aten.clone.default, aten.cat.default, aten.repeat.default, aten.slice.Tensor)
    seen = set()
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user not in seen:
            seen.add(user)
            if is_call(user, *copies) or is_pointwise(user):
                pending.extend(user.users)
            else:
                yield user


def is_swap(node: Any) -> bool:
    """[B, S, H, Dh] as [B, H, S, Dh], or back."""
    return is_call(node, aten.permute.default) and list(node.args[1]) == [0, 2, 1, 3]


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Are the shapes equal whatever their symbols stand for? Adds no guard."""
    return a.ndim == b.ndim and all(known_equal(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def have_same_shape(a: Any, b: Any) -> bool:
    """Are a and b nodes, each of one tensor, whose shapes are equal?"""
    left, right = (value(node) if isinstance(node, Node) else None for node in (a, b))
    return left is not None and right is not None and same_shape(left, right)


def broadcasts_to(a: torch.Tensor, x: torch.Tensor) -> bool:
    """Does a broadcast to the shape of x, whatever the symbols stand for? Adds no guard."""
    pairs = zip(reversed(a.shape), reversed(x.shape), strict=False)
    return a.ndim <= x.ndim and all(known_equal(m, 1) or known_equal(m, n) for m, n in pairs)


def known_equal(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def depends_on(nodes: Iterable[Node], sources: set[Node]) -> Node | None:
    """The first of `nodes` that is computed from one of `sources`."""
    earliest = min(sources)
    for node in nodes:
        seen: set[Node] = set()
        pending = [node]
        while pending:
            current = pending.pop()
            if current in sources:
                return node
            if current in seen or current < earliest:
                continue
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return None
