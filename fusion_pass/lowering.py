"""How Inductor calls the ops: by dit_kernels.direct instead of the dispatcher, into buffers that it plans itself.

What this does not know to be right (C++ wrappers, unusual shapes and strides) is called as any custom op is. So are ops
that are called by hand under plain Inductor: the code that is emitted here fits one version of dit_kernels.direct, and
only our pass in the hook makes that version part of the key of Inductor's caches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import empty_strided, fallback_handler, register_lowering
from torch._inductor.virtualized import V

from dit_kernels.calls import norm_gate, norm_rope, silu_mul
from dit_kernels.calls.call import Family
from dit_kernels.ops import ALIGNMENT, OPS
from fusion_pass.dataflow import stream

log = logging.getLogger("fusion_pass")


class Unusual(Exception):
    """A call that goes through the dispatcher, and why."""


@dataclass(frozen=True)
class _Rows:
    """The shape and the strides of an operand as a kernel takes it, as launch numbers are read off them."""

    shape: tuple[Any, ...]
    strides: tuple[Any, ...]

    def stride(self) -> tuple[Any, ...]:
        return self.strides


class DirectKernel(ir.ExternKernel):
    """A call of an op that writes into buffers which Inductor has allocated."""

    def __init__(
        self,
        op: torch._ops.OpOverload,
        operands: dict[str, Any],
        options: dict[str, Any],
        numbers: Sequence[Any],
        results: Sequence[Any],
    ) -> None:
        nodes = {name: _stored(t) for name, t in operands.items() if _is_tensor(t)}
        self.results = [_stored(result) for result in results]
        device = self.results[0].get_device()
        super().__init__(
            None, ir.NoneLayout(device=device), [*nodes.values(), *self.results], constant_args=tuple(numbers)
        )
        self.op, self.options, self.device = op, options, device
        self.operands: dict[str, Any] = {**operands, **nodes}
        self.mutation_outputs = [ir.MutationOutput(ir.NoneLayout(device=device), t, self) for t in self.results]
        V.graph.register_operation(self)

    def get_outputs(self) -> list[ir.Buffer]:
        return list(self.mutation_outputs)

    def get_device(self) -> torch.device | None:
        return self.device

    def should_allocate(self) -> bool:
        return False

    def codegen(self, wrapper: Any) -> None:
        name = f"dit_kernel_{wrapper.next_kernel_suffix()}"
        given = [*self.operands.values(), *self.results]
        addresses = OPS[self.op._opname].arranged([_address(value) for value in given])
        numbers = wrapper.codegen_shape_tuple(self.constant_args)
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        wrapper.add_import_once("from dit_kernels.direct import DirectCall")
        # The comment keeps graphs that differ in dtypes alone from sharing one source, and with it one DirectCall.
        types = ", ".join(str(node.get_dtype()) for node in (*self.inputs, *self.results))
        wrapper.header.writeline(f"{name} = DirectCall({self.op._opname!r}{options})  # {types}")
        wrapper.writeline(f"if not {name}(({', '.join(map(str, addresses))}), {numbers}):")
        wrapper.writeline(f"    {name}.checked({', '.join(map(_written, given))})")


def _is_tensor(value: Any) -> bool:
    return value is not None and not isinstance(value, float)


def _address(value: Any) -> str:
    """An operand as a kernel takes it. A view costs the host as much to make as a launch; its address is a sum."""
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
    """The buffer or view in memory that an operand is."""
    return ir.InputsKernel.unwrap_storage_for_input(ir.ExternKernel.realize_input(t))


def _call(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The op's results, to be computed by a DirectKernel. Raises Unusual."""
    from fusion_pass.hook import holds_ours  # which imports the pass, which imports this

    if not holds_ours(config.post_grad_custom_pre_pass):
        raise Unusual("Inductor's caches do not know our version")
    if V.graph.cpp_wrapper or getattr(V.graph, "fx_wrapper", False) or V.graph.aot_mode:
        raise Unusual("the wrapper is no Python code")
    if stream(V.graph.current_node):
        # Inductor allocates buffers in the stream of the node before; the dispatcher in that of the call.
        raise Unusual("it runs on a stream of its own")
    arguments, family = OPS[op._opname].arguments, OPS[op._opname].family
    operands = dict(zip(arguments, args, strict=False))
    if not all(isinstance(value, float) for name, value in operands.items() if "eps" in name):
        raise Unusual("eps is no constant")
    operands |= {name: _realized(t) for name, t in operands.items() if _is_tensor(t)}
    numbers = _numbers(family, operands)
    vals = V.graph.current_node.meta["val"]
    like = [operands[family.results[name]] for name in arguments if name in family.results]
    results = [
        empty_strided(x.get_size(), None, dtype=val.dtype, device=x.get_device())
        for x, val in zip(like, vals if isinstance(vals, tuple | list) else [vals], strict=True)
    ]
    DirectKernel(op, operands, kwargs, numbers, results)
    return results if len(results) > 1 else results[0]


def _realized(t: Any) -> Any:
    """The operand in memory, with strides that stay."""
    t = ir.ExternKernel.realize_input(t)
    if isinstance(t.get_layout(), ir.FlexibleLayout):
        t.freeze_layout()
    return t


def _numbers(family: Family, operands: dict[str, Any]) -> tuple[Any, ...]:
    """The family's launch numbers, as expressions. Raises Unusual for what a kernel does not take as it is."""
    for name, t in operands.items():
        if _is_tensor(t) and len(t.get_size()) == 1 and not _known(t.get_stride()[0], 1):
            raise Unusual(f"{name} is not contiguous")
    return family.launch_numbers(_VIEWS[family](operands))


def _views_of_rows(operands: dict[str, Any]) -> dict[str, _Rows | None]:
    """Of norms and of silu_mul: each operand as (B, S, D), the first one as it is."""
    first = next(iter(operands.values()))
    d = first.get_size()[-1]
    if not 2 <= len(first.get_size()) <= 3 or not _static(d):
        raise Unusual("the first operand is not [B, S, D] with a constant D")
    names = ("x", "residual", "gate", "scale", "a", "b")
    return {name: _rows(name, operands.get(name), d) for name in names}


def _views_of_heads(operands: dict[str, Any]) -> dict[str, _Rows]:
    """q and k as (B, S, H, D); the rotation as (B, S, n)."""
    tokens = operands["q"].get_size()[1]
    present = {name: t for name, t in operands.items() if t is not None}
    heads = {name: _aligned(name, present[name].get_size(), present[name]) for name in ("q", "k") if name in present}
    return heads | {name: _rotation(present[name], name, tokens) for name in ("rotation", "sin") if name in present}


def _rotation(t: Any, name: str, tokens: Any) -> _Rows:
    """[S, n], [1|B, S, n] or [S, 1, n], [1|B, S, 1, n] as (1|B, S, n)."""
    shape, strides = list(t.get_size()), list(t.get_stride())
    if len(shape) == 4 or (len(shape) == 3 and not _known(shape[1], tokens)):
        del shape[-2], strides[-2]
    shape, strides = [1] * (3 - len(shape)) + shape, [0] * (3 - len(strides)) + strides
    return _aligned(name, shape, t, strides)


def _aligned(name: str, shape: Sequence[Any], t: Any, strides: Sequence[Any] | None = None) -> _Rows:
    """Raises Unusual unless every row is known to be aligned, and which dimensions are 1."""
    shape, strides = list(shape), list(t.get_stride() if strides is None else strides)
    if not _known(strides[-1], 1):
        raise Unusual(f"the last dimension of {name} has a stride")
    for i, (size, by) in enumerate(zip(shape[:-1], strides[:-1], strict=True)):
        if _known(size, 1):
            shape[i] = 1
        elif not V.graph.sizevars.statically_known_gt(size, 1):
            raise Unusual(f"whether {name} is broadcast is not known")
        elif not _known((by * t.get_dtype().itemsize) % ALIGNMENT, 0):
            raise Unusual(f"the rows of {name} are not aligned")
    return _Rows(tuple(shape), tuple(strides))


_VIEWS: dict[Family, Callable[[dict[str, Any]], Mapping[str, _Rows | None]]] = {
    norm_gate.FAMILY: _views_of_rows,
    norm_rope.FAMILY: _views_of_heads,
    silu_mul.FAMILY: _views_of_rows,
}


def _rows(name: str, t: Any, d: Any) -> _Rows | None:
    """An operand as (B, S, D), (1, 1, 1), or in between."""
    if t is None:
        return None
    shape, strides = list(t.get_size()), list(t.get_stride())
    if all(_known(size, 1) for size in shape):
        return _Rows((1, 1, 1), (0, 0, 1))
    shape, strides = [1] * (3 - len(shape)) + shape, [0] * (3 - len(shape)) + strides
    if len(shape) != 3 or not _known(shape[-1], d) or not _known(strides[-1], 1):
        raise Unusual(f"{name} is not [B, S, D]")
    return _aligned(name, shape, t, strides)


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
        except Exception as error:  # Inductor's innards may have changed: the op still works as any other does
            log.warning("fusion_pass: %s goes through the dispatcher: %s: %s", op, type(error).__name__, error)
        return through_dispatcher(*args, **kwargs)

    return lower


for _name in OPS:
    _register(getattr(torch.ops.dit_kernels, _name).default)
