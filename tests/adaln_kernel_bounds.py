"""The operands of the norms' kernels with a shift, and how far their results may be from the definition.

y = residual + gate * x has no sum over a row, so it is the definition's bit by bit. z is judged from the kernel's own
y, by the bounds of kernel_bounds: a z that is never rounded by its distance from fp64, as the definition is. tests/gpu
judges a GPU, and tests/ptx the interpreter of the PTX.
"""

from __future__ import annotations

from typing import Any

import kernel_bounds as bounds
import torch
from kernel_bounds import BF16, FP32, Device, random
from torch import Tensor

from dit_kernels import reference
from dit_kernels.families import OPS

ADD, SCALED, DUAL = "mul_add_norm_scale", "norm_scale", "norm_tanh_mul_add_norm_scale"
D = 2304


def operands(
    op: str,
    tokens: int = 3,
    d: int = D,
    dtype: torch.dtype = BF16,
    modulation: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
    affine: bool = False,
    device: str = "cpu",
) -> tuple[Any, ...]:
    """The arguments of an op, by position, the shift last. shape: of gate, scale and shift; [B, 1, D] by default."""
    x, residual = (random(2, tokens, d, dtype=dtype, seed=seed, device=device) for seed in (1, 2))
    shape = shape or (2, 1, d)
    gate, scale, shift = (random(*shape, dtype=modulation or dtype, seed=seed, device=device) for seed in (3, 4, 5))
    weight, bias = (random(d, dtype=dtype, seed=seed, device=device) if affine else None for seed in (6, 7))
    second = (weight, bias, scale, 1e-6)
    if op == SCALED:
        return (x, *second, shift)
    return (x, gate, residual, *second, shift) if op == ADD else (x, weight, bias, gate, residual, 1e-5, *second, shift)


def check(on: Device, op: str, *given: Any, **options: Any) -> tuple[Tensor, ...]:
    """Runs an op and judges its results."""
    call = OPS[op].call(*given, **options)
    results = on.run(op, *given, **options)
    last = call.chain.stages[-1]
    read = call.first if len(results) == 1 else results[0]
    parts = [call.named[name] for name in (last.names.weight, last.names.bias, last.names.factor)]
    eps, shift = call.named[last.names.eps], call.named["shift"]
    with on.eager():
        if op == ADD:
            y = call.definition()[0]
            assert torch.equal(results[0], y), f"y: {int((results[0] != y).sum())} elements differ"
        z = reference.stage(read, *parts, shift, eps, last)
        product = z if shift is None else reference.stage(read, *parts, None, eps, last)
        if bounds.never_rounds(last.steps):
            wide = (read, *parts[:2], bounds.factor_in_fp64(parts[2], last), eps, shift)
            on.assert_precise("z", results[-1], z, bounds.in_fp64(SCALED, wide, {"norm": last.norm}))
            return results
    magnitude = torch.maximum(z.float().abs(), product.float().abs())
    if shift is not None:
        magnitude = torch.maximum(magnitude, shift.float().abs().expand_as(magnitude))
    coarsest = bounds.coarsest_dtype(last.steps, z)
    most = bounds.may_differ(on, z, "cast_then_weight", last.norm or "") if z.dtype != FP32 else z.numel()
    bounds.assert_follows(results[-1], z, magnitude, bounds.Z_STEPS, coarsest, most)
    return results
