"""Z-Image through the pass: counts as functions of the layers, results equal to eager's."""

from __future__ import annotations

import pytest
import torch
import zimage
from graph_backend import BackendOfBoth, GraphBackend
from long import only_long

import fusion_pass

# The counts of a model with two refiner layers are those that `explain` tells, below.
BATCHES = {  # the lengths of the captions, and the numbers of layers and of refiner layers
    "one caption": ((12,), 2, 0),
    "two equal captions": pytest.param((12, 12), 1, 0, marks=only_long),
    "two unequal captions": ((12, 40), 1, 1),
}


def compiled(transformer: torch.nn.Module, args: tuple, **options) -> tuple[torch.Tensor, GraphBackend]:
    zimage.run(transformer, args)  # builds the rope cache, so that the model is one graph
    backend = GraphBackend()
    return zimage.run(torch.compile(transformer, backend=backend, **options), args), backend


@pytest.mark.parametrize(("captions", "layers", "refiners"), BATCHES.values(), ids=BATCHES)
def test_the_whole_model_is_bit_equal_to_eager_and_every_site_is_fused(captions, layers: int, refiners: int) -> None:
    transformer, args = zimage.model(layers=layers, refiners=refiners), zimage.inputs(captions)
    got, backend = compiled(transformer, args, fullgraph=True)
    assert torch.equal(got, zimage.run(transformer, args))
    assert backend.report.counts() == zimage.expected_counts(layers, refiners)
    assert all(site.gate in ("tanh", None) and site.scale in ("one_plus", None) for site in backend.report.fused)
    assert all(site.rounding == "cast_then_weight" for site in backend.report.fused if site.kind != "linear_silu_mul")


def test_an_fp32_model_is_fused_and_differs_from_its_own_unfused_graph_by_the_noise_of_one_layer_norm() -> None:
    """Its last norm is F.layer_norm again, to which PyTorch's decomposition of it is not bit-equal."""
    transformer, args = zimage.model(torch.float32, 1, 0), zimage.inputs(dtype=torch.float32)
    zimage.run(transformer, args)  # builds the rope cache
    backend = BackendOfBoth()
    both = torch.compile(transformer, backend=backend)
    got = zimage.run(both, args)
    backend.runs_fused = False
    plain = zimage.run(both, args)
    assert (got - plain).norm() <= 5e-7 * plain.norm()
    assert backend.report.counts() == zimage.expected_counts(1, 0)


def test_autocast_over_fp32_weights_is_fused_with_its_fp32_residual_stream() -> None:
    transformer, args = zimage.model(torch.float32, 1, 0), zimage.inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, backend = compiled(transformer, args)
        assert torch.equal(got, zimage.run(transformer, args))
    assert backend.report.counts() == zimage.expected_counts(1, 0)


def test_with_dynamic_shapes_one_graph_serves_all_prompts_takes_eps_as_a_tensor_and_has_the_same_sites() -> None:
    """To save time, the size of the image is static."""
    transformer = zimage.model(layers=1, refiners=0)
    zimage.run(transformer, zimage.inputs())
    backend = GraphBackend()
    fused = torch.compile(transformer, backend=backend, dynamic=True)
    for captions in ((12,), (40,), (70,)):
        args = zimage.inputs(captions)
        torch._dynamo.mark_static(args[0][0])
        assert torch.equal(zimage.run(fused, args), zimage.run(transformer, args))
    assert backend.report.graphs == 1
    assert backend.report.counts() == zimage.expected_counts(layers=1, refiners=0)
    op = torch.ops.dit_kernels.norm_tanh_mul_add_norm_scale
    assert backend.count(op.eps_tensor) == backend.report.counts()["norm_tanh_mul_add_norm_scale"]
    assert any(isinstance(size, str) for site in backend.report.fused for size in site.shape)


def test_a_block_compiled_alone_has_its_sites_and_as_many_graphs_for_other_sizes_as_without_the_pass() -> None:
    transformer = zimage.model(layers=1, refiners=0)
    calls = [zimage.inputs((prompt,), size) for size, prompt in ((8, 12), (8, 40), (16, 70))]
    expected = [zimage.run(transformer, args) for args in calls]
    backends = {fuse: GraphBackend(fuse=fuse) for fuse in (True, False)}
    for backend in backends.values():
        torch._dynamo.reset()
        transformer.compile_repeated_blocks(backend=backend)
        assert all(torch.equal(zimage.run(transformer, args), y) for args, y in zip(calls, expected, strict=True))
    graphs = len(backends[True].graphs)
    assert graphs == len(backends[False].graphs) == 2  # static, then dynamic
    assert not backends[False].report.fused
    of_a_block = ("norm_scale", "norm_tanh_mul_add", "norm_tanh_mul_add_norm_scale", "qk_norm_rope", "linear_silu_mul")
    assert backends[True].report.counts() == dict.fromkeys(of_a_block, graphs)


def test_explain_tells_what_was_missed_and_where() -> None:
    transformer, args = zimage.model(layers=1, refiners=2), zimage.inputs()
    zimage.run(transformer, args)
    report = fusion_pass.explain(
        transformer, *args, backend=fusion_pass.Backend(kernels="reference"), return_dict=False
    )
    assert report.counts() == zimage.expected_counts(layers=1, refiners=2)
    assert report.graphs == 1
    fused = {site.module: site for site in report.fused}
    assert fused["layers.0.attention_norm2"].kind == "norm_tanh_mul_add_norm_scale"
    assert "transformer_z_image.py:" in fused["layers.0.attention_norm2"].source
    caption = fused["context_refiner.0.attention_norm2"]
    assert (caption.kind, caption.gate, caption.scale) == ("norm_tanh_mul_add_norm_scale", None, None)
    missed = {site.module: site for site in report.missed}
    assert fused["layers.0.attention.norm_q"].kind == "qk_norm_rope"
    assert fused["layers.0.feed_forward"].kind == "linear_silu_mul"
    assert "layers.0.attention.norm_k" not in missed
    assert missed["context_refiner.0.attention_norm1"].reason_name == "ALONE"
    final = fused["all_final_layer.2-1.norm_final"]  # a LayerNorm
    assert (final.kind, final.scale) == ("norm_scale", "one_plus")
    assert all(site.source and site.reason for site in report.missed)
    assert "layers.0.attention_norm2" in str(report)
