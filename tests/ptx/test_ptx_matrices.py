"""The kernels for heads that are rotated by 2×2 matrices, or with addcmul, run from their PTX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import attention_kernel_bounds as bounds
import pytest
import torch
from kernel_bounds import random
from matrix_rotations import rotations
from torch import Tensor

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from dit_kernels.cute import norm_rope
from dit_kernels.families import OPS
from ptx.device import call, compiled, gpu
from ptx.judging import Interpreter

INTERPRETER = Interpreter()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
S, D = 5, 64


KINDS: dict[str, dict[str, Any]] = {
    "FLUX": dict(sizes=(1, 2, 4, 4, 128), rope_dtype=FP32, out_dtype=BF16),
    "ComfyUI's Z-Image": dict(sizes=(2, 2, 5, 5, 128), rope_dtype=FP32, out_dtype=BF16, addcmul=True),
    "in bf16": dict(sizes=(2, S, 3, 1, D), table=BF16),
    "in fp16, with addcmul": dict(sizes=(2, S, 3, 1, 24), dtype=FP16, table=FP16, addcmul=True),
    "in fp32": dict(sizes=(1, S, 5, 3, D), dtype=FP32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_follow_the_definition(kind: str) -> None:
    given = dict(KINDS[kind])
    batch, tokens, *sizes = given.pop("sizes")
    o = bounds.heads(batch, tokens, *sizes, dtype=given.pop("dtype", BF16))
    table = rotations(tokens, sizes[-1], given.pop("table", FP32), batch)
    with gpu("sm_90a", 1):
        bounds.check_heads(INTERPRETER, replace(o, rotation=table, sin=None), **given)


def test_two_streams_follow_the_definition() -> None:
    before, later = (bounds.heads(2, n, 3, 2, D) for n in (2, 3))
    later = replace(later, rotation=rotations(5, D, batch=2), sin=None)
    with gpu("sm_90a", 1):
        bounds.check_joined(INTERPRETER, replace(before, q=before.q * 3), later, rope_dtype=FP32, out_dtype=BF16)


def exact_norm(heads: int = 3) -> tuple[Tensor, Tensor]:
    """x and a weight, so that norm(x) is ± the weight, exactly, if eps is 0."""
    return random(2, S, heads, D, dtype=FP32).sign(), random(D, dtype=FP32, seed=3)


ROTATIONS = {
    "matrices": ((rotations(S, D), None), {}),
    "neighbours": (tuple(random(S, D, dtype=FP32, seed=seed) for seed in (4, 5)), {}),
    "halves": (tuple(random(S, D // 2, dtype=FP32, seed=seed) for seed in (4, 5)), {"interleaved": False}),
}


def check_bits(rotation: str, addcmul: bool) -> None:
    """In fp32, where nothing but the rotation rounds. The definition on a CPU contracts with addcmul only, too."""
    tables, options = ROTATIONS[rotation]
    arguments = (*exact_norm(), *tables, 0.0)
    options = {**options, "addcmul": addcmul}
    (got,) = call("norm_rope", arguments, **options)
    (expected,) = OPS["norm_rope"].call(*arguments, **options).definition()
    (other,) = OPS["norm_rope"].call(*arguments, **{**options, "addcmul": not addcmul}).definition()
    assert not torch.equal(expected, other)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("addcmul", (False, True))
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_rotation_rounds_as_the_definition_to_the_last_bit(rotation: str, addcmul: bool) -> None:
    with gpu("sm_90a", 1):
        check_bits(rotation, addcmul)


def _other_index(original: Callable[..., Any], of: Any, which: int) -> Any:
    return original(of, 1 - which)


def _products_swapped(original: Callable[..., Any], a: Any, b: Any, c: Any, d: Any, *options: Any) -> Any:
    return original(c, d, a, b, *options)


def _contracted(original: Callable[..., Any], *arguments: Any) -> Any:
    return original(*arguments[:-1], not arguments[-1])


MISTAKES = (
    ("column", _other_index, False),
    ("of_pairs", _other_index, False),
    ("sums_of_products", _products_swapped, True),
    ("sums_of_products", _contracted, False),
)


@pytest.mark.parametrize(("name", "wrong", "addcmul"), MISTAKES)
def test_a_mistake_in_the_kernel_is_found(name: str, wrong: Callable[..., Any], addcmul: bool) -> None:
    original = getattr(norm_rope, name)

    patch = mock.patch.object(norm_rope, name, lambda *a: wrong(original, *a))
    with gpu("sm_90a", 1, compiled.__wrapped__), patch, pytest.raises(AssertionError):
        check_bits("matrices", addcmul)
