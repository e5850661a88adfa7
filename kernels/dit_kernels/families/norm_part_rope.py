"""The norms of query and key heads, of which only the last tokens are rotated (RoPE), as in CogVideoX and CogView4.

q and k hold the tokens of a text, for example, and then those of an image, which are rotated. The operands are those of
qk_norm_rope, but the rotation has S' rows, for the last S' of the S tokens. The other tokens are only normed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dit_kernels.arguments import LATER_TABLE, TABLE, differ, known, reject
from dit_kernels.families.family import Named, Op
from dit_kernels.families.norm_rope import OF_ANY_NORM, NormRope


class NormPartRope(NormRope):
    """Computes a RotatedChain over the heads of a token; without a rotation for the first S - S' tokens."""

    partly = True
    arguments = tuple(
        replace(argument, role=LATER_TABLE) if argument.role is TABLE else argument for argument in NormRope.arguments
    )

    def check(self, op: Op, named: Named, options: Named) -> None:
        """Raises ValueError for a rotation of more tokens than there are, or of the wrong size."""
        super().check(op, named, options)
        tokens = named["q"].shape[1]
        rotation, sin = self.tables(named)
        rows = rotation.shape[1]
        if known(rows > tokens):
            reject(
                op.name, "rotation.shape", list(named["rotation"].shape), f"at most a row for each of {tokens} tokens"
            )
        if sin is not None and differ(sin.shape[1], rows):
            reject(op.name, "sin.shape", list(named["sin"].shape), f"as many rows as rotation, {rows}")

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.norm_part_rope import NormPartRopeKernel

        return NormPartRopeKernel


FAMILY = NormPartRope()
OPS = (Op("qk_norm_part_rope", FAMILY, tuple(FAMILY.named), OF_ANY_NORM),)
