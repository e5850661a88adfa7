"""The kernels that quantise, run from their PTX: the checks are those of a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import kernel_bounds as bounds
import pytest
import quant_checks
import torch
from kernel_bounds import BF16, FP16, FP32, random
from quant_checks import DUAL, GELU, NORM, QUANT, SILU, arguments, every_quotient, special_rows

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from dit_kernels.cute import activation, quantise
from dit_kernels.families import OPS, family
from dit_kernels.rounding import FP8
from ptx.device import ARCHS, compiled, gpu, in_turn
from ptx.judging import INTERPRETER

QUANTISING = ("sm_89", *ARCHS[1:])
check, quantised = partial(quant_checks.check, INTERPRETER), partial(quant_checks.check_rows, INTERPRETER)


ON_EVERY_GPU = ((NORM, 2544), (DUAL, 3840), (SILU, 10240), (QUANT, 3840))


@pytest.mark.parametrize(
    ("arch", "op", "d"),
    [
        *in_turn(ON_EVERY_GPU, QUANTISING),
        *(("sm_90a", op, d) for op, d in ((NORM, 3840), (DUAL, 16), (SILU, 1008))),
    ],
)
def test_q_and_s_are_those_of_z(arch: str, op: str, d: int) -> None:
    with gpu(arch, 1):
        q, s = check(op, *arguments(op, d))
    assert q.dtype == FP8 and s.shape == (2, 3, 1)
    assert (q.float().abs().amax(-1) == 448).all()


FORMS = (dict(), dict(s_dtype=FP32), dict(s_dtype=FP32, reciprocal=True, fmax=240.0))
DTYPES = (BF16, FP16, FP32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_dtype_and_every_form_of_the_scale_is_that_of_the_definition(dtype: torch.dtype, form: dict) -> None:
    with gpu("sm_90a", 1):
        check(SILU, *arguments(SILU, 256, dtype), **form)


@pytest.mark.parametrize(("form", "dtype"), zip(FORMS, DTYPES, strict=True), ids=str)
def test_every_form_of_the_scale_is_that_of_the_definition_behind_a_norm_and_with_a_least_scale(
    form: dict, dtype: torch.dtype
) -> None:
    with gpu("sm_90a", 1):
        check(NORM, *arguments(NORM, 256, dtype), **form)
        check(SILU, *arguments(SILU, 256, dtype), **form, smallest_scale=0.1)
        check(SILU, *arguments(SILU, 256, dtype), **form, smallest_amax=20.5)


def test_rows_with_factors_of_their_own_and_layer_norms_are_quantised() -> None:
    o = bounds.operands(2, 3, 2304, bias=True)
    per_token = replace(o, gate=random(2, 3, 2304, seed=1), scale=random(2, 3, 2304, seed=2))
    with gpu("sm_90a", 1):
        check(DUAL, *per_token.arguments(bounds.DUAL))
    with gpu("sm_89", 1):
        check(NORM, *o.arguments("norm_scale"), norm="layer", add_one=False)


@pytest.mark.parametrize("arch", ("sm_89", "sm_90a"))
def test_a_cta_that_walks_quantises_every_row(arch: str) -> None:
    with gpu(arch, 1):
        check(NORM, *arguments(NORM, 2304, tokens=23))


def test_many_rows_of_halves_of_wider_ones_are_quantised() -> None:
    a, b = (random(1, 23, 2 * 640, seed=seed) for seed in (1, 2))
    with gpu("sm_89", 1):
        check(SILU, a[..., :640], b[..., 640:])


GELUS = dict(approximate="tanh"), dict(approximate="none")


def test_gelu_and_rows_that_start_with_another_tensor_are_quantised() -> None:
    with gpu("sm_90a", 1):
        check(GELU, *arguments(GELU, 12288, tokens=1), before=random(2, 1, 3072, seed=4) * 2, approximate="tanh")
        check(GELU, *arguments(GELU, 176, tokens=23), before=random(2, 23, 32, seed=4) * 2)
    with gpu("sm_89", 1):
        check(GELU, *arguments(GELU, 768), approximate="tanh")


def test_joined_rows_of_other_shapes_strides_and_alignments_are_quantised() -> None:
    halves, wide = random(2, 3, 512, seed=1).chunk(2, -1), random(2, 3, 776, seed=2)
    with gpu("sm_90a", 1):
        check(SILU, *halves, before=wide[..., 8:136])
        check(SILU, *halves, before=wide[..., 1:129], s_dtype=FP32, reciprocal=True)
        check(SILU, *halves, before=random(3, 2, 128).transpose(0, 1))
        check(SILU, *(half[0] for half in halves), before=wide[0, :, :16])
        check(GELU, random(1, 2, 16), before=random(1, 2, 2064))  # the result is a small part
        for largest in (1e2, 1e-2, torch.nan, torch.inf):
            check(SILU, *halves, before=wide[..., :128].contiguous() * largest)


def test_a_joined_row_as_wide_as_the_registers_allow_is_quantised() -> None:
    a, b = arguments(SILU, 18432, batch=1, tokens=1)
    with gpu("sm_90a", 1):
        check(SILU, a, b, before=random(1, 1, 6144))  # FLUX.2


@pytest.mark.parametrize("options", GELUS, ids=str)
@pytest.mark.parametrize("dtype", (FP16, FP32))
def test_gelu_in_other_dtypes_is_quantised(dtype: torch.dtype, options: dict[str, str]) -> None:
    (a,), before = arguments(GELU, 512, dtype), random(2, 3, 256, dtype=dtype, seed=4)
    with gpu("sm_90a", 1):
        q, s = INTERPRETER.run(GELU, a, before, s_dtype=FP32, **options)
    z = torch.cat((before, torch.nn.functional.gelu(a, **options)), -1).float()
    torch.testing.assert_close(s, z.abs().amax(-1, keepdim=True) / 448, rtol=2.0**-10, atol=0)
    assert ((q.float() * s - z).abs() <= z.abs() * 0.0626 + s * 2.0**-10).all()


@pytest.mark.parametrize(("arch", "options", "differ"), (("sm_89", GELUS[0], 0), ("sm_90a", GELUS[1], 4)), ids=str)
def test_gelu_of_every_bf16_number_is_that_of_eager_code(arch: str, options: dict[str, str], differ: int) -> None:
    """Stored by the kernel of silu(a) * 1. Eager on a GPU is what counts: a CPU's erf differs from CPU to CPU."""
    a = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16).view(1, 16, -1)
    replaced = mock.patch.dict(activation._ACTIVATIONS, silu=activation._ACTIVATIONS[OPS[GELU].act(options)])
    with gpu(arch, 132, compiled.__wrapped__), replaced:
        (z,) = INTERPRETER.run("silu_mul", a, torch.ones_like(a))
    with INTERPRETER.eager():
        eager = torch.nn.functional.gelu(a, **options)
    same = (z == eager) & (z.signbit() == eager.signbit()) | (z.isnan() & eager.isnan())
    assert (~same).sum() <= differ
    assert (a[~same] < -3).all() and (a[~same] > -5.2).all()
    # 1 + erf, or 1 + tanh, is rounded to fp32 before the product with a.
    finite = a.isfinite()
    exact = torch.nn.functional.gelu(a[finite].double(), **options)
    bound = exact.abs() * 2.0**-8 + a[finite].double().abs() * 2.0**-23 + 2.0**-134  # the last for subnormals
    assert ((z[finite].double() - exact).abs() <= bound).all()


def test_rows_of_other_shapes_strides_and_alignments_are_quantised() -> None:
    with gpu("sm_90a", 1):
        for lead in ((5,), (2, 2, 3), (1, 1)):
            check(NORM, random(*lead, 512), None, None, None, 1e-5)
            check(SILU, *random(*lead, 1024).chunk(2, -1))
        for x in (random(2, 3, 520)[..., 8:], random(2, 3, 513)[..., 1:], random(3, 2, 512).transpose(0, 1)):
            check(NORM, x, None, None, None, 1e-5)
            check(SILU, x, x)


def test_a_row_as_wide_as_the_registers_allow_is_quantised() -> None:
    with gpu("sm_90a", 1):
        check(DUAL, *arguments(DUAL, 16384, batch=1, tokens=1))
        check(SILU, *arguments(SILU, 20480, batch=1, tokens=1))


def test_a_kernel_takes_rows_of_multiples_of_16_that_fit_its_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "quantises_on", lambda t: True)

    def fits(op: str, d: int, dtype: torch.dtype = BF16, **options: Any) -> bool:
        return OPS[op].call(*arguments(op, d, dtype, batch=1, tokens=1), **options).fits_kernel()

    assert fits(DUAL, 3840) and fits(DUAL, 16384) and fits(NORM, 8192, FP32) and fits(SILU, 20480)
    assert not fits(DUAL, 3848) and not fits(NORM, 16400) and not fits(SILU, 20496) and not fits(SILU, 10256, FP32)
    assert not fits(NORM, 16384, z_dtype=FP32)

    def fits_joined(d: int, more: int) -> bool:
        return OPS[GELU].call(*arguments(GELU, d, batch=1, tokens=1), random(1, 1, more)).fits_kernel()

    assert fits(GELU, 20480) and fits_joined(20480, 4096) and fits_joined(16, 24560)
    assert not fits_joined(20480, 4112) and not fits_joined(3072, 24) and not fits_joined(24, 3072)
    assert not fits_joined(3072, 0)
    monkeypatch.undo()
    assert not fits(DUAL, 3840)  # on a CPU


@pytest.mark.parametrize(
    ("capability", "quantises"), (((8, 0), False), ((8, 6), False), ((8, 9), True), ((12, 0), True))
)
def test_kernels_quantise_from_compute_capability_8_9_on(capability, quantises, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on_gpu = mock.Mock(device=torch.device("cuda", 0))
    assert family.quantises_on(on_gpu) == quantises


@pytest.fixture
def cast_of_2_11(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cast of PyTorch before 2.12: not clamped."""
    monkeypatch.setattr(family, "CAST_SATURATES", False)


# --- z by hand ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", (dict(), dict(s_dtype=FP32), dict(reciprocal=True), dict(smallest_scale=1e-12)), ids=str
)
def test_the_quotient_of_any_two_significands_is_that_of_a_division(options: dict[str, Any]) -> None:
    with gpu("sm_90a", 64):
        quantised(every_quotient(), **options)


def test_a_quotient_that_is_not_corrected_is_found() -> None:
    uncorrected = mock.patch.object(quantise, "_quotient", lambda z, scale, reciprocal: z * reciprocal)
    with gpu("sm_90a", 64, compiled.__wrapped__), uncorrected, pytest.raises(AssertionError, match=r"q\[.*differ"):
        quantised(every_quotient())


@pytest.mark.parametrize(
    "options",
    (
        dict(),
        dict(clamp=False),
        dict(s_dtype=FP32),
        dict(s_dtype=FP32, reciprocal=True),
        dict(smallest_scale=1e-12),
        dict(smallest_amax=1e-12, clamp=False),
    ),
    ids=str,
)
def test_rows_of_zeros_nan_infinity_subnormal_and_huge_numbers_are_as_in_eager(
    options: dict, cast_of_2_11: None
) -> None:
    with gpu("sm_90a", 1):
        q, s = quantised(special_rows(), **options)
    assert s.isnan().any() and s.isinf().any()
    if not {"smallest_scale", "smallest_amax"} & options.keys():
        assert (s[0, 0] == 0).all() and q[0, 0].float().isnan().all()
    if options.get("smallest_scale"):
        assert (q[0, 0].float() == 0).all()


def test_a_cast_without_a_clamp_is_that_of_this_version_of_pytorch(cast_of_2_11: None) -> None:
    z = torch.linspace(1, 100, 1024)[None].to(BF16)
    with gpu("sm_90a", 1):
        q, _ = quantised(z, clamp=False, fmax=1000.0)
        with mock.patch.object(family, "CAST_SATURATES", True):
            saturated, _ = quantised(z, clamp=False, fmax=1000.0)
        clamped, _ = quantised(z, fmax=1000.0)
    assert q.float().isnan().any() and saturated.float().amax() == 448
    assert torch.equal(saturated.float(), clamped.float())


# --- static scales, and z itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "op", "d"), (("sm_90a", DUAL, 2544), ("sm_89", NORM, 2304), ("sm_90a", SILU, 10240)))
def test_z_is_what_the_op_without_the_quantiser_stores(arch: str, op: str, d: int) -> None:
    with gpu(arch, 1):
        check(f"{op}.keep_z", *arguments(op, d))
        check(f"{op}.static_keep_z", *arguments(op, d), torch.tensor(0.0137))


@pytest.mark.parametrize("arch", ("sm_89", "sm_90a"))
def test_a_cta_that_walks_quantises_every_row_with_a_static_scale(arch: str) -> None:
    with gpu(arch, 1):
        check(f"{NORM}.static", *arguments(NORM, 2304, tokens=23), torch.tensor([[0.0137]], dtype=BF16))


def test_rows_are_quantised_without_a_scale() -> None:
    with gpu("sm_90a", 1):
        check(f"{SILU}.static", *arguments(SILU, 640, tokens=5), None)


STATIC = (
    dict(scaling="quotient"),
    dict(scaling="reciprocal", factor_dtype=BF16, scaled_dtype=BF16, clamp=False),
    dict(scaling="product", factor_dtype=BF16, scaled_dtype=BF16),
    dict(scaling="quotient", scaled_dtype=FP16, clamp=False),
)


@pytest.mark.parametrize("form", STATIC, ids=lambda form: form["scaling"])
def test_every_static_form_is_that_of_the_definition(form: dict, cast_of_2_11: None) -> None:
    with gpu("sm_90a", 1):
        for scale in (1.37 * 2.0**-130, 1.37 * 2.0**-60, 0.0, -0.5, torch.inf, torch.nan):
            quantised(special_rows(), torch.tensor(scale), op=f"{SILU}.static", **form)
    if form["scaling"] == "quotient":
        with gpu("sm_90a", 64):
            quantised(every_quotient(), torch.tensor(1.2345), op=f"{SILU}.static", **form)


@pytest.mark.parametrize("dtype", (FP16, FP32))
def test_rows_and_static_scales_of_every_dtype_are_quantised(dtype: torch.dtype) -> None:
    with gpu("sm_90a", 1):
        for scale in (BF16, FP32):
            check(f"{SILU}.static", *arguments(SILU, 256, dtype), torch.tensor(0.0137, dtype=scale))


# --- mistakes: each is found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong", "result"),
    (
        ("_scale_of", lambda amax, steps: quantise.Float32(1.0 / 448) * amax, "s"),
        ("_pair_in_fp8", lambda low, high: pair_in_fp8(high, low), "q"),
        ("_finite_or_nan", lambda value: value, "q"),
    ),
)
def test_a_mistake_in_the_quantiser_is_found(name: str, wrong: Any, result: str, cast_of_2_11: None) -> None:
    mistaken = mock.patch.object(quantise, name, wrong)
    with gpu("sm_90a", 1, compiled.__wrapped__), mistaken, pytest.raises(AssertionError, match=rf"{result}\[.*differ"):
        quantised(special_rows(), clamp=False)


pair_in_fp8 = quantise._pair_in_fp8
