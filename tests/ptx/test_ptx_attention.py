"""The kernels of norm_rope, qk_norm_rope and silu_mul, run from their PTX, with the bounds of a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import attention_kernel_bounds as bounds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import random

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from dit_kernels.cute import activation, norm_rope
from dit_kernels.rounding import ACTIVATION_FORMS, FORMS, ROOTS
from ptx import numbers
from ptx.device import call, compiled, gpu, in_turn
from ptx.judging import Interpreter
from ptx.memory import Fault

INTERPRETER = Interpreter()
check_heads, check_silu = partial(bounds.check_heads, INTERPRETER), partial(bounds.check_silu, INTERPRETER)
heads = bounds.heads

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPLEX64, COMPLEX128 = torch.complex64, torch.complex128


# --- heads ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "Z-Image": dict(sizes=(2, 3, 30, 30, 128)),
    "Lumina 2": dict(sizes=(1, 3, 24, 8, 96), rotation=COMPLEX128),
    "Ideogram 4": dict(sizes=(1, 3, 18, 18, 256), rotation=BF16, interleaved=False),
    "Flux": dict(sizes=(2, 2, 24, 24, 128), rotation=FP32, rope_dtype=FP32, out_dtype=BF16),
    "fp32": dict(sizes=(1, 2, 5, 3, 64), dtype=FP32),
    "fp16": dict(sizes=(2, 3, 6, 2, 120), dtype=FP16, rotation=FP16),
    "several tokens a CTA": dict(sizes=(2, 7, 1, 1, 64)),
}


def check_kind(kind: str, **options: Any) -> None:
    given = {**KINDS[kind], **options}
    of_operands = {name: given.pop(name) for name in ("dtype", "rotation", "weight") if name in given}
    sizes, interleaved = given.pop("sizes"), given.get("interleaved", True)
    check_heads(heads(*sizes, **of_operands, interleaved=interleaved), **given)


@pytest.mark.parametrize("kind", KINDS)
def test_each_models_heads_follow_the_definition(kind: str) -> None:
    with gpu("sm_90a", 1):
        check_kind(kind)


@pytest.mark.parametrize(
    ("arch", "kind"), (("sm_80", "Z-Image"), ("sm_100a", "Ideogram 4"), ("sm_120a", "several tokens a CTA"))
)
def test_heads_follow_the_definition_on_other_architectures(arch: str, kind: str) -> None:
    with gpu(arch, 1):
        check_kind(kind, alone=False)


@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_a_bound_that_does_not_hold_names_the_element(dtype: torch.dtype) -> None:
    o = heads(1, 3, 2, 2, 64, dtype=dtype)
    a, b = random(2, 5, dtype=dtype, seed=1), random(2, 5, dtype=dtype, seed=2)

    class Off(Interpreter):
        def run(self, op: str, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
            results = super().run(op, *arguments, **options)
            results[-1][..., 1, 3] += 1
            return results

    with gpu("sm_90a", 1):
        with pytest.raises(AssertionError, match=r"^k\[\d, \d, 1, 3\] is "):
            bounds.check_heads(Off(), o)
        with pytest.raises(AssertionError, match=r"^out\[1, 3\] is "):
            bounds.check_silu(Off(), a, b)


@pytest.mark.parametrize("root", ROOTS[1:])
def test_heads_follow_the_definition_with_every_spelling_of_the_root(root: str) -> None:
    with gpu("sm_90a", 1):
        check_kind("Z-Image", root=root, alone=False)
        check_kind("Ideogram 4", root=root, rounding="native", alone=False)


@pytest.mark.parametrize("kind", ("Z-Image", "Ideogram 4"))
@pytest.mark.parametrize("form", FORMS)
def test_heads_follow_the_definition_in_every_rounding_form(kind: str, form: str) -> None:
    with gpu("sm_90a", 1):
        check_kind(kind, rounding=form, out_dtype=BF16, alone=False)


@settings(max_examples=12)
@given(
    d=st.sampled_from((8, 24, 40, 64, 72, 128, 160, 384)),
    numbers_of_heads=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from((BF16, FP16, FP32)),
    rotation=st.sampled_from((COMPLEX64, COMPLEX128, BF16, FP32)),
    interleaved=st.booleans(),
    weight=st.sampled_from((None, FP32)),
    view=st.sampled_from((bounds.heads_first, bounds.misaligned, bounds.one_for_all)),
    own=st.booleans(),
    one_a_pair=st.booleans(),
    alone=st.booleans(),
)
def test_heads_of_any_layout_follow_the_definition(
    d, numbers_of_heads, dtype, rotation, interleaved, weight, view, own, one_a_pair, alone
) -> None:
    interleaved = interleaved or rotation.is_complex
    o = heads(2, 3, *numbers_of_heads, d, dtype, rotation, weight, interleaved)
    turning = [o.rotation, o.sin]
    if own:
        turning = [None if t is None else torch.cat((t, t.flip(1))) for t in turning]
    if one_a_pair and o.sin is not None:
        turning = [t[..., ::2].contiguous() if interleaved else t[..., : d // 2] for t in turning]
    o = replace(o, q=view(o.q), rotation=turning[0], sin=turning[1])
    with gpu("sm_90a", 1):
        check_heads(o, interleaved=interleaved, alone=alone)


class Joining(Interpreter):
    """Runs ops that write into a part of a larger tensor: between other tokens, and between other columns of a row."""

    def run(self, op: str, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return tuple(t.contiguous() for t in call(op, arguments, self.part, **options))

    @staticmethod
    def part(result: torch.Tensor) -> torch.Tensor:
        b, s, *row = result.shape
        columns = slice(8, 8 + row[-1])
        return result.new_empty(b, s + 3, *row[:-1], row[-1] + 24)[:, 1 : 1 + s, ..., columns]


def test_results_may_be_parts_of_larger_tensors() -> None:
    with gpu("sm_90a", 1):
        for kind in (dict(sizes=(2, 3, 30, 30, 128)), dict(sizes=(2, 7, 2, 1, 64), rotation=BF16, interleaved=False)):
            given = dict(kind)
            sizes, rotation = given.pop("sizes"), given.pop("rotation", COMPLEX64)
            o = heads(*sizes, rotation=rotation, interleaved=given.get("interleaved", True))
            bounds.check_heads(Joining(), o, alone=False, **given)
        bounds.check_silu(Joining(), random(2, 5, 96, seed=1), random(2, 5, 96, seed=2))


@pytest.mark.parametrize("direction", (-1, 1))
@pytest.mark.parametrize("kind", ("Z-Image", "Ideogram 4", "fp16", "fp32"))
def test_heads_stay_within_the_bounds_whichever_way_approximations_err(kind: str, direction: int) -> None:
    with gpu("sm_90a", 1), numbers.perturbed(direction):
        check_kind(kind)


def test_a_batch_wider_than_the_grid_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_rope, "MAX_GRID_Y", 2)
    monkeypatch.setattr(activation, "MAX_GRID_Y", 2)
    with gpu("sm_90a", 1, compiled.__wrapped__):
        check_heads(heads(5, 2, 2, 1, 64), alone=False)
        check_silu(random(5, 2, 64), random(5, 2, 64, seed=1))


# --- silu -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "form", "dtype"), in_turn(product(ACTIVATION_FORMS, (BF16, FP16, FP32))))
def test_silu_mul_follows_the_definition(arch: str, form: str, dtype: torch.dtype) -> None:
    a, b = random(2, 3, 1000, dtype=dtype, seed=1) * 3, random(2, 3, 1000, dtype=dtype, seed=2)
    with gpu(arch, 1):
        check_silu(a, b, rounding=form)


@pytest.mark.parametrize("d", (7, 512))
def test_silu_mul_of_halves_of_one_tensor_and_of_strides_follows_the_definition(d: int) -> None:
    with gpu("sm_90a", 1):
        check_silu(*(random(2, 5, 2 * d) * 3).chunk(2, -1))
        check_silu(bounds.misaligned(random(2, 5, d)), bounds.tokens_first(random(2, 5, d, seed=1)))
        check_silu(random(2, 5, d), random(2, 5, d, seed=1).float(), silu_dtype=FP32)


def test_silu_of_large_and_special_numbers_is_eagers() -> None:
    with gpu("sm_90a", 1):
        bounds.check_special_numbers(INTERPRETER)


@pytest.mark.parametrize("direction", (-1, 1))
@pytest.mark.parametrize("dtype", (BF16, FP16))
def test_silu_stays_within_the_bounds_whichever_way_approximations_err(dtype: torch.dtype, direction: int) -> None:
    a, b = random(1, 3, 1000, dtype=dtype, seed=1) * 3, random(1, 3, 1000, dtype=dtype, seed=2)
    with gpu("sm_90a", 1), numbers.perturbed(direction):
        check_silu(a, b)


# --- mistakes in the kernels' Python: each is found -----------------------------------------------------------------


def _argument_back(original, *arguments):  # type: ignore[no-untyped-def]
    return arguments[-1]


def _true(original, *arguments):  # type: ignore[no-untyped-def]
    return True


def _turned_backwards(original, n, rotation):  # type: ignore[no-untyped-def]
    return original(n, _Conjugate(rotation))


class _Conjugate:
    """A rotation with its sines negated."""

    def __init__(self, rotation: Any):
        self.rotation, self.element_type = rotation, rotation.element_type

    def __getitem__(self, i: int) -> Any:
        return -self.rotation[i] if i % 2 else self.rotation[i]


def _no_weight(original, heads):  # type: ignore[no-untyped-def]
    return None


def _norm_not_rounded(original, values, weights, eps, steps, *sizes):  # type: ignore[no-untyped-def]
    return original(values, weights, eps, replace(steps, normed=FP32), *sizes)


def _sum_of_half_of_the_lanes(original, value, lanes):  # type: ignore[no-untyped-def]
    return original(value, lanes // 2)


def _sines_unsigned(original, sin, *pair):  # type: ignore[no-untyped-def]
    return sin


def _halves_unswapped(original, rotation, head, dtype):  # type: ignore[no-untyped-def]
    many = len(head) // 2
    return original(rotation, head[many:] + head[:many], dtype)


def _a_token_on(original, place):  # type: ignore[no-untyped-def]
    return [(at + place.d, inside) for at, inside in original(place)]


COMPLEX_HEADS = dict(sizes=(2, 3, 6, 2, 64))
REAL_HEADS = dict(sizes=(2, 3, 6, 2, 64), rotation=BF16)
REAL_HALVES = dict(sizes=(2, 3, 6, 2, 64), rotation=BF16, interleaved=False)
ODD_HEADS = dict(sizes=(1, 3, 5, 3, 64))
FEW_HEADS = dict(sizes=(1, 3, 1, 1, 64))
VALUE, FAULT = (AssertionError, "off by|differ"), (Fault, "out of bounds|nothing ever wrote|twice")


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "of", "found"),
    (
        (norm_rope, "_complex_product", _turned_backwards, COMPLEX_HEADS, VALUE),
        (norm_rope, "neighbours_swapped", _argument_back, REAL_HEADS, VALUE),
        (norm_rope, "signed", _sines_unsigned, REAL_HALVES, VALUE),
        (norm_rope.Rotation, "_by_real", _halves_unswapped, REAL_HALVES, VALUE),
        (norm_rope._Heads, "load_weight", _no_weight, COMPLEX_HEADS, VALUE),
        (norm_rope, "_normed", _norm_not_rounded, KINDS["Z-Image"], VALUE),
        (norm_rope, "warp_sum", _sum_of_half_of_the_lanes, COMPLEX_HEADS, VALUE),
        (norm_rope._Heads, "_inside", _true, ODD_HEADS, FAULT),
        (norm_rope.HeadPlace, "has_token", _true, FEW_HEADS, FAULT),
        (norm_rope.HeadPlace, "vectors", _a_token_on, COMPLEX_HEADS, FAULT),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_in_the_kernel_of_heads_is_found(owner: Any, name: str, wrong: Any, of: dict, found: Any) -> None:
    original = getattr(owner, name)
    error, message = found
    with mock.patch.dict(KINDS, {"mistaken": of}):
        with gpu("sm_90a", 1):
            check_kind("mistaken", alone=False)
        mistake = mock.patch.object(owner, name, lambda *a: wrong(original, *a))
        with gpu("sm_90a", 1, compiled.__wrapped__), mistake, pytest.raises(error, match=message):
            check_kind("mistaken", alone=False)


def _silu_rounded_late(original, a, b, chain):  # type: ignore[no-untyped-def]
    return original(a, b, replace(chain, steps=replace(chain.steps, activated=FP32)))


def _gate_for_value(original, a, b, chain):  # type: ignore[no-untyped-def]
    return original(b, a, chain)


@pytest.mark.parametrize("wrong", (_silu_rounded_late, _gate_for_value), ids=lambda wrong: wrong.__name__.strip("_"))
def test_a_mistake_in_silu_mul_is_found(wrong: Any) -> None:
    original = activation.activation
    with (
        gpu("sm_90a", 1, compiled.__wrapped__),
        mock.patch.object(activation, "activation", lambda *a: wrong(original, *a)),
        pytest.raises(AssertionError, match=r"off by|differ"),
    ):
        check_silu(random(1, 5, 1000), random(1, 5, 1000, seed=1))
