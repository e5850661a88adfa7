"""qk_norm_cat_rope: schema, fake, gradients, errors; the definition against the model's own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ops_of_attention import rotations as rotations_of_five
from test_ops_of_attention import tensor
from torch import Tensor

from dit_kernels.rounding import FORMS

op = torch.ops.dit_kernels.qk_norm_cat_rope
parts = torch.ops.dit_kernels.qk_norm_rope
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
B, BEFORE, S, H, HK, D = 2, 2, 3, 4, 2, 16
EPS = (1e-5, 1e-6, 1e-4, 1e-3)  # of q, k, q_before, k_before
ROTATIONS = sorted(rotations_of_five(FP32))  # for five tokens, as both streams have


def heads(dtype: torch.dtype = FP32, d: int = D, weight: torch.dtype | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = {"q": (B, S, H, d), "k": (B, S, HK, d), "q_before": (B, BEFORE, H, d), "k_before": (B, BEFORE, HK, d)}
    given: dict[str, Any] = {name: tensor(*shape, dtype=dtype) for name, shape in shapes.items()}
    return given | {f"{name}_weight": tensor(d, dtype=weight or dtype) for name in shapes}


def call(given: dict[str, Any], rotation: Any, **options: Any) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = op(*given.values(), *rotation, *EPS, **options)
    return result


@pytest.mark.parametrize("kind", ROTATIONS)
def test_opcheck_passes_for_every_kind_of_rotation(kind: str) -> None:
    rotation, keywords = rotations_of_five(BF16)[kind]
    given = heads(BF16)
    torch.library.opcheck(op.default, (*given.values(), *rotation, *EPS), keywords)
    given |= {"q_weight": None, "q_before_weight": None}
    eps = torch.tensor(1e-5)
    torch.library.opcheck(op.eps_tensor, (*given.values(), *rotation, eps, eps, eps, eps), keywords)


@given(
    kind=st.sampled_from(ROTATIONS),
    rounding=st.sampled_from(FORMS),
    dtype=st.sampled_from((BF16, FP16, FP32)),
    weight=st.sampled_from((None, FP32)),
)
def test_each_stream_is_what_qk_norm_rope_makes_of_it(kind, rounding, dtype, weight) -> None:
    given, (rotation, keywords) = heads(dtype, weight=weight), rotations_of_five(dtype)[kind]
    options = {**keywords, "rounding": rounding}
    tokens = [1 if t is not None and t.ndim > 2 else 0 for t in rotation]
    before = [t if t is None else t.narrow(dim, 0, BEFORE) for t, dim in zip(rotation, tokens, strict=True)]
    later = [t if t is None else t.narrow(dim, BEFORE, S) for t, dim in zip(rotation, tokens, strict=True)]
    q, k, q_before, k_before, *weights = given.values()
    text = parts(q_before, k_before, *weights[2:], *before, *EPS[2:], **options)
    image = parts(q, k, *weights[:2], *later, *EPS[:2], **options)
    for got, *both in zip(call(given, rotation, **options), text, image, strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, torch.cat(both, 1))


@pytest.mark.parametrize("kind", rotations_of_five(FP32, 4))
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    rotation, keywords = rotations_of_five(torch.float64, 4)[kind]
    given = [t.requires_grad_() for t in heads(torch.float64, 4).values()]
    options = {"interleaved": keywords.get("interleaved", True)}
    assert torch.autograd.gradcheck(lambda *a: op(*a, *rotation, *EPS, **options), given)


def test_a_rotation_with_a_dimension_for_the_heads_is_told_from_one_for_each_batch_item() -> None:
    given, (cos, sin) = heads(), (tensor(BEFORE + S, D), tensor(BEFORE + S, D))
    expected = call(given, (cos, sin))
    for shaped in (lambda t: t[:, None], lambda t: t[None], lambda t: t.expand(B, -1, -1), lambda t: t[None, :, None]):
        got = call(given, (shaped(cos), shaped(sin)))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (
        {"q_before": tensor(B, BEFORE, HK, D)},
        r"q_before\.shape is \[2, 2, 2, 16\], expected the number of heads of q, 4",
    ),
    "tokens": (
        {"k_before": tensor(B, 4, HK, D)},
        r"k_before\.shape is .*, expected the number of tokens of q_before, 2",
    ),
    "batch": ({"q_before": tensor(1, BEFORE, H, D)}, r"q_before\.shape is .*, expected \[B, S', H, Dh\]"),
    "width": ({"k_before": tensor(B, BEFORE, HK, 8)}, r"k_before\.shape is .*, expected \[B, S', H, Dh\]"),
    "dtype": (
        {"k_before": tensor(B, BEFORE, HK, D, dtype=BF16)},
        r"k_before\.dtype is torch\.bfloat16, expected float32",
    ),
    "weight": ({"q_before_weight": None}, r"q_before_weight is None, expected torch\.float32, as q_weight"),
    "weight's dtype": (
        {"k_before_weight": tensor(D, dtype=BF16)},
        r"k_before_weight is torch\.bfloat16, expected torch\.float32, as k_weight",
    ),
    "rotation": ({"rotation": tensor(S, D)}, r"rotation\.shape is \[3, 16\], expected a row for each of 5 tokens"),
    "sin": ({"sin": tensor(1, 4, 1, D)}, r"sin\.shape is \[1, 4, 1, 16\], expected a row for each of 5 tokens"),
    "eps": ({"k_before_eps": -1.0}, r"k_before_eps is -1\.0, expected a number >= 0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_names_the_argument_what_came_and_what_was_expected(wrong: str) -> None:
    changed, message = WRONG[wrong]
    table = {"rotation": tensor(BEFORE + S, D), "sin": tensor(BEFORE + S, D)}
    names = ("q_eps", "k_eps", "q_before_eps", "k_before_eps")
    given = {**heads(), **table, **dict(zip(names, EPS, strict=True))} | changed
    with pytest.raises(ValueError, match=f"^qk_norm_cat_rope: {message}"):
        op(*given.values())
