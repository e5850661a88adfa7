"""y = residual + gate * h and z = norm(y) * (1 + scale) + shift, in every form that models write, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import quantized
import torch
import torch.nn.functional as F
from graph_backend import needs_casts, run
from graph_checks import BF16, FP32, assert_equal, options_of, tensors
from test_graph_pass import assert_computes, rewritten, traced
from torch import Tensor

from dit_kernels.families import family
from fusion_pass import eligibility
from fusion_pass.kinds import gain

B, S, D = 2, 9, 32
ROWS, ITEM = (B, S, D), (B, 1, D)
ADD, SCALED = "mul_add_norm_scale", "norm_scale"
Model = Callable[..., Any]


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    n = (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return n if weight is None else n * weight


layer = partial(F.layer_norm, normalized_shape=(D,), eps=1e-6)
MATRIX = tensors((D, D))[0]


def given(modulation: torch.dtype = BF16, shape: tuple[int, ...] = ITEM) -> list[Tensor]:
    """h, residual, gate, scale, shift."""
    h, residual = tensors(ROWS, ROWS)
    torch.manual_seed(1)
    return [h, residual, *(torch.randn(shape).to(modulation) for _ in range(3))]


# --- the forms of models ----------------------------------------------------------------------------------------------


def in_the_storage_dtype(h, residual, gate, scale, shift, norm: Callable[[Tensor], Tensor] = layer):
    """FLUX.1, FLUX.2, Qwen-Image, SD3.5, HunyuanVideo, CogView4, Bria."""
    y = residual + gate * h
    return y, (norm(y) * (1 + scale) + shift) @ MATRIX


def in_fp32(h, residual, gate, scale, shift):
    """Wan, Kandinsky: y and z are rounded once each."""
    y = (residual.float() + h * gate).type_as(residual)
    return y, (layer(y.float()) * (1 + scale) + shift).type_as(y) @ MATRIX


def with_a_product_in_fp32(h, residual, gate, scale, shift):
    """ERNIE: the product is rounded before the sum."""
    y = residual + (gate.float() * h.float()).to(h.dtype)
    return y, (rms(y).float() * (1 + scale.float()) + shift.float()).to(y.dtype) @ MATRIX


def with_an_affine_norm(h, residual, gate, scale, shift):
    """CogVideoX."""
    y = residual + gate * h
    return y, (layer(y, weight=MATRIX[0], bias=MATRIX[1]) * (1 + scale) + shift) @ MATRIX


def without_a_gate(h, residual, gate, scale, shift):
    """PixArt, Sana."""
    y = h + residual
    return y, (layer(y) * (1 + scale) + shift) @ MATRIX


def without_a_modulation(h, residual, gate, scale, shift):
    """The cross-attention of Wan and LTX."""
    y = residual + h
    return y, rms(y, MATRIX[0]) @ MATRIX


def with_a_tanh(h, residual, gate, scale, shift):
    y = residual + gate.tanh() * h
    return y, (rms(y) * (1 + scale)) @ MATRIX


def with_a_shift_alone(h, residual, gate, scale, shift):
    y = residual + gate * h
    return y, (layer(y) + shift) @ MATRIX


def in_two_dimensions(h, residual, gate, scale, shift):
    """The add is of [B * S, D], the norm of [B, S, D]."""
    y = (residual.reshape(-1, D) + (gate * h).reshape(-1, D)).reshape(ROWS)
    return y, (layer(y) * (1 + scale) + shift) @ MATRIX


FORMS: dict[Model, str] = {
    in_the_storage_dtype: "cast_then_weight",
    partial(in_the_storage_dtype, norm=rms): "cast_then_weight",
    with_a_product_in_fp32: "cast_then_weight",
    with_an_affine_norm: "cast_then_weight",
    without_a_gate: "cast_then_weight",
    without_a_modulation: "cast_then_weight",
    with_a_tanh: "cast_then_weight",
    with_a_shift_alone: "cast_then_weight",
    in_two_dimensions: "cast_then_weight",
}


def name_of(model: Model) -> str:
    return getattr(model, "__name__", "rms")


@pytest.mark.parametrize("model", FORMS, ids=name_of)
def test_every_form_is_fused_and_is_eagers(model: Model) -> None:
    args = given()
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {ADD: 1}
    assert not backend.report.missed
    assert backend.report.fused[0].rounding == FORMS[model]


@needs_casts
def test_wans_chain_in_fp32_rounds_y_and_z_once() -> None:
    args = given(FP32)
    got, backend = run(in_fp32, *args)
    assert_equal(got, in_fp32(*args))
    assert backend.report.counts() == {ADD: 1}
    options = options_of(backend)
    assert (options["norm_dtype"], options["y_dtype"], options["z_dtype"]) == (FP32, BF16, BF16)


@pytest.mark.parametrize("shape", ((D,), (1, 1, D), (1, S, D), ROWS, (1,), ()), ids=str)
def test_modulations_broadcast_in_every_way(shape: tuple[int, ...]) -> None:
    """Wan 2.2 TI2V and ERNIE have one for each token."""
    args = given(shape=shape)
    got, backend = run(in_the_storage_dtype, *args)
    assert_equal(got, in_the_storage_dtype(*args))
    assert backend.report.counts() == {ADD: 1}


def test_expanded_modulations_are_read_before_they_are_expanded() -> None:
    def model(h, residual, gate, scale, shift):
        return in_the_storage_dtype(h, residual, gate.expand(ROWS), scale, shift.expand(ROWS))

    args = given()
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {ADD: 1}
    (call,) = backend.graphs[0].graph.find_nodes(
        op="call_function", target=torch.ops.dit_kernels.mul_add_norm_scale.default
    )
    assert [tuple(call.args[i].meta["val"].shape) for i in (1, 7)] == [ITEM, ITEM]


def test_operands_may_be_swapped_and_sizes_may_change() -> None:
    def model(h, residual, gate, scale, shift):
        y = h * gate + residual
        return y, (shift + (scale + 1) * layer(y)) @ MATRIX

    args = given()
    got, backend = run(model, *args, dynamic=True)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {ADD: 1}


def test_two_blocks_in_a_row_are_two_sites_and_the_add_without_a_norm_has_a_row() -> None:
    def model(h, residual, gate, scale, shift):
        for _ in range(2):
            residual, h = in_the_storage_dtype(h, residual, gate, scale, shift)
        return residual + gate * h

    args = given()
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {ADD: 2}
    assert [(site.kind, site.reason_name) for site in backend.report.missed] == [("residual_add", "ADDED")]


def test_a_gated_norm_and_a_norm_with_a_shift_are_one_site() -> None:
    def model(h, residual, gate, scale, shift):
        y = residual + gate.tanh() * layer(h)
        return y, (layer(y) * (1 + scale) + shift) @ MATRIX

    args = given()
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {"norm_tanh_mul_add_norm_scale": 1}


def test_under_the_policy_fp32_each_output_is_rounded_once() -> None:
    h, residual, gate, scale, shift = given()
    (y, z), _ = run(in_the_storage_dtype, h, residual, gate, scale, shift, rounding="fp32")
    exact = residual.double() + gate.double() * h.double()
    assert torch.equal(y, exact.to(BF16))
    exact = (layer(y.double()) * (1 + scale.double()) + shift.double()).to(BF16) @ MATRIX
    assert (z != exact).float().mean() < 0.01


def joined_again(h, residual, gate, scale, shift, first: int = 4, second: int = 4, dim: int = 1):
    """Two single blocks of FLUX.1: y is parted into text and image, and joined again."""
    y = residual + gate * h
    text, image = y[:, :first], y[:, second:]
    y = torch.cat((text, image), dim)
    return y, (layer(y) * (1 + scale) + shift) @ MATRIX


def test_an_add_whose_sum_is_parted_and_joined_again_is_fused_and_nothing_is_joined() -> None:
    args = given()
    got, backend = run(joined_again, *args)
    assert_equal(got, joined_again(*args))
    assert backend.report.counts() == {ADD: 1}
    assert backend.count(torch.ops.aten.cat.default) == 0


def other_parts(h, residual, gate, scale, shift):
    return joined_again(h, residual, gate, scale, shift, first=4, second=3)


def parts_in_another_order(h, residual, gate, scale, shift):
    y = residual + gate * h
    y = torch.cat((y[:, 4:], y[:, :4]), 1)
    return y, (layer(y) * (1 + scale) + shift) @ MATRIX


def parts_of_two_tensors(h, residual, gate, scale, shift):
    y, other = residual + gate * h, residual - h
    y = torch.cat((y[:, :4], other[:, 4:]), 1)
    return y, (layer(y) * (1 + scale) + shift) @ MATRIX


@pytest.mark.parametrize("model", (other_parts, parts_in_another_order, parts_of_two_tensors), ids=name_of)
def test_other_joins_of_parts_are_not_taken_for_the_sum(model: Model) -> None:
    args = given()
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SCALED: 1}


# --- what is none -----------------------------------------------------------------------------------------------------


def a_residual_of_another_shape(h, residual, gate, scale, shift):
    y = residual[:, :1] + gate * h
    return y, (layer(y) * (1 + scale) + shift) @ MATRIX


def an_addcmul(h, residual, gate, scale, shift):
    y = torch.addcmul(residual, gate, h)
    return y, (layer(y) * (1 + scale) + shift) @ MATRIX


def an_add_with_a_factor(h, residual, gate, scale, shift):
    y = torch.add(residual, gate * h, alpha=2)
    return y, (layer(y) * (1 + scale) + shift) @ MATRIX


def a_sum_that_is_read_before_it_is_rounded(h, residual, gate, scale, shift):
    wide = residual.float() + gate.float() * h
    y = wide.to(BF16)
    return y, wide, (layer(y) * (1 + scale) + shift) @ MATRIX


def twice_the_same(h, residual, gate, scale, shift):
    y = h + h
    return y, (layer(y) * (1 + scale) + shift) @ MATRIX


NO_ADD: tuple[Model, ...] = (
    a_residual_of_another_shape,
    an_addcmul,
    an_add_with_a_factor,
    a_sum_that_is_read_before_it_is_rounded,
    twice_the_same,
)


@pytest.mark.parametrize("model", NO_ADD, ids=name_of)
def test_an_add_that_no_op_computes_is_left_to_inductor_with_its_norm(model: Model) -> None:
    args = given()
    got, backend = run(model, *args)
    assert_equal(got, run(model, *args, fuse=False)[0])
    assert not backend.report.fused
    assert (SCALED, "INLINE") in {(site.kind, site.reason_name) for site in backend.report.missed}


def a_shift_of_the_size_of_x(h, residual, gate, scale, shift):
    return (layer(residual) * (1 + scale) + h) @ MATRIX


def an_addcmul_of_the_shift(h, residual, gate, scale, shift):
    return torch.addcmul(shift, layer(residual), 1 + scale) @ MATRIX


def two_modulations_of_one_norm(h, residual, gate, scale, shift):
    n = layer(residual + h)
    return (n * (1 + scale) + shift) @ MATRIX, (n * (1 + gate) + shift) @ MATRIX


def a_product_that_is_read_elsewhere(h, residual, gate, scale, shift):
    m = layer(residual) * (1 + scale)
    return (m + shift) @ MATRIX, m.abs()


def a_shift_times_two(h, residual, gate, scale, shift):
    return torch.add(layer(residual) * (1 + scale), shift, alpha=2) @ MATRIX


NO_SHIFT: dict[Model, str] = {
    a_shift_of_the_size_of_x: "FOLLOWED",
    an_addcmul_of_the_shift: "ALONE",
    two_modulations_of_one_norm: "ALONE",
    a_product_that_is_read_elsewhere: "FOLLOWED",
    a_shift_times_two: "FOLLOWED",
}


@pytest.mark.parametrize("model", NO_SHIFT, ids=name_of)
def test_what_is_no_shift_is_not_fused_and_has_a_reason(model: Model) -> None:
    args = given()
    got, backend = run(model, *args)
    assert_equal(got, run(model, *args, fuse=False)[0])
    assert not backend.report.fused
    assert {site.reason_name for site in backend.report.missed if site.kind != "residual_add"} == {NO_SHIFT[model]}


@pytest.mark.parametrize("mutated", ("residual", "shift"))
def test_a_mutation_between_the_nodes_of_a_site_keeps_it_from_being_fused(mutated: str) -> None:

    def function(h, residual, gate, scale, shift):
        y = residual + gate * h
        if mutated == "residual":
            residual.zero_()
        n = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        if mutated == "shift":
            shift.zero_()
        return y, n * (1 + scale) + shift, residual

    args = [t.float() for t in given()]
    graph = traced(function, *args)
    report = rewritten(graph)
    assert not report.fused
    assert "MUTATION" in [site.reason_name for site in report.missed]
    assert_computes(graph, function, args)


def test_rounding_that_no_form_has_is_refused() -> None:
    """The sum in fp32 of a product in 16 bits; the gate has fp32, and its product 16 bits."""

    def model(h, residual, gate, scale, shift):
        y = residual + (gate * h).to(BF16)
        return y, (layer(y) * (1 + scale) + shift).to(BF16) @ MATRIX

    args = given(FP32)
    got, backend = run(model, *args)
    assert_equal(got, run(model, *args, fuse=False)[0])
    assert ADD not in backend.report.counts()


# --- the rule ---------------------------------------------------------------------------------------------------------


def behind_a_bias(h, residual, gate, scale, shift):
    return in_the_storage_dtype(h @ MATRIX + MATRIX[0], residual, gate, scale, shift)


def onto_two_sums(h, residual, gate, scale, shift):
    """SD3.5's blocks with two attentions."""
    return in_the_storage_dtype(h, residual + scale * h, gate, scale, shift)


def a_shift_behind_a_bias(h, residual, gate, scale, shift):
    return (layer(h @ MATRIX + MATRIX[0]) * (1 + scale) + shift) @ MATRIX


INLINE = (behind_a_bias, onto_two_sums, a_shift_behind_a_bias)


@pytest.mark.parametrize("model", INLINE, ids=name_of)
def test_where_inductor_computes_an_operand_in_the_same_kernel_the_site_is_left_to_inductor(model: Model) -> None:
    args = given()
    got, backend = run(model, *args, strict=True)
    assert_equal(got, run(model, *args, fuse=False)[0])
    assert not backend.report.fused
    (row,) = [site for site in backend.report.missed if site.kind != "residual_add"]
    assert row.reason_name == "INLINE" and gain.INLINE in (row.reason or "")


def behind_a_bias_that_is_stored(h, residual, gate, scale, shift):
    biased = (h.flatten(0, 1) @ MATRIX + MATRIX[0]).unflatten(0, (B, S))
    return biased @ MATRIX, *in_the_storage_dtype(biased, residual, gate, scale, shift)


def behind_a_division_by_one(h, residual, gate, scale, shift):
    """diffusers' Attention with its `rescale_output_factor`."""
    return in_the_storage_dtype(h / 1.0, residual, gate, scale, shift)


@pytest.mark.parametrize("model", (behind_a_bias_that_is_stored, behind_a_division_by_one), ids=name_of)
def test_where_the_operands_are_in_memory_the_site_is_fused(model: Model) -> None:
    args = given()
    got, backend = run(model, *args, strict=True)
    assert_equal(got, run(model, *args, fuse=False)[0])
    assert backend.report.counts() == {ADD: 1}


def quantised(model: Model, quantise: quantized.Quantise = quantized.torchao) -> Model:
    linear = quantized.Linear(torch.nn.Linear(D, D, dtype=BF16), quantise)
    return lambda *args: tuple(linear(r) if r.shape == ROWS and i else r for i, r in enumerate(model(*args)))


def before_a_quantiser(h, residual, gate, scale, shift, norm=layer):
    h = h @ MATRIX
    y = residual + gate * h
    return y, norm(y) * (1 + scale) + shift


def without_a_gate_or_a_modulation(h, residual, gate, scale, shift):
    h = h @ MATRIX
    y = residual + h
    return y, layer(y, weight=MATRIX[0], bias=MATRIX[1])


def a_shift_without_an_add(h, residual, gate, scale, shift):
    return h, layer(h) * (1 + scale) + shift


IN_FP8: dict[Model, dict[str, int]] = {
    before_a_quantiser: {f"{ADD}_quant": 1},
    partial(before_a_quantiser, norm=rms): {f"{ADD}_quant": 1},
    without_a_gate_or_a_modulation: {f"{ADD}_quant": 1},
    a_shift_without_an_add: {f"{SCALED}_quant": 1},
}


@pytest.mark.parametrize("model", IN_FP8, ids=name_of)
def test_in_front_of_a_quantiser_the_rule_fuses_and_the_result_is_eagers(model: Model) -> None:
    args, chain = given(), quantised(model)
    got, backend = run(chain, *args, strict=True)
    assert_equal(got, chain(*args))
    assert backend.report.counts() == IN_FP8[model]
    assert not backend.report.missed


def test_a_stream_from_a_convolution_is_in_rows_behind_the_first_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """In HunyuanVideo-1.5, the elements of a row of the first residual lie apart, and F.layer_norm copies the sum. With
    kernels="reference", no such site is fused."""

    def model(h, residual, gate, scale, shift):
        return before_a_quantiser(h, residual.transpose(1, 2), gate, scale, shift)

    args, chain = given(), quantised(model)
    args[1] = args[1].transpose(1, 2).contiguous()
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)
    monkeypatch.setattr(eligibility, "prepare", lambda call: None)
    monkeypatch.setattr(family, "quantises_on", lambda t: True)
    got, backend = run(chain, *args, kernels="auto", strict=True)
    assert_equal(got, chain(*args))
    assert backend.report.counts() == {f"{ADD}_quant": 1}
    assert backend.count(torch.ops.aten.clone.default) == 0


def test_rows_that_inductor_computes_in_the_kernel_of_the_add_stay_there() -> None:
    """SD3.5 adds the outputs of two attentions. An op for the second add would wait for the first to be written."""

    def model(h, residual, gate, scale, shift):
        y = residual + gate * (h @ MATRIX) + scale * (h @ MATRIX.T)
        return y, layer(y) * (1 + scale) + shift

    args, chain = given(), quantised(model)
    got, backend = run(chain, *args)
    assert_equal(got, chain(*args))
    assert backend.report.counts() == {f"{SCALED}_quant": 1}
    assert {site.reason_name for site in backend.report.missed} <= {"ADDED"}
