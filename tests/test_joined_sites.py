"""q and k of two streams, normed, joined and rotated: the rewritten graph computes what the original did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_modules import COMPLEX, RopeModule, RopeSpec, half_rope, neighbours_rope, rope_inputs, rope_specs
from graph_backend import needs_casts, run
from hypothesis import given, settings
from hypothesis import strategies as st
from site_modules import EPS, diffusers_norm, llama_norm, torch_norm
from test_lowering import is_direct
from test_properties import assert_bit_equal
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

from fusion_pass import Backend

KIND = "qk_norm_cat_rope"
TEXT = 2  # tokens, which come first
VECTOR = 16
B, S, H, D = 2, 6, 3, 16


class JoinedModule(RopeModule):
    """FLUX's double blocks: q and k of both streams, and two tables for the tokens of both -> an attention."""

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__(spec)
        for name in ("q_text_weight", "k_text_weight"):
            weight = None if spec.weight is None else nn.Parameter(torch.randn(spec.width).to(spec.weight))
            self.register_parameter(name, weight)

    def forward(self, q: Tensor, k: Tensor, q_text: Tensor, k_text: Tensor, *tables: Tensor) -> Tensor:
        spec = self.spec
        table, sin = (t.unsqueeze(2 if spec.swapped == "behind" else 1) for t in tables)
        q = self.joined(((q_text, self.q_text_weight), (q, self.q_weight)), table, sin)
        k = self.joined(((k_text, self.k_text_weight), (k, self.k_weight)), table, sin)
        if spec.kv_heads != spec.heads:
            k = k.repeat_interleave(spec.heads // spec.kv_heads, dim=1)
        return F.scaled_dot_product_attention(q, k, k)

    def joined(self, streams: tuple[tuple[Tensor, Tensor], ...], table: Tensor, sin: Tensor) -> Tensor:
        spec = self.spec
        normed = [spec.norm(x.transpose(1, 2) if spec.swapped == "before" else x, w, self.eps) for x, w in streams]
        normed = [n.transpose(1, 2) if spec.swapped == "between" else n for n in normed]
        out = spec.rope(torch.cat(normed, 1 if spec.swapped == "behind" else 2), table, sin)
        return out.transpose(1, 2) if spec.swapped == "behind" else out


def joined_inputs(spec: RopeSpec, seed: int = 0) -> tuple[Tensor, ...]:
    q, k, *tables = rope_inputs(replace(spec, tokens=TEXT + spec.tokens), seed)
    streams = [part.clone() if not spec.packed else part for x in (q, k) for part in x.split((TEXT, spec.tokens), 1)]
    for t in streams:
        torch._dynamo.mark_static(t, 2)
        torch._dynamo.mark_static(t, 3)
    q_text, q, k_text, k = streams
    return q, k, q_text, k_text, *tables


def is_rounded_by_layout(spec: RopeSpec) -> bool:
    """How a CPU rounds a complex product depends on the layout, which a join with heads before tokens changes."""
    return spec.rope in COMPLEX and spec.swapped != "behind" and bool(spec.width % VECTOR) and spec.heads > 1


@settings(max_examples=6)
@given(spec=rope_specs(), dynamic=st.sampled_from((False, False, True)), seed=st.integers(0, 2**16))
def test_two_streams_are_one_site_that_is_bit_equal_to_eager(spec: RopeSpec, dynamic: bool, seed: int) -> None:
    module, args = JoinedModule(spec), joined_inputs(spec, seed)
    with torch.no_grad():
        expected = module(*args)
    got, backend = run(module, *args, dynamic=dynamic)
    assert_bit_equal(got, expected)
    if is_rounded_by_layout(spec):
        assert {site.reason_name for site in backend.report.missed} <= {"LAYOUT", "ALONE"}
        return
    assert [site.kind for site in backend.report.fused] == [KIND], backend.report
    assert backend.report.missed == []
    (site,) = backend.report.fused
    assert (site.rounding, site.dtype) == (spec.form(), spec.dtype)


def flux(norm: Callable[..., Tensor] = diffusers_norm, **options: object) -> tuple[JoinedModule, tuple[Tensor, ...]]:
    spec = RopeSpec(norm=norm, rope=neighbours_rope, table=torch.float32, **options)  # type: ignore[arg-type]
    return JoinedModule(spec), joined_inputs(spec)


@needs_casts
@pytest.mark.parametrize("norm", (diffusers_norm, torch_norm))
def test_nothing_but_the_op_is_left_between_the_projections_and_the_attention(norm: Callable[..., Tensor]) -> None:
    module, args = flux(norm, packed=True)
    got, backend = run(module, *args, strict=True)
    assert_bit_equal(got, module(*args))
    (graph,) = backend.graphs
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    kinds = ("getitem", "unsqueeze", "permute", KIND, "scaled_dot_product")
    assert all(any(kind in name for kind in kinds) for name in calls), calls


def test_the_tokens_of_the_first_stream_come_first_also_where_they_are_those_of_the_image() -> None:
    module, (q, k, q_text, k_text, *tables) = flux()
    args = (q_text, k_text, q, k, *tables)
    got, backend = run(module, *args)
    assert_bit_equal(got, module(*args))
    assert backend.report.counts() == {KIND: 1}


def test_compiled_code_calls_the_kernel_directly_and_sizes_may_change() -> None:
    module, args = flux(batch=3)
    torch._dynamo.reset()
    with fresh_cache(), torch.no_grad():
        got, codes = run_and_get_code(torch.compile(module, backend=Backend(kernels="reference")), *args)
        assert is_direct("\n".join(codes))
        assert KIND in "\n".join(codes)
        assert_bit_equal(got, module(*args))
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend(Backend(kernels="reference"))
        function = torch.compile(module, backend=counter, dynamic=True)
        for tokens in (6, 9):
            args = joined_inputs(replace(module.spec, tokens=tokens))
            assert_bit_equal(function(*args), module(*args))
    assert counter.frame_count == 1


# --- near to a site, and none: q, k and their text, cosines and sines for all tokens ----------------------------------


WEIGHT = torch.linspace(0.5, 1.5, D).bfloat16()


def attend(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, k)))


def roped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return neighbours_rope(x, cos, sin)


def norm(x: Tensor) -> Tensor:
    return diffusers_norm(x, None)


def one_stream_is_not_normed(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q, k = torch.cat((q_text * 2, norm(q)), 1), torch.cat((k_text * 2, norm(k)), 1)
    return attend(roped(q, cos, sin), roped(k, cos, sin))


def one_stream_has_a_layer_norm(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q = torch.cat((F.layer_norm(q_text, (D,)), norm(q)), 1)
    k = torch.cat((F.layer_norm(k_text, (D,)), norm(k)), 1)
    return attend(roped(q, cos, sin), roped(k, cos, sin))


def three_streams(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q = torch.cat((norm(q_text), norm(q[:, :2]), norm(q[:, 2:] * 2)), 1)
    k = torch.cat((norm(k_text), norm(k[:, :2]), norm(k[:, 2:] * 2)), 1)
    return attend(roped(q, cos, sin), roped(k, cos, sin))


def joined_along_the_heads(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q, k = torch.cat((norm(q), norm(q * 2)), 2), torch.cat((norm(k), norm(k * 2)), 2)
    return attend(roped(q, cos[:, TEXT:], sin[:, TEXT:]), roped(k, cos[:, TEXT:], sin[:, TEXT:]))


def the_streams_round_differently(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q = torch.cat((llama_norm(q_text, WEIGHT, EPS), torch_norm(q, WEIGHT, EPS)), 1)
    k = torch.cat((llama_norm(k_text, WEIGHT, EPS), torch_norm(k, WEIGHT, EPS)), 1)
    return attend(roped(q, cos, sin), roped(k, cos, sin))


def one_stream_has_a_weight(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q, k = (
        torch.cat((norm(q_text), llama_norm(q, WEIGHT, EPS)), 1),
        torch.cat((norm(k_text), llama_norm(k, WEIGHT, EPS)), 1),
    )
    return attend(roped(q, cos, sin), roped(k, cos, sin))


def a_normed_stream_is_read_again(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    text = norm(q_text)
    q, k = torch.cat((text, norm(q)), 1), torch.cat((norm(k_text), norm(k)), 1)
    return attend(roped(q, cos, sin), roped(k, cos, sin)), text + 1


def the_joined_tensor_is_read_again(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q, k = torch.cat((norm(q_text), norm(q)), 1), torch.cat((norm(k_text), norm(k)), 1)
    return attend(roped(q, cos, sin), roped(k, cos, sin)), q + 1


def k_has_another_rotation(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q, k = torch.cat((norm(q_text), norm(q)), 1), torch.cat((norm(k_text), norm(k)), 1)
    return attend(roped(q, cos, sin), roped(k, sin, cos))


def k_is_another_attentions(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q, k = torch.cat((norm(q_text), norm(q)), 1), torch.cat((norm(k_text), norm(k)), 1)
    return attend(*2 * [roped(q, cos, sin)]), attend(*2 * [roped(k, cos, sin)])


def the_same_stream_twice(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q, k = norm(q_text), norm(k_text)
    q, k = (torch.cat((x, x, x[:, :0], x, x), 1) for x in (q, k))
    return attend(roped(q, cos, sin), roped(k, cos, sin))


def the_text_of_q_is_that_of_k(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    text = norm(q_text)
    q, k = torch.cat((text, norm(q)), 1), torch.cat((text, norm(k)), 1)
    return attend(roped(q, cos, sin), roped(k, cos, sin))


def a_swap_of_text_and_image_in_k(q, k, q_text, k_text, cos, sin):  # type: ignore[no-untyped-def]
    q, k = torch.cat((norm(q_text), norm(q)), 1), torch.cat((norm(k), norm(k_text)), 1)
    return attend(roped(q, cos, sin), roped(k, cos, sin))


NONE = (
    one_stream_is_not_normed,
    one_stream_has_a_layer_norm,
    three_streams,
    joined_along_the_heads,
    the_streams_round_differently,
    one_stream_has_a_weight,
    a_normed_stream_is_read_again,
    the_joined_tensor_is_read_again,
    k_has_another_rotation,
    k_is_another_attentions,
    the_same_stream_twice,
    the_text_of_q_is_that_of_k,
    a_swap_of_text_and_image_in_k,
)


@pytest.mark.parametrize("model", NONE)
def test_what_only_resembles_two_streams_is_not_fused_and_computes_the_same(model: Callable[..., object]) -> None:
    torch.manual_seed(0)
    q, k, q_text, k_text = (torch.randn(B, tokens, H, D).bfloat16() for tokens in (S, S, TEXT, TEXT))
    angles = torch.randn(1, TEXT + S, 1, D // 2).repeat_interleave(2, -1)
    args = (q, k, q_text, k_text, angles.cos(), angles.sin())
    got, backend = run(model, *args)
    assert_bit_equal(got, model(*args))
    assert KIND not in backend.report.counts()
    assert backend.report.missed


def test_heads_by_halves_are_rotated_after_the_join() -> None:
    spec = RopeSpec(rope=half_rope, table=torch.bfloat16, swapped="before", kv_heads=1)
    module, args = JoinedModule(spec), joined_inputs(spec)
    got, backend = run(module, *args, strict=True)
    assert_bit_equal(got, module(*args))
    assert backend.report.counts() == {KIND: 1}
