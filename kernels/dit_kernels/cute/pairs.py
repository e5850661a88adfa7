"""Pairs of elements that are rotated, in vectors. Plain Python: these functions run while a kernel is traced."""

from __future__ import annotations

import cutlass.cute as cute

from dit_kernels.cute.arith import elements_of, widen


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
