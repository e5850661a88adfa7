"""What families share whose kernels work on whole rows (cute/rows.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import TypeVar

import torch

from dit_kernels.arguments import PER_ROW, QUANT_OPTIONS, ROW, SCALAR, STATIC_OPTIONS, Argument, known
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.cute.tiling import ACCESS_BYTES
from dit_kernels.families.family import Family, Op
from dit_kernels.tickets import COUNTERS

FP8_GRAIN = 16  # torch._scaled_mm takes rows of multiples of this, and so do kernels that quantise

# The last arguments of a family that quantises.
QUANTISED = (
    Argument("static_scale", SCALAR, optional=True),
    Argument("q", ROW, written=True),
    Argument("s", PER_ROW, written=True),
)

AnyOp = TypeVar("AnyOp", bound=Op)


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


def quant_overload(static: bool, keeps: bool) -> str:
    """The name of an overload of an op that quantises; "" for the default one.

    static: a scale is given, and q is returned without s. keeps: what is quantised is returned, too, in front of q.
    """
    return "_".join(word for word, chosen in (("static", static), ("keep_z", keeps)) if chosen)


def quantising(op: AnyOp, family: RowFamily, more: Sequence[str] = ()) -> tuple[AnyOp, ...]:
    """The op that quantises the last result of `op`, and its overloads. more: operands of the default overload alone,
    which may be left out."""
    quantised = []
    for static, keeps in product((False, True), repeat=2):
        overload = quant_overload(static, keeps)
        inputs = [argument.name for argument in op.inputs] + ["static_scale"] * static
        inputs += [] if overload else more
        inputs.sort(key=lambda name: family.named[name].defaulted)  # stable: defaulted arguments come last
        results = [result.name for result in op.results[: None if keeps else -1]] + ["q"] + ["s"] * (not static)
        name = f"{op.name}_quant.{overload}" if overload else f"{op.name}_quant"
        options = (*op.options, *(STATIC_OPTIONS if static else QUANT_OPTIONS))
        quantised.append(
            replace(op, name=name, family=family, arguments=(*inputs, *results), options=options, quantises=True)
        )
    return tuple(quantised)
