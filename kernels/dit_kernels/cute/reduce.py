"""Sums over the threads of a CTA."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from dit_kernels.cute.tiling import WARP


@cute.jit
def warp_sum(value: Float32) -> Float32:
    """The sum over a warp, in every lane of it, by the same tree in each lane."""
    for step in cutlass.range_constexpr(5):
        value += cute.arch.shuffle_sync_bfly(value, offset=1 << step)
    return value


@cute.jit
def cta_sum(value: Float32, partials: cute.Tensor) -> Float32:  # partials: (warps,) in shared memory
    """The sum over a CTA, in every thread of it, with one barrier.

    Every warp adds the partial sums itself, so no second barrier waits for a broadcast. The price: `partials` must not
    be written again before another barrier, so each sum of a kernel has its own.
    """
    warps = const_expr(cute.size(partials))
    value = warp_sum(value)
    if const_expr(warps > 1):
        lane = cute.arch.lane_idx()
        warp = cute.arch.thread_idx()[0] // WARP  # not warp_idx(): that shuffles, and here stands before a branch
        if lane == 0:
            partials[warp] = value
        cute.arch.sync_threads()
        value = Float32(0.0)
        if lane < warps:
            value = partials[lane]
        value = warp_sum(value)
    return value
