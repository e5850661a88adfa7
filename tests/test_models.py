"""Other models that write the same mathematics: counts as functions of their layers, results equal to eager's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
import torch._functorch.config as functorch_config
import zimage
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from graph_backend import BackendOfBoth, GraphBackend
from graph_checks import but_adaln, but_matmuls
from long import only_long
from torch import nn

from fusion_pass.report import FusionReport

Arguments = dict[str, Any]
Make = Callable[..., tuple[nn.Module, Arguments]]


pytestmark = pytest.mark.usefixtures("one_graph")


# --- the models -------------------------------------------------------------------------------------------------------


def build(name: str, dtype: torch.dtype, **config: Any) -> nn.Module:
    """diffusers' own class with random weights; gates and scales of the order of 1, as in a trained model."""
    make = getattr(diffusers, name, None) or pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    torch.manual_seed(0)
    model = make(**config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 1.0)
    return model.eval().to(dtype)


def lumina2(layers: int, dtype: torch.dtype = torch.bfloat16, refiners: int = 1) -> tuple[nn.Module, Arguments]:
    model = build(
        "Lumina2Transformer2DModel",
        dtype,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=layers,
        num_refiner_layers=refiners,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[128, 128, 128],
        cap_feat_dim=8,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16, dtype=dtype),
        "timestep": torch.rand(2, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 6, 8, dtype=dtype),
        "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
    }


def lumina_next(layers: int, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Arguments]:
    model = build(
        "LuminaNextDiT2DModel",
        dtype,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=layers,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=dtype),
        "timestep": torch.rand(2, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 6, 16, dtype=dtype),
        "encoder_mask": torch.ones(2, 6, dtype=torch.bool),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16),
        "cross_attention_kwargs": {},
    }


def mochi(layers: int, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Arguments]:
    model = build(
        "MochiTransformer3DModel",
        dtype,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=layers,
        pooled_projection_dim=12,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 2, 8, 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 6, 16, dtype=dtype),
        "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": torch.tensor([[True] * 6, [True] * 4 + [False] * 2]),
    }


def ideogram4(layers: int, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Arguments]:
    model = build(
        "Ideogram4Transformer2DModel",
        dtype,
        in_channels=8,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=12,
        mrope_section=(4, 2, 2),
    )
    text, image = 4, 6
    return model, {
        "hidden_states": torch.randn(2, text + image, 8, dtype=dtype),
        "timestep": torch.rand(2, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, text + image, 12, dtype=dtype),
        "position_ids": torch.arange(text + image)[None, :, None].repeat(2, 1, 3),
        "segment_ids": torch.zeros(2, text + image, dtype=torch.long),
        "indicator": torch.tensor([[3] * text + [2] * image] * 2),
    }


def fibo2(layers: int, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Arguments]:
    """Gates and scales for each token, and in one layer a gate of one element."""
    model = build(
        "BriaFibo2Transformer2DModel",
        dtype,
        in_channels=4,
        dim=64,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(8, 12, 12),
        axes_lens=(64, 64, 64),
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=dtype),
        "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 2, 6, 16, dtype=dtype),
        "context_latents": [torch.randn(2, 4, 8, 8, dtype=dtype)],
    }


def nucleus_moe(layers: int, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Arguments]:
    model = build(
        "NucleusMoEImageTransformer2DModel",
        dtype,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        mlp_ratio=8.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=1.0,
    )
    return model, _packed_inputs(dtype, [(1, 4, 4)] * 2)


def qwen_image(layers: int, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Arguments]:
    model = build(
        "QwenImageTransformer2DModel",
        dtype,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return model, _packed_inputs(dtype, [[(1, 4, 4)]] * 2)


def flux1(
    layers: int, single_layers: int, dtype: torch.dtype = torch.bfloat16, batch: int = 1
) -> tuple[nn.Module, Arguments]:
    model = build(
        "FluxTransformer2DModel",
        dtype,
        in_channels=4,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {
        "hidden_states": torch.randn(batch, 16, 4, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 6, 32, dtype=dtype),
        "pooled_projections": torch.randn(batch, 16, dtype=dtype),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.ones(batch),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(6, 3),
    }


def flux2(layers: int, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Arguments]:
    model = build(
        "Flux2Transformer2DModel",
        dtype,
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    arguments = {
        "hidden_states": torch.randn(1, 16, 4, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 6, 32, dtype=dtype),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.cartesian_prod(*(torch.arange(n).float() for n in (1, 4, 4, 1))),
        "txt_ids": torch.cartesian_prod(*(torch.arange(n).float() for n in (1, 1, 1, 6))),
    }
    return model, arguments


def _packed_inputs(dtype: torch.dtype, shapes: list[Any]) -> Arguments:
    return {
        "hidden_states": torch.randn(2, 16, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 6, 16, dtype=dtype),
        "timestep": torch.rand(2, dtype=dtype),
        "img_shapes": shapes,
    }


def run(model: nn.Module, arguments: Arguments) -> torch.Tensor:
    with torch.no_grad():
        result = model(**arguments, return_dict=False)[0]
    return torch.stack(result) if isinstance(result, list) else result  # Z-Image has a list of images


def compiled(
    model: nn.Module, arguments: Arguments, dynamic: bool | None = None, **options: Any
) -> tuple[torch.Tensor, GraphBackend]:
    torch._dynamo.reset()
    backend = GraphBackend(**options)
    return run(torch.compile(model, backend=backend, dynamic=dynamic), arguments), backend


def compiled_with_and_without_the_pass(
    model: nn.Module, arguments: Arguments
) -> tuple[torch.Tensor, torch.Tensor, GraphBackend]:
    backend = BackendOfBoth()
    both = torch.compile(model, backend=backend)
    fused = run(both, arguments)
    backend.runs_fused = False
    return fused, run(both, arguments), backend


# --- what is fused ----------------------------------------------------------------------------------------------------


def stacks(gated: int, count: int = 1) -> dict[str, int]:
    """The counts of `count` residual streams with `gated` adds in all: a norm before the first add of each stream, and
    one behind every add but the last."""
    return {"norm_scale": count, "norm_tanh_mul_add": count, "norm_tanh_mul_add_norm_scale": gated - count}


def model_counts(gated: int, count: int = 1) -> dict[str, int]:
    """The same, and the LayerNorm with a scale at the end of the model."""
    return {**stacks(gated, count), "norm_scale": count + 1}


def blocks(count: int) -> dict[str, int]:
    """An attention and a SwiGLU in each."""
    return {"qk_norm_rope": count, "linear_silu_mul": count}


def fibo2_counts(layers: int) -> dict[str, int]:
    """A refiner layer, one gate more, and the perceiver, with a SwiGLU and two adds of what is no norm. Its cross
    attention has no rotation."""
    perceiver = {"mul_add_norm_scale": 2, "qk_norm_rope": layers + 1, "linear_silu_mul": layers + 2}
    return {**model_counts(2 * (layers + 1) + 1, count=2), **perceiver}


def mochi_counts(layers: int) -> dict[str, int]:
    """Two streams; that of the text ends with the last layer's first norm. The LayerNorm at the end has a shift. The
    rotation of its heads is another one for each head."""
    image, text = 2 * layers, 2 * (layers - 1)
    gated = {"norm_scale": 2, "norm_tanh_mul_add": 1, "norm_tanh_mul_add_norm_scale": image - 1 + text}
    return {**gated, "linear_silu_mul": 2 * layers - 1}


def nucleus_counts(layers: int) -> dict[str, int]:
    """Its gates are on what is no norm: two adds a layer, each with the norm behind it. The text has keys and no
    queries. From the second layer on, a SwiGLU for each of two experts, whose weights are [K, N], and one for all."""
    attention = {"norm_rope": layers, "qk_norm_rope": layers, "mul_add_norm_scale": 2 * layers, "norm_scale": 1}
    experts = {"silu_mul": 2 * (layers - 1)} if layers > 1 else {}
    return {**attention, "linear_silu_mul": layers, **experts}


FUSED: dict[str, tuple[Make, Callable[[int], dict[str, int]]]] = {
    "Lumina 2": (lumina2, lambda layers: zimage.expected_counts(layers, refiners=1)),
    # Its q- and k-norms run over all heads.
    # Of its LayerNorms over all heads, those of k have one head.
    "Lumina-Next": (
        lumina_next,
        lambda layers: {**model_counts(2 * layers), "linear_silu_mul": layers, "norm_rope": layers},
    ),
    "Mochi": (mochi, mochi_counts),
    "Ideogram 4": (ideogram4, lambda layers: {**model_counts(2 * layers), **blocks(layers)}),
    "FIBO 2": (fibo2, fibo2_counts),
    "NucleusMoE": (nucleus_moe, nucleus_counts),
}


# Other tests count the sites of the others with one layer.
LAYERS = (*((name, 2) for name in FUSED), ("Ideogram 4", 1), ("NucleusMoE", 1))


@cache
def fused(name: str, layers: int) -> tuple[torch.Tensor, torch.Tensor, FusionReport]:
    """The result of a model, the expected one, and the report."""
    make, _ = FUSED[name]
    model, arguments = make(layers)
    # Lumina 2 reads its numbers of tokens once. That breaks the graph also where they are symbols, which takes twice as
    # long.
    symbols = make is not lumina2
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=symbols, capture_scalar_outputs=symbols):
        got, backend = compiled(model, arguments)
    # torch 2.11's own passes drop casts elsewhere in this model.
    own = make is lumina_next and torch.__version__ < "2.12"
    expected = compiled(model, arguments, fuse=False)[0] if own else run(model, arguments)
    return got, expected, backend.report


@pytest.mark.parametrize(("name", "layers"), LAYERS)
def test_every_site_is_fused_and_the_result_is_eagers(name: str, layers: int) -> None:
    got, expected, report = fused(name, layers)
    _, counts = FUSED[name]
    assert torch.equal(got, expected)
    assert report.counts() == counts(layers)


@pytest.mark.parametrize("name", ("Lumina-Next", pytest.param("Mochi", marks=only_long)))  # the others take longest
def test_in_fp32_every_site_is_fused_and_the_result_is_as_near_to_eager_as_the_unfused_graphs(name: str) -> None:
    """Inductor decomposes silu, layer_norm and the like, which shows in the last bits of both."""
    make, counts = FUSED[name]
    model, arguments = make(1, torch.float32)
    eager = run(model, arguments)
    got, plain, backend = compiled_with_and_without_the_pass(model, arguments)
    assert (got - eager).norm() <= 1.5 * (plain - eager).norm()
    assert backend.report.counts() == counts(1)
    assert {site.rounding for site in backend.report.fused if site.kind != "linear_silu_mul"} == {"cast_then_weight"}


@pytest.mark.parametrize("name", (pytest.param("Mochi", marks=only_long), "FIBO 2"))
def test_autocast_over_fp32_weights_fuses_the_same_sites_and_the_result_is_eagers(name: str) -> None:
    make, counts = FUSED[name]
    model, arguments = make(1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, backend = compiled(model, arguments)
        assert torch.equal(got, run(model, arguments))
    assert backend.report.counts() == counts(1)


def test_mochi_rounds_the_gated_product_once() -> None:
    gated = [site for site in fused("Mochi", 2)[-1].fused if site.gate is not None]
    assert {(site.gate, site.rounding) for site in gated} == {("tanh", "gate_in_fp32")}


def test_a_gate_for_each_token_and_a_gate_of_one_element_are_told_apart() -> None:
    gates = {site.module: site.gate for site in fused("FIBO 2", 2)[-1].fused}
    assert gates["layers.0.cross_attn_norm2"] == "tanh"
    assert gates["layers.0.attention_norm2"] == "given"  # tanh, then where: an activated gate
    assert gates["noise_refiner.0.attention_norm2"] == "given"


BLOCK = {**stacks(2), **blocks(1)}
MOCHI_BLOCK = {**{kind: 2 * count for kind, count in stacks(2).items()}, "linear_silu_mul": 2}
BLOCKS: dict[str, tuple[Make, dict[str, dict[str, int]]]] = {
    "Lumina 2": (
        lumina2,
        {
            "context_refiner.0": {kind: 1 for kind in BLOCK if kind != "norm_scale"},
            "layers.1": BLOCK,
        },
    ),
    "Mochi": (
        mochi,
        {
            "transformer_blocks.0": MOCHI_BLOCK,
            "transformer_blocks.1": {**stacks(2), "norm_scale": 2, "linear_silu_mul": 1},
        },
    ),
}


@pytest.mark.parametrize("name", (pytest.param("Lumina 2", marks=only_long), "Mochi"))
def test_compiled_block_by_block_each_block_has_its_sites_and_the_result_is_eagers(name: str) -> None:
    make, blocks = BLOCKS[name]
    model, arguments = make(2)
    expected = run(model, arguments)
    backends = {name: GraphBackend() for name in blocks}
    for name, backend in backends.items():
        model.get_submodule(name).compile(backend=backend, fullgraph=True)
    assert torch.equal(run(model, arguments), expected)
    assert {name: backend.report.counts() for name, backend in backends.items()} == blocks


# --- what is not ------------------------------------------------------------------------------------------------------


def test_of_qwen_image_only_the_norm_of_the_prompt_is_not_fused_and_has_a_reason() -> None:
    model, arguments = qwen_image(2)
    got, backend = compiled(model, arguments)
    assert torch.equal(got, run(model, arguments))
    assert backend.report.graphs == 1
    # Two adds of each stream, in each layer, but no norm reads the last two of the text. The first norm of each stream
    # has no add in front. Heads of the image and of the text, in each layer.
    expected = {"mul_add_norm_scale": 4 * 2 - 2, "norm_scale": 2, "qk_norm_rope": 2 * 2}
    assert but_matmuls(backend.report.counts()) == expected
    assert {site.module: site.reason_name for site in backend.report.missed} == {"txt_norm": "ALONE"}
    assert all(site.reason and site.source for site in backend.report.missed)


def test_flux_2_is_fused_in_its_attention_and_feed_forwards_and_computes_what_its_unfused_graph_does() -> None:
    """Its single blocks join the SwiGLU with the attention, which Inductor writes in one kernel. Its layer norms
    are not quite eager's."""
    model, arguments = flux2(2)
    got, plain, backend = compiled_with_and_without_the_pass(model, arguments)
    assert torch.equal(got, plain)
    assert but_adaln(backend.report) == {"qk_norm_cat_rope": 2, "qk_norm_rope": 2}
    assert backend.report.counts()["linear_silu_mul"] == 2 * 2


def test_controlnet_samples_between_y_and_the_next_norm_part_the_two_output_sites() -> None:
    layers = 2
    transformer, (latents, timestep, captions) = zimage.model(layers=layers, refiners=0), zimage.inputs()
    shapes: list[torch.Size] = []
    hook = transformer.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    zimage.run(transformer, (latents, timestep, captions))
    hook.remove()
    samples = {index: torch.randn(shapes[0]).bfloat16() for index in range(layers)}

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(latents, timestep, captions, controlnet_block_samples=samples, return_dict=False)[0][0]

    backend = GraphBackend()
    assert torch.equal(run(torch.compile(transformer, backend=backend)), run(transformer))
    expected = zimage.expected_counts(layers, refiners=0)
    boundaries = layers - 1
    expected["norm_tanh_mul_add_norm_scale"] -= boundaries
    expected["norm_tanh_mul_add"] += boundaries
    expected["norm_scale"] += boundaries
    assert backend.report.counts() == expected


# --- complex numbers that are traced as pairs of real ones ------------------------------------------------------------

WRAPPER = "enable_complex_wrapper"


@pytest.mark.skipif(not hasattr(functorch_config, WRAPPER), reason="this torch has no complex wrapper")
def test_with_torchs_complex_wrapper_a_block_of_z_image_has_the_same_sites_and_the_result_is_eagers() -> None:
    """The wrapper makes every rotation real, and the nodes lose the operators that they were decomposed from."""
    model = zimage.model(layers=1, refiners=0)
    arguments = dict(zip(("x", "t", "cap_feats"), zimage.inputs((12, 20)), strict=True))
    expected = run(model, arguments)
    backend = GraphBackend()
    model.layers[0].compile(backend=backend, fullgraph=True)
    with functorch_config.patch(**{WRAPPER: True}):
        assert torch.equal(run(model, arguments), expected)
    assert backend.report.counts() == BLOCK


@pytest.mark.skipif(not hasattr(functorch_config, WRAPPER), reason="this torch has no complex wrapper")
def test_with_torchs_complex_wrapper_every_site_of_lumina_2_is_fused_and_the_result_is_eagers() -> None:
    model, arguments = lumina2(layers := 1, refiners=0)
    with (
        functorch_config.patch(**{WRAPPER: True}),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False, capture_scalar_outputs=False),
    ):
        got, backend = compiled(model, arguments)
    assert torch.equal(got, run(model, arguments))
    assert backend.report.counts() == zimage.expected_counts(layers, refiners=0)
