"""Linear layers in FP8 whose input is quantised row by row, in the ways in which people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # in the functions below as a literal: a global float is dynamic under dynamic=True
Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]


def torchao(x: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's Float8DynamicActivationFloat8WeightConfig with PerRow: operation by operation, version 0.18."""
    amax = torch.amax(torch.abs(x), dim=[x.ndim - 1], keepdim=True)
    s = (amax / 448.0).to(torch.float32)
    return (x.to(torch.float32) / s).clamp(min=-448.0, max=448.0).to(FP8), s


def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    s = (x.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-12)
    return (x / s).clamp(-448.0, 448.0).to(FP8), s


def by_reciprocal(x: Tensor) -> tuple[Tensor, Tensor]:
    s = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 448.0
    return (x.float() * s.reciprocal()).to(FP8), s


def without_a_dimension(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum drops a dimension, and rows come in two dimensions."""
    x = x.reshape(-1, x.shape[-1])
    s = x.abs().max(dim=-1).values.clamp(min=1e-4) / 448.0
    return (x.float() * (1.0 / s.float().unsqueeze(-1))).clamp(-448.0, 448.0).to(FP8), s.float()


def with_a_least_rounded_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale is cast twice, for the quotient and for the matmul, and its least value is rounded with it."""
    s = (x.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-3).to(torch.bfloat16)
    return (x.float() / s.float()).to(FP8), s.float()


ROW_WISE: tuple[Quantise, ...] = (
    torchao,
    by_hand,
    by_reciprocal,
    without_a_dimension,
    with_a_least_rounded_scale,
)


class Linear(nn.Module):
    """A linear layer with weights in FP8, one scale for each row of the weight, and a given quantiser of its input."""

    def __init__(self, linear: nn.Linear, quantise: Quantise = torchao) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True) / LARGEST
        self.weight, self.scale = (
            (weight / scale).to(FP8),
            scale.T.contiguous(),
        )  # no parameters: .to() changes no dtype
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.quantise = quantise

    def forward(self, x: Tensor) -> Tensor:
        q, s = self.quantise(x)
        product = torch._scaled_mm(
            q.reshape(-1, x.shape[-1]),
            self.weight.T,
            s.reshape(-1, 1),
            self.scale,
            self.bias,
            None,
            torch.bfloat16,
            True,
        )
        return product.reshape(*x.shape[:-1], -1).to(x.dtype)


def of_blocks(name: str) -> bool:
    """The linear layers of the blocks, but not those that compute gates and scales."""
    return "blocks" in name and "norm" not in name


def quantize_(
    model: nn.Module,
    quantise: Quantise = torchao,
    chosen: Callable[[str], bool] = lambda name: True,
) -> nn.Module:
    """Replaces the linear layers that are chosen by their names, as torchao's function of this name does."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and chosen(name):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Linear(module, quantise))
    return model
