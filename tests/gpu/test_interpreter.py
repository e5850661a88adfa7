"""The interpreter of tests/ptx against the GPU: the same PTX, the same operands.

Bit by bit where only exact instructions are involved: the rows of x are ±1 and eps is 0, so that the root is that of 1,
and gates are given. Elsewhere rsqrt, ex2 and rcp are approximations, of which the interpreter has the nearest fp32
number and the GPU one near it: outputs seldom differ, and then by the rounding of a value that is nearly halfway.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from ptx.device import call, gpu

from dit_kernels import compile
from dit_kernels.families.rows import processors
from dit_kernels.rounding import FORMS, NORMS

OPS = ("norm_tanh_mul_add", "norm_tanh_mul_add_norm_scale", "norm_scale")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAY_DIFFER = {torch.bfloat16: 2e-4, torch.float16: 1e-3}
D = 2048  # its reciprocal is exact


def arguments(op: str, dtype: torch.dtype, eps: float, exact: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, residual = random(2, 5, D), random(2, 5, D)
    x = torch.where(x < 0, -1.0, 1.0).to(dtype) if exact else x
    weight, gate, weight2, scale = random(D), random(2, 1, D), random(D), random(2, 1, D)
    if op == "norm_scale":
        return x, weight, None, scale, eps
    first = (x, weight, None, gate, residual, eps)
    return first if op == "norm_tanh_mul_add" else (*first, weight2, None, scale, eps)


def both(op: str, args: tuple[Any, ...], **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Each result as the interpreter and as the GPU computes it."""
    with gpu(compile._arch(0), processors(0)):
        simulated = call(op, args, **options)
    on_gpu = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    results = getattr(torch.ops.dit_kernels, op)(*on_gpu, **options)
    results = results if isinstance(results, tuple) else (results,)
    return [(a, b.cpu()) for a, b in zip(simulated, results, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ("norm_tanh_mul_add", "norm_scale"))
def test_exact_instructions_give_the_same_bits(op: str, form: str, dtype: torch.dtype) -> None:
    tanh = {} if op == "norm_scale" else {"tanh": False}
    for simulated, real in both(op, arguments(op, dtype, 0.0, exact=True), rounding=form, **tanh):
        assert torch.equal(simulated, real)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("op", OPS)
def test_approximate_instructions_give_nearly_the_same(op: str, norm: str, dtype: torch.dtype) -> None:
    for simulated, real in both(op, arguments(op, dtype, 1e-5, exact=False), norm=norm):
        differing = float((simulated != real).float().mean())
        assert differing <= MAY_DIFFER.get(dtype, 1.0)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(simulated, real, rtol=tolerance, atol=tolerance)
