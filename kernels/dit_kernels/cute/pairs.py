"""Pairs of elements that are rotated, in vectors. Plain Python: these functions run while a kernel is traced."""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
import torch

from dit_kernels.cute.arith import elements_of, product, rounded, total, widen
from dit_kernels.cute.fma import fma32

Vectors = list[Any]  # cute.TensorSSA, as in `arith`


def doubled(numbers: cute.Tensor):
    """Turns a, b, ... into a, a, b, b, ..."""
    doubled = cute.make_rmem_tensor(2 * cute.size(numbers), numbers.element_type)
    for i in range(cute.size(doubled)):
        doubled[i] = numbers[i // 2]
    return doubled.load()


def neighbours_swapped(n):
    """Turns a, b, ... into b, a, ..."""
    elements, swapped = elements_of(n), cute.make_rmem_tensor(n.shape, n.dtype)
    for i in range(cute.size(n.shape)):
        swapped[i] = elements[i ^ 1]
    return swapped.load()


def signed(sin, interleaved: bool, is_first: bool):
    """The sines with the sign of the quarter turn, (a, b) -> (-b, a). The sign changes no digit of a product.

    is_first: is this vector in the first half of a head? It matters if the pairs are not `interleaved`.
    """
    elements = elements_of(widen(sin))
    for e in range(cute.size(elements)):
        if e % 2 == 0 if interleaved else is_first:
            elements[e] = -elements[e]
    return elements.load()


def of_pairs(n, which: int):
    """Turns a, b, ... into a, a, ... if `which` is 0, into b, b, ... if it is 1."""
    elements, taken = elements_of(n), cute.make_rmem_tensor(n.shape, n.dtype)
    for i in range(cute.size(n.shape)):
        taken[i] = elements[i // 2 * 2 + which]
    return taken.load()


def column(matrices: cute.Tensor, which: int):
    """The first (0) or second (1) column of 2×2 matrices, each of which is m00, m01, m10, m11."""
    numbers = cute.make_rmem_tensor(cute.size(matrices) // 2, matrices.element_type)
    for i in range(cute.size(numbers)):
        numbers[i] = matrices[2 * i + which]
    return numbers.load()


def sums_of_products(a: Vectors, b: Vectors, c: Vectors, d: Vectors, dtype: torch.dtype, addcmul: bool) -> Vectors:
    """R(R(a * b) + R(c * d)) of each four vectors; with `addcmul`, R(R(a * b) + c * d)."""
    first = [product(*factors, dtype) for factors in zip(a, b, strict=True)]
    if addcmul:
        return [_plus_product(*terms, dtype) for terms in zip(first, c, d, strict=True)]
    second = [product(*factors, dtype) for factors in zip(c, d, strict=True)]
    return [total(*terms, dtype) for terms in zip(first, second, strict=True)]


def _plus_product(a, b, c, dtype: torch.dtype):
    """R(a + b * c)."""
    summed, left, right = (elements_of(widen(v)) for v in (a, b, c))
    for i in range(cute.size(summed)):
        summed[i] = fma32(left[i], right[i], summed[i])
    return rounded(summed.load(), dtype)
