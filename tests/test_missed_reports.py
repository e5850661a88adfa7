"""The report lists each norm that is not fused, with the reason, the node, the module and the line."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_backend import GraphBackend, needs_casts, run
from graph_checks import Model, assert_equal, tensors
from site_modules import (
    EPS,
    SiteModule,
    Spec,
    a_layer_norm_by_hand,
    a_sine_follows_the_scale,
    another_tensor_is_squared,
    diffusers_norm,
    inputs,
    layer_norm,
    mean_over_another_dimension,
    sum_for_mean,
    the_root_is_rounded,
    the_scale_depends_on_y,
    the_sum_is_an_addcmul,
)
from torch import Tensor, nn

import fusion_pass
from dit_kernels.warn import warn_once
from fusion_pass import Backend
from fusion_pass.refusal import Reason
from fusion_pass.report import ReportedSite

# --- every reason -----------------------------------------------------------------------------------------------------


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
    Reason.FOLLOWED: a_sine_follows_the_scale,
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
    Reason.WIDTH: "test_a_norm_over_a_dynamic_width_is_reported",
    Reason.ORDER: "test_a_scale_that_depends_on_y_is_reported_with_the_reason_order",
    Reason.DEVICE: "tests/test_skipped_sites.py",
    Reason.MUTATION: "tests/test_graph_pass.py",
    Reason.TRAINING: "test_norms_in_a_training_graph_are_reported",
    Reason.PER_TOKEN: "tests/test_skipped_sites.py",
    Reason.NO_KERNEL: "test_a_norm_on_a_device_without_kernels_is_reported",
    Reason.ERROR: "tests/test_graph_pass.py",
    Reason.UNNORMED: "tests/test_attention_sites.py",
    Reason.HEADS: "tests/test_attention_sites.py",
    Reason.INLINE: "tests/test_attention_sites.py",
    Reason.ROTATION: "tests/test_left_to_inductor.py",
    Reason.ADDED: "tests/test_left_to_inductor.py",
    Reason.APART: "tests/test_reported_faults.py",
    Reason.SILU: "tests/test_attention_sites.py",
    Reason.QUANTISER: "tests/test_quantisers.py",
    Reason.MATMUL: "tests/test_linear_sites.py",
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
def test_a_norm_that_is_not_fused_is_reported_with_reason_node_module_and_line(reason: Reason, model: Model) -> None:
    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    got, backend = run(Named(model), *args)
    assert_equal(got, model(*args))
    assert reason.name in [site.reason_name for site in backend.report.missed]
    for site in backend.report.missed:
        assert_tells_all(site)


def test_a_norm_over_a_dynamic_width_is_reported() -> None:
    torch.manual_seed(0)
    args = [torch.randn(2, 4, 16) for _ in range(3)]

    def model(x, residual, gate):
        return residual + gate.tanh() * diffusers_norm(x, None)

    _, backend = run(Named(model), *args, dynamic=True)
    (site,) = backend.report.missed
    assert site.reason_name == "WIDTH"
    assert_tells_all(site)


def test_a_scale_that_depends_on_y_is_reported_with_the_reason_order() -> None:
    _, backend = run(Named(the_scale_depends_on_y), *inputs(Spec()), kernels="auto")
    assert [site.reason_name for site in backend.report.missed] == ["NO_KERNEL", "ORDER"]
    for site in backend.report.missed:
        assert_tells_all(site)


def test_norms_in_a_training_graph_are_reported() -> None:
    spec = Spec(weight=False)
    args = [a.requires_grad_() for a in inputs(spec)]
    backend = GraphBackend()
    torch.compile(Named(SiteModule(spec)), backend=backend)(*args)
    assert [site.reason_name for site in backend.report.missed] == ["TRAINING"] * 2
    for site in backend.report.missed:
        assert "rsqrt" in (site.reason or "")


def test_a_norm_on_a_device_without_kernels_is_reported() -> None:
    _, backend = run(Named(alone_with_a_residual), *inputs(Spec()), kernels="auto")
    (site,) = backend.report.missed
    assert site.reason_name == "NO_KERNEL"
    assert_tells_all(site)


def alone_with_a_residual(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
    return residual + diffusers_norm(x, None)


# --- norms of other kinds, and roots of no norm ---------------------------------------------------------------------


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
def test_a_norm_of_another_kind_is_reported(norm: Model, reason: str) -> None:
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
def test_a_root_that_belongs_to_no_norm_is_not_reported(model: Model) -> None:
    _, backend = run(model, *tensors((2, 4, 16)))
    assert backend.report.fused == backend.report.missed == []


def test_a_scaled_norm_is_skipped_if_only_a_kernel_of_inductor_reads_it() -> None:
    """To write its result to memory and read it again would cost more than the fused norm saves."""

    def model(x, residual, gate, scale):
        return residual + (diffusers_norm(x, None) * (1 + scale)).sin()

    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    got, backend = run(Named(model), *args)
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["FOLLOWED"]


@needs_casts
def test_an_addcmul_onto_a_residual_and_one_onto_a_shift_have_different_reasons() -> None:
    """ComfyUI and others modulate with addcmul(shift, norm, 1 + scale), which is no site."""

    def modulated(x, residual, gate, scale):
        return torch.addcmul(gate, diffusers_norm(x, None), 1 + scale)

    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    for model, reason in ((the_sum_is_an_addcmul, "ROUNDING"), (modulated, "ALONE")):
        got, backend = run(model, *args)
        assert_equal(got, model(*args))
        assert [site.reason_name for site in backend.report.missed] == [reason]


# --- strict, explain and warnings -------------------------------------------------------------------------------------


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
    text = " ".join(str(report).split())
    for part in ("Missed: 1", "block.norm", f"ALONE: {Reason.ALONE.value}", "site_modules.py:"):
        assert part in text


def test_a_matched_site_that_is_not_fused_warns_once() -> None:
    warn_once.cache_clear()
    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run(the_norm_is_read_outside, *args)
    assert sum("a site was found and not fused" in str(w.message) for w in caught) == 1
