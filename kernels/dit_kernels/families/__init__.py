"""The registry of families. Each module has the ops of one family."""

from __future__ import annotations

import torch

from dit_kernels.families import (
    activation,
    linear,
    modulated_norm,
    norm_cat_rope,
    norm_part_rope,
    norm_rope,
    rotated_row,
)
from dit_kernels.families.family import EPS_TENSOR, Op

_FAMILIES = (modulated_norm, norm_rope, norm_cat_rope, norm_part_rope, rotated_row, activation, linear)
OPS: dict[str, Op] = {op.name: op for family in _FAMILIES for op in family.OPS}


def op_of(overload: torch._ops.OpOverload) -> Op:
    """The op that an overload was registered for."""
    name = overload._overloadname.removesuffix(EPS_TENSOR).removesuffix("_")
    return OPS[overload._opname if name in ("", "default") else f"{overload._opname}.{name}"]
