"""How the heads of a token are laid over the threads of a CTA: configuration as data, apart from the device code.

A head of Dh elements is one part, or two where its halves are rotated against each other: then each thread has the same
places of both. A part is cut into vectors; a group of `lanes` neighbouring threads, a power of two that divides a warp,
takes one head at a time, lane l the vectors l, l + lanes, ... of each part, so that a sum over a head is some shuffles
within the group. The groups of a token take the heads g, g + groups, ... of q, then of k: all heads that a thread works
on are of one token, whose rotation it reads once.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_kernels.cute.tiling import ACCESS_BYTES, WARP

LOADED_REGISTERS = 24  # of a thread, for heads on their way: six accesses of 16 bytes
MAX_THREADS = 512
FEWEST_THREADS = 128  # of a CTA; a token with less to do shares one


@dataclass(frozen=True)
class HeadTiling:
    """One CTA's walk over the heads of some tokens."""

    vector: int  # elements of one access
    lanes: int  # of a group, which works on one head
    vectors: int  # of each part, that a lane has
    parts: int  # of a head: 1, or its 2 halves
    groups: int  # of a token
    tokens: int  # of a CTA
    ahead: int  # heads that a thread loads before it works on the first

    @property
    def threads(self) -> int:
        return self.lanes * self.groups * self.tokens


def head_tiling(d: int, heads: tuple[int, int], width: int, parts: int) -> HeadTiling:
    """The tiling for heads of `d` elements, of which a token has (H, Hk); width: bytes of an element."""
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
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()
