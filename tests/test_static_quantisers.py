"""Quantisers with a static scale, and values that something else reads beside their quantiser: the overloads of the ops
that quantise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import quantized
import torch
import zimage
from graph_backend import GraphBackend, needs_casts, run
from graph_checks import BF16, FP32, options_of
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import FP8
from test_quantisers import (
    DUAL,
    ROWS,
    SCALED,
    SILU,
    SITES,
    arguments,
    assert_equal,
    bare,
    dual,
    fused_zimage,
    given_to,
    leaves,
    of_layers,
    scaled,
    silu,
)
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

import fusion_pass
from dit_kernels.families import OPS, op_of
from dit_kernels.rounding import StaticSteps
from fusion_pass.dataflow import aten
from fusion_pass.kinds import quantiser

FP16, FP64 = torch.float16, torch.float64
NAMES = (SCALED, DUAL, SILU)
Static = Callable[[Tensor, Tensor], Tensor]
Model = Callable[..., Any]


def called(backend: GraphBackend) -> list[str]:
    """The names of the ops in the graphs, with their overloads."""
    targets = [node.target for gm in backend.graphs for node in gm.graph.nodes if "dit_kernels" in str(node.target)]
    return [op_of(target).name for target in targets]


def with_scale(site: Model, quantise: Static) -> Model:
    """The model of a site, whose last argument is the static scale."""

    def model(*args: Tensor) -> Any:
        *given, scale = args
        return site(lambda z: quantise(z, scale))(*given)

    return model


# --- the forms of a static scale --------------------------------------------------------------------------------------


def torchao(z: Tensor, s: Tensor) -> Tensor:
    """torchao's Float8StaticActivationFloat8WeightConfig, where s has as many dimensions as z."""
    return (z.to(torch.float32) / s.reshape((1,) * z.ndim)).clamp(min=-448.0, max=448.0).to(FP8)


def comfyui(z: Tensor, s: Tensor) -> Tensor:
    """ComfyUI's scaled FP8 layers in plain PyTorch."""
    return (z * (1.0 / s).to(z.dtype)).reshape(-1, z.shape[-1]).to(FP8)


def comfyui_without_a_scale(z: Tensor, s: Tensor) -> Tensor:
    return torch.clamp(z, min=-448, max=448).reshape(-1, z.shape[-1]).to(FP8)


def by_a_given_reciprocal(z: Tensor, s: Tensor) -> Tensor:
    return torch.clamp(z * s, -448, 448).to(FP8)


def from_the_left(z: Tensor, s: Tensor) -> Tensor:
    return torch.clamp(s * z, -448, 448).to(FP8)


def divided(z: Tensor, s: Tensor) -> Tensor:
    return (z / s).to(FP8)


def by_its_reciprocal(z: Tensor, s: Tensor) -> Tensor:
    return (z.float() * s.reciprocal().expand(z.shape)).clamp(-448.0, 448.0).to(FP8)


def cast_alone(z: Tensor, s: Tensor) -> Tensor:
    return z.to(FP8)


def by_a_number(z: Tensor, s: Tensor) -> Tensor:
    return (z * 72.9).clamp(-448.0, 448.0).to(FP8)


def divided_by_a_number(z: Tensor, s: Tensor) -> Tensor:
    return (z.float() / 0.01371).to(FP8)


def steps(scaling: str, factor: torch.dtype, scaled: torch.dtype, clamp: bool = True) -> dict[str, Any]:
    return {"scaling": scaling, "factor_dtype": factor, "scaled_dtype": scaled, "clamp": clamp}


# A 0-d scale does not promote; one with a dimension does. On a CPU, the second operand of a product is not rounded.
STEPS: dict[tuple[Static, torch.dtype, int], dict[str, Any]] = {
    (torchao, FP32, 0): steps("quotient", FP32, FP32),
    (torchao, BF16, 1): steps("quotient", FP32, FP32),
    (comfyui, FP32, 0): steps("reciprocal", BF16, BF16, False),
    (comfyui, BF16, 0): steps("reciprocal", BF16, BF16, False),
    (comfyui_without_a_scale, FP32, 0): steps("quotient", FP32, FP32),
    (by_a_given_reciprocal, FP32, 0): steps("product", FP32, BF16),
    (by_a_given_reciprocal, FP32, 1): steps("product", FP32, FP32),
    (by_a_given_reciprocal, FP16, 0): steps("product", FP32, BF16),
    (by_a_given_reciprocal, FP16, 2): steps("product", FP32, FP32),
    (from_the_left, FP32, 0): steps("product", BF16, BF16),
    (divided, FP32, 0): steps("quotient", FP32, BF16, False),
    (divided, FP32, 2): steps("quotient", FP32, FP32, False),
    (divided, BF16, 1): steps("quotient", FP32, BF16, False),
    (by_its_reciprocal, FP32, 1): steps("reciprocal", FP32, FP32),
    (by_its_reciprocal, BF16, 0): steps("reciprocal", BF16, FP32),
    (cast_alone, FP32, 0): steps("quotient", FP32, FP32, False),
    (by_a_number, FP32, 0): steps("product", FP32, BF16),
    (divided_by_a_number, FP32, 0): steps("quotient", FP32, FP32, False),
}


def named(case: Any) -> str:
    return "-".join(getattr(part, "__name__", str(part).removeprefix("torch.")) for part in case)


def scale_of(dtype: torch.dtype, ndim: int, value: float = 0.01371) -> Tensor:
    return torch.full((1,) * ndim, value, dtype=dtype)


@needs_casts
@pytest.mark.parametrize("case", STEPS, ids=named)
def test_a_static_quantiser_becomes_the_overload_that_is_given_the_scale(
    case: tuple[Static, torch.dtype, int],
) -> None:
    quantise, dtype, ndim = case
    model, args = with_scale(silu, lambda z, s: [quantise(z, s) for _ in range(2)]), arguments()
    args = [*args, scale_of(dtype, ndim)]
    got, backend = run(model, *args, strict=True)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SILU: 1}
    assert (backend.report.missed, called(backend)) == ([], [f"{SILU}.static"])
    options = options_of(backend)
    assert {name: options[name] for name in STEPS[case]} == STEPS[case]
    assert backend.count(torch.ops.aten.reciprocal.default) == backend.count(torch.ops.aten.mul.Tensor) == 0


@needs_casts
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.__name__)
def test_every_op_takes_a_static_scale(site: Model) -> None:
    for quantise, dtype, dynamic in ((torchao, FP16, False), (comfyui, BF16, True)):
        model, args = with_scale(site, quantise), [*arguments(dtype), scale_of(FP32, 0)]
        got, backend = run(model, *args, dynamic=dynamic, strict=True)
        assert_equal(got, model(*args))
        assert called(backend) == [f"{SITES[site]}.static"]


def test_a_tensor_that_the_model_keeps_is_a_static_scale() -> None:
    kept = torch.nn.Parameter(torch.tensor([[0.3]]), requires_grad=False)
    model, args = silu(lambda z: torchao(z, kept)), arguments()
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert called(backend) == [f"{SILU}.static"]


@cache
def compiled(quantise: Static) -> tuple[Model, Model, GraphBackend]:
    model, backend = with_scale(silu, quantise), GraphBackend()
    return model, torch.compile(model, backend=backend, dynamic=True), backend


@needs_casts
@pytest.mark.parametrize("quantise", (torchao, comfyui, divided), ids=lambda form: form.__name__)
@settings(max_examples=4)
@given(
    dtype=st.sampled_from((BF16, FP16, FP32)),
    of_scale=st.sampled_from((BF16, FP32)),
    ndim=st.integers(0, 1),
    scale=st.sampled_from((0.01371, 1.0, 77.7, 2.0**-130, 2.0**-100, 3e38, 0.0, -0.5, float("inf"), float("nan"))),
    rows=st.lists(st.sampled_from(sorted(ROWS)), min_size=2, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_q_is_bit_equal_to_eager_for_rows_and_scales_of_all_sorts(
    quantise: Static, dtype: torch.dtype, of_scale: torch.dtype, ndim: int, scale: float, rows: list[str], seed: int
) -> None:
    model, fused, backend = compiled(quantise)
    generator = torch.Generator().manual_seed(seed)
    z = torch.stack([ROWS[row](generator, 16, dtype) for row in rows]).to(dtype)[None]
    x = torch.full_like(z, 100.0)
    for t in (x, z):
        torch._dynamo.mark_static(t, 2)
    args = (x, z, x, x, scale_of(of_scale, ndim, scale))
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        assert_equal(fused(*args), model(*args))
    assert backend.report.fused and {site.kind for site in backend.report.fused} == {SILU}
    assert set(called(backend)) == {f"{SILU}.static"}


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_a_gpu_rounds_a_0d_scale_first_and_a_cpu_only_from_the_left(device: str) -> None:
    def rounded(scale_first: bool, target: Any = aten.mul.Tensor) -> torch.dtype:
        graph, mode = Graph(), FakeTensorMode()

        def call(target: Any, *args: Any, like: torch.Size, dtype: torch.dtype) -> Node:
            node = graph.call_function(target, args) if target else graph.placeholder("given")
            with mode:
                node.meta["val"] = torch.empty(like, dtype=dtype, device=device)
            return node

        z, s = call(None, like=(3, 16), dtype=BF16), call(None, like=(), dtype=FP32)
        scaled = call(target, *((s, z) if scale_first else (z, s)), like=(3, 16), dtype=BF16)
        q = call(torch.ops.prims.convert_element_type.default, scaled, FP8, like=(3, 16), dtype=FP8)
        call(aten.mm.default, q, q, like=(3, 3), dtype=BF16)
        steps = quantiser.behind((z,), SILU).steps
        assert isinstance(steps, StaticSteps) and steps.scaled == BF16
        return steps.factor

    second = FP32 if device == "cpu" else BF16
    assert (rounded(True), rounded(False), rounded(False, aten.div.Tensor)) == (BF16, second, second)


# --- what must not match ----------------------------------------------------------------------------------------------


def a_computed_scale(z: Tensor, s: Tensor) -> Any:
    return (z.float() * (s * 2)).to(FP8)


def of_the_whole_tensor(z: Tensor, s: Tensor) -> Any:
    return (z.float() / (z.abs().amax().float() / 448.0)).to(FP8)


def to_e5m2(z: Tensor, s: Tensor) -> Any:
    return (z.float() / s).to(torch.float8_e5m2)


def a_reciprocal_of_a_rounded_scale(z: Tensor, s: Tensor) -> Any:
    return (z * (1.0 / s.to(BF16))).to(FP8)


def divided_by_the_reciprocal(z: Tensor, s: Tensor) -> Any:
    return (z / (1.0 / s)).to(FP8)


def rounded_again(z: Tensor, s: Tensor) -> Any:
    return (z.float() / s).to(BF16).clamp(-448, 448).to(FP8)


def rounded_to_two_formats(z: Tensor, s: Tensor) -> Any:
    return (s.to(FP16) * z).to(FP8)


def clamped_to_less(z: Tensor, s: Tensor) -> Any:
    return (z / s).clamp(-240.0, 240.0).to(FP8)


def shifted(z: Tensor, s: Tensor) -> Any:
    return (z / s + 1).to(FP8)


def scaled_twice(z: Tensor, s: Tensor) -> Any:
    return (z / s / s).to(FP8)


def in_fp64(z: Tensor, s: Tensor) -> Any:
    return (z.float() / s.double()).to(FP8)


def read_inside(z: Tensor, s: Tensor) -> Any:
    scaled = z.float() / s
    return scaled.to(FP8), scaled.sin()


def computed_with_at_once(z: Tensor, s: Tensor) -> Any:
    return (z.float() / s).to(FP8).float() * s


def scales_of_their_own(z: Tensor, s: Tensor) -> Any:
    return torchao(z, s), (z.float() / OTHER).clamp(-448.0, 448.0).to(FP8)


def static_and_dynamic(z: Tensor, s: Tensor) -> Any:
    return torchao(z, s), *quantized.torchao(z)


OTHER = torch.tensor(0.5)
REFUSED: dict[Static, str] = {
    a_computed_scale: "steps",
    of_the_whole_tensor: "one scale for each row",
    to_e5m2: "to float8_e5m2",
    a_reciprocal_of_a_rounded_scale: "steps",
    divided_by_the_reciprocal: "steps",
    rounded_again: "steps",
    rounded_to_two_formats: "steps",
    clamped_to_less: "steps",
    scaled_twice: "one scale for each row",
    in_fp64: "one scale for each row",
    read_inside: "something else reads a value inside the quantiser",
    computed_with_at_once: "Inductor computes with the quantised rows",
    scales_of_their_own: "have static scales of their own",
    static_and_dynamic: "quantise it in different ways",
}


@needs_casts
@pytest.mark.parametrize(
    ("site", "quantise"),
    [(silu, quantise) for quantise in REFUSED] + [(site, scales_of_their_own) for site in (scaled, dual)],
    ids=lambda value: value.__name__,
)
def test_another_static_quantiser_is_refused_with_the_reason(site: Model, quantise: Static) -> None:
    model, args = with_scale(site, quantise), [*arguments(), scale_of(FP32, 0)]
    got, backend = run(model, *args, strict=True)
    assert_equal(got, model(*args))
    assert backend.report.counts() == ({"norm_tanh_mul_add": 1} if site is dual else {})
    ((kind, reason),) = [(s.kind, s.reason) for s in backend.report.missed if s.reason_name == "QUANTISER"]
    assert kind == SITES[site]
    assert REFUSED[quantise] in reason, reason


@pytest.mark.parametrize("shape", ((16,), (2, 1, 1), (2, 5, 1)), ids=("channels", "batch items", "tokens"))
def test_a_static_scale_of_several_elements_is_refused(shape: tuple[int, ...]) -> None:
    model, args = with_scale(silu, lambda z, s: (z.float() / s).to(FP8)), [*arguments(), torch.rand(shape)]
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    (row,) = [site for site in backend.report.missed if site.reason_name == "QUANTISER"]
    assert "its static scale has more than one element" in row.reason


def test_a_rotation_in_between_reads_the_value_from_memory() -> None:
    turn = torch.linalg.qr(torch.randn(16, 16))[0].to(BF16)
    model, args = with_scale(silu, lambda z, s: torchao(z @ turn, s)), [*arguments(), scale_of(FP32, 0)]
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert called(backend) == ["silu_mul"]


# --- values that something else reads ---------------------------------------------------------------------------------


def one_layer_in_bf16(z: Tensor, s: Tensor) -> Any:
    return quantized.torchao(z), z @ z.mT


def several_layers_in_bf16(z: Tensor, s: Tensor) -> Any:
    """The rows of all layers are the same view."""
    rows = z.reshape(-1, z.shape[-1])
    return [rows @ rows.mT, quantized.torchao(rows), quantized.torchao(rows), rows[:2] @ rows.mT]


def a_static_layer_and_one_in_bf16(z: Tensor, s: Tensor) -> Any:
    return z @ z.mT, comfyui(z, s)


def returned(z: Tensor, s: Tensor) -> Any:
    return z, quantized.by_hand(z), z.float().sin()


KEPT: dict[Static, str] = {
    one_layer_in_bf16: "keep_z",
    several_layers_in_bf16: "keep_z",
    a_static_layer_and_one_in_bf16: "static_keep_z",
    returned: "keep_z",
}


@needs_casts
@pytest.mark.parametrize(
    ("site", "quantise"),
    [(silu, quantise) for quantise in KEPT] + [(site, several_layers_in_bf16) for site in (scaled, dual, bare)],
    ids=lambda value: value.__name__,
)
def test_a_value_that_is_read_from_memory_is_returned_beside_q(site: Model, quantise: Static) -> None:
    model, args = with_scale(site, quantise), [*arguments(), scale_of(FP32, 0)]
    got, backend = run(model, *args, strict=True)
    assert_equal(got, model(*args))
    assert called(backend) == [f"{SITES[site]}.{KEPT[quantise]}"]
    assert backend.report.counts() == {SITES[site]: 1}
    assert [site.remark for site in backend.report.fused] == [""]


def pointwise(z: Tensor) -> Any:
    return quantized.torchao(z), z.sin()


def joined(z: Tensor) -> Any:
    return quantized.torchao(z), torch.cat((z, torch.ones_like(z)), 1)


@needs_casts
@pytest.mark.parametrize("quantise", (pointwise, joined), ids=lambda quantise: quantise.__name__)
@pytest.mark.parametrize("site", (scaled, dual, silu), ids=lambda site: site.__name__)
def test_a_value_that_inductor_would_not_store_is_not_returned(site: Model, quantise: Model) -> None:
    model, args = site(quantise), arguments()
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert not [name for name in called(backend) if "_quant" in name]
    (row,) = [site for site in backend.report.missed if site.reason_name == "QUANTISER"] or [None]
    remarks = [site.remark for site in backend.report.fused]
    assert "something else reads the value" in (row.reason if row else "".join(remarks))


def test_a_scale_that_something_else_reads_leaves_the_value_to_the_op_without_the_quantiser() -> None:
    def quantise(z: Tensor) -> Any:
        q, s = quantized.torchao(z)
        return q, s, s.sin(), z @ z.mT

    model, args = silu(quantise), arguments()
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert called(backend) == ["silu_mul"]


# --- whole models -----------------------------------------------------------------------------------------------------


@needs_casts
def test_zimage_whose_first_layers_stay_in_bf16_returns_z_and_q() -> None:
    def chosen(name: str) -> bool:
        return of_layers(name) and not name.endswith(("to_q", "w1"))

    model = quantized.quantize_(zimage.model(layers=1, refiners=0), quantized.torchao, chosen)
    backend = fused_zimage(model)
    counts = zimage.expected_counts(layers=1, refiners=0)
    names = called(backend)
    assert names.count(f"{DUAL}.keep_z") == counts["norm_tanh_mul_add_norm_scale"]
    assert names.count(f"{SCALED}.keep_z") == counts["norm_scale"] - 1
    assert names.count(SILU) == counts["linear_silu_mul"]
    assert {site.remark for site in backend.report.fused} == {""}


@needs_casts
def test_zimage_quantised_by_torchao_with_static_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.quantization import quant_api
    from torchao.quantization import quantize_

    checks = {"_check_hardware_support": lambda granularities: None, "_fp8_mm_compat": lambda weight: True}
    for name, module in list(sys.modules.items()):
        for check in checks.keys() & set(vars(module) if name.startswith("torchao") else ()):
            monkeypatch.setattr(module, check, checks[check])
    config = quant_api.Float8StaticActivationFloat8WeightConfig(act_quant_scale=torch.full((1, 1, 1), 0.02))
    model = zimage.model(layers=1, refiners=0)
    quantize_(model, config, lambda module, name: isinstance(module, torch.nn.Linear) and of_layers(name))
    backend = fused_zimage(model)
    counts = zimage.expected_counts(layers=1, refiners=0)
    assert called(backend).count(f"{SILU}.static") == counts["linear_silu_mul"]
    # Each layer has a tensor of its own for its scale, and several layers read what a norm returns.
    own = [site for site in backend.report.missed if "static scales of their own" in site.reason]
    assert len(own) == counts["norm_tanh_mul_add_norm_scale"] + counts["norm_scale"] - 1


# --- the ops by hand --------------------------------------------------------------------------------------------------

OVERLOADS = ("keep_z", "static", "static_keep_z")
STATIC_OPTIONS = steps("reciprocal", BF16, BF16, False)


def given_to_overload(name: str, overload: str, dtype: torch.dtype = BF16, eps: Any = 1e-5) -> tuple[Any, ...]:
    return (*given_to(name, dtype, eps), *([scale_of(FP32, 0)] if overload.startswith("static") else []))


@pytest.mark.parametrize("overload", OVERLOADS)
@pytest.mark.parametrize("name", NAMES)
def test_an_overload_passes_opcheck(name: str, overload: str) -> None:
    op = OPS[f"{name}.{overload}"]
    given = given_to_overload(name, overload)
    torch.library.opcheck(op.overload(), given)
    if overload == "static":
        torch.library.opcheck(op.overload(), (*given[:-1], None), STATIC_OPTIONS)
    if op.has_eps and overload == "static_keep_z":
        torch.library.opcheck(op.overload(eps_tensor=True), given_to_overload(name, overload, FP32, torch.tensor(1e-5)))


@pytest.mark.parametrize("name", NAMES)
def test_results_are_in_the_order_y_z_q_s(name: str) -> None:
    plain = OPS[name.removesuffix("_quant")]
    *first, z = leaves(plain.overload()(*given_to(name)))
    static = given_to_overload(name, "static")
    s = static[-1]
    q = comfyui(z, s).view(z.shape)
    assert_equal(OPS[f"{name}.keep_z"].overload()(*given_to(name)), (*first, z, *quantized.torchao(z)))
    assert_equal(OPS[f"{name}.static"].overload()(*static, **STATIC_OPTIONS), (*first, q))
    assert_equal(OPS[f"{name}.static_keep_z"].overload()(*static, **STATIC_OPTIONS), (*first, z, q))
    assert_equal(OPS[f"{name}.static"].overload()(*static), (*first, torchao(z, s)))


@pytest.mark.parametrize("overload", OVERLOADS)
@pytest.mark.parametrize("name", NAMES)
def test_an_overload_has_no_gradient(name: str, overload: str) -> None:
    op, (x, *others) = OPS[f"{name}.{overload}"].overload(), given_to_overload(name, overload, FP32)
    with pytest.raises(RuntimeError, match=f"{name}.{overload}: a gradient is needed, and this op has none"):
        op(x.clone().requires_grad_(), *others)
    with torch.no_grad():
        op(x.clone().requires_grad_(), *others)


@pytest.mark.parametrize(
    ("scale", "options", "expected"),
    (
        (torch.ones(2), {}, r"static_scale.shape is \[2\], expected one element"),
        (torch.ones(2, 5, 1), {}, r"static_scale.shape is \[2, 5, 1\], expected one element"),
        (torch.ones(1, dtype=torch.int64), {}, "static_scale.dtype is torch.int64, expected bfloat16"),
        (torch.ones((), device="meta"), {}, "static_scale.device is meta, expected cpu"),
        (torch.ones(()), {"scaling": "divide"}, "scaling is 'divide', expected 'quotient', 'reciprocal', 'product'"),
        (torch.ones(()), {"factor_dtype": FP8}, "factor_dtype is torch.float8_e4m3fn, expected bfloat16"),
    ),
)
def test_a_bad_static_scale_or_option_is_named(scale: Tensor, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"silu_mul_quant.static: {expected}"):
        torch.ops.dit_kernels.silu_mul_quant.static(*given_to(SILU), scale, **options)


def test_the_definition_takes_fp64() -> None:
    a, b = given_to(SILU, FP64)
    z, q = torch.ops.dit_kernels.silu_mul_quant.static_keep_z(a, b, scale_of(FP64, 0))
    assert_equal(q, torchao(z, scale_of(FP32, 0)))


def test_inductors_code_calls_the_overload_directly() -> None:
    def model(x: Tensor, residual: Tensor, scale: Tensor) -> Any:
        z, other = torch.nn.functional.silu(x) * residual, torch.nn.functional.silu(residual) * x
        return torchao(z, scale), by_a_number(other, scale), z @ z.mT

    args = (*arguments()[:2], scale_of(FP32, 0))
    with fresh_cache(), torch.no_grad():
        compiled = torch.compile(model, backend=fusion_pass.Backend(kernels="reference"))
        got, (code,) = run_and_get_code(compiled, *args)
    assert_equal(got[:2], model(*args)[:2])
    assert "DirectCall('silu_mul_quant.static_keep_z', " in code
    assert "DirectCall('silu_mul_quant.static', " in code
    assert "constant0.data_ptr()" in code  # the number is kept, and not written by a kernel
