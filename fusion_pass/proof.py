"""What must hold before an op may replace the nodes of a site. No check adds a guard on a symbolic size."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import are_rows, depends_on, lies_in_rows, region, same_shape, value
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Site


def prove(site: Site, graph: Graph, sums: bool) -> None:
    """Raises Refused unless the op computes what the site's nodes compute, for every reader of these nodes.

    sums: must a sum over a row also equal the sum of a CPU to the last bit? A kernel adds in another order.
    """
    _prove_shapes(site)
    _prove_layout(site, graph, sums)
    _prove_closed(site)
    _prove_order(site)
    _prove_undisturbed(site)


def find_size(size: int | torch.SymInt, site: Site) -> int | Node | tuple[Node, int] | None:
    """Where the graph holds a size: a number, a node, or a dimension of an operand; None if no node holds the size."""
    if isinstance(size, int):
        return size
    for node in site.sizes():
        if known_equal(node.meta["val"], size):
            return node
    for node in site.inputs():
        val = value(node)
        for dim, by in enumerate(() if val is None else val.shape):
            if known_equal(by, size):
                return node, dim
    return None


def _prove_shapes(site: Site) -> None:
    """The graph holds the sizes of each shape that an operand or a result is reshaped to, except for one at most."""
    like = value(site.shaped())
    if like is None or like.ndim < 2:
        raise Refused(Reason.SHAPE, site.shaped(), kind=site.kind)
    if site.like is None:
        return
    shapes = [val for node in (site.x, site.like, *site.results()) if (val := value(node)) is not None]
    if not all(same_shape(shape, shapes[0]) for shape in shapes):
        for shape in shapes:
            if [find_size(size, site) for size in shape.shape].count(None) > 1:
                raise Refused(Reason.SHAPE, site.like, f"the graph does not hold the sizes of {shape.shape}", site.kind)


def _prove_layout(site: Site, graph: Graph, sums: bool) -> None:
    """The op returns contiguous tensors. If the tensors of the graph are not contiguous, as_strided would see different
    memory; and a sum over a row whose elements are apart in memory would differ in its last bit."""
    if sums or not site.takes_any_layout:
        reason = Reason.LAYOUT if site.takes_any_layout else Reason.APART
        for node in site.results():
            if not lies_in_rows(node):
                raise Refused(reason, node, kind=site.kind)
        for name in site.summed:
            source = site.source(name)
            if source is not None and not lies_in_rows(source) and are_rows(site.read(name)):  # the op reads a copy
                raise Refused(reason, source, kind=site.kind)
    if sums and site.check_sums is not None:
        site.check_sums(site)
    by_layout = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default)
    strided = [node for target in by_layout for node in graph.find_nodes(op="call_function", target=target)]
    if strided and (any(o.swap is not None for o in site.outputs) or not all(map(_is_contiguous, site.results()))):
        raise Refused(Reason.LAYOUT, strided[0], kind=site.kind)


def _is_contiguous(node: Node) -> bool:
    val = value(node)
    expected: Any = 1
    for size, stride in reversed(list(zip(val.shape, val.stride(), strict=True)) if val is not None else []):
        if not known_equal(size, 1) and not known_equal(stride, expected):
            return False
        expected = expected * size
    return val is not None


def _prove_closed(site: Site) -> None:
    """Nothing outside the site reads its interior."""
    inside = set(site.nodes())
    for node in site.interior:
        for user in node.users:
            if user not in inside:
                raise Refused(Reason.ESCAPES, node, f"read by {user.name}", site.kind)


def _prove_order(site: Site) -> None:
    """The op is one node, so nothing that it reads may be computed from a value that it returns."""
    late = depends_on((*site.inputs(), *site.sizes()), {*site.results(), *site.interior})
    if late is not None:
        raise Refused(Reason.ORDER, late, kind=site.kind)


def _prove_undisturbed(site: Site) -> None:
    """No mutation and no switch of streams is between two nodes of the site, or between a node and the values that it
    reads."""
    first, *rest = site.nodes()
    for node in (*rest, *site.looked_through()):
        if region(node) != region(first):
            raise Refused(Reason.MUTATION, node, kind=site.kind)
