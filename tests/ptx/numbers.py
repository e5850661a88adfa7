"""The arithmetic of PTX on NumPy arrays: every result is rounded once, as the manual says.

bf16 numbers are uint16 bit patterns, since NumPy has no such type. An instruction that the manual gives an error bound
(ex2, rcp, rsqrt .approx) is computed in fp64 and rounded to fp32: closer than any bound, and the same on every machine;
within `perturbed`, as far off as the bound allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

Array = Any  # np.ndarray of one of many dtypes

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
U16, U32, U64 = np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64)
SMALLEST_NORMAL = np.float32(2.0**-126)
LARGEST_E4M3 = np.float32(448)


def _away_from_even(rounded: Array, error: Array, bits: np.dtype[Any]) -> Array:
    """Rounding to odd of rounded + error, where `rounded` is the nearest: what is inexact gets an odd last bit.

    A number so rounded can be rounded again, to at most two bits less, as if it had never been rounded before.
    """
    pattern = np.ascontiguousarray(rounded).view(bits)
    moved = (error != 0) & ~np.isnan(error) & (pattern & bits.type(1) == 0)
    if not moved.any():
        return rounded
    outwards = (error > 0) != np.signbit(rounded)
    one = bits.type(1)
    return np.where(moved, np.where(outwards, pattern + one, pattern - one), pattern).view(rounded.dtype)


def _sum_to_odd(a: Array, b: Array) -> Array:
    """a + b in fp64, rounded to odd."""
    return _away_from_even(*_two_sum(a, b), U64)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of fp32 (or narrower) numbers, as fp64: rounded to fp32, fp16 or bf16, as if rounded once."""
    return _sum_to_odd(a.astype(F64) * b.astype(F64), c.astype(F64))


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    return fma(a, b, c).astype(F32)


def fma_f32_down(a: Array, b: Array, c: Array) -> Array:
    """Rounded towards minus infinity."""
    exact = fma(a, b, c)
    nearest = exact.astype(F32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """By Boldo and Melquiond, Emulation of a FMA and correctly rounded sums, 2008. Huge products are not exact."""
    product, rest = a * b, _product_error(a, b)
    small, smaller = _two_sum(c, rest)
    large, middle = _two_sum(product, small)
    total = large + _sum_to_odd(smaller, middle)
    return np.where(np.isfinite(product), total, product + c)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, rounded, and what that is off."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _product_error(a: Array, b: Array) -> Array:
    """a * b less what it is rounded to (Dekker)."""
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return a2 * b2 - (((a * b - a1 * b1) - a2 * b1) - a1 * b2)


def _halves(a: Array) -> tuple[Array, Array]:
    scaled = a * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - a)
    return high, a - high


def from_bf16(a: Array) -> Array:
    return (a.astype(U32) << np.uint32(16)).view(F32)


def from_f16(a: Array) -> Array:
    return a.view(F16).astype(F32)


def to_bf16(a: Array) -> Array:
    """fp32 to bf16."""
    bits = a.view(U32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(U16)


def to_f16(a: Array) -> Array:
    """fp32 or fp64 to fp16."""
    return np.where(np.isnan(a), U16.type(0x7FFF), a.astype(F16).view(U16))


def to_e4m3(a: Array) -> Array:
    """fp32 to 8 bits of e4m3fn, .satfinite: what is too large, or infinite, becomes the largest; NaN becomes 0x7f."""
    with np.errstate(invalid="ignore"):
        size = np.minimum(np.abs(a), LARGEST_E4M3)
        small = np.rint(size * F32.type(512)).astype(U32)  # in units of 2^-9, the smallest subnormal
    bits = size.view(U32)
    normal = (bits + U32.type(0x7FFFF) + (bits >> U32.type(20) & U32.type(1)) >> U32.type(20)) - U32.type(120 << 3)
    rounded = np.where(size < F32.type(2.0**-6), small, normal)
    return np.where(np.isnan(a), 0x7F, rounded | np.signbit(a).astype(U32) << U32.type(7)).astype(np.uint8)


def wide_to_bf16(a: Array) -> Array:
    """fp64 to bf16."""
    narrow = a.astype(F32)
    return to_bf16(_away_from_even(narrow, a - narrow, U32))


def arithmetic16(widen: Callable[[Array], Array], narrow: Callable[[Array], Array]) -> dict[str, Callable[..., Array]]:
    """add, mul, fma and max.NaN of 16-bit patterns."""

    def add(a: Array, b: Array) -> Array:
        return narrow(_sum_to_odd(widen(a).astype(F64), widen(b).astype(F64)))

    def mul(a: Array, b: Array) -> Array:
        return narrow(widen(a).astype(F64) * widen(b).astype(F64))

    def multiply_add(a: Array, b: Array, c: Array) -> Array:
        return narrow(fma(widen(a), widen(b), widen(c)))

    def largest(a: Array, b: Array) -> Array:
        """NaN if one of them is: max.NaN."""
        return narrow(np.maximum(widen(a), widen(b)))

    return {"add": add, "mul": mul, "fma": multiply_add, "max.NaN": largest}


def flushed(a: Array) -> Array:
    """.ftz: subnormal numbers are zeros of their sign."""
    return np.where(np.abs(a) < SMALLEST_NORMAL, np.copysign(np.float32(0), a), a)


# --- approximate instructions ---------------------------------------------------------------------------------------

RELATIVE_ERRORS = {"ex2": 2.0**-22, "rcp": 2.0**-23, "rsqrt": 2.0**-22.9}  # that the manual allows; of rcp, one ulp
_direction = 0.0


@contextmanager
def perturbed(direction: float) -> Iterator[None]:
    """Results of approximate instructions err by all that the manual allows: upwards (1) or downwards (-1)."""
    global _direction
    before, _direction = _direction, direction
    try:
        yield
    finally:
        _direction = before


def _approximate(name: str, exact: Array) -> Array:
    """fp64 to fp32; what is zero or infinite stays so."""
    return (exact * (1.0 + _direction * RELATIVE_ERRORS[name])).astype(F32)


def ex2_ftz(a: Array) -> Array:
    return flushed(_approximate("ex2", np.exp2(flushed(a).astype(F64))))


def rcp_ftz(a: Array) -> Array:
    return flushed(_approximate("rcp", 1.0 / flushed(a).astype(F64)))


def rsqrt(a: Array) -> Array:
    return _approximate("rsqrt", 1.0 / np.sqrt(a.astype(F64)))
