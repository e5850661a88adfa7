"""Z-Image through the pass: counts as functions of the layers, results equal to eager's."""

from __future__ import annotations

import logging

import pytest
import torch
import zimage
from graph_backend import GraphBackend
from torch._inductor.utils import fresh_cache

import fusion_pass

BATCHES = {"one": (12,), "two equal captions": (12, 12), "two unequal captions": (12, 40)}


def compiled(transformer: torch.nn.Module, args: tuple, **options) -> tuple[torch.Tensor, GraphBackend]:
    zimage.run(transformer, args)  # builds the rope cache, so that the model is one graph
    backend = GraphBackend()
    return zimage.run(torch.compile(transformer, backend=backend, **options), args), backend


@pytest.mark.parametrize("captions", BATCHES.values(), ids=BATCHES)
def test_the_whole_model_is_bit_equal_to_eager_and_every_site_is_fused(captions) -> None:
    transformer, args = zimage.model(layers=1), zimage.inputs(captions)
    got, backend = compiled(transformer, args, fullgraph=True)
    assert torch.equal(got, zimage.run(transformer, args))
    assert backend.report.counts() == zimage.expected_counts(layers=1)
    assert all(site.gate in ("tanh", None) and site.scale in ("one_plus", None) for site in backend.report.fused)
    assert all(site.rounding == "cast_then_weight" for site in backend.report.fused if site.kind != "silu_mul")


@pytest.mark.parametrize(("layers", "refiners"), ((3, 0), (1, 2)))
def test_the_counts_follow_the_number_of_layers(layers: int, refiners: int) -> None:
    _, backend = compiled(zimage.model(layers=layers, refiners=refiners), zimage.inputs())
    assert backend.report.counts() == zimage.expected_counts(layers, refiners)


def test_an_fp32_model_is_fused_and_differs_from_its_own_unfused_graph_by_the_noise_of_one_layer_norm() -> None:
    """Its last norm is F.layer_norm again, to which PyTorch's decomposition of it is not bit-equal."""
    transformer, args = zimage.model(torch.float32, 1, 0), zimage.inputs(dtype=torch.float32)
    got, backend = compiled(transformer, args)
    torch._dynamo.reset()
    plain = zimage.run(torch.compile(transformer, backend=GraphBackend(fuse=False)), args)
    assert (got - plain).norm() <= 5e-7 * plain.norm()
    assert backend.report.counts() == zimage.expected_counts(1, 0)


def test_autocast_over_fp32_weights_is_fused_with_its_fp32_residual_stream() -> None:
    transformer, args = zimage.model(torch.float32, 1, 0), zimage.inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, backend = compiled(transformer, args)
        assert torch.equal(got, zimage.run(transformer, args))
    assert backend.report.counts() == zimage.expected_counts(1, 0)


def test_dynamic_shapes_take_eps_as_a_tensor_and_fuse_the_same_sites() -> None:
    transformer, args = zimage.model(layers=1, refiners=0), zimage.inputs()
    got, backend = compiled(transformer, args, dynamic=True)
    assert torch.equal(got, zimage.run(transformer, args))
    assert backend.report.counts() == zimage.expected_counts(layers=1, refiners=0)
    op = torch.ops.dit_kernels.norm_tanh_mul_add_norm_scale
    assert backend.count(op.eps_tensor) == backend.report.counts()["norm_tanh_mul_add_norm_scale"]
    assert any(isinstance(size, str) for site in backend.report.fused for size in site.shape)


def test_a_second_prompt_length_runs_on_one_dynamic_graph() -> None:
    transformer = zimage.model(layers=1, refiners=0)
    zimage.run(transformer, zimage.inputs())
    backend = GraphBackend()
    fused = torch.compile(transformer, backend=backend)
    for captions in ((12,), (40,), (70,)):
        args = zimage.inputs(captions)
        assert torch.equal(zimage.run(fused, args), zimage.run(transformer, args))
    assert backend.report.graphs == 2  # static, then dynamic
    assert backend.report.counts() == {k: 2 * n for k, n in zimage.expected_counts(layers=1, refiners=0).items()}


def test_regional_compilation_fuses_all_sites_of_a_block_and_one_add_with_the_norm_behind_it() -> None:
    transformer, args = zimage.model(), zimage.inputs()
    expected = zimage.run(transformer, args)
    backend = GraphBackend()
    transformer.compile_repeated_blocks(backend=backend)
    assert torch.equal(zimage.run(transformer, args), expected)
    counts = backend.report.counts()
    blocks = counts["norm_scale"]
    ungated = backend.report.graphs - blocks  # the context refiner's blocks have no gates and no scales
    assert ungated > 0
    assert counts == {
        "norm_scale": blocks,
        "norm_tanh_mul_add": blocks + ungated,
        "norm_tanh_mul_add_norm_scale": blocks + ungated,
        "qk_norm_rope": blocks + ungated,
        "silu_mul": blocks + ungated,
    }


def test_explain_tells_what_was_missed_and_where() -> None:
    transformer, args = zimage.model(layers=1), zimage.inputs()
    zimage.run(transformer, args)
    report = fusion_pass.explain(
        transformer, *args, backend=fusion_pass.Backend(kernels="reference"), return_dict=False
    )
    assert report.counts() == zimage.expected_counts(layers=1)
    assert report.graphs == 1
    fused = {site.module: site for site in report.fused}
    assert fused["layers.0.attention_norm2"].kind == "norm_tanh_mul_add_norm_scale"
    assert "transformer_z_image.py:" in fused["layers.0.attention_norm2"].source
    caption = fused["context_refiner.0.attention_norm2"]
    assert (caption.kind, caption.gate, caption.scale) == ("norm_tanh_mul_add_norm_scale", None, None)
    missed = {site.module: site for site in report.missed}
    assert fused["layers.0.attention.norm_q"].kind == "qk_norm_rope"
    assert fused["layers.0.feed_forward"].kind == "silu_mul"
    assert "layers.0.attention.norm_k" not in missed
    assert missed["context_refiner.0.attention_norm1"].reason_name == "ALONE"
    final = fused["all_final_layer.2-1.norm_final"]  # a LayerNorm
    assert (final.kind, final.scale) == ("norm_scale", "one_plus")
    assert all(site.source and site.reason for site in report.missed)
    assert "layers.0.attention_norm2" in str(report)


def test_a_real_inductor_compilation_is_as_near_to_eager_as_plain_inductor(caplog) -> None:
    transformer, args = zimage.model(layers=1, refiners=0), zimage.inputs()
    eager = zimage.run(transformer, args)
    with fresh_cache(), caplog.at_level(logging.INFO, logger="fusion_pass"):
        backend = fusion_pass.Backend(kernels="reference")
        fused = zimage.run(torch.compile(transformer, backend=backend, fullgraph=True), args)
    assert any("fused 6" in record.getMessage() for record in caplog.records)
    torch._dynamo.reset()
    plain = zimage.run(torch.compile(transformer), args)
    distance, bound = ((out - eager).float().norm() / eager.float().norm() for out in (fused, plain))
    assert distance <= 1.2 * bound
