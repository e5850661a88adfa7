"""What a kernel is compiled for: the properties of each tensor that it reads or writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from dit_kernels.arguments import (
    BIAS,
    COLUMN,
    MODULATION,
    PART,
    ROW,
    SCALAR,
    TOKENS,
    Argument,
    Layout,
    known,
    known_equal,
)
from dit_kernels.cute.tiling import ACCESS_BYTES

Walk = Literal["token", "batch", "column", "element"]


@dataclass(frozen=True)
class TensorSpec:
    """The properties of one tensor."""

    dtype: torch.dtype
    walk: Walk  # token: (1|B, S, D); batch: (1|B, 1, D); column: (D,); element: (1, 1, 1)
    access: int  # bytes of one load or store, at most 16; pointer and strides are multiples of this
    heads: int = 1  # per token, if a token has several rows: (1|B, S, H, D)
    width: int | None = None  # elements of a row; None: D


def spec_of(argument: Argument, layout: Layout, d: int) -> TensorSpec:
    """The spec of an argument, for rows of d elements. Sizes and strides may be symbols; no guard is added."""
    shape, itemsize = layout.shape, layout.dtype.itemsize
    if argument.role is SCALAR or (argument.role is MODULATION and d != 1 and known_equal(shape[2], 1)):
        return TensorSpec(layout.dtype, "element", itemsize)
    access = min(ACCESS_BYTES, layout.address & -layout.address or ACCESS_BYTES)
    if argument.role in (COLUMN, BIAS):
        return TensorSpec(layout.dtype, "column", access)
    for size, stride in zip(shape[:-1], layout.strides[:-1], strict=True):
        while not known_equal(size, 1) and not known(stride * itemsize % access == 0):
            access //= 2
    walk: Walk = "batch" if argument.role is MODULATION and known_equal(shape[1], 1) else "token"
    heads = int(shape[2]) if len(shape) > 3 else 1
    width = int(shape[-1]) if argument.role in (ROW, PART, TOKENS) and not known_equal(shape[-1], d) else None
    return TensorSpec(layout.dtype, walk, access, heads, width)


def specs_of(arguments: tuple[Argument, ...], values: dict[str, Any], d: int) -> tuple[TensorSpec | None, ...]:
    """The spec of each of these arguments; None for an absent one."""
    layouts = ((argument, values[argument.name]) for argument in arguments)
    return tuple(None if layout is None else spec_of(argument, layout, d) for argument, layout in layouts)
