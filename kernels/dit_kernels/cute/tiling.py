"""How one row is distributed over the threads of a CTA: configuration as data, without device code.

A row of D elements is cut into vectors of `vector` elements. Thread t of a CTA of `threads` takes the vectors
t, t + threads, t + 2*threads, ..., so that neighbouring threads access neighbouring 16-byte pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

WARP = 32
ACCESS_BYTES = 16  # the widest load or store of one thread
MAX_GRID_Y = 32768  # CTAs; the hardware's limit is 65535
MAX_THREADS = 512  # leaves 128 registers per thread, enough to hold a row and every parameter without a spill
MAX_THREADS_OF_ONE_VECTOR = 640  # if a thread has only one vector of the row, and so needs fewer registers
MAX_CTAS = 16  # per multiprocessor. It could hold more for narrow rows, but each CTA should walk over several rows
ROW_REGISTERS = 16  # registers per thread for its part of one row operand; wider rows are read again instead
LOADED_REGISTERS = 40  # registers per thread for operands that are loaded before the first reduction
HELD_REGISTERS = 36  # the same for a staged kernel, whose rows wait in shared memory
# The keys below are the numbers of rows of a token that a kernel reads and writes: (2, 2) is
# norm_tanh_mul_add_norm_scale, (2, 1) norm_tanh_mul_add, (1, 1) norm_scale.
#
# Vectors per thread if each row has different factors, used if they leave no tail. Microseconds at D=3840, S=1056 and
# 4128, with 1 and with 3 vectors: (2, 2) 14.3, 47.2 and 14.9, 46.8 (form fp32 47.6 and 55.8 at 4128, fp16 47.4 and
# 51.0); (2, 1) 10.1, 31.6 and 10.7, 32.5; (1, 1) 8.1, 25.3 and 8.4, 24.1.
VECTORS_OF_A_ROW = {(2, 2): 1, (2, 1): 1, (1, 1): 3}
# Registers per thread for operands loaded ahead, in the same case. Microseconds at S=2112, loaded ahead and not:
# (2, 2) D=12288 98.9 and 84.4, D=16384 125.3 and 110.5; (2, 1) 56.1 and 56.9, 69.9 and 73.1 (plain copies take 74.5,
# 98.8, 50.5, 66.7).
LOADED_REGISTERS_OF_A_ROW = {(2, 2): 40, (2, 1): 80, (1, 1): 80}

# The following was measured on an H200 in bf16, D=3840, in microseconds (kernels/benchmarks/NOTES.md has the rest).
#
# Threads per multiprocessor if CTAs walk over rows. A line names the threads of a CTA, the CTAs per multiprocessor, and
# the rows of each CTA in shared memory.
#   S                               1056    4128   16416
#   (2, 2)   copy                   9.69   31.83   119.3
#            480 threads x 3, 2    10.69   33.12   122.8
#            480 x 2, 3            10.84   32.91   121.9
#            160 x 4, 2            10.86   34.02
#   (2, 1)   copy                   7.75   24.39   90.90
#            480 x 4, 2             8.51   24.95   89.28
#            160 x 6, 2             8.09   24.97   89.62
#            160 x 8, 2             9.25   25.37   89.79
#   (1, 1)   copy                   5.81   16.96   61.07
#            480 x 4, 2             6.63   17.60   63.48
#            160 x 6, 3             6.08   17.44   62.95
#            160 x 8, 2             6.14   17.34   63.17
WALKING_THREADS = {(2, 2): 1152, (2, 1): 1024, (1, 1): 1280}
WALKING_REGISTERS = 24  # per thread, for parameters; a thread takes another vector of the row within this limit
WALKING_VECTORS = 3

# Without bulk copies, the next row is loaded into registers. Pairs of: registers per thread for loaded operands, up to
# which the second number holds; threads per multiprocessor.
UNSTAGED_THREADS = ((12, 1536), (24, 1024), (LOADED_REGISTERS, 768))

# Rows without parameters take fewer registers, and a CTA takes one row, since it would keep nothing for the next row.
# Microseconds of silu_mul_quant on an H100 at D=10240, S=1056 and 4128: a copy 22.8 and 74.8; one row 24.9 and 77.2
# (with 320 threads 26.1 and 80.4). A walk with two rows of each of two CTAs in shared memory 26.9 and 80.0, with one
# CTA 26.2 and 78.0, without shared memory 29.8 and 84.2.
PLAIN_THREADS = 640

# The same for rows of two parts: the most threads per CTA, and registers per thread for both parts.
JOINED_THREADS, JOINED_REGISTERS = 768, 24

# A kernel that rotates a row: registers per thread beside x, the weight and the tables, if the next rows wait in shared
# memory and if the next row waits in registers.
ROTATING_REGISTERS = (24, 40)

# Bytes of the widest operand of a row that stays in registers. Two parts may need one vector more than one row.
WIDEST_ROW, WIDEST_PLAIN_ROW = (4 * ROW_REGISTERS * threads for threads in (MAX_THREADS, PLAIN_THREADS))
WIDEST_JOINED_ROW = 4 * ROW_REGISTERS * JOINED_THREADS

REGISTERS = 65536  # per multiprocessor
OTHER_SHARED_BYTES = 1536  # per CTA: reserved by the system, mbarriers and partial sums


@dataclass(frozen=True)
class Schedule:
    """How many CTAs walk over rows, and with how many stages."""

    ctas: int  # per multiprocessor
    stages: int  # rows of a CTA in shared memory, being copied or worked on; 0: the next row is loaded into registers


@dataclass(frozen=True)
class RowTiling:
    """How one CTA works on one row."""

    threads: int  # a multiple of a warp
    vector: int  # elements per vector; divides D, so that a vector is wholly inside or wholly outside the row
    vectors: int  # vectors per thread
    tail: bool  # threads * vectors * vector > D, so accesses have a predicate
    resident: bool  # the row stays in registers; otherwise each pass reads it again
    ahead: bool  # parameters are loaded with the row: all of them in a walk, those of the first norm for one row
    schedule: Schedule | None  # None: a CTA takes one row

    @property
    def warps(self) -> int:
        return self.threads // WARP

    def over(self, d: int) -> RowTiling:
        """How the same CTA works on another row, of `d` elements."""
        vectors = -(-d // (self.threads * self.vector))
        return replace(self, vectors=vectors, tail=self.threads * vectors * self.vector != d)


@dataclass(frozen=True)
class Machine:
    """The properties of an architecture that a tiling depends on."""

    shared_bytes: int  # per multiprocessor, for bulk copies; 0 on sm_80 and sm_89, which have none
    more_registers: int  # per thread of a staged kernel, that ptxas uses beyond those on sm_90


def machine(arch: str) -> Machine:
    number = int(arch.removeprefix("sm_").rstrip("af"))
    if number < 90:
        return Machine(0, 0)
    if number < 120:
        return Machine(227 * 1024, 0 if number == 90 else 4)
    return Machine(99 * 1024, 20)


def row_tiling(
    rows: tuple[int, int],
    d: int,
    row_widths: Sequence[int],
    parameter_widths: Sequence[int],
    arch: str,
    walks: bool = True,
    aligned: bool = True,
    kept_width: int = 0,
) -> RowTiling:
    """The tiling for rows of `d` elements.

    rows: rows of a token that are read, and that are written. row_widths: bytes per element of each tensor that is read
    per row (x, residual). parameter_widths: bytes per element, as it is kept, of each other operand that is read as
    vectors and loaded with the row. A vector is as wide as the narrowest row operand needs for a 16-byte access. walks:
    no parameter differs from row to row. aligned: rows start and end at multiples of 16 bytes, as bulk copies require.
    kept_width: bytes per element of a result that stays in registers beside everything else; 0 if there is none.
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
    if resident and not walks and total % (VECTORS_OF_A_ROW[rows] * WARP) == 0:
        fewest = min(max(fewest, VECTORS_OF_A_ROW[rows]), most)
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
            kept = vectors * _registers(vector, kept_width)
            used = 15 + held + held // 2 + kept + 8 * tail + on.more_registers
            most_ctas = min(WALKING_THREADS[rows] // threads, REGISTERS // (threads * used))
            schedule = _staged(most_ctas, d * sum(row_widths), on.shared_bytes)
        elif loaded <= LOADED_REGISTERS:
            schedule = _unstaged(threads, loaded)
    most_loaded = LOADED_REGISTERS if walks else LOADED_REGISTERS_OF_A_ROW[rows]
    ahead = resident and (loaded <= most_loaded or schedule is not None)
    return RowTiling(threads, vector, vectors, tail, resident, ahead, schedule)


def plain_row_tiling(d: int, row_widths: Sequence[int], more: int = 0) -> RowTiling:
    """The tiling for rows without parameters, of at most WIDEST_PLAIN_ROW bytes. Arguments: see `row_tiling`.

    more: the elements of another part of the row, a multiple of 16. Both parts have at most WIDEST_JOINED_ROW bytes.
    """
    vector = _vector_elements(d, min(row_widths))
    registers, total = _registers(vector, max(row_widths)), d // vector
    if more:
        threads = _threads_of_both(total, more // vector, JOINED_REGISTERS // registers)
        vectors = -(-total // threads)
    else:
        most, fewest = ROW_REGISTERS // registers, -(-total // PLAIN_THREADS)
        if fewest > 2:  # so many registers leave room for fewer threads
            fewest = min(-(-total // MAX_THREADS), most)
        threads, vectors = _split(total, most, fewest)
    return RowTiling(threads, vector, vectors, threads * vectors != total, resident=True, ahead=True, schedule=None)


def rotated_row_tiling(
    d: int,
    part: int,
    together: int,
    width: int,
    weight_width: int,
    numbers: int,
    row_bytes: int,
    arch: str,
    aligned: bool = True,
) -> RowTiling:
    """The tiling for rows of `d` elements, of at most WIDEST_ROW bytes, that are normed and then rotated.

    part: elements that vectors may not pass the end of: a head, or a half of it. together: 2 if a thread has the same
    vector of both halves of a head, which are its vectors 2k and 2k + 1; otherwise 1. width and weight_width: bytes per
    element of x and of the weight, 0 without a weight. numbers: bytes of the tables per element of x. row_bytes: of a
    token, as they are loaded. aligned: each row starts and ends at multiples of 16 bytes, as bulk copies require.
    """
    vector = _vector_elements(part, width)
    registers, held = together * _registers(vector, width), together * _registers(vector, weight_width)
    tables = together * _registers(vector, numbers)
    total, on = d // (vector * together), machine(arch)
    fewest = -(-total // (MAX_THREADS_OF_ONE_VECTOR if together == 1 else MAX_THREADS))
    most = max(fewest, min(WALKING_VECTORS // together, ROW_REGISTERS // registers))
    tiled = _fullest(total, range(fewest, most + 1))
    assert tiled is not None
    threads, units = tiled
    tail = threads * units != total
    used = units * (registers + held) + tables + 8 * tail

    def most_ctas(registers: int) -> int:
        return max(1, min(REGISTERS // (threads * registers), WALKING_THREADS[1, 1] // threads))

    schedule = None
    if aligned and on.shared_bytes > 0:
        schedule = _staged(most_ctas(used + ROTATING_REGISTERS[0]), row_bytes, on.shared_bytes)
    if schedule is None and units * (registers + held + tables) <= LOADED_REGISTERS:
        following = units * registers + tables  # the next row
        schedule = Schedule(min(most_ctas(used + following + ROTATING_REGISTERS[1]), MAX_CTAS), 0)
    return RowTiling(threads, vector, units * together, tail, True, schedule is not None, schedule)


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
    """The most elements of `width` bytes that fit one access: a power of two that divides d."""
    return min(d & -d, ACCESS_BYTES // width)


def _registers(vector: int, width: int) -> int:
    return -(-vector * width // 4)


def _fullest(total: int, choices: Iterable[int]) -> tuple[int, int] | None:
    """(threads, vectors per thread) for `total` vectors: the fewest outside the row, then the most per thread."""
    tilings = [(-(-total // (vectors * WARP)) * WARP, vectors) for vectors in choices]
    return min(tilings, key=lambda tiling: (tiling[0] * tiling[1], -tiling[1]), default=None)


def _split(total: int, most: int, fewest: int) -> tuple[int, int]:
    """(threads, vectors per thread) for `total` vectors: the fewest per thread without a tail, up to twice `fewest`.

    If there are none, `fewest` vectors per thread with a tail.
    """
    for vectors in range(fewest, min(most, 2 * fewest) + 1):
        if total % (vectors * WARP) == 0:
            return total // vectors, vectors
    threads = -(-total // (fewest * WARP)) * WARP
    return threads, fewest


def _threads_of_both(total: int, more: int, most: int) -> int:
    """The threads of a CTA for two parts of a row: the fewest vectors outside the parts, then the fewest per thread.

    total, more: the vectors of each part. most: of both parts, per thread.
    """

    def vectors(threads: int) -> int:
        return -(-total // threads) + -(-more // threads)

    choices = (threads for threads in range(WARP, JOINED_THREADS + 1, WARP) if vectors(threads) <= most)
    return min(choices, key=lambda threads: (threads * vectors(threads), vectors(threads)))


# --- rows without a sum over the row --------------------------------------------------------------------------------

ELEMENT_THREADS = 256
ELEMENT_VECTORS = 2  # per thread and operand: four accesses of 16 bytes in flight


@dataclass(frozen=True)
class VectorTiling:
    """How one CTA works on its part of a batch item's vectors."""

    threads: int
    vector: int  # elements; divides D
    vectors: int  # per thread


def vector_tiling(d: int, width: int) -> VectorTiling:
    """The tiling for rows of `d` elements. width: bytes per element of the narrowest operand."""
    return VectorTiling(ELEMENT_THREADS, _vector_elements(d, width), ELEMENT_VECTORS)
