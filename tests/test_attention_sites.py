"""q/k-norm with RoPE, and SwiGLU: the rewritten graph computes what the original did, bit by bit; and what is neither."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_modules import (
    NEVER_TURNED,
    NO_SWIGLU,
    TWO_ALONE,
    RopeModule,
    RopeSpec,
    SiluModule,
    SiluSpec,
    complex_rope,
    half_rope,
    rope_inputs,
    rope_specs,
    silu_inputs,
    silu_specs,
)
from graph_backend import run
from hypothesis import given
from hypothesis import strategies as st
from test_properties import assert_bit_equal


@given(spec=rope_specs(), dynamic=st.sampled_from((False, True)), seed=st.integers(0, 2**16))
def test_a_norm_that_is_rotated_is_bit_equal_to_eager_and_q_is_fused_with_k(spec: RopeSpec, dynamic: bool, seed: int):
    module, args = RopeModule(spec), rope_inputs(spec, seed)
    with torch.no_grad():
        expected = module(*args)
    got, backend = run(module, *args, dynamic=dynamic)
    assert_bit_equal(got, expected)
    assert [site.kind for site in backend.report.fused] == [spec.kind()], backend.report
    assert backend.report.missed == []
    (site,) = backend.report.fused
    assert (site.rounding, site.dtype, site.gate, site.scale) == (spec.form(), spec.dtype, None, None)


@given(spec=silu_specs(), dynamic=st.sampled_from((False, True)), seed=st.integers(0, 2**16))
def test_swiglu_is_bit_equal_to_eager(spec: SiluSpec, dynamic: bool, seed: int) -> None:
    module, args = SiluModule(spec), silu_inputs(spec, seed)
    expected = module(*args)
    got, backend = run(module, *args, dynamic=dynamic)
    assert_bit_equal(got, expected)
    assert [(site.kind, site.rounding, site.dtype) for site in backend.report.fused] == [
        ("silu_mul", "model", spec.dtype)
    ], backend.report


@pytest.mark.parametrize("pair", (False, True), ids=("alone", "q and k"))
@pytest.mark.parametrize("rope", (complex_rope, half_rope))
def test_fp32_rounding_keeps_everything_in_fp32_to_the_end(rope, pair: bool) -> None:
    spec = RopeSpec(rope=rope, pair=pair, table=torch.complex64 if rope is complex_rope else torch.float32)
    module, args = RopeModule(spec), rope_inputs(spec)
    _, backend = run(module, *args, rounding="fp32")
    (site,) = backend.report.fused
    assert site.rounding == "fp32"
    (graph,) = backend.graphs
    op = getattr(torch.ops.dit_kernels, site.kind).default
    (call,) = graph.graph.find_nodes(op="call_function", target=op)
    assert call.kwargs["rounding"] == "fp32"
    assert call.kwargs["out_dtype"] == torch.bfloat16
    _, backend = run(SiluModule(SiluSpec()), *silu_inputs(SiluSpec()), rounding="fp32")
    assert [site.rounding for site in backend.report.fused] == ["fp32"]


def test_an_eps_that_is_a_tensor_stays_one() -> None:
    spec = RopeSpec()
    module, args = RopeModule(spec), rope_inputs(spec)
    got, backend = run(module, *args, dynamic=True)
    assert_bit_equal(got, module(*args))
    assert backend.count(torch.ops.dit_kernels.qk_norm_rope.eps_tensor) == 1


# --- what stands in the graph afterwards ------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", (complex_rope, half_rope))
def test_no_copy_and_no_cast_is_left_between_the_projection_and_the_attention(rope) -> None:
    spec = RopeSpec(rope=rope, packed=True, table=torch.complex64 if rope is complex_rope else torch.bfloat16)
    module, args = RopeModule(spec), rope_inputs(spec)
    got, backend = run(module, *args)
    assert_bit_equal(got, module(*args))
    (graph,) = backend.graphs
    op = torch.ops.dit_kernels.qk_norm_rope.default
    (call,) = graph.graph.find_nodes(op="call_function", target=op)
    q, k = call.args[:2]
    assert (q.op, k.op) == ("placeholder", "placeholder")  # views of the projection, as the model has them
    assert not q.meta["val"].is_contiguous()
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    kinds = ("getitem", "unsqueeze", "permute", "qk_norm_rope", "scaled_dot_product")
    assert all(any(kind in name for kind in kinds) for name in calls), calls
    for result in call.meta["val"]:
        assert result.is_contiguous()
    for user in [user for item in call.users for user in item.users]:
        assert user.target is torch.ops.aten.permute.default
        assert user.meta["val"].transpose(1, 2).is_contiguous()


def test_the_inserted_node_names_the_norm_of_q() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_q, self.norm_k = torch.nn.RMSNorm(16).bfloat16(), torch.nn.RMSNorm(16).bfloat16()

        def forward(self, q, k, table, sin):
            q, k = (complex_rope(norm(x), table, sin) for norm, x in ((self.norm_q, q), (self.norm_k, k)))
            return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, k)))

    _, backend = run(torch.nn.Sequential(Wrapped(Attention())), rope_inputs(RopeSpec()))
    (site,) = backend.report.fused
    assert (site.kind, site.module) == ("qk_norm_rope", "0.inner.norm_q")
    assert "attention_modules.py:" in site.source
    assert site.module in str(backend.report)


class Wrapped(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, args):
        return self.inner(*args)


# --- what is no site --------------------------------------------------------------------------------------------------

SQUARE = RopeSpec(rope=half_rope, tokens=4, heads=4, kv_heads=4, table=torch.bfloat16)  # tokens and heads can be mixed up
REASONS = {
    "the_heads_are_turned": ["ALONE"],
    "the_table_is_for_heads": ["SHAPE"],
    "a_table_for_each_head": ["SHAPE"],
    "one_row_for_all_tokens": ["SHAPE"],
    "the_tables_differ_in_dtype": ["DTYPE"],
    "the_terms_are_rounded_otherwise_than_the_sum": ["ROUNDING"],
    "the_norm_is_read_elsewhere": ["ESCAPES"],
    "the_turned_pairs_are_read_elsewhere": ["ESCAPES"],
    "the_table_is_computed_from_the_norm": ["ESCAPES"],
    "the_mean_runs_over_two_dimensions": ["DIMENSION", "UNNORMED"],
    "the_norm_runs_over_all_heads": ["ALONE", "UNNORMED"],
    "a_layer_norm_is_turned": ["UNNORMED"],
    "nothing_is_normed": ["UNNORMED"],
    "the_result_is_computed_on": ["INLINE"],
    "the_result_is_put_into_another_tensor": ["INLINE"],
    "a_complex_table_of_other_tokens": ["SHAPE"],
}


@pytest.mark.parametrize("mutant", NEVER_TURNED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_what_is_no_rotated_norm_is_not_fused_and_its_result_is_right(mutant, dynamic: bool) -> None:
    args = rope_inputs(SQUARE)
    got, backend = run(mutant, *args, dynamic=dynamic)
    assert backend.report.fused == []
    assert [site.reason_name for site in backend.report.missed] == REASONS.get(mutant.__name__, ["ALONE"])
    assert_bit_equal(got, mutant(*args))


@pytest.mark.parametrize("mutant", TWO_ALONE, ids=lambda f: f.__name__)
def test_what_are_no_q_and_k_of_one_attention_and_rotation_are_fused_each_alone(mutant) -> None:
    args = rope_inputs(SQUARE)
    got, backend = run(mutant, *args)
    assert backend.report.counts() == {"norm_rope": 2}, backend.report
    assert_bit_equal(got, mutant(*args))


@pytest.mark.parametrize("mutant", NO_SWIGLU, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_what_is_no_swiglu_is_not_fused_and_its_result_is_right(mutant, dtype: torch.dtype) -> None:
    spec = SiluSpec(dtype=dtype, b_dtype=dtype)
    args = silu_inputs(spec)
    got, backend = run(mutant, *args)
    assert backend.report.fused == []
    assert [site.reason_name for site in backend.report.missed] == NO_SWIGLU[mutant]
    plain, _ = run(mutant, *args, fuse=False)
    assert_bit_equal(got, plain)
