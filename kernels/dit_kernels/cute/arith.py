"""Arithmetic on the vectors of a row: each step in fp32, and rounded to the dtype that the step has.

A vector is a cute.TensorSSA in the dtype that it was rounded to; a single element, of a gate say, is a Float32. Sums
and products of two 16-bit vectors of one dtype are done in that dtype, two elements an instruction. That is the same
number: the product of two 16-bit floats is exact in fp32, and fp32 has so many more digits than they have (twice as
many and two) that a sum rounded to fp32 first and then to 16 bits is the sum rounded once (Figueroa, When is double
rounding innocuous?, 1995).

Nothing here contracts: eager rounds every product, so none may become part of an fma with the sum after it. Hence the
instructions with their rounding spelled out, which neither LLVM nor ptxas touches.
"""

from __future__ import annotations

import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float16, Float32, Int32
from cutlass.cute.arch.nvvm_wrappers import inline_ptx
from cutlass.cutlass_dsl import dsl_user_op

CUTE_DTYPES = {torch.bfloat16: BFloat16, torch.float16: Float16, torch.float32: Float32}

# fma is the one packed instruction that sm_80 has in bf16, too: a * b - 0 and a * 1 + b are the product and the sum.
_PAIRS = {BFloat16: cute.arch.fma_packed_bf16x2, Float16: cute.arch.fma_packed_f16x2}
_ONES = {BFloat16: 0x3F803F80, Float16: 0x3C003C00}
_MINUS_ZEROS = -0x7FFF8000  # 0x80008000


def _product_of_pairs(a: Int32, b: Int32, dtype) -> Int32:
    return _PAIRS[dtype](a, b, Int32(_MINUS_ZEROS))


def _sum_of_pairs(a: Int32, b: Int32, dtype) -> Int32:
    return _PAIRS[dtype](a, Int32(_ONES[dtype]), b)


@dsl_user_op
def add(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """a + b, whatever a is: LLVM contracts a product and a plain sum."""
    instruction = "add.rn.f32 {$w0}, {$r0}, {$r1};"
    return inline_ptx(instruction, write_only_types=[Float32], read_only_args=[a, b], loc=loc, ip=ip)


def widen(value):
    """In fp32."""
    if isinstance(value, Float32) or value.dtype is Float32:
        return value
    if value.dtype is not BFloat16 or cute.size(value.shape) % 2:
        return value.to(Float32)
    # Two instructions a pair: LLVM's conversion takes three.
    words = _words(value)
    bits = cute.make_rmem_tensor(value.shape, Int32)
    for i in range(cute.size(words)):
        bits[2 * i] = words[i] << 16
        bits[2 * i + 1] = words[i] & -0x10000
    return cute.recast_tensor(bits, Float32).load()


def rounded(value, dtype: torch.dtype):
    """R(value). A single element stays a Float32."""
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
    """R(a + b)."""
    if _are_pairs(a, b, dtype):
        return _by_pairs(_sum_of_pairs, a, b)
    left, right = elements_of(widen(a)), elements_of(widen(b))
    result = cute.make_rmem_tensor(a.shape, Float32)
    for i in range(cute.size(result)):
        result[i] = add(left[i], right[i])
    return rounded(result.load(), dtype)


def _are_pairs(a, b, dtype: torch.dtype) -> bool:
    if isinstance(a, Float32) or isinstance(b, Float32) or dtype == torch.float32:
        return False
    return a.dtype is b.dtype is CUTE_DTYPES[dtype] and cute.size(a.shape) % 2 == 0


def _by_pairs(instruction, a, b):
    left, right = _words(a), _words(b)
    result = cute.make_rmem_tensor(a.shape, a.dtype)
    words = cute.recast_tensor(result, Int32)
    for i in range(cute.size(words)):
        words[i] = instruction(left[i], right[i], a.dtype)
    return result.load()


def elements_of(value) -> cute.Tensor:
    """A vector as registers that are read and written one by one."""
    elements = cute.make_rmem_tensor(value.shape, value.dtype)
    elements.store(value)
    return elements


def _words(value) -> cute.Tensor:
    return cute.recast_tensor(elements_of(value), Int32)
