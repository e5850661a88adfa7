"""The operands of norm_all_heads_rope, and how far its results may be from the definition.

The bounds are those of attention_kernel_bounds.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from attention_kernel_bounds import FLOOR, assert_follows, magnitude_of_pairs
from kernel_bounds import BF16, EPS, FP32, MANTISSA_BITS, Device, random
from torch import Tensor

from dit_kernels.families import OPS

OP = "norm_all_heads_rope"


@dataclass
class Row:
    """The operands and options of norm_all_heads_rope; each may be replaced."""

    x: Tensor
    weight: Tensor | None
    cos: Tensor
    sin: Tensor
    options: dict[str, Any]

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.weight, self.cos, self.sin, EPS


def row(
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    dtype: torch.dtype = BF16,
    table: torch.dtype = FP32,
    weight: torch.dtype | None = None,
    *,
    one_a_pair: bool = True,
    tables: int = 1,
    device: str = "cpu",
    **options: Any,
) -> Row:
    """Random operands with an out_dtype of x's dtype. tables: for how many batch items there are tables."""
    pairs = (heads if options.get("own") else 1) * width // 2
    angle = (random(tables, tokens, pairs, dtype=FP32, seed=9, device=device) * 3).double()
    if not one_a_pair and options.get("interleaved", True):
        angle = angle.repeat_interleave(2, -1)
    elif not one_a_pair:
        angle = angle.unflatten(-1, (-1, width // 2)).repeat(1, 1, 1, 2).flatten(2)
    x = random(batch, tokens, heads * width, dtype=dtype, seed=1, device=device) * 2
    of_weight = random(heads * width, dtype=weight or dtype, seed=3, device=device)
    options = {"heads": heads, "out_dtype": dtype, **options}
    return Row(x, of_weight, angle.cos().to(table), angle.sin().to(table), options)


def check(on: Device, o: Row) -> Tensor:
    """Runs the op and judges its result."""
    (out,) = on.run(OP, *o.arguments(), **o.options)
    call = OPS[OP].call
    chain = call(*o.arguments(), **o.options).chain
    wide = [a.double() if isinstance(a, Tensor) else a for a in o.arguments()]
    shape = {name: value for name, value in o.options.items() if name in ("heads", "own", "interleaved")}
    with on.eager():
        (expected,) = call(*o.arguments(), **o.options).definition()
        (exact,) = call(*wide, rounding="fp32", **shape).definition()
    steps, norm = chain.steps, chain.steps.norm
    dtypes = {norm.stat, norm.normed, norm.weighted, norm.out, steps.product, steps.rotated, steps.out}
    if dtypes == {FP32}:
        on.assert_precise("out", out, expected, exact, FLOOR)
        return out
    heads = expected.unflatten(-1, (chain.heads, -1))
    magnitude = magnitude_of_pairs(heads.flatten(0, 2), chain.interleaved).view_as(expected)
    coarsest = min(dtypes, key=MANTISSA_BITS.__getitem__)
    native = o.options.get("rounding") == "native"
    spare = 2 + (2 * out.shape[-1] if native else 0)
    assert_follows(on, "out", out, expected, magnitude, coarsest, math.ceil(spare))
    return out
