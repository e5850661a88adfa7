"""Where Inductor is faster than an op for a residual add without a norm, or for a norm with a shift.

The op runs at the speed of a copy. Microseconds on an H100 in bf16, of Inductor's kernel, of the op, and of a copy of
the same bytes; with q, the result is in FP8 with a scale for each row:

    y = residual + gate * x and             tokens    Inductor       op     copy
    z = norm(y) * (1 + scale) + shift
    D=3072                                      77        3.83     3.03     2.41
                                               512        7.74     6.50     6.21
                                              4608       46.07    40.17    39.40
                                      with q  4608       50.80    36.24    42.41
    D=2432                                    4096       39.97    29.25    28.41
    D=5120, modulations in fp32              32760      515.92   450.23   443.64

    z = norm(x) * (1 + scale) + shift
    D=3072                                      77        2.87     2.83     2.05
                                              4608       38.20    20.80    20.80
                                      with q  4608       55.97    17.79    19.22

Inductor computes a pointwise operation in the kernel that reads its result. In front of an op, it would write the
result to memory, and the op would read it. That costs more than the op saves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from fusion_pass.dataflow import is_pointwise, keeps_rows, sole_user, under_views

INLINE = "Inductor computes what the norm reads in the kernel of the norm"


def is_computed_by_the_reader(rows: Iterable[Node]) -> bool:
    """Would Inductor compute one of these operands in the kernel that reads the operand, and not write it to memory?"""
    return any(map(_is_inline, rows))


def _is_inline(row: Any) -> bool:
    """Is this row a pointwise result, or a view of one, that a single node reads?"""
    while sole_user(row) is not None and keeps_rows(row):
        row = row.args[0]
    return sole_user(row) is not None and is_pointwise(row)


def is_computed_with_the_norm(x: Node) -> bool:
    """Would Inductor compute the operand of a norm in the kernel of the norm? The kernel may also write it."""
    return is_pointwise(under_views(x))
