"""How one row is laid over the threads of a CTA: configuration as data, apart from the device code.

A row of D elements is cut into vectors of `vector` elements; thread t of a CTA of `threads` takes the vectors
t, t + threads, t + 2*threads, ... so that neighbouring threads touch neighbouring 16-byte pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WARP = 32
ACCESS_BYTES = 16  # the widest load or store of one thread
MAX_GRID_Y = 32768  # of CTAs; the hardware's limit is 65535
MAX_THREADS = 512  # 128 registers a thread: room to hold a row and every parameter without a spill
MAX_THREADS_OF_ONE_VECTOR = 640  # of a thread that has one vector of the row only, and so needs fewer
MAX_CTAS = 16  # on a multiprocessor: fewer for narrow rows than it could hold, so that each walks some rows
ROW_REGISTERS = 16  # registers a thread may spend on its part of one row operand; wider rows are read again instead
LOADED_REGISTERS = 40  # registers a thread may spend on operands loaded ahead of the first reduction
HELD_REGISTERS = 36  # the same of a staged kernel, whose rows wait in shared memory
# Where each row has a gate and a scale of its own: vectors of a thread, if they leave no tail. Microseconds at D=3840,
# S=1056 and 4128, with 1 and with 3: dual 14.3, 47.2 and 14.9, 46.8 (form fp32 47.6 and 55.8 at 4128, fp16 47.4 and
# 51.0); gated 10.1, 31.6 and 10.7, 32.5; scaled 8.1, 25.3 and 8.4, 24.1.
VECTORS_OF_A_ROW = {"dual": 1, "gated": 1, "scaled": 3}
# Registers for operands loaded ahead, there. Microseconds at S=2112, loaded ahead and not: dual D=12288 98.9 and 84.4,
# D=16384 125.3 and 110.5; gated 56.1 and 56.9, 69.9 and 73.1 (copies 74.5, 98.8, 50.5, 66.7).
LOADED_REGISTERS_OF_A_ROW = {"dual": 40, "gated": 80, "scaled": 80}

# What follows was measured on an H200 in bf16, D=3840, in microseconds (benchmarks/NOTES.md has the rest).
#
# Threads of walking CTAs on one multiprocessor, by op: those of a CTA, CTAs, and the stages of each.
#   S                               1056    4128   16416
#   dual     copy                   9.69   31.83   119.3
#            480 threads x 3, 2    10.69   33.12   122.8
#            480 x 2, 3            10.84   32.91   121.9
#            160 x 4, 2            10.86   34.02
#   gated    copy                   7.75   24.39   90.90
#            480 x 4, 2             8.51   24.95   89.28
#            160 x 6, 2             8.09   24.97   89.62
#            160 x 8, 2             9.25   25.37   89.79
#   scaled   copy                   5.81   16.96   61.07
#            480 x 4, 2             6.63   17.60   63.48
#            160 x 6, 3             6.08   17.44   62.95
#            160 x 8, 2             6.14   17.34   63.17
WALKING_THREADS = {"dual": 1152, "gated": 1024, "scaled": 1280}
WALKING_REGISTERS = 24  # of a thread, for parameters, up to which it takes a further vector of the row
WALKING_VECTORS = 3

# Without bulk copies the next row comes into registers: threads on one multiprocessor, by a thread's registers for it.
UNSTAGED_THREADS = ((12, 1536), (24, 1024), (LOADED_REGISTERS, 768))

REGISTERS = 65536  # of one multiprocessor
OTHER_SHARED_BYTES = 1536  # of one CTA: what the system takes, barriers and partial sums


@dataclass(frozen=True)
class Schedule:
    """CTAs that walk rows."""

    ctas: int  # on a multiprocessor
    stages: int  # rows of a CTA in shared memory, under way or worked on; 0: the next row comes into registers


@dataclass(frozen=True)
class RowTiling:
    """One CTA's walk over one row."""

    threads: int  # a multiple of a warp
    vector: int  # elements of one vector; divides D, so that a vector lies wholly in the row or wholly outside
    vectors: int  # vectors of one thread
    tail: bool  # threads * vectors * vector > D: vectors carry a predicate
    resident: bool  # the row stays in registers; otherwise each pass over it reads it again
    ahead: bool  # parameters are loaded with the row: all of a walk, of one row those of the first norm
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
    if number < 120:
        return Machine(227 * 1024, 0 if number == 90 else 4)
    return Machine(99 * 1024, 20)


def row_tiling(
    op: str,
    d: int,
    row_widths: Sequence[int],
    parameter_widths: Sequence[int],
    arch: str,
    walks: bool = True,
    aligned: bool = True,
) -> RowTiling:
    """The tiling for rows of `d` elements.

    op: "dual", "gated" or "scaled". row_widths: bytes of an element of each tensor read per row (x, residual);
    parameter_widths: of each other operand that is read as vectors and loaded with the row, as it is kept. The vector
    is as wide as the narrowest row operand needs for a 16-byte access. walks: no parameter differs from row to row;
    aligned: rows start and end at multiples of 16 bytes, as bulk copies need them.
    """
    vector = _vector_elements(d, min(row_widths))
    registers = _registers(vector, max(row_widths))
    parameter_registers = sum(_registers(vector, width) for width in parameter_widths)
    total = d // vector
    on = machine(arch)
    bulk = walks and aligned and on.shared_bytes > 0
    resident = -(-total // MAX_THREADS) * registers <= ROW_REGISTERS
    most = ROW_REGISTERS // registers if resident else total
    fewest = 1 if total <= (MAX_THREADS_OF_ONE_VECTOR if bulk else MAX_THREADS) else -(-total // MAX_THREADS)
    if resident and not walks and total % (VECTORS_OF_A_ROW[op] * WARP) == 0:
        fewest = min(max(fewest, VECTORS_OF_A_ROW[op]), most)
    threads, vectors = _split(total, most, fewest)
    if resident and bulk:
        few = min(WALKING_VECTORS, WALKING_REGISTERS // max(parameter_registers, 1), most)
        threads, vectors = _fullest(total, range(fewest, few + 1)) or (threads, vectors)
    tail = threads * vectors != total
    held = vectors * parameter_registers
    loaded = held + vectors * sum(_registers(vector, width) for width in row_widths)
    schedule = None
    if walks and resident:
        if bulk and held <= HELD_REGISTERS:
            used = 15 + held + held // 2 + 8 * tail + on.more_registers
            most_ctas = min(WALKING_THREADS[op] // threads, REGISTERS // (threads * used))
            schedule = _staged(most_ctas, d * sum(row_widths), on.shared_bytes)
        elif loaded <= LOADED_REGISTERS:
            schedule = _unstaged(threads, loaded)
    most_loaded = LOADED_REGISTERS if walks else LOADED_REGISTERS_OF_A_ROW[op]
    ahead = resident and (loaded <= most_loaded or schedule is not None)
    return RowTiling(threads, vector, vectors, tail, resident, ahead, schedule)


def _unstaged(threads: int, loaded: int) -> Schedule:
    most = next(most for registers, most in UNSTAGED_THREADS if loaded <= registers)
    return Schedule(max(1, min(most // threads, MAX_CTAS)), 0)


def _staged(most_ctas: int, row_bytes: int, shared_bytes: int) -> Schedule | None:
    for ctas in range(max(1, min(most_ctas, MAX_CTAS)), 0, -1):
        room = (shared_bytes // ctas - OTHER_SHARED_BYTES) // row_bytes
        if room >= 2:
            return Schedule(ctas, 3 if ctas <= 2 and room >= 3 else 2)
    return None


def _vector_elements(d: int, width: int) -> int:
    """The largest power of two that divides d and whose elements of `width` bytes fit one access."""
    return min(d & -d, ACCESS_BYTES // width)


def _registers(vector: int, width: int) -> int:
    return -(-vector * width // 4)


def _fullest(total: int, choices: Iterable[int]) -> tuple[int, int] | None:
    """(threads, vectors of one) for `total` vectors: the fewest outside the row, and of equals the most a thread."""
    tilings = [(-(-total // (vectors * WARP)) * WARP, vectors) for vectors in choices]
    return min(tilings, key=lambda tiling: (tiling[0] * tiling[1], -tiling[1]), default=None)


def _split(total: int, most: int, fewest: int) -> tuple[int, int]:
    """(threads, vectors of one) for `total` vectors: the fewest a thread that leave no tail, if not twice as many."""
    for vectors in range(fewest, min(most, 2 * fewest) + 1):
        if total % (vectors * WARP) == 0:
            return total // vectors, vectors
    threads = -(-total // (fewest * WARP)) * WARP
    return threads, fewest
