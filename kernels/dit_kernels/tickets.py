"""Allocates the ticket counters of a launch: zeros in device memory, one for each batch item.

A kernel whose CTAs draw their rows (cute/modulated_norm.py) counts with these counters and leaves them at zero. So
launches that run one after another may share counters, as the launches of one stream do. A launch that a CUDA graph
captures gets counters that no other launch has, since the graph may be replayed on any stream.

Counters are cut from blocks that are zeroed beforehand and never freed. Another thread allocates the blocks. If the
launching thread allocated them, the memory could belong to a CUDA graph, which reuses the memory: while Inductor warms
up a graph, allocations of the thread go to the memory of the graph.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

LINE = 32  # counters in a line of L2; no two launches share a line
# A model compiled with mode="reduce-overhead" captures on the order of a hundred launches in each graph. So when a
# capture starts, at least half a block is free, with room for CAPTURED launches of any number of batch items.
BLOCK = 2048 * LINE
CAPTURED = 256


class Counters:
    """The counters of a process. `address` returns the address of the counters for a launch."""

    def __init__(self) -> None:
        self.of_stream: dict[tuple[int, int], tuple[int, int]] = {}  # by device and stream: address and batch items
        self.free: dict[int, tuple[int, int]] = {}  # by device: the rest of its last block, address and counters
        self.largest: dict[int, int] = {}  # by device: number of counters of its largest launch
        self.low: set[int] = set()  # devices where captures have left less than half a block
        self.blocks: list[Tensor] = []
        self.cutting = threading.Lock()

    def address(self, device: int, stream: int, batches: int) -> int:
        """The address of `batches` counters for a launch. device and stream must be the current ones."""
        if torch._C._cuda_isCurrentStreamCapturing():
            with self.cutting:
                return self._captured(device, _counters(batches))
        found = self.of_stream.get((device, stream))
        if found is None or found[1] < batches or device in self.low:
            with self.cutting:
                found = self._kept(device, stream, batches)
        return found[0]

    def _captured(self, device: int, size: int) -> int:
        if self.free.get(device, (0, 0))[1] < size:
            return self._zeros(device, size)  # a capture allows only memory of the graph, zeroed at each replay
        start = self._cut(device, size)
        if self.free[device][1] < self._half(device):
            self.low.add(device)
        return start

    def _kept(self, device: int, stream: int, batches: int) -> tuple[int, int]:
        """The counters of a stream. After this, at least half a block is free."""
        size, found = _counters(batches), self.of_stream.get((device, stream))
        self.largest[device] = max(size, self.largest.get(device, 0))
        if self.free.get(device, (0, 0))[1] < size + self._half(device):
            self.free[device] = self._elsewhere(device, 2 * self._half(device)), 2 * self._half(device)
        self.low.discard(device)
        if found is None or found[1] < batches:
            found = self.of_stream[device, stream] = self._cut(device, size), batches
        return found

    def _half(self, device: int) -> int:
        return max(BLOCK // 2, CAPTURED * self.largest.get(device, 0))

    def _cut(self, device: int, size: int) -> int:
        start, left = self.free[device]
        self.free[device] = start + size * torch.int32.itemsize, left - size
        return start

    def _zeros(self, device: int, size: int) -> int:
        self.blocks.append(torch.zeros(size, dtype=torch.int32, device=torch.device("cuda", device)))
        return self.blocks[-1].data_ptr()

    def _elsewhere(self, device: int, size: int) -> int:
        """Runs `_zeros` in another thread. The counters are zero when this returns."""

        def zeros() -> int:
            start = self._zeros(device, size)
            torch.cuda.current_stream(device).synchronize()
            return start

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(zeros).result()


def _counters(batches: int) -> int:
    return -(-batches // LINE) * LINE


COUNTERS = Counters()
