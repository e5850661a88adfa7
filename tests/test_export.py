"""Exported models: torch.export asserts the metadata of casts, and AOTInductor loads the fused graph in Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_backend import run
from torch import Tensor, nn

import fusion_pass
from fusion_pass.prepare import drop_what_computes_nothing

D, H = 64, 2
ROOT = Path(__file__).parents[1]


class Norm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        n = x.float()
        return (n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class Block(nn.Module):
    """A block as Z-Image has it: gated norms, q and k with a rotation, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm_q = Norm(D), Norm(D), Norm(D // H)
        self.qkv, self.up, self.down = nn.Linear(D, 3 * D), nn.Linear(D, 4 * D), nn.Linear(2 * D, D)

    def rotated(self, t: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.norm_q(t).float().reshape(*t.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs.unsqueeze(2)).flatten(3).type_as(t).transpose(1, 2)

    def forward(self, x: Tensor, scale: Tensor, gate: Tensor, freqs: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x) * (1 + scale)).unflatten(-1, (3, H, D // H)).unbind(2)
        h = F.scaled_dot_product_attention(self.rotated(q, freqs), self.rotated(k, freqs), v.transpose(1, 2))
        a, b = self.up(h.transpose(1, 2).flatten(2)).chunk(2, -1)
        return x + gate.tanh() * self.norm2(self.down(F.silu(a) * b))


# One package is compiled, and the headers of AOTInductor take longer to precompile than to read once.
NO_HEADERS = {"aot_inductor.precompile_headers": False}
COUNTS = {"norm_scale": 1, "norm_tanh_mul_add": 1, "qk_norm_rope": 1, "linear_silu_mul": 1}


@pytest.fixture
def block() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    angle = torch.randn(1, 12, D // H // 2)
    args = (torch.randn(1, 12, D), torch.randn(1, 1, D), torch.randn(1, 1, D))
    return Block().eval().bfloat16(), (*(t.bfloat16() for t in args), torch.polar(torch.ones_like(angle), angle))


@pytest.mark.parametrize("dynamic", (False, True))
def test_an_exported_model_has_the_sites_of_the_model(block: Any, dynamic: bool) -> None:
    model, args = block
    tokens = {1: torch.export.Dim("tokens", min=2, max=64)}
    shapes = (tokens, None, None, tokens) if dynamic else None
    with torch.no_grad():
        exported = torch.export.export(model, args, dynamic_shapes=shapes).module()
        asserts = [n for n in exported.graph.nodes if "_assert_tensor_metadata" in str(n.target)]
        assert asserts, "torch.export asserts nothing any more: this test shows nothing"
        got, backend = run(exported, *args)
        assert torch.equal(got, model(*args))
    assert backend.report.counts() == COUNTS
    if not dynamic:
        assert run(model, *args)[1].report.counts() == COUNTS


def test_an_assert_that_does_not_hold_stays_in_the_graph() -> None:
    asserts = torch.ops.aten._assert_tensor_metadata.default
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1, 12, D, dtype=torch.bfloat16)
    for size, dtype in ((None, torch.bfloat16), ([1, 12, D], None), ([1, 13, D], None), (None, torch.float32)):
        graph.call_function(asserts, (x, size, None, dtype))
    drop_what_computes_nothing(graph)
    assert [node.args[1:] for node in graph.find_nodes(op="call_function", target=asserts)] == [
        ([1, 13, D], None, None),
        (None, None, torch.float32),
    ]


def test_aotinductor_fuses_the_sites_and_its_package_runs_in_another_python_process(block: Any, tmp_path: Path) -> None:
    model, args = block
    with torch.no_grad():
        exported = torch.export.export(model, args)
        torch._dynamo.utils.counters.clear()
        package = torch._inductor.aoti_compile_and_package(
            exported,
            package_path=str(tmp_path / "block.pt2"),
            inductor_configs=fusion_pass.inductor_options(kernels="reference", options=NO_HEADERS),
        )
        fused = {kind: torch._dynamo.utils.counters["fusion_pass"][kind] for kind in COUNTS}
        torch.save((args, model(*args)), tmp_path / "expected.pt")
    assert fused == COUNTS
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]}\n"
        "import torch, dit_kernels\n"
        f"args, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"assert torch.equal(torch._inductor.aoti_load_package({package!r})(*args), expected)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
