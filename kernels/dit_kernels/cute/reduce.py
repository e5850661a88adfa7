"""Sums and largest numbers over the threads of a CTA."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from dit_kernels.cute.tiling import WARP


@cute.jit
def warp_sum(value: Float32, lanes: cutlass.Constexpr = WARP) -> Float32:
    """The sum over each group of `lanes` lanes, in every lane of the group. All lanes add in the same tree."""
    for step in cutlass.range_constexpr(lanes.bit_length() - 1):
        value += cute.arch.shuffle_sync_bfly(value, offset=1 << step)
    return value


@cute.jit
def cta_sum(value: Float32, partials: cute.Tensor) -> Float32:  # partials: (warps,) in shared memory
    """The sum over a CTA, in every thread of the CTA, with one barrier.

    Every warp adds the partial sums itself, so no second barrier is needed for a broadcast. The price: `partials` must
    not be written again before another barrier, so each sum of a kernel has its own partials.
    """
    warps = const_expr(cute.size(partials))
    value = warp_sum(value)
    if const_expr(warps > 1):
        lane = cute.arch.lane_idx()
        warp = cute.arch.thread_idx()[0] // WARP  # not warp_idx(), which shuffles: a branch follows
        if lane == 0:
            partials[warp] = value
        cute.arch.sync_threads()
        lanes = const_expr(1 << (warps - 1).bit_length())  # enough to read each partial sum once
        group_lane = lane % lanes
        value = Float32(0.0)
        if group_lane < warps:
            value = partials[group_lane]
        value = warp_sum(value, lanes)
    return value


@cute.jit
def cta_max(value: Int32, partials: cute.Tensor) -> Int32:  # partials: (warps,) in shared memory
    """The largest of the numbers of a CTA, none of them negative, in every thread of the CTA: as `cta_sum`."""
    warps = const_expr(cute.size(partials))
    value = cute.arch.warp_redux_sync(value, "max")
    if const_expr(warps > 1):
        lane = cute.arch.lane_idx()
        warp = cute.arch.thread_idx()[0] // WARP
        if lane == 0:
            partials[warp] = value
        cute.arch.sync_threads()
        value = Int32(0)
        if lane < warps:
            value = partials[lane]
        value = cute.arch.warp_redux_sync(value, "max")
    return value
