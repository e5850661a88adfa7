"""Replaces a proven site by a call of its op, with the views around the call."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node

from dit_kernels.arguments import PER_ROW, Role
from fusion_pass.dataflow import RESHAPES, aten, have_same_shape, is_call, prims, same_sizes, value
from fusion_pass.proof import find_size
from fusion_pass.site import ORIGIN, Operand, Output, Site

# Operators whose nodes are erased with the site, if nothing else reads them.
_PURE = (
    prims.convert_element_type.default,
    aten.clone.default,
    aten.expand.default,
    aten.mul.Tensor,
    aten.permute.default,
    aten.reciprocal.default,
    aten.select.int,
    *RESHAPES,
)


def rewrite(site: Site, graph: Graph) -> Node:
    """Replaces a proven site by a call of its op. Returns the node of the call."""
    with graph.inserting_before(_place(site)):
        call = _insert_call(site, graph)
        results = [call] if len(site.outputs) == 1 else _insert_getitems(site, graph, call)
        for output, result in zip(site.outputs, results, strict=True):
            for node, replacement in _viewed_back(graph, result, output, site):
                node.replace_all_uses_with(replacement)
    _erase(site, graph)
    return call


def _place(site: Site) -> Node:
    """The node of the site before which the call is inserted: the first node after everything that the op reads. As it
    is inside the site, it is in the site's mutation region."""
    inputs = [*site.inputs(), *site.sizes()]
    return next(node for node in site.nodes() if all(read < node for read in inputs))


def _insert_call(site: Site, graph: Graph) -> Node:
    args: list[Any] = []
    keywords = site.keywords()
    for name, argument in site.roles.items():
        operand = site.operands[name]
        if isinstance(operand, Operand):
            operand = operand.insert(graph)
        elif site.is_viewed(name):
            operand = _as_row(graph, operand, site)
        elif isinstance(operand, float) and argument.is_tensor:
            operand = _constant(graph, operand, site.read(name))
        args.append(operand)
    call = graph.call_function(site.target(), tuple(args), keywords)
    origin = site.origin or site.results()[0]
    call.meta.update({k: v for k, v in origin.meta.items() if k in ORIGIN})
    vals = tuple(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args)
    call.meta["eager_input_vals"] = (vals, keywords)
    roles = (argument.role for argument in site.op.results)
    results = tuple(_fresh(output, role, site) for output, role in zip(site.outputs, roles, strict=True))
    call.meta["val"] = results if len(results) > 1 else results[0]
    return call


def _constant(graph: Graph, number: float, val: torch.Tensor) -> Node:
    """A number as a tensor that the graph's module keeps, so that no kernel has to write it. val: its fake tensor."""
    module = graph.owning_module
    name = f"fusion_pass_constant_{len(list(module.buffers()))}"
    with unset_fake_temporarily():
        module.register_buffer(name, torch.tensor(number, dtype=val.dtype, device=val.device))
    node = graph.get_attr(name)
    node.meta["val"] = val
    return node


def _fresh(output: Output, role: Role, site: Site) -> torch.Tensor:
    """A fake tensor for a result of the op: contiguous, with sizes that the graph already has."""
    val = value(output.nodes[0])
    assert val is not None
    shape: Sequence[Any] = val.shape if output.swap is None else output.swap.of(val).shape
    shape = shape if site.like is None else site.row_shape(val)
    return val.new_empty((*shape[:-1], 1) if role is PER_ROW else shape)


def _viewed_back(graph: Graph, result: Node, output: Output, site: Site) -> Iterator[tuple[Node, Node]]:
    """Each node that a result of the op replaces, and the result in the shape of this node."""
    viewed: list[Node] = []
    for node in output.nodes:
        if not any(have_same_shape(node, view) for view in viewed):
            view = result if site.like is None else _viewed(graph, result, node.meta["val"].shape, node, site)
            viewed.append(view if output.swap is None else output.swap.insert(result, graph))
        yield node, next(view for view in viewed if have_same_shape(node, view))


def _as_row(graph: Graph, operand: Any, site: Site) -> Node | None:
    """An operand in the shape that the op takes it in."""
    val = None if operand is None else value(operand)
    return operand if val is None else _viewed(graph, operand, site.row_shape(val), site.shaped(), site)


def _viewed(graph: Graph, node: Node, shape: Sequence[Any], origin: Node, site: Site) -> Node:
    """`node`, reshaped. origin: the node whose place in the model the new one has."""
    val = value(node)
    assert val is not None
    if same_sizes(val.shape, shape):
        return node
    view = graph.call_function(aten.reshape.default, (node, [_size(graph, size, site) for size in shape]))
    view.meta = {k: v for k, v in origin.meta.items() if k in ORIGIN}
    view.meta["val"] = val.reshape(shape)
    return view


def _size(graph: Graph, size: int | torch.SymInt, site: Site) -> int | Node:
    found = find_size(size, site)
    if found is None:
        return -1  # reshape infers it, as all other sizes are known
    if not isinstance(found, tuple):
        return found
    node = graph.call_function(aten.sym_size.int, found)
    node.meta["val"] = size
    return node


def _insert_getitems(site: Site, graph: Graph, call: Node) -> list[Node]:
    results = []
    for index, output in enumerate(site.outputs):
        item = graph.call_function(operator.getitem, (call, index))
        item.meta = {k: v for k, v in output.nodes[0].meta.items() if k in ORIGIN}
        item.meta["val"] = call.meta["val"][index]
        results.append(item)
    return results


def _erase(site: Site, graph: Graph) -> None:
    """Erases the site's nodes, and the casts, views and expansions of its operands that nothing else reads."""
    pending = list(reversed(site.nodes()))
    while pending:
        node = pending.pop(0)
        if node._erased or node.users:
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        pending += [n for n in inputs if not n.users and is_call(n, *_PURE)]
