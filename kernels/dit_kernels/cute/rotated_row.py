"""The rms norm over all heads of a token, with the rotation of each head. Each row is read and written once.

A CTA works on the row of a token, which stays in registers (`rows.py`). The cosines and sines of the token are loaded
with the row, by bulk copies too. If the pairs of a head are its halves, a thread has the same vector of both halves, as
its vectors 2k and 2k + 1.

All arithmetic is fp32. `rounding.py` gives the dtype that each step is rounded to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cutlass import Float32, Int32

from dit_kernels.chain import RotatedRowChain
from dit_kernels.cute.arith import elements_of, rounded
from dit_kernels.cute.norm import normed, rstd_of, square, sum_of
from dit_kernels.cute.pairs import Vectors, doubled, neighbours_swapped, signed, sums_of_products
from dit_kernels.cute.reduce import cta_sum
from dit_kernels.cute.rows import RowKernel, Shared
from dit_kernels.cute.stage import Reader, RowPlace, walk

TABLES = ("cos", "sin")


@dataclass(frozen=True)
class HalvesPlace(RowPlace):
    """A place whose vectors 2k and 2k + 1 are in the two halves of a head. half: vectors in a half."""

    half: int

    def unit(self, k):
        """The number of this thread's pair of vectors, in the row."""
        return self.thread + k * self.tiling.threads

    def index(self, i):
        unit = self.unit(i // 2)
        return (unit // self.half * 2 + i % 2) * self.half + unit % self.half

    def inside(self, i):
        return self.unit(i // 2) * (2 * self.tiling.vector) < self.d if self.tiling.tail else True


@dataclass(frozen=True)
class TablePlace(RowPlace):
    """Which vectors of a table belong to the vectors of a row.

    row: the place in the row. head: vectors in a head. If all heads have one rotation, and all vectors of a thread are
    at one place in their heads, a thread has the table's vectors of its first vectors only.
    """

    chain: RotatedRowChain
    row: RowPlace
    head: int

    @classmethod
    def of(cls, chain: RotatedRowChain, row: RowPlace) -> TablePlace:
        tiling, head = row.tiling, row.d // chain.heads // row.tiling.vector
        together = 1 if chain.interleaved else 2
        one = chain.one_a_pair and not chain.interleaved  # vector of the table for both halves
        units = tiling.vectors // together
        if not chain.own and tiling.threads % (head // together) == 0:
            units = 1
        vector = tiling.vector // 2 if chain.one_a_pair and chain.interleaved else tiling.vector
        tiling = replace(tiling, vector=vector, vectors=units * (1 if one else together))
        return cls(tiling, row.d, row.batch, row.token, row.thread, chain, row, head)

    @property
    def has_one_for_halves(self) -> bool:
        return self.chain.one_a_pair and not self.chain.interleaved

    def slot(self, i: int) -> int:
        """Which of the table's vectors of this thread belongs to its vector i of the row."""
        return (i // 2 if self.has_one_for_halves else i) % self.tiling.vectors

    def index(self, i):
        if self.has_one_for_halves:
            unit = self.row.thread + i * self.row.tiling.threads
            return unit if self.chain.own else unit % (self.head // 2)
        return self.row.index(i) if self.chain.own else self.row.index(i) % self.head

    def inside(self, i):
        if not self.chain.own:
            return True
        return self.row.inside(2 * i if self.has_one_for_halves else i)


class RotatedRowKernel(RowKernel):
    """The kernels of a RotatedRowChain."""

    @property
    def reductions(self) -> int:
        return 1

    def place(self, batch: Int32, token: Int32, thread: Int32) -> RowPlace:
        place = super().place(batch, token, thread)
        if self.chain.interleaved:
            return place
        half = self.d // self.chain.heads // 2 // self.tiling.vector
        return HalvesPlace(self.tiling, self.d, batch, token, thread, half)

    def place_in(self, name: str, place: RowPlace) -> RowPlace:
        return TablePlace.of(self.chain, place) if name in TABLES else place

    def width(self, name: str) -> int:
        if name not in TABLES:
            return self.d
        width = self.d if self.chain.own else self.d // self.chain.heads
        return width // 2 if self.chain.one_a_pair else width

    @property
    def row_names(self) -> list[str]:
        return ["x", *TABLES]

    def shared(self, operands: dict[str, Any], place: RowPlace) -> Shared:
        return _Weight(Reader.of(operands["weight"], self.specs["weight"], place, self.tiling.ahead))

    def run(self, place: RowPlace, rows: dict[str, Reader], shared: _Weight, operands, partials) -> None:
        x, chain, steps = rows["x"], self.chain, self.chain.steps
        norm, weight = steps.norm, shared.weight
        moments = walk(place.tiling, lambda i: place.counted(i, sum_of(square(x(i), None, norm.stat))))
        mean_square = cta_sum(moments, partials[None, 1, 0]) * Float32(1.0 / self.d)
        rstd = rstd_of(mean_square, operands["eps"], norm.root, norm.stat)
        out, rotation = self.writer(operands, "out", place), _Rotation(chain, rows, TablePlace.of(chain, place))
        together = 1 if chain.interleaved else 2
        for first in range(0, place.tiling.vectors, together):
            of_unit = range(first, first + together)
            n = [normed(x(i), None, rstd, weight(i), None, norm) for i in of_unit]
            for i, turned in zip(of_unit, rotation(of_unit, n), strict=True):
                out.store(i, rounded(rounded(turned, steps.rotated), steps.out))


class _Weight(Shared):
    def __init__(self, weight: Reader):
        self.weight = weight


class _Rotation:
    """The rotation of a token."""

    def __init__(self, chain: RotatedRowChain, rows: dict[str, Reader], place: TablePlace):
        self.chain, self.dtype = chain, chain.steps.product
        self.cos, self.sin = (rows[name] for name in TABLES)
        self.place = place
        self.known: dict[tuple[int, int], tuple[Any, Any]] = {}

    def __call__(self, of_unit: range, n: Vectors) -> Vectors:
        """n * cos + turned(n) * sin of the vectors whose numbers are `of_unit`."""
        n = [rounded(v, self.dtype) for v in n]
        others = [neighbours_swapped(n[0])] if self.chain.interleaved else n[::-1]
        return [self._sum(v, other, *self._numbers(i)) for i, v, other in zip(of_unit, n, others, strict=True)]

    def _sum(self, n, other, cos, sin):
        (summed,) = sums_of_products([n], [cos], [other], [sin], self.dtype, self.chain.addcmul)
        return summed

    def _numbers(self, i: int) -> tuple[Any, Any]:
        """The cosines of a vector, and its sines with the sign of the quarter turn."""
        slot, half = self.place.slot(i), 0 if self.chain.interleaved else i % 2
        if (slot, half) not in self.known:
            cos, sin = (self._for_each(table(slot)) for table in (self.cos, self.sin))
            sin = signed(sin, self.chain.interleaved, half == 0)
            self.known[slot, half] = rounded(cos, self.dtype), rounded(sin, self.dtype)
        return self.known[slot, half]

    def _for_each(self, numbers):
        """One number for each element."""
        return doubled(elements_of(numbers)) if self.chain.one_a_pair and self.chain.interleaved else numbers
