"""An op as compiled code calls it: past PyTorch's dispatcher, with nothing to find out, into results that it is given.

A call through the dispatcher costs the host more than the GPU works on a short sequence: see benchmarks/NOTES.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_kernels import ops, tickets
from dit_kernels.calls.norm_gate import launch_numbers as launch_numbers  # noqa: PLC0414

WITH_OFFSET = ("x", "gate", "residual", "scale")  # the operands that models cut out of larger tensors


class DirectCall:
    """One call of an op in compiled code, which is to say

        call(x, .., z, numbers) or call.checked(x, .., z)

    op: the name of the op; options: its keyword arguments. offsets: of the names WITH_OFFSET, the bytes by which an
    operand of `__call__` lies behind the tensor that is given for it; `checked` is given the operands themselves. From
    one time to the next, addresses, eps, and sizes and strides but those of 1 may change; dtypes and D may not.
    """

    def __init__(self, op: str, offsets: dict[str, int], **options: Any) -> None:
        self.op, self.options = op, options
        self.offsets = tuple(offsets.get(name, 0) for name in WITH_OFFSET)
        self.function: Any = None  # the kernel, for operands that are aligned
        self.device, self.processors = -1, 0

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        residual: Tensor | None,
        eps: float,
        weight2: Tensor | None,
        bias2: Tensor | None,
        scale: Tensor | None,
        eps2: float,
        y: Tensor | None,
        z: Tensor | None,
        numbers: tuple[int, ...],
    ) -> bool:
        """Launches the kernel, which writes y and z, and is true; false where that is not known to be right.

        numbers: the `launch_numbers` of the operands, of which every stride is a multiple of 16 bytes. y and z are
        contiguous. The device of x is the current one.
        """
        by_x, by_gate, by_residual, by_scale = self.offsets
        at_x = x.data_ptr() + by_x
        at_weight = None if weight is None else weight.data_ptr()
        at_bias = None if bias is None else bias.data_ptr()
        at_gate = None if gate is None else gate.data_ptr() + by_gate
        at_residual = None if residual is None else residual.data_ptr() + by_residual
        at_weight2 = None if weight2 is None else weight2.data_ptr()
        at_bias2 = None if bias2 is None else bias2.data_ptr()
        at_scale = None if scale is None else scale.data_ptr() + by_scale
        at_y = None if y is None else y.data_ptr()
        at_z = None if z is None else z.data_ptr()
        bits = at_x | (at_weight or 0) | (at_bias or 0) | (at_gate or 0) | (at_residual or 0) | (at_weight2 or 0)
        bits |= (at_bias2 or 0) | (at_scale or 0) | (at_y or 0) | (at_z or 0)
        if self.function is None or bits % ops.ALIGNMENT or not numbers[0] * numbers[1]:
            return False
        given = at_x, at_weight, at_bias, at_gate, at_residual, eps, at_weight2, at_bias2, at_scale, eps2, at_y, at_z
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        counters = tickets.address(self.device, stream, numbers[0])
        self.function(*given, *numbers, self.processors, counters, stream)
        return True

    def checked(self, *operands: Any) -> None:
        """The same call with everything looked at; keeps the kernel for calls with operands that are aligned."""
        x, weight, bias, gate, residual, eps, weight2, bias2, scale, eps2, y, z = operands
        args = {
            "norm_tanh_mul_add": (x, weight, bias, gate, residual, eps),
            "norm_tanh_mul_add_norm_scale": (x, weight, bias, gate, residual, eps, weight2, bias2, scale, eps2),
            "norm_scale": (x, weight, bias, scale, eps),
        }[self.op]
        call = ops.checked_call(getattr(torch.ops.dit_kernels, self.op).default, *args, **self.options)
        results = tuple(t for t in (y, z) if t is not None)
        ops.run_into(call, results)
        tensors = [t for t in operands if isinstance(t, Tensor)]
        if ops.has_kernel(call) and x.numel() and not any(t.data_ptr() % ops.ALIGNMENT for t in tensors):
            self.device = x.get_device()
            function, (self.processors,) = ops.kernel_of(call, results)
            self.function = function  # last: another thread may be in __call__
