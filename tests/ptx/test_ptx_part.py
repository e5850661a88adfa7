"""The kernels of layer norms of heads, and of qk_norm_part_rope, run from their PTX, with the bounds of a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import attention_kernel_bounds as bounds
import pytest
import torch
from kernel_bounds import EPS, random

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from dit_kernels.cute import norm_part_rope, norm_rope
from ptx.device import compiled, gpu
from ptx.judging import Interpreter
from ptx.memory import Fault

INTERPRETER = Interpreter()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PART, WHOLE = "qk_norm_part_rope", "qk_norm_rope"
COGVIDEOX = dict(sizes=(1, 4, 48, 48, 64), rotation=FP32, rope_dtype=FP32, out_dtype=BF16)
SMALL = dict(sizes=(2, 5, 3, 2, 64), rotation=FP32, rope_dtype=FP32, out_dtype=BF16)
KINDS: dict[str, dict[str, Any]] = {
    "CogVideoX": COGVIDEOX,
    "CogView4": dict(COGVIDEOX, sizes=(1, 4, 32, 32, 128), interleaved=False, affine=False),
    "CogVideoX, rounded once": dict(COGVIDEOX, rounding="fp32"),
    "FP32LayerNorm": dict(SMALL, rounding="weight_then_cast", weight=FP32),
    "several tokens a CTA": dict(SMALL, sizes=(2, 7, 1, 1, 64)),
    "a head that does not fill its lanes": dict(SMALL, sizes=(1, 3, 3, 2, 24)),
    "halves that do not fill their lanes": dict(SMALL, sizes=(1, 3, 3, 2, 80), interleaved=False),
    "complex": dict(sizes=(2, 5, 3, 2, 64)),
    "fp16": dict(sizes=(2, 5, 3, 2, 64), dtype=FP16, rotation=FP16),
    "fp32": dict(sizes=(2, 5, 3, 2, 64), dtype=FP32, rotation=FP32),
}


def later(t: torch.Tensor | None, first: int) -> torch.Tensor | None:
    return None if t is None else t[:, first:]


def check(kind: dict[str, Any], op: str = PART, first: int = 2, view: Any = lambda t: t, **options: Any) -> None:
    given = {"norm": "layer", "affine": True, **kind, **options}
    sizes, affine = given.pop("sizes"), given.pop("affine")
    of_operands = {name: given.pop(name) for name in ("dtype", "rotation", "weight") if name in given}
    o = bounds.heads(*sizes, **of_operands, interleaved=given.get("interleaved", True))
    if not affine:
        o = replace(o, q_weight=None, k_weight=None)
    o = replace(o, q=view(o.q + 1), k=view(o.k))
    biases = [None if w is None or given["norm"] == "rms" else w.flip(0).contiguous() for w in (o.q_weight, o.k_weight)]
    if op == PART:
        o = replace(o, rotation=later(o.rotation, first), sin=later(o.sin, first))
    bounds.check_with_bias(INTERPRETER, op, o, *biases, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_tokens_are_rotated_as_the_definition_does(kind: str) -> None:
    with gpu("sm_90a", 1):
        check(KINDS[kind])


@pytest.mark.parametrize("arch", ("sm_80", "sm_100a"))
@pytest.mark.parametrize("kind", ("CogVideoX", "CogView4"))
def test_the_last_tokens_are_rotated_as_the_definition_does_on_other_architectures(arch: str, kind: str) -> None:
    with gpu(arch, 1):
        check(KINDS[kind])


@pytest.mark.parametrize("first", (0, 1, 5))
def test_any_number_of_tokens_may_be_rotated(first: int) -> None:
    with gpu("sm_90a", 1):
        check(SMALL, first=first)
        if first < 5:  # the interpreter's complex product has numbers
            check(KINDS["complex"], first=first)


def test_an_rms_norm_may_precede() -> None:
    with gpu("sm_90a", 1):
        check(SMALL, norm="rms")
        check(KINDS["complex"], norm="rms", rounding="native")


@pytest.mark.parametrize("view", (bounds.heads_first, bounds.misaligned, bounds.one_for_all))
def test_heads_of_any_layout_follow_the_definition(view: Any) -> None:
    with gpu("sm_90a", 1):
        check(SMALL, view=view)


@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
@pytest.mark.parametrize("kind", ("CogVideoX", "CogView4", "a head that does not fill its lanes", "fp32"))
def test_layer_norms_of_tokens_that_are_all_rotated_follow_the_definition(arch: str, kind: str) -> None:
    with gpu(arch, 1):
        check(KINDS[kind], WHOLE)


def test_one_tensor_is_normed_and_rotated_as_q_is() -> None:
    o, bias = bounds.heads(2, 3, 3, 2, 64), random(64, seed=5)
    with gpu("sm_90a", 1):
        both = INTERPRETER.run(WHOLE, *o.arguments(), bias, None, norm="layer")
        (one,) = INTERPRETER.run("norm_rope", o.q, o.q_weight, o.rotation, o.sin, EPS, bias, norm="layer")
    assert torch.equal(one, both[0])


def _true(original, *arguments):  # type: ignore[no-untyped-def]
    return True


def _always_rotated(original, condition, yes, no):  # type: ignore[no-untyped-def]
    return yes


def _all_counted(original, inside, value):  # type: ignore[no-untyped-def]
    return value


def _no_bias(original, values, weights, biases, *rest):  # type: ignore[no-untyped-def]
    return original(values, weights, None, *rest)


TAIL = KINDS["a head that does not fill its lanes"]


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "of"),
    (
        (norm_part_rope, "_chosen", _always_rotated, SMALL),
        (norm_part_rope.RotatedPlace, "has_token", _true, SMALL),
        (norm_rope, "_counted", _all_counted, TAIL),
        (norm_rope, "_layer_normed", _no_bias, SMALL),
    ),
    ids=("every token rotated", "tables read for every token", "zeros counted", "no bias"),
)
def test_a_mistake_in_the_kernel_is_found(owner: Any, name: str, wrong: Any, of: dict[str, Any]) -> None:
    original = getattr(owner, name)
    mistake = mock.patch.object(owner, name, lambda *a: wrong(original, *a))
    with gpu("sm_90a", 1, compiled.__wrapped__), mistake, pytest.raises((AssertionError, Fault)):
        check(of)
