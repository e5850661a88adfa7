"""Global and shared memory, and what compute-sanitizer would say of each access.

What is known of memory is known per granule of two bytes, the narrowest access of these kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # np.ndarray

GRANULE = 2
LINE = 16  # the widest access: segments start at multiples of it
NOTHING, HOST, SEVERAL = -1, -2, -3  # instead of a thread
SHARED_BASE = 1024


class Fault(Exception):
    """A kernel did what it must not do. The message names the thread, the line of the PTX and the buffer."""


@dataclass(frozen=True)
class Threads:
    """Who runs: lane l is thread l % size of CTA l // size of the grid."""

    size: int
    grid: tuple[int, int, int]

    @property
    def ctas(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def name(self, lane: int) -> str:
        cta, thread = divmod(int(lane), self.size)
        x, y, _ = self.grid
        return f"thread {thread} of CTA ({cta % x}, {cta // x % y}, {cta // x // y})"


@dataclass
class Copy:
    """A bulk copy into shared memory, which lands when phase `phase` of an mbarrier of its CTA completes."""

    lane: int
    line: int
    barrier: int
    phase: int
    landed: bool = False


def _accesses(shadow: Array, size: int) -> Array:
    """The granules of memory as one row for each aligned access of `size` bytes."""
    return shadow.reshape(-1, size // GRANULE)


# --- global memory --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Buffer:
    """A tensor in global memory: where its rows are, as addresses and as offsets of the arena."""

    name: str
    address: int
    itemsize: int
    rows: dict[int, tuple[int, ...]]  # offset of a row from `address` in bytes -> its index
    row_bytes: int
    writable: bool

    def element(self, offset: int) -> str:
        """Names the byte at `offset` from the buffer's start."""
        for start, index in self.rows.items():
            if start <= offset < start + self.row_bytes:
                return f"{self.name}[{', '.join(map(str, (*index, (offset - start) // self.itemsize)))}]"
        return f"{self.name}, {offset} bytes from its start and outside of its rows"


class GlobalMemory:
    """Buffers, each of one or several runs of bytes, in one arena."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._pending: list[tuple[int, bytes | int, int]] = []  # address, content or its size, buffer
        self._end = 0x7F0000000000
        self.counters: dict[int, int] = {}  # by address: what only atomics read and write

    def add(
        self,
        name: str,
        rows: dict[int, tuple[tuple[int, ...], bytes | int]],
        itemsize: int,
        skew: int,
        writable: bool,
    ) -> int:
        """Adds a buffer and gives its address: a multiple of 256, plus skew.

        rows: by their offset in bytes, of each row its index and its content, or its size where nothing is there yet.
        """
        address = -(-self._end // 256) * 256 + 4096 + skew
        sizes = {offset: content if isinstance(content, int) else len(content) for offset, (_, content) in rows.items()}
        self._end = address + max((o + s for o, s in sizes.items()), default=0)
        indices = {offset: index for offset, (index, _) in rows.items()}
        row_bytes = next(iter(sizes.values()), 0)
        self.buffers.append(Buffer(name, address, itemsize, indices, row_bytes, writable))
        self._pending += [(address + o, content, len(self.buffers) - 1) for o, (_, content) in rows.items()]
        return address

    def add_counters(self, count: int) -> int:
        """Adds numbers of four bytes, all 0, that only atomics may reach, and gives the address of the first."""
        address = self._end = -(-self._end // 256) * 256 + 4096
        self._end += 4 * count
        self.counters |= {address + 4 * i: 0 for i in range(count)}
        return address

    def count(self, address: int, last: int) -> int:
        """atom.inc: the counter, which is then one more, or 0 again behind `last`."""
        if address not in self.counters:
            raise Fault(f"counts at 0x{address:x}, where no counter is")
        before = self.counters[address]
        self.counters[address] = 0 if before >= last else before + 1
        return before

    def freeze(self) -> None:
        """Lays the buffers out in the arena: runs of rows that touch become one segment."""
        runs: list[list[tuple[int, bytes | int, int]]] = []
        end = -1
        for row in sorted(self._pending, key=lambda row: row[0]):
            if row[0] != end or runs[-1][-1][2] != row[2]:
                runs.append([])
            runs[-1].append(row)
            end = row[0] + (row[1] if isinstance(row[1], int) else len(row[1]))
        sizes = [sum(c if isinstance(c, int) else len(c) for _, c, _ in run) for run in runs]
        self._starts = np.array([run[0][0] for run in runs], np.int64)
        self._ends = self._starts + np.array(sizes, np.int64)
        self._owners = np.array([run[0][2] for run in runs])
        rooms = [-(-(run[0][0] % LINE + size) // LINE) * LINE for run, size in zip(runs, sizes, strict=True)]
        places = np.cumsum([0, *rooms])
        self._offsets = places[:-1] + self._starts % LINE
        self._writable = np.array([self.buffers[owner].writable for owner in self._owners])
        self.data = np.zeros(int(places[-1]), np.uint8)
        self._writer = np.full(len(self.data) // GRANULE, NOTHING, np.int32)
        self._epoch = np.zeros(len(self.data) // GRANULE, np.int32)
        for run, offset in zip(runs, self._offsets, strict=True):
            content = b"".join(bytes(c) if isinstance(c, int) else c for _, c, _ in run)
            self.data[offset : offset + len(content)] = np.frombuffer(content, np.uint8)
            if not isinstance(run[0][1], int):
                self._writer[offset // GRANULE : (offset + len(content)) // GRANULE] = HOST

    def content(self, name: str) -> bytes:
        """The bytes of the rows of a buffer, whose order in memory is that of their indices."""
        owner, buffer = next((i, buffer) for i, buffer in enumerate(self.buffers) if buffer.name == name)
        assert list(buffer.rows) == sorted(buffer.rows)
        segments = np.flatnonzero(self._owners == owner)
        sizes = self._ends - self._starts
        return b"".join(self.data[self._offsets[s] : self._offsets[s] + sizes[s]].tobytes() for s in segments)

    def place(self, addresses: Array, size: int, lanes: Array, threads: Threads, what: str) -> tuple[Array, Array]:
        """(segment, offset in the arena) of accesses of `size` bytes, which must be aligned and inside one segment."""
        addresses = addresses.astype(np.int64)
        segment = np.searchsorted(self._starts, addresses, "right") - 1
        outside = (segment < 0) | (addresses + size > self._ends[segment])
        if outside.any():
            i = int(np.argmax(outside))
            raise Fault(f"{threads.name(lanes[i])}, {what}: {size} bytes at {self._nearest(int(addresses[i]))}")
        misaligned = addresses % min(size, LINE) != 0
        if misaligned.any():
            i = int(np.argmax(misaligned))
            where = self.describe(int(segment[i]), int(addresses[i]))
            raise Fault(f"{threads.name(lanes[i])}, {what}: {size} bytes at {where}, which is misaligned")
        return segment, addresses - self._starts[segment] + self._offsets[segment]

    def describe(self, segment: int, address: int) -> str:
        buffer = self.buffers[self._owners[segment]]
        return buffer.element(address - buffer.address)

    def _nearest(self, address: int) -> str:
        def distance(i: int) -> int:
            return max(int(self._starts[i]) - address, address - int(self._ends[i]), 0)

        segment = min(range(len(self._starts)), key=distance)
        buffer = self.buffers[self._owners[segment]]
        start, end = int(self._starts[segment]), int(self._ends[segment])
        side = f"{start - address} before" if address < start else f"{address - end} after"
        if start <= address < end:
            return f"{buffer.element(address - buffer.address)}, of which {end - address} are inside: out of bounds"
        near = buffer.element((start if address < start else end - buffer.itemsize) - buffer.address)
        return f"0x{address:x}, which is out of bounds: bytes {side} {near}"

    def load(self, addresses: Array, size: int, words: Any, lanes: Array, epochs: Array, threads: Threads, what: str):
        """Rows of the elements of one access each; words: (dtype, count)."""
        segment, offset = self.place(addresses, size, lanes, threads, what)
        at = offset // size
        writer = _accesses(self._writer, size)[at]
        if (writer != HOST).any():
            self._check_load(addresses, segment, writer, _accesses(self._epoch, size)[at], lanes, epochs, threads, what)
        dtype, count = words
        return self.data.view(dtype).reshape(-1, count)[at]

    def _check_load(self, addresses, segment, writer, epoch, lanes, epochs, threads, what) -> None:  # type: ignore[no-untyped-def]
        nothing = (writer == NOTHING).any(1)
        if nothing.any():
            i = int(np.argmax(nothing))
            where = self.describe(int(segment[i]), int(addresses[i]))
            raise Fault(f"{threads.name(lanes[i])}, {what}: reads {where}, which nothing wrote")
        ordered = (writer // threads.size == (lanes // threads.size)[:, None]) & (epoch < epochs[:, None])
        racing = (writer >= 0) & (writer != lanes[:, None]) & ~ordered
        if racing.any():
            i, j = (int(k) for k in np.argwhere(racing)[0])
            where = self.describe(int(segment[i]), int(addresses[i]) + j * GRANULE)
            other = threads.name(writer[i, j])
            raise Fault(f"{threads.name(lanes[i])}, {what}: reads {where}, which {other} wrote: no barrier between")

    def store(
        self, addresses: Array, size: int, values: Array, lanes: Array, epochs: Array, threads: Threads, what: str
    ):
        """values: rows of the elements of one access each."""
        segment, offset = self.place(addresses, size, lanes, threads, what)
        if not self._writable[segment].all():
            i = int(np.argmin(self._writable[segment]))
            where = self.describe(int(segment[i]), int(addresses[i]))
            raise Fault(f"{threads.name(lanes[i])}, {what}: writes {where}, an input")
        at = offset // size
        writer = _accesses(self._writer, size)
        before = writer[at]
        writer[at] = lanes[:, None]
        _accesses(self._epoch, size)[at] = epochs[:, None]
        twice = np.where(before != NOTHING, before, np.where(writer[at] != lanes[:, None], writer[at], NOTHING))
        if (twice != NOTHING).any():
            i, j = (int(k) for k in np.argwhere(twice != NOTHING)[0])
            where = self.describe(int(segment[i]), int(addresses[i]) + j * GRANULE)
            raise Fault(
                f"{threads.name(lanes[i])}, {what}: writes {where} a second time, after {threads.name(twice[i, j])}"
            )
        self.data.view(values.dtype).reshape(-1, values.shape[1])[at] = values

    def read_host(self, address: int, size: int, lane: int, threads: Threads, what: str) -> Array:
        """`size` bytes of inputs, for a bulk copy; in a row of segments is out of bounds."""
        segment, (offset,) = self.place(np.array([address]), size, np.array([lane]), threads, what)
        if (self._writer[offset // GRANULE : (offset + size) // GRANULE] != HOST).any():
            where = self.describe(int(segment[0]), address)
            raise Fault(f"{threads.name(lane)}, {what}: copies {where}, which is no input")
        return self.data[offset : offset + size]

    def check_complete(self) -> None:
        """Every element of every result was written, and every counter is at 0 for the next launch."""
        left = {address: value for address, value in self.counters.items() if value}
        if left:
            raise Fault(f"the kernel ended and left counters at {sorted(left.values())}")
        for segment in np.flatnonzero(self._writable):
            start = int(self._offsets[segment])
            size = int(self._ends[segment] - self._starts[segment])
            missing = self._writer[start // GRANULE : (start + size) // GRANULE] == NOTHING
            if missing.any():
                first = int(np.argmax(missing)) * GRANULE
                where = self.describe(int(segment), int(self._starts[segment]) + first)
                count = int(missing.sum()) * GRANULE
                raise Fault(f"the kernel ended and {count} bytes of a result were never written, the first at {where}")


# --- shared memory --------------------------------------------------------------------------------------------------


class SharedMemory:
    """The dynamic shared memory of every CTA."""

    def __init__(self, size: int, threads: Threads):
        self.size, self.threads = size, threads
        self._room = -(-size // LINE) * LINE
        self.data = np.zeros(self._room * threads.ctas, np.uint8)
        granules = len(self.data) // GRANULE
        self._writer = np.full(granules, NOTHING, np.int32)
        self._written = np.full(granules, -1, np.int32)  # the epoch of the last write
        self._reader = np.full(granules, NOTHING, np.int32)
        self._read = np.full(granules, -1, np.int32)
        self._copy = np.full(granules, -1, np.int32)
        self.copies: list[Copy] = []

    def place(self, addresses: Array, size: int, align: int, lanes: Array, what: str) -> Array:
        offset = addresses.astype(np.int64) - SHARED_BASE
        outside = (offset < 0) | (offset + size > self.size)
        if outside.any():
            i = int(np.argmax(outside))
            raise Fault(
                f"{self.threads.name(lanes[i])}, {what}: {size} bytes at byte {int(offset[i])} of shared memory, "
                f"which has {self.size}: out of bounds"
            )
        misaligned = offset % align != 0
        if misaligned.any():
            i = int(np.argmax(misaligned))
            raise Fault(
                f"{self.threads.name(lanes[i])}, {what}: {size} bytes at byte {int(offset[i])} of shared memory, "
                "which is misaligned"
            )
        return offset + lanes // self.threads.size * self._room

    def _fault(self, bad: Array, at: Array, size: int, lanes: Array, what: str, verb: str, why: Any) -> None:
        """Raises for the first granule of the accesses that is bad; why(granule) says what is wrong."""
        if bad.any():
            i, j = (int(k) for k in np.argwhere(bad)[0])
            granule = int(at[i]) * (size // GRANULE) + j
            byte = granule * GRANULE % self._room
            raise Fault(f"{self.threads.name(lanes[i])}, {what}: {verb} byte {byte} of shared memory, {why(granule)}")

    def _by_writer(self, granule: int) -> str:
        return f"which {self.threads.name(self._writer[granule])} wrote: no barrier between"

    def _by_reader(self, granule: int) -> str:
        reader = self._reader[granule]
        who = "several threads" if reader == SEVERAL else self.threads.name(reader)
        return f"which {who} read: no barrier between"

    def _by_copy(self, granule: int) -> str:
        copy = self.copies[self._copy[granule]]
        return f"where the copy of line {copy.line} lands: nothing waited for it"

    def load(self, addresses: Array, size: int, words: Any, lanes: Array, epochs: Array, seen: Array, what: str):
        """seen: (lane, mbarrier) -> how many phases of it the lane has seen complete."""
        at = self.place(addresses, size, size, lanes, what) // size
        writer, written = _accesses(self._writer, size)[at], _accesses(self._written, size)[at]
        me, now = lanes[:, None], epochs[:, None]
        self._check_landed(at, size, lanes, seen, what)
        self._fault(writer == NOTHING, at, size, lanes, what, "reads", lambda _: "which nothing wrote")
        copied = _accesses(self._copy, size)[at] >= 0
        racing = ~copied & (written == now) & (writer != me)
        self._fault(racing, at, size, lanes, what, "reads", self._by_writer)
        self._note_reader(at, size, me, now)
        dtype, count = words
        return self.data.view(dtype).reshape(-1, count)[at]

    def _check_landed(self, at: Array, size: int, lanes: Array, seen: Array, what: str) -> None:
        copy = _accesses(self._copy, size)[at]
        if not (copy >= 0).any():
            return
        barriers = np.array([c.barrier for c in self.copies])[copy]
        phases = np.array([c.phase for c in self.copies])[copy]
        early = (copy >= 0) & (seen[lanes[:, None], barriers] <= phases)
        self._fault(early, at, size, lanes, what, "reads", self._by_copy)

    def _note_reader(self, at: Array, size: int, me: Array, now: Array) -> None:
        reader, read = _accesses(self._reader, size), _accesses(self._read, size)
        alone = (read[at] < now) | (reader[at] == me)
        reader[at] = np.where(alone, me, SEVERAL)
        read[at] = now
        others = reader[at] != me
        if others.any():
            rows, columns = np.nonzero(others)
            reader[at[rows], columns] = SEVERAL

    def store(self, addresses: Array, size: int, values: Array, lanes: Array, epochs: Array, what: str) -> None:
        at = self.place(addresses, size, size, lanes, what) // size
        self._check_write(at, size, lanes, epochs, what)
        self.data.view(values.dtype).reshape(-1, values.shape[1])[at] = values

    def _check_write(self, at: Array, size: int, lanes: Array, epochs: Array, what: str) -> None:
        me, now = lanes[:, None], epochs[:, None]
        writer, written = _accesses(self._writer, size), _accesses(self._written, size)
        copy = _accesses(self._copy, size)
        if (copy[at] >= 0).any():
            flying = (copy[at] >= 0) & ~np.array([c.landed for c in self.copies])[copy[at]]
            self._fault(flying, at, size, lanes, what, "writes", self._by_copy)
        racing = (written[at] == now) & (writer[at] != me)
        self._fault(racing, at, size, lanes, what, "writes", self._by_writer)
        racing = (_accesses(self._read, size)[at] == now) & (_accesses(self._reader, size)[at] != me)
        self._fault(racing, at, size, lanes, what, "writes", self._by_reader)
        writer[at], written[at], copy[at] = me, now, -1
        self._fault(writer[at] != me, at, size, lanes, what, "writes", self._by_writer)

    def copy_in(self, address: int, content: Array, copy: Copy, epoch: int, what: str) -> None:
        """Starts a bulk copy: the bytes are there from now on, and no thread may look before it has waited."""
        lanes = np.array([copy.lane])
        (offset,) = self.place(np.array([address]), len(content), LINE, lanes, what)
        at = np.arange(offset // GRANULE, (offset + len(content)) // GRANULE)
        everyone = np.full(len(at), copy.lane)
        self._check_write(at, GRANULE, everyone, np.full(len(at), epoch), what)
        self.copies.append(copy)
        self._copy[at] = len(self.copies) - 1
        self.data[offset : offset + len(content)] = content
