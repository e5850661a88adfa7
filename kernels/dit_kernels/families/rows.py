"""What families share whose kernels work on whole rows (cute/rows.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from dit_kernels.arguments import known
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.cute.tiling import ACCESS_BYTES
from dit_kernels.families.family import Family
from dit_kernels.tickets import COUNTERS

FP8_GRAIN = 16  # torch._scaled_mm takes rows of multiples of this, and so do kernels that quantise


class RowFamily(Family):
    """A family whose kernels may walk over rows."""

    def of_launch(self, device: int, stream: int, batches: int) -> tuple[int, ...]:
        """The number of multiprocessors, and the address of the ticket counters."""
        return processors(device), COUNTERS.address(device, stream, batches)


@cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def are_copied_in_bulk(rows: Sequence[TensorSpec], d: int) -> bool:
    """Are these rows of `d` elements aligned as bulk copies require?"""
    return all(spec.access == ACCESS_BYTES and d * spec.dtype.itemsize % ACCESS_BYTES == 0 for spec in rows)


def can_be_quantised(d: int, widths: Sequence[int], widest: int) -> bool:
    """Can a kernel quantise rows of `d` elements, which then stay in registers?

    widths: bytes per element of the rows that are read, and of what is quantised. widest: the most bytes of a row.
    """
    return known(d % FP8_GRAIN == 0) and known(d * max(widths) <= widest)
