"""The CUDA kernel of norm_all_heads_rope against the definition run on the same GPU.

The bounds are those of `attention_kernel_bounds`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import rotated_row_bounds as bounds
import torch
from attention_kernel_bounds import misaligned, tokens_first
from kernel_bounds import BF16, FP16, FP32, Device

from dit_kernels.rounding import FORMS

check, row = partial(bounds.check, Device()), partial(bounds.row, device="cuda")
LTX = dict(one_a_pair=False, rope_dtype=FP32)
LTX2 = dict(own=True, interleaved=False, addcmul=True, rope_dtype=FP32)


@pytest.fixture(scope="module", autouse=True)
def own_kernel_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIT_KERNELS_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.mark.parametrize(
    ("sizes", "options"),
    (
        ((1, 4100, 40, 128), {}),
        ((2, 1030, 12, 128), {"table": BF16}),
        ((1, 515, 40, 128), {"dtype": FP32, "weight": FP32}),
        ((1, 4100, 1, 2048), LTX),
        ((2, 515, 1, 4096), {**LTX, "tables": 2}),
        ((1, 4100, 32, 128), LTX2),
        ((2, 126, 32, 64), {**LTX2, "tables": 2}),
        ((1, 515, 24, 96), {"interleaved": False, "one_a_pair": False, "dtype": FP16}),
        ((1, 33, 128, 128), {}),
    ),
)
def test_rows_follow_the_definition(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    check(row(*sizes, **{"rounding": "weight_then_cast", **options}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
def test_rows_follow_the_definition_in_every_rounding_form(form: str, dtype: torch.dtype) -> None:
    check(row(1, 264, 12, 128, dtype, rounding=form))


@pytest.mark.parametrize("view", (tokens_first, misaligned))
def test_rows_of_any_layout_follow_the_definition(view: Any) -> None:
    o = row(2, 264, 12, 128)
    check(replace(o, x=view(o.x)))
