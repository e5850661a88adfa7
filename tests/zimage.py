"""diffusers' own Z-Image, unmodified, in a configuration that compiles in seconds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

LAYERS, REFINERS = 2, 1


def model(dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS, refiners: int = REFINERS) -> nn.Module:
    """Random weights; gates and scales of the order of 1, as in a trained model."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        dim=64,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 64, 64],
    )
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 1.0)
    return transformer.eval().to(dtype)


def inputs(captions: tuple[int, ...] = (12,), size: int = 8, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Latents, timesteps and captions: a batch of as many as there are caption lengths."""
    torch.manual_seed(1)
    latents = [torch.randn(16, 1, size, size, dtype=dtype) for _ in captions]
    return latents, torch.rand(len(captions)), [torch.randn(length, 32, dtype=dtype) for length in captions]


def run(transformer: Any, args: tuple[Any, ...]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(transformer(*args, return_dict=False)[0])


def expected_counts(layers: int = LAYERS, refiners: int = REFINERS) -> dict[str, int]:
    """Whole model: two sites a layer in each of three stacks (the layers, the refiners of the image, and those of the
    captions, without gates and scales), each with the next norm behind it but for the last of its stack; the norms at
    the start of two stacks and at the end of the model, which is a LayerNorm; an attention and a SwiGLU a layer."""
    blocks, stacks = layers + 2 * refiners, 3 if refiners else 1
    return {
        "norm_scale": 3 if refiners else 2,
        "norm_tanh_mul_add": stacks,
        "norm_tanh_mul_add_norm_scale": 2 * blocks - stacks,
        "qk_norm_rope": blocks,
        "linear_silu_mul": blocks,
    }
