"""Functions that read an FX graph of ATen operations: casts, views, commutative operands, constants."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from dit_kernels.arguments import known_equal

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
TO_SHAPE = (aten.reshape.default, aten.view.default)  # their second argument is the new shape
HALVES = (torch.bfloat16, torch.float16)
# A split or an unbind returns several parts, and getitem selects one of them.
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
    """The fake tensor of a node's result; None if the result is not one tensor."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def dtype(node: Node) -> torch.dtype | None:
    val = value(node)
    return None if val is None else val.dtype


def comes_from(node: Node, *names: str) -> bool | None:
    """Does a node come from one of these operators, functions or module classes? None if its origin is not known.

    Compares names: a cached graph holds a copy of the operator. A node that was traced twice, as with torch's complex
    wrapper, has lost the operator that it was decomposed from; the function that the model called may be known.
    """
    original = str(node.meta.get("original_aten", "")).partition(".")[2].partition(".")[0]
    if original and original != str(node.target).partition(".")[2].partition(".")[0]:
        return original in names
    called = node.meta.get("source_fn_stack")
    return getattr(called[-1][1], "__name__", "") in names if called else None


def is_size(node: Node) -> bool:
    """Does a node hold a size that is a symbol, or is computed from symbols?"""
    return isinstance(node.meta.get("val"), torch.SymInt)


def is_cast(node: Any) -> bool:
    """Does a node change the dtype and nothing else?"""
    return is_call(node, prims.convert_element_type.default)


def through_casts(node: Any) -> Any:
    """The node before a chain of casts."""
    while is_cast(node):
        node = node.args[0]
    return node


def is_widening(node: Any) -> bool:
    """Is this a cast from a 16-bit float to fp32? It keeps the value."""
    return is_cast(node) and dtype(node) == torch.float32 and dtype(node.args[0]) in HALVES


def is_narrowing(node: Any) -> bool:
    """Is this a cast from fp32 to a 16-bit float? It rounds the value."""
    return is_cast(node) and dtype(node) in HALVES and dtype(node.args[0]) == torch.float32


def keeps_rows(node: Any) -> bool:
    """Is this a reshape, a copy or a division by one that keeps the rows? A computation row by row may then be before
    or after it."""
    if not is_call(node, *RESHAPES, aten.clone.default) and not _drops_a_dimension(node) and not _divides_by_one(node):
        return False
    before, after = value(node.args[0]), value(node)
    if before is None or after is None or not before.ndim or not after.ndim:
        return False
    return known_equal(before.shape[-1], after.shape[-1])


def _divides_by_one(node: Any) -> bool:
    """Is this x / 1.0? diffusers' Attention divides by a `rescale_output_factor`, which most models leave at 1."""
    return is_call(node, aten.div.Tensor) and node.args[1] == 1 and dtype(node) == dtype(node.args[0])


def _drops_a_dimension(node: Any) -> bool:
    """Is this x[:, 0], where the dropped dimension has size 1 and is not the last?"""
    val = value(node.args[0]) if is_call(node, aten.select.int) else None
    return val is not None and node.args[1] not in (-1, val.ndim - 1) and known_equal(val.shape[node.args[1]], 1)


def under_views(node: Any) -> Any:
    """The node before a chain of views and copies that keep the rows."""
    while keeps_rows(node):
        node = node.args[0]
    return node


def past_views(node: Node) -> tuple[Node, ...]:
    """The node, and the views, copies and casts up to fp32 that follow it, each the only reader of the one before."""
    chain = [node]
    while (user := sole_user(chain[-1])) is not None and (keeps_rows(user) or is_widening(user)):
        chain.append(user)
    return tuple(chain)


def lies_in_rows(node: Node) -> bool:
    """Are the elements of a row adjacent in memory? A CPU sums all such rows in one order, but not other rows."""
    val = value(node)
    return val is not None and are_rows(val)


def are_rows(t: torch.Tensor) -> bool:
    return t.ndim > 0 and (known_equal(t.shape[-1], 1) or known_equal(t.stride(-1), 1))


def in_memory(t: torch.Tensor) -> list[int]:
    """The dimensions whose size is not 1, from the outermost in memory to the innermost. Adds no guard."""
    dims = [dim for dim, size in enumerate(t.shape) if not known_equal(size, 1)]
    strides = t.stride()
    return sorted(dims, key=lambda dim: -hint(strides[dim], 0))


def hint(size: int | torch.SymInt, unknown: int) -> int:
    """The number for a size: for a symbol, its value at compile time, or `unknown` if it has none. Adds no guard."""
    if isinstance(size, int):
        return size
    return unknown if size.node.hint is None else int(size.node.hint)


def keeps_sums(node: Any) -> bool:
    """Does a reshape or a copy keep the rows, and also whether their elements are adjacent in memory? Sums over the
    rows are then the same to the last bit."""
    return keeps_rows(node) and lies_in_rows(node) == lies_in_rows(node.args[0])


def through_widening(node: Any) -> Any:
    """The node before the first cast up to fp32 of the same rows; the node itself if there is no such cast."""
    narrow = node
    while is_widening(node) or keeps_sums(node):
        widened, node = is_widening(node), node.args[0]
        narrow = node if widened else narrow
    return narrow


def before_widening(node: Any) -> Any:
    """The node before a chain of casts up to fp32, which has the same shape."""
    while is_widening(node):
        node = node.args[0]
    return node


def same_value(a: Any, b: Any) -> bool:
    """Are a and b the same value, apart from casts up to fp32 and from views that keep the rows?"""
    return have_same_shape(a, b) and under_views(through_widening(a)) is under_views(through_widening(b))


def other_operands(node: Node, operand: Node) -> Iterator[Any]:
    """The other operand of a commutative operation, once for each side on which `operand` is."""
    left, right = node.args[:2]
    if left is operand:
        yield right
    if right is operand:
        yield left


def is_plain_add(node: Any) -> bool:
    """Is this a + b, without the factor `alpha`?"""
    return is_call(node, *ADD) and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2


def addcmul(node: Any) -> tuple[Any, Sequence[Any], tuple[Node, ...]] | None:
    """(a, (b, c), the nodes before `node`) if the node is torch.addcmul(a, b, c), which is a + b * c; else None.

    torch 2.11 decomposes addcmul before any pass sees it, into add(a, mul(mul(b, 1), c)).
    """
    if is_call(node, aten.addcmul.default):
        return None if len(node.args) != 3 or node.kwargs else (node.args[0], node.args[1:], ())
    if not is_plain_add(node) or not comes_from(node, "addcmul"):
        return None
    a, product = node.args
    if not is_call(product, aten.mul.Tensor) or not is_call(product.args[0], aten.mul.Tensor):
        return None
    scaled, c = product.args
    alone = sole_user(scaled) is product and sole_user(product) is node
    return (a, (scaled.args[0], c), (product, scaled)) if _is_number(scaled.args[1], 1) and alone else None


def add_constant(node: Any, number: float) -> Node | None:
    """The tensor v if the node is v + number; else None."""
    if is_plain_add(node) and isinstance(node.args[0], Node) and _is_number(node.args[1], number):
        return node.args[0]
    return None


def _is_number(arg: Any, number: float) -> bool:
    return isinstance(arg, int | float) and not isinstance(arg, bool) and float(arg) == number


def stream(node: Node) -> Any:
    """The stream on which the model runs a node; 0 is the default stream."""
    return node.meta.get("custom", {}).get("stream", 0)


def sole_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_pointwise(node: Node) -> bool:
    """Would Inductor compute this node where it is read, instead of storing it?"""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_cast(node)


def is_random(node: Node) -> bool:
    """May a node compute something else at each call, from the same inputs?"""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def is_stored(node: Node, but: Container[Node] = ()) -> bool:
    """Does any node, but for some, read this node from memory, rather than in the kernel that computes it?"""
    past = (*VIEWS, *PARTS, aten.expand.default, aten.clone.default)
    readers = (user for user in node.users if user not in but and not is_size(user))
    return any(is_stored(user, but) if is_call(user, *past) else not is_pointwise(user) for user in readers)


def is_only_joined(node: Node, but: Container[Node] = ()) -> bool:
    """Do only concatenations, and nodes that do not count, read this node? The kernel that computes it then writes
    straight into their results."""
    users = (user for user in node.users if user not in but)
    return all(
        is_only_joined(user, but) if is_call(user, *VIEWS) else is_call(user, aten.cat.default) for user in users
    )


def is_joined(node: Node) -> bool:
    """Is a concatenation, whose result is stored, the only reader of this node? The lowering then lets an op write into
    its part of the joined tensor, if the op takes strides for its result."""
    cat = sole_user(node)
    if cat is None or not is_call(cat, aten.cat.default) or not is_stored(cat):
        return False
    return all(dtype(part) == dtype(node) for part in cat.args[0])


def is_read_from_memory(node: Node, but: Container[Node] = ()) -> bool:
    """Does any node, but for some, read this one from memory? A concatenation does not: Inductor's kernel writes into
    its result."""
    return is_stored(node, but) and not is_only_joined(node, but)


def stored_casts(node: Node, follows: Callable[[Node], bool] = is_cast) -> tuple[Node, ...]:
    """The readers of the node, if all of them are casts to one dtype that an op can return; else the node itself.

    follows: which casts count.
    """
    casts = tuple(node.users)
    equal = casts and all(follows(cast) and dtype(cast) == dtype(casts[0]) for cast in casts)
    return casts if equal and dtype(casts[0]) in (*HALVES, torch.float32) else (node,)


def whole_of_parts(node: Any) -> tuple[Node, tuple[Node, ...]] | None:
    """The tensor whose slices a concatenation joins again, all of them and in order, and the slices. The node then has
    the value of this tensor. None if the node is no such concatenation."""
    parts = node.args[0] if is_call(node, aten.cat.default) and not node.kwargs else ()
    if not parts or not all(is_call(part, aten.slice.Tensor) and len(part.args) == 4 for part in parts):
        return None
    whole, dim = parts[0].args[:2]
    joined, at = value(node), 0
    if joined is None or not have_same_shape(whole, node) or (*node.args[1:], 0)[0] not in (dim, dim - joined.ndim):
        return None
    for part in parts:
        of, along, start, _ = part.args
        start, val = start.meta["val"] if isinstance(start, Node) else start, value(part)
        if val is None or of is not whole or along != dim or not known_equal(start, at):
            return None
        at = at + val.shape[dim]
    return whole, tuple(parts)


def computed_alike(a: Any, b: Any, proven: set[tuple[Node, Node]] | None = None) -> bool:
    """Are a and b one value? It may be computed once, or twice by equal views and pointwise operations from the same
    nodes."""
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and a == b
    proven = set() if proven is None else proven
    if a is b or (a, b) in proven:
        return True
    if a.target != b.target or len(a.args) != len(b.args) or a.kwargs != b.kwargs or region(a) != region(b):
        return False
    if not is_call(a, *VIEWS, aten.expand.default, aten.slice.Tensor, aten.select.int) and not is_pointwise(a):
        return False
    if is_random(a) or not all(computed_alike(m, n, proven) for m, n in zip(a.args, b.args, strict=True)):
        return False
    proven.add((a, b))
    return True


def region(node: Node) -> tuple[int, Any]:
    """The region of a node. Between two nodes of one region there is no mutation and no switch of streams."""
    from torch._inductor.pattern_matcher import get_mutation_region_id

    return get_mutation_region_id(node.graph, node), stream(node)


def is_copy_or_pointwise(node: Node) -> bool:
    """Does a node copy, view or join values, or compute them element by element?"""
    copies = (*VIEWS, aten.expand.default, aten.clone.default, aten.cat.default, aten.repeat.default, aten.slice.Tensor)
    return is_call(node, *copies) or is_pointwise(node)


def readers(node: Node, passes: Callable[[Node], bool] = is_copy_or_pointwise) -> Iterator[Node]:
    """The nodes that read a node's value, directly or through nodes that pass. Yields each of them once."""
    seen = set()
    pending = list(node.users)
    for user in pending:  # the list grows
        if user not in seen:
            seen.add(user)
            if passes(user):
                pending.extend(user.users)
            else:
                yield user


def is_swap(node: Any) -> bool:
    """Does this node swap heads and tokens: [B, S, H, Dh] to [B, H, S, Dh], or back?"""
    return is_call(node, aten.permute.default) and list(node.args[1]) == [0, 2, 1, 3]


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Are the shapes equal for all values of their symbols? Adds no guard."""
    return same_sizes(a.shape, b.shape)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """The same for sizes."""
    return len(a) == len(b) and all(map(known_equal, a, b))


def have_same_shape(a: Any, b: Any) -> bool:
    """Are a and b nodes, each of one tensor, whose shapes are equal?"""
    left, right = (value(node) if isinstance(node, Node) else None for node in (a, b))
    return left is not None and right is not None and same_shape(left, right)


def broadcasts_to(a: torch.Tensor, x: torch.Tensor) -> bool:
    """Does a broadcast to the shape of x for all values of the symbols? Adds no guard."""
    pairs = zip(reversed(a.shape), reversed(x.shape), strict=False)
    return a.ndim <= x.ndim and all(known_equal(m, 1) or known_equal(m, n) for m, n in pairs)


def depends_on(nodes: Iterable[Node], sources: set[Node]) -> Node | None:
    """The first of `nodes` that is computed from one of `sources`; None if there is none."""
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


# --- where a node comes from ------------------------------------------------------------------------------------------


def module_path(node: Node) -> str:
    """The dotted path, in the model, of the module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    path = path.rpartition(".__self__")[2]  # hooks wrap a compiled forward: the path leads through their closures
    path = re.sub(r"^[LG]\['\w+'\]", "", path)
    path = re.sub(r"\.__dict__\['_modules'\]", "", path)
    path = re.sub(r"\._modules\b|\['_modules'\]", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return path.lstrip(".")


def source_line(node: Node) -> str:
    """file:line of the innermost line of the user's code, outside torch itself, that a node was traced from."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    torch_root = os.path.dirname(torch.__file__) + os.sep
    outside = [frame for frame in frames if not frame[0].startswith(torch_root)] or frames
    return ":".join(outside[-1]) if outside else ""


def symbolic_shape(node: Node) -> tuple[int | str, ...]:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in val.shape)
