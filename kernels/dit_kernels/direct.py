"""An op as compiled code calls it: past PyTorch's dispatcher, with nothing to find out, into results that it is given.

A call through the dispatcher costs the host more than the GPU works on a short sequence: see benchmarks/NOTES.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_kernels import ops


class DirectCall:
    """One call of an op in compiled code, which is to say

        call(*operands, *results, numbers) or call.checked(*operands, *results)

    op: the name of the op, whose `arguments` (dit_kernels.ops.OPS) name operands and results; options: its keyword
    arguments. offsets: by these names, the bytes by which an operand of `__call__` lies behind the tensor that is given
    for it; `checked` is given the operands themselves. From one time to the next, addresses, eps, and sizes and strides
    but those of 1 may change; dtypes, the last dimension and numbers of heads may not.
    """

    def __init__(self, op: str, offsets: dict[str, int], **options: Any) -> None:
        self.op, self.options = op, options
        self.offsets = tuple(offsets.get(name, 0) for name in ops.OPS[op].arguments)
        self.arranged, self.of_launch = ops.OPS[op].arranged, ops.OPS[op].family.of_launch
        self.function: Any = None  # the kernel, for operands that are aligned
        self.device = -1

    def __call__(self, *given: Any) -> bool:
        """Launches the kernel, which writes the results, and is true; false where that is not known to be right.

        numbers: the family's launch numbers of the operands, of which every stride is a multiple of 16 bytes. Results
        are contiguous. The device of the operands is the current one.
        """
        numbers, bits, addresses = given[-1], 0, []
        for t, offset in zip(given, self.offsets, strict=False):
            if t is not None and t.__class__ is not float:
                t = t.data_ptr() + offset
                bits |= t
            addresses.append(t)
        if self.function is None or bits % ops.ALIGNMENT or not numbers[0] * numbers[1]:
            return False
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        of_launch = self.of_launch(self.device, stream, numbers[0])
        self.function(*self.arranged(addresses), *numbers, *of_launch, stream)
        return True

    def checked(self, *given: Any) -> None:
        """The same call with everything looked at; keeps the kernel for calls with operands that are aligned."""
        op = ops.OPS[self.op]
        of_results = [name in op.family.results for name in op.arguments]
        results = tuple(t for t, is_result in zip(given, of_results, strict=True) if is_result)
        call = op.make_call(*given[: len(given) - len(results)], **self.options)
        ops.run_into(call, results)
        tensors = [t for t in given if isinstance(t, Tensor)]
        aligned = not any(t.data_ptr() % ops.ALIGNMENT for t in tensors)
        if ops.has_kernel(call) and aligned and any(result.numel() for result in results):
            self.device = results[0].get_device()
            self.function = ops.kernel_of(call, results)  # last: another thread may be in __call__
