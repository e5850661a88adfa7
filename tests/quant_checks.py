"""What the kernels that quantise must give: q and s have the bits of eager code on the same z.

z itself may not be stored. The kernel of the same op without `_quant` stores it: both sum in the same order. The GELU
of a bf16 number is eager's. tests/gpu runs these checks on a GPU, and tests/ptx in the interpreter of the PTX.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from kernel_bounds import BF16, FP32, Device, operands, random
from torch import Tensor

from dit_kernels import reference
from dit_kernels.families import OPS
from dit_kernels.rounding import FP8

NORM, DUAL = "norm_scale_quant", "norm_tanh_mul_add_norm_scale_quant"
SILU, GELU, QUANT = "silu_mul_quant", "gelu_quant", "quant"
LARGEST_BF16 = torch.finfo(BF16).max


def arguments(
    op: str, d: int, dtype: torch.dtype = BF16, batch: int = 2, tokens: int = 3, device: str = "cpu"
) -> tuple[Any, ...]:
    if op in (SILU, GELU, QUANT):
        a, b = (random(batch, tokens, d, dtype=dtype, seed=seed, device=device) for seed in (1, 2))
        return (a * 3, b) if op == SILU else (a * 3,)
    return operands(batch, tokens, d, dtype, device=device).arguments(op.removesuffix("_quant"))


def assert_same_bytes(name: str, got: Tensor, expected: Tensor) -> None:
    """NaN is NaN: a cast on the CPU keeps its sign."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    a, b = got.float(), expected.float()
    differs = ~((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan()))
    if differs.any():
        index = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(f"{name}{list(index)} is {a[index]}, by the definition {b[index]}: {differs.sum()} differ")


def check(on: Device, op: str, *given: Any, before: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    """Runs an op that quantises. The results must be those of the definition on what the op without `_quant` stores.

    op: with its overload. before: the last positional argument. Returns q, and s if the op does.
    """
    call = OPS[op].call(*given, **options)
    results = on.run(op, *given, *([] if before is None else [before]), **options)
    plain = OPS.get(op.partition("_quant")[0]) if op != QUANT else None
    if plain is None:  # a GELU, or the rows themselves
        with on.eager():
            others, z = [], reference.activation(given[0], None, call.chain.act, call.chain.steps)
    else:
        of_plain = {option.name: options[option.name] for option in plain.options if option.name in options}
        by_name = dict(zip(call.op.roles, call.op.filled(given), strict=True))
        *others, z = on.run(plain.name, *(by_name[name] for name in plain.roles), **of_plain)
    z = z if before is None else torch.cat((before, z), -1)
    steps, scale = call.chain.quant, call.named.get("static_scale")
    with on.eager():
        q, *s = reference.quantised(z, steps, scale)
        unclamped = reference.quantised(z, replace(steps, clamp=False, out=FP32), scale)[0]
    if not steps.clamp:  # also where this version of PyTorch clamps
        q = torch.where(unclamped.abs() > 464, torch.nan, q.float()).to(FP8)
    stored = (*others, z) if call.chain.keeps else others
    names = [result.name for result in call.op.results]
    for name, got, expected in reversed(list(zip(names, results, (*stored, q, *s), strict=True))):  # q depends on s
        assert_same_bytes(name, got, expected)
    return results[len(stored) :]


# --- z by hand ------------------------------------------------------------------------------------------------------


def check_rows(on: Device, z: Tensor, *scale: Tensor, op: str = SILU, **options: Any) -> tuple[Tensor, ...]:
    """Quantises rows of bf16 numbers, by an op whose z is b times a number: silu(64) = 64, and silu(2^-20) = 2^-21.

    scale: the static scale, for an op that takes one.
    """
    large = z.float().abs() > 1
    a = torch.where(large, 64.0, 2.0**-20).to(BF16)
    b = torch.where(large, z.float() / 64, z.float() * 2.0**21).to(BF16)
    return check(on, op, a[None], b[None], *scale, **options)


def every_quotient() -> Tensor:
    """Rows of 128 different amax, each with every bf16 number whose quotient by the scale is a number of FP8."""
    significands = torch.arange(128) + 128.0
    numbers = (significands * 2.0 ** torch.arange(-19, 1)[:, None]).flatten()
    tops = significands[:, None]
    return torch.cat((tops, *(sign * numbers.minimum(tops) for sign in (1, -1)), torch.zeros(128, 15)), 1).to(BF16)


def special_rows() -> Tensor:
    ordinary = random(1, 1024, dtype=FP32, seed=5)
    ones = torch.zeros(1, 1024).index_fill(1, torch.tensor([700]), 1.0)
    rows = [ordinary * 0, ordinary * -0.0, ones, ones * LARGEST_BF16, ordinary * 1e37, ordinary * 1e30]
    rows += [ordinary * 2.0**-exponent for exponent in (90, 98, 100, 110, 118, 120, 124, 126, 128, 130, 132)]
    rows += [ordinary + ones * special for special in (torch.inf, -torch.inf, torch.nan)]
    rows += [torch.full((1, 1024), -torch.inf), ordinary.masked_fill(ordinary > 0, -0.0), ones * 2.0**-133]
    return torch.cat(rows).nan_to_num(torch.nan, torch.inf, -torch.inf).to(BF16)
