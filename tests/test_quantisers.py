"""Quantisers to FP8 behind norms and SwiGLU: which are matched, bit-equality to eager, what must not match."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import quantized
import torch
import torch.nn.functional as F
import zimage
from graph_backend import GraphBackend, needs_casts, run
from graph_checks import BF16, FP32, options_of, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from long import only_long
from quantized import FP8, Quantise
from site_modules import diffusers_norm
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.autograd import forward_ad

import fusion_pass
from dit_kernels.families import OPS, family
from fusion_pass import eligibility
from fusion_pass.dataflow import aten
from fusion_pass.graph_pass import REGISTRY

SCALED, DUAL, SILU = "norm_scale_quant", "norm_tanh_mul_add_norm_scale_quant", "silu_mul_quant"
Model = Callable[..., Any]


def scaled(quantise: Model) -> Model:
    return lambda x, residual, gate, scale: quantise(diffusers_norm(x, None) * (1 + scale))


def dual(quantise: Model) -> Model:
    def model(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
        y = residual + gate.tanh() * diffusers_norm(x, None)
        return y, quantise(diffusers_norm(y, None) * (1 + scale))

    return model


def bare(quantise: Model) -> Model:
    def model(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Any:
        y = residual + diffusers_norm(x, None)
        return y, quantise(diffusers_norm(y, None))

    return model


def silu(quantise: Model) -> Model:
    return lambda x, residual, gate, scale: quantise(F.silu(x) * residual)


SITES = {scaled: SCALED, dual: DUAL, bare: DUAL, silu: SILU}


def arguments(dtype: torch.dtype = BF16, tokens: tuple[int, ...] = (2, 5), width: int = 16) -> list[Tensor]:
    rows, item = (*tokens, width), (tokens[0], *(len(tokens) - 1) * (1,), width)
    return tensors(rows, rows, item, item, dtype=dtype)


def leaves(results: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(results)


def assert_equal(got: Any, expected: Any) -> None:
    """Bit by bit, also the sign of zeros; any NaN equals any other."""
    for ours, eager in zip(leaves(got), leaves(expected), strict=True):
        assert (ours.dtype, ours.shape) == (eager.dtype, eager.shape)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[eager.element_size()]
        nan = eager.float().isnan()
        assert torch.equal(ours.float().isnan(), nan)
        assert torch.equal(ours.contiguous().view(bits)[~nan], eager.contiguous().view(bits)[~nan])


# --- what is matched --------------------------------------------------------------------------------------------------

STEPS: dict[Quantise, dict[str, Any]] = {
    quantized.torchao: {"s_dtype": BF16},
    quantized.by_hand: {"s_dtype": FP32, "smallest_scale": 1e-12},
    quantized.by_reciprocal: {"s_dtype": FP32, "smallest_amax": 1e-5, "reciprocal": True, "clamp": False},
    quantized.without_a_dimension: {"s_dtype": BF16, "smallest_amax": 1e-4, "reciprocal": True},
    quantized.with_a_least_rounded_scale: {"s_dtype": BF16, "smallest_scale": 1e-3, "clamp": False},
}
DEFAULTS = {"fmax": 448.0, "smallest_amax": None, "smallest_scale": None, "reciprocal": False, "clamp": True}


@needs_casts
@pytest.mark.parametrize(
    ("form", "site"),
    [(form, silu) for form in STEPS] + list(zip(STEPS, (scaled, dual, bare, scaled, dual), strict=True)),
    ids=lambda value: value.__name__,
)
def test_the_quantisers_of_several_layers_become_one_op(form: Quantise, site: Model) -> None:
    model, args = site(lambda z: [form(z) for _ in range(3)]), arguments()
    got, backend = run(model, *args, strict=True)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SITES[site]: 1}
    assert backend.report.missed == []
    expected = DEFAULTS | STEPS[form]
    for name in ("smallest_amax", "smallest_scale"):
        least = expected[name]
        in_scale = BF16 if least is not None and least > 1e-4 else FP32  # where the clamp is, in these forms
        dtype = BF16 if form is quantized.without_a_dimension else in_scale if name == "smallest_scale" else FP32
        expected[name] = None if least is None else torch.tensor(least, dtype=dtype).item()
    options = options_of(backend)
    assert {name: options[name] for name in expected} == expected
    assert backend.count(torch.ops.prims.convert_element_type.default) == 0


DTYPES = (BF16, torch.float16, FP32)
SHAPES = (
    (quantized.torchao, (2, 2, 3), 17, False),
    (quantized.torchao, (11,), 1, False),
    (quantized.without_a_dimension, (2, 5), 16, True),
)


@needs_casts
@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize(("j", "site"), enumerate(SITES), ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_dtype_and_shape(i: int, j: int, site: Model) -> None:
    """Each site in each dtype and each shape, and each dtype in each shape at one of the sites."""
    dtype, (form, tokens, width, dynamic) = DTYPES[i], SHAPES[(i + j) % 3]
    model, args = site(form), arguments(dtype, tokens, width)
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SITES[site]: 1}, backend.report


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.__name__)
def test_under_the_policy_fp32_the_quantiser_keeps_its_steps(site: Model) -> None:
    got, backend = run(site(quantized.torchao), *arguments(), rounding="fp32")
    options = options_of(backend)
    assert (options["rounding"], options["s_dtype"]) == ("fp32", BF16)
    assert {name: options[name] for name in DEFAULTS} == DEFAULTS
    assert leaves(got)[-2].dtype == FP8


# --- values -----------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[torch.Generator, int, torch.dtype], Tensor]] = {
    "normal": lambda g, d, dtype: torch.randn(d, generator=g),
    "zeros": lambda g, d, dtype: torch.zeros(d) * torch.randn(d, generator=g).sign(),
    "nan": lambda g, d, dtype: torch.randn(d, generator=g).index_fill(0, torch.tensor([d // 2]), float("nan")),
    "infinity": lambda g, d, dtype: torch.randn(d, generator=g).index_fill(0, torch.tensor([d - 1]), float("inf")),
    "subnormal": lambda g, d, dtype: torch.randn(d, generator=g) * torch.finfo(dtype).smallest_normal / 8,
    "smallest": lambda g, d, dtype: torch.randn(d, generator=g).sign() * torch.finfo(dtype).smallest_normal * 2**-6,
    "largest": lambda g, d, dtype: torch.randn(d, generator=g).sign() * torch.finfo(dtype).max,
    "one element": lambda g, d, dtype: torch.zeros(d).index_fill(0, torch.tensor([0]), 448.0),
    "ends of bytes": lambda g, d, dtype: torch.arange(-(d // 2), d - d // 2) * 448.0 / max(d // 2, 1),
    "far apart": lambda g, d, dtype: torch.randn(d, generator=g) * 2.0 ** torch.randint(-14, 14, (d,), generator=g),
}


@cache
def compiled(form: Quantise, dtype: torch.dtype, width: int) -> tuple[Model, Model, GraphBackend]:
    """silu(x) * residual, quantised: where silu(x) is x, the quantiser sees any value."""
    model, backend = silu(form), GraphBackend()
    return model, torch.compile(model, backend=backend, dynamic=True), backend


@needs_casts
@pytest.mark.parametrize("form", STEPS, ids=lambda form: form.__name__)
@settings(max_examples=6)
@given(
    dtype=st.sampled_from((BF16, torch.float16, FP32)),
    width=st.sampled_from((16, 17)),
    rows=st.lists(st.sampled_from(sorted(ROWS)), min_size=2, max_size=6),
    batch=st.integers(1, 3),
    factor=st.sampled_from((1.0, 100.0, 2.0**-10)),
    seed=st.integers(0, 2**16),
)
def test_q_and_s_are_bit_equal_to_eager_for_rows_of_all_sorts(
    form: Quantise, dtype: torch.dtype, width: int, rows: list[str], batch: int, factor: float, seed: int
) -> None:
    model, fused, backend = compiled(form, dtype, width)
    generator = torch.Generator().manual_seed(seed)
    z = torch.stack([ROWS[row](generator, width, dtype) for _ in range(batch) for row in rows]).to(dtype)
    z = z.reshape(batch, len(rows), width)
    x = torch.full_like(z, factor)
    args = (x, z, x, x)
    for t in (x, z):
        torch._dynamo.mark_static(t, 2)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):  # of one lambda, for all forms
        assert_equal(fused(*args), model(*args))
    assert backend.report.fused and {site.kind for site in backend.report.fused} == {SILU}


# --- what must not match ----------------------------------------------------------------------------------------------


def per_tensor(z: Tensor) -> Any:
    s = (z.abs().amax() / 448.0).float()
    return (z.float() / s).clamp(-448.0, 448.0).to(FP8), s


def per_block(z: Tensor) -> Any:
    blocks = z.unflatten(-1, (2, -1))
    s = blocks.abs().amax(-1, keepdim=True).float() / 448.0
    return (blocks / s).clamp(-448.0, 448.0).to(FP8).flatten(-2), s


def over_tokens(z: Tensor) -> Any:
    s = z.abs().amax(1, keepdim=True).float() / 448.0
    return (z / s).to(FP8), s


def to_e5m2(z: Tensor) -> Any:
    s = z.abs().amax(-1, keepdim=True).float() / 57344.0
    return (z / s).to(torch.float8_e5m2), s


def in_bf16(z: Tensor) -> Any:
    s = z.abs().amax(-1, keepdim=True) / 448.0
    return (z / s).to(FP8), s.float()


def rounded_again(z: Tensor) -> Any:
    s = (z.abs().amax(-1, keepdim=True) / 448.0).float()
    return (z.float() / s).bfloat16().to(FP8), s


def an_unequal_clamp(z: Tensor) -> Any:
    s = (z.abs().amax(-1, keepdim=True) / 448.0).float()
    return (z.float() / s).clamp(-448.0, 240.0).to(FP8), s


def clamped_to_the_wrong_side(z: Tensor) -> Any:
    s = (z.abs().amax(-1, keepdim=True) / 448.0).float()
    return (z.float() / s).clamp(min=448.0).clamp(max=-448.0).to(FP8), s


def an_eps_is_added(z: Tensor) -> Any:
    s = z.abs().amax(-1, keepdim=True).float() / 448.0 + 1e-6
    return (z / s).to(FP8), s


def a_largest_amax(z: Tensor) -> Any:
    s = z.abs().amax(-1, keepdim=True).float().clamp(1e-6, 1200.0) / 448.0
    return (z / s).to(FP8), s


def the_reciprocal_comes_first(z: Tensor) -> Any:
    inverse = 448.0 / z.abs().amax(-1, keepdim=True).float()
    return (z * inverse).to(FP8), inverse.reciprocal()


def divided_by_a_number_that_rounds(z: Tensor) -> Any:
    s = (z.abs().amax(-1, keepdim=True) / 447.3).float()
    return (z.float() / s).to(FP8), s


def divided_twice(z: Tensor) -> Any:
    s = z.abs().amax(-1, keepdim=True).float() / 448.0 / 2.0
    return (z / s).to(FP8), s


def a_scale_of_another_value(z: Tensor) -> Any:
    s = z.sin().abs().amax(-1, keepdim=True).float() / 448.0
    return (z / s).to(FP8), s


def the_scale_is_read_elsewhere(z: Tensor) -> Any:
    q, s = quantized.torchao(z)
    return q, s, (s * 2).sin()


def the_amax_is_read_elsewhere(z: Tensor) -> Any:
    amax = z.abs().amax(-1, keepdim=True)
    s = (amax / 448.0).float()
    return (z.float() / s).to(FP8), s, amax


def computed_with_at_once(z: Tensor) -> Any:
    q, s = quantized.torchao(z)
    return q.float() * s


def two_ways(z: Tensor) -> Any:
    return quantized.torchao(z), quantized.by_hand(z)


REFUSED: dict[Model, str] = {
    per_tensor: "one scale for each row",
    per_block: "one scale for each row",
    over_tokens: "one scale for each row",
    to_e5m2: "to float8_e5m2",
    in_bf16: "steps",
    rounded_again: "steps",
    an_unequal_clamp: "steps",
    clamped_to_the_wrong_side: "steps",
    an_eps_is_added: "one scale for each row",
    a_largest_amax: "one scale for each row",
    the_reciprocal_comes_first: "steps",
    divided_by_a_number_that_rounds: "steps",
    divided_twice: "steps",
    a_scale_of_another_value: "one scale for each row",
    the_scale_is_read_elsewhere: "something other than the matmul reads the scale",
    the_amax_is_read_elsewhere: "something else reads a value inside the quantiser",
    computed_with_at_once: "Inductor computes with the quantised rows",
    two_ways: "quantise it in different ways",
}


@needs_casts
@pytest.mark.parametrize(
    ("site", "quantise"),
    [(scaled, quantise) for quantise in REFUSED] + [(site, q) for site in (dual, silu) for q in (per_tensor, two_ways)],
    ids=lambda value: value.__name__,
)
def test_another_quantiser_leaves_the_site_as_it_is_and_is_reported(site: Model, quantise: Model) -> None:
    model, args = site(quantise), arguments()
    got, backend = run(model, *args, strict=True)  # by design: no error
    assert_equal(got, model(*args))
    assert backend.report.counts() == ({"norm_tanh_mul_add": 1} if site is dual else {})
    ((kind, reason),) = [(s.kind, s.reason) for s in backend.report.missed if s.reason_name == "QUANTISER"]
    assert kind == SITES[site]
    assert REFUSED[quantise] in reason, reason


def without_abs(z: Tensor) -> Any:
    s = z.amax(-1, keepdim=True).float() / 448.0
    return (z / s).to(FP8), s


STORED = {without_abs: "it does not compute one scale for each row"}


@pytest.mark.parametrize("quantise", STORED, ids=lambda quantise: quantise.__name__)
@pytest.mark.parametrize("site", (scaled, dual, silu), ids=lambda site: site.__name__)
def test_a_value_that_is_stored_anyway_is_fused_and_the_remark_names_the_quantiser(
    site: Model, quantise: Model
) -> None:
    model, args = site(quantise), arguments()
    got, backend = run(model, *args, strict=True)
    assert_equal(got, model(*args))
    (fused,) = backend.report.fused
    assert fused.kind == SITES[site].removesuffix("_quant")
    assert fused.remark == f"a quantiser to FP8 follows that no op computes ({STORED[quantise]})"
    assert "1 of the fused sites: a quantiser" in str(backend.report)


@pytest.mark.parametrize("site", (scaled, dual, silu), ids=lambda site: site.__name__)
def test_int8_is_left_as_it_was(site: Model) -> None:
    """torchao's Int8DynamicActivationInt8WeightConfig reads the least and the largest value directly."""

    def int8(z: Tensor) -> Any:
        low, high = z.amin(-1, keepdim=True).clamp(max=0.0), z.amax(-1, keepdim=True).clamp(min=0.0)
        s = (torch.maximum(-low, high) / 127.5).clamp(min=1e-5)
        return (z.float() * (1.0 / s.float())).round().clamp(-128, 127).to(torch.int8), s

    model, args = site(int8), arguments()
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SITES[site].removesuffix("_quant"): 1}
    assert [s.remark for s in backend.report.fused] == [""]


# --- where no kernel quantises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", (scaled, dual, silu), ids=lambda site: site.__name__)
def test_without_a_kernel_for_fp8_the_report_is_that_of_the_site_without_the_quantiser(
    site: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)
    monkeypatch.setattr(eligibility, "prepare", lambda call: None)
    monkeypatch.setattr(family, "quantises_on", lambda t: False)
    model, args = site(quantized.torchao), arguments()
    _, backend = run(model, *args, kernels="auto", strict=True)
    for entry in REGISTRY.entries:
        kept = [kind for kind in entry.kinds if not (kind.name in OPS and OPS[kind.name].quantises)]
        monkeypatch.setattr(entry, "kinds", kept)
    _, before = run(model, *args, kernels="auto", strict=True)
    assert backend.report.to_json() == before.report.to_json()


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.__name__)
def test_with_a_kernel_for_fp8_the_quantiser_is_fused(site: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)
    monkeypatch.setattr(eligibility, "prepare", prepared.append)
    monkeypatch.setattr(family, "quantises_on", lambda t: True)
    model, args = site(quantized.torchao), arguments()
    _, backend = run(model, *args, kernels="auto", strict=True)
    assert backend.report.counts() == {SITES[site]: 1}
    assert [call.chain.quant.scale for call in prepared] == [BF16]


def test_inductors_code_calls_the_op_directly() -> None:
    model, args = silu(quantized.torchao), arguments()
    with fresh_cache(), torch.no_grad():
        compiled = torch.compile(model, backend=fusion_pass.Backend(kernels="reference"))
        got, (code,) = run_and_get_code(compiled, *args)
    assert_equal(got, model(*args))
    assert "DirectCall('silu_mul_quant', " in code


# --- a whole model ----------------------------------------------------------------------------------------------------


def of_layers(name: str) -> bool:
    """The linear layers of the blocks, but not those that compute gates and scales."""
    return ("layers" in name or "refiner" in name) and "adaLN" not in name


def expected_counts(layers: int = zimage.LAYERS, refiners: int = zimage.REFINERS) -> dict[str, int]:
    """Every norm but the last one of the model, and every SwiGLU, has quantisers behind it."""
    counts = zimage.expected_counts(layers, refiners)
    quantised = {"norm_tanh_mul_add_norm_scale_quant": counts.pop("norm_tanh_mul_add_norm_scale")}
    quantised["silu_mul_quant"] = counts.pop("linear_silu_mul")
    return counts | quantised | {"norm_scale_quant": counts["norm_scale"] - 1, "norm_scale": 1}


def fused_zimage(model: torch.nn.Module) -> GraphBackend:
    args, backend = zimage.inputs(), GraphBackend()
    expected = zimage.run(model, args)
    assert torch.equal(zimage.run(torch.compile(model, backend=backend, fullgraph=True), args), expected)
    return backend


@needs_casts
@pytest.mark.parametrize(
    ("form", "layers", "refiners"),
    ((quantized.torchao, 1, 1), pytest.param(quantized.without_a_dimension, 2, 0, marks=only_long)),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_zimage_in_fp8_is_bit_equal_to_eager_and_every_matmul_reads_what_an_op_wrote(
    form: Quantise, layers: int, refiners: int
) -> None:
    model = quantized.quantize_(zimage.model(layers=layers, refiners=refiners), form, of_layers)
    backend = fused_zimage(model)
    assert backend.report.counts() == expected_counts(layers, refiners)
    assert all(site.reason_name == "ALONE" for site in backend.report.missed)
    assert all("quantized.py" not in site.source for site in backend.report.fused)  # the line of the model itself
    assert backend.count(aten._scaled_mm.default) == 7 * (layers + 2 * refiners)
    # Left are those of attention's output, and of the caption refiner's first norms, which have nothing around them.
    assert backend.count(aten.amax.default) <= layers + 2 * refiners + 3


@needs_casts
def test_a_zimage_whose_feed_forward_alone_is_in_fp8_is_fused_in_both_ways() -> None:
    layers, refiners = 2, 0
    model = zimage.model(layers=layers, refiners=refiners)
    backend = fused_zimage(quantized.quantize_(model, chosen=lambda name: of_layers(name) and "feed_forward" in name))
    counts = zimage.expected_counts(layers, refiners)
    blocks = counts["linear_silu_mul"]
    dual = counts.pop("norm_tanh_mul_add_norm_scale")
    expected = counts | {"silu_mul_quant": counts.pop("linear_silu_mul"), "norm_tanh_mul_add_norm_scale_quant": blocks}
    assert backend.report.counts() == expected | {"norm_tanh_mul_add_norm_scale": dual - blocks}


@needs_casts
def test_zimage_quantised_by_torchao_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    # torchao asks for a GPU of compute capability 8.9, and leaves out layers of other widths than multiples of 16.
    checks = {"_check_hardware_support": lambda granularities: None, "_fp8_mm_compat": lambda weight: True}
    for name, module in list(sys.modules.items()):
        for check in checks.keys() & set(vars(module) if name.startswith("torchao") else ()):
            monkeypatch.setattr(module, check, checks[check])
    model = zimage.model(layers=1, refiners=0)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(model, config, lambda module, name: isinstance(module, torch.nn.Linear) and of_layers(name))
    backend = fused_zimage(model)
    assert backend.report.counts() == expected_counts(layers=1, refiners=0)


# --- the ops by hand --------------------------------------------------------------------------------------------------


def given_to(name: str, dtype: torch.dtype = BF16, eps: Any = 1e-5) -> tuple[Any, ...]:
    x, residual, gate, scale = arguments(dtype)
    return {
        SCALED: (x, None, None, scale, eps),
        DUAL: (x, gate[0, 0], None, gate, residual, eps, None, None, scale, eps),
        SILU: (x, residual),
    }[name]


OPTIONS = {"s_dtype": FP32, "smallest_amax": 0.5, "smallest_scale": 1e-3, "reciprocal": True, "clamp": False}


@pytest.mark.parametrize("name", (SCALED, DUAL, SILU))
def test_an_op_that_quantises_passes_opcheck(name: str) -> None:
    op = getattr(torch.ops.dit_kernels, name)
    torch.library.opcheck(op.default, given_to(name, BF16))
    torch.library.opcheck(op.default, given_to(name, torch.float16), OPTIONS)
    if name != SILU:
        torch.library.opcheck(op.eps_tensor, given_to(name, FP32, torch.tensor(1e-5)))


@pytest.mark.parametrize("name", (SCALED, DUAL, SILU))
def test_q_and_s_are_those_of_what_the_op_without_quantiser_returns(name: str) -> None:
    op, plain = (getattr(torch.ops.dit_kernels, each) for each in (name, name.removesuffix("_quant")))
    *first, z = leaves(plain(*given_to(name)))
    assert_equal(op(*given_to(name)), (*first, *quantized.torchao(z)))
    s = (z.abs().amax(-1, keepdim=True).float().clamp(min=0.5) / 448.0).clamp(min=1e-3)
    assert_equal(op(*given_to(name), **OPTIONS), (*first, (z * s.reciprocal()).to(FP8), s))


@pytest.mark.parametrize("name", (SCALED, DUAL, SILU))
def test_an_op_that_quantises_has_no_gradient(name: str) -> None:
    op, (x, *others) = getattr(torch.ops.dit_kernels, name), given_to(name, FP32)
    message = f"{name}: a gradient is needed, and this op has none"
    with pytest.raises(RuntimeError, match=message):
        op(x.clone().requires_grad_(), *others)
    with torch.no_grad():
        op(x.clone().requires_grad_(), *others)
    with forward_ad.dual_level():
        op(x, *others)
        with pytest.raises(RuntimeError, match=message):
            op(forward_ad.make_dual(x, x), *others)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    (
        ("fmax", 0.0, "a positive number"),
        ("fmax", float("nan"), "a positive number"),
        ("smallest_scale", float("inf"), "a positive number"),
        ("smallest_amax", -1.0, "a positive number"),
        ("s_dtype", FP8, "bfloat16, float16, float32 or float64"),
    ),
)
def test_a_bad_option_of_the_quantiser_is_named(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"silu_mul_quant: {option} is .*, expected {expected}"):
        torch.ops.dit_kernels.silu_mul_quant(*given_to(SILU), **{option: value})


def test_a_training_graph_is_left_alone() -> None:
    args = [a.requires_grad_() for a in arguments()]
    backend = GraphBackend()
    model = silu(lambda z: (*quantized.torchao(z.detach()), z))
    torch.compile(model, backend=backend)(*args)
    assert backend.report.fused == []
    assert {site.reason_name for site in backend.report.missed} == {"TRAINING"}
