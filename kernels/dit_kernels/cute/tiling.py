"""How one row is laid over the threads of a CTA: configuration as data, apart from the device code.

A row of D elements is cut into vectors of `vector` elements; thread t of a CTA of `threads` takes the vectors
t, t + threads, t + 2*threads, ... so that neighbouring threads touch neighbouring 16-byte pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WARP = 32
ACCESS_BYTES = 16  # the widest load or store of one thread
MAX_CTAS = 16  # on a multiprocessor: fewer for narrow rows than it could hold, so that each walks some rows
MAX_THREADS = 512  # 128 registers a thread: room to hold a row and every parameter without a spill
ROW_REGISTERS = 16  # registers a thread may spend on its part of one row operand; wider rows are read again instead
LOADED_REGISTERS = 40  # registers a thread may spend on operands loaded ahead of the first reduction

# Threads of a persistent kernel on one multiprocessor, by the registers of a thread's loaded operands. Measured on an
# H200 in bf16, S=4128, D=3840, in microseconds, against a copy of the same bytes (gated norm: 3/4 of the dual's):
#                   1024    1536    2048 threads   copy
#   scaled norm     21.2    19.5    18.5           17.7
#   gated norm      26.2    25.9    28.2           25.6
#   dual            39.0    42.6    38.9           34.2
RESIDENT_THREADS = ((12, 2048), (16, 1536), (LOADED_REGISTERS, 1024))


@dataclass(frozen=True)
class RowTiling:
    """One CTA's walk over one row."""

    threads: int  # a multiple of a warp
    vector: int  # elements of one vector; divides D, so that a vector lies wholly in the row or wholly outside
    vectors: int  # vectors of one thread
    tail: bool  # threads * vectors * vector > D: vectors carry a predicate
    resident: bool  # the row stays in registers; otherwise each pass over it reads it again
    ahead: bool  # the parameters (weights, gate, scale) are loaded with the row, before the first reduction
    ctas: int  # CTAs on a multiprocessor, where the kernel is persistent

    @property
    def warps(self) -> int:
        return self.threads // WARP


def row_tiling(d: int, row_widths: Sequence[int], parameter_widths: Sequence[int]) -> RowTiling:
    """The tiling for rows of `d` elements.

    row_widths: bytes of an element of each tensor read per row (x, residual); parameter_widths: of each other operand
    that is read as vectors. The vector is as wide as the narrowest row operand needs for a 16-byte access.
    """
    vector = _vector_elements(d, min(row_widths))
    registers = _registers(vector, max(row_widths))
    total = d // vector
    resident = -(-total // MAX_THREADS) * registers <= ROW_REGISTERS
    threads, vectors = _split(total, ROW_REGISTERS // registers if resident else total)
    loaded = vectors * sum(_registers(vector, w) for w in (*row_widths, *parameter_widths))
    return RowTiling(
        threads,
        vector,
        vectors,
        tail=threads * vectors != total,
        resident=resident,
        ahead=resident and loaded <= LOADED_REGISTERS,
        ctas=_ctas(threads, loaded),
    )


def _ctas(threads: int, loaded: int) -> int:
    resident = next((most for registers, most in RESIDENT_THREADS if loaded <= registers), MAX_THREADS)
    return max(1, min(resident // threads, MAX_CTAS))


def _vector_elements(d: int, width: int) -> int:
    """The largest power of two that divides d and whose elements of `width` bytes fit one access."""
    return min(d & -d, ACCESS_BYTES // width)


def _registers(vector: int, width: int) -> int:
    return -(-vector * width // 4)


def _split(total: int, most: int) -> tuple[int, int]:
    """(threads, vectors of one) for `total` vectors: the fewest a thread that leave no tail, if not twice as many."""
    fewest = -(-total // MAX_THREADS)
    for vectors in range(fewest, min(most, 2 * fewest) + 1):
        if total % (vectors * WARP) == 0:
            return total // vectors, vectors
    threads = -(-total // (fewest * WARP)) * WARP
    return threads, fewest
