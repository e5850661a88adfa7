"""What a kernel is compiled for, of each tensor that it reads or writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Walk = Literal["token", "batch", "column", "element"]


@dataclass(frozen=True)
class Operand:
    """One tensor."""

    dtype: torch.dtype
    walk: Walk  # token: (1|B, S, D); batch: (1|B, 1, D); column: (D,); element: (1, 1, 1)
    access: int  # bytes of one load or store: what its pointer and strides are multiples of, 16 at most
    heads: int = 1  # of a token, where it has several rows: (1|B, S, H, D)
