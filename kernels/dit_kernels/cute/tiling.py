"""How one row is laid over the threads of a CTA: configuration as data, apart from the device code.

A row of D elements is cut into vectors of `vector` elements; thread t of a CTA of `threads` takes the vectors
t, t + threads, t + 2*threads, ... so that neighbouring threads touch neighbouring 16-byte pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WARP = 32
ACCESS_BYTES = 16  # the widest load or store of one thread
MAX_THREADS = 512  # 128 registers a thread: room to hold a row and every parameter without a spill
MAX_THREADS_OF_ONE_VECTOR = 640  # of a thread that has one vector of the row only, and so needs fewer
MAX_CTAS = 16  # on a multiprocessor: fewer for narrow rows than it could hold, so that each walks some rows
ROW_REGISTERS = 16  # registers a thread may spend on its part of one row operand; wider rows are read again instead
LOADED_REGISTERS = 40  # registers a thread may spend on operands loaded ahead of the first reduction
HELD_REGISTERS = 36  # the same of a staged kernel, whose rows wait in shared memory
# Where each row has a gate and a scale of its own, few threads with three vectors each keep more in flight: the dual at
# S=1056 takes 15.1 with 480 threads, 15.9 with 256, 14.5 with 160, 15.5 with 128 (copy 13.4), and at S=4128 48.2, 50.2,
# 47.7 and 47.6 (copy 46.6).
VECTORS_OF_A_ROW = 3
LOADED_REGISTERS_OF_A_ROW = 80

# What follows was measured on an H200 in bf16, D=3840, in microseconds (benchmarks/NOTES.md has the rest).
#
# The next row comes into registers where few are needed. Threads of such a kernel on one multiprocessor, by the
# registers of a thread's loaded operands, S=4128, from two runs, and a copy of the same bytes:
#                   1024    1536    2048 threads   copy
#   scaled norm     21.2    19.5    17.6           16.8
#   gated norm      26.2    24.9    28.2           24.3
#   dual            38.0    42.6    38.9           31.8     34.0 staged
RESIDENT_THREADS = ((12, 2048), (16, 1536), (LOADED_REGISTERS, 1024))
FEW_REGISTERS = 16

# As the times tell it, multiprocessors get unequal shares of the memory's bandwidth: where all CTAs walk as many rows,
# S=16416 takes the dual 140.9, the gated norm 94.8 and the scaled norm 65.8. Where some rows are left to CTAs that
# start as others end: 124.0, 89.4 and 62.0 (copies 119.5, 90.3 and 60.8). Chunks of 1 or 4 rows are slower, and so is
# a CTA that starts anew where all walk a few rows only (S=2112: gated norm 14.5 against 14.0).
# A chain whose products are not bf16 has more instructions, and what a CTA does once, tanh among them, counts for more:
# the dual at S=4128 in fp16 takes 34.9 with 11 sixteenths of the rows walked, 35.1 with 14; in the form fp32, 35.8 and
# 35.2.
SHARE_FROM_REGISTERS = 14
SHARE_FROM_SHARED = {"bf16": 6, "fp16": 11, "fp32": 14}  # by the dtype of the products
CHUNK = 2
SHORT = 6

REGISTERS = 65536  # of one multiprocessor
OTHER_SHARED_BYTES = 1536  # of one CTA: what the system takes, barriers and partial sums


@dataclass(frozen=True)
class Schedule:
    """How the rows of a batch item are shared out, where CTAs walk rows."""

    ctas: int  # on a multiprocessor, each of which walks many rows
    stages: int  # rows on their way through shared memory; 0: the next row comes into registers
    share: int  # sixteenths of the rows that are walked so; the rest goes to CTAs of `chunk` rows
    chunk: int = CHUNK
    short: int = SHORT  # with no more rows than this for each, the walkers take them all


@dataclass(frozen=True)
class RowTiling:
    """One CTA's walk over one row."""

    threads: int  # a multiple of a warp
    vector: int  # elements of one vector; divides D, so that a vector lies wholly in the row or wholly outside
    vectors: int  # vectors of one thread
    tail: bool  # threads * vectors * vector > D: vectors carry a predicate
    resident: bool  # the row stays in registers; otherwise each pass over it reads it again
    ahead: bool  # the parameters (weights, gate, scale) are loaded with the row, before the first reduction
    schedule: Schedule | None  # None: a CTA takes one row

    @property
    def warps(self) -> int:
        return self.threads // WARP


@dataclass(frozen=True)
class Machine:
    """What a tiling depends on of an architecture."""

    shared_bytes: int  # of one multiprocessor, that bulk copies can fill; sm_80 and sm_89 have no bulk copies
    more_registers: int  # that ptxas gives a thread of a staged kernel there than on sm_90


def machine(arch: str) -> Machine:
    number = int(arch.removeprefix("sm_").rstrip("af"))
    if number < 90:
        return Machine(0, 0)
    return Machine((227 if number < 120 else 99) * 1024, 0 if number == 90 else 16)


def row_tiling(
    d: int,
    row_widths: Sequence[int],
    parameter_widths: Sequence[int],
    arch: str,
    walks: bool = True,
    aligned: bool = True,
    product: str = "bf16",
) -> RowTiling:
    """The tiling for rows of `d` elements.

    row_widths: bytes of an element of each tensor read per row (x, residual); parameter_widths: of each other operand
    that is read as vectors, as it is kept. The vector is as wide as the narrowest row operand needs for a 16-byte
    access. walks: no parameter differs from row to row; aligned: rows start and end at multiples of 16 bytes, as bulk
    copies need them; product: the dtype of the products, two of which are one instruction in bf16.
    """
    vector = _vector_elements(d, min(row_widths))
    registers = _registers(vector, max(row_widths))
    total = d // vector
    on = machine(arch)
    bulk = walks and aligned and on.shared_bytes > 0
    resident = -(-total // MAX_THREADS) * registers <= ROW_REGISTERS
    most = ROW_REGISTERS // registers if resident else total
    fewest = 1 if total <= (MAX_THREADS_OF_ONE_VECTOR if bulk else MAX_THREADS) else -(-total // MAX_THREADS)
    if resident and not walks and total % (VECTORS_OF_A_ROW * WARP) == 0:
        fewest = min(max(fewest, VECTORS_OF_A_ROW), most)
    threads, vectors = _split(total, most, fewest)
    tail = threads * vectors != total
    held = vectors * sum(_registers(vector, width) for width in parameter_widths)
    loaded = held + vectors * sum(_registers(vector, width) for width in row_widths)
    schedule = None
    if walks and resident:
        if bulk and loaded > FEW_REGISTERS and held <= HELD_REGISTERS:
            used = 16 + held + held // 2 + 8 * tail + on.more_registers
            schedule = _staged(threads, used, d * sum(row_widths), on.shared_bytes, SHARE_FROM_SHARED[product])
        elif loaded <= LOADED_REGISTERS:
            schedule = _unstaged(threads, loaded)
    most_loaded = LOADED_REGISTERS if walks else LOADED_REGISTERS_OF_A_ROW
    ahead = resident and (loaded <= most_loaded or schedule is not None)
    return RowTiling(threads, vector, vectors, tail, resident, ahead, schedule)


def _unstaged(threads: int, loaded: int) -> Schedule:
    most = next(most for registers, most in RESIDENT_THREADS if loaded <= registers)
    return Schedule(max(1, min(most // threads, MAX_CTAS)), 0, SHARE_FROM_REGISTERS)


def _staged(threads: int, registers: int, row_bytes: int, shared_bytes: int, share: int) -> Schedule | None:
    """`registers`: those of a thread, by estimate. A CTA more than run at once would make the walkers unequal."""
    for ctas in range(max(1, min(REGISTERS // (threads * registers), MAX_CTAS)), 0, -1):
        room = (shared_bytes // ctas - OTHER_SHARED_BYTES) // row_bytes
        if room >= 2:
            return Schedule(ctas, 3 if ctas <= 2 and room >= 3 else 2, share)
    return None


def _vector_elements(d: int, width: int) -> int:
    """The largest power of two that divides d and whose elements of `width` bytes fit one access."""
    return min(d & -d, ACCESS_BYTES // width)


def _registers(vector: int, width: int) -> int:
    return -(-vector * width // 4)


def _split(total: int, most: int, fewest: int) -> tuple[int, int]:
    """(threads, vectors of one) for `total` vectors: the fewest a thread that leave no tail, if not twice as many."""
    for vectors in range(fewest, min(most, 2 * fewest) + 1):
        if total % (vectors * WARP) == 0:
            return total // vectors, vectors
    threads = -(-total // (fewest * WARP)) * WARP
    return threads, fewest
