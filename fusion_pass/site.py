"""A site: one place in a graph that a rewrite covers, and the call of an op that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from dit_kernels.arguments import (
    COMPLEX,
    EPS,
    KERNEL_DTYPES,
    MODULATION,
    PART,
    ROW,
    Argument,
    known_equal,
)
from dit_kernels.families import OPS
from dit_kernels.families.family import Op
from dit_kernels.rounding import FORMS
from fusion_pass.dataflow import RESHAPES, is_call, is_size, value
from fusion_pass.refusal import Reason, Refused

ORIGIN = ("stack_trace", "nn_module_stack", "custom")  # metadata that a new node copies from the node it replaces
MODEL_FORMS = tuple(form for form in FORMS if form != "fp32")
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, FakeTensor)  # a real tensor is a constant that Inductor has folded


# --- operands and outputs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A call that returns a view of its first argument."""

    target: Any
    args: tuple[Any, ...]

    def of(self, val: torch.Tensor) -> torch.Tensor:
        """This view of a fake tensor."""
        viewed: torch.Tensor = self.target(val, *map_arg(self.args, lambda node: node.meta["val"]))
        return viewed

    def insert(self, node: Node, graph: Graph) -> Node:
        """Inserts a node for this view of `node` at the graph's insertion point."""
        return self._made(node, graph)

    def _made(self, node: Node, graph: Graph) -> Node:
        made = graph.call_function(self.target, (node, *self.args))
        made.meta = {key: node.meta[key] for key in ORIGIN if key in node.meta}
        made.meta["val"] = self.of(node.meta["val"])
        return made


@dataclass(frozen=True)
class Operand:
    """`source` with `views` applied to it.

    absorbed: the nodes between the source and its use, whose computation the op takes over. activation: what these
    nodes compute, by its name in the report ("tanh", "one_plus"); None if the op applies the operand as it is.
    """

    source: Node
    views: tuple[View, ...] = ()
    absorbed: tuple[Node, ...] = ()
    activation: str | None = None

    @property
    def applied(self) -> Node:
        """The node whose value enters the product. If there is an activation, this is its result, even if the op
        computes the activation."""
        return self.absorbed[0] if self.absorbed else self.source

    def value(self) -> torch.Tensor | None:
        """The fake tensor that the op reads."""
        val = value(self.source)
        for view in self.views:
            val = val if val is None else view.of(val)
        return val

    def insert(self, graph: Graph) -> Node:
        """Inserts the views at the graph's insertion point. Returns the node that the op reads."""
        node = self.source
        for view in self.views:
            node = view.insert(node, graph)
        return node


Operands = dict[str, "Node | Operand | float | None"]


@dataclass(frozen=True)
class Output:
    """Nodes of one value that a result of the op replaces.

    swap: the nodes are this view of the result. It swaps dimensions, so that it leads from the nodes back, too.
    """

    nodes: tuple[Node, ...]
    swap: View | None = None


@dataclass(frozen=True)
class Form:
    """The rounding form that the casts of a site follow.

    name: one of dit_kernels.rounding.FORMS. dtypes: the options of the op that belong to the form, with their dtypes.
    """

    name: str
    dtypes: dict[str, torch.dtype | None]


# --- the site ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One place in a graph, and the call of an op that it becomes.

    kind: the name of the op. overload: the name of its overload; "" for the default one, and for one that differs only
    in how it takes eps. operands, options, form: the arguments of the op. interior: the nodes that the op replaces
    and that nothing else may read. anchor: the node that the site grew from. like: the node whose sizes the op uses, if
    there are views inside the site; rows are reshaped to these sizes, and results are reshaped from them. twins: nodes
    that the site reads and that have the same value as an operand. summed: operands whose rows eager sums in the memory
    layout that they have. takes_any_layout: may the elements of a row be apart in memory, as in a residual stream that
    comes from a convolution? check_sums: raises Refused if the rounding of eager, on a CPU, depends on an order of rows
    in memory that the op does not keep. remark: what the report should say about the site, or "". origin: the node
    whose place in the model the report shows; None: the first result.
    """

    kind: str
    operands: Operands
    options: dict[str, Any]
    form: Form
    outputs: tuple[Output, ...]
    interior: tuple[Node, ...]
    anchor: Node
    like: Node | None = None
    twins: tuple[Node, ...] = ()
    summed: tuple[str, ...] = ()
    takes_any_layout: bool = False
    check_sums: Callable[[Site], None] | None = None
    remark: str = ""
    origin: Node | None = None
    overload: str = ""

    def under(self, policy: str) -> Site:
        """The site with the rounding that the user wants. policy: "model", or "fp32" for one rounding at each
        output."""
        if policy == "model":
            return self
        return replace(self, form=Form(policy, dict.fromkeys(self.form.dtypes)), remark="")

    @property
    def op(self) -> Op:
        return OPS[f"{self.kind}.{self.overload}" if self.overload else self.kind]

    @property
    def roles(self) -> dict[str, Argument]:
        return self.op.roles

    @property
    def x(self) -> Node:
        """The first operand, which the report shows."""
        x = self.source(next(iter(self.roles)))
        assert x is not None
        return x

    def source(self, name: str) -> Node | None:
        """The node that this operand is read from. The op reads the value of this node, or a view of it."""
        operand = self.operands.get(name)
        return operand.source if isinstance(operand, Operand) else operand if isinstance(operand, Node) else None

    def is_viewed(self, name: str) -> bool:
        """Is this operand reshaped to the sizes of `like`?"""
        return self.like is not None and self.roles[name].role in (ROW, PART)

    def read(self, name: str) -> Any:
        """The value that the op gets for this operand: a fake tensor, a number or None."""
        operand = self.operands[name]
        val = operand.value() if isinstance(operand, Operand) else operand
        val = value(val) if isinstance(val, Node) else val
        if isinstance(val, float) and self.roles[name].is_tensor:  # the graph will hold the number as a tensor
            return self.x.meta["val"].new_empty((), dtype=torch.float32)
        if self.is_viewed(name) and isinstance(val, torch.Tensor):
            return val.reshape(self.row_shape(val))
        return val

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the op."""
        rounding = {"rounding": self.form.name} if self.op.has_rounding else {}
        return {**self.options, **rounding, **self.form.dtypes}

    def shaped(self) -> Node:
        """The node whose shape the op uses."""
        return self.x if self.like is None else self.like

    def row_shape(self, val: torch.Tensor) -> tuple[Any, ...]:
        """The shape of an operand or a result for the op: that of `like`, or with wider rows if they are wider."""
        like = self.shaped().meta["val"]
        same = known_equal(val.numel(), like.numel())
        return tuple(like.shape) if same else (*like.shape[:-1], val.shape[-1])

    def results(self) -> tuple[Node, ...]:
        return tuple(node for output in self.outputs for node in output.nodes)

    def nodes(self) -> tuple[Node, ...]:
        """Every node that goes away, in the order of the graph."""
        return tuple(sorted({*self.interior, *self.results()}))

    def inputs(self) -> Iterator[Node]:
        """The nodes whose values the op reads."""
        for name in self.operands:
            node = self.source(name)
            if node is not None:
                yield node
            operand = self.operands[name]
            views = operand.views if isinstance(operand, Operand) else ()
            yield from (arg for view in views for arg in view.args if isinstance(arg, Node) and value(arg) is not None)

    def sizes(self) -> list[Node]:
        """The nodes that hold the symbolic sizes of views: the views inside the site, and those in looked_through()."""
        views = [node for node in (*self.nodes(), *self.looked_through()) if is_call(node, *RESHAPES)]
        return [node for view in views for node in view.all_input_nodes if is_size(node)]

    def looked_through(self) -> list[Node]:
        """The nodes between the op's inputs and the site's own nodes: casts and views. The op reads the value before
        them."""
        known = {*self.nodes(), *self.inputs(), *self.twins}
        between: list[Node] = []
        pending = [source for node in self.nodes() for source in node.all_input_nodes]
        while pending:
            node = pending.pop()
            if node not in known and node.op == "call_function" and not is_size(node):
                known.add(node)
                between.append(node)
                pending.extend(node.all_input_nodes)
        return between

    def target(self) -> torch._ops.OpOverload:
        """What a node calls, to call the op."""
        eps = (self.operands[name] for name, argument in self.roles.items() if argument.role is EPS)
        return self.op.overload(any(isinstance(value, Node) for value in eps))

    def activations(self) -> dict[str, str]:
        """The activation that the op computes for each factor of the site: "tanh" or "one_plus"; "given" if it computes
        none."""
        factors = {name: self.operands[name] for name, argument in self.roles.items() if argument.role is MODULATION}
        return {name: o.activation or "given" for name, o in factors.items() if isinstance(o, Operand)}


# --- what kinds share -------------------------------------------------------------------------------------------------


def operand_dtype(operand: Node | Operand | None) -> torch.dtype | None:
    """The dtype that an operand has in type promotion."""
    node = operand.source if isinstance(operand, Operand) else operand
    val = None if node is None else value(node)
    return None if val is None else val.dtype


def check_operands(operands: Operands, kind: str) -> None:
    """Raises Refused unless the operands are tensors that the op takes."""
    roles = OPS[kind].roles
    sources = {name: Operand(o) if isinstance(o, Node) else o for name, o in operands.items()}
    first_name = next(iter(roles))
    first = sources[first_name]
    like = first.value() if isinstance(first, Operand) else None
    for name, argument in roles.items():
        operand = sources[name]
        if argument.role is EPS or not isinstance(operand, Operand):
            continue
        node, val = operand.source, operand.value()
        if val is None or like is None or type(val) not in PLAIN_TENSORS or val.layout != torch.strided:
            raise Refused(Reason.DTYPE, node, "not a plain tensor", kind)
        if val.dtype not in (*KERNEL_DTYPES, *(COMPLEX if argument.role.may_be_complex else ())):
            raise Refused(Reason.DTYPE, node, str(val.dtype), kind)
        if val.device != like.device:
            raise Refused(Reason.DEVICE, node, f"{val.device}, while {first_name} is on {like.device}", kind)
