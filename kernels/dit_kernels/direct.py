"""How compiled code calls an op: without PyTorch's dispatcher and without checks, into given results.

On a short sequence, a call through the dispatcher takes the host longer than the GPU: see kernels/benchmarks/NOTES.md.
"""

from __future__ import annotations

from functools import reduce
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor

from dit_kernels import ops
from dit_kernels.arguments import ALIGNMENT
from dit_kernels.families import OPS


class DirectCall:
    """One call of an op in compiled code. The compiled code runs

        call((addresses, eps and None of the kernel's arguments), numbers) or call.checked(*operands, *results)

    op: the name of the op. `arguments` of the op (dit_kernels.families.OPS) name the operands and results; `arguments`
    of its family name the arguments of the kernel. options: the op's keyword arguments. Addresses, eps, sizes and
    strides may change between calls, but a size of 1 stays 1. Dtypes, the last dimension and numbers of heads may not
    change.
    """

    def __init__(self, op: str, **options: Any) -> None:
        self.op, self.options = op, options
        family = OPS[op].family
        self.of_launch, self.can_launch = family.of_launch, family.can_launch
        self.function: Any = None  # the kernel for aligned operands
        self.device = -1
        self.tensors: Any = None  # picks the tensors among the kernel's arguments

    def __call__(self, given: tuple[Any, ...], numbers: tuple[int, ...]) -> bool:
        """Launches the kernel, which writes the results, and returns True. Returns False, without a launch, if
        there is no kernel yet, no row, or an address that is not aligned or that the kernel does not take.

        numbers: the family's launch numbers, where every stride is a multiple of 16 bytes. The device of the operands
        is the current device.
        """
        if self.function is None or not numbers[0] * numbers[1] or reduce(or_, self.tensors(given)) % ALIGNMENT:
            return False
        if not self.can_launch(given):
            return False
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        self.function(*given, *numbers, *self.of_launch(self.device, stream, numbers[0]), stream)
        return True

    def checked(self, *given: Any) -> None:
        """Runs the same call with all checks. Keeps the kernel for later calls if the operands are aligned."""
        op = OPS[self.op]
        results = given[len(op.inputs) :]
        call = op.call(*given[: len(op.inputs)], **self.options)
        ran = ops.run_into(call, results)
        if ran is not None and not any(t.data_ptr() % ALIGNMENT for t in given if isinstance(t, Tensor)):
            self.device = results[0].get_device()
            self.tensors = itemgetter(*(i for i, t in enumerate(op.arranged(given)) if isinstance(t, Tensor)))
            self.function = ran[0]  # set last, since another thread may be in __call__
