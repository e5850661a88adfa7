"""What the kernels of norm_all_heads_rope compile to, for every architecture: this needs no GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from kernel_variants import variant
from ptx.device import compiled, on_two
from test_kernel_code import COMPILED, WIDE, assert_fits

from dit_kernels.chain import RotatedRowChain
from dit_kernels.compile import Variant
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.cute.tiling import WIDEST_ROW, rotated_row_tiling
from dit_kernels.families.rotated_row import FAMILY
from dit_kernels.rounding import rotated_steps

BF16, FP32 = torch.bfloat16, torch.float32


def row(
    heads: int,
    width: int,
    *,
    dtype: torch.dtype = BF16,
    table: torch.dtype = FP32,
    weight: torch.dtype = BF16,
    access: int = 16,
    one_a_pair: bool = True,
    own: bool = False,
    interleaved: bool = True,
    addcmul: bool = False,
    form: str = "weight_then_cast",
    **dtypes: Any,
) -> Variant:
    """All operands as aligned as contiguous ones are, unless `access` says otherwise for x."""
    steps = rotated_steps(form, dtype, weight, table, out_dtype=dtype, **dtypes)
    tables = TensorSpec(table, "token", 16)
    return variant(
        FAMILY,
        RotatedRowChain(heads, own, interleaved, one_a_pair, addcmul, steps),
        heads * width,
        x=TensorSpec(dtype, "token", access),
        weight=TensorSpec(weight, "column", 16),
        cos=tables,
        sin=tables,
        out=TensorSpec(dtype, "token", 16),
    )


VARIANTS = {
    "Wan 14B": row(40, 128),
    "Wan 14B, tables in bf16": row(40, 128, table=BF16),
    "Wan 14B, weight in fp32": row(40, 128, weight=FP32),
    "Wan 14B in fp32": row(40, 128, dtype=FP32, weight=FP32),
    "Wan 1.3B": row(12, 128),
    "LTX": row(1, 2048, one_a_pair=False),
    "LTX-2, interleaved": row(1, 4096, one_a_pair=False),
    "LTX-2": row(32, 128, own=True, interleaved=False, addcmul=True),
    "LTX-2, audio": row(32, 64, own=True, interleaved=False, addcmul=True),
    "halves": row(24, 96, interleaved=False, one_a_pair=False, form="cast_then_weight"),
    "widest": row(128, 128),
    "misaligned": row(40, 128, access=2),
}


@pytest.mark.parametrize(("arch", "name"), on_two(VARIANTS, COMPILED))
def test_nothing_spills_and_as_many_ctas_fit_as_are_launched(arch: str, name: str) -> None:
    assert_fits(arch, VARIANTS[name])


@pytest.mark.parametrize("name", ("Wan 14B", "LTX", "LTX-2"))
def test_rows_and_tables_come_by_bulk_copies_and_results_are_written_in_pieces_of_16_bytes(name: str) -> None:
    ptx = compiled("sm_90a", VARIANTS[name]).ptx
    vectors = VARIANTS[name].tiling("sm_90a").vectors
    reads, writes = (re.findall(rf"{kind}\.global\S*", ptx) for kind in ("ld", "st"))
    assert len(reads) == len(writes) == vectors  # the weight, and the result
    assert all(access.endswith(WIDE) for access in (*reads, *writes))
    stages = VARIANTS[name].tiling("sm_90a").schedule.stages
    assert len(re.findall(r"cp\.async\.bulk\.shared", ptx)) == 3 * (stages + 1)
    assert ptx.count("bar.sync") == 3  # the start, the sum, and the end of a row's stay in shared memory


@pytest.mark.parametrize(("name", "contracted"), (("Wan 14B", False), ("LTX-2", True)))
def test_a_product_contracts_with_the_sum_only_in_addcmul(name: str, contracted: bool) -> None:
    ptx = compiled("sm_90a", VARIANTS[name]).ptx
    tiling = VARIANTS[name].tiling("sm_90a")
    elements = tiling.vectors * tiling.vector
    assert len(re.findall(r"add\.rn\.f32", ptx)) == (0 if contracted else elements) + 1  # and mean + eps


@pytest.mark.parametrize("d", (16, 1536, 2048, 3072, 4096, 5120, 8192, 16384))
@pytest.mark.parametrize("halves", (1, 2))
@pytest.mark.parametrize("width", (2, 4))
def test_a_tiling_covers_every_element_of_a_row_once(d: int, halves: int, width: int) -> None:
    if d * width > WIDEST_ROW:
        return
    tiling = rotated_row_tiling(d, 16 // halves, halves, width, width, 4, 3 * d * width, "sm_90a")
    covered = tiling.threads * tiling.vectors * tiling.vector
    assert tiling.vectors % halves == 0 and 16 // halves % tiling.vector == 0
    assert covered >= d and tiling.tail == (covered > d)
    assert tiling.threads % 32 == 0 and tiling.threads <= 640
