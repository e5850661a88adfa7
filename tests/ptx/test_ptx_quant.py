"""The kernels that quantise, run from their PTX: q and s have the bits of eager code on the same z.

z itself is not stored. The kernel of the same op without `_quant` stores it: both sum in the same order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import kernel_bounds as bounds
import pytest
import torch
from kernel_bounds import random
from torch import Tensor

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from dit_kernels import reference
from dit_kernels.arguments import QUANT_OPTIONS
from dit_kernels.cute import quantise, rows
from dit_kernels.families import OPS, family
from dit_kernels.rounding import FP8
from ptx.device import ARCHS, call, compiled, gpu
from ptx.judging import LikeCuda
from ptx.memory import Fault

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUANTISING = ("sm_89", *ARCHS[1:])
NORM, DUAL, SILU = "norm_scale_quant", "norm_tanh_mul_add_norm_scale_quant", "silu_mul_quant"
LARGEST_BF16 = torch.finfo(BF16).max


def arguments(op: str, d: int, dtype: torch.dtype = BF16, batch: int = 2, tokens: int = 3) -> tuple[Any, ...]:
    if op == SILU:
        return random(batch, tokens, d, dtype=dtype, seed=1) * 3, random(batch, tokens, d, dtype=dtype, seed=2)
    return bounds.operands(batch, tokens, d, dtype).arguments(op.removesuffix("_quant"))


def assert_same_bytes(name: str, got: Tensor, expected: Tensor) -> None:
    """NaN is NaN: a cast on the CPU keeps its sign."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    a, b = got.float(), expected.float()
    differs = ~((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan()))
    if differs.any():
        index = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(f"{name}{list(index)} is {a[index]}, by the definition {b[index]}: {differs.sum()} differ")


def check(op: str, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Runs an op that quantises. The results must be those of the definition on what the op without `_quant` stores."""
    of_quant = {option.name for option in QUANT_OPTIONS}
    *stored, q, s = call(op, given, **options)
    plain = {name: value for name, value in options.items() if name not in of_quant}
    *others, z = call(op.removesuffix("_quant"), given, **plain)
    steps = OPS[op].call(*given, **options).chain.quant
    with LikeCuda():
        expected_q, expected_s = reference.quantised(z, steps)
    if not steps.clamp:
        too_large = (z.float() / expected_s).abs() > 464
        expected_q = torch.where(too_large, torch.nan, expected_q.float()).to(FP8)
    for result, other in zip(stored, others, strict=True):
        assert_same_bytes("y", result, other)
    assert_same_bytes("s", s, expected_s)
    assert_same_bytes("q", q, expected_q)
    return q, s


ON_EVERY_GPU = ((NORM, 2544), (DUAL, 3840), (SILU, 10240))


@pytest.mark.parametrize(
    ("arch", "op", "d"),
    [
        *((arch, op, d) for arch in QUANTISING for op, d in ON_EVERY_GPU),
        *(("sm_90a", op, d) for op, d in ((NORM, 3840), (DUAL, 16), (SILU, 1008))),
    ],
)
def test_q_and_s_are_those_of_z(arch: str, op: str, d: int) -> None:
    with gpu(arch, 1):
        q, s = check(op, *arguments(op, d))
    assert q.dtype == FP8 and s.shape == (2, 3, 1)
    assert (q.float().abs().amax(-1) == 448).all()


FORMS = (dict(), dict(s_dtype=FP32), dict(s_dtype=FP32, reciprocal=True, fmax=240.0))


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_dtype_and_every_form_of_the_scale_is_that_of_the_definition(dtype: torch.dtype, form: dict) -> None:
    with gpu("sm_90a", 1):
        for op in (NORM, SILU):
            check(op, *arguments(op, 256, dtype), **form)
        check(SILU, *arguments(SILU, 256, dtype), **form, smallest_scale=0.1)
        check(SILU, *arguments(SILU, 256, dtype), **form, smallest_amax=20.5)


@pytest.mark.parametrize("arch", ("sm_89", "sm_90a"))
def test_rows_with_factors_of_their_own_and_layer_norms_are_quantised(arch: str) -> None:
    o = bounds.operands(2, 3, 2304, bias=True)
    per_token = replace(o, gate=random(2, 3, 2304, seed=1), scale=random(2, 3, 2304, seed=2))
    with gpu(arch, 1):
        check(DUAL, *per_token.arguments(bounds.DUAL))
        check(NORM, *o.arguments("norm_scale"), norm="layer", add_one=False)


@pytest.mark.parametrize("arch", ("sm_89", "sm_90a"))
def test_a_cta_that_walks_quantises_every_row(arch: str) -> None:
    a, b = (random(1, 23, 2 * 640, seed=seed) for seed in (1, 2))
    with gpu(arch, 1):
        check(NORM, *arguments(NORM, 2304, tokens=23))
        check(SILU, a[..., :640], b[..., 640:])


def test_a_row_as_wide_as_the_registers_allow_is_quantised() -> None:
    with gpu("sm_90a", 1):
        check(DUAL, *arguments(DUAL, 16384, batch=1, tokens=1))
        check(SILU, *arguments(SILU, 20480, batch=1, tokens=1))
        check(SILU, *arguments(SILU, 10240, FP32, batch=1, tokens=1))


def test_a_kernel_takes_rows_of_multiples_of_16_that_fit_its_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "quantises_on", lambda t: True)

    def fits(op: str, d: int, dtype: torch.dtype = BF16, **options: Any) -> bool:
        return OPS[op].call(*arguments(op, d, dtype, batch=1, tokens=1), **options).fits_kernel()

    assert fits(DUAL, 3840) and fits(DUAL, 16384) and fits(NORM, 8192, FP32) and fits(SILU, 20480)
    assert not fits(DUAL, 3848) and not fits(NORM, 16400) and not fits(SILU, 20496) and not fits(SILU, 10256, FP32)
    assert not fits(NORM, 16384, z_dtype=FP32)
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


def quantised(z: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Quantises rows of bf16 numbers, by the op whose z is b times a number: silu(64) = 64, and silu(2^-20) = 2^-21."""
    large = z.float().abs() > 1
    a = torch.where(large, 64.0, 2.0**-20).to(BF16)
    b = torch.where(large, z.float() / 64, z.float() * 2.0**21).to(BF16)
    return check(SILU, a[None], b[None], **options)


def every_quotient() -> Tensor:
    """Rows of 128 different amax, each with every bf16 number whose quotient by the scale is a number of FP8."""
    significands = torch.arange(128) + 128.0
    numbers = (significands * 2.0 ** torch.arange(-19, 1)[:, None]).flatten()
    tops = significands[:, None]
    return torch.cat((tops, *(sign * numbers.minimum(tops) for sign in (1, -1)), torch.zeros(128, 15)), 1).to(BF16)


@pytest.mark.parametrize(
    "options", (dict(), dict(s_dtype=FP32), dict(reciprocal=True), dict(smallest_scale=1e-12)), ids=str
)
def test_the_quotient_of_any_two_significands_is_that_of_a_division(options: dict[str, Any]) -> None:
    with gpu("sm_90a", 64):
        quantised(every_quotient(), **options)


def test_the_row_finds_a_quotient_that_is_not_corrected() -> None:
    uncorrected = mock.patch.object(quantise, "_quotient", lambda z, scale, reciprocal: z * reciprocal)
    with gpu("sm_90a", 64, compiled.__wrapped__), uncorrected, pytest.raises(AssertionError, match=r"q\[.*differ"):
        quantised(every_quotient())


def special_rows() -> Tensor:
    ordinary = random(1, 1024, dtype=FP32, seed=5)
    ones = torch.zeros(1, 1024).index_fill(1, torch.tensor([700]), 1.0)
    rows = [ordinary * 0, ordinary * -0.0, ones, ones * LARGEST_BF16, ordinary * 1e37, ordinary * 1e30]
    rows += [ordinary * 2.0**-exponent for exponent in (90, 98, 100, 110, 118, 120, 124, 126, 128, 130, 132)]
    rows += [ordinary + ones * special for special in (torch.inf, -torch.inf, torch.nan)]
    rows += [torch.full((1, 1024), -torch.inf), ordinary.masked_fill(ordinary > 0, -0.0), ones * 2.0**-133]
    return torch.cat(rows).nan_to_num(torch.nan, torch.inf, -torch.inf).to(BF16)


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


# --- mistakes: each is found ----------------------------------------------------------------------------------------


def test_the_largest_numbers_of_two_rows_in_one_buffer_are_found() -> None:
    import cutlass.cute as cute

    original = rows.RowKernel.partials

    def partials(kernel: Any, buffers: int) -> cute.Tensor:
        one = original(kernel, 1)
        return cute.make_tensor(one.iterator, cute.make_layout((*one.shape[:3], buffers), stride=(*one.stride[:3], 0)))

    wrong = mock.patch.object(rows.RowKernel, "partials", partials)
    with gpu("sm_89", 1, compiled.__wrapped__), wrong, pytest.raises(Fault, match=r"shared memory.*no barrier between"):
        check(SILU, *arguments(SILU, 10240, tokens=5))


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
