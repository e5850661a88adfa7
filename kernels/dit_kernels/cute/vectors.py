"""Vectors between memory and registers: the elements that a thread moves at once, in their storage dtype.

place: a function that returns the vector in memory. It is called at the access, so that under a predicate the address
takes no registers earlier. inside: is the vector in the row? True if this is known while tracing, otherwise a
predicate.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int64, const_expr


@cute.jit
def vector_at(pointer: cute.Pointer, offset: Int64, vector: cutlass.Constexpr, access: cutlass.Constexpr):
    """`vector` elements in global memory, from `offset` on. Pointer and offset are multiples of `access` bytes."""
    size = const_expr(pointer.dtype.width // 8)
    aligned = const_expr(min(access, vector * size))
    address = pointer.toint() + offset * size
    pointer = cute.make_ptr(pointer.dtype, address, cute.AddressSpace.gmem, assumed_align=aligned)
    return cute.make_tensor(pointer, cute.make_layout(vector))


@cute.jit
def load(
    place: cutlass.Constexpr, vector: cutlass.Constexpr, dtype: cutlass.Constexpr, inside: Boolean | bool
) -> cute.Tensor:
    """Loads a vector into new registers: zeros if not `inside`."""
    fragment = cute.make_rmem_tensor(vector, dtype)
    if const_expr(inside is not True):
        fragment.fill(0)
    load_into(fragment, place, inside)
    return fragment


@cute.jit
def load_into(fragment: cute.Tensor, place: cutlass.Constexpr, inside: Boolean | bool):
    """Loads a vector into existing registers, which are unchanged if not `inside`."""
    if const_expr(inside is True):
        cute.autovec_copy(place(), fragment)
    else:
        if inside:
            cute.autovec_copy(place(), fragment)


@cute.jit
def store(value: cute.TensorSSA, place: cutlass.Constexpr, inside: Boolean | bool) -> cute.Tensor:
    """Stores a vector if `inside`. Returns the stored vector, in registers."""
    fragment = cute.make_rmem_tensor(value.shape, value.dtype)
    fragment.store(value)
    if const_expr(inside is True):
        cute.autovec_copy(fragment, place())
    else:
        if inside:
            cute.autovec_copy(fragment, place())
    return fragment
