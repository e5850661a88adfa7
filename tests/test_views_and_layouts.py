"""The pass fuses through views and copies, and changes neither an element nor the order of a sum."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_backend import CASTS_ARE_KEPT, GraphBackend, run
from graph_checks import BF16, DUAL, FP32, SINGLE, Model, assert_equal, tensors
from site_modules import EPS, diffusers_norm, eps_of_torch, layer_norm
from torch import Tensor

from fusion_pass import Backend, eligibility

# --- views ------------------------------------------------------------------------------------------------------------


def views_of_the_same_shape(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    n = diffusers_norm(x.view_as(x), None).contiguous().detach()
    y = residual.view_as(x) + F.dropout(gate[:, 0].tanh() * n, 0.1, training=False)
    return y, diffusers_norm(y, None) * (1 + scale[:, 0])


def gated_by_frames(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    """As in video models, where each frame of tokens has its own gate and scale."""
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
def test_a_site_is_fused_through_views_between_its_parts(model: Model, dynamic: bool) -> None:
    if model is a_view_between_two_casts and not CASTS_ARE_KEPT:
        pytest.skip("torch 2.11's own passes drop a cast of this model")
    args = tensors((2, 6, 32), (2, 6, 32), (2, 2, 1, 32), (2, 2, 1, 32))
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {DUAL: 1}


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_compiled_site_with_views_runs_with_another_number_of_tokens(dynamic: bool) -> None:
    compiled = torch.compile(gated_by_frames, backend=Backend(kernels="reference", strict=True), dynamic=dynamic)
    for tokens in (6, 10):
        args = tensors((2, tokens, 32), (2, tokens, 32), (2, 2, 1, 32), (2, 2, 1, 32))
        assert_equal(compiled(*args), gated_by_frames(*args))


def test_a_scale_is_fused_if_the_model_reads_sizes_from_a_view() -> None:
    """x and residual have symbols of their own, so `flatten` reads its sizes from the view."""

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
def test_a_site_is_not_fused_through_a_view_that_changes_its_rows(model: Model) -> None:
    args = tensors((2, 6, 32), (2, 6, 32), (2, 1, 32))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.fused == []
    assert [site.reason_name for site in backend.report.missed] == ["ALONE"]


def test_a_select_after_a_cast_leaves_no_dead_node_in_the_graph() -> None:
    def model(x, residual, gate):
        wide = x.float()[:, 0]
        n = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return residual + gate.tanh() * n

    args = tensors((2, 1, 6, 48), (2, 6, 48), (2, 1, 48))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SINGLE: 1}
    assert not [n for n in backend.graphs[0].graph.nodes if n.op == "call_function" and not n.users]


# --- memory layout ----------------------------------------------------------------------------------------------------


def a_copy_of_channels(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def a_wide_copy_of_channels(x: Tensor) -> Tensor:
    return x.transpose(1, 2).float().contiguous()


def a_copy_of_cropped_rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2)[:, 1:-1].reshape(-1, x.shape[1])[None]


COPIES = (a_copy_of_channels, a_wide_copy_of_channels, a_copy_of_cropped_rows)
NORMS = (diffusers_norm, eps_of_torch, layer_norm)


@pytest.mark.parametrize(
    ("copy", "norm", "dtype"),
    [(copy, norm, dtype) for (copy, norm), dtype in zip(product(COPIES, NORMS), cycle((BF16, FP32)))],
)
def test_a_norm_of_rows_that_a_copy_made_contiguous_is_fused_and_sums_as_eager_does(
    copy: Model, norm: Model, dtype: torch.dtype
) -> None:
    """A CPU sums a row that is not contiguous in another order."""

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
    ("model", "dtype"),
    (
        (rows_apart_in_another_shape, BF16),
        (rows_apart_scaled_in_another_shape, FP32),
        (a_copy_between_the_two_norms, BF16),
        (a_copy_between_the_two_norms, FP32),
        (a_residual_whose_rows_lie_apart, FP32),
        (a_residual_of_rows_apart_on_the_left, BF16),
    ),
)
def test_rows_that_are_not_contiguous_are_summed_in_the_same_order_as_unfused(model: Model, dtype: torch.dtype) -> None:
    args = tensors((2, 500, 96), (2, 96, 500), (1, 1, 500), dtype=dtype)
    got, _ = run(model, *args)
    assert_equal(got, run(model, *args, fuse=False)[0])


@pytest.mark.parametrize(("kernels", "fused"), (("auto", True), ("reference", False)))
def test_a_residual_in_the_layout_of_a_convolution_is_fused_only_with_kernels(
    kernels: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the patch embedding of DiT, Mochi and others. The definition on a CPU would sum in another order."""
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)

    def model(image, x, gate):
        return image.flatten(2).transpose(1, 2) + gate.tanh() * diffusers_norm(x, None)

    args = tensors((2, 32, 2, 3), (2, 6, 32), (2, 1, 32))
    got, backend = run(model, *args, kernels=kernels)
    assert_equal(got, model(*args))
    assert [site.kind for site in backend.report.fused] == ["norm_tanh_mul_add"] * fused
    assert [site.reason_name for site in backend.report.missed] == ["LAYOUT"] * (not fused)
