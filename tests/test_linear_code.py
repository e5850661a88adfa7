"""What the kernels of linear layers compile to, for each architecture that quack has a GEMM for. This needs no GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")
pytest.importorskip("triton", reason="quack imports Triton")
pytest.importorskip("quack", reason="quack-kernels is not installed")

from ptx.device import compiled

from dit_kernels import compile
from dit_kernels.families import OPS
from dit_kernels.families.linear import TILINGS

BF16 = torch.bfloat16
ARCHS = ("sm_90a", "sm_100a", "sm_120a")
MATMULS = {"sm_90a": "wgmma.mma_async", "sm_100a": "tcgen05.mma", "sm_120a": "mma.sync"}
pytestmark = pytest.mark.xdist_group("linear_code")  # quack's import takes 7 s


def ptx(op: str, arch: str, **options: Any) -> str:
    x, w, bias = torch.zeros(64, 256, dtype=BF16), torch.zeros(512, 256, dtype=BF16), torch.zeros(512, dtype=BF16)
    call = OPS[op].call(x, w, w.clone() if op == "linear_silu_mul" else bias, **options)
    variant = compile._variant(call.op.family, call.chain, call.operands(call.empty_results()))
    return compiled(arch, variant).ptx


def test_every_architecture_of_quack_is_compiled_for() -> None:
    assert sorted(TILINGS) == [int(arch.strip("sm_a")) // 10 for arch in ARCHS]


@pytest.mark.parametrize(
    ("op", "arch"), (("linear_silu_mul", "sm_90a"), ("linear_gelu", "sm_100a"), ("linear_silu_mul", "sm_120a"))
)
def test_the_activation_is_in_the_matmul_and_sums_are_rounded_before_it(op: str, arch: str) -> None:
    code = ptx(op, arch, **({"approximate": "tanh"} if op == "linear_gelu" else {}))
    assert MATMULS[arch] in code
    assert "ex2.approx" in code
    assert "rcp.approx" in code
    first_round, first_exponential = code.index("cvt.rn.bf16x2.f32"), code.index("ex2.approx")
    assert first_round < first_exponential
    assert not re.search(r"\bst\.local|\bld\.local", code)
