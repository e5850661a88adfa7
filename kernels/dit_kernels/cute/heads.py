"""How the heads of a token are distributed over the threads of a CTA: configuration as data, without device code.

A head of Dh elements is one part, or two parts if its halves are rotated against each other. Each thread then has the
same places of both halves. A part is cut into vectors. A group of `lanes` neighbouring threads takes one head at a
time. `lanes` is a power of two that divides a warp. Lane l takes the vectors l, l + lanes, ... of each part, so a sum
over a head takes a few shuffles within the group. Group g of a token takes the heads g, g + groups, ... of q, then
those of k. So all heads of a thread belong to one token, and the thread reads the token's rotation once.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_kernels.cute.tiling import ACCESS_BYTES, WARP

LOADED_REGISTERS = 24  # per thread, for heads that are being loaded: six accesses of 16 bytes
MAX_THREADS = 512
FEWEST_THREADS = 128  # per CTA; a token that needs fewer shares a CTA


@dataclass(frozen=True)
class HeadTiling:
    """How one CTA works on the heads of some tokens."""

    vector: int  # elements per access
    lanes: int  # threads per group, which works on one head at a time
    vectors: int  # per lane and part
    parts: int  # per head: 1, or its 2 halves
    groups: int  # per token
    tokens: int  # per CTA
    ahead: int  # heads that a thread loads before it works on the first

    @property
    def threads(self) -> int:
        return self.lanes * self.groups * self.tokens


def head_tiling(d: int, heads: tuple[int, int], width: int, parts: int) -> HeadTiling:
    """The tiling for heads of `d` elements. heads: (H, Hk) of a token; width: bytes per element."""
    part = d // parts
    vector = min(part & -part, ACCESS_BYTES // width)
    lanes = min(_power_of_two(part // vector), WARP)
    vectors = -(-part // (vector * lanes))
    registers = parts * vectors * max(1, vector * width // 4)
    ahead = max(1, LOADED_REGISTERS // registers)
    step = WARP // lanes
    most = max(MAX_THREADS // lanes, step)

    def passes(groups: int) -> int:
        return sum(-(-h // groups) for h in heads)

    choices = range(step, most + 1, step)
    fitting = [groups for groups in choices if passes(groups) <= ahead] or [choices[-1]]
    groups = min(fitting, key=lambda groups: (passes(groups) * groups, groups))
    tokens = max(1, FEWEST_THREADS // (groups * lanes))
    return HeadTiling(vector, lanes, vectors, parts, groups, tokens, min(ahead, passes(groups)))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
