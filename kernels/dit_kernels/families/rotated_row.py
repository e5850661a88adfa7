"""A norm over all heads of a token and their rotation (RoPE): rotate(norm(x)).

x is [B, S, D], the H heads of a token one after the other, Dh elements each. The weight of the norm is [D] or None.
cos and sin have a number for each element or for each pair: they are [S, Dh] or [S, Dh/2], the same for all heads. If
each head has its own rotation, they are [S, D] or [S, D/2]. Both may have a dimension of size B or 1 before S, and
one of size 1 after S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dit_kernels import reference
from dit_kernels.arguments import (
    COLUMN,
    DTYPES,
    EPS,
    ROW,
    TABLE,
    Argument,
    Option,
    check_tensor,
    differ,
    reject,
)
from dit_kernels.chain import RotatedRowChain
from dit_kernels.cute.tiling import WIDEST_ROW, RowTiling, rotated_row_tiling
from dit_kernels.families.family import Named, Op, Shaped
from dit_kernels.families.norm_rope import HEAD_GRAIN, OPTIONS, for_heads, steps_of
from dit_kernels.families.rows import RowFamily, are_copied_in_bulk


class RotatedRow(RowFamily):
    """Computes a RotatedRowChain over the heads of a token."""

    arguments = (
        Argument("x", ROW),
        Argument("weight", COLUMN, optional=True),
        Argument("cos", TABLE),
        Argument("sin", TABLE),
        Argument("eps", EPS),
        Argument("out", ROW, written=True),
    )

    def check(self, op: Op, named: Named, options: Named) -> None:
        """Raises ValueError if x is not [B, S, D], if `heads` do not divide D into even parts, or if a table has
        another width."""
        x, cos, sin, heads = named["x"], named["cos"], named["sin"], options["heads"]
        if x.ndim != 3:
            reject(op.name, "x.shape", list(x.shape), "[B, S, D]")
        d = x.shape[2]
        if heads < 1 or d % (2 * heads):
            reject(op.name, "heads", heads, f"a number of heads that divides {d} into even parts")
        check_tensor(op.name, "cos", cos, "x", x, DTYPES)
        check_tensor(op.name, "sin", sin, "x", x, (cos.dtype,))
        width = d if options["own"] else d // heads
        for name, table, widths in (("cos", cos, (width, width // 2)), ("sin", sin, cos.shape[-1:])):
            if all(differ(table.shape[-1], n) for n in widths):
                expected = f"a last dimension of {' or '.join(map(str, widths))}"
                reject(op.name, f"{name}.shape", list(table.shape), expected)

    def chain(self, op: Op, named: Named, options: Named) -> RotatedRowChain:
        x, weight, cos = named["x"], named["weight"], named["cos"]
        heads, own = options["heads"], options["own"]
        steps = steps_of(x, weight, cos, options)
        one_a_pair = cos.shape[-1] != (x.shape[2] if own else x.shape[2] // heads)
        return RotatedRowChain(heads, own, options["interleaved"], one_a_pair, options["addcmul"], steps)

    def results(self, chain: RotatedRowChain, named: Named) -> tuple[Shaped, ...]:
        return ((named["x"].shape, chain.steps.out),)

    def definition(self, chain: RotatedRowChain, named: Named) -> tuple[Tensor, ...]:
        x = named["x"]
        heads = chain.heads if chain.own else 1
        cos, sin = (for_heads(named[name], TABLE, x, heads) for name in ("cos", "sin"))
        return (reference.rotated_row(x, named["weight"], cos, sin, named["eps"], chain),)

    def fits_kernel(self, chain: RotatedRowChain, named: Named) -> bool:
        """Halves of heads, or heads whose pairs are neighbours, are multiples of HEAD_GRAIN. A row stays in
        registers."""
        x = named["x"]
        fits = _part(chain, x.shape[2]) % HEAD_GRAIN == 0 and x.shape[2] * x.element_size() <= WIDEST_ROW
        return fits and super().fits_kernel(chain, named)

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.rotated_row import RotatedRowKernel

        return RotatedRowKernel

    def tiling(self, chain: RotatedRowChain, d: int, specs: Named, arch: str) -> RowTiling:
        x, weight, tables = specs["x"], specs["weight"], (specs["cos"], specs["sin"])
        width = (d if chain.own else d // chain.heads) // (2 if chain.one_a_pair else 1)
        aligned = are_copied_in_bulk([x], d) and are_copied_in_bulk(tables, width)
        row_bytes = d * x.dtype.itemsize + sum(width * table.dtype.itemsize for table in tables)
        numbers = sum(table.dtype.itemsize for table in tables) // (2 if chain.one_a_pair else 1)
        return rotated_row_tiling(
            d,
            _part(chain, d),
            1 if chain.interleaved else 2,
            x.dtype.itemsize,
            0 if weight is None else weight.dtype.itemsize,
            numbers,
            row_bytes,
            arch,
            aligned,
        )


def _part(chain: RotatedRowChain, d: int) -> int:
    """How many elements of a head lie together and are turned alike: a head, or a half of it."""
    return d // chain.heads // (1 if chain.interleaved else 2)


# --- the op ---------------------------------------------------------------------------------------------------------

FAMILY = RotatedRow()
OPS = (
    Op(
        "norm_all_heads_rope",
        FAMILY,
        tuple(FAMILY.named),
        (Option("heads", "int", 1), Option("own", "bool", False), *OPTIONS),
    ),
)
