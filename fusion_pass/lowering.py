"""How Inductor's code calls the ops: by dit_kernels.direct instead of the dispatcher, into buffers that Inductor plans.

A result that is only joined with other tensors is written into its part of the joined tensor, without a copy.

dit_kernels.direct takes no calls from a C++ wrapper and none with unusual shapes or strides. Those go through the
dispatcher, like calls of any custom op. So does a call by hand under plain Inductor: the emitted code fits one version
of dit_kernels.direct, and only our pass in the hook makes that version part of the key of Inductor's caches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import empty_strided, fallback_handler, register_lowering
from torch._inductor.virtualized import V
from torch.fx import Node

from dit_kernels.arguments import ALIGNMENT, Argument, Layout
from dit_kernels.families import OPS, op_of
from dit_kernels.families.family import Op
from fusion_pass.dataflow import is_joined, stream
from fusion_pass.hook import holds_ours

log = logging.getLogger("fusion_pass")


class Unusual(Exception):
    """Raised for a call that goes through the dispatcher, with the reason."""


class DirectKernel(ir.ExternKernel):
    """A call of an op that writes into buffers which Inductor has allocated.

    layouts: those in which a kernel takes the operands, by the names of the family.
    """

    def __init__(
        self,
        op: torch._ops.OpOverload,
        operands: dict[str, Any],
        options: dict[str, Any],
        layouts: dict[str, Layout],
        results: Sequence[Any],
    ) -> None:
        nodes = {name: _stored(t) for name, t in operands.items() if _is_tensor(t)}
        self.results = [_stored(result) for result in results]
        device = self.results[0].get_device()
        self.op, self.options, self.device, self.layouts = op, options, device, layouts
        super().__init__(
            None, ir.NoneLayout(device=device), [*nodes.values(), *self.results], constant_args=self._numbers()
        )
        self.operands: dict[str, Any] = {**operands, **nodes}
        self.mutation_outputs = [ir.MutationOutput(ir.NoneLayout(device=device), t, self) for t in self.results]
        V.graph.register_operation(self)

    def get_outputs(self) -> list[ir.Buffer]:
        return list(self.mutation_outputs)

    def get_device(self) -> torch.device | None:
        return self.device

    def should_allocate(self) -> bool:
        return False

    def _numbers(self) -> tuple[Any, ...]:
        """The family's launch numbers, as expressions. Raises Unusual if a kernel does not take a result as it is."""
        op = op_of(self.op)
        first = next(iter(self.layouts.values())).shape
        results = zip(op.results, self.results, strict=True)
        written = {argument.name: _laid(argument, t, first) for argument, t in results if argument.strides}
        return op.family.launch_numbers(self.layouts | written, _known)

    def codegen(self, wrapper: Any) -> None:
        name = f"dit_kernel_{wrapper.next_kernel_suffix()}"
        given = [*self.operands.values(), *self.results]
        op = op_of(self.op)
        addresses = op.arranged([_address(value) for value in given])
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        wrapper.add_import_once("from dit_kernels.direct import DirectCall")
        # Without the emitted comment, graphs that differ only in dtypes would share one source, and so one DirectCall.
        types = ", ".join(str(node.get_dtype()) for node in (*self.inputs, *self.results))
        wrapper.header.writeline(f"{name} = DirectCall({op.name!r}{options})  # {types}")
        checked = f"{name}.checked({', '.join(map(_written, given))})"
        try:
            numbers = wrapper.codegen_shape_tuple(self._numbers())  # the lowering of a cat may have moved a result
        except Unusual as reason:
            log.debug("%s is checked at each call: %s", self.op, reason)
            wrapper.writeline(checked)
            return
        wrapper.writeline(f"if not {name}(({', '.join(map(str, addresses))}), {numbers}):")
        wrapper.writeline(f"    {checked}")


def _is_tensor(value: Any) -> bool:
    return value is not None and not isinstance(value, float)


def _address(value: Any) -> str:
    """The code for an operand that a kernel takes. To make a view takes the host as long as a launch, so the address of
    a view is written as a sum."""
    if not _is_tensor(value):
        return repr(value)
    if not isinstance(value, ir.ReinterpretView):
        return f"{value.codegen_reference()}.data_ptr()"
    buffer = value.data.data if isinstance(value.data, ir.StorageBox) else value.data
    offset = value.get_layout().offset
    plain = isinstance(buffer, ir.Buffer) and buffer.get_layout().offset == 0
    if not plain or buffer.get_dtype() != value.get_dtype() or not _static(offset):
        return f"{value.codegen_reference()}.data_ptr()"
    return f"{buffer.get_name()}.data_ptr() + {int(offset) * value.get_dtype().itemsize}"


def _written(value: Any) -> str:
    return value.codegen_reference() if isinstance(value, ir.IRNode) else repr(value)


def _stored(t: Any) -> Any:
    """The buffer, or the view of a buffer, that holds an operand in memory."""
    return ir.InputsKernel.unwrap_storage_for_input(ir.ExternKernel.realize_input(t))


def _call(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Adds a DirectKernel for a call of an op. Returns the results of the op. Raises Unusual."""
    if not holds_ours(config.post_grad_custom_pre_pass):
        raise Unusual("our version is not in the key of Inductor's caches")
    if V.graph.cpp_wrapper or getattr(V.graph, "fx_wrapper", False) or V.graph.aot_mode:
        raise Unusual("the wrapper is not Python code")
    if stream(V.graph.current_node):
        # Inductor allocates the buffers on the stream of the previous node; the dispatcher uses the stream of the call.
        raise Unusual("it does not run on the default stream")
    known = op_of(op)
    operands = {argument.name: value for argument, value in zip(known.inputs, known.filled(tuple(args)), strict=True)}
    if not all(isinstance(operands[a.name], float) for a in known.inputs if not a.is_tensor):
        raise Unusual("eps is not a constant")
    operands |= {name: _readable(_realized(t)) for name, t in operands.items() if _is_tensor(t)}
    layouts = _layouts(known, operands)
    device = operands[known.inputs[0].name].get_device()
    results = [
        _empty(argument, node, val, device)
        for argument, (node, val) in zip(known.results, _results(V.graph.current_node), strict=True)
    ]
    DirectKernel(op, operands, kwargs, layouts, results)
    return results if len(results) > 1 else results[0]


def _results(call: Node) -> list[tuple[Node | None, torch.Tensor]]:
    """Each result of a call: the node that holds the result, or None if nothing reads it, and its fake tensor."""
    val = call.meta["val"]
    if isinstance(val, torch.Tensor):
        return [(call, val)]
    items = {user.args[1]: user for user in call.users}
    return [(items.get(index), one) for index, one in enumerate(val)]


def _empty(argument: Argument, node: Node | None, val: torch.Tensor, device: torch.device) -> Any:
    """A buffer for a result of an op.

    If a concatenation is the only reader, the layout stays open. Inductor's lowering of `cat` then makes the buffer a
    part of the joined tensor, as it does with the buffers of its own kernels.
    """
    result = empty_strided(ir.convert_shape_to_inductor(val.shape), None, dtype=val.dtype, device=device)
    if argument.strides and node is not None and is_joined(node):
        buffer = result.data.data
        buffer.layout = ir.FlexibleLayout(device, val.dtype, buffer.layout.size)
    return result


def _realized(t: Any) -> Any:
    """The operand in memory, with fixed strides."""
    t = ir.ExternKernel.realize_input(t)
    if isinstance(t.get_layout(), ir.FlexibleLayout):
        t.freeze_layout()
    return t


def _readable(t: Any) -> Any:
    """An operand in memory, copied if the elements of its rows lie apart, as a convolution leaves them. No kernel takes
    such rows. PyTorch's own copy of them, which a call through the dispatcher makes, takes several times as long."""
    sizes, strides = t.get_size(), t.get_stride()
    apart = sizes and not _known(sizes[-1], 1) and V.graph.sizevars.statically_known_gt(strides[-1], 1)
    return _realized(ir.ExternKernel.copy_input(t)) if apart and not _sums_as_they_lie(t.get_device()) else t


def _sums_as_they_lie(device: torch.device) -> bool:
    """Do the ops of this device sum elements that lie apart in another order than those of a copy?"""
    return device.type == "cpu"


def _layouts(op: Op, operands: dict[str, Any]) -> dict[str, Layout]:
    """The layouts in which a kernel takes the operands. Raises Unusual if a kernel does not take one as it is."""
    sizes = operands[op.inputs[0].name].get_size()
    if not _static(sizes[-1]):
        raise Unusual("the width of the rows is not a constant")
    present = ((argument, operands[argument.name]) for argument in op.inputs)
    return {argument.name: _laid(argument, t, sizes) for argument, t in present if _is_tensor(t)}


def _laid(argument: Argument, t: Any, first: Sequence[Any]) -> Layout:
    """The layout in which a kernel takes an operand. Raises Unusual unless it is known that every row is aligned, and
    which dimensions have size 1. first: the sizes of the op's first operand."""
    found = argument.role.laid(t.get_size(), t.get_stride(), first, _known)
    if found is None:
        raise Unusual(f"a kernel needs a copy of {argument.name}")
    shape, strides = found
    if not _static(shape[-1]):
        raise Unusual(f"the width of the rows of {argument.name} is not a constant")
    if len(shape) == 4 and not _static(shape[2]):
        raise Unusual(f"the number of heads of {argument.name} is not a constant")
    for size, by in zip(shape[:-1], strides[:-1], strict=True):
        if _known(size, 1):
            continue
        if not V.graph.sizevars.statically_known_gt(size, 1):
            raise Unusual(f"it is not known whether {argument.name} is broadcast")
        if not _known((by * t.get_dtype().itemsize) % ALIGNMENT, 0):
            raise Unusual(f"the rows of {argument.name} are not known to be aligned")
    return Layout(t.get_dtype(), tuple(shape), tuple(strides))


def _known(a: Any, b: Any) -> bool:
    return bool(V.graph.sizevars.statically_known_equals(a, b))


def _static(size: Any) -> bool:
    return isinstance(size, int) or bool(getattr(size, "is_number", False))


def _register(op: torch._ops.OpOverload) -> Callable[..., Any]:
    through_dispatcher = fallback_handler(op, add_to_fallback_set=False)

    @register_lowering(op, type_promotion_kind=None)
    def lower(*args: Any, **kwargs: Any) -> Any:
        try:
            return _call(op, args, kwargs)
        except Unusual as reason:
            log.debug("%s goes through the dispatcher: %s", op, reason)
        except Exception as error:  # Inductor's internals may have changed: the op still works as a custom op
            log.warning("fusion_pass: %s goes through the dispatcher: %s: %s", op, type(error).__name__, error)
        return through_dispatcher(*args, **kwargs)

    return lower


for _op in OPS.values():
    _register(_op.overload())
