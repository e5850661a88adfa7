"""Where a launch finds its ticket counters: zeros in device memory, one for each batch item.

A kernel whose CTAs draw their rows (cute/norm_gate.py) counts with them, and leaves them at zero. So launches that
follow one another may share them: those of one stream do. A launch that a CUDA graph captures gets counters of its own,
since the graph may be replayed on any stream.

All of them are cut from blocks that are zeroed beforehand and never freed. A block is allocated in a thread of its own:
what the launching thread allocates may go into the memory of a CUDA graph (Inductor warms its graphs up so), where
nothing may stay.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

LINE = 32  # counters: a line of L2, which no two launches share
BLOCK = 2048 * LINE  # a model compiled with mode="reduce-overhead" captures some hundred launches a graph

_of_stream: dict[tuple[int, int], tuple[int, int]] = {}  # by device and stream: address, and for how many batch items
_free: dict[int, tuple[int, int]] = {}  # by device: what is left of its last block, address and counters
_low: set[int] = set()  # devices of which less than half a block is left
_blocks: list[Tensor] = []


def address(device: int, stream: int, batches: int) -> int:
    """The address of `batches` counters for a launch on a stream, the current one of a device, the current one."""
    if torch._C._cuda_isCurrentStreamCapturing():
        return _cut(device, batches, capturing=True)
    if device in _low:
        _free[device] = _elsewhere(device, BLOCK), BLOCK
        _low.discard(device)
    found = _of_stream.get((device, stream))
    if found is None or found[1] < batches:
        found = _of_stream[device, stream] = _cut(device, batches), batches
    return found[0]


def _cut(device: int, batches: int, capturing: bool = False) -> int:
    size = -(-batches // LINE) * LINE
    start, left = _free.get(device, (0, 0))
    if left < size and capturing:
        return _zeros(device, size)  # nothing else may be allocated now: memory of the graph, zeroed in each replay
    if left < size:
        left = max(BLOCK, size)
        start = _elsewhere(device, left)
    _free[device] = start + size * torch.int32.itemsize, left - size
    if left - size < BLOCK // 2:
        _low.add(device)
    return start


def _zeros(device: int, size: int) -> int:
    _blocks.append(torch.zeros(size, dtype=torch.int32, device=torch.device("cuda", device)))
    return _blocks[-1].data_ptr()


def _elsewhere(device: int, size: int) -> int:
    """`_zeros` in another thread, which are zero when this returns."""

    def zeros() -> int:
        start = _zeros(device, size)
        torch.cuda.current_stream(device).synchronize()
        return start

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(zeros).result()
