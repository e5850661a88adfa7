"""The CUDA kernels for heads that are rotated by 2×2 matrices, or with addcmul, against the definition on the same GPU.

The bounds are those of `attention_kernel_bounds`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import attention_kernel_bounds as bounds
import pytest
import torch
from kernel_bounds import BF16, FP16, FP32, Device
from matrix_rotations import rotations

from dit_kernels.rounding import FORMS

GPU = Device()
heads, matrices = partial(bounds.heads, device="cuda"), partial(rotations, device="cuda")
IN_FP32 = dict(rope_dtype=FP32, out_dtype=BF16)


@pytest.fixture(scope="module", autouse=True)
def own_kernel_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIT_KERNELS_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.mark.parametrize("addcmul", (False, True))
@pytest.mark.parametrize(
    ("sizes", "dtype", "table", "options"),
    (
        ((1, 4608, 24, 24, 128), BF16, FP32, IN_FP32),
        ((2, 1056, 30, 30, 128), BF16, FP32, IN_FP32),
        ((2, 515, 24, 8, 96), BF16, FP32, IN_FP32),
        ((1, 515, 12, 12, 64), BF16, BF16, {}),
        ((1, 515, 12, 12, 64), FP16, FP16, {}),
        ((1, 515, 12, 12, 64), FP32, FP32, {}),
    ),
)
def test_heads_follow_the_definition(
    sizes: tuple[int, ...], dtype: torch.dtype, table: torch.dtype, options: dict[str, Any], addcmul: bool
) -> None:
    o = replace(heads(*sizes, dtype), rotation=matrices(sizes[1], sizes[-1], table, sizes[0]), sin=None)
    bounds.check_heads(GPU, o, addcmul=addcmul, **options)


@pytest.mark.parametrize("form", FORMS)
def test_matrices_follow_the_definition_in_every_rounding_form(form: str) -> None:
    o = replace(heads(2, 264, 24, 24, 128), rotation=matrices(264, 128), sin=None)
    bounds.check_heads(GPU, o, rounding=form, **IN_FP32)


@pytest.mark.parametrize("interleaved", (True, False))
def test_cosines_and_sines_with_addcmul_follow_the_definition(interleaved: bool) -> None:
    o = heads(2, 264, 24, 24, 128, rotation=FP32, interleaved=interleaved)
    bounds.check_heads(GPU, o, interleaved=interleaved, addcmul=True, **IN_FP32)


@pytest.mark.parametrize("addcmul", (False, True))
def test_two_streams_follow_the_definition(addcmul: bool) -> None:
    before, later = (heads(1, n, 24, 24, 128) for n in (512, 4096))
    later = replace(later, rotation=matrices(4608, 128), sin=None)
    bounds.check_joined(GPU, replace(before, q=before.q * 3), later, addcmul=addcmul, **IN_FP32)
