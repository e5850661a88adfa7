"""Where a launch finds its ticket counters: zeros in device memory, one for each batch item.

A kernel whose CTAs draw their rows (cute/norm_gate.py) counts with them, and leaves them at zero. So launches that
follow one another may share them: those of one stream do. A launch that a CUDA graph captures gets counters of its own,
since the graph may be replayed on any stream. They come from memory that was zeroed before the capture, and stay its.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNTERS = 32  # of one launch, at least: a line of L2
POOL = 2048 * COUNTERS  # a model compiled with mode="reduce-overhead" captures some hundred launches

_of_stream: dict[tuple[int, int], tuple[int, int]] = {}  # by device and stream: address, and for how many batch items
_pools: dict[int, tuple[int, int]] = {}  # by device: address of memory for captured launches, and how many are left
_kept: list[Tensor] = []  # whatever has been in use


def address(device: int, stream: int, batches: int) -> int:
    """The address of `batches` counters for a launch on a stream, the current one of a device, the current one."""
    if torch._C._cuda_isCurrentStreamCapturing():
        return _for_capture(device, batches)
    found = _of_stream.get((device, stream))
    if found is None or found[1] < batches:
        size = max(batches, COUNTERS)
        found = _of_stream[device, stream] = _zeros(device, size), size
        if _pools.get(device, (0, 0))[1] < POOL // 2:
            _pools[device] = _zeros(device, POOL), POOL
            torch.cuda.current_stream(device).synchronize()  # other streams will use it, too
    return found[0]


def _zeros(device: int, size: int) -> int:
    _kept.append(torch.zeros(size, dtype=torch.int32, device=torch.device("cuda", device)))
    return _kept[-1].data_ptr()


def _for_capture(device: int, batches: int) -> int:
    size = -(-batches // COUNTERS) * COUNTERS
    free, left = _pools.get(device, (0, 0))
    if left < size:
        return _zeros(device, size)  # memory of the graph's own, which it zeroes in each replay
    _pools[device] = free + size * torch.int32.itemsize, left - size
    return free
