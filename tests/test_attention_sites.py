"""q/k-norm with RoPE, and SwiGLU: the rewritten graph computes what the original did, bit by bit; what is neither."""

from __future__ import annotations

import warnings
from itertools import cycle
from typing import Any

import pytest
import torch
from attention_modules import (
    NEVER_TURNED,
    NO_SWIGLU,
    OTHER_AXIS,
    TWO_ALONE,
    RopeModule,
    RopeSpec,
    SiluModule,
    SiluSpec,
    a_silu_by_a_sigmoid,
    complex_rope,
    half_rope,
    rope_inputs,
    rope_specs,
    silu_inputs,
    silu_specs,
    the_product_is_computed_on,
)
from graph_backend import CASTS_ARE_KEPT, GraphBackend, needs_casts, run
from hypothesis import given, settings
from hypothesis import strategies as st
from site_modules import native_norm
from test_graph_pass import assert_computes, rewritten, traced
from test_properties import assert_bit_equal

from dit_kernels.warn import warn_once
from fusion_pass import graph_pass


def name_of(value: Any) -> str | None:
    """The id of a function or a dtype among the parameters of a test."""
    return getattr(value, "__name__", None) or (str(value) if isinstance(value, torch.dtype) else None)


@settings(max_examples=12)
@given(spec=rope_specs(), dynamic=st.sampled_from((False, False, True)), seed=st.integers(0, 2**16))
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


@settings(max_examples=10)
@given(spec=silu_specs(), dynamic=st.sampled_from((False, False, True)), seed=st.integers(0, 2**16))
def test_swiglu_is_bit_equal_to_eager(spec: SiluSpec, dynamic: bool, seed: int) -> None:
    module, args = SiluModule(spec), silu_inputs(spec, seed)
    expected = module(*args)
    got, backend = run(module, *args, dynamic=dynamic)
    assert_bit_equal(got, expected)
    assert [(site.kind, site.rounding, site.dtype) for site in backend.report.fused] == [
        ("silu_mul", "model", spec.dtype)
    ], backend.report


@pytest.mark.parametrize(("rope", "pair"), ((complex_rope, True), (half_rope, False)), ids=("q and k", "alone"))
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


def test_fp32_rounding_is_the_swiglus_too() -> None:
    _, backend = run(SiluModule(SiluSpec()), *silu_inputs(SiluSpec()), rounding="fp32")
    assert [site.rounding for site in backend.report.fused] == ["fp32"]


def test_an_eps_that_is_a_tensor_stays_one() -> None:
    spec = RopeSpec()
    module, args = RopeModule(spec), rope_inputs(spec)
    got, backend = run(module, *args, dynamic=True)
    assert_bit_equal(got, module(*args))
    assert backend.count(torch.ops.dit_kernels.qk_norm_rope.eps_tensor) == 1


# --- what stands in the graph afterwards ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "swapped"),
    ((complex_rope, "behind"), (half_rope, "behind"), (complex_rope, "before"), (half_rope, "between")),
)
def test_no_copy_and_no_cast_is_left_between_the_projection_and_the_attention(rope, swapped: str) -> None:
    table = torch.complex64 if rope is complex_rope else torch.bfloat16
    spec = RopeSpec(rope=rope, packed=True, table=table, swapped=swapped)
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


@needs_casts
def test_the_inserted_node_names_the_norm_of_q() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_q, self.norm_k = torch.nn.RMSNorm(16).bfloat16(), torch.nn.RMSNorm(16).bfloat16()

        def forward(self, q, k, table, sin):
            q, k = (complex_rope(norm(x), table.unsqueeze(2), sin) for norm, x in ((self.norm_q, q), (self.norm_k, k)))
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


def test_slices_instead_of_split_make_no_difference() -> None:
    """From torch 2.14 on, chunk arrives as slices."""

    def function(packed, weight):
        a, b = (torch.ops.aten.slice.Tensor(packed, 2, start, start + 8) for start in (0, 8))
        s = a / (torch.exp(-a) + 1)
        return torch.ops.aten.mm.default((s * b).reshape(6, 8), weight)

    args = [torch.randn(2, 3, 16), torch.randn(8, 8)]
    graph = traced(function, *args)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default):
        node.meta["original_aten"] = torch.ops.aten.silu.default
    assert rewritten(graph).counts() == {"silu_mul": 1}
    assert_computes(graph, lambda packed, weight: _swiglu(*packed.chunk(2, -1)).reshape(6, 8) @ weight, args)


def _swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


@pytest.mark.parametrize("swapped", ("behind", "before"))
def test_what_reads_q_before_k_is_there_is_moved_behind_the_op(swapped: str) -> None:
    module = RopeModule(RopeSpec(swapped=swapped))

    def model(q, k, table, sin, w):
        table = table.unsqueeze(2 if swapped == "behind" else 1)
        q = module.rotated(q, module.q_weight, table, sin)
        early = q @ w
        k = module.rotated(k, module.k_weight, table, sin)
        return early, torch.nn.functional.scaled_dot_product_attention(q, k, k)

    args = (*rope_inputs(RopeSpec()), torch.randn(16, 2).bfloat16())
    got, backend = run(model, *args)
    assert_bit_equal(got, model(*args))
    assert backend.report.counts() == {"qk_norm_rope": 1}


@pytest.mark.parametrize("changed", ("the table", "something else"))
def test_a_mutation_between_q_and_k_leaves_each_alone(changed: str) -> None:
    """k reads the table that was changed; where it is another tensor, the two could still not stand in one place."""

    def function(q, k, cos, sin, other):
        q = half_rope(_norm(q), cos.unsqueeze(2), sin.unsqueeze(2))
        (cos if changed == "the table" else other).mul_(2)
        k = half_rope(_norm(k), cos.unsqueeze(2), sin.unsqueeze(2))
        return torch.ops.aten.bmm.default(q.reshape(-1, 4, 16), k.reshape(-1, 16, 4)), other

    spec = RopeSpec(rope=half_rope, table=torch.float32, dtype=torch.float32, heads=4, kv_heads=4)
    args = [*rope_inputs(spec), torch.randn(3)]
    graph = traced(function, *args)
    assert rewritten(graph).counts() == {"norm_rope": 2}
    assert_computes(graph, function, args)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def test_a_mutation_inside_a_rotated_norm_keeps_it_from_being_fused() -> None:
    def function(q, cos, sin, other):
        n = _norm(q)
        other.mul_(2)
        return torch.ops.aten.bmm.default(half_rope(n, cos.unsqueeze(2), sin.unsqueeze(2)).reshape(-1, 4, 16), other)

    q, _, cos, sin = rope_inputs(RopeSpec(rope=half_rope, table=torch.float32, dtype=torch.float32, heads=4))
    args = [q, cos, sin, torch.randn(12, 16, 2)]
    graph = traced(function, *args)
    assert [site.reason_name for site in rewritten(graph).missed] == ["MUTATION"]
    assert_computes(graph, function, args)


def test_a_conjugate_table_is_left_alone() -> None:
    """What reads it by its address would read what it is a view of."""

    def function(q, table):
        pairs = torch.view_as_complex(_norm(q).reshape(*q.shape[:-1], -1, 2))
        rotated = torch.view_as_real(pairs * table.conj().unsqueeze(2)).reshape(q.shape)
        return torch.ops.aten.bmm.default(rotated.reshape(-1, 3, 16), q.reshape(-1, 16, 3))

    q, _, table, _ = rope_inputs(RopeSpec(dtype=torch.float32))
    graph = traced(function, q, table)
    (copy,) = graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)  # PyTorch makes it plain
    copy.replace_all_uses_with(copy.args[0])
    graph.erase_node(copy)
    assert rewritten(graph).fused == []
    assert_computes(graph, function, [q, table])


# --- what is no site --------------------------------------------------------------------------------------------------

SQUARE = RopeSpec(rope=half_rope, tokens=4, heads=4, kv_heads=4, table=torch.bfloat16)  # axes that can be mixed up
REASONS = {
    "the_heads_are_turned": ["ALONE"],
    "a_table_for_each_head": ["HEADS"],
    "one_row_for_all_tokens": ["HEADS"],
    "the_tables_differ_in_dtype": ["DTYPE"],
    "the_terms_are_rounded_otherwise_than_the_sum": ["ROUNDING"],
    "the_rotation_is_on_the_left": ["ROUNDING"],
    "the_norm_is_read_elsewhere": ["ESCAPES"],
    "the_turned_pairs_are_read_elsewhere": ["ESCAPES"],
    "the_table_is_computed_from_the_norm": ["ESCAPES"],
    "the_mean_runs_over_two_dimensions": ["DIMENSION", "UNNORMED"],
    "a_layer_norm_is_turned": ["UNNORMED"],
    "nothing_is_normed": ["UNNORMED"],
    "the_result_is_computed_on": ["INLINE"],
    "the_result_is_put_into_another_tensor": ["INLINE"],
}
# Their norm is cast back to 16 bits and up again.
WITH_A_CAST_BACK = (
    "the_tables_differ_in_dtype",
    "complex_numbers_are_divided",
    "complex_halves",
    "the_rotation_is_on_the_left",
    "a_complex_table_for_the_other_axis",
)


@pytest.mark.parametrize(("mutant", "dynamic"), zip(NEVER_TURNED, cycle((False, True))), ids=name_of)
def test_what_is_no_rotated_norm_is_not_fused_and_its_result_is_right(mutant, dynamic: bool) -> None:
    if mutant.__name__ in WITH_A_CAST_BACK and not CASTS_ARE_KEPT:
        pytest.skip("torch 2.11's own passes drop a cast of this model")
    args = rope_inputs(SQUARE)
    got, backend = run(mutant, *args, dynamic=dynamic)
    assert backend.report.fused == []
    assert [site.reason_name for site in backend.report.missed] == REASONS.get(mutant.__name__, ["ALONE"])
    assert_bit_equal(got, mutant(*args))


@pytest.mark.parametrize("function", OTHER_AXIS, ids=lambda f: f.__name__)
def test_of_as_many_tokens_as_heads_the_table_says_which_is_which(function) -> None:
    if function.__name__ in WITH_A_CAST_BACK and not CASTS_ARE_KEPT:
        pytest.skip("torch 2.11's own passes drop a cast of this model")
    args = rope_inputs(SQUARE)
    got, backend = run(function, *args)
    assert backend.report.counts() == {"norm_rope": 1}
    assert_bit_equal(got, function(*args))


@pytest.mark.parametrize("mutant", TWO_ALONE, ids=lambda f: f.__name__)
def test_what_are_no_q_and_k_of_one_attention_and_rotation_are_fused_each_alone(mutant) -> None:
    args = rope_inputs(SQUARE)
    got, backend = run(mutant, *args)
    assert backend.report.counts() == {"norm_rope": 2}, backend.report
    assert_bit_equal(got, mutant(*args))


def rounded_and_cast_up(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack((a.bfloat16(), b.bfloat16()), -1).flatten(-2).float()


def one_of_a_pair_is_rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack((a.bfloat16(), b), -1).flatten(-2)


def rounded_in_two_ways(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack((a.bfloat16(), b.half()), -1).flatten(-2)


def rounded_twice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack((a.half(), b.half()), -1).flatten(-2).bfloat16()


@pytest.mark.parametrize(
    ("joined", "dtype"),
    (
        *((f, torch.bfloat16) for f in (rounded_and_cast_up, one_of_a_pair_is_rounded, rounded_twice)),
        (rounded_in_two_ways, torch.float32),
    ),
    ids=name_of,
)
def test_a_rounding_before_a_pair_is_put_together_is_kept(joined, dtype: torch.dtype) -> None:
    def rotated(x, cos, sin):
        a, b = _norm(x).float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[..., ::2].unsqueeze(2), sin[..., ::2].unsqueeze(2)
        return joined(a * cos - b * sin, a * sin + b * cos)

    def model(q, k, cos, sin):
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        return torch.einsum("bshd,bthd->bhst", q, k), q @ q.mT

    args = rope_inputs(RopeSpec(rope=half_rope, dtype=dtype, table=torch.float32, heads=2, kv_heads=2))
    got, _ = run(model, *args)
    plain, _ = run(model, *args, fuse=False)
    assert_bit_equal(got, plain)


@pytest.mark.parametrize("dtype", (torch.float8_e5m2, torch.int32, torch.complex64), ids=str)
def test_a_swiglu_that_is_cast_to_what_no_op_gives_harms_no_other_site(dtype: torch.dtype) -> None:
    def model(a, b, x, scale):
        return (torch.nn.functional.silu(a) * b).to(dtype), (_norm(x) * (1 + scale)) @ x.mT

    args = (*silu_inputs(SiluSpec(dtype=torch.float32, b_dtype=torch.float32)), torch.randn(2, 3, 16), torch.randn(16))
    got, backend = run(model, *args, strict=True)
    assert_bit_equal(got[1], model(*args)[1])
    assert backend.report.counts() == {"norm_scale": 1}


def test_halves_of_a_width_that_is_not_static_are_no_error() -> None:
    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1).sin()

    x = torch.randn(4, 16)
    torch._dynamo.mark_dynamic(x, 1)
    got, backend = run(turned, x, strict=True)
    assert_bit_equal(got, turned(x))
    assert backend.report.missed == []


def test_looking_for_pairs_adds_no_guard() -> None:
    """A dimension that might be 2 is not asked whether it is."""

    def model(x, pair):
        x = x.reshape(3, -1, pair.shape[0])
        return torch.cat((-x[..., 1], x[..., 0]), -1).sin()

    def compiled(fuse: bool) -> int:
        torch._dynamo.reset()
        backend = GraphBackend(fuse=fuse)
        function = torch.compile(model, backend=backend, dynamic=True)
        for pairs in (2, 3, 4):
            args = (torch.randn(3, 12), torch.randn(pairs))
            assert_bit_equal(function(*args), model(*args))
        return len(backend.graphs)

    assert compiled(fuse=True) == compiled(fuse=False)


@pytest.mark.parametrize(("kv_heads", "kinds"), ((4, ["qk_norm_rope"]), (2, ["norm_rope", "norm_rope"])))
def test_q_and_k_are_fused_together_where_their_number_of_heads_is_a_symbol_and_known_to_be_the_same(
    kv_heads: int, kinds: list[str]
) -> None:
    def turned(x, table):
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        pairs = torch.view_as_complex(n.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).transpose(1, 2)

    def model(q, k, table):
        q, k = turned(q, table), turned(k, table)
        return q @ k.repeat_interleave(4 // kv_heads, 1).transpose(-1, -2)

    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 6, kv_heads, 8)
    angle = torch.randn(6, 1, 4)
    table = torch.polar(torch.ones_like(angle), angle)
    for t in (q, k, table):
        torch._dynamo.mark_static(t, t.ndim - 1)
    got, backend = run(model, q, k, table, dynamic=True)
    torch.testing.assert_close(got, model(q, k, table))
    assert [site.kind for site in backend.report.fused] == kinds


def test_tables_that_are_computed_alike_in_many_steps_are_compared_once() -> None:
    """Without a memory of what was compared already, each step would double the work."""

    def table(cos):
        for _ in range(40):
            cos = cos * cos
        return cos.unsqueeze(2)

    def model(q, k, cos, sin):
        q, k = (half_rope(_norm(x), table(cos), table(sin)) for x in (q, k))
        return torch.einsum("bshd,bthd->bhst", q, k)

    args = rope_inputs(RopeSpec(rope=half_rope, dtype=torch.float32, table=torch.float32, heads=2, kv_heads=2))
    got, backend = run(model, *args)
    assert_bit_equal(got, model(*args))
    assert backend.report.counts() == {"qk_norm_rope": 1}


@pytest.mark.parametrize(("dtype", "dynamic"), ((torch.bfloat16, True), (torch.float32, False)), ids=("bf16", "fp32"))
def test_a_norm_of_one_plus_a_weight_is_fused_with_its_rotation(dtype: torch.dtype, dynamic: bool) -> None:
    """As Gemma and Krea write it: the weight is learned as its distance from 1."""

    def normed(x, weight):
        n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (n * (1 + weight.float())).to(x.dtype)

    def model(q, k, cos, sin, weight):
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        q, k = (half_rope(normed(x, weight), cos, sin) for x in (q, k))
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)))

    spec = RopeSpec(rope=half_rope, dtype=dtype, table=dtype, heads=2, kv_heads=2)
    args = (*rope_inputs(spec), torch.randn(spec.width).to(dtype))
    got, backend = run(model, *args, dynamic=dynamic)
    assert backend.report.counts() == {"qk_norm_rope": 1}, backend.report
    assert_bit_equal(got, run(model, *args, dynamic=dynamic, fuse=False)[0])


def norms_of_rows(x: torch.Tensor) -> torch.Tensor:
    return _norm(x.reshape(-1, x.shape[-1])).view(x.shape)


def norms_of_tokens(x: torch.Tensor) -> torch.Tensor:
    return _norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(
    ("normed", "heads_first", "dynamic", "dtype"),
    (
        (norms_of_rows, False, True, torch.float32),
        (norms_of_rows, True, False, torch.bfloat16),
        (norms_of_tokens, False, False, torch.bfloat16),
        (norms_of_tokens, True, True, torch.float32),
    ),
)
def test_a_norm_of_rows_is_fused_with_the_rotation_of_the_heads_that_they_are(
    normed, heads_first: bool, dynamic: bool, dtype: torch.dtype
) -> None:
    """As SGLang writes it: the norm sees [B * S * H, Dh], the rotation [B, S, H, Dh], or with heads first."""

    def rotated(x, cos, sin):
        x = normed(x)
        if not heads_first:
            return half_rope(x, cos.unsqueeze(2), sin.unsqueeze(2)).transpose(1, 2)
        return half_rope(x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))

    def model(q, k, cos, sin):
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    args = rope_inputs(RopeSpec(rope=half_rope, dtype=dtype, table=dtype, heads=2, kv_heads=2, packed=True))
    got, backend = run(model, *args, dynamic=dynamic)
    assert backend.report.counts() == {"qk_norm_rope": 1}, backend.report
    assert_bit_equal(got, run(model, *args, dynamic=dynamic, fuse=False)[0])


def test_a_norm_of_rows_that_lie_apart_is_not_fused_with_the_rotation_of_other_shapes() -> None:
    """A view of them would be a copy, which a CPU sums in another order."""

    def model(x, cos, sin):
        q = _norm(x.permute(1, 2, 3, 4, 0)).flatten(2, 3)
        return half_rope(q, cos, sin) @ torch.ones(500, 4)

    x, cos, sin = torch.randn(500, 2, 64, 1, 3), torch.randn(1, 64, 1, 500), torch.randn(1, 64, 1, 500)
    got, _ = run(model, x, cos, sin)
    assert_bit_equal(got, run(model, x, cos, sin, fuse=False)[0])


@pytest.mark.parametrize("rope", (half_rope, complex_rope))
@pytest.mark.parametrize("heads_first", (False, True), ids=("tokens first", "heads first"))
def test_a_rotation_in_fp32_whose_heads_are_swapped_before_it_is_cast_down_is_fused(rope, heads_first: bool) -> None:
    """As autocast makes it of an fp32 norm and rotation in front of an attention in 16 bits."""

    def model(q, k, cos, sin):
        if heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        dim = 1 if heads_first else 2
        q, k = (rope(_norm(x), cos.unsqueeze(dim), sin.unsqueeze(dim)).transpose(1, 2).bfloat16() for x in (q, k))
        if heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    table = torch.complex64 if rope is complex_rope else torch.float32
    args = rope_inputs(RopeSpec(rope=rope, dtype=torch.float32, table=table, heads=2, kv_heads=2))
    got, backend = run(model, *args)
    assert backend.report.counts() == {"qk_norm_rope": 1}, backend.report
    assert_bit_equal(got, run(model, *args, fuse=False)[0])
    (call,) = backend.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.dit_kernels.qk_norm_rope.default)
    assert call.kwargs["out_dtype"] == torch.bfloat16  # nothing is cast behind it


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_norm_of_heads_first_all_in_16_bits_is_left_alone_where_the_order_of_its_sums_is_eagers(dtype) -> None:
    """In 16 bits a CPU adds otherwise with the order of the rows. A kernel adds in an order of its own anyway."""
    spec = RopeSpec(norm=native_norm, weight=None, dtype=dtype, table=dtype, rope=half_rope, swapped="before", width=12)
    args, module = rope_inputs(spec), RopeModule(spec)
    got, backend = run(module, *args)
    assert torch.equal(got, module(*args))
    assert backend.report.fused == []
    assert {site.reason_name for site in backend.report.missed} == {"LAYOUT"}


def copied_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), None, 1e-6)


def norm_with_the_root_first(x: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x


@pytest.mark.parametrize(
    ("norm", "turned_first", "width"),
    (
        (copied_norm, False, 8),
        (copied_norm, True, 64),
        (norm_with_the_root_first, True, 8),
        (norm_with_the_root_first, False, 64),
    ),
)
def test_a_complex_product_that_lies_otherwise_than_what_is_normed_is_left_alone_where_that_shows(
    norm, turned_first: bool, width: int
) -> None:
    """A CPU rounds it otherwise in its vectors of numbers than behind them, and takes rows together by their layout."""

    def model(x, table):
        n, table = norm(x.transpose(1, 2)), table.transpose(1, 2) if turned_first else table
        pairs = torch.view_as_complex(n.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).sort(-1)[0]

    torch.manual_seed(0)
    angle = torch.randn(1, 6, 1, width // 2)
    x = torch.randn(2, *((6, 4) if turned_first else (4, 6)), width)  # so that the norm is of rows that lie apart
    table = torch.polar(torch.ones_like(angle), angle)
    got, backend = run(model, x, table)
    assert torch.equal(got, model(x, table))
    fused = width == 64
    assert [site.kind for site in backend.report.fused] == ["norm_rope"] * fused
    assert [site.reason_name for site in backend.report.missed] == ["LAYOUT"] * (not fused)


@needs_casts
def test_a_silu_that_is_cast_up_to_the_other_factor_is_fused() -> None:
    def model(a, b):
        return (torch.nn.functional.silu(a).float() * b) @ torch.ones(a.shape[-1], 2)

    args = silu_inputs(SiluSpec(dtype=torch.bfloat16, b_dtype=torch.float32))
    got, backend = run(model, *args)
    assert_bit_equal(got, model(*args))
    assert backend.report.counts() == {"silu_mul": 1}


def test_a_factor_that_was_cast_up_in_another_shape_is_read_in_its_own() -> None:
    def model(a, b):
        return (torch.nn.functional.silu(a.float()) * b.flatten(0, 1).float().reshape(a.shape)) @ torch.ones(16, 2)

    args = silu_inputs(SiluSpec())
    got, backend = run(model, *args)
    assert backend.report.counts() == {"silu_mul": 1}
    assert_bit_equal(got, model(*args))


@pytest.mark.parametrize(("mutant", "dtype"), zip(NO_SWIGLU, cycle((torch.bfloat16, torch.float32))), ids=name_of)
def test_what_is_no_swiglu_is_not_fused_and_its_result_is_right(mutant, dtype: torch.dtype) -> None:
    spec = SiluSpec(dtype=dtype, b_dtype=dtype)
    args = silu_inputs(spec)
    got, backend = run(mutant, *args)
    assert backend.report.fused == []
    assert [site.reason_name for site in backend.report.missed] == NO_SWIGLU[mutant]
    plain, _ = run(mutant, *args, fuse=False)
    assert_bit_equal(got, plain)


def test_in_a_training_graph_nothing_is_fused_and_the_gradients_are_eagers() -> None:
    spec = RopeSpec(rope=half_rope, dtype=torch.float32, weight=torch.float32, table=torch.float32)
    module, args = RopeModule(spec), rope_inputs(spec)
    module(*args).sum().backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    backend = GraphBackend()
    torch.compile(module, backend=backend)(*args).sum().backward()
    assert backend.report.fused == []
    assert {site.reason_name for site in backend.report.missed if site.kind == "norm"} == {"TRAINING"}
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_site_that_is_left_to_inductor_is_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fusion_pass")
        for mutant in (the_product_is_computed_on, a_silu_by_a_sigmoid):
            _, backend = run(mutant, *silu_inputs(SiluSpec()), strict=True)
            assert [site.kind for site in backend.report.missed] == ["silu_mul"]


def test_in_a_training_graph_a_rotation_is_told_of_with_its_norm_alone() -> None:
    module, args = RopeModule(RopeSpec()).train(), rope_inputs(RopeSpec())
    backend = GraphBackend()
    torch._dynamo.reset()
    torch.compile(module, backend=backend)(*args).sum().backward()
    assert [(site.kind, site.reason_name) for site in backend.report.missed] == [("norm", "TRAINING")] * 2


def test_gates_of_which_none_is_fused_are_warned_of_where_the_attention_is_fused() -> None:
    module, args = RopeModule(RopeSpec()), rope_inputs(RopeSpec())

    def model(q, k, table, sin):
        y = module(q, k, table, sin)
        return y + q.transpose(1, 2).tanh() * (torch.nn.functional.rms_norm(y, y.shape[-1:]) - 1)

    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="norms and gates, and nothing of it was fused"):
        _, backend = run(model, *args)
    assert backend.report.counts() == {"qk_norm_rope": 1}


def test_a_swiglu_of_what_inductor_computes_on_the_way_is_left_to_it(monkeypatch) -> None:
    """A LoRA beside the projection: the op would have to read the sum, which nobody else needs."""

    def model(x, up, gate, lora):
        return torch.nn.functional.silu(x @ gate + (x @ lora) @ lora.mT) * (x @ up) @ up.mT

    monkeypatch.setattr(graph_pass.eligibility, "kernels_missing", lambda device: None)
    args = [torch.randn(shape).bfloat16() for shape in ((2, 3, 8), (8, 8), (8, 8), (8, 2))]
    _, backend = run(model, *args, kernels="auto")
    assert [site.reason_name for site in backend.report.missed] == ["PER_TOKEN"]


@pytest.mark.parametrize(("width", "kinds"), ((16, ["qk_norm_rope"]), (12, [])))
def test_what_no_kernel_takes_is_left_to_inductor(width: int, kinds: list[str], monkeypatch) -> None:
    monkeypatch.setattr(graph_pass.eligibility, "kernels_missing", lambda device: None)
    spec = RopeSpec(width=width)
    _, backend = run(RopeModule(spec), *rope_inputs(spec), kernels="auto")
    assert [site.kind for site in backend.report.fused] == kinds
    assert [site.reason_name for site in backend.report.missed] == ([] if kinds else ["UNFIT", "UNFIT"])
