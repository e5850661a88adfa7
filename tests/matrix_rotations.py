"""Rotations by 2×2 matrices, as model codes write them. x: [B, S, H, Dh]; m: [1 or B, S, 1, Dh / 2, 2, 2], or with
heads before tokens."""

from __future__ import annotations

import torch
from attention_kernel_bounds import angles
from torch import Tensor


def columns_added(x: Tensor, m: Tensor) -> Tensor:
    """The official FLUX and diffusers' HiDream."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (m[..., 0] * pairs[..., 0] + m[..., 1] * pairs[..., 1]).reshape(*x.shape).type_as(x)


def columns_completed(x: Tensor, m: Tensor) -> Tensor:
    """ComfyUI."""
    pairs = x.to(dtype=m.dtype).reshape(*x.shape[:-1], -1, 1, 2)
    out = m[..., 0] * pairs[..., 0]
    out.addcmul_(m[..., 1], pairs[..., 1])
    return out.reshape(*x.shape).type_as(x)


def products_summed(x: Tensor, m: Tensor) -> Tensor:
    """diffusers' Kandinsky 6; Kandinsky 5 always casts to bf16."""
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2).float()
    return (m * pairs).sum(dim=-1).reshape(*x.shape).to(dtype=x.dtype)


def unbound_columns_added(x: Tensor, m: Tensor) -> Tensor:
    """In another order, the columns by unbind."""
    a, b = x.reshape(*x.shape[:-1], -1, 1, 2).to(m.dtype).unbind(-1)
    first, second = m.unbind(-1)
    return (b * second + first * a).reshape(*x.shape).to(x.dtype)


SPELLINGS = (columns_added, columns_completed, products_summed, unbound_columns_added)


def matrices(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Any matrices, [..., Dh / 2, 2, 2]: no op asks whether they rotate. shape: [..., Dh / 2]."""
    return torch.randn(*shape, 2, 2).to(dtype)


def rotations(tokens: int, d: int, dtype: torch.dtype = torch.float32, batch: int = 1, device: str = "cpu") -> Tensor:
    """Nearly rotations, [batch, tokens, 2 * d]. All numbers of a matrix differ, as a rotation's do not."""
    angle = angles(batch, tokens, d // 2, device)
    first, second = (1 + angle / 100).cos(), (1 + angle / 90).sin()
    return torch.stack((angle.cos() * first, -angle.sin() * second, angle.sin(), angle.cos()), -1).flatten(2).to(dtype)
