"""silu(a) * b, element by element.

Each thread takes several vectors of a batch item, one CTA width apart, and loads them all before it works on the first.
Rows may have strides, so a and b can be halves of one tensor.

s = a / (1 + exp(-a)). For fp32 results, s is computed as CUDA's own silu computes it. For 16-bit results, exp2 and the
reciprocal are the approximate instructions. Their errors of about 2^-23 change about one result in ten thousand. With
the exact instructions, the arithmetic takes longer than the memory accesses.

A quantised result needs the largest number of its row. So there, CTAs work on whole rows, and the row stays in
registers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64

from dit_kernels.cute.arith import elements_of, product, rounded, widen
from dit_kernels.cute.fma import fma32
from dit_kernels.cute.kernel import Kernel
from dit_kernels.cute.rows import RowKernel
from dit_kernels.cute.stage import Kept, Reader, RowPlace
from dit_kernels.cute.tiling import MAX_GRID_Y
from dit_kernels.cute.vectors import load, store, vector_at
from dit_kernels.rounding import SiluSteps

LOG2_E = 1.4426950408889634


def _each(function, value):
    """Applies a scalar function to each element of an fp32 vector."""
    elements = elements_of(value)
    for i in range(cute.size(elements)):
        elements[i] = function(elements[i])
    return elements.load()


def _sigmoid_quarter(a: Float32) -> Float32:
    """4 / (1 + exp(-a)), computed as (1/4 + exp(-a)/4)^-1, so that no number that matters is flushed to zero."""
    return cute.arch.rcp_approx(cute.math.exp2(fma32(a, Float32(-LOG2_E), Float32(-2.0)), fastmath=True) + 0.25)


def _silu(a, precise: bool):
    a = widen(a)
    if precise:
        return a / (1.0 + cute.math.exp(-a))
    return a * 0.25 * _each(_sigmoid_quarter, a)


def _silu_mul(a, b, steps: SiluSteps):
    s = rounded(_silu(a, steps.out == torch.float32), steps.silu)
    return rounded(product(s, b, steps.product), steps.out)


class SiluMulKernel(Kernel):
    """The kernel of a SiluChain whose result is stored."""

    def launch(self, operands, batches, tokens, strides, of_launch, stream) -> None:
        t = self.tiling
        ctas = cute.ceil_div(Int64(tokens) * (self.d // t.vector), t.threads * t.vectors)
        grid = [Int32(ctas), cutlass.min(batches, MAX_GRID_Y), cute.ceil_div(batches, MAX_GRID_Y)]
        self.kernel(operands, batches, tokens, strides).launch(grid=grid, block=[t.threads, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, operands: dict[str, Any], batches: Int32, tokens: Int32, strides: dict[str, Any]):
        cta, some, many = cute.arch.block_idx()
        batch = some + many * MAX_GRID_Y
        if batch < batches:
            self.run(operands, tokens, Int64(batch), Int64(cta), strides)

    def run(self, operands: dict[str, Any], tokens: Int32, batch: Int64, cta: Int64, strides: dict[str, Any]) -> None:
        t, steps = self.tiling, self.chain.steps
        row = self.d // t.vector
        start = cta * (t.threads * t.vectors)
        before = cute.arch.thread_idx()[0] + Int32(start % row)  # in vectors, from the start of the CTA's first token
        pieces = []
        for i in range(t.vectors):
            place = before + i * t.threads
            token, column = start // row + place // row, place % row * t.vector
            inside = token < tokens

            def vector_of(name: str, offset, column=column):
                return partial(vector_at, operands[name], offset + column, t.vector, self.specs[name].access)

            *read, result = (
                vector_of(name, batch * strides[name][0] + token * strides[name][1]) for name in ("a", "b", "out")
            )
            left, right = (
                load(place, t.vector, operands[name].dtype, inside)
                for name, place in zip(("a", "b"), read, strict=True)
            )
            pieces.append((result, inside, left, right))
        for result, inside, left, right in pieces:
            store(_silu_mul(left.load(), right.load(), steps), result, inside)


class SiluMulQuantKernel(RowKernel):
    """The kernels of a SiluChain whose result is quantised."""

    def run(self, place: RowPlace, rows: dict[str, Reader], shared: Any, operands, partials) -> None:
        z = Kept(place) if operands["out"] is None else self.writer(operands, "out", place)
        for i in range(place.tiling.vectors):
            z.store(i, _silu_mul(rows["a"](i), rows["b"](i), self.chain.steps))
        self.quantise(z, operands, partials)
