"""How a site may be spelled, and what each norm that is left alone is reported with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_backend import CASTS_ARE_KEPT, GraphBackend, needs_casts, run
from site_modules import (
    EPS,
    SiteModule,
    Spec,
    a_layer_norm_by_hand,
    a_shift_follows_the_scale,
    another_tensor_is_squared,
    diffusers_norm,
    inputs,
    layer_norm,
    mean_over_another_dimension,
    native_reciprocal_norm,
    quotient_norm,
    reciprocal_norm,
    squeezed_norm,
    sum_for_mean,
    the_root_is_rounded,
    the_scale_depends_on_y,
    the_sum_is_an_addcmul,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fusion_pass
from fusion_pass import Backend, eligibility, graph_pass
from fusion_pass.graph_pass import FusionPass
from fusion_pass.report import FusionReport, Reason, ReportedSite

SINGLE, DUAL, SCALED = "norm_tanh_mul_add", "norm_tanh_mul_add_norm_scale", "norm_scale"
BF16, FP32 = torch.bfloat16, torch.float32
Model = Callable[..., Any]


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(shape).to(dtype) for shape in shapes]
    for t in made:
        torch._dynamo.mark_static(t, t.ndim - 1)
    return made


def assert_equal(got: Any, expected: Any) -> None:
    got, expected = (r if isinstance(r, tuple) else (r,) for r in (got, expected))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def options_of(backend: GraphBackend) -> dict[str, Any]:
    """The keyword arguments of the one op in a graph."""
    calls = [n for gm in backend.graphs for n in gm.graph.nodes if "dit_kernels" in str(n.target)]
    (call,) = calls
    return dict(call.kwargs)


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
@pytest.mark.parametrize("dtype", (BF16, torch.float16, FP32), ids=str)
def test_a_root_is_taken_as_the_model_spells_it(norm: Model, root: str, dtype: torch.dtype) -> None:
    spec = Spec(norm=norm, dtype=dtype)
    module, args = SiteModule(spec), inputs(spec)
    got, backend = run(module, *args)
    assert_equal(got, module(*args))
    assert options_of(backend)["root"] == root


def test_the_spellings_of_a_root_round_otherwise() -> None:
    """Otherwise telling them apart would not matter."""
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
def test_a_sum_over_the_width_is_a_mean_where_it_rounds_as_one(mean, width: int, wide: bool, fused: bool) -> None:
    def model(x, residual, gate):
        read = x.float() if wide else x
        return residual + gate.tanh() * (read * torch.rsqrt(mean(read) + EPS)).to(x.dtype)

    args = tensors((2, 6, width), (2, 6, width), (2, 1, width))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == ({SINGLE: 1} if fused else {})
    assert [site.reason_name for site in backend.report.missed] == ([] if fused else ["MEAN"])


# --- eps, dims, weights -----------------------------------------------------------------------------------------------


def eps_of_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


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


@pytest.mark.parametrize(
    "norm",
    (
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
    ),
)
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_norm_is_read_however_eps_dimension_and_weight_are_spelled(norm: Model, dynamic: bool) -> None:
    def model(x, residual, gate, weight):
        y = residual + gate.tanh() * norm(x, weight)
        return y, norm(y, weight)[0] @ x[0].to(y.dtype).T

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (48,))
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got[0], model(*args)[0])
    assert (backend.report.fused[0].kind, backend.report.fused[0].gate) in ((SINGLE, "tanh"), (DUAL, "tanh"))


@needs_casts
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_norm_that_is_cast_up_again_meets_gate_residual_and_scale_in_fp32(dynamic: bool) -> None:
    def model(x, residual, gate, scale):
        y = residual.float() + gate.float().tanh() * diffusers_norm(x, None).float()
        y = y + diffusers_norm(x.sin(), None).float()
        return y, diffusers_norm(y, None).float() * (1 + scale.float())

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (2, 1, 48))
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert [(site.kind, site.gate) for site in backend.report.fused] == [(SINGLE, "tanh"), (DUAL, None)]


@pytest.mark.parametrize("shape", ((48,), (1, 48), (1, 1, 48)), ids=str)
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_weight_may_have_further_dimensions_of_one(shape: tuple[int, ...], dynamic: bool) -> None:
    def model(x, residual, gate, weight):
        y = residual + gate.tanh() * diffusers_norm(x, weight)
        return y, diffusers_norm(y, weight) * (1 + gate)

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), shape)
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


def test_an_operand_of_several_dimensions_is_a_weight_only_where_a_gate_or_a_scale_follows() -> None:
    """Of one batch item, or one token, a scale has the shape of a weight, and a residual that of a bias."""

    def scaled(x, other, rows):
        return (diffusers_norm(x, None) * other) @ rows

    def added(x, other, rows):
        return diffusers_norm(x, None) + other

    for model, tokens, kind in ((scaled, 6, SCALED), (added, 1, SINGLE)):
        args = tensors((1, tokens, 48), (1, 1, 48), (48, 8))
        got, backend = run(model, *args)
        assert_equal(got, run(model, *args, fuse=False)[0])
        assert backend.report.counts() == {kind: 1}


def test_a_computed_row_is_a_weight_also_where_a_select_made_it_one() -> None:
    def model(x, residual, gate, weight):
        return residual + gate.tanh() * (diffusers_norm(x, None) * (1 + weight)[0])

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (1, 48))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SINGLE: 1}


def test_what_is_selected_behind_a_cast_leaves_nothing_of_it_in_the_graph() -> None:
    def model(x, residual, gate):
        wide = x.float()[:, 0]
        n = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return residual + gate.tanh() * n

    args = tensors((2, 1, 6, 48), (2, 6, 48), (2, 1, 48))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SINGLE: 1}
    assert not [n for n in backend.graphs[0].graph.nodes if n.op == "call_function" and not n.users]


@pytest.mark.parametrize("dtype", (BF16, torch.float16), ids=str)
@pytest.mark.parametrize("rows", ((True, True), (True, False), (False, True)), ids=("both", "weight", "bias"))
def test_a_layer_norm_takes_an_fp32_weight_and_bias_as_pytorch_does(dtype: torch.dtype, rows: Any) -> None:
    """PyTorch's CPU kernel for a 16-bit x and fp32 rows gives other bits than that for fp32 throughout."""

    def model(x, residual, gate, weight, bias):
        weight, bias = (row if present else None for row, present in zip((weight, bias), rows, strict=True))
        y = residual + gate.tanh() * F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
        return y, F.layer_norm(y, x.shape[-1:], weight, bias, EPS) * (1 + gate)

    args = tensors((2, 256, 1000), (2, 256, 1000), (2, 1, 1000), dtype=dtype) + tensors((1000,), (1000,), dtype=FP32)
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


@pytest.mark.parametrize("stream", (BF16, FP32), ids=str)
def test_a_layer_norm_may_be_given_a_weight_and_a_bias_that_are_computed(stream: torch.dtype) -> None:
    """That they are its own, and no scale or shift of the model's, its nodes tell."""

    def model(x, residual, gate, weight, bias):
        y = residual + gate.tanh() * F.layer_norm(x, x.shape[-1:], 1 + weight, bias * 2, EPS)
        return y, F.layer_norm(y, x.shape[-1:], weight.exp(), -bias, EPS) * (1 + gate)

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (48,), (48,), dtype=stream)
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


def a_copy_of_channels(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def a_wide_copy_of_channels(x: Tensor) -> Tensor:
    return x.transpose(1, 2).float().contiguous()


def a_copy_of_cropped_rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2)[:, 1:-1].reshape(-1, x.shape[1])[None]


@pytest.mark.parametrize("copy", (a_copy_of_channels, a_wide_copy_of_channels, a_copy_of_cropped_rows))
@pytest.mark.parametrize("norm", (diffusers_norm, eps_of_torch, layer_norm))
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
def test_rows_that_a_copy_brought_together_are_summed_as_they_lie_in_the_copy(
    copy: Model, norm: Model, dtype: torch.dtype
) -> None:
    """A CPU sums rows whose elements lie apart in another order."""

    def model(x, gate):
        rows = copy(x)
        return rows + gate.tanh() * norm(rows, torch.ones(500, dtype=rows.dtype))

    args = tensors((2, 500, 96), (1, 1, 500), dtype=dtype)
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SINGLE: 1}


def rows_apart_in_another_shape(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    return residual.flatten(0, 1) + gate.tanh() * diffusers_norm(x.transpose(1, 2), None).reshape(-1, 500)


def rows_apart_scaled_in_another_shape(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    return (diffusers_norm(x.transpose(1, 2), None).reshape(-1, 500) * (1 + gate)) @ residual[0].mT


def a_copy_between_the_two_norms(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    y = residual.mT.contiguous().mT + gate.tanh() * diffusers_norm(x.transpose(1, 2), None)
    return y, diffusers_norm(y.contiguous(), None) * (1 + gate)


def a_residual_whose_rows_lie_apart(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    y = gate.tanh() * diffusers_norm(residual, None) + x.transpose(1, 2)
    return y, diffusers_norm(y, None) * (1 + gate)


def a_residual_of_rows_apart_on_the_left(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    y = x.transpose(1, 2) + gate.tanh() * diffusers_norm(residual, None)
    return y, diffusers_norm(y, None) * (1 + gate)


@pytest.mark.parametrize(
    "model",
    (
        rows_apart_in_another_shape,
        rows_apart_scaled_in_another_shape,
        a_copy_between_the_two_norms,
        a_residual_whose_rows_lie_apart,
        a_residual_of_rows_apart_on_the_left,
    ),
)
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
def test_where_rows_lie_apart_no_sum_is_computed_in_another_order(model: Model, dtype: torch.dtype) -> None:
    args = tensors((2, 500, 96), (2, 96, 500), (1, 1, 500), dtype=dtype)
    got, _ = run(model, *args)
    assert_equal(got, run(model, *args, fuse=False)[0])


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_product_that_is_cast_up_to_the_residual_is_fused(dynamic: bool) -> None:
    """As models with an fp32 residual stream write what PyTorch would do by itself."""

    def model(x, residual, gate, scale):
        y = residual.float() + (gate.tanh() * diffusers_norm(x, None)).float()
        return y, (diffusers_norm(y, None) * (1 + scale)).to(x.dtype)

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48), (2, 1, 48))
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


@pytest.mark.parametrize("dtype", (BF16, torch.float16), ids=str)
def test_the_two_norms_of_a_site_may_be_cast_to_different_dtypes(dtype: torch.dtype) -> None:
    """As autocast makes it of type_as(x) in a norm: 16 bits for what a matmul gave, fp32 for the residual stream."""

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
def test_a_product_that_is_cast_up_before_a_16_bit_residual_is_no_form() -> None:
    def model(x, residual, gate):
        return residual + (gate.tanh() * diffusers_norm(x, None)).float()

    args = tensors((2, 6, 48), (2, 6, 48), (2, 1, 48))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["ROUNDING"]


@needs_casts
@pytest.mark.parametrize("dtype", (BF16, torch.float16), ids=str)
def test_a_sum_in_fp32_of_what_is_stored_in_16_bits_is_no_form(dtype: torch.dtype) -> None:
    def model(x, residual):
        return residual + diffusers_norm(x, None).float()

    args = tensors((2, 6, 48), (2, 6, 48), dtype=dtype)
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["ROUNDING"]


# --- views ------------------------------------------------------------------------------------------------------------


def views_of_the_same_shape(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    n = diffusers_norm(x.view_as(x), None).contiguous().detach()
    y = residual.view_as(x) + F.dropout(gate[:, 0].tanh() * n, 0.1, training=False)
    return y, diffusers_norm(y, None) * (1 + scale[:, 0])


def gated_by_frames(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    """As video models do: tokens are frames of tokens, each frame with its gate and scale."""
    y = residual + (diffusers_norm(x, None).unflatten(1, (2, -1)) * gate.tanh()).flatten(1, 2)
    return y, (diffusers_norm(y, None).unflatten(1, (2, -1)) * (1 + scale)).flatten(1, 2)


def norms_of_rows(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    y = residual + gate[:, 0].tanh() * diffusers_norm(x.flatten(0, 1), None).view_as(x)
    return y, diffusers_norm(y.flatten(0, 1), None).view_as(x) * (1 + scale[:, 0])


def a_sum_of_rows(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    y = residual.flatten(0, 1) + (gate[:, 0].tanh() * diffusers_norm(x, None)).flatten(0, 1)
    return y, diffusers_norm(y.view_as(x), None) * (1 + scale[:, 0])


def a_sum_without_a_gate(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    y = residual.flatten(0, 1) + diffusers_norm(x, None).flatten(0, 1)
    return y, diffusers_norm(y, None).view_as(x) * (1 + scale[:, 0])


def a_norm_without_a_scale(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    y = residual + gate[:, 0].tanh() * diffusers_norm(x, None)
    z = diffusers_norm(y.flatten(0, 1), None)
    return y, z @ z.T


def a_view_between_two_casts(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    wide = x.float().flatten(0, 1)
    n = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).view_as(x).to(x.dtype)
    y = residual + gate[:, 0].tanh() * n
    return y, diffusers_norm(y[:, None], None)[:, 0] * (1 + scale[:, 0])


def a_gate_that_is_viewed(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    y = residual + gate.flatten(1).tanh().view(2, -1, x.shape[-1])[:, :1] * diffusers_norm(x, None)
    return y, diffusers_norm(y, None) * (1 + scale[:, 0].flatten(1)).reshape(2, 1, x.shape[-1])


def a_norm_of_rows_without_a_scale(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    y = residual + gate[:, 0].tanh() * diffusers_norm(x, None)
    return y, diffusers_norm(y.reshape(-1, y.shape[-1]), None).view(x.shape)


VIEWS = (
    a_norm_of_rows_without_a_scale,
    views_of_the_same_shape,
    gated_by_frames,
    norms_of_rows,
    a_sum_of_rows,
    a_sum_without_a_gate,
    a_norm_without_a_scale,
    a_view_between_two_casts,
    a_gate_that_is_viewed,
)


@pytest.mark.parametrize("model", VIEWS)
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_views_between_the_parts_of_a_site_do_not_hide_it(model: Model, dynamic: bool) -> None:
    if model is a_view_between_two_casts and not CASTS_ARE_KEPT:
        pytest.skip("torch 2.11's own passes drop a cast of this model")
    args = tensors((2, 6, 32), (2, 6, 32), (2, 2, 1, 32), (2, 2, 1, 32))
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_site_with_views_runs_through_inductor_with_another_number_of_tokens(dynamic: bool) -> None:
    compiled = torch.compile(gated_by_frames, backend=Backend(kernels="reference", strict=True), dynamic=dynamic)
    for tokens in (6, 10):
        args = tensors((2, tokens, 32), (2, tokens, 32), (2, 2, 1, 32), (2, 2, 1, 32))
        assert_equal(compiled(*args), gated_by_frames(*args))


def test_sizes_that_are_read_off_a_view_do_not_hide_the_scale() -> None:
    """x and residual have symbols of their own, so what is flattened asks the view for its sizes."""

    def model(x, residual, gate, scale):
        batch, tokens, width = x.shape
        n = diffusers_norm(x, None).view(batch, 2, tokens // 2, width)
        y = residual + (n * gate.tanh()).view(batch, tokens, width)
        return y, (diffusers_norm(y, None).view(batch, 2, tokens // 2, width) * (1 + scale)).flatten(1, 2)

    backend = GraphBackend()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, tokens in ((2, 6), (2, 10), (3, 8)):
        shapes = ((batch, tokens, 32), (batch, tokens, 32), (batch, 2, 1, 32), (batch, 2, 1, 32))
        args = tensors(*shapes)
        assert_equal(compiled(*args), model(*args))
    assert {(site.kind, site.scale) for site in backend.report.fused} == {(DUAL, "one_plus")}
    assert backend.report.missed == []


def columns_of_another_width(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    n = diffusers_norm(x.view(2, 6, 2, 16), None).view_as(x)  # a norm of heads
    return residual + gate.tanh() * n


def rows_in_another_order(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    n = diffusers_norm(x.transpose(0, 1), None).reshape(2, 6, 32)
    return residual + gate.tanh() * n.transpose(-1, -2).reshape(2, 6, 32)


@pytest.mark.parametrize("model", (columns_of_another_width, rows_in_another_order))
def test_a_view_that_breaks_rows_up_keeps_the_norm_alone(model: Model) -> None:
    args = tensors((2, 6, 32), (2, 6, 32), (2, 1, 32))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.fused == []
    assert [site.reason_name for site in backend.report.missed] == ["ALONE"]


# --- the closed list of reasons ---------------------------------------------------------------------------------------


def alone(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    return diffusers_norm(x, None).sin()


def y_of_another_kind_of_norm(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    y = residual + gate.tanh() * layer_norm(x, None)
    z = diffusers_norm(y, None)
    return y, z @ z.mT


def the_norm_is_read_outside(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return residual + gate.tanh() * (x * rstd).to(x.dtype), rstd


def an_eps_on_the_root(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    wide = x.float()
    n = wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + EPS)
    return residual + gate.tanh() * n.to(x.dtype)


def in_double_precision(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    return residual.double() + gate.tanh() * diffusers_norm(x, None)


def a_complex_residual(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    return torch.complex(residual.float(), residual.float()) + gate.tanh() * diffusers_norm(x, None)


def an_eps_of_integers(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    eps = scale[0, 0, 0].abs().long()
    return residual + gate.tanh() * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def read_by_strides(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    y = residual.transpose(0, 1) + gate.transpose(0, 1).tanh() * diffusers_norm(x.transpose(0, 1), None)
    return (y * 2).as_strided((3, 2), (1, 5))


def one_row(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    return residual[0, 0] + gate[0, 0].tanh() * diffusers_norm(x[0, 0], None)


CAUSES: dict[Reason, Model] = {
    Reason.ALONE: alone,
    Reason.FOLLOWED: a_shift_follows_the_scale,
    Reason.LAYER_NORM: a_layer_norm_by_hand,
    Reason.DIMENSION: mean_over_another_dimension,
    Reason.NOT_NORMALISED: another_tensor_is_squared,
    Reason.MEAN: sum_for_mean,
    Reason.ROOT: an_eps_on_the_root,
    Reason.ESCAPES: the_norm_is_read_outside,
    Reason.KINDS: y_of_another_kind_of_norm,
    Reason.ROUNDING: the_root_is_rounded,
    Reason.SHAPE: one_row,
    Reason.DTYPE: in_double_precision,
    Reason.EPS: an_eps_of_integers,
    Reason.LAYOUT: read_by_strides,
}
ELSEWHERE = {
    Reason.WIDTH: "test_a_width_that_is_not_static_is_refused",
    Reason.ORDER: "test_a_scale_that_depends_on_y_is_what_stands_in_the_way_of_the_larger_site",
    Reason.DEVICE: "test_what_no_kernel_takes_is_refused_with_the_node",
    Reason.MUTATION: "tests/test_graph_pass.py",
    Reason.TRAINING: "test_training_is_refused_with_the_norm",
    Reason.PER_TOKEN: "test_a_gate_for_each_token_is_read_only_where_inductor_would_store_it_anyway",
    Reason.NO_KERNEL: "test_a_device_without_kernels_is_refused_with_the_norm",
    Reason.ERROR: "tests/test_graph_pass.py",
    Reason.UNNORMED: "tests/test_attention_sites.py",
    Reason.HEADS: "tests/test_attention_sites.py",
    Reason.INLINE: "tests/test_attention_sites.py",
    Reason.SILU: "tests/test_attention_sites.py",
    Reason.UNFIT: "tests/test_attention_sites.py",
}


class Named(nn.Module):
    """A model two modules deep."""

    def __init__(self, function: Model) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.forward = function  # type: ignore[method-assign]
        self.block.norm = Site(function)

    def forward(self, *args: Tensor) -> Any:
        return self.block.norm(*args)


class Site(nn.Module):
    def __init__(self, function: Model) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def assert_tells_all(site: ReportedSite) -> None:
    assert site.reason_name is not None
    reason = Reason[site.reason_name]
    assert site.reason is not None
    assert site.reason.startswith(reason.value)
    assert ", at " in site.reason, site.reason
    assert site.module == "block.norm"
    file, _, line = site.source.rpartition(":")
    assert file.endswith((".py",))
    assert int(line) > 0


def test_every_reason_has_a_test() -> None:
    assert set(CAUSES) | set(ELSEWHERE) == set(Reason)


@pytest.mark.parametrize(("reason", "model"), CAUSES.items(), ids=lambda v: getattr(v, "name", ""))
def test_a_norm_that_is_left_alone_has_reason_node_module_and_line(reason: Reason, model: Model) -> None:
    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    got, backend = run(Named(model), *args)
    assert_equal(got, model(*args))
    assert reason.name in [site.reason_name for site in backend.report.missed]
    for site in backend.report.missed:
        assert_tells_all(site)


UNKNOWN_NORMS: dict[str, tuple[Model, str]] = {
    "normalize": (lambda x: F.normalize(x, dim=-1) * 4, "MEAN"),
    "norm": (lambda x: x / (x.norm(2, -1, keepdim=True) * x.shape[-1] ** -0.5 + EPS), "MEAN"),
    "clamped": (lambda x: x * x.float().pow(2).mean(-1, keepdim=True).clamp_min(EPS).rsqrt().to(x.dtype), "MEAN"),
    "einsum": (lambda x: x * (torch.einsum("bsd,bsd->bs", x, x)[..., None] / 16 + EPS).rsqrt(), "MEAN"),
    "mean of magnitudes": (lambda x: x * (x.abs().mean(-1, keepdim=True) + EPS).rsqrt(), "MEAN"),
    "variance": (lambda x: (x - x.mean(-1, True)) * (x.var(-1, keepdim=True) + EPS).rsqrt(), "LAYER_NORM"),
    "deviation": (lambda x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + EPS), "LAYER_NORM"),
    "group norm": (lambda x: F.group_norm(x.transpose(1, 2), 4).transpose(1, 2), "DIMENSION"),
    "a root of a reciprocal": (lambda x: x * (1 / (x.float().pow(2).mean(-1, True) + EPS)).sqrt().to(x.dtype), "ROOT"),
    "a mean over everything": (lambda x: x * (x.float().pow(2).mean() + EPS).rsqrt().to(x.dtype), "DIMENSION"),
    "a sum over everything": (lambda x: x * (x.float().pow(2).sum() / 128 + EPS).rsqrt().to(x.dtype), "DIMENSION"),
    "an eps on the left": (lambda x: x * (torch.full((1, 1, 1), EPS) + (x * x).mean(-1, True)).rsqrt(), "MEAN"),
    "an eps of one dimension": (lambda x: x * (torch.full((1,), EPS) + (x * x).mean(-1, True)).rsqrt(), "EPS"),
    "a floor on the left": (lambda x: x * torch.maximum(x[0, 0, 0], (x * x).mean(-1, True)).rsqrt(), "MEAN"),
    "squares that are cast": (lambda x: x * ((x * x).float().mean(-1, True) + EPS).rsqrt().to(x.dtype), "ROUNDING"),
    "a power in 16 bits": (lambda x: x * ((x * x).mean(-1, True) + EPS) ** -0.5, "ROUNDING"),
    "a root cast before it divides": (
        lambda x: (x / ((x * x).mean(-1) + EPS).sqrt().double().unsqueeze(-1)).to(x.dtype),
        "ROOT",
    ),
    "a root turned before it divides": (
        lambda x: x / ((x * x).mean(-1, True) + EPS).sqrt().transpose(0, 1).contiguous().transpose(0, 1),
        "ROOT",
    ),
    "batch statistics": (lambda x: (x - x.mean(1, True)) * (x.var(1, keepdim=True) + EPS).rsqrt(), "DIMENSION"),
}


@pytest.mark.parametrize(("norm", "reason"), UNKNOWN_NORMS.values(), ids=UNKNOWN_NORMS)
def test_a_norm_that_is_none_of_ours_is_told_of_all_the_same(norm: Model, reason: str) -> None:
    def model(x, residual, gate, scale):
        return residual + gate.tanh() * norm(x)

    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    got, backend = run(Named(model), *args)
    assert_equal(got, run(model, *args, fuse=False)[0])
    assert backend.report.fused == []
    (site,) = backend.report.missed
    assert site.reason_name == reason
    assert_tells_all(site)


def a_root_of_no_sum(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.abs() + 1)


def a_root_of_statistics_that_are_given(x: Tensor) -> Tensor:
    return F.batch_norm(x.mT, x[0, :, 0].mean().expand(16), x[0, 0].abs(), eps=EPS).mT


def a_root_behind_a_norm(x: Tensor) -> Tensor:
    h = x - x.mean(-1, keepdim=True)
    return h * torch.rsqrt(1 + h * h * 0.5)


def a_measure_that_divides_nothing(x: Tensor) -> Tensor:
    return x * (x.float().pow(2).mean(-1, keepdim=True) + EPS).sqrt().to(x.dtype)


@pytest.mark.parametrize(
    "model",
    (a_root_of_no_sum, a_root_behind_a_norm, a_root_of_statistics_that_are_given, a_measure_that_divides_nothing),
)
def test_what_is_no_norm_is_not_told_of(model: Model) -> None:
    _, backend = run(model, *tensors((2, 4, 16)))
    assert backend.report.fused == backend.report.missed == []


def test_a_scaled_norm_that_only_inductors_kernel_reads_is_left_to_it() -> None:
    """Written to memory and read again it would cost more than the norm alone saves."""

    def model(x, residual, gate, scale):
        return residual + (diffusers_norm(x, None) * (1 + scale)).sin()

    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    got, backend = run(Named(model), *args)
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["FOLLOWED"]


def test_a_width_that_is_not_static_is_refused() -> None:
    torch.manual_seed(0)
    args = [torch.randn(2, 4, 16) for _ in range(3)]

    def model(x, residual, gate):
        return residual + gate.tanh() * diffusers_norm(x, None)

    _, backend = run(Named(model), *args, dynamic=True)
    (site,) = backend.report.missed
    assert site.reason_name == "WIDTH"
    assert_tells_all(site)


def test_a_scale_that_depends_on_y_is_what_stands_in_the_way_of_the_larger_site() -> None:
    _, backend = run(Named(the_scale_depends_on_y), *inputs(Spec()), kernels="auto")
    assert [site.reason_name for site in backend.report.missed] == ["NO_KERNEL", "ORDER"]
    for site in backend.report.missed:
        assert_tells_all(site)


def test_training_is_refused_with_the_norm() -> None:
    spec = Spec(weight=False)
    args = [a.requires_grad_() for a in inputs(spec)]
    backend = GraphBackend()
    torch.compile(Named(SiteModule(spec)), backend=backend)(*args)
    assert [site.reason_name for site in backend.report.missed] == ["TRAINING"] * 2
    for site in backend.report.missed:
        assert "rsqrt" in (site.reason or "")


def test_a_device_without_kernels_is_refused_with_the_norm() -> None:
    _, backend = run(Named(alone_with_a_residual), *inputs(Spec()), kernels="auto")
    (site,) = backend.report.missed
    assert site.reason_name == "NO_KERNEL"
    assert_tells_all(site)


def alone_with_a_residual(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    return residual + diffusers_norm(x, None)


@needs_casts
def test_a_sum_that_rounds_product_and_sum_at_once_is_told_from_a_shift() -> None:
    """ComfyUI and others modulate with addcmul(shift, norm, 1 + scale): no site, and nothing to warn of."""

    def modulated(x, residual, gate, scale):
        return torch.addcmul(gate, diffusers_norm(x, None), 1 + scale)

    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    for model, reason in ((the_sum_is_an_addcmul, "ROUNDING"), (modulated, "ALONE")):
        got, backend = run(model, *args)
        assert_equal(got, model(*args))
        assert [site.reason_name for site in backend.report.missed] == [reason]


# --- what does not pay -----------------------------------------------------------------------------------------------


def picked_by_token(a: Tensor, b: Tensor) -> Tensor:
    """As in Z-Image's blocks with two kinds of tokens."""
    mask = torch.arange(6)[:, None] < 4
    return torch.where(mask, a.tanh().expand(2, 6, 32), b.tanh().expand(2, 6, 32))


def picked_and_viewed(a: Tensor, b: Tensor) -> Tensor:
    return picked_by_token(a, b).view(2, 6, 2, 16).view(2, 6, 32)


def projected(a: Tensor, b: Tensor) -> Tensor:
    return picked_by_token(a, b) @ torch.eye(32, dtype=a.dtype)


def one_for_all_tokens(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > b, a.tanh(), b.tanh())


def a_part_of_more(a: Tensor, b: Tensor) -> Tensor:
    return (torch.cat((picked_by_token(a, b),) * 2, -1) * 2).chunk(2, dim=-1)[0]


def one_of_a_table(a: Tensor, b: Tensor) -> Tensor:
    """As in LTX and Wan 2.2: a table of all modulations plus those of each token."""
    return (torch.ones(1, 1, 2, 1, dtype=a.dtype) + projected(a, b).unsqueeze(2)).unbind(2)[1]


def a_part_of_a_projection(a: Tensor, b: Tensor) -> Tensor:
    return (picked_by_token(a, b) @ torch.eye(32, 64, dtype=a.dtype))[..., :32]


@pytest.mark.parametrize(
    ("gate_of", "fused"),
    (
        (picked_by_token, False),
        (picked_and_viewed, False),
        (a_part_of_more, False),
        (one_of_a_table, False),
        (projected, True),
        (a_part_of_a_projection, True),
        (one_for_all_tokens, True),
    ),
)
@pytest.mark.parametrize("where", ("gate", "scale"))
def test_a_gate_for_each_token_is_read_only_where_inductor_would_store_it_anyway(
    gate_of: Model, fused: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)

    def model(x, residual, a, b):
        if where == "gate":
            return residual + gate_of(a, b) * diffusers_norm(x, None)
        return diffusers_norm(x, None) * gate_of(a, b)

    args = tensors((2, 6, 32), (2, 6, 32), (2, 1, 32), (2, 1, 32))
    got, backend = run(model, *args, kernels="auto")
    assert_equal(got, model(*args))
    assert bool(backend.report.fused) == fused
    assert [site.reason_name for site in backend.report.missed] == ([] if fused else ["PER_TOKEN"])


@pytest.mark.parametrize("batch", (1, 2))
def test_gates_of_each_token_are_told_where_tokens_stand_first(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)

    def model(x, residual, a):
        return residual + (a * 2) * diffusers_norm(x, None)

    args = tensors(*((6, batch, 32) for _ in range(3)))
    got, backend = run(model, *args, kernels="auto")
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["PER_TOKEN"]


def test_a_shift_as_large_as_x_is_no_residual_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)

    def model(x, shift, scale):
        return shift.expand(x.shape).contiguous() + scale * diffusers_norm(x, None)

    args = tensors((2, 6, 32), (2, 1, 32), (2, 1, 32))
    got, backend = run(model, *args, kernels="auto")
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["PER_TOKEN"]


@pytest.mark.parametrize(("kernels", "fused"), (("auto", True), ("reference", False)))
def test_a_stream_that_lies_as_a_convolution_left_it_is_fused_where_kernels_run(
    kernels: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patch embedding of DiT, Mochi and others. On a CPU the order of a sum would be another."""
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)

    def model(image, x, gate):
        return image.flatten(2).transpose(1, 2) + gate.tanh() * diffusers_norm(x, None)

    args = tensors((2, 32, 2, 3), (2, 6, 32), (2, 1, 32))
    got, backend = run(model, *args, kernels=kernels)
    assert_equal(got, model(*args))
    assert [site.kind for site in backend.report.fused] == ["norm_tanh_mul_add"] * fused
    assert [site.reason_name for site in backend.report.missed] == ["LAYOUT"] * (not fused)


# --- what no kernel takes ---------------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


def a_subclass(val: Tensor) -> Tensor:
    return val.as_subclass(Subclass)


def sparse(val: Tensor) -> Tensor:
    return val.to_sparse()


def quantised(val: Tensor) -> Tensor:
    return torch.quantize_per_tensor(torch.ones(val.shape), 0.1, 0, torch.qint8)


def of_integers(val: Tensor) -> Tensor:
    return val.int()


def of_complex_numbers(val: Tensor) -> Tensor:
    return val.to(torch.complex64)


def elsewhere(val: Tensor) -> Tensor:
    return val.to("meta")


@pytest.mark.parametrize("operand", ("x", "residual", "gate", "weight"))
@pytest.mark.parametrize(
    ("kind", "reason"),
    (
        (a_subclass, "DTYPE"),
        (sparse, "DTYPE"),
        (quantised, "DTYPE"),
        (of_integers, "DTYPE"),
        (of_complex_numbers, "DTYPE"),
        (elsewhere, "DEVICE"),
    ),
)
def test_what_no_kernel_takes_is_refused_with_the_node(operand: str, kind: Callable[[Tensor], Tensor], reason) -> None:
    """Models do not trace to these with a norm around them, so the graph is told that an operand is one."""

    def model(x, residual, gate, weight):
        return residual + gate.tanh() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight)

    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (16,), dtype=FP32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(model, tracing_mode="fake")(*args).graph
    node = graph.find_nodes(op="placeholder")[("x", "residual", "gate", "weight").index(operand)]
    shape = node.meta["val"].shape
    node.meta["val"] = kind(torch.ones(shape))
    report = FusionReport()
    before = str(graph)
    FusionPass(kernels="reference", collector=report)(graph)
    assert report.fused == []
    assert str(graph) == before
    (site,) = report.missed
    accepted = {reason, "ROUNDING"} if operand == "x" else {reason}
    assert site.reason_name in accepted


def test_a_wrapper_subclass_is_fused_as_the_tensors_that_it_wraps() -> None:
    """AOTAutograd takes it apart before any pass sees it."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor

    def model(x, residual, gate):
        return residual + gate.tanh() * diffusers_norm(x, None)

    x, residual, gate = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16))
    wrapped = two_tensor(x, residual)
    got, backend = run(model, wrapped, residual, gate)
    expected = model(wrapped, residual, gate)
    assert torch.equal(got.a, expected.a) and torch.equal(got.b, expected.b)
    assert backend.report.counts() == {SINGLE: 2}


# --- how it is told ---------------------------------------------------------------------------------------------------


def test_strict_raises_with_the_text_of_the_report() -> None:
    args = inputs(Spec())
    module = Named(SiteModule(Spec(weight=False, second=False))).eval()
    reason = fusion_pass.explain(module, *args).missed[0]
    with pytest.raises(Exception, match=r"fusion_pass \(strict\)") as raised, torch.no_grad():
        torch.compile(module, backend=Backend(strict=True))(*args)
    for part in (reason.kind, reason.module, reason.source, reason.reason):
        assert str(part) in str(raised.value)


def test_explain_prints_a_missed_norm_with_module_reason_and_line() -> None:
    report = fusion_pass.explain(Named(alone).eval(), *inputs(Spec()), backend=Backend(kernels="reference"))
    text = str(report)
    for part in ("Missed: 1", "block.norm", Reason.ALONE.value, "site_modules.py:"):
        assert part in text


def test_a_site_that_is_found_and_refused_warns_once() -> None:
    graph_pass._warn_once.cache_clear()
    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run(the_norm_is_read_outside, *args)
    assert sum("a site was found and not fused" in str(w.message) for w in caught) == 1
