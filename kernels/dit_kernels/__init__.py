"""Fused kernels for diffusion transformers: importing this registers torch.ops.dit_kernels.*."""

from dit_kernels import ops

__all__ = ["ops"]
