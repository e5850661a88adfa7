"""The epilogues of linear layers, run from their PTX in the kernel of silu_mul. The interpreter runs no wgmma.

The kernel of silu_mul then reads sums in fp32, as an epilogue finds them, and computes what the epilogue computes.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from kernel_bounds import random
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")
pytest.importorskip("triton", reason="quack imports Triton")
pytest.importorskip("quack", reason="quack-kernels is not installed")

from cutlass import Int32

from dit_kernels.chain import LinearChain
from dit_kernels.cute import activation, linear
from dit_kernels.cute.arith import elements_of
from dit_kernels.rounding import activation_steps
from ptx.device import compiled, gpu
from ptx.judging import Interpreter

INTERPRETER = Interpreter()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def run(epilogue: Any, gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """What an epilogue makes of sums, rounded to dtype."""
    with gpu("sm_90a", 132, compiled.__wrapped__), mock.patch.object(activation, "activation", epilogue):
        (result,) = INTERPRETER.run("silu_mul", gate, up, silu_dtype=dtype, out_dtype=dtype)
    return result


def sums() -> tuple[Tensor, Tensor]:
    """Two tensors in fp32, a third of whose elements lie between two 16-bit numbers."""
    gate, up = random(1, 2, 1024, dtype=FP32) * 4, random(1, 2, 1024, dtype=FP32, seed=1) * 4
    gate[..., ::3] = (gate[..., ::3].bfloat16().float().view(torch.int32) | 0x8000).view(FP32)
    return gate, up


@pytest.mark.parametrize(("dtype", "up_first"), ((BF16, 0), (BF16, 1), (FP16, 1)))
def test_gate_and_up_are_rounded_before_the_activation(dtype: torch.dtype, up_first: int) -> None:
    original, chain = activation.activation, LinearChain("silu", dtype, activation_steps("model", dtype, dtype))

    def epilogue(even: Any, odd: Any, _: Any) -> Any:
        a, b = (linear.rounded_sums(elements_of(value), chain) for value in (even, odd))
        first = Int32(up_first)
        return original(linear.chosen(first, b, a), linear.chosen(first, a, b), chain)

    gate, up = sums()
    result = run(epilogue, *((up, gate) if up_first else (gate, up)), dtype)
    expected = F.silu(gate.to(dtype)) * up.to(dtype)
    assert (result == expected).float().mean() > (0.999 if dtype == BF16 else 0.997)
    late = (F.silu(gate) * up).to(dtype)
    assert (result == late).float().mean() < 0.9  # the rounding before the activation shows


@pytest.mark.parametrize("act", ("gelu", "gelu_tanh"))
def test_a_sum_is_rounded_before_gelu(act: str) -> None:
    original, chain = activation.activation, LinearChain(act, BF16, activation_steps("model", BF16))

    def epilogue(value: Any, _: Any, __: Any) -> Any:
        return original(linear.rounded_sums(elements_of(value), chain), None, chain)

    gate, up = sums()
    result = run(epilogue, gate, up, BF16)
    with INTERPRETER.eager():
        expected = F.gelu(gate.bfloat16(), approximate="tanh" if act == "gelu_tanh" else "none")
    assert (result == expected)[gate > -3].float().mean() > 0.999  # below, the erf of a CPU has few digits
