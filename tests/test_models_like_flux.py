"""Models whose blocks are FLUX.1's, in other classes: counts as functions of layers, results equal to eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from graph_backend import GraphBackend
from graph_checks import but_adaln
from long import only_long
from test_models import WRAPPER, Arguments, build, compiled, flux1, run
from torch import nn

BF16 = torch.bfloat16


def like_flux(name: str, layers: int, single_layers: int, **config: Any) -> tuple[nn.Module, Arguments]:
    """A tiny model of this class, with what FLUX.1 is called with, but for the pooled text and the guidance."""
    _, arguments = flux1(1, 1)
    model = build(
        name,
        BF16,
        in_channels=4,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        **config,
    )
    return model, {key: given for key, given in arguments.items() if key not in ("pooled_projections", "guidance")}


def chroma(layers: int, single_layers: int) -> tuple[nn.Module, Arguments]:
    small = dict(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
    return like_flux("ChromaTransformer2DModel", layers, single_layers, **small)


def bria_fibo(layers: int, single_layers: int) -> tuple[nn.Module, Arguments]:
    """Each block reads another layer of the text encoder."""
    model, arguments = like_flux("BriaFiboTransformer2DModel", layers, single_layers, text_encoder_dim=16)
    blocks = layers + single_layers
    return model, {**arguments, "text_encoder_layers": [torch.randn(1, 6, 16, dtype=BF16) for _ in range(blocks)]}


@only_long
def test_chromas_heads_are_fused_in_each_block() -> None:
    model, arguments = chroma(layers := 1, single := 2)
    got, backend = compiled(model, arguments)
    assert torch.equal(got, run(model, arguments))
    assert but_adaln(backend.report) == {"qk_norm_cat_rope": layers, "qk_norm_rope": single}


@pytest.mark.skipif(not hasattr(functorch_config, WRAPPER), reason="this torch has no complex wrapper")
def test_bria_fibos_heads_are_fused_in_blocks_that_are_compiled_alone_with_the_complex_wrapper() -> None:
    model, arguments = bria_fibo(1, 1)
    expected = run(model, arguments)
    backends = {"transformer_blocks.0": GraphBackend(), "single_transformer_blocks.0": GraphBackend()}
    for name, backend in backends.items():
        model.get_submodule(name).compile(backend=backend, fullgraph=True, dynamic=False)
    with functorch_config.patch(**{WRAPPER: True}):
        assert torch.equal(run(model, arguments), expected)
    counts = {name: but_adaln(backend.report) for name, backend in backends.items()}
    assert counts == {
        "transformer_blocks.0": {"qk_norm_cat_rope": 1},
        "single_transformer_blocks.0": {"qk_norm_rope": 1},
    }
