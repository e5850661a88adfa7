"""q and k, normed by a LayerNorm of each head, and of which all or only the last tokens are rotated: the rewritten
graph computes what the original did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_modules import complex_rope, half_rope, neighbours_rope
from graph_backend import run
from hypothesis import given, settings
from hypothesis import strategies as st
from site_modules import diffusers_norm
from test_adaln_models import build, cogview4, random
from test_models import Arguments
from test_models import compiled as compiled_model
from test_models import run as run_model
from test_partly_rotated import rotated_cogvideox
from torch import Tensor, nn

KIND, WHOLE = "qk_norm_part_rope", "qk_norm_rope"
BF16 = torch.bfloat16
B, S, H, D, TEXT = 2, 7, 3, 16, 2
Rope = Callable[[Tensor, Tensor, Tensor], Tensor]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), weight, bias, 1e-6)


def wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """diffusers' FP32LayerNorm."""
    return F.layer_norm(x.float(), (D,), weight.float(), bias.float(), 1e-6).to(x.dtype)


def bare_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (D,))


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return diffusers_norm(x, weight)


NORMS = (layer_norm, wide_layer_norm, bare_layer_norm, rms_norm)


@dataclass(frozen=True)
class Model:
    """heads_first: are the heads before the tokens, as in CogVideoX? part: are only the last tokens rotated?"""

    norm: Callable[..., Tensor] = layer_norm
    rope: Rope = neighbours_rope
    heads_first: bool = True
    part: bool = True

    def __call__(self, q: Tensor, k: Tensor, columns: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = (self.rotated(x, *of, cos, sin) for x, of in ((q, columns[:2]), (k, columns[2:])))
        q, k = (x if self.heads_first else x.transpose(1, 2) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, k)

    def rotated(self, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.transpose(1, 2) if self.heads_first else x
        cos, sin = (t if self.heads_first else t.transpose(1, 2) for t in (cos, sin))
        n = self.norm(x, weight, bias)
        if not self.part:
            return self.rope(n, cos, sin)
        if self.heads_first:
            n[:, :, TEXT:] = self.rope(n[:, :, TEXT:], cos, sin)
        else:
            n[:, TEXT:] = self.rope(n[:, TEXT:], cos, sin)
        return n


def inputs(model: Model, tokens: int = S, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    rows = tokens - TEXT if model.part else tokens
    angle = torch.randn(1, 1, rows, D // 2 if model.rope is complex_rope else D)
    tables = (
        (torch.polar(torch.ones_like(angle), angle), angle)
        if model.rope is complex_rope
        else (angle.cos(), angle.sin())
    )
    q, k = torch.randn(2, B, tokens, H, D).to(dtype)
    return q, k, torch.randn(4, D).to(dtype), *tables


@settings(max_examples=8)
@given(
    norm=st.sampled_from(NORMS),
    rope=st.sampled_from((neighbours_rope, half_rope, complex_rope)),
    heads_first=st.booleans(),
    part=st.booleans(),
    dtype=st.sampled_from((BF16, torch.float16, torch.float32)),
)
def test_q_and_k_are_one_site_that_is_bit_equal_to_eager(norm, rope, heads_first, part, dtype) -> None:
    check_fused(Model(norm, rope, heads_first, part), dtype)


@pytest.mark.parametrize(("norm", "heads_first"), ((layer_norm, True), (rms_norm, False)))
def test_sizes_may_be_symbols(norm: Callable[..., Tensor], heads_first: bool) -> None:
    check_fused(Model(norm, heads_first=heads_first), dynamic=True)


def check_fused(model: Model, dtype: torch.dtype = BF16, dynamic: bool | None = None) -> None:
    args = inputs(model, dtype=dtype)
    for t in args[:2]:
        torch._dynamo.mark_static(t, 3)
    got, backend = run(model, *args, dynamic=dynamic)
    assert torch.equal(got, model(*args))
    assert backend.report.counts() == {KIND if model.part else WHOLE: 1}, backend.report
    assert not backend.report.missed


def spelled(
    qk: tuple[Tensor, Tensor], columns: Tensor, cos: Tensor, sin: Tensor, heads_first: bool = True, end: Any = None
) -> Tensor:
    """The same, with the tables as they are given, an end of the slice, and perhaps fewer heads of k."""
    both = []
    for x, of in zip(qk, (columns[:2], columns[2:]), strict=True):
        n = layer_norm(x.transpose(1, 2) if heads_first else x, *of)
        part = (slice(None), slice(None), slice(TEXT, end)) if heads_first else (slice(None), slice(TEXT, end))
        n[part] = neighbours_rope(n[part], cos, sin)
        both.append(n if heads_first else n.transpose(1, 2))
    return F.scaled_dot_product_attention(both[0], both[1], both[1], enable_gqa=True)


@pytest.mark.parametrize(
    ("shape", "heads_first"),
    [((S - TEXT, D), True), ((1, S - TEXT, D), True), ((B, 1, S - TEXT, D), True)]
    + [((S - TEXT, 1, D), False), ((B, S - TEXT, 1, D), False)],
)
def test_tables_of_any_shape_are_read_for_the_last_tokens(shape: tuple[int, ...], heads_first: bool) -> None:
    q, k, columns, *_ = inputs(Model())
    args = (q, k[:, :, :1]), columns, *torch.randn(2, *shape), heads_first, S
    got, backend = run(spelled, *args)
    assert torch.equal(got, spelled(*args))
    assert backend.report.counts() == {KIND: 1}, backend.report


def test_one_tensor_is_normed_and_rotated_by_norm_rope() -> None:
    model = Model(part=False)
    q, _, columns, *tables = inputs(model)

    def attend(q: Tensor, columns: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = model.rotated(q, *columns[:2], cos, sin)
        return q @ q.mT

    got, backend = run(attend, q, columns, *tables)
    assert torch.equal(got, attend(q, columns, *tables))
    assert backend.report.counts() == {"norm_rope": 1}


def test_with_one_rounding_the_norm_is_not_rounded_before_the_rotation() -> None:
    args = inputs(Model())
    got, backend = run(Model(), *args, rounding="fp32")
    assert backend.report.counts() == {KIND: 1}
    exact = Model()(*(t.double() for t in args))
    assert (got.double() - exact).abs().max() <= (Model()(*args).double() - exact).abs().max() * 1.5


# --- near to a site, and none: heads before tokens; cosines and sines for the last five of seven tokens ---------------


def two_norms(q: Tensor, k: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return layer_norm(q.transpose(1, 2), *columns[:2]), layer_norm(k.transpose(1, 2), *columns[2:])


def the_first_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x[:, :, :-TEXT] = neighbours_rope(x[:, :, :-TEXT], cos, sin)
    return x


def tokens_in_the_middle(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x[:, :, 1:-1] = neighbours_rope(x[:, :, 1:-1], cos, sin)
    return x


def other_tokens_than_those_written(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x[:, :, TEXT:] = neighbours_rope(x[:, :, 1:-1], cos, sin)
    return x


def into_another_tensor(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    other = torch.zeros_like(x)
    other[:, :, TEXT:] = neighbours_rope(x[:, :, TEXT:], cos, sin)
    return other + 0 * x


def not_rounded_before_it_is_written(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x[:, :, TEXT:] = neighbours_rope(x[:, :, TEXT:].float(), cos, sin)
    return x


def scaled_after_the_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x[:, :, TEXT:] = neighbours_rope(x[:, :, TEXT:], cos, sin) * 2
    return x


def every_second_token(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x[:, :, ::2] = neighbours_rope(x[:, :, ::2], cos[:, :, :4], sin[:, :, :4])
    return x


def the_norm_is_read_before(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    read = x.clone()
    x[:, :, TEXT:] = neighbours_rope(x[:, :, TEXT:], cos, sin)
    return x + read[:, :, :1]


def some_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x[:, 1:] = neighbours_rope(x[:, 1:], cos[:, :, :1], sin[:, :, :1])
    return x


NEAR = (
    the_first_tokens,
    tokens_in_the_middle,
    other_tokens_than_those_written,
    into_another_tensor,
    not_rounded_before_it_is_written,
    scaled_after_the_rotation,
    every_second_token,
    the_norm_is_read_before,
    some_heads,
)


@pytest.mark.parametrize("rotate", NEAR)
def test_what_is_nearly_a_rotation_of_the_last_tokens_is_left_alone(rotate: Rope) -> None:
    def model(q: Tensor, k: Tensor, columns: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = (rotate(n, cos, sin) for n in two_norms(q, k, columns))
        return F.scaled_dot_product_attention(q, k, k)

    check_left_alone(model)


def check_left_alone(model: Callable[..., Tensor]) -> Any:
    args = inputs(Model())
    got, backend = run(model, *args)
    assert torch.equal(got, run(model, *args, fuse=False)[0])
    assert KIND not in backend.report.counts(), backend.report
    return backend.report


def k_has_an_rms_norm(q, k, columns, cos, sin):  # type: ignore[no-untyped-def]
    q, k = Model().rotated(q, *columns[:2], cos, sin), Model(rms_norm).rotated(k, *columns[2:], cos, sin)
    return F.scaled_dot_product_attention(q, k, k)


def k_has_another_rotation(q, k, columns, cos, sin):  # type: ignore[no-untyped-def]
    q, k = Model().rotated(q, *columns[:2], cos, sin), Model().rotated(k, *columns[2:], sin, cos)
    return F.scaled_dot_product_attention(q, k, k)


def only_q_is_rotated(q, k, columns, cos, sin):  # type: ignore[no-untyped-def]
    _, k_normed = two_norms(q, k, columns)
    return F.scaled_dot_product_attention(Model().rotated(q, *columns[:2], cos, sin), k_normed, k_normed)


@pytest.mark.parametrize("model", (k_has_an_rms_norm, k_has_another_rotation, only_q_is_rotated))
def test_q_and_k_without_a_rotation_in_common_are_told_as_that(model: Callable[..., Tensor]) -> None:
    rows = {(row.kind, row.reason_name) for row in check_left_alone(model).missed}
    assert (KIND, "ALONE") in rows


def test_a_slice_of_as_many_tokens_in_k_starts_at_the_same_token() -> None:
    """q and k have equally many tokens and tables of equally many rows, so their rotations start at the same token."""

    def model(q: Tensor, k: Tensor, columns: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = two_norms(q, k[:, 1:], columns)
        q[:, :, TEXT:] = neighbours_rope(q[:, :, TEXT:], cos, sin)
        k[:, :, TEXT - 1 :] = neighbours_rope(k[:, :, TEXT - 1 :], cos, sin)
        return F.scaled_dot_product_attention(q, k, k)

    check_left_alone(model)


# --- models -----------------------------------------------------------------------------------------------------------


def hunyuan_dit(layers: int) -> tuple[nn.Module, Arguments]:
    """All tokens are rotated."""
    model = build(
        "HunyuanDiT2DModel",
        BF16,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=layers,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=3,
        text_len_t5=4,
    )
    return model, {
        "hidden_states": random(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7], dtype=BF16),
        "encoder_hidden_states": random(2, 3, 16),
        "text_embedding_mask": torch.ones(2, 3),
        "encoder_hidden_states_t5": random(2, 4, 16),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.full((2, 6), 8.0, dtype=BF16),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": tuple(torch.randn(2, 16, 16)),
    }


MODELS: dict[str, tuple[Callable[[int], tuple[nn.Module, Arguments]], Callable[[int], dict[str, int]]]] = {
    "CogVideoX": (rotated_cogvideox, lambda layers: {KIND: layers}),
    "CogView4": (cogview4, lambda layers: {KIND: layers}),
    # Its cross-attention rotates q alone.
    "HunyuanDiT": (hunyuan_dit, lambda layers: {WHOLE: layers, "norm_rope": layers}),
}


@pytest.mark.parametrize(
    ("name", "layers", "dynamic"),
    [("CogVideoX", 2, None), ("CogVideoX", 1, True), ("CogView4", 1, None), ("HunyuanDiT", 2, None)],
)
def test_q_and_k_of_each_layer_are_fused_and_the_result_is_eagers(name: str, layers: int, dynamic: bool | None) -> None:
    make, counts = MODELS[name]
    model, arguments = make(layers)
    got, backend = compiled_model(model, arguments, dynamic)
    # torch decomposes a LayerNorm that no op computes, which differs from eager's in the last bits.
    plain = torch.equal(got, run_model(model, arguments))
    assert plain or torch.equal(got, compiled_model(model, arguments, dynamic, fuse=False)[0])
    fused = {kind: n for kind, n in backend.report.counts().items() if kind.endswith("rope")}
    assert fused == counts(layers), backend.report
