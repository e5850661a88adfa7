"""Quantisers to FP8 behind norms and SwiGLU: which are matched, bit-equality to eager, what must not match."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import quantized
import torch
import torch.nn.functional as F
from graph_backend import GraphBackend, needs_casts, run
from graph_checks import BF16, FP32, options_of, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import FP8, LARGEST, Quantise
from site_modules import diffusers_norm
from torch import Tensor

from dit_kernels.families import OPS, family
from fusion_pass import eligibility
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
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.__name__)
@pytest.mark.parametrize("form", STEPS, ids=lambda form: form.__name__)
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
    casts = [n for gm in backend.graphs for n in gm.graph.nodes if n.meta.get("val") is not None and "convert" in n.name]
    assert casts == []


@needs_casts
@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.__name__)
@pytest.mark.parametrize("dtype", (BF16, torch.float16, FP32), ids=str)
@pytest.mark.parametrize("form", (quantized.torchao, quantized.without_a_dimension), ids=lambda form: form.__name__)
def test_every_dtype_width_and_number_of_tokens(form: Quantise, dtype: torch.dtype, site: Model, dynamic: bool) -> None:
    model = site(form)
    for tokens, width in (((2, 5), 16), ((3, 1), 16), ((2, 2, 3), 16), ((7,), 16), ((2, 5), 17), ((2, 5), 1)):
        args = arguments(dtype, tokens, width)
        got, backend = run(model, *args, dynamic=dynamic)
        assert_equal(got, model(*args))
        assert backend.report.counts() == {SITES[site]: 1}, (tokens, width, backend.report)


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
@settings(max_examples=40)
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
    args = [t if t.ndim < 3 else t for t in (x, z, x, x)]
    for t in args:
        torch._dynamo.mark_static(t, 2)
    with torch.no_grad():
        assert_equal(fused(*args), model(*args))
    assert backend.report.fused and {site.kind for site in backend.report.fused} == {SILU}


# --- what must not match ----------------------------------------------------------------------------------------------


def per_tensor(z: Tensor) -> Any:
    s = z.abs().amax().float() / LARGEST
    return (z / s).clamp(-LARGEST, LARGEST).to(FP8), s


def per_block(z: Tensor) -> Any:
    blocks = z.unflatten(-1, (2, -1))
    s = blocks.abs().amax(-1, keepdim=True).float() / LARGEST
    return (blocks / s).clamp(-LARGEST, LARGEST).to(FP8).flatten(-2), s


def over_tokens(z: Tensor) -> Any:
    s = z.abs().amax(1, keepdim=True).float() / LARGEST
    return (z / s).to(FP8), s


def static(z: Tensor) -> Any:
    return (z.float() * 0.25).clamp(-LARGEST, LARGEST).to(FP8)


def to_e5m2(z: Tensor) -> Any:
    s = z.abs().amax(-1, keepdim=True).float() / 57344.0
    return (z / s).to(torch.float8_e5m2), s


def without_abs(z: Tensor) -> Any:
    s = z.amax(-1, keepdim=True).float() / LARGEST
    return (z / s).to(FP8), s


def in_bf16(z: Tensor) -> Any:
    s = z.abs().amax(-1, keepdim=True) / LARGEST
    return (z / s).to(FP8), s.float()


def rounded_again(z: Tensor) -> Any:
    s = (z.abs().amax(-1, keepdim=True) / LARGEST).float()
    return (z.float() / s).bfloat16().to(FP8), s


def an_unequal_clamp(z: Tensor) -> Any:
    s = (z.abs().amax(-1, keepdim=True) / LARGEST).float()
    return (z.float() / s).clamp(-LARGEST, 240.0).to(FP8), s


def clamped_to_the_wrong_side(z: Tensor) -> Any:
    s = (z.abs().amax(-1, keepdim=True) / LARGEST).float()
    return (z.float() / s).clamp(min=LARGEST).clamp(max=-LARGEST).to(FP8), s


def an_eps_is_added(z: Tensor) -> Any:
    s = z.abs().amax(-1, keepdim=True).float() / LARGEST + 1e-6
    return (z / s).to(FP8), s


def a_largest_amax(z: Tensor) -> Any:
    s = z.abs().amax(-1, keepdim=True).float().clamp(1e-6, 1200.0) / LARGEST
    return (z / s).to(FP8), s


def the_reciprocal_comes_first(z: Tensor) -> Any:
    inverse = LARGEST / z.abs().amax(-1, keepdim=True).float()
    return (z * inverse).to(FP8), inverse.reciprocal()


def divided_by_a_number_that_rounds(z: Tensor) -> Any:
    s = (z.abs().amax(-1, keepdim=True) / 447.3).float()
    return (z.float() / s).to(FP8), s


def a_scale_of_another_value(z: Tensor) -> Any:
    s = z.sin().abs().amax(-1, keepdim=True).float() / LARGEST
    return (z / s).to(FP8), s


def the_scale_is_read_elsewhere(z: Tensor) -> Any:
    q, s = quantized.torchao(z)
    return q, s, (s * 2).sin()


def the_amax_is_read_elsewhere(z: Tensor) -> Any:
    amax = z.abs().amax(-1, keepdim=True)
    s = (amax / LARGEST).float()
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
    static: "steps",
    to_e5m2: "to float8_e5m2",
    without_abs: "one scale for each row",
    in_bf16: "steps",
    rounded_again: "steps",
    an_unequal_clamp: "steps",
    clamped_to_the_wrong_side: "steps",
    an_eps_is_added: "one scale for each row",
    a_largest_amax: "one scale for each row",
    the_reciprocal_comes_first: "steps",
    divided_by_a_number_that_rounds: "steps",
    a_scale_of_another_value: "one scale for each row",
    the_scale_is_read_elsewhere: "something other than the matmul reads the scale",
    the_amax_is_read_elsewhere: "something else reads a value inside the quantiser",
    computed_with_at_once: "Inductor computes with the quantised rows",
    two_ways: "quantise it in different ways",
}


@needs_casts
@pytest.mark.parametrize("site", (scaled, dual, silu), ids=lambda site: site.__name__)
@pytest.mark.parametrize("quantise", REFUSED, ids=lambda quantise: quantise.__name__)
def test_another_quantiser_leaves_the_site_as_it_is_and_is_reported(quantise: Model, site: Model) -> None:
    model, args = site(quantise), arguments()
    got, backend = run(model, *args, strict=True)  # by design: no error
    assert_equal(got, model(*args))
    assert backend.report.counts() == ({"norm_tanh_mul_add": 1} if site is dual else {})
    ((kind, reason),) = [(s.kind, s.reason) for s in backend.report.missed if s.reason_name == "QUANTISER"]
    assert kind == SITES[site]
    assert REFUSED[quantise] in reason, reason


@pytest.mark.parametrize(
    ("site", "kind"), ((scaled, "norm_scale"), (dual, "norm_tanh_mul_add_norm_scale"), (silu, "silu_mul"))
)
def test_a_value_with_another_reader_is_stored_and_the_remark_names_the_quantiser(site: Model, kind: str) -> None:
    """A mixed model: one linear layer is in FP8, the other in bf16."""
    model, args = site(lambda z: (quantized.torchao(z), z @ z.mT)), arguments()
    got, backend = run(model, *args, strict=True)
    assert_equal(got, model(*args))
    (fused,) = backend.report.fused
    assert fused.kind == kind
    assert fused.remark == "a quantiser to FP8 follows that no op computes (something else reads the value)"
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
