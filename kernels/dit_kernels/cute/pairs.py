"""Pairs of neighbouring elements in a vector. Plain Python: these functions run while a kernel is traced."""

from __future__ import annotations

import cutlass.cute as cute

from dit_kernels.cute.arith import elements_of


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
