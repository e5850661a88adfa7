"""The norms of the query and key heads of two streams, which are joined and rotated (RoPE), as in FLUX's double blocks.

q is [B, S, H, Dh], k is [B, S, Hk, Dh]: the heads of the image, for example. q_before and k_before are those of the
tokens that come first, such as the text: [B, S', H, Dh] and [B, S', Hk, Dh]. Each of the four has its own norm.
The rotation is as for qk_norm_rope, for S' + S tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_kernels import reference
from dit_kernels.arguments import (
    COLUMN,
    EPS,
    HEADS,
    HEADS_BEFORE,
    JOINED_TABLE,
    Argument,
    check_tensor,
    differ,
    reject,
)
from dit_kernels.chain import RotatedChain
from dit_kernels.families.family import Named, Op, Shaped
from dit_kernels.families.norm_rope import OPTIONS, NormRope
from dit_kernels.rounding import compute_dtype


class NormCatRope(NormRope):
    """Computes a RotatedChain over the heads of two streams. The steps of both streams are the same."""

    arguments = (
        Argument("q", HEADS),
        Argument("k", HEADS),
        Argument("q_before", HEADS_BEFORE),
        Argument("k_before", HEADS_BEFORE),
        Argument("q_weight", COLUMN, optional=True),
        Argument("k_weight", COLUMN, optional=True),
        Argument("q_before_weight", COLUMN, optional=True),
        Argument("k_before_weight", COLUMN, optional=True),
        Argument("rotation", JOINED_TABLE),
        Argument("sin", JOINED_TABLE, optional=True),
        Argument("q_eps", EPS),
        Argument("k_eps", EPS),
        Argument("q_before_eps", EPS),
        Argument("k_before_eps", EPS),
        Argument("q_out", HEADS, written=True, placed=True),
        Argument("k_out", HEADS, written=True, placed=True),
    )

    def check(self, op: Op, named: Named, options: Named) -> None:
        """Raises ValueError for streams that differ in more than their tokens, or for a rotation of the wrong size."""
        super().check(op, named, options)
        for x in "qk":
            before, later = named[f"{x}_before"], named[x]
            check_tensor(op.name, f"{x}_before", before, x, later, (later.dtype,))
            if differ(before.shape[2], later.shape[2]):
                reject(
                    op.name, f"{x}_before.shape", list(before.shape), f"the number of heads of {x}, {later.shape[2]}"
                )
            weights = (named[f"{x}_weight"], named[f"{x}_before_weight"])
            dtypes = [None if weight is None else weight.dtype for weight in weights]
            if dtypes[0] != dtypes[1]:
                expected = f"{dtypes[0]}, as {x}_weight"
                reject(op.name, f"{x}_before_weight", dtypes[1], expected)
        q_before, k_before = named["q_before"], named["k_before"]
        if differ(q_before.shape[1], k_before.shape[1]):
            expected = f"the number of tokens of q_before, {q_before.shape[1]}"
            reject(op.name, "k_before.shape", list(k_before.shape), expected)
        tokens = q_before.shape[1] + named["q"].shape[1]
        for name, table in zip(("rotation", "sin"), self.tables(named), strict=True):
            if table is not None and differ(table.shape[1], tokens):
                expected = f"a row for each of {tokens} tokens, those of q_before and q"
                reject(op.name, f"{name}.shape", list(named[name].shape), expected)

    def results(self, chain: RotatedChain, named: Named) -> tuple[Shaped, ...]:
        tokens = named["q_before"].shape[1] + named["q"].shape[1]
        pairs = ((named["q"], chain.q), (named["k"], chain.k))
        return tuple(((x.shape[0], tokens, *x.shape[2:]), steps.out) for x, steps in pairs if steps is not None)

    def definition(self, chain: RotatedChain, named: Named) -> tuple[Tensor, ...]:
        rotation, sin = self.tables(named)
        wide = compute_dtype(named["q"].dtype)

        def normed(x: str, steps: Any) -> Tensor:
            return reference.norm(named[x], named[f"{x}_weight"], None, named[f"{x}_eps"], "rms", steps.norm)

        return tuple(
            reference.rotate(
                torch.cat((normed(f"{x}_before", steps), normed(x, steps)), 1), rotation, sin, steps, chain, wide
            )
            for x, steps in (("q", chain.q), ("k", chain.k))
            if steps is not None
        )

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.norm_cat_rope import NormCatRopeKernel

        return NormCatRopeKernel


FAMILY = NormCatRope()
OPS = (Op("qk_norm_cat_rope", FAMILY, tuple(FAMILY.named), OPTIONS),)
