"""The kernels of norm_all_heads_rope, run from their PTX, with the bounds of a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import rotated_row_bounds as bounds
import torch
from attention_kernel_bounds import misaligned, tokens_first
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from dit_kernels.cute import pairs, rotated_row
from dit_kernels.rounding import FORMS
from ptx import numbers
from ptx.device import ARCHS, compiled, gpu
from ptx.judging import NormInterpreter

check, row = partial(bounds.check, NormInterpreter()), bounds.row
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

LTX = dict(one_a_pair=False, rope_dtype=FP32)
LTX2 = dict(own=True, interleaved=False, addcmul=True, rope_dtype=FP32)
KINDS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "Wan": ((1, 3, 40, 128), {"rounding": "weight_then_cast"}),
    "Wan, tables in bf16": ((2, 2, 12, 128), {"table": BF16}),
    "LTX": ((2, 3, 1, 2048), LTX),
    "LTX-2": ((1, 3, 32, 128), LTX2),
    "halves": ((2, 3, 5, 96), {"interleaved": False, "one_a_pair": False}),
    "fp32": ((1, 2, 6, 64), {"dtype": FP32, "one_a_pair": False}),
    "fp16": ((2, 5, 3, 40), {"dtype": FP16, "table": FP16}),
}


def of(kind: str, **options: Any) -> bounds.Row:
    sizes, given = KINDS[kind]
    return row(*sizes, **{**given, **options})


@pytest.mark.parametrize(
    ("arch", "kind"), [*(("sm_90a", k) for k in KINDS), *((a, "Wan") for a in ARCHS[:1] + ARCHS[2:])]
)
def test_the_rows_of_each_model_follow_the_definition(arch: str, kind: str) -> None:
    with gpu(arch, 1):
        check(of(kind))


@pytest.mark.parametrize("kind", ("LTX", "LTX-2", "halves"))
def test_rows_that_wait_in_registers_follow_the_definition(kind: str) -> None:
    with gpu("sm_80", 1):
        check(of(kind))


@pytest.mark.parametrize("form", FORMS[2:])
def test_rows_follow_the_definition_in_every_rounding_form(form: str) -> None:
    with gpu("sm_90a", 1):
        check(of("Wan", rounding=form, root="reciprocal" if form == "native" else "rsqrt"))


def test_ctas_that_walk_many_rows_cover_every_row() -> None:
    with gpu("sm_90a", 1):
        check(row(2, 23, 2, 64, tables=2))


@settings(max_examples=6)
@given(
    width=st.sampled_from((16, 48, 64, 128)),
    heads=st.integers(1, 5),
    dtype=st.sampled_from((BF16, FP16, FP32)),
    table=st.sampled_from((BF16, FP32)),
    weight=st.sampled_from((None, FP32)),
    tables=st.sampled_from((1, 2)),
    flags=st.fixed_dictionaries(dict.fromkeys(("own", "interleaved", "addcmul", "one_a_pair"), st.booleans())),
    view=st.sampled_from((tokens_first, misaligned, None)),
)
def test_rows_of_any_layout_follow_the_definition(width, heads, dtype, table, weight, tables, flags, view) -> None:
    o = row(2, 3, heads, width, dtype, table, weight, tables=tables, **flags)
    with gpu("sm_90a", 1):
        check(o if view is None else replace(o, x=view(o.x), cos=view(o.cos)))


@pytest.mark.parametrize("direction", (-1, 1))
@pytest.mark.parametrize("kind", ("Wan", "LTX-2"))
def test_rows_stay_within_the_bounds_whichever_way_approximations_err(kind: str, direction: int) -> None:
    with gpu("sm_90a", 1), numbers.perturbed(direction):
        check(of(kind))


# --- mistakes in the kernel's Python: each is found -------------------------------------------------------------------


def _unturned(original: Any, n: Any) -> Any:
    return n


def _place_of_the_next(original: Any, place: Any, i: Any) -> Any:
    return original(place, i) ^ 1


def _halves_exchanged(original: Any, place: Any, i: Any) -> Any:
    return original(place, i ^ 1)


def _not_contracted(original: Any, a: Any, b: Any, c: Any) -> Any:
    return a * b - c


def _half_of_the_sum(original: Any, value: Any, partials: Any) -> Any:
    return original(value, partials) * 0.5


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "kind"),
    (
        (rotated_row, "neighbours_swapped", _unturned, "Wan"),
        (rotated_row, "cta_sum", _half_of_the_sum, "Wan"),
        (rotated_row.TablePlace, "index", _place_of_the_next, "LTX"),
        (rotated_row.HalvesPlace, "index", _halves_exchanged, "LTX-2"),
        (pairs, "fma32", _not_contracted, "LTX-2"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_found(owner: Any, name: str, wrong: Any, kind: str) -> None:
    original = getattr(owner, name)
    with gpu("sm_90a", 1):
        check(of(kind))
    mistake = mock.patch.object(owner, name, lambda *a: wrong(original, *a))
    with gpu("sm_90a", 1, compiled.__wrapped__), mistake, pytest.raises(AssertionError, match=r"off by|differ"):
        check(of(kind))
