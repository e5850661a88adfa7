"""Layer norms of heads, and qk_norm_part_rope: schema, fake, gradients, errors; the definitions against eager code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from hypothesis import given
from hypothesis import strategies as st
from test_ops_of_attention import DH, EPS, complex_rotation, rotations, tensor
from torch import Tensor

from dit_kernels.rounding import FORMS

ops = torch.ops.dit_kernels
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
B, S, H, HK, FIRST = 2, 8, 6, 2, 3  # the tables of `rotations` have five rows
EPS2 = 1e-6


def operands(dtype: torch.dtype = FP32, d: int = DH, bias: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    heads = {"q": tensor(B, S, H, d, dtype=dtype) + 1, "k": tensor(B, S, HK, d, dtype=dtype)}
    columns = {f"{x}_{name}": tensor(d, dtype=dtype) for name in ("weight", "bias") for x in "qk"}
    return {**heads, **columns} if bias else {**heads, **columns, "q_bias": None, "k_bias": None}


def arguments(of: dict[str, Any], rotation: Any, eps: Any = EPS, eps2: Any = EPS2) -> tuple[Any, ...]:
    return of["q"], of["k"], of["q_weight"], of["k_weight"], *rotation, eps, eps2, of["q_bias"], of["k_bias"]


@pytest.mark.parametrize("norm", ("rms", "layer"))
@pytest.mark.parametrize("kind", rotations(FP32))
def test_opcheck_passes_for_every_kind_of_rotation(kind: str, norm: str) -> None:
    rotation, keywords = rotations(BF16)[kind]
    of = operands(BF16, bias=norm == "layer")
    torch.library.opcheck(ops.qk_norm_part_rope.default, arguments(of, rotation), {**keywords, "norm": norm})
    eps = torch.tensor(EPS)
    torch.library.opcheck(
        ops.qk_norm_part_rope.eps_tensor, arguments(of, rotation, eps, eps), keywords | {"norm": norm}
    )


@given(
    kind=st.sampled_from(sorted(rotations(FP32))),
    norm=st.sampled_from(("rms", "layer")),
    # A CPU's means in 16 bits depend on how many rows there are.
    rounding=st.sampled_from([form for form in FORMS if form != "native"]),
    dtype=st.sampled_from((BF16, FP16, FP32)),
)
def test_the_last_tokens_are_those_of_qk_norm_rope_and_the_others_are_not_rotated(kind, norm, rounding, dtype) -> None:
    rotation, keywords = rotations(dtype)[kind]
    of, options = operands(dtype, bias=norm == "layer"), {**keywords, "rounding": rounding, "norm": norm}
    last = {name: t[:, FIRST:].contiguous() if name in "qk" else t for name, t in of.items()}
    first = {name: t[:, :FIRST].contiguous() if name in "qk" else t for name, t in of.items()}
    got = ops.qk_norm_part_rope(*arguments(of, rotation), **options)
    turned = ops.qk_norm_rope(*arguments(last, rotation), **options)
    # A rotation by nothing, in the dtypes of the other one.
    still = torch.ones(FIRST, DH, dtype=dtype), torch.zeros(FIRST, DH, dtype=dtype)
    options |= {"rope_dtype": FP32, "out_dtype": got[0].dtype}
    normed = ops.qk_norm_rope(*arguments(first, still), **options)
    for all_, *both in zip(got, normed, turned, strict=True):
        assert all_.is_contiguous()
        assert torch.equal(all_, torch.cat(both, 1))


def test_as_many_rows_as_tokens_rotate_them_all_and_no_row_rotates_none() -> None:
    of, freqs = operands(BF16), complex_rotation(S, DH // 2)
    whole = ops.qk_norm_rope(*arguments(of, (freqs, None)), norm="layer")
    assert all(map(torch.equal, ops.qk_norm_part_rope(*arguments(of, (freqs, None)), norm="layer"), whole))
    q, _ = ops.qk_norm_part_rope(*arguments(of, (freqs[:0], None)), norm="layer")
    assert torch.equal(q, F.layer_norm(of["q"], (DH,), of["q_weight"], of["q_bias"], EPS))


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize("interleaved", (True, False))
def test_heads_are_those_of_cogvideox_and_cogview4(dtype: torch.dtype, interleaved: bool) -> None:
    of, (cos, sin) = operands(dtype), (tensor(S - FIRST, DH), tensor(S - FIRST, DH))
    expected = []
    for x in "qk":
        eps = EPS if x == "q" else EPS2
        n = F.layer_norm(of[x].transpose(1, 2), (DH,), of[f"{x}_weight"], of[f"{x}_bias"], eps)
        part = apply_rotary_emb(n[:, :, FIRST:], (cos, sin), use_real_unbind_dim=-1 if interleaved else -2)
        n[:, :, FIRST:] = part
        expected.append(n.transpose(1, 2))
    options = dict(norm="layer", rope_dtype=FP32, out_dtype=dtype, interleaved=interleaved)
    got = ops.qk_norm_part_rope(*arguments(of, (cos, sin)), **options)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
def test_a_layer_norm_of_each_head_may_be_rotated_as_a_whole(dtype: torch.dtype) -> None:
    of, (cos, sin) = operands(dtype), (tensor(S, DH), tensor(S, DH))
    n = F.layer_norm(of["q"], (DH,), of["q_weight"], of["q_bias"], EPS)
    expected = apply_rotary_emb(n, (cos, sin), sequence_dim=1)
    options = dict(norm="layer", rope_dtype=FP32, out_dtype=dtype)
    got = ops.norm_rope(of["q"], of["q_weight"], cos, sin, EPS, of["q_bias"], **options)
    assert torch.equal(got, expected)
    assert torch.equal(ops.qk_norm_rope(*arguments(of, (cos, sin)), **options)[0], expected)


@pytest.mark.parametrize("kind", rotations(FP32, 4))
@pytest.mark.parametrize("norm", ("rms", "layer"))
def test_gradients_are_those_of_the_formula(kind: str, norm: str) -> None:
    rotation, keywords = rotations(torch.float64, 4)[kind]
    of = {name: t.requires_grad_() for name, t in operands(torch.float64, 4).items()}
    options = {"interleaved": keywords.get("interleaved", True), "norm": norm}

    def call(q, k, q_weight, k_weight, q_bias, k_bias):  # type: ignore[no-untyped-def]
        biases = (q_bias, k_bias) if norm == "layer" else ()
        return ops.qk_norm_part_rope(q, k, q_weight, k_weight, *rotation, EPS, EPS2, *biases, **options)

    assert torch.autograd.gradcheck(call, tuple(of.values()))


COS = torch.zeros(S - FIRST, DH)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too many rows": (
        {"rotation": tensor(S + 1, DH)},
        r"rotation\.shape is \[9, 16\], expected at most a row for each",
    ),
    "rows of sin": ({"sin": tensor(1, 4, 1, DH)}, r"sin\.shape is .*, expected as many rows as rotation, 5"),
    "dimension of the heads": ({"rotation": COS[:, None]}, r"rotation\.shape is .*, expected \[S', n\], \[1 or B"),
    "width": ({"rotation": COS[:, :3], "sin": COS[:, :3]}, r"rotation\.shape is .*, expected a last dimension of"),
    "bias": ({"q_bias": tensor(3)}, r"q_bias\.shape is \[3\], expected \[16\]"),
    "bias of an rms norm": ({"norm": "rms"}, r"q_bias is a tensor of shape \[16\], expected None with norm='rms'"),
    "root": ({"root": "quotient"}, r"root is 'quotient', expected 'rsqrt' with norm='layer'"),
    "norm": ({"norm": "group"}, r"norm is 'group', expected 'rms', 'layer'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_names_the_argument_what_came_and_what_was_expected(wrong: str) -> None:
    changed, message = WRONG[wrong]
    named = {**operands(), "rotation": COS, "sin": COS, "q_eps": EPS, "k_eps": EPS, "norm": "layer", **changed}
    with pytest.raises(ValueError, match=f"^qk_norm_part_rope: {message}"):
        ops.qk_norm_part_rope(**named)


def test_a_rotation_of_some_tokens_is_none_for_qk_norm_rope() -> None:
    of: dict[str, Tensor] = operands()
    with pytest.raises(ValueError, match=r"rotation\.shape"):
        ops.qk_norm_rope(*arguments(of, (COS, COS)), norm="layer")
