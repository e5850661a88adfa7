"""A site: one place in a graph that a rewrite covers, what it becomes, and the proof that nothing else changes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from dit_kernels.ops import KERNEL_DTYPES
from dit_kernels.rounding import FORMS
from fusion_pass.dataflow import (
    RESHAPES,
    are_rows,
    aten,
    depends_on,
    in_memory,
    is_call,
    is_size,
    known_equal,
    lies_in_rows,
    region,
    same_shape,
    value,
)
from fusion_pass.report import Reason, Refused
from fusion_pass.sites.operand import ORIGIN, SWAP, Operand, view_of

Operands = dict[str, "Node | Operand | float | None"]
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, FakeTensor)  # real ones are constants that Inductor has folded
VIEWED = ("x", "residual")  # the operands that are viewed into the shape of `like`
VECTOR = 16  # real numbers: of heads of a multiple of it, a CPU's vectors leave nothing
ROTATIONS = (*KERNEL_DTYPES, torch.complex64, torch.complex128)
MODEL_FORMS = tuple(form for form in FORMS if form != "fp32")


@dataclass(frozen=True)
class Form:
    """The rounding form that the casts of a site spell."""

    rounding: str
    norm_dtype: torch.dtype | None


@dataclass
class Survey:
    """What is known of the whole graph before the first rewrite."""

    gated: dict[Node, Node] = field(default_factory=dict)  # y of a residual add: the anchor of its norm
    rotated: dict[Node, Node] = field(default_factory=dict)  # a norm that is rotated: its anchor, in the graph's order


@dataclass(frozen=True)
class Site:
    """One place in a graph, and the call of an op that it becomes.

    operands and options are the op's arguments by name. outputs: for each result of the op, the nodes that it replaces,
    all equal. interior: the nodes that the op replaces and that nothing else may read. `anchor` names the site.
    like: where there are views inside the site, the node in whose shape the op runs; x, residual and results are viewed
    into and out of it. twins: nodes that the site reads and that have the value of an operand. swapped: are the results
    [B, S, H, Dh] where the graph has [B, H, S, Dh]? swapped_norms: is what they are norms of? turned: names of operands
    whose norms are multiplied by complex numbers, the nodes of these norms, and whether they are [B, H, S, Dh].
    """

    kind: str
    operands: Operands
    options: dict[str, Any]
    outputs: tuple[tuple[Node, ...], ...]
    dtypes: dict[str, torch.dtype]
    interior: tuple[Node, ...]
    anchor: Node
    like: Node | None = None
    twins: tuple[Node, ...] = ()
    swapped: bool = False
    swapped_norms: bool = False
    turned: tuple[tuple[str, Node, bool], ...] = ()

    @property
    def x(self) -> Node:
        """The first operand, which the report shows."""
        x = self.source(next(iter(self.operands)))
        assert x is not None
        return x

    def source(self, name: str) -> Node | None:
        """The node whose value the op reads as this operand, or a view of it."""
        operand = self.operands.get(name)
        return operand.source if isinstance(operand, Operand) else operand if isinstance(operand, Node) else None

    def read(self, name: str) -> Any:
        """What the op is given as this operand: a fake tensor, or a number or None as it is."""
        operand = self.operands[name]
        val = operand.value() if isinstance(operand, Operand) else operand
        val = value(val) if isinstance(val, Node) else val
        if name in VIEWED and self.like is not None and isinstance(val, torch.Tensor):
            return val.reshape(self.like.meta["val"].shape)
        return val

    def keywords(self, rounding: str) -> dict[str, Any]:
        """The keyword arguments of the op; rounding: "model" or "fp32"."""
        given: dict[str, Any] = {**self.options, **self.dtypes}
        if rounding == "fp32":
            given["rounding"] = "fp32"
            given |= {name: None for name in ("norm_dtype", "norm_dtype2") if name in given}
        return given

    def shaped(self) -> Node:
        """The node in whose shape the op runs."""
        return self.x if self.like is None else self.like

    def results(self) -> tuple[Node, ...]:
        return tuple(node for nodes in self.outputs for node in nodes)

    def nodes(self) -> tuple[Node, ...]:
        """Every node that goes away, in the graph's order."""
        return tuple(sorted({*self.interior, *self.results()}))

    def inputs(self) -> Iterator[Node]:
        """The nodes whose values the op reads."""
        for name in self.operands:
            node = self.source(name)
            if node is not None:
                yield node

    def sizes(self) -> list[Node]:
        """The nodes that hold the symbolic sizes of the views inside the site, or past which it is read."""
        views = [node for node in (*self.nodes(), *looked_through(self)) if is_call(node, *RESHAPES)]
        return [node for view in views for node in view.all_input_nodes if is_size(node)]

    def eps(self) -> list[Node]:
        """The eps that are tensors: all of the site's, or none."""
        return [eps for name, eps in self.operands.items() if "eps" in name and isinstance(eps, Node)]

    def op(self) -> torch._ops.OpOverload:
        packet = getattr(torch.ops.dit_kernels, self.kind)
        return packet.eps_tensor if self.eps() else packet.default

    def gate(self) -> str | None:
        gate = self.operands.get("gate")
        return None if not isinstance(gate, Operand) else "tanh" if gate.activated else "given"

    def scale(self) -> str | None:
        scale = self.operands.get("scale")
        return None if not isinstance(scale, Operand) else "one_plus" if scale.activated else "given"


def choose_form(
    anchor: Node, kind: str, norm_dtypes: Iterable[torch.dtype], fits: Callable[[str, torch.dtype | None], bool]
) -> Form:
    """The first form of the contract whose steps are those of the site. Raises Refused where there is none."""
    candidates = (None, *dict.fromkeys(norm_dtypes))
    for rounding in MODEL_FORMS:
        for norm_dtype in candidates:
            if fits(rounding, norm_dtype):
                return Form(rounding, norm_dtype)
    raise Refused(Reason.ROUNDING, anchor, kind=kind)


def operand_dtype(operand: Node | Operand | None) -> torch.dtype | None:
    """The dtype with which an operand takes part in promotion."""
    node = operand.source if isinstance(operand, Operand) else operand
    val = None if node is None else value(node)
    return None if val is None else val.dtype


def promoting_dtype(operand: Operand) -> torch.dtype | None:
    """The same for a gate or a scale: none where it is 0-d, and so does not promote."""
    val = value(operand.source)
    return None if val is None or val.ndim == 0 else val.dtype


def applied_dtype(operand: Operand, out: torch.dtype, kind: str) -> torch.dtype:
    """The dtype that a gate or a scale is rounded to where it enters the product with a norm of dtype `out`.

    A 0-d one does not promote, and of another dtype it is a chain of its own: Refused.
    """
    applied = operand_dtype(operand.applied)
    if applied is None or (promoting_dtype(operand) is None and applied != out):
        raise Refused(Reason.ROUNDING, operand.applied, "no tensor, or a 0-d operand of another dtype", kind)
    return applied


def check_operands(operands: Operands, kind: str) -> None:
    """Raises Refused unless these are tensors that the ops take."""
    sources = {name: o.source if isinstance(o, Operand) else o for name, o in operands.items()}
    first = next(iter(sources.values()))
    for name, node in sources.items():
        if "eps" in name or not isinstance(node, Node):
            continue
        val, like = value(node), value(first) if isinstance(first, Node) else None
        if val is None or like is None or type(val) not in PLAIN_TENSORS or val.layout != torch.strided:
            raise Refused(Reason.DTYPE, node, "not a plain tensor", kind)
        if val.dtype not in (ROTATIONS if name == "rotation" else KERNEL_DTYPES):
            raise Refused(Reason.DTYPE, node, str(val.dtype), kind)
        if val.device != like.device:
            raise Refused(Reason.DEVICE, node, f"{val.device}, {next(iter(operands))} on {like.device}", kind)


# --- the proof --------------------------------------------------------------------------------------------------------


def prove(site: Site, graph: Graph, sums: bool) -> None:
    """Raises Refused unless the op computes what the site's nodes compute, wherever they are read.

    sums: to the last bit of a sum over a row, too, as a CPU adds it? A kernel adds in an order of its own.
    """
    _prove_shapes(site)
    _prove_layout(site, graph, sums)
    _prove_closed(site)
    _prove_order(site)
    _prove_undisturbed(site)


def _prove_shapes(site: Site) -> None:
    """What the op needs in another shape can be given that shape."""
    like = value(site.shaped())
    if like is None or like.ndim < 2:
        raise Refused(Reason.SHAPE, site.shaped(), kind=site.kind)
    if site.like is None:
        return
    shapes = [val for node in (site.x, site.like, *site.results()) if (val := value(node)) is not None]
    if not all(same_shape(shape, shapes[0]) for shape in shapes):
        for shape in shapes:
            if [_where(size, site) for size in shape.shape].count(None) > 1:
                raise Refused(Reason.SHAPE, site.like, f"no node of the graph holds a size of {shape.shape}", site.kind)


def _where(size: int | torch.SymInt, site: Site) -> int | Node | tuple[Node, int] | None:
    """A symbolic size stands among the arguments of a view, or is one of an operand; None where it is neither."""
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


def _prove_layout(site: Site, graph: Graph, sums: bool) -> None:
    """The results are contiguous. Where the graph's were not, all that reads them may have another layout now, which
    as_strided can tell; and a sum over rows, in its last bit, if these lay apart. So can the op, of what it norms.

    What is no row of a residual stream lies otherwise for a reason, as images do between convolutions.
    """
    if sums or "norm" not in site.options:
        for node in site.results():
            if not lies_in_rows(node):
                raise Refused(Reason.LAYOUT, node, kind=site.kind)
        for name in ("x", "q", "k"):
            source = site.source(name)
            if source is not None and not lies_in_rows(source) and _is_copied(site, name):
                raise Refused(Reason.LAYOUT, source, kind=site.kind)
    if sums:
        _prove_order_of_rows(site)
    by_layout = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default)
    strided = [node for target in by_layout for node in graph.find_nodes(op="call_function", target=target)]
    if strided and (site.swapped or not all(_is_contiguous(node) for node in site.results())):
        raise Refused(Reason.LAYOUT, strided[0], kind=site.kind)


def _prove_order_of_rows(site: Site) -> None:
    """The op computes with heads and tokens in the order of its operands, whatever that was in the graph; what rounds
    otherwise for it on a CPU."""
    if site.swapped_norms and site.options["rounding"] == "native":
        raise Refused(Reason.LAYOUT, site.anchor, "means of 16 bits, heads first", site.kind)
    for name, node, heads_first in site.turned:
        # A complex product is rounded otherwise in a CPU's vectors of numbers than in what is left behind them, and how
        # many rows it takes for one depends on how they lie.
        val = node.meta["val"].transpose(1, 2) if heads_first else node.meta["val"]
        if val.shape[-1] % VECTOR and in_memory(val) != in_memory(site.read(name)):
            raise Refused(Reason.LAYOUT, node, "a complex product, which a CPU rounds by the layout", site.kind)


def _is_copied(site: Site, name: str) -> bool:
    """Of an operand whose rows lie apart: does the op read a copy, as its view into another shape may be? F.layer_norm
    copies such rows itself."""
    return are_rows(site.read(name)) and site.options.get("norm") != "layer"


def _is_contiguous(node: Node) -> bool:
    val = value(node)
    expected: Any = 1
    for size, stride in reversed(list(zip(val.shape, val.stride(), strict=True)) if val is not None else []):
        if not known_equal(size, 1) and not known_equal(stride, expected):
            return False
        expected = expected * size
    return val is not None


def _prove_closed(site: Site) -> None:
    inside = set(site.nodes())
    for node in site.interior:
        for user in node.users:
            if user not in inside:
                raise Refused(Reason.ESCAPES, node, f"read by {user.name}", site.kind)


def _prove_order(site: Site) -> None:
    """The op stands in one place: nothing that it reads may be computed from what it returns."""
    late = depends_on((*site.inputs(), *site.sizes()), {*site.results(), *site.interior})
    if late is not None:
        raise Refused(Reason.ORDER, late, kind=site.kind)


def _prove_undisturbed(site: Site) -> None:
    """No mutation and no switch of streams between any two nodes of the site, or between them and a read of theirs."""
    first, *rest = site.nodes()
    for node in (*rest, *looked_through(site)):
        if region(node) != region(first):
            raise Refused(Reason.MUTATION, node, kind=site.kind)


def looked_through(site: Site) -> list[Node]:
    """The nodes between the op's inputs and the site's own: casts and views that the op reads past."""
    known = {*site.nodes(), *site.inputs(), *site.twins}
    between: list[Node] = []
    pending = [source for node in site.nodes() for source in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in known and node.op == "call_function" and not is_size(node):
            known.add(node)
            between.append(node)
            pending.extend(node.all_input_nodes)
    return between


# --- the rewrite ------------------------------------------------------------------------------------------------------


def rewrite(site: Site, graph: Graph, rounding: str) -> Node:
    """Replaces a proven site by a call of its op. `rounding` is "model" or "fp32". Gives the node of the call."""
    with graph.inserting_before(_place(site)):
        call = _insert_call(site, graph, rounding)
        results = [call] if len(site.outputs) == 1 else _insert_getitems(site, graph, call)
        results = [_viewed_back(graph, *pair, site) for pair in zip(results, site.outputs, strict=True)]
    for nodes, result in zip(site.outputs, results, strict=True):
        for node in nodes:
            node.replace_all_uses_with(result)
    _erase(site, graph)
    return call


def _place(site: Site) -> Node:
    """The first node of the site behind all that the op reads: inside the site, so in its mutation region."""
    inputs = [*site.inputs(), *site.sizes()]
    return next(node for node in site.nodes() if all(read < node for read in inputs))


def _insert_call(site: Site, graph: Graph, rounding: str) -> Node:
    args: list[Any] = []
    kwargs = site.keywords(rounding)
    for argument in site.op()._schema.arguments:
        if not argument.kwarg_only:
            operand = site.operands[argument.name]
            if isinstance(operand, Operand):
                operand = operand.materialise(graph)
            elif argument.name in VIEWED and site.like is not None:
                operand = _viewed(graph, operand, site.like, site)
            args.append(operand)
    call = graph.call_function(site.op(), tuple(args), kwargs)
    origin = site.outputs[0][0]
    call.meta.update({k: v for k, v in origin.meta.items() if k in ORIGIN})
    vals = tuple(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args)
    call.meta["eager_input_vals"] = (vals, kwargs)
    results = tuple(_fresh(nodes[0], site) for nodes in site.outputs)
    call.meta["val"] = results if len(results) > 1 else results[0]
    return call


def _fresh(node: Node, site: Site) -> torch.Tensor:
    """The fake result of the op that replaces `node`: contiguous, with the sizes that the graph knows already."""
    val = value(node)
    assert val is not None
    shape = val.transpose(1, 2).shape if site.swapped else val.shape
    return val.new_empty(shape if site.like is None else site.like.meta["val"].shape)


def _viewed_back(graph: Graph, result: Node, replaced: tuple[Node, ...], site: Site) -> Node:
    """A result of the op in the shape of the nodes that it replaces."""
    if site.swapped:
        return view_of(result, SWAP, graph)
    return result if site.like is None else _viewed(graph, result, replaced[0], site)


def _viewed(graph: Graph, node: Any, like: Node, site: Site) -> Node:
    """`node` in the shape of `like`."""
    val, shape = value(node), value(like)
    assert val is not None and shape is not None
    if same_shape(val, shape):
        return node
    view = graph.call_function(aten.reshape.default, (node, [_size(graph, size, site) for size in shape.shape]))
    view.meta = {k: v for k, v in like.meta.items() if k in ORIGIN}
    view.meta["val"] = val.reshape(shape.shape)
    return view


def _size(graph: Graph, size: int | torch.SymInt, site: Site) -> int | Node:
    found = _where(size, site)
    if found is None:
        return -1  # as the others are known
    if not isinstance(found, tuple):
        return found
    node = graph.call_function(aten.sym_size.int, found)
    node.meta["val"] = size
    return node


def _insert_getitems(site: Site, graph: Graph, call: Node) -> list[Node]:
    results = []
    for index, nodes in enumerate(site.outputs):
        item = graph.call_function(operator.getitem, (call, index))
        item.meta = {k: v for k, v in nodes[0].meta.items() if k in ORIGIN}
        item.meta["val"] = call.meta["val"][index]
        results.append(item)
    return results


def _erase(site: Site, graph: Graph) -> None:
    """The site's nodes, and what is dead without them: casts, views and expansions of its operands."""
    pending = list(reversed(site.nodes()))
    while pending:
        node = pending.pop(0)
        if node._erased or node.users:
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        pending += [n for n in inputs if not n.users and is_call(n, *_PURE)]


_PURE = (
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.select.int,
    *RESHAPES,
)
