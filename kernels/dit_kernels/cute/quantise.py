"""A row of z in FP8, and its scale: rounding.QuantSteps on the vectors that the threads of a CTA keep in registers.

    a = max |z|
    s = R(a / fmax)
    q = z / s

The largest number of a row does not depend on any order, so s and q have the bits of eager code. Of two floats without
their signs, the larger one is also larger as an integer, and NaN is larger than infinity. So amax is taken of integers,
and NaN propagates as in torch.amax.
"""

from __future__ import annotations

from functools import reduce

import cutlass
import cutlass.cute as cute
import numpy as np
from cutlass import BFloat16, Boolean, Float8E4M3FN, Float16, Float32, Int16, Int32
from cutlass.cute.arch.nvvm_wrappers import inline_ptx
from cutlass.cutlass_dsl import dsl_user_op

from dit_kernels.cute.arith import elements_of, rounded, widen, words_of
from dit_kernels.cute.fma import fma32
from dit_kernels.cute.reduce import cta_max
from dit_kernels.cute.stage import Kept, Writer
from dit_kernels.rounding import QuantSteps

# Between these scales, 1 / s and the residual of a quotient are normal numbers. Outside, rows are divided.
USUAL_SCALES = (2.0**-100, 2.0**100)
LARGEST_FINITE = 464.0  # PyTorch's cast to FP8 makes what is larger NaN


def quantise(z: Kept, steps: QuantSteps, q: Writer, s: cute.Tensor, partials: cute.Tensor) -> None:
    """Writes the row of z to q, and its scale to s. partials: (warps,) in shared memory."""
    scale = _scale_of(_amax(z, partials), steps)
    _store_scale(s, z.place.batch, z.place.token, z.place.thread, scale)
    reciprocal = Float32(1.0) / scale
    for i, fragment in enumerate(z.fragments):
        q.store(i, _in_fp8(fragment, steps, scale, reciprocal))


@cute.jit
def _store_scale(s: cute.Tensor, batch: Int32, token: Int32, thread: Int32, scale: Float32):
    if thread == 0:
        s[batch, token] = scale


# --- the scale ------------------------------------------------------------------------------------------------------


def _scale_of(amax: Float32, steps: QuantSteps) -> Float32:
    if steps.smallest_amax is not None:
        amax = _larger(amax, Float32(steps.smallest_amax))
    # On a GPU, eager code divides by a number as it multiplies by its reciprocal.
    scale = rounded(amax * Float32(float(np.float32(1.0) / np.float32(steps.fmax))), steps.scale)
    return scale if steps.smallest_scale is None else _larger(scale, Float32(steps.smallest_scale))


def _amax(z: Kept, partials: cute.Tensor) -> Float32:
    """max |z| over the row, in every thread."""
    dtype = z.fragments[0].element_type
    larger = _LARGER[dtype]
    sizes = []
    for i, fragment in enumerate(z.fragments):
        inside = z.place.inside(i)
        size = reduce(larger, [word & _WITHOUT_SIGN[dtype] for word in _listed(words_of(fragment.load()))])
        sizes.append(size if inside is True else Int32(cutlass.select_(inside, size, Int32(0))))
    in_fp32 = words_of(widen(_as(dtype, reduce(larger, sizes)).load()))
    return _as(Float32, cta_max(reduce(cutlass.max, _listed(in_fp32)), cute.recast_tensor(partials, Int32)))[0]


def _as(dtype, word: Int32) -> cute.Tensor:
    """The numbers in a word: two of 16 bits, or one of 32."""
    elements = cute.make_rmem_tensor(32 // dtype.width, dtype)
    cute.recast_tensor(elements, Int32)[0] = word
    return elements


def _listed(words: cute.Tensor) -> list[Int32]:
    return [words[i] for i in range(cute.size(words))]


@dsl_user_op
def _larger(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """The larger number; NaN if one of them is."""
    instruction = "max.NaN.f32 {$w0}, {$r0}, {$r1};"
    return inline_ptx(instruction, write_only_types=[Float32], read_only_args=[a, b], loc=loc, ip=ip)


def _larger_of_pairs(kind: str):
    @dsl_user_op
    def larger(a: Int32, b: Int32, *, loc=None, ip=None) -> Int32:
        instruction = f"max.NaN.{kind} {{$w0}}, {{$r0}}, {{$r1}};"
        return inline_ptx(instruction, write_only_types=[Int32], read_only_args=[a, b], loc=loc, ip=ip)

    return larger


# By dtype, for words without signs: two numbers of 16 bits, or the bits of one of fp32.
_LARGER = {BFloat16: _larger_of_pairs("bf16x2"), Float16: _larger_of_pairs("f16x2"), Float32: cutlass.max}
_WITHOUT_SIGN = {BFloat16: 0x7FFF7FFF, Float16: 0x7FFF7FFF, Float32: 0x7FFFFFFF}


# --- the elements ---------------------------------------------------------------------------------------------------


def _in_fp8(z: cute.Tensor, steps: QuantSteps, scale: Float32, reciprocal: Float32):
    """A vector of z, divided by the scale, in FP8. reciprocal: of the scale."""
    elements = elements_of(widen(z.load()))
    if steps.reciprocal:
        elements.store(elements.load() * reciprocal)
    else:
        usual = (scale >= USUAL_SCALES[0]) & (scale <= USUAL_SCALES[1])
        _divide(elements, scale, reciprocal, usual)
    if not steps.clamp:
        for i in range(cute.size(elements)):
            elements[i] = _finite_or_nan(elements[i])
    result = cute.make_rmem_tensor(z.shape, Float8E4M3FN)
    pairs = cute.recast_tensor(result, Int16)
    for i in range(cute.size(pairs)):
        pairs[i] = _pair_in_fp8(elements[2 * i], elements[2 * i + 1])
    return result.load()


@cute.jit
def _divide(elements: cute.Tensor, scale: Float32, reciprocal: Float32, usual: Boolean):
    """Divides by the scale. A row that is not `usual` takes many more instructions."""
    if usual:
        for i in cutlass.range_constexpr(cute.size(elements)):
            elements[i] = _quotient(elements[i], scale, reciprocal)
    else:
        for i in cutlass.range_constexpr(cute.size(elements)):
            elements[i] = elements[i] / scale


def _quotient(z: Float32, scale: Float32, reciprocal: Float32) -> Float32:
    """z / scale, rounded once: a product with the reciprocal, corrected by the residual (Markstein, Computation of
    elementary functions on the IBM RISC System/6000 processor, 1990). Keeps the sign of a zero."""
    quotient = z * reciprocal
    residual = fma32(quotient, scale, -z)
    return fma32(residual, -reciprocal, quotient)


def _finite_or_nan(value: Float32) -> Float32:
    """NaN instead of what PyTorch's cast makes NaN; the instruction of `_pair_in_fp8` saturates."""
    size = cutlass.select_(value < 0.0, -value, value)
    return Float32(cutlass.select_(size > LARGEST_FINITE, Float32(float("nan")), value))


@dsl_user_op
def _pair_in_fp8(low: Float32, high: Float32, *, loc=None, ip=None) -> Int16:
    """Clamps both numbers to +-448 and rounds them. NaN stays NaN."""
    instruction = "cvt.rn.satfinite.e4m3x2.f32 {$w0}, {$r0}, {$r1};"
    return inline_ptx(instruction, write_only_types=[Int16], read_only_args=[high, low], loc=loc, ip=ip)
