"""The norms of heads, of which only the last tokens are rotated. Each head is read and written once.

The kernel is that of `norm_rope.py`. The rotation starts at a later token, and reads nothing for the tokens before.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from dit_kernels.chain import RotatedChain
from dit_kernels.cute.arith import rounded, words_of
from dit_kernels.cute.norm_rope import Global, HeadPlace, NormRopeKernel, Rotation
from dit_kernels.cute.pairs import Vectors
from dit_kernels.rounding import RotatedSteps


class RotatedPlace(HeadPlace):
    """The place of a thread in the rotation. Its token is negative if the token is not rotated."""

    def is_rotated(self) -> Boolean:
        return self.token >= 0

    def has_token(self) -> Boolean:
        return self.is_rotated() & (self.token < self.tokens)


class PartRotation(Rotation):
    """The rotation of a token, if it is rotated. A call returns the other heads as they are."""

    def __init__(self, place: RotatedPlace, chain: RotatedChain, bundle: dict[str, Global | None]):
        super().__init__(place, chain, bundle)
        self.rotated = place.is_rotated()

    def __call__(self, head: Vectors, steps: RotatedSteps) -> Vectors:
        turned = super().__call__(head, steps)
        return [_chosen(self.rotated, t, rounded(n, steps.out)) for t, n in zip(turned, head, strict=True)]


def _chosen(condition: Boolean, yes, no):
    """One of two vectors of the same dtype."""
    left, right = words_of(yes), words_of(no)
    result = cute.make_rmem_tensor(yes.shape, yes.dtype)
    words = cute.recast_tensor(result, Int32)
    for i in range(cute.size(words)):
        words[i] = Int32(cutlass.select_(condition, left[i], right[i]))
    return result.load()


class NormPartRopeKernel(NormRopeKernel):
    """The kernel of a RotatedChain whose rotation is one of the last tokens."""

    def rotation(
        self, place: HeadPlace, bundle: dict[str, Global | None], tokens: Int32, strides: dict[str, Any]
    ) -> Rotation:
        rows = Int64(strides["rotation"][0])
        token = place.token - (Int64(tokens) - rows)
        at = RotatedPlace(place.tiling, place.d, place.batch, token, rows, place.group, place.lane)
        return PartRotation(at, self.chain, bundle)

    def bundle(self, operands: dict[str, Any], strides: dict[str, Any], place: HeadPlace) -> dict[str, Global | None]:
        tables = {name: strides[name][1:] for name in ("rotation", "sin")}
        return super().bundle(operands, strides | tables, place)
