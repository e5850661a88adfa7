"""An op as compiled code calls it: past PyTorch's dispatcher, with nothing to find out, into results that it is given.

A call through the dispatcher costs the host more than the GPU works on a short sequence: see benchmarks/NOTES.md.
"""

from __future__ import annotations

from functools import reduce
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor

from dit_kernels import ops


class DirectCall:
    """One call of an op in compiled code, which is to say

        call((addresses, eps and None of the kernel's arguments), numbers) or call.checked(*operands, *results)

    op: the name of the op, whose `arguments` (dit_kernels.ops.OPS) name operands and results, and whose family's name
    those of the kernel; options: its keyword arguments. From one time to the next, addresses, eps, and sizes and
    strides but those of 1 may change; dtypes, the last dimension and numbers of heads may not.
    """

    def __init__(self, op: str, **options: Any) -> None:
        self.op, self.options = op, options
        self.of_launch = ops.OPS[op].family.of_launch
        self.function: Any = None  # the kernel, for operands that are aligned
        self.device = -1
        self.tensors: Any = None  # gives those of the kernel's arguments that are tensors

    def __call__(self, given: tuple[Any, ...], numbers: tuple[int, ...]) -> bool:
        """Launches the kernel, which writes the results, and is true; false where that is not known to be right.

        numbers: the family's launch numbers of the operands, of which every stride is a multiple of 16 bytes. Results
        are contiguous. The device of the operands is the current one.
        """
        if self.function is None or not numbers[0] * numbers[1] or reduce(or_, self.tensors(given)) % ops.ALIGNMENT:
            return False
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        self.function(*given, *numbers, *self.of_launch(self.device, stream, numbers[0]), stream)
        return True

    def checked(self, *given: Any) -> None:
        """The same call with everything looked at; keeps the kernel for calls with operands that are aligned."""
        op = ops.OPS[self.op]
        results = given[len(given) - sum(name in op.family.results for name in op.arguments) :]
        call = op.make_call(*given[: len(given) - len(results)], **self.options)
        ops.run_into(call, results)
        aligned = not any(t.data_ptr() % ops.ALIGNMENT for t in given if isinstance(t, Tensor))
        if ops.has_kernel(call) and aligned and any(result.numel() for result in results):
            self.device = results[0].get_device()
            self.tensors = itemgetter(*(i for i, t in enumerate(op.arranged(given)) if isinstance(t, Tensor)))
            self.function = ops.kernel_of(call, results)  # last: another thread may be in __call__
