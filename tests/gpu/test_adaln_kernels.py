"""The kernels with a shift, and with a residual add without a norm, on the GPU."""

from __future__ import annotations

from functools import partial

import adaln_kernel_bounds
import pytest
import quant_checks
import torch
from adaln_kernel_bounds import ADD, DUAL, SCALED
from kernel_bounds import BF16, FP16, FP32, Device

from dit_kernels import ops
from dit_kernels.families import OPS
from dit_kernels.families.family import FP8_CAPABILITY

GPU = Device()
operands = partial(adaln_kernel_bounds.operands, device="cuda")
check = partial(adaln_kernel_bounds.check, GPU)
WIDTHS = (1152, 2432, 3072, 3840, 5120, 6144)


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("op", (ADD, SCALED, DUAL))
def test_a_shift_and_an_add_without_a_norm_follow_the_definition(op: str, d: int, norm: str) -> None:
    given = operands(op, tokens=264, d=d)
    assert ops.has_kernel(OPS[op].call(*given, norm=norm))
    check(op, *given, norm=norm)


@pytest.mark.parametrize("d", (7, 2521, 16384, 32768))
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
def test_other_dtypes_and_widths_follow_the_definition(dtype: torch.dtype, d: int) -> None:
    check(ADD, *operands(ADD, tokens=17, d=d, dtype=dtype, affine=True), norm="layer")


@pytest.mark.parametrize("shape", ((2, 264, 3072), (1, 264, 3072), (3072,), (1,)), ids=str)
@pytest.mark.parametrize("op", (ADD, SCALED, DUAL))
def test_modulations_broadcast_in_every_way(op: str, shape: tuple[int, ...]) -> None:
    check(op, *operands(op, tokens=264, d=3072, shape=shape), norm="layer")


def test_wans_chain_in_fp32_rounds_y_and_z_once() -> None:
    options = dict(norm="layer", rounding="weight_then_cast", norm_dtype=FP32, y_dtype=BF16, z_dtype=BF16)
    check(ADD, *operands(ADD, tokens=264, d=5120, modulation=FP32), **options)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_CAPABILITY,
    reason="the GPU has no conversions to FP8",
)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("op", (ADD, SCALED, DUAL))
def test_q_and_s_have_the_bits_of_eager_code(op: str, d: int) -> None:
    given = operands(op, tokens=264, d=d)
    assert ops.has_kernel(OPS[f"{op}_quant"].call(*given, norm="layer"))
    quant_checks.check(GPU, f"{op}_quant", *given, norm="layer")
