"""Models whose attention joins the heads of two streams: counts as functions of layers, results equal to eager's."""

from __future__ import annotations

import pytest
import torch
from graph_backend import GraphBackend
from graph_checks import but_adaln
from test_models import Arguments, build, compiled, flux1, run
from torch import nn

pytestmark = pytest.mark.usefixtures("one_graph")

BF16 = torch.bfloat16


def hunyuan_video(layers: int, batch: int = 2) -> tuple[nn.Module, Arguments]:
    """Its double blocks rotate the heads of the image, and join them with those of the text."""
    model = build(
        "HunyuanVideoTransformer3DModel",
        BF16,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": torch.randn(batch, 4, 2, 4, 4, dtype=BF16),
        "timestep": torch.tensor([3] * batch),
        "encoder_hidden_states": torch.randn(batch, 6, 16, dtype=BF16),
        "encoder_attention_mask": torch.ones(batch, 6, dtype=torch.long),
        "pooled_projections": torch.randn(batch, 8, dtype=BF16),
        "guidance": torch.full((batch,), 1000.0, dtype=BF16),
    }


def test_hunyuan_videos_heads_are_fused_in_each_double_block() -> None:
    """Its single blocks rotate a part of the tokens."""
    model, arguments = hunyuan_video(layers := 2)
    got, backend = compiled(model, arguments)
    assert torch.equal(got, run(model, arguments))
    assert but_adaln(backend.report) == {"qk_norm_rope": layers}
    rows = [site for site in backend.report.missed if site.kind.endswith("rope")]
    assert [site.reason_name for site in rows] == ["HEADS"] * 2
    assert all("(only some tokens or heads are rotated)" in (site.reason or "") for site in rows)


# --- norms of both streams, joined, then rotated ------------------------------------------------------------------


def test_fluxs_heads_are_fused_in_each_block() -> None:
    """Those of both streams of a double block are one site."""
    model, arguments = flux1(layers := 2, 1, batch=2)
    got, backend = compiled(model, arguments)
    assert torch.equal(got, run(model, arguments))
    assert but_adaln(backend.report) == {"qk_norm_cat_rope": layers, "qk_norm_rope": 1}
    assert not [site for site in backend.report.missed if ".attn" in site.module]


def test_a_double_block_of_flux_alone_with_sizes_that_change() -> None:
    model, arguments = flux1(1, 1)
    expected = run(model, arguments)
    backend = GraphBackend()
    model.transformer_blocks[0].compile(backend=backend, fullgraph=True, dynamic=True)
    assert torch.equal(run(model, arguments), expected)
    assert but_adaln(backend.report) == {"qk_norm_cat_rope": 1}
