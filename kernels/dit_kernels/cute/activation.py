"""silu(a) * b or gelu(a), element by element.

Each thread takes several vectors of a batch item, one CTA width apart, and loads them all before it works on the first.
Rows may have strides, so a and b can be halves of one tensor.

silu(a) = a / (1 + exp(-a)). For fp32 results, silu is computed as CUDA's own silu computes it. For 16-bit results, exp2
and the reciprocal are the approximate instructions. Their errors of about 2^-23 change about one result in ten
thousand. With the exact instructions, the arithmetic takes longer than the memory accesses.

gelu(a) = a * (1 + erf(a / sqrt(2))) / 2, or with tanh(u) instead of erf. erf is CUDA's own, and so is tanh for fp32
results. For 16-bit results, tanh(|u|) = 1 - 2 / (1 + exp(2 |u|)) with the approximate instructions, as CUDA's own tanh
computes it from |u| = 0.6 on. The GELU of every bf16 number is then the same.

A quantised result needs the largest number of its row. So there, CTAs work on whole rows, and the row stays in
registers. Before the result, the row may have elements of another tensor; then each thread has vectors of both parts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64

from dit_kernels.chain import ActivationChain, LinearChain
from dit_kernels.cute.arith import elements_of, product, rounded, widen
from dit_kernels.cute.fma import fma32
from dit_kernels.cute.kernel import Kernel
from dit_kernels.cute.rows import RowKernel
from dit_kernels.cute.stage import Kept, Reader, RowPlace, Writer
from dit_kernels.cute.tiling import MAX_GRID_Y
from dit_kernels.cute.vectors import load, store, vector_at

LOG2_E = 1.4426950408889634
SQRT_HALF = 0.7071067811865476
SQRT_2_OVER_PI, CUBIC = 0.7978845608028654, 0.044715  # a GELU's u = sqrt(2 / pi) * (a + 0.044715 a^3)


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
    if precise:
        return a / (1.0 + cute.math.exp(-a))
    return a * 0.25 * _each(_sigmoid_quarter, a)


def _gelu(a, precise: bool):
    return a * 0.5 * (1.0 + cute.math.erf(a * SQRT_HALF))


def _gelu_tanh(a, precise: bool):
    if precise:
        return a * 0.5 * (1.0 + cute.math.tanh(_each(_with_cube, a) * SQRT_2_OVER_PI))
    return a * _each(_tanh_half, a)


def _with_cube(a: Float32) -> Float32:
    """a + 0.044715 a^3, contracted as CUDA's compiler does it."""
    return fma32(Float32(CUBIC), a * a * a, a)


def _tanh_half(a: Float32) -> Float32:
    """(1 + tanh(u)) / 2. Like eager's 1 + tanh(u), it is rounded twice, and so has few digits where tanh is near -1."""
    factor = 2.0 * LOG2_E * SQRT_2_OVER_PI
    exponent = cute.math.absf(a * fma32(a * a, Float32(factor * CUBIC), Float32(factor)))
    tanh = fma32(cute.arch.rcp_approx(cute.math.exp2(exponent, fastmath=True) + 1.0), Float32(-2.0), Float32(1.0))
    return fma32(tanh, cute.math.copysign(Float32(0.5), a), Float32(0.5))


_ACTIVATIONS = {"identity": lambda a, precise: a, "silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}


def activation(a, b, chain: ActivationChain | LinearChain):
    """A vector of the chain's result. b: None if there is none."""
    steps = chain.steps
    activated = rounded(_ACTIVATIONS[chain.act](widen(a), steps.out == torch.float32), steps.activated)
    return rounded(activated if b is None else product(activated, b, steps.product), steps.out)


class ActivationKernel(Kernel):
    """The kernel of an ActivationChain whose result is stored."""

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
        t = self.tiling
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
            store(activation(left.load(), right.load(), self.chain), result, inside)


class QuantisedActivationKernel(RowKernel):
    """The kernels of an ActivationChain whose result is quantised."""

    def run(self, place: RowPlace, rows: dict[str, Reader], shared: Any, operands, partials) -> None:
        before, q = rows.get("before"), operands["q"]
        z = Kept(place) if operands["out"] is None else self.writer(operands, "out", place)
        parts = [] if before is None else [(_copied(before), self.writer(operands, "q", before.place))]
        for i in range(place.tiling.vectors):
            a, b = (rows[name](i) if name in rows else None for name in ("a", "b"))
            z.store(i, activation(a, b, self.chain))
        start = 0 if before is None else before.place.d
        parts.append((z, Writer(cute.make_tensor(q.iterator + start, q.layout), self.specs["q"], place)))
        self.quantise(parts, operands, partials)


def _copied(row: Reader) -> Kept:
    z = Kept(row.place)
    for i in range(row.place.tiling.vectors):
        z.store(i, row(i))
    return z
