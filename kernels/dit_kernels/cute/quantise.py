"""A row of z in FP8: rounding.QuantSteps and StaticSteps on the vectors that the threads of a CTA keep in registers.

    a = max |z|
    s = R(a / fmax)
    q = z / s

With a static scale, s is given.

The largest number of a row does not depend on any order, so s and q have the bits of eager code. Of two floats without
their signs, the larger one is also larger as an integer, and NaN is larger than infinity. So amax is taken of integers,
and NaN propagates as in torch.amax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import cutlass
import cutlass.cute as cute
import numpy as np
from cutlass import BFloat16, Boolean, Float8E4M3FN, Float16, Float32, Int16, Int32
from cutlass.cute.arch.nvvm_wrappers import inline_ptx
from cutlass.cutlass_dsl import dsl_user_op

from dit_kernels.cute.arith import elements_of, rounded, widen, words_of
from dit_kernels.cute.fma import fma32
from dit_kernels.cute.reduce import cta_max
from dit_kernels.cute.stage import Reader, Writer
from dit_kernels.rounding import QuantSteps, StaticSteps

# Between these scales, 1 / s and the residual of a quotient are normal numbers. Outside, rows are divided.
USUAL_SCALES = (2.0**-100, 2.0**100)
INFINITY = float("inf")
LARGEST_FINITE = 464.0  # PyTorch's cast to FP8 makes what is larger NaN


Quotient = Callable[[Float32, Float32, Float32], Float32]
Part = tuple[Reader, Writer]


def quantise(
    parts: Sequence[Part],
    steps: QuantSteps | StaticSteps,
    s: cute.Tensor | None,
    static_scale: cute.Tensor | None,
    partials: cute.Tensor | None,
) -> None:
    """Writes a row in FP8, and with QuantSteps its scale to s.

    parts: each part of the row, kept in registers, and where it is written. static_scale: (1, 1, 1), for StaticSteps;
    None: what is written is the cast of the row. partials: (warps,) in shared memory, for QuantSteps.
    """
    if isinstance(steps, StaticSteps):
        scaled = _static_scaling(steps, static_scale)
    else:
        scale, place = _scale_of(_amax([z for z, _ in parts], partials), steps), parts[0][0].place
        _store_scale(s, place.batch, place.token, place.thread, scale)
        scaled = _scaling(scale, Float32(1.0) / scale, not steps.reciprocal, _quotient)
    for z, q in parts:
        for i, fragment in enumerate(z.fragments):
            q.store(i, _in_fp8(scaled(widen(fragment.load())), steps.clamp))


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


def _amax(parts: Sequence[Reader], partials: cute.Tensor) -> Float32:
    """max |z| over the row, in every thread."""
    dtype = parts[0].fragments[0].element_type
    larger = _LARGER[dtype]
    sizes = []
    for z in parts:
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


def _scaling(scale: Float32, reciprocal: Float32, divides: bool, quotient: Quotient) -> Callable[[Any], Any]:
    """Divides an fp32 vector by the scale, or multiplies it by the reciprocal of the scale."""

    def scaled(z):
        if not divides:
            return z * reciprocal
        elements = elements_of(z)
        _divide(elements, scale, reciprocal, (scale >= USUAL_SCALES[0]) & (scale <= USUAL_SCALES[1]), quotient)
        return elements.load()

    return scaled


def _static_scaling(steps: StaticSteps, static_scale: cute.Tensor | None) -> Callable[[Any], Any]:
    """Scales an fp32 vector by the given scale."""
    if static_scale is None:
        return lambda z: z
    factor = static_scale[0, 0, 0].to(Float32)
    factor = rounded(Float32(1.0) / factor if steps.scaling == "reciprocal" else factor, steps.factor)
    divides = steps.scaling == "quotient"
    scaled = _scaling(factor, Float32(1.0) / factor if divides else factor, divides, _any_quotient)
    return lambda z: widen(rounded(scaled(z), steps.scaled))


def _in_fp8(scaled, clamp: bool):
    """An fp32 vector in FP8. clamp: as in QuantSteps."""
    elements = elements_of(scaled)
    if not clamp:
        for i in range(cute.size(elements)):
            elements[i] = _finite_or_nan(elements[i])
    result = cute.make_rmem_tensor(scaled.shape, Float8E4M3FN)
    pairs = cute.recast_tensor(result, Int16)
    for i in range(cute.size(pairs)):
        pairs[i] = _pair_in_fp8(elements[2 * i], elements[2 * i + 1])
    return result.load()


@cute.jit
def _divide(elements: cute.Tensor, scale: Float32, reciprocal: Float32, usual: Boolean, quotient: cutlass.Constexpr):
    """Divides by the scale. A row that is not `usual` takes many more instructions."""
    if usual:
        for i in cutlass.range_constexpr(cute.size(elements)):
            elements[i] = quotient(elements[i], scale, reciprocal)
    else:
        for i in cutlass.range_constexpr(cute.size(elements)):
            elements[i] = elements[i] / scale


def _quotient(z: Float32, scale: Float32, reciprocal: Float32) -> Float32:
    """z / scale, rounded once: a product with the reciprocal, corrected by the residual (Markstein, Computation of
    elementary functions on the IBM RISC System/6000 processor, 1990). Keeps the sign of a zero."""
    quotient = z * reciprocal
    residual = fma32(quotient, scale, -z)
    return fma32(residual, -reciprocal, quotient)


def _any_quotient(z: Float32, scale: Float32, reciprocal: Float32) -> Float32:
    """z / scale as above, also where it is infinite and has no residual, as numbers far above the scale have it."""
    product = z * reciprocal
    finite = (product < INFINITY) & (product > -INFINITY)
    return Float32(cutlass.select_(finite, _quotient(z, scale, reciprocal), product))


def _finite_or_nan(value: Float32) -> Float32:
    """NaN instead of what PyTorch's cast makes NaN; the instruction of `_pair_in_fp8` saturates."""
    size = cutlass.select_(value < 0.0, -value, value)
    return Float32(cutlass.select_(size > LARGEST_FINITE, Float32(float("nan")), value))


@dsl_user_op
def _pair_in_fp8(low: Float32, high: Float32, *, loc=None, ip=None) -> Int16:
    """Clamps both numbers to +-448 and rounds them. NaN stays NaN."""
    instruction = "cvt.rn.satfinite.e4m3x2.f32 {$w0}, {$r0}, {$r1};"
    return inline_ptx(instruction, write_only_types=[Int16], read_only_args=[high, low], loc=loc, ip=ip)
