"""Where a launch finds its ticket counters: zeros in device memory, one for each batch item.

A kernel whose CTAs draw their rows (cute/norm_gate.py) counts with them, and leaves them at zero. So launches that
follow one another may share them: those of one stream do. A launch that a CUDA graph captures gets counters of its own,
since the graph may be replayed on any stream.

All of them are cut from blocks that are zeroed beforehand and never freed. A block is allocated in a thread of its own:
what the launching thread allocates may go into the memory of a CUDA graph (Inductor warms its graphs up so), where
nothing may stay.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

LINE = 32  # counters: a line of L2, which no two launches share
# A model compiled with mode="reduce-overhead" captures some hundred launches a graph. So when a capture starts, half a
# block at least is free, and there is room in it for CAPTURED launches, whatever their number of batch items.
BLOCK = 2048 * LINE
CAPTURED = 256

_of_stream: dict[tuple[int, int], tuple[int, int]] = {}  # by device and stream: address, and for how many batch items
_free: dict[int, tuple[int, int]] = {}  # by device: what is left of its last block, address and counters
_largest: dict[int, int] = {}  # by device: counters of its largest launch
_low: set[int] = set()  # devices of which captures have left less than half a block
_blocks: list[Tensor] = []
_cutting = threading.Lock()


def address(device: int, stream: int, batches: int) -> int:
    """The address of `batches` counters for a launch on a stream, the current one of a device, the current one."""
    if torch._C._cuda_isCurrentStreamCapturing():
        with _cutting:
            return _captured(device, _counters(batches))
    found = _of_stream.get((device, stream))
    if found is None or found[1] < batches or device in _low:
        with _cutting:
            found = _kept(device, stream, batches)
    return found[0]


def _counters(batches: int) -> int:
    return -(-batches // LINE) * LINE


def _captured(device: int, size: int) -> int:
    if _free.get(device, (0, 0))[1] < size:
        return _zeros(device, size)  # nothing else may be allocated now: memory of the graph, zeroed in each replay
    start = _cut(device, size)
    if _free[device][1] < _half(device):
        _low.add(device)
    return start


def _kept(device: int, stream: int, batches: int) -> tuple[int, int]:
    """The counters of a stream; half a block at least is left behind them."""
    size, found = _counters(batches), _of_stream.get((device, stream))
    _largest[device] = max(size, _largest.get(device, 0))
    if _free.get(device, (0, 0))[1] < size + _half(device):
        _free[device] = _elsewhere(device, 2 * _half(device)), 2 * _half(device)
    _low.discard(device)
    if found is None or found[1] < batches:
        found = _of_stream[device, stream] = _cut(device, size), batches
    return found


def _half(device: int) -> int:
    return max(BLOCK // 2, CAPTURED * _largest.get(device, 0))


def _cut(device: int, size: int) -> int:
    start, left = _free[device]
    _free[device] = start + size * torch.int32.itemsize, left - size
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
