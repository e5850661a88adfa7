"""Vectors in global memory: as many elements as one access takes, of tensors with pointers that are any multiple."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int64, const_expr


@cute.jit
def _vector_at(pointer: cute.Pointer, offset: Int64, vector: cutlass.Constexpr, access: cutlass.Constexpr):
    size = const_expr(pointer.dtype.width // 8)
    aligned = const_expr(min(access, vector * size))
    address = pointer.toint() + offset * size
    pointer = cute.make_ptr(pointer.dtype, address, cute.AddressSpace.gmem, assumed_align=aligned)
    return cute.make_tensor(pointer, cute.make_layout(vector))


@cute.jit
def load(
    pointer: cute.Pointer,
    offset: Int64,  # in elements
    vector: cutlass.Constexpr,
    access: cutlass.Constexpr,  # bytes that pointer and offset are multiples of
    inside: Boolean | bool,
) -> cute.Tensor:
    """`vector` elements, in registers; zeros where not `inside`."""
    fragment = cute.make_rmem_tensor(vector, pointer.dtype)
    if const_expr(inside is True):
        cute.autovec_copy(_vector_at(pointer, offset, vector, access), fragment)
    else:
        fragment.fill(0)
        if inside:
            cute.autovec_copy(_vector_at(pointer, offset, vector, access), fragment)
    return fragment


@cute.jit
def store(
    value: cute.TensorSSA,
    pointer: cute.Pointer,
    offset: Int64,
    vector: cutlass.Constexpr,
    access: cutlass.Constexpr,
    inside: Boolean | bool,
):
    fragment = cute.make_rmem_tensor(vector, pointer.dtype)
    fragment.store(value)
    if const_expr(inside is True):
        cute.autovec_copy(fragment, _vector_at(pointer, offset, vector, access))
    else:
        if inside:
            cute.autovec_copy(fragment, _vector_at(pointer, offset, vector, access))
