"""The kernel of qk_norm_cat_rope, run from its PTX, with the bounds of a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import attention_kernel_bounds as bounds
import pytest
import torch

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from dit_kernels.cute import norm_cat_rope
from ptx.device import compiled, gpu
from ptx.judging import Interpreter
from ptx.memory import Fault

INTERPRETER = Interpreter()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLUX = dict(sizes=(24, 24, 128), rotation=FP32, rope_dtype=FP32, out_dtype=BF16)
SMALL = dict(sizes=(3, 2, 64))
KINDS: dict[str, dict[str, Any]] = {
    "Flux": FLUX,
    "Flux, native": dict(FLUX, rounding="native"),
    "several tokens of both streams a CTA": dict(sizes=(1, 1, 64), tokens=(3, 6)),
    "complex": SMALL,
    "halves, fp32 weights": dict(SMALL, rotation=BF16, interleaved=False, weight=FP32),
    "fp16": dict(SMALL, dtype=FP16, rotation=FP16),
    "fp32": dict(SMALL, dtype=FP32, rotation=FP32),
    "no weights": dict(SMALL, weighted=False),
}


def check(kind: dict[str, Any], view: Any = lambda t: t) -> None:
    given = dict(kind)
    sizes, (first, second) = given.pop("sizes"), given.pop("tokens", (2, 3))
    weighted = given.pop("weighted", True)
    of_operands = {name: given.pop(name) for name in ("dtype", "rotation", "weight") if name in given}
    of_operands["interleaved"] = given.get("interleaved", True)
    *made, table = (bounds.heads(2, n, *sizes, **of_operands) for n in (first, second, first + second))
    before, later = (
        replace(o, q=view(o.q), k=view(o.k), **({} if weighted else {"q_weight": None, "k_weight": None})) for o in made
    )
    before = replace(before, q=before.q * 3, k=before.k * -2)
    if weighted:
        before = replace(before, q_weight=before.k_weight, k_weight=before.q_weight)
    bounds.check_joined(INTERPRETER, before, replace(later, rotation=table.rotation, sin=table.sin), **given)


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_follow_the_definition(kind: str) -> None:
    with gpu("sm_90a", 1):
        check(KINDS[kind])


@pytest.mark.parametrize("arch", ("sm_80", "sm_100a"))
def test_two_streams_follow_the_definition_on_other_architectures(arch: str) -> None:
    with gpu(arch, 1):
        check(SMALL)


@pytest.mark.parametrize("view", (bounds.heads_first, bounds.misaligned, bounds.one_for_all))
def test_two_streams_of_any_layout_follow_the_definition(view: Any) -> None:
    with gpu("sm_90a", 1):
        check(SMALL, view)


def _not_earlier(original, condition, yes, no, *by):  # type: ignore[no-untyped-def]
    return original(condition, yes, no)


def _no(original, *arguments):  # type: ignore[no-untyped-def]
    return original(*arguments[:-2], arguments[-1], arguments[-1])


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    (("_select", _not_earlier, (AssertionError, Fault)), ("_number", _no, (AssertionError, Fault))),
)
def test_a_mistake_in_the_choice_of_the_stream_is_found(name: str, wrong: Any, found: Any) -> None:
    original = getattr(norm_cat_rope, name)
    patch = mock.patch.object(norm_cat_rope, name, lambda *a: wrong(original, *a))
    with gpu("sm_90a", 1, compiled.__wrapped__), patch, pytest.raises(found):
        check(SMALL)
