"""The pass fuses a norm however the model spells it, and rounds as the model's spelling does."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_backend import needs_casts, run
from graph_checks import BF16, DUAL, FP32, SCALED, SINGLE, Model, assert_equal, options_of, tensors
from site_modules import (
    EPS,
    SiteModule,
    Spec,
    diffusers_norm,
    eps_of_torch,
    inputs,
    layer_norm,
    native_reciprocal_norm,
    quotient_norm,
    reciprocal_norm,
    squeezed_norm,
)
from torch import Tensor

# --- roots and means --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "root"),
    (
        (diffusers_norm, "rsqrt"),
        (squeezed_norm, "rsqrt"),
        (reciprocal_norm, "reciprocal"),
        (native_reciprocal_norm, "reciprocal"),
        (quotient_norm, "quotient"),
        (layer_norm, "rsqrt"),
    ),
)
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
def test_the_op_computes_the_root_as_the_model_spells_it(norm: Model, root: str, dtype: torch.dtype) -> None:
    spec = Spec(norm=norm, dtype=dtype)
    module, args = SiteModule(spec), inputs(spec)
    got, backend = run(module, *args)
    assert_equal(got, module(*args))
    assert options_of(backend)["root"] == root


def test_the_spellings_of_a_root_give_different_bits() -> None:
    """If they gave the same bits, the op would not need the option `root`."""
    (x,) = tensors((64, 300), dtype=FP32)
    by_rsqrt, by_reciprocal, by_quotient = (
        torch.ops.dit_kernels.norm_scale(x, None, None, None, EPS, root=root)
        for root in ("rsqrt", "reciprocal", "quotient")
    )
    assert not torch.equal(by_reciprocal, by_quotient)
    assert not torch.equal(by_rsqrt, by_quotient)


def over_width(x: Tensor) -> Tensor:
    return x.pow(2).sum(-1, keepdim=True) / x.shape[-1]


def times_one_over_width(x: Tensor) -> Tensor:
    return x.pow(2).sum(-1, keepdim=True) * (1 / x.shape[-1])


def over_width_before_keepdim(x: Tensor) -> Tensor:
    return ((x * x).sum(-1) / x.shape[-1]).unsqueeze(-1)


@pytest.mark.parametrize(
    ("mean", "width", "wide", "fused"),
    (
        (over_width, 48, True, True),
        (over_width, 32, True, True),
        (over_width_before_keepdim, 48, True, True),
        (times_one_over_width, 32, True, True),
        (times_one_over_width, 48, True, False),  # a CPU divides in torch.mean
        (over_width, 48, False, False),  # rounds the sum to 16 bits, which torch.mean does not
    ),
)
def test_a_sum_divided_by_the_width_is_fused_only_if_it_rounds_as_torch_mean_does(
    mean, width: int, wide: bool, fused: bool
) -> None:
    def model(x, residual, gate):
        read = x.float() if wide else x
        return residual + gate.tanh() * (read * torch.rsqrt(mean(read) + EPS)).to(x.dtype)

    args = tensors((2, 6, width), (2, 6, width), (2, 1, width))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == ({SINGLE: 1} if fused else {})
    assert [site.reason_name for site in backend.report.missed] == ([] if fused else ["MEAN"])


# --- eps, dimensions, weights -----------------------------------------------------------------------------------------


def no_eps(x: Tensor, weight: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True))).to(x.dtype) * weight


def eps_as_a_tensor(x: Tensor, weight: Tensor) -> Tensor:
    eps = torch.scalar_tensor(EPS, dtype=torch.float64)
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def a_positive_dimension(x: Tensor, weight: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.float().pow(2).mean(2, keepdim=True) + EPS)).to(x.dtype) * weight


def the_weight_on_the_left(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(EPS + x.float().square().mean(-1, keepdim=True))).to(x.dtype)


def an_fp32_weight(x: Tensor, weight: Tensor) -> Tensor:
    return diffusers_norm(x, weight.float())


def an_fp32_weight_before_the_cast(x: Tensor, weight: Tensor) -> Tensor:
    n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (n * weight.float()).to(x.dtype)


def a_weight_of_all_dimensions(x: Tensor, weight: Tensor) -> Tensor:
    return diffusers_norm(x, None) * weight[None, None]


def a_weight_that_is_viewed(x: Tensor, weight: Tensor) -> Tensor:
    return weight.view(1, 1, -1) * diffusers_norm(x, None)


def keepdim_by_a_view(x: Tensor, weight: Tensor) -> Tensor:
    rstd = torch.rsqrt(x.float().pow(2).mean(-1) + EPS)
    return (x * rstd.view(*rstd.shape, 1)).to(x.dtype) * weight


def a_mean_with_its_own_dtype(x: Tensor, weight: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True, dtype=torch.float32) + EPS)).to(x.dtype) * weight


def a_power_of_minus_one(x: Tensor, weight: Tensor) -> Tensor:
    return (x * (x.float().pow(2).mean(-1, keepdim=True) + EPS).sqrt() ** -1).to(x.dtype) * weight


def gemmas(x: Tensor, weight: Tensor) -> Tensor:
    n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (n * (1 + weight.float())).to(x.dtype)


SPELLINGS = (
    a_weight_of_all_dimensions,
    a_weight_that_is_viewed,
    keepdim_by_a_view,
    a_mean_with_its_own_dtype,
    a_power_of_minus_one,
    gemmas,
    eps_of_torch,
    no_eps,
    eps_as_a_tensor,
    a_positive_dimension,
    the_weight_on_the_left,
    an_fp32_weight,
    an_fp32_weight_before_the_cast,
)


@pytest.mark.parametrize(("norm", "dynamic"), zip(SPELLINGS, cycle((True, False))))
def test_a_norm_is_fused_in_every_spelling_of_eps_dimension_and_weight(norm: Model, dynamic: bool) -> None:
    def model(x, residual, gate, weight):
        y = residual + gate.tanh() * norm(x, weight)
        return y, norm(y, weight)[0] @ x[0].to(y.dtype).T

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (48,))
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got[0], model(*args)[0])
    assert (backend.report.fused[0].kind, backend.report.fused[0].gate) in ((SINGLE, "tanh"), (DUAL, "tanh"))


@pytest.mark.parametrize(("shape", "dynamic"), (((48,), False), ((1, 48), True), ((1, 1, 48), False)))
def test_a_weight_may_have_leading_dimensions_of_size_one(shape: tuple[int, ...], dynamic: bool) -> None:
    def model(x, residual, gate, weight):
        y = residual + gate.tanh() * diffusers_norm(x, weight)
        return y, diffusers_norm(y, weight) * (1 + gate)

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), shape)
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


def test_an_operand_of_several_dimensions_is_read_as_a_scale_or_a_residual_if_none_follows() -> None:
    """With one batch item a scale has a shape that a weight may have, and with one token a residual that of a bias."""

    def scaled(x, other, rows):
        return (diffusers_norm(x, None) * other) @ rows

    def added(x, other, rows):
        return diffusers_norm(x, None) + other

    for model, tokens, kind in ((scaled, 6, SCALED), (added, 1, SINGLE)):
        args = tensors((1, tokens, 48), (1, 1, 48), (48, 8))
        got, backend = run(model, *args)
        assert_equal(got, run(model, *args, fuse=False)[0])
        assert backend.report.counts() == {kind: 1}


def test_a_row_selected_from_a_computed_tensor_is_read_as_a_weight() -> None:
    def model(x, residual, gate, weight):
        return residual + gate.tanh() * (diffusers_norm(x, None) * (1 + weight)[0])

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (1, 48))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SINGLE: 1}


@pytest.mark.parametrize(
    ("dtype", "rows"),
    ((BF16, (True, True)), (torch.float16, (True, True)), (torch.float16, (True, False)), (BF16, (False, True))),
)
def test_a_16_bit_layer_norm_with_an_fp32_weight_or_bias_is_fused(dtype: torch.dtype, rows: Any) -> None:
    """PyTorch has a CPU kernel for these dtypes, which gives other bits than casts around its fp32 kernel."""

    def model(x, residual, gate, weight, bias):
        weight, bias = (row if present else None for row, present in zip((weight, bias), rows, strict=True))
        y = residual + gate.tanh() * F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
        return y, F.layer_norm(y, x.shape[-1:], weight, bias, EPS) * (1 + gate)

    args = tensors((2, 256, 1000), (2, 256, 1000), (2, 1, 1000), dtype=dtype) + tensors((1000,), (1000,), dtype=FP32)
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


@pytest.mark.parametrize("stream", (BF16, FP32), ids=str)
def test_a_layer_norm_with_a_computed_weight_and_bias_is_fused(stream: torch.dtype) -> None:
    """The nodes of the layer norm show that these are its weight and bias, not a scale or shift of the model."""

    def model(x, residual, gate, weight, bias):
        y = residual + gate.tanh() * F.layer_norm(x, x.shape[-1:], 1 + weight, bias * 2, EPS)
        return y, F.layer_norm(y, x.shape[-1:], weight.exp(), -bias, EPS) * (1 + gate)

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (48,), (48,), dtype=stream)
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


# --- casts around the norm --------------------------------------------------------------------------------------------


@needs_casts
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_norm_that_is_cast_up_is_fused_with_a_gate_residual_and_scale_in_fp32(dynamic: bool) -> None:
    def model(x, residual, gate, scale):
        y = residual.float() + gate.float().tanh() * diffusers_norm(x, None).float()
        y = y + diffusers_norm(x.sin(), None).float()
        return y, diffusers_norm(y, None).float() * (1 + scale.float())

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (2, 1, 48))
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert [(site.kind, site.gate) for site in backend.report.fused] == [(SINGLE, "tanh"), (DUAL, None)]


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_product_that_is_cast_to_the_dtype_of_an_fp32_residual_is_fused(dynamic: bool) -> None:
    """Models with an fp32 residual stream write out the cast that PyTorch would do by itself."""

    def model(x, residual, gate, scale):
        y = residual.float() + (gate.tanh() * diffusers_norm(x, None)).float()
        return y, (diffusers_norm(y, None) * (1 + scale)).to(x.dtype)

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (2, 1, 48))
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


@pytest.mark.parametrize("dtype", (BF16, torch.float16), ids=str)
def test_the_two_norms_of_a_site_may_be_cast_to_different_dtypes(dtype: torch.dtype) -> None:
    """Under autocast, type_as(x) in a norm casts to 16 bits if x comes from a matmul, to fp32 if it is the residual."""

    def norm(x, weight):
        n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
        return n.type_as(x) * weight

    def model(x, residual, gate, scale, weight):
        y = residual + gate.tanh() * norm(x, weight)
        return y, (norm(y, weight) * (1 + scale)).to(dtype)

    x, gate, scale = tensors((2, 6, 48), (2, 1, 48), (2, 1, 48), dtype=dtype)
    residual, weight = tensors((2, 6, 48), (48,), dtype=FP32)
    got, backend = run(model, x, residual, gate, scale, weight)
    assert_equal(got, model(x, residual, gate, scale, weight))
    assert backend.report.counts() == {DUAL: 1}
    options = options_of(backend)
    assert (options["norm_dtype"], options["norm_dtype2"]) == (dtype, None)


@needs_casts
def test_a_product_that_is_cast_up_before_a_16_bit_residual_is_not_fused() -> None:
    def model(x, residual, gate):
        return residual + (gate.tanh() * diffusers_norm(x, None)).float()

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["ROUNDING"]


@needs_casts
@pytest.mark.parametrize("dtype", (BF16, torch.float16), ids=str)
def test_an_fp32_sum_of_a_16_bit_norm_and_residual_is_not_fused(dtype: torch.dtype) -> None:
    def model(x, residual):
        return residual + diffusers_norm(x, None).float()

    args = tensors((2, 6, 48), (2, 6, 48), dtype=dtype)
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["ROUNDING"]
