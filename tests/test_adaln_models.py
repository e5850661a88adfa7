"""AdaLN in diffusers' models: counts as functions of their layers, results equal to eager's.

Most of these models have a residual add, then a norm with a scale and a shift, one to four times in each block. Where
Inductor computes an operand of the add in the kernel of the add, the rule of kinds/gain.py leaves the site to Inductor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import quantized
import torch
from graph_backend import GraphBackend, needs_casts
from long import LONG
from test_all_heads_sites import ltx
from test_joined_models import hunyuan_video
from test_left_to_inductor import kandinsky5, wan21
from test_models import Arguments, build, compiled, flux1, flux2, qwen_image, run
from test_models_like_flux import chroma, like_flux
from torch import nn

pytestmark = [pytest.mark.usefixtures("one_graph"), needs_casts]

BF16 = torch.bfloat16
ADD, SCALED = "mul_add_norm_scale", "norm_scale"
Counts = tuple[int, int]  # of mul_add_norm_scale, and of norm_scale


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=BF16)


# --- the models -------------------------------------------------------------------------------------------------------


def sd3(layers: int) -> tuple[nn.Module, Arguments]:
    """The first block has two attentions, whose inputs are two modulations of one norm. One kernel of Inductor adds the
    results of both and computes the norm that follows."""
    model = build(
        "SD3Transformer2DModel",
        BF16,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return model, {
        "hidden_states": random(1, 4, 8, 8),
        "encoder_hidden_states": random(1, 6, 32),
        "pooled_projections": random(1, 16),
        "timestep": torch.tensor([500.0]),
    }


def cogview4(layers: int) -> tuple[nn.Module, Arguments]:
    model = build(
        "CogView4Transformer2DModel",
        BF16,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return model, {
        "hidden_states": random(2, 4, 8, 8),
        "encoder_hidden_states": random(2, 6, 16),
        "timestep": torch.tensor([3, 7]),
        "original_size": torch.full((2, 2), 8.0, dtype=BF16),
        "target_size": torch.full((2, 2), 8.0, dtype=BF16),
        "crop_coords": torch.zeros(2, 2, dtype=BF16),
    }


def bria(layers: int) -> tuple[nn.Module, Arguments]:
    return like_flux("BriaTransformer2DModel", layers, 1)


def pixart(layers: int) -> tuple[nn.Module, Arguments]:
    """No gate in front of the norm of the feed-forward."""
    model = build(
        "PixArtTransformer2DModel",
        BF16,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=layers,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": random(2, 4, 8, 8),
        "encoder_hidden_states": random(2, 6, 16),
        "timestep": torch.tensor([3, 7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sana(layers: int) -> tuple[nn.Module, Arguments]:
    model = build(
        "SanaTransformer2DModel",
        BF16,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    )
    return model, {
        "hidden_states": random(2, 4, 8, 8),
        "encoder_hidden_states": random(2, 6, 16),
        "timestep": torch.tensor([3, 7]),
    }


def krea2(layers: int) -> tuple[nn.Module, Arguments]:
    """RMSNorms whose weights are 1 + w, in two blocks of the text and in the layers."""
    model = build(
        "Krea2Transformer2DModel",
        BF16,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {
        "hidden_states": random(2, 16, 4),
        "encoder_hidden_states": random(2, 6, 2, 32),
        "timestep": torch.rand(2).to(BF16),
        "position_ids": torch.rand(22, 3),
    }


def ernie(layers: int) -> tuple[nn.Module, Arguments]:
    """Tokens come first, [S, B, D]; the modulations are expanded to all tokens, and computed with in fp32."""
    model = build(
        "ErnieImageTransformer2DModel",
        BF16,
        hidden_size=32,
        num_attention_heads=2,
        num_layers=layers,
        ffn_hidden_size=64,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": random(2, 4, 4, 4),
        "timestep": torch.rand(2).to(BF16),
        "text_bth": random(2, 6, 16),
        "text_lens": torch.tensor([6, 6]),
    }


def wan22(layers: int) -> tuple[nn.Module, Arguments]:
    """Wan 2.2 TI2V has a timestep, and so a modulation, for each token."""
    model, arguments = wan21(layers)
    return model, arguments | {"timestep": torch.full((1, 12), 500.0)}


def cogvideox(layers: int, **config: Any) -> tuple[nn.Module, Arguments]:
    """Affine norms. What attention and the feed-forward read is joined with the text."""
    model = build(
        "CogVideoXTransformer3DModel",
        BF16,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=layers,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=6,
        **config,
    )
    return model, {
        "hidden_states": random(1, 2, 4, 8, 8),
        "encoder_hidden_states": random(1, 6, 16),
        "timestep": torch.tensor([3]),
    }


# --- what is fused ----------------------------------------------------------------------------------------------------


def of_double_blocks(layers: int) -> Counts:
    """Two streams with two adds in each block. The streams are joined before a norm reads the last two.

    In front of four norms there is no add: the first of each stream, that of the single block, and the last one.
    """
    return 4 * layers - 2, 4


MODELS: dict[str, tuple[Callable[[int], tuple[nn.Module, Arguments]], Callable[[int], Counts]]] = {
    "SD3.5": (sd3, lambda layers: (4 * layers - 3, 1)),
    "PixArt": (pixart, lambda layers: (2 * layers, 0)),
    "Wan 2.2 TI2V": (wan22, lambda layers: (3 * layers, 1)),
    # The others take longer, and are for a night.
    "FLUX.1": (lambda layers: flux1(layers, 1), of_double_blocks),
    "FLUX.2": (flux2, lambda layers: (4 * layers - 2 + layers - 1, 4)),  # as many single blocks, with one add each
    "Bria": (bria, of_double_blocks),
    "Chroma": (lambda layers: chroma(layers, 1), of_double_blocks),
    "Qwen-Image": (qwen_image, lambda layers: (4 * layers - 2, 2)),
    # The image comes from a convolution, and with kernels="reference" no site is fused whose rows lie apart.
    "HunyuanVideo": (hunyuan_video, lambda layers: (layers + 1, 3)),
    "CogView4": (cogview4, lambda layers: (2 * layers, 0)),
    "Wan 2.1": (wan21, lambda layers: (3 * layers, 1)),
    "Kandinsky 5": (lambda layers: kandinsky5(1, layers), lambda layers: (3 * layers, 1)),
    "Sana": (sana, lambda layers: (2 * layers, 1)),
    "LTX-Video": (ltx, lambda layers: (2 * layers, 1)),
    "Krea 2": (krea2, lambda layers: (2 * layers + 2, 8)),
    "ERNIE": (ernie, lambda layers: (2 * layers, 1)),
    "CogVideoX": (cogvideox, lambda layers: (1, 1)),
}
EACH = [(name, layers) for layers in (1, 2) for name in MODELS]
CHOSEN = EACH if LONG else [*EACH[:3], ("PixArt", 2)]


def check(model: nn.Module, arguments: Arguments) -> GraphBackend:
    got, backend = compiled(model, arguments)
    eager = run(model, arguments)
    # torch decomposes a LayerNorm that no op computes, which differs from eager's in the last bits.
    assert torch.equal(got, eager) or torch.equal(got, compiled(model, arguments, fuse=False)[0])
    return backend


@pytest.mark.parametrize(("name", "layers"), CHOSEN)
def test_adds_norms_scales_and_shifts_are_fused_and_the_result_is_eagers(name: str, layers: int) -> None:
    make, counts = MODELS[name]
    backend = check(*make(layers))
    assert tuple(backend.report.counts().get(kind, 0) for kind in (ADD, SCALED)) == counts(layers)


# --- with FP8 ---------------------------------------------------------------------------------------------------------


def test_flux_1_in_fp8_is_fused() -> None:
    model, arguments = flux1(1, 2)
    backend = check(quantized.quantize_(model, chosen=quantized.of_blocks), arguments)
    counts = backend.report.counts()
    # With an add: the norms of both feed-forwards of the double block, and the norm of the second single block.
    # Without: the first norms of both streams, and that of the first single block, where the streams are joined.
    # No layer in FP8 reads the last norm.
    assert (counts[f"{ADD}_quant"], counts[f"{SCALED}_quant"], counts[SCALED]) == (3, 3, 1)
    assert {site.kind for site in backend.report.missed} == {"residual_add"}
