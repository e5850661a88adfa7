"""The peer that one would write by hand in Triton: one program a row, everything loaded once, rounding as in eager."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(x, weight, eps, D: tl.constexpr, dtype: tl.constexpr):
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    return (wide * rstd).to(dtype) * weight


@triton.jit
def _row_kernel(
    x, residual, gate, scale, weight, weight2, y, z,
    tokens, batch_stride, token_stride, eps, eps2,
    D: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    here = row * D + column
    modulation = row // tokens * batch_stride + row % tokens * token_stride + column
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + here, inside, 0.0)
    if GATED:
        added = tl.load(residual + here, inside, 0.0)
        g = tl.load(gate + modulation, inside, 0.0).to(tl.float32)
    if SCALED:
        s = tl.load(scale + modulation, inside, 0.0)
    w = tl.load(weight + column, inside, 0.0)
    if GATED:
        tanh = (2 * tl.sigmoid(2 * g) - 1).to(dtype)
        value = added + tanh * _norm(value, w, eps, D, dtype)
        tl.store(y + here, value, inside)
        if SCALED:
            w = tl.load(weight2 + column, inside, 0.0)
            eps = eps2
    if SCALED:
        tl.store(z + here, _norm(value, w, eps, D, dtype) * (1 + s), inside)


def run(op: str, x: Tensor, r: Tensor, g: Tensor, s: Tensor, w: Tensor, w2: Tensor) -> Any:
    """dual, gated or scaled; x and r [B, S, D], g and s [B, 1 or S, D], w and w2 [D]."""
    y = torch.empty_like(x) if op != "scaled" else x
    z = torch.empty_like(x) if op != "gated" else x
    b, tokens, d = x.shape
    block = triton.next_power_of_2(d)
    _row_kernel[(b * tokens,)](
        x, r, g, s, w, w2, y, z, tokens, g.stride(0), g.stride(1) if g.shape[1] > 1 else 0, 1e-5, 1e-6,
        d, block, op != "scaled", op != "gated", num_warps=8 if block <= 4096 else 16,
    )  # fmt: skip
    return (y, z) if op == "dual" else y if op == "gated" else z
