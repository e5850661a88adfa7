"""Arithmetic on the vectors of a row. Each step is computed in fp32 and rounded to the dtype of the step.

A vector is a cute.TensorSSA in the dtype that it was rounded to. A single element, e.g. of a gate, is a Float32. Sums
and products of two 16-bit vectors of the same dtype are computed in that dtype, two elements per instruction. The
numbers are the same. The product of two 16-bit floats is exact in fp32. For sums, fp32 has at least twice as many
digits as a 16-bit float, plus two. So a sum that is rounded first to fp32 and then to 16 bits equals the sum rounded
once (Figueroa, When is double rounding innocuous?, 1995).

Nothing here may be contracted. Eager rounds every product, so no product may become part of an fma with the following
sum. Therefore the instructions state their rounding: neither LLVM nor ptxas contracts such instructions.
"""

from __future__ import annotations

import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32
from cutlass.cute.arch.nvvm_wrappers import inline_ptx
from cutlass.cutlass_dsl import dsl_user_op

from dit_kernels.rounding import FP8

CUTE_DTYPES = {torch.bfloat16: BFloat16, torch.float16: Float16, torch.float32: Float32, FP8: Float8E4M3FN}

# fma is the only packed instruction that sm_80 also has for bf16. So a product is a * b - 0, and a sum is a * 1 + b.
_PAIRS = {BFloat16: cute.arch.fma_packed_bf16x2, Float16: cute.arch.fma_packed_f16x2}
_ONES = {BFloat16: 0x3F803F80, Float16: 0x3C003C00}
_MINUS_ZEROS = -0x7FFF8000  # 0x80008000


def _product_of_pairs(a: Int32, b: Int32, dtype) -> Int32:
    return _PAIRS[dtype](a, b, Int32(_MINUS_ZEROS))


def _sum_of_pairs(a: Int32, b: Int32, dtype) -> Int32:
    return _PAIRS[dtype](a, Int32(_ONES[dtype]), b)


@dsl_user_op
def add(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """a + b, never contracted. LLVM would contract a plain sum with a product `a`."""
    instruction = "add.rn.f32 {$w0}, {$r0}, {$r1};"
    return inline_ptx(instruction, write_only_types=[Float32], read_only_args=[a, b], loc=loc, ip=ip)


def widen(value):
    """The value in fp32."""
    if isinstance(value, Float32) or value.dtype is Float32:
        return value
    if value.dtype is not BFloat16 or cute.size(value.shape) % 2:
        return value.to(Float32)
    # Two instructions per pair; LLVM's conversion takes three.
    words = words_of(value)
    bits = cute.make_rmem_tensor(value.shape, Int32)
    for i in range(cute.size(words)):
        bits[2 * i] = words[i] << 16
        bits[2 * i + 1] = words[i] & -0x10000
    return cute.recast_tensor(bits, Float32).load()


def rounded(value, dtype: torch.dtype):
    """R(value): the value rounded to `dtype`. A single element stays a Float32."""
    target = CUTE_DTYPES[dtype]
    if isinstance(value, Float32):
        return value if target is Float32 else Float32(target(value))
    if value.dtype is target:
        return value
    return widen(value) if target is Float32 else widen(value).to(target)


def product(a, b, dtype: torch.dtype):
    """R(a * b)."""
    if _are_pairs(a, b, dtype):
        return _by_pairs(_product_of_pairs, a, b)
    return rounded(widen(a) * widen(b), dtype)


def total(a, b, dtype: torch.dtype):
    """R(a + b). b is a vector; a is a vector or a single element."""
    if _are_pairs(a, b, dtype):
        return _by_pairs(_sum_of_pairs, a, b)
    single = isinstance(a, Float32)
    left, right = a if single else elements_of(widen(a)), elements_of(widen(b))
    result = cute.make_rmem_tensor(b.shape, Float32)
    for i in range(cute.size(result)):
        result[i] = add(left if single else left[i], right[i])
    return rounded(result.load(), dtype)


def _are_pairs(a, b, dtype: torch.dtype) -> bool:
    if isinstance(a, Float32) or isinstance(b, Float32) or dtype == torch.float32:
        return False
    return a.dtype is b.dtype is CUTE_DTYPES[dtype] and cute.size(a.shape) % 2 == 0


def _by_pairs(instruction, a, b):
    left, right = words_of(a), words_of(b)
    result = cute.make_rmem_tensor(a.shape, a.dtype)
    words = cute.recast_tensor(result, Int32)
    for i in range(cute.size(words)):
        words[i] = instruction(left[i], right[i], a.dtype)
    return result.load()


def elements_of(value) -> cute.Tensor:
    """A vector as registers that can be read and written one by one."""
    elements = cute.make_rmem_tensor(value.shape, value.dtype)
    elements.store(value)
    return elements


def words_of(value) -> cute.Tensor:
    """A vector as registers of 32 bits."""
    return cute.recast_tensor(elements_of(value), Int32)
