"""norm_all_heads_rope: schema, fake, gradients, errors; the definition against the models' own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dit_kernels.ops import OPS
from dit_kernels.rounding import FORMS

op = torch.ops.dit_kernels.norm_all_heads_rope
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
B, S, H, DH = 2, 5, 3, 16
D = H * DH
EPS = 1e-5


def tensor(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(dtype)


def kinds(heads: int = H, width: int = DH) -> dict[str, tuple[tuple[int, ...], dict[str, Any]]]:
    """The shape of the tables, and the options, of every kind of rotation."""
    d = heads * width
    return {
        "Wan": ((1, S, 1, width // 2), {"heads": heads}),
        "LTX": ((B, S, d), {}),
        "LTX-2": ((B, S, d // 2), {"heads": heads, "own": True, "interleaved": False, "addcmul": True}),
        "halves": ((S, width), {"heads": heads, "interleaved": False}),
        "neighbours of each head": ((S, 1, d), {"heads": heads, "own": True}),
    }


def operands(kind: str, dtype: torch.dtype, table: torch.dtype = FP32) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    shape, options = kinds()[kind]
    tables = tensor(*shape, dtype=table), tensor(*shape, dtype=table)
    return (tensor(B, S, D, dtype=dtype), tensor(D, dtype=dtype), *tables, EPS), options


# --- what any op owes the dispatcher ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, BF16) for kind in kinds()), ("LTX-2", FP16), ("Wan", FP32)])
def test_opcheck_passes_for_every_kind_of_rotation(kind: str, dtype: torch.dtype) -> None:
    args, options = operands(kind, dtype)
    torch.library.opcheck(op.default, args, {**options, "out_dtype": dtype})
    torch.library.opcheck(op.eps_tensor, (args[0], None, *args[2:4], torch.tensor(EPS)), options)


@pytest.mark.parametrize(("kind", "rounding"), [*((kind, "native") for kind in kinds()), *(("Wan", f) for f in FORMS)])
def test_gradients_are_those_of_the_formula(kind: str, rounding: str) -> None:
    torch.manual_seed(0)
    shape, options = kinds(2, 4)[kind]
    shapes = ((B, S, 8), (8,), shape, shape)
    args = [tensor(*s, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(lambda *a: op(*a, EPS, rounding=rounding, **options), args)


@given(
    dtype=st.sampled_from(DTYPES),
    table=st.sampled_from(DTYPES),
    kind=st.sampled_from(sorted(kinds())),
    rounding=st.sampled_from(FORMS),
    out=st.sampled_from((None, *DTYPES)),
)
def test_the_fake_result_has_the_metadata_of_the_real_one(dtype, table, kind, rounding, out) -> None:
    args, options = operands(kind, dtype, table)
    options = {**options, "rounding": rounding, "out_dtype": out}
    real = op(args[0].transpose(0, 1).contiguous().transpose(0, 1), *args[1:], **options)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), **options)
    assert real.is_contiguous() and real.shape == (B, S, D)
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


# --- the definition against the models' own code ----------------------------------------------------------------------


def normed(x: Tensor, weight: Tensor) -> Tensor:
    norm = nn.RMSNorm(weight.shape[0], eps=EPS)
    norm.weight.data = weight
    return norm(x)


def wan(hidden_states: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
    """apply_rotary_emb of diffusers' WanAttnProcessor, a function inside its __call__."""
    x1, x2 = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
    out = torch.empty_like(hidden_states)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(hidden_states)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", DTYPES, ids=str)
def test_a_rotation_that_is_written_into_slices_is_wans(dtype: torch.dtype, table: torch.dtype) -> None:
    (x, weight, *_), _ = operands("Wan", dtype)
    freqs = [tensor(1, S, 1, DH, dtype=table) for _ in range(2)]
    expected = wan(normed(x, weight).unflatten(2, (H, -1)), *freqs).flatten(2)
    cos, sin = freqs[0][..., 0::2], freqs[1][..., 1::2]
    got = op(x, weight, cos, sin, EPS, heads=H, rounding="weight_then_cast", out_dtype=dtype)
    assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotation_of_the_whole_row_is_ltx_videos(dtype: torch.dtype) -> None:
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

    (x, weight, cos, sin, _), _ = operands("LTX", dtype)
    expected = apply_rotary_emb(normed(x, weight), (cos, sin))
    got = op(x, weight, cos, sin, EPS, rounding="weight_then_cast", rope_dtype=FP32, out_dtype=dtype)
    assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotation_with_addcmul_is_that_of_ltx_2(dtype: torch.dtype) -> None:
    from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb

    (x, weight, cos, sin, _), options = operands("LTX-2", dtype)
    of_heads = [t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (cos, sin)]
    expected = apply_split_rotary_emb(normed(x, weight), of_heads)
    got = op(x, weight, cos, sin, EPS, rounding="weight_then_cast", rope_dtype=FP32, out_dtype=dtype, **options)
    assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("kind", kinds())
def test_one_head_is_what_norm_rope_computes(kind: str) -> None:
    _, options = kinds(1)[kind]
    shape = (S, DH) if kind in ("LTX", "halves", "neighbours of each head") else (S, DH // 2)
    x, weight, cos, sin = tensor(B, S, DH, dtype=BF16), tensor(DH, dtype=BF16), tensor(*shape), tensor(*shape)
    interleaved = options.get("interleaved", True)
    expected = torch.ops.dit_kernels.norm_rope(x[:, :, None], weight, cos, sin, EPS, interleaved=interleaved)
    options = {**options, "addcmul": False}
    assert torch.equal(op(x, weight, cos, sin, EPS, **options), expected[:, :, 0])


def test_a_kernel_takes_every_dtype_but_fp64_and_halves_or_heads_of_multiples_of_8() -> None:
    def fits(*args: Any, **options: Any) -> bool:
        return OPS["norm_all_heads_rope"].call(*args, **options).fits_kernel()

    for kind in kinds():
        args, options = operands(kind, BF16)
        assert fits(*args, **options)
        for name in ("norm_dtype", "rope_dtype", "out_dtype"):
            assert not fits(*args, **{**options, name: torch.float64})
        assert not fits(args[0].double(), *args[1:], **options)
    x, cos = tensor(1, 2, 24), tensor(2, 4)
    assert fits(x, None, cos, cos, EPS, heads=3) and not fits(x, None, cos, cos, EPS, heads=3, interleaved=False)
    assert not fits(tensor(1, 2, 24), None, tensor(2, 12), tensor(2, 12), EPS, heads=2)
    for width, fitting in ((8192, True), (8200, False)):
        wide = tensor(1, 1, width)
        assert fits(wide, None, wide, wide, EPS) == fitting


# --- errors -----------------------------------------------------------------------------------------------------------

X, W, COS = torch.zeros(B, S, D), torch.zeros(D), torch.zeros(S, DH)


def _call(x: Any = X, weight: Any = W, cos: Any = COS, sin: Any = COS, eps: Any = EPS, heads: int = H, **o: Any) -> Any:
    return op(x, weight, cos, sin, eps, heads=heads, **o)


BAD = {
    "x": lambda: _call(x=None),
    "x.shape": lambda: _call(x=X[None], cos=torch.zeros(B, DH), sin=torch.zeros(B, DH)),
    "x.dtype": lambda: _call(x=X.int()),
    "weight.shape": lambda: _call(weight=W[:3]),
    "cos": lambda: _call(cos=None),
    "cos.shape": lambda: _call(cos=COS[:, :3]),
    "cos.shape of all heads": lambda: _call(own=True),
    "cos.dtype": lambda: _call(cos=torch.zeros(S, DH // 2, dtype=torch.complex64)),
    "cos.device": lambda: _call(cos=COS.to("meta")),
    "sin.shape": lambda: _call(sin=COS[:, : DH // 2]),
    "sin.dtype": lambda: _call(sin=COS.bfloat16()),
    "heads": lambda: _call(heads=5),
    "heads of odd width": lambda: _call(heads=D),
    "heads below 1": lambda: _call(heads=0),
    "eps": lambda: _call(eps=-1.0),
    "rounding": lambda: _call(rounding="model"),
    "root": lambda: _call(root="cube"),
    "rope_dtype": lambda: _call(rope_dtype=torch.int8),
}


@pytest.mark.parametrize("argument", BAD)
def test_a_bad_argument_raises_a_value_error_that_names_it_and_what_was_expected(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument.split(maxsplit=1)[0]} is .*, expected \S"):
        BAD[argument]()


def test_an_empty_tensor_gives_an_empty_result() -> None:
    assert _call(x=X[:, :0], cos=COS[:0], sin=COS[:0]).shape == (B, 0, D)
