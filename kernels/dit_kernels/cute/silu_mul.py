"""silu(a) * b, element by element.

Each thread takes some vectors of a batch item, a CTA's width apart, and loads them all before it works on the first.
Rows may have strides, so that a and b can be halves of one tensor.

s = a / (1 + exp(-a)). For results in fp32 it is computed as CUDA's own silu computes it. For those in 16 bits exp2 and
the reciprocal are the approximate instructions, whose errors of some 2^-23 are seen in one result in some ten thousand:
with the exact ones, the arithmetic takes longer than memory does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64

from dit_kernels.chain import SiluChain
from dit_kernels.cute.arith import elements_of, product, rounded, widen
from dit_kernels.cute.fma import fma32
from dit_kernels.cute.operand import Operand
from dit_kernels.cute.tiling import ACCESS_BYTES, MAX_GRID_Y
from dit_kernels.cute.vectors import load, store, vector_at
from dit_kernels.rounding import SiluSteps

THREADS = 256
VECTORS = 2  # of a thread: four accesses of 16 bytes under way


@dataclass(frozen=True)
class SiluOperands:
    """The tensors of one kernel, by the names of `SiluMul.__call__`."""

    a: Operand
    b: Operand
    out: Operand


@dataclass(frozen=True)
class VectorTiling:
    """One CTA's part of the vectors of a batch item."""

    threads: int
    vector: int  # elements; divides D
    vectors: int  # of one thread


def vector_tiling(d: int, width: int) -> VectorTiling:
    """For rows of `d` elements, the narrowest of `width` bytes."""
    return VectorTiling(THREADS, min(d & -d, ACCESS_BYTES // width), VECTORS)


LOG2_E = 1.4426950408889634


def _each(function, value):
    """function, of a scalar, of each element of an fp32 vector."""
    elements = elements_of(value)
    for i in range(cute.size(elements)):
        elements[i] = function(elements[i])
    return elements.load()


def _sigmoid_quarter(a: Float32) -> Float32:
    """4 / (1 + exp(-a)), as (1/4 + exp(-a)/4)^-1: no number that matters is so small that it is flushed to zero."""
    return cute.arch.rcp_approx(cute.math.exp2(fma32(a, Float32(-LOG2_E), Float32(-2.0)), fastmath=True) + 0.25)


def _silu(a, precise: bool):
    a = widen(a)
    if precise:
        return a / (1.0 + cute.math.exp(-a))
    return a * 0.25 * _each(_sigmoid_quarter, a)


def _silu_mul(a, b, steps: SiluSteps):
    s = rounded(_silu(a, steps.out == torch.float32), steps.silu)
    return rounded(product(s, b, steps.product), steps.out)


class SiluMul:
    """One member of the family: a chain for one D and one layout of the operands."""

    def __init__(self, chain: SiluChain, d: int, operands: SiluOperands, tiling: VectorTiling):
        self.chain, self.d, self.operands, self.tiling = chain, d, operands, tiling

    @cute.jit
    def __call__(
        self,
        a: cute.Pointer,
        b: cute.Pointer,
        out: cute.Pointer,
        batches: Int32,
        tokens: Int32,
        a_batch: Int64,  # strides in elements, 0 where there is one; the result is contiguous
        a_token: Int64,
        b_batch: Int64,
        b_token: Int64,
        stream,
    ):
        t = self.tiling
        ctas = cute.ceil_div(Int64(tokens) * (self.d // t.vector), t.threads * t.vectors)
        grid = [Int32(ctas), cutlass.min(batches, MAX_GRID_Y), cute.ceil_div(batches, MAX_GRID_Y)]
        self.kernel(a, b, out, batches, tokens, a_batch, a_token, b_batch, b_token).launch(
            grid=grid, block=[t.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        a: cute.Pointer,
        b: cute.Pointer,
        out: cute.Pointer,
        batches: Int32,
        tokens: Int32,
        a_batch: Int64,
        a_token: Int64,
        b_batch: Int64,
        b_token: Int64,
    ):
        cta, some, many = cute.arch.block_idx()
        batch = some + many * MAX_GRID_Y
        if batch < batches:
            self.run(a, b, out, tokens, Int64(batch), Int64(cta), (a_batch, a_token), (b_batch, b_token))

    def run(self, a, b, out, tokens: Int32, batch: Int64, cta: Int64, of_a, of_b) -> None:
        t, o, steps = self.tiling, self.operands, self.chain.steps
        row = self.d // t.vector
        start = cta * (t.threads * t.vectors)
        before = cute.arch.thread_idx()[0] + Int32(start % row)  # vectors, since the first of the CTA's first token
        pieces = []
        for i in range(t.vectors):
            place = before + i * t.threads
            token, column = start // row + place // row, place % row * t.vector
            inside = token < tokens
            left = partial(vector_at, a, batch * of_a[0] + token * of_a[1] + column, t.vector, o.a.access)
            right = partial(vector_at, b, batch * of_b[0] + token * of_b[1] + column, t.vector, o.b.access)
            result = partial(vector_at, out, (batch * tokens + token) * self.d + column, t.vector, o.out.access)
            loaded = load(left, t.vector, a.dtype, inside), load(right, t.vector, b.dtype, inside)
            pieces.append((result, inside, *loaded))
        for result, inside, left, right in pieces:
            store(_silu_mul(left.load(), right.load(), steps), result, inside)
