"""The kernels that quantise, on the GPU: q and s have the bits of eager code on the same GPU."""

from __future__ import annotations

from functools import partial

import pytest
import quant_checks
import torch
from kernel_bounds import BF16, FP16, FP32, Device, random
from ptx.machine import PURE
from quant_checks import DUAL, GELU, NORM, SILU, every_quotient, special_rows

from dit_kernels import ops
from dit_kernels.families import OPS
from dit_kernels.families.family import FP8_CAPABILITY

GPU = Device()
arguments = partial(quant_checks.arguments, device="cuda")
check, check_rows = partial(quant_checks.check, GPU), partial(quant_checks.check_rows, GPU)
FORMS = (
    dict(),
    dict(s_dtype=FP32),
    dict(s_dtype=FP32, smallest_scale=1e-12),
    dict(reciprocal=True, smallest_amax=1e-12),
    dict(clamp=False),
)


@pytest.fixture(scope="module", autouse=True)
def needs_fp8() -> None:
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("the GPU has no conversions to FP8")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("op", (NORM, DUAL, SILU))
@pytest.mark.parametrize("d", (2544, 3840, 10240))
def test_q_and_s_have_the_bits_of_eager_code(op: str, d: int, form: dict) -> None:
    given = arguments(op, d, tokens=264)
    assert ops.has_kernel(OPS[op].call(*given, **form))
    check(op, *given, **form)


@pytest.mark.parametrize(("d", "more"), ((12288, 0), (12288, 3072), (9216, 3072), (2560, 48)))
def test_gelu_and_joined_rows_have_the_bits_of_eager_code(d: int, more: int) -> None:
    given = arguments(GELU, d, tokens=264)
    before = random(2, 264, more, seed=3, device="cuda") if more else None
    assert ops.has_kernel(OPS[GELU].call(*given, before))
    check(GELU, *given, before=before, approximate="tanh")
    check(SILU, *arguments(SILU, d, tokens=264), before=before)


@pytest.mark.parametrize(("approximate", "differ"), (("tanh", 0), ("none", 7)))
def test_the_gelu_of_every_bf16_number_is_that_of_eager_code(approximate: str, differ: int) -> None:
    """Each number fills a row, whose scale is then its GELU. With erf, 7 numbers between -3 and -5.5 differ."""
    numbers = torch.arange(2**16, dtype=torch.int32, device="cuda").to(torch.int16).view(BF16)
    options = dict(approximate=approximate, s_dtype=FP32, fmax=1.0)
    q, s = torch.ops.dit_kernels.gelu_quant(numbers[:, None].expand(-1, 16).contiguous(), **options)
    eager = torch.nn.functional.gelu(numbers, approximate=approximate).float()
    others = numbers[s[:, 0].nan_to_num(-1.0) != eager.abs().nan_to_num(-1.0)].float()
    assert len(others) <= differ and ((others > -5.5) & (others < -3)).all()
    assert torch.equal(q[:, 0].float().sign().nan_to_num(0.0), eager.sign().nan_to_num(0.0) * eager.isfinite())


@pytest.mark.parametrize("dtype", (FP16, FP32))
@pytest.mark.parametrize("op", (NORM, DUAL, SILU))
def test_every_dtype_is_quantised(op: str, dtype: torch.dtype) -> None:
    check(op, *arguments(op, 3840, dtype, tokens=264))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_extreme_rows_and_every_quotient_have_the_bits_of_eager_code(form: dict) -> None:
    check_rows(special_rows().cuda(), **form)
    check_rows(every_quotient().cuda(), **form)


STATIC = (
    dict(),
    dict(scaling="reciprocal", factor_dtype=BF16, scaled_dtype=BF16, clamp=False),
    dict(scaling="product", scaled_dtype=BF16),
)


@pytest.mark.parametrize("op", (NORM, DUAL, SILU))
@pytest.mark.parametrize("d", (2544, 3840, 10240))
def test_static_scales_and_z_itself_have_the_bits_of_eager_code(op: str, d: int) -> None:
    given, scale = arguments(op, d, tokens=264), torch.tensor(0.01371, device="cuda")
    assert ops.has_kernel(OPS[f"{op}.static"].call(*given, scale))
    check(f"{op}.keep_z", *given)
    for form in STATIC:
        for one in (scale, scale.reshape(1, 1).to(BF16), None):
            check(f"{op}.static", *given, one, **form)
        check(f"{op}.static_keep_z", *given, scale, **form)


@pytest.mark.parametrize("form", STATIC, ids=str)
def test_extreme_rows_and_static_scales_have_the_bits_of_eager_code(form: dict) -> None:
    for scale in (1.2345, 2.0**-130, 2.0**-60, 0.0, -0.5, torch.inf, torch.nan):
        for rows in (special_rows(), every_quotient()):
            check_rows(rows.cuda(), torch.tensor(scale, device="cuda"), op=f"{SILU}.static", **form)


def test_eager_code_on_a_gpu_rounds_a_0d_scale_first() -> None:
    """The pass counts on it: see _factor_dtype in fusion_pass/kinds/quantiser.py."""
    z, scale = torch.randn(4096, 512, device="cuda", dtype=BF16), torch.tensor(0.01371, device="cuda")
    assert torch.equal(z * scale, z * scale.to(BF16))
    assert torch.equal(scale * z, z * scale.to(BF16))
    assert torch.equal(z / scale, z / scale.to(BF16))


def test_many_rows_are_quantised_again_and_again_with_the_same_bits() -> None:
    given = arguments(SILU, 10240, BF16, batch=1, tokens=4128)
    q, s = torch.ops.dit_kernels.silu_mul_quant(*given)
    for _ in range(20):
        other_q, other_s = torch.ops.dit_kernels.silu_mul_quant(*given)
        assert torch.equal(q.view(torch.uint8), other_q.view(torch.uint8)) and torch.equal(s, other_s)


def test_the_interpreters_conversion_is_that_of_the_gpu() -> None:
    z = every_quotient()
    q, s = check_rows(z.cuda())
    quotients = (z.float() / s.cpu()[0]).clamp(-448, 448).numpy()
    pairs = PURE["cvt.rn.satfinite.e4m3x2.f32"].function(quotients[:, 1::2], quotients[:, ::2])
    assert (pairs.view("uint8") == q.cpu()[0].view(torch.uint8).numpy()).all()
