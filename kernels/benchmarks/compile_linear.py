"""Compiles kernels of linear layers for the cache on disk. bench_linear.py runs this in several processes.

    python kernels/benchmarks/compile_linear.py "linear_gelu 3072 12288 approximate=tanh,configuration=128x192/2x1" ...

An argument has the op, K, N and the options of a kernel.
"""

from __future__ import annotations

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_kernels import ops
from dit_kernels.families import OPS


def main() -> None:
    for kernel in sys.argv[1:]:
        op, k, n, options = kernel.split()
        with FakeTensorMode():
            shapes = ((128, int(k)), (int(n), int(k)), (int(n), int(k)) if op == "linear_silu_mul" else (int(n),))
            operands = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
            ops.prepare(OPS[op].call(*operands, **dict(option.split("=") for option in options.split(","))))


if __name__ == "__main__":
    main()
