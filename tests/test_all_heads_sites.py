"""Norms over all heads that are rotated: the graph before and after, what must not match, and models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_modules import (
    HALVES,
    NEIGHBOURS,
    PAIRWISE,
    completed_half_rope,
    half_rope,
    written_neighbours_rope,
)
from graph_backend import CASTS_ARE_KEPT, GraphBackend, addcmul_decomposed, needs_casts, run
from graph_checks import but_adaln
from hypothesis import given, settings
from hypothesis import strategies as st
from long import only_long
from site_modules import diffusers_norm, llama_norm, native_norm, reciprocal_norm, torch_norm
from test_left_to_inductor import wan21
from test_models import Arguments, build, compiled
from test_models import run as run_model
from torch import Tensor, nn

from fusion_pass.report import FusionReport

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
B, S, H, DH = 2, 6, 3, 16
D = H * DH
OP = torch.ops.dit_kernels.norm_all_heads_rope.default


def attend(q: Tensor) -> Tensor:
    """Reads q from memory."""
    q = q.transpose(1, 2)
    return q @ q.mT


@dataclass(frozen=True)
class Spec:
    """How x, [B, S, D], is normed and its heads are rotated. cut: are the tables every second column of larger ones?"""

    norm: Callable[..., Tensor] = torch_norm
    rotate: Callable[..., Tensor] = written_neighbours_rope
    weight: torch.dtype | None = BF16
    dtype: torch.dtype = BF16
    table: torch.dtype = FP32
    batches: int = 1
    cut: bool = False

    def model(self, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        if self.cut:
            cos, sin = cos[..., 0::2], sin[..., 1::2]
        return attend(self.rotate(self.norm(x, weight).unflatten(2, (H, -1)), cos, sin))

    def inputs(self) -> list[Tensor | None]:
        torch.manual_seed(0)
        angles = torch.randn(self.batches, S, 1, DH // 2)
        if self.rotate in (*HALVES, *NEIGHBOURS):
            angles = torch.cat((angles, angles), -1) if self.rotate in HALVES else angles.repeat_interleave(2, -1)
        elif self.cut:
            angles = angles.repeat_interleave(2, -1)
        weight = None if self.weight is None else torch.randn(D).to(self.weight)
        made = [torch.randn(B, S, D).to(self.dtype), weight, *(t.to(self.table) for t in (angles.cos(), angles.sin()))]
        for t in made:
            if t is not None:
                torch._dynamo.mark_static(t, t.ndim - 1)
                torch._dynamo.mark_static(t, t.ndim - 2) if t.ndim == 4 else None
        return made


def fused(spec: Spec, **options: Any) -> GraphBackend:
    """The backend after a run in which the site was fused and the result was eager's."""
    args = spec.inputs()
    got, backend = run(spec.model, *args, strict=True, **options)
    with torch.no_grad():
        assert torch.equal(got, spec.model(*args))
    assert backend.report.counts() == {"norm_all_heads_rope": 1}, backend.report
    assert not backend.report.missed
    return backend


@settings(max_examples=10)
@given(
    norm=st.sampled_from((torch_norm, diffusers_norm, llama_norm, native_norm, reciprocal_norm)),
    rotate=st.sampled_from((*HALVES, *NEIGHBOURS, *PAIRWISE, completed_half_rope)),
    weight=st.sampled_from((None, BF16)),
    table=st.sampled_from((BF16, FP32)),
    batches=st.sampled_from((1, B)),
    dynamic=st.sampled_from((False, False, True)),
)
def test_every_spelling_is_fused_and_the_result_is_eagers(norm, rotate, weight, table, batches, dynamic) -> None:
    if not CASTS_ARE_KEPT and norm is torch_norm:
        return
    fused(Spec(norm, rotate, weight, BF16, table, batches), dynamic=dynamic)


@needs_casts
@pytest.mark.parametrize(
    ("rotate", "dtype"), ((written_neighbours_rope, FP16), (completed_half_rope, FP32), (half_rope, FP16))
)
def test_every_dtype_is_fused(rotate: Callable[..., Tensor], dtype: torch.dtype) -> None:
    fused(Spec(rotate=rotate, dtype=dtype, weight=dtype))


@needs_casts
def test_every_second_column_of_a_table_is_copied_once_for_all_sites() -> None:
    """The copies are right behind the tables, so that they serve every layer."""
    spec = Spec(cut=True)
    x, weight, *tables = spec.inputs()

    def model(x: Tensor, *tables: Tensor) -> Tensor:
        return spec.model(x + spec.model(x, weight, *tables).sum(), weight, *tables)

    got, backend = run(model, x, *tables)
    assert torch.equal(got, model(x, *tables))
    assert backend.count(OP) == 2
    clones = backend.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    copies = [node for node in clones if node.meta["val"].shape == (1, S, 1, DH // 2)]
    assert len(copies) == 2
    assert all(node.meta["val"].is_contiguous() for node in copies)


@needs_casts
def test_the_slices_may_be_written_in_any_order_and_into_any_tensor() -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        out = torch.zeros_like(x)
        out[..., 1::2] = b * cos + a * sin
        out[..., 0::2] = cos * a - sin * b
        return out

    backend = fused(Spec(rotate=rotate))
    assert backend.report.fused[0].rounding == "weight_then_cast"


@needs_casts
def test_halves_may_be_written_into_slices_too() -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        out = torch.empty_like(x)
        out[..., : DH // 2] = a * cos - b * sin
        out[..., DH // 2 :] = b * cos + a * sin
        return out

    fused(Spec(rotate=rotate))


@needs_casts
def test_a_cast_behind_the_rotation_is_the_ops() -> None:
    """In fp32, as autocast makes it."""
    spec = Spec(dtype=FP32, weight=FP32)
    x, weight, cos, sin = spec.inputs()

    def model(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n = torch_norm(x, weight).unflatten(2, (H, -1))
        return attend(written_neighbours_rope(n, cos, sin).bfloat16())

    got, backend = run(model, x, cos, sin)
    assert torch.equal(got, model(x, cos, sin))
    assert backend.report.counts() == {"norm_all_heads_rope": 1}
    (call,) = backend.graphs[0].graph.find_nodes(op="call_function", target=OP)
    assert call.kwargs["out_dtype"] == BF16


def test_the_form_fp32_rounds_the_result_once() -> None:
    spec = Spec()
    args = spec.inputs()
    got, backend = run(spec.model, *args, rounding="fp32")
    assert {site.rounding for site in backend.report.fused} == {"fp32"}
    assert (got.float() - spec.model(*args).float()).abs().max() <= 0.02 * got.float().abs().max()


def heads_first(norm: Callable[..., Tensor], rotate: Callable[..., Tensor], own: bool, back: bool) -> Any:
    """diffusers' LTX-2: heads come before tokens in the rotation. back: are the heads joined again behind it?"""

    def model(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if own:
            cos, sin = (t.unflatten(2, (H, -1)) for t in (cos, sin))
        cos, sin = (t.transpose(1, 2) for t in (cos, sin))
        q = rotate(norm(x, weight).unflatten(2, (H, -1)).transpose(1, 2), cos, sin)
        return attend(q.transpose(1, 2).flatten(2).unflatten(2, (H, -1)) if back else q.transpose(1, 2))

    return model


def run_heads_first(rotate: Callable[..., Tensor], own: bool, back: bool, dynamic: bool) -> GraphBackend:
    """The backend, after a run whose result is eager's."""
    torch.manual_seed(0)
    width = DH if rotate is half_rope else DH // 2
    shape = (1, S, H * width) if own else (1, S, 1, width)
    args = torch.randn(B, S, D).to(BF16), torch.randn(D).to(BF16), torch.randn(shape), torch.randn(shape)
    for t in args:
        torch._dynamo.mark_static(t, t.ndim - 1)
    model = heads_first(torch_norm, rotate, own, back)
    got, backend = run(model, *args, dynamic=dynamic)
    assert torch.equal(got, model(*args))
    return backend


@needs_casts
@pytest.mark.parametrize(
    ("rotate", "own", "dynamic"),
    (
        (completed_half_rope, False, False),
        (half_rope, False, False),
        (half_rope, True, False),
        (completed_half_rope, True, True),
    ),
)
def test_heads_before_tokens_are_fused(rotate: Callable[..., Tensor], own: bool, dynamic: bool) -> None:
    backend = run_heads_first(rotate, own, True, dynamic)
    assert backend.report.counts() == {"norm_all_heads_rope": 1}
    (call,) = backend.graphs[0].graph.find_nodes(op="call_function", target=OP)
    assert call.kwargs["own"] == own and call.kwargs["addcmul"] == (rotate is completed_half_rope)


@needs_casts
@pytest.mark.parametrize(("rotate", "own"), ((completed_half_rope, False), (half_rope, True)))
def test_heads_that_stay_before_tokens_are_not_fused(rotate: Callable[..., Tensor], own: bool) -> None:
    backend = run_heads_first(rotate, own, back=False, dynamic=False)
    assert not backend.report.fused
    assert [(site.kind, site.reason_name) for site in backend.report.missed] == [("norm_all_heads_rope", "HEADS")]


@needs_casts
def test_a_number_of_heads_that_is_read_off_dynamic_tables_is_reported() -> None:
    """A block of LTX-2 that is compiled alone with dynamic=True."""
    torch.manual_seed(0)
    args = torch.randn(B, S, D).to(BF16), torch.randn(D).to(BF16), *(torch.randn(B, H, S, DH // 2) for _ in range(2))
    for t in args[:2]:
        torch._dynamo.mark_static(t, t.ndim - 1)

    def model(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = torch_norm(x, weight).reshape(*x.shape[:2], cos.shape[1], -1).transpose(1, 2)
        return attend(completed_half_rope(heads, cos, sin).transpose(1, 2).reshape(x.shape).unflatten(2, (H, -1)))

    got, backend = run(model, *args, dynamic=True)
    assert torch.equal(got, model(*args))
    (site,) = backend.report.missed
    assert (site.kind, site.reason_name) == ("norm_all_heads_rope", "WIDTH")
    assert "the number of heads is not a constant" in (site.reason or "")


def addcmul_of(first: int, second: int, sign: float, value: float = 1) -> Callable[..., Tensor]:
    """completed_half_rope with other halves, sign or factor."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs, cos, sin = x.unflatten(-1, (2, -1)).float(), cos.unsqueeze(-2), sin.unsqueeze(-2)
        out = pairs * cos
        out[..., :1, :].addcmul_(sin if sign > 0 else -sin, pairs[..., first : first + 1, :])
        out[..., 1:, :].addcmul_(sin, pairs[..., second : second + 1, :], value=value)
        return out.flatten(-2).to(x.dtype)

    rotate.__name__ = f"addcmul_of_{first}_{second}_{sign:+}_{value}"
    return rotate


OTHER_ADDCMULS = (addcmul_of(1, 0, +1), addcmul_of(0, 1, -1), addcmul_of(1, 0, -1, value=2))


@needs_casts
@pytest.mark.parametrize(
    ("rotate", "fused"),
    (
        (completed_half_rope, {"norm_all_heads_rope": 1}),
        *((rotate, {}) for rotate in OTHER_ADDCMULS),
    ),
)
def test_addcmul_is_found_after_its_decomposition(rotate: Callable[..., Tensor], fused: dict[str, int]) -> None:
    spec = Spec(rotate=rotate)
    x, *others = spec.inputs()
    with addcmul_decomposed():
        got, backend = run(spec.model, x, *others)
    assert "addcmul" not in backend.before[0]
    assert backend.report.counts() == fused
    if fused:
        assert torch.equal(got, spec.model(x, *others))


@needs_casts
@pytest.mark.parametrize("normed", (False, True))
def test_a_rotation_with_addcmul_is_fused_after_a_norm_only(normed: bool) -> None:
    def model(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.unflatten(2, (H, -1))
        return attend(completed_half_rope(torch_norm(heads, None) if normed else heads, cos, sin))

    x, _, cos, sin = Spec(rotate=completed_half_rope).inputs()
    got, backend = run(model, x, cos, sin, strict=True)
    assert torch.equal(got, model(x, cos, sin))
    assert backend.report.counts() == ({"norm_rope": 1} if normed else {})
    rows = [(site.kind, site.reason_name) for site in backend.report.missed]
    assert rows == ([] if normed else [("rope", "UNNORMED")])


# --- what is no site --------------------------------------------------------------------------------------------------


def another_step(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[..., 0::4] = x[..., 0::4] * cos[..., ::2] - x[..., 1::4] * sin[..., ::2]
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def tables_swapped_in_one_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * cos + b * sin
    return out


def turned_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos + b * sin
    out[..., 1::2] = b * cos - a * sin
    return out


def both_into_one_slice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.zeros_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 0::2] = a * sin + b * cos
    return out


def pairs_of_neighbours_written_into_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., : DH // 2] = a * cos - b * sin
    out[..., DH // 2 :] = a * sin + b * cos
    return out


def one_half_of_another_tensor(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a.flip(1) * sin + b * cos
    return out


def a_product_is_rounded(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = (a * cos).bfloat16() - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


NO_ROTATIONS = (
    another_step,
    tables_swapped_in_one_half,
    turned_backwards,
    both_into_one_slice,
    pairs_of_neighbours_written_into_halves,
    one_half_of_another_tensor,
    a_product_is_rounded,
    *OTHER_ADDCMULS,
)


def one_half_is_rounded_twice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = (a * cos - b * sin).half()
    out[..., 1::2] = a * sin + b * cos
    return out


def other_dtypes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return written_neighbours_rope(x, cos, sin.bfloat16())


def one_row_for_all_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return written_neighbours_rope(x, cos[:, :1], sin[:, :1])


def the_first_slice_is_read(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.zeros_like(x)
    out[..., 0::2] = a * cos - b * sin
    early = out.flip(1)
    out[..., 1::2] = a * sin + b * cos
    return out @ early.mT


REFUSED = {
    one_half_is_rounded_twice: "ROUNDING",
    other_dtypes: "ROUNDING",
    one_row_for_all_tokens: "HEADS",
    the_first_slice_is_read: "ESCAPES",
}


@needs_casts
@pytest.mark.parametrize("rotate", (*NO_ROTATIONS, *REFUSED), ids=lambda f: f.__name__)
def test_what_no_op_computes_is_not_fused_and_its_result_is_right(rotate: Callable[..., Tensor]) -> None:
    spec = Spec(rotate=rotate)
    x, weight, cos, sin = spec.inputs()
    got, backend = run(spec.model, x, weight, cos, sin)
    assert torch.equal(got, spec.model(x, weight, cos, sin))
    assert not backend.report.fused
    norms = [(site.kind, site.reason_name) for site in backend.report.missed if site.kind != "rope"]
    expected = ("norm_all_heads_rope", REFUSED[rotate]) if rotate in REFUSED else ("norm", "ALONE")
    assert norms == [expected]


def other_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The tables have tokens of the rotated tensor, which are other ones than those of the norm's input."""
    return torch_norm(x.reshape(B * S // 2, 2, D), weight).reshape(B, S, D)


def a_bias(x: Tensor, weight: Tensor) -> Tensor:
    return torch_norm(x, weight) + weight


def a_layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight)


def read_elsewhere(x: Tensor, weight: Tensor) -> Tensor:
    n = torch_norm(x, weight)
    x.mul_(0).add_(n.flip(1))
    return n


@needs_casts
@pytest.mark.parametrize("norm", (a_bias, a_layer_norm, other_rows, read_elsewhere))
def test_other_norms_are_not_fused_and_the_result_is_right(norm: Callable[..., Tensor]) -> None:
    spec = Spec(norm=norm)
    x, *others = spec.inputs()
    assert x is not None
    got, backend = run(spec.model, x.clone(), *others)
    with torch.no_grad():
        assert torch.allclose(got, spec.model(x.clone(), *others), rtol=0.02, atol=0.5)
    assert torch.equal(got, run(spec.model, x.clone(), *others, fuse=False)[0])
    assert not backend.report.fused


# --- models -----------------------------------------------------------------------------------------------------------


def check_model(model: nn.Module, arguments: Arguments, count: int) -> FusionReport:
    """Every rotated norm is fused, and the result is eager's."""
    got, backend = compiled(model, arguments)
    assert torch.equal(got, run_model(model, arguments))
    assert but_adaln(backend.report) == {"norm_all_heads_rope": count}
    assert not [site for site in backend.report.missed if site.kind == "rope"]
    return backend.report


@pytest.mark.parametrize("layers", (pytest.param(1, marks=only_long), 2))
def test_wans_q_and_k_are_fused(layers: int) -> None:
    """Its cross-attention has no rotation."""
    report = check_model(*wan21(layers), 2 * layers)
    assert not [site for site in report.missed if site.kind == "residual_add"]


def ltx(layers: int) -> tuple[nn.Module, Arguments]:
    heads = dict(num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, caption_channels=16)
    model = build("LTXVideoTransformer3DModel", BF16, in_channels=4, out_channels=4, num_layers=layers, **heads)
    return model, {
        "hidden_states": torch.randn(2, 12, 4, dtype=BF16),
        "encoder_hidden_states": torch.randn(2, 6, 16, dtype=BF16),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": torch.ones(2, 6, dtype=torch.int64),
        "num_frames": 2,
        "height": 2,
        "width": 3,
    }


def ltx2(layers: int, rope_type: str) -> tuple[nn.Module, Arguments]:
    model = build(
        "LTX2VideoTransformer3DModel",
        BF16,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        caption_channels=16,
        rope_type=rope_type,
        num_layers=layers,
    )
    _, video = ltx(0)
    return model, {
        **video,
        "audio_hidden_states": torch.randn(2, 5, 4, dtype=BF16),
        "audio_encoder_hidden_states": torch.randn(2, 6, 16, dtype=BF16),
        "audio_encoder_attention_mask": torch.ones(2, 6, dtype=torch.int64),
        "audio_num_frames": 5,
        "timestep": torch.tensor([500.0, 500.0]),
    }


def test_q_and_k_of_ltx_video_are_fused() -> None:
    check_model(*ltx(layers=1), 2)


def test_q_and_k_of_ltx_2_are_fused() -> None:
    """In each block, of video, of audio, and of each where it reads the other."""
    check_model(*ltx2(1, "split"), 8)


BLOCKS = {
    "Wan": (lambda: wan21(1), "blocks.0", 2),
    "LTX-Video": (lambda: ltx(1), "transformer_blocks.0", 2),
}


@pytest.mark.parametrize(("name", "dynamic"), (("Wan", True), ("LTX-Video", False)))
def test_a_block_that_is_compiled_alone_has_its_sites(name: str, dynamic: bool) -> None:
    make, block, count = BLOCKS[name]
    model, arguments = make()
    expected, backend = run_model(model, arguments), GraphBackend()
    model.get_submodule(block).compile(backend=backend, fullgraph=True, dynamic=dynamic)
    assert torch.equal(run_model(model, arguments), expected)
    assert but_adaln(backend.report) == {"norm_all_heads_rope": count}
