"""The registry of families. Each module has the ops of one family."""

from __future__ import annotations

from dit_kernels.families import activation, modulated_norm, norm_rope
from dit_kernels.families.family import Op

OPS: dict[str, Op] = {op.name: op for family in (modulated_norm, norm_rope, activation) for op in family.OPS}
