"""How compiled code calls norm_all_heads_rope: directly, with tables that all calls share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_modules import completed_half_rope, written_neighbours_rope
from graph_backend import needs_casts
from site_modules import torch_norm
from test_lowering import is_direct, random
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fusion_pass import Backend

S, H, DH = 6, 2, 16
D = H * DH


pytestmark = pytest.mark.usefixtures("compiled_anew")


def wan(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return written_neighbours_rope(torch_norm(x, w).unflatten(2, (H, -1)), cos[..., ::2], sin[..., 1::2]).flatten(2)


def ltx2(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t[0].unflatten(-1, (H, -1)).transpose(1, 2) for t in (cos, sin))
    n = torch_norm(x, w).unflatten(2, (H, -1)).transpose(1, 2)
    return completed_half_rope(n, cos, sin).transpose(1, 2).flatten(2)


@needs_casts
@pytest.mark.parametrize("rotate", (wan, ltx2))
def test_calls_are_direct_and_a_table_is_made_once(rotate: Any) -> None:
    def model(x: Tensor, w: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        for _ in range(3):
            x = rotate(x @ w, w[0], cos, sin)
        return x @ w

    shape = (1, S, 1, DH) if rotate is wan else (1, 1, S, D // 2)
    args = random(1, S, D), random(D, D), torch.randn(shape)
    torch._dynamo.reset()
    got, codes = run_and_get_code(torch.compile(model, backend=Backend(kernels="reference")), *args)
    code = "\n".join(codes)
    assert is_direct(code)
    assert code.count("DirectCall('norm_all_heads_rope'") == 3
    assert code.count(" = empty_strided_cpu(") <= 3 * 2 + 2 + 1  # matmuls and results, two tables, the last matmul
    torch.testing.assert_close(got, model(*args), rtol=0.05, atol=0.5)
