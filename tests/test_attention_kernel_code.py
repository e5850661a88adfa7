"""What the kernels of qk_norm_rope and silu_mul compile to, for every architecture: this needs no GPU."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from kernel_variants import variant
from ptx.device import UNLIKE, compiled, on_two
from test_kernel_code import COMPILED, WIDE, resources

from dit_kernels.chain import ActivationChain, RotatedChain
from dit_kernels.compile import Variant
from dit_kernels.cute.heads import head_tiling
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.families import OPS, norm_cat_rope, norm_part_rope, norm_rope
from dit_kernels.rounding import activation_steps, rotated_steps

BF16, FP32 = torch.bfloat16, torch.float32
COMPLEX64, COMPLEX128 = torch.complex64, torch.complex128


def rope(
    d: int,
    h: int,
    hk: int,
    dtype: torch.dtype = BF16,
    rotation: torch.dtype = COMPLEX64,
    *,
    form: str = "cast_then_weight",
    interleaved: bool = True,
    access: int = 16,
    **dtypes: Any,
) -> Variant:
    """q and k of one dtype, with weights, all as aligned as contiguous heads are."""
    steps = rotated_steps(form, dtype, dtype, rotation, **dtypes)
    turning, weight = TensorSpec(rotation, "token", 16), TensorSpec(dtype, "column", 16)
    specs = dict(
        q=TensorSpec(dtype, "token", access, h),
        k=TensorSpec(dtype, "token", access, hk),
        q_weight=weight,
        k_weight=weight,
        rotation=turning,
        sin=None if rotation.is_complex else turning,
        q_out=TensorSpec(steps.out, "token", 16, h),
        k_out=TensorSpec(steps.out, "token", 16, hk),
    )
    return variant(norm_rope.FAMILY, RotatedChain(interleaved, rotation.is_complex, steps, steps), d, **specs)


def joined(h: int, d: int) -> Variant:
    """FLUX's double blocks: h heads of q and of k, of both streams."""
    of_one = rope(d, h, h, rotation=FP32, rope_dtype=FP32, out_dtype=BF16)
    specs = {name: spec for name, spec in of_one.named.items() if name in norm_cat_rope.FAMILY.named}
    before = {f"{x}_before{end}": specs[f"{x}{end}"] for x in "qk" for end in ("", "_weight")}
    return variant(norm_cat_rope.FAMILY, of_one.chain, d, **specs, **before)


def layer_normed(d: int, h: int, interleaved: bool = True, affine: bool = True) -> Variant:
    """CogVideoX and CogView4: h heads of q and of k, of which the last tokens are rotated."""
    weight = BF16 if affine else None
    steps = rotated_steps("cast_then_weight", BF16, weight, FP32, None, FP32, BF16, kind="layer", bias=weight)
    specs: dict[str, Any] = rope(d, h, h, rotation=FP32, rope_dtype=FP32, out_dtype=BF16).named
    specs |= {f"{x}_{name}": specs["q_weight"] if affine else None for name in ("weight", "bias") for x in "qk"}
    return variant(norm_part_rope.FAMILY, RotatedChain(interleaved, False, steps, steps, norm="layer"), d, **specs)


def silu(d: int, dtype: torch.dtype = BF16, form: str = "model") -> Variant:
    steps, row = activation_steps(form, dtype, dtype), TensorSpec(dtype, "token", 16)
    out = TensorSpec(steps.out, "token", 16)
    return variant(OPS["silu_mul"].family, ActivationChain("silu", steps), d, a=row, b=row, out=out)


VARIANTS = {
    "Z-Image": rope(128, 30, 30),
    "Z-Image, heads in fp32": rope(128, 30, 30, FP32),
    "Lumina 2": rope(96, 24, 8, rotation=COMPLEX128),
    "Ideogram 4": rope(256, 18, 18, rotation=BF16, interleaved=False),
    "Flux": rope(128, 24, 24, rotation=FP32, rope_dtype=FP32, out_dtype=BF16),
    "Flux, two streams": joined(24, 128),
    "CogVideoX": layer_normed(64, 48),
    "CogView4": layer_normed(128, 32, interleaved=False, affine=False),
    "halves in fp32": rope(128, 24, 8, FP32, FP32, interleaved=False),
    "many heads": rope(128, 128, 8),
    "wide heads": rope(512, 16, 16, FP32),
    "Z-Image, native": rope(128, 30, 30, form="native"),
    "silu": silu(10240),
    "silu fp32": silu(10240, FP32),
}


@pytest.mark.parametrize(("arch", "name"), on_two(VARIANTS, COMPILED))
def test_nothing_spills(arch: str, name: str) -> None:
    kernel = compiled(arch, VARIANTS[name])
    used = resources(kernel.cubin)
    assert ".local" not in kernel.ptx
    assert used["frame"] == 0
    assert -(-used["registers"] // 8) * 8 * VARIANTS[name].tiling(arch).threads <= 65536


@pytest.mark.parametrize("arch", UNLIKE)
def test_five_ctas_of_z_images_heads_run_on_a_multiprocessor(arch: str) -> None:
    registers = -(-resources(compiled(arch, VARIANTS["Z-Image"]).cubin)["registers"] // 8) * 8
    assert 5 * registers * VARIANTS["Z-Image"].tiling(arch).threads <= 65536


def accesses(ptx: str) -> tuple[list[str], list[str]]:
    return re.findall(r"ld\.global\S*", ptx), re.findall(r"st\.global\S*", ptx)


@pytest.mark.parametrize(
    ("arch", "name", "loads", "stores"),
    [
        *((arch, "Z-Image", 6 + 2 + 2, 6) for arch in UNLIKE),  # heads, rotation, weights
        ("sm_90a", "Lumina 2", 4 + 4 + 2, 4),
        ("sm_90a", "Flux, two streams", 6 + 2 * 2 + 2, 6),
        ("sm_90a", "CogVideoX", 6 + 2 * 2 + 2 * 2, 6),  # heads, cosines and sines, weights and biases
        ("sm_90a", "Ideogram 4", 2 * 2 + 2 * 2 + 2 * 2, 2 * 2),  # both halves of each
        ("sm_90a", "silu", 4, 2),
    ],
)
def test_every_head_and_row_is_read_and_written_once_in_pieces_of_16_bytes(
    arch: str, name: str, loads: int, stores: int
) -> None:
    reads, writes = accesses(compiled(arch, VARIANTS[name]).ptx)
    assert len(reads) == loads and len(writes) == stores
    assert all(access.endswith(WIDE) for access in reads + writes)


@pytest.mark.parametrize("name", ["Z-Image", "Lumina 2", "Ideogram 4", "CogVideoX"])
def test_every_load_is_issued_before_the_first_sum_and_no_cta_waits(name: str) -> None:
    ptx = compiled("sm_90a", VARIANTS[name]).ptx
    before, _ = ptx.split("bar.warp.sync")
    assert before.count("ld.global") == ptx.count("ld.global")
    assert "shfl" not in before
    assert "bar.sync" not in ptx


def test_a_sum_over_a_head_is_shuffled_among_its_lanes_only() -> None:
    for name, lanes in (("Z-Image", 16), ("Ideogram 4", 16), ("Z-Image, heads in fp32", 32)):
        ptx, tiling = compiled("sm_90a", VARIANTS[name]).ptx, VARIANTS[name].tiling("sm_90a")
        assert tiling.lanes == lanes
        distances = [int(distance) for distance in re.findall(r"shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, (\d+),", ptx)]
        assert set(distances) == {1 << i for i in range(lanes.bit_length() - 1)}


def test_a_misaligned_head_narrows_its_own_accesses_only() -> None:
    reads, writes = accesses(compiled("sm_80", rope(128, 30, 30, access=2)).ptx)
    assert sum(access.endswith(WIDE) for access in reads) == 2 + 2
    assert sum(not access.endswith(WIDE) for access in reads) == 6 * 8
    assert all(access.endswith(WIDE) for access in writes)


def test_complex_numbers_are_multiplied_with_two_fmas_and_two_products() -> None:
    """As CUDA's compiler contracts eager's product: the sums would else round once more than it does."""
    ptx = compiled("sm_90a", VARIANTS["Lumina 2"]).ptx
    assert ptx.count("fma.rn.f64") == ptx.count("mul.f64") == 4 * 8  # of 4 heads, 8 elements each
    assert "add.f64" not in ptx and "sub.f64" not in ptx


def test_silu_in_16_bits_takes_two_special_functions_an_element_and_fp32_divides() -> None:
    narrow, wide = (compiled("sm_90a", VARIANTS[name]).ptx for name in ("silu", "silu fp32"))
    assert narrow.count("ex2.approx.ftz.f32") == narrow.count("rcp.approx.ftz.f32") == 16
    assert "div" not in narrow
    assert wide.count("div.rn.f32") == 8


def test_a_tiling_covers_every_element_of_every_head() -> None:
    every_heads = ((1, 0), (3, 1), (30, 30), (24, 8), (128, 128))
    for d, parts, width, heads in itertools.product(range(8, 513, 8), (1, 2), (2, 4), every_heads):
        tiling = head_tiling(d, heads, width, parts)
        assert d % (parts * tiling.vector) == 0  # a vector lies in one part
        assert tiling.vector % 2 == 0 and tiling.vector * width <= 16  # a pair of neighbours lies in one vector
        assert tiling.parts * tiling.vectors * tiling.vector * tiling.lanes >= d
        assert 32 % tiling.lanes == 0
        assert tiling.threads % 32 == 0 and tiling.threads <= 512
