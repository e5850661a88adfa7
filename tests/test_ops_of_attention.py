"""norm_rope, qk_norm_rope, silu_mul: schema, fake, gradients, errors; the definitions against the models' own code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dit_kernels.ops import OPS
from dit_kernels.rounding import ACTIVATION_FORMS, FORMS

ops = torch.ops.dit_kernels
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
B, S, H, HK, DH = 2, 5, 6, 2, 16
EPS = 1e-5


def tensor(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def complex_rotation(*shape: int, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    angle = torch.randn(shape, dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def rotations(dtype: torch.dtype, d: int = DH) -> dict[str, tuple[tuple, dict]]:
    """(rotation, sin) and keywords, of every kind."""
    cos, sin = tensor(B, S, d, dtype=dtype), tensor(B, S, d, dtype=dtype)
    return {
        "complex64": ((complex_rotation(B, S, d // 2), None), {}),
        "complex128": ((complex_rotation(S, d // 2, dtype=torch.complex128), None), {}),
        "complex64 with a dimension for the heads": ((complex_rotation(1, S, 1, d // 2), None), {}),
        "real neighbours": ((cos, sin), {}),
        "real halves": ((cos[:1], sin[:1]), {"interleaved": False}),
        "real halves, one number a pair": ((cos[0, :, : d // 2], sin[0, :, : d // 2]), {"interleaved": False}),
        "real neighbours, one number a pair": ((cos[:, :, None, : d // 2], sin[:, :, None, : d // 2]), {}),
        "real of another dtype": ((cos.float(), sin.float()), {"rope_dtype": FP32, "out_dtype": dtype}),
    }


def qk(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(tensor(*shape, dtype=dtype) for shape in ((B, S, H, DH), (B, S, HK, DH), (DH,), (DH,)))


# --- what any op owes the dispatcher ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", rotations(FP32))
def test_opcheck_passes_for_every_kind_of_rotation(kind: str, dtype: torch.dtype) -> None:
    q, k, q_weight, k_weight = qk(dtype)
    rotation, keywords = rotations(dtype)[kind]
    torch.library.opcheck(ops.norm_rope.default, (q, q_weight, *rotation, EPS), keywords)
    torch.library.opcheck(ops.qk_norm_rope.default, (q, k, q_weight, None, *rotation, EPS, 1e-6), keywords)
    eps = torch.tensor(EPS)
    torch.library.opcheck(ops.qk_norm_rope.eps_tensor, (q, k, None, k_weight, *rotation, eps, eps), keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ACTIVATION_FORMS)
def test_opcheck_passes_for_silu_mul(dtype: torch.dtype, rounding: str) -> None:
    a, b = tensor(B, S, 2 * DH, dtype=dtype).chunk(2, -1)
    torch.library.opcheck(ops.silu_mul.default, (a, b), {"rounding": rounding})
    torch.library.opcheck(ops.silu_mul.default, (a, b.float()), {"silu_dtype": FP32, "out_dtype": BF16})
    torch.library.opcheck(ops.silu_mul.default, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("rounding", FORMS)
@pytest.mark.parametrize("kind", rotations(FP32, 4))
def test_gradients_are_those_of_the_formula(kind: str, rounding: str) -> None:
    torch.manual_seed(0)
    rotation, keywords = rotations(torch.float64, 4)[kind]
    keywords = {"interleaved": keywords.get("interleaved", True), "rounding": rounding}
    shapes = ((B, S, 2, 4), (B, S, 1, 4), (4,), (4,))
    args = [tensor(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *a: ops.qk_norm_rope(*a, *rotation, EPS, EPS, **keywords), args)


@pytest.mark.parametrize("rounding", ACTIVATION_FORMS)
def test_gradients_of_silu_mul_are_those_of_the_formula(rounding: str) -> None:
    a, b = (tensor(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda *t: ops.silu_mul(*t, rounding=rounding), (a, b))


def test_a_gradient_reaches_the_rotation() -> None:
    q, k, q_weight, k_weight = qk(FP32)
    for rotation, keywords in rotations(FP32).values():
        turning = [t if t is None else t.clone().requires_grad_() for t in rotation]
        ops.qk_norm_rope(q, k, q_weight, k_weight, *turning, EPS, EPS, **keywords)[1].sum().backward()
        assert all(t.grad is not None and t.grad.shape == t.shape for t in turning if t is not None)


@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(st.integers(1, 2), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    kind=st.sampled_from(sorted(rotations(FP32))),
    rounding=st.sampled_from(FORMS),
    wide_weight=st.booleans(),
)
def test_the_fake_results_have_the_metadata_of_the_real_ones(dtype, sizes, kind, rounding, wide_weight) -> None:
    b, s, h, hk, pairs = sizes
    d = 2 * pairs
    q, k = tensor(b, s, h, d, dtype=dtype), tensor(s, b, hk, d, dtype=dtype).transpose(0, 1)
    weight = tensor(d, dtype=FP32 if wide_weight else dtype)
    full = rotations(dtype, d)[kind]
    rotation = tuple(t if t is None else (t[:s] if t.ndim == 2 else t[:b, :s]) for t in full[0])
    if s > S or rotation[0].shape[-3 if rotation[0].ndim == 4 else -2] != s:
        return
    keywords = {**full[1], "rounding": rounding}
    args = (q, k, weight, None, *rotation, EPS, EPS)
    real = ops.qk_norm_rope(*args, **keywords)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = ops.qk_norm_rope(*fake_args, **keywords)
    for r, f, x in zip(real, fake, (q, k), strict=True):
        assert r.is_contiguous() and r.shape == x.shape
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_results_do_not_depend_on_strides() -> None:
    packed = tensor(B, S, (H + 2 * HK) * DH, dtype=BF16)
    q, k, _ = packed.split((H * DH, HK * DH, HK * DH), -1)
    q, k = q.unflatten(-1, (H, DH)), k.unflatten(-1, (HK, DH))
    w = tensor(DH, dtype=BF16)
    for rotation, keywords in rotations(BF16).values():
        got = ops.qk_norm_rope(q, k, w, w, *rotation, EPS, EPS, **keywords)
        expected = ops.qk_norm_rope(q.contiguous(), k.contiguous(), w, w, *rotation, EPS, EPS, **keywords)
        assert all(map(torch.equal, got, expected))


def test_inductor_keeps_an_eps_tensor_out_of_its_cuda_graphs() -> None:
    for op in (ops.norm_rope, ops.qk_norm_rope):
        assert torch.Tag.cudagraph_unsafe in op.eps_tensor.tags
        assert torch.Tag.cudagraph_unsafe not in op.default.tags


# --- the definitions against the models' own code --------------------------------------------------------------------


def diffusers_norm(weight: torch.Tensor) -> torch.nn.Module:
    from diffusers.models.normalization import RMSNorm

    norm = RMSNorm(weight.shape[0], eps=EPS)
    norm.weight.data = weight
    return norm


def zimage(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """apply_rotary_emb of diffusers' ZSingleStreamAttnProcessor, a function inside its __call__."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs.unsqueeze(2)).flatten(3).type_as(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_a_complex64_rotation_is_z_images(dtype: torch.dtype, weights: torch.dtype) -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    q, k, *_ = qk(dtype)
    norms = [diffusers_norm(tensor(DH, dtype=weights)) for _ in range(2)]
    freqs = complex_rotation(B, S, DH // 2)
    expected = [zimage(norm(x), freqs) for norm, x in zip(norms, (q, k), strict=True)]
    got = ops.qk_norm_rope(q, k, norms[0].weight, norms[1].weight, freqs, None, EPS, EPS)
    assert all(map(torch.equal, got, expected))
    assert torch.equal(got[0], apply_rotary_emb(norms[0](q), freqs, use_real=False))
    for one, x, norm in zip(got, (q, k), norms, strict=True):
        assert torch.equal(ops.norm_rope(x, norm.weight, freqs[:, :, None], None, EPS), one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_a_complex128_rotation_is_lumina_2s(dtype: torch.dtype, weights: torch.dtype) -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    q, k, *_ = qk(dtype)
    norms = [diffusers_norm(tensor(DH, dtype=weights)) for _ in range(2)]
    freqs = complex_rotation(1, S, DH // 2, dtype=torch.complex128)
    expected = [
        apply_rotary_emb(norm(x), freqs, use_real=False).to(dtype) for norm, x in zip(norms, (q, k), strict=True)
    ]
    got = ops.qk_norm_rope(q, k, norms[0].weight, norms[1].weight, freqs, None, EPS, EPS, out_dtype=dtype)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_a_real_rotation_of_halves_is_ideogram_4s(dtype: torch.dtype, weights: torch.dtype) -> None:
    from diffusers.models.transformers.transformer_ideogram4 import _rotate_half

    q, k, *_ = qk(dtype)
    norms = [diffusers_norm(tensor(DH, dtype=weights)) for _ in range(2)]
    cos, sin = tensor(B, S, DH, dtype=dtype), tensor(B, S, DH, dtype=dtype)

    def rotate(n: torch.Tensor) -> torch.Tensor:
        return (n * cos.unsqueeze(2)) + (_rotate_half(n) * sin.unsqueeze(2))

    expected = [rotate(norm(x)) for norm, x in zip(norms, (q, k), strict=True)]
    got = ops.qk_norm_rope(q, k, norms[0].weight, norms[1].weight, cos, sin, EPS, EPS, interleaved=False)
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", (True, False))
def test_a_real_rotation_in_fp32_is_fluxs(dtype: torch.dtype, interleaved: bool) -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    x, _, weight, _ = qk(dtype)
    cos, sin = tensor(S, DH), tensor(S, DH)
    n = F.rms_norm(x, (DH,), weight, EPS)
    unbind = -1 if interleaved else -2
    expected = apply_rotary_emb(n, (cos, sin), use_real_unbind_dim=unbind, sequence_dim=1)
    keywords = dict(rounding="weight_then_cast", rope_dtype=FP32, out_dtype=dtype, interleaved=interleaved)
    assert torch.equal(ops.norm_rope(x, weight, cos, sin, EPS, **keywords), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_root_is_taken_as_it_is_spelled(dtype: torch.dtype) -> None:
    x, _, w, _ = qk(dtype)
    freqs, root = complex_rotation(S, DH // 2), (x.float().pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    expected = {"reciprocal": x.float() * (1 / root), "quotient": x.float() / root}
    for name, n in expected.items():
        assert torch.equal(ops.norm_rope(x, w, freqs, None, EPS, root=name), zimage(n.to(dtype) * w, freqs[None]))


def test_one_number_a_pair_stands_for_both() -> None:
    x, _, weight, _ = qk(BF16)
    cos, sin = tensor(S, DH // 2, dtype=BF16), tensor(S, DH // 2, dtype=BF16)
    halves = [torch.cat((t, t), -1) for t in (cos, sin)]
    got, expected = (ops.norm_rope(x, weight, *t, EPS, interleaved=False) for t in ((cos, sin), halves))
    assert torch.equal(got, expected)
    neighbours = [t.repeat_interleave(2, -1) for t in (cos, sin)]
    got, expected = (ops.norm_rope(x, weight, *t, EPS) for t in ((cos, sin), neighbours))
    assert torch.equal(got, expected)


def test_the_form_fp32_rounds_the_result_once() -> None:
    q, k, q_weight, k_weight = qk(BF16)
    for rotation, keywords in rotations(BF16).values():
        keywords = {"interleaved": keywords.get("interleaved", True)}
        args = (q, k, q_weight, k_weight, *rotation, EPS, EPS)
        exact = ops.qk_norm_rope(*(a.double() if _is_real(a) else a for a in args), **keywords)
        for got, value in zip(ops.qk_norm_rope(*args, rounding="fp32", out_dtype=BF16, **keywords), exact, strict=True):
            noise = 2.0**-20 * value.abs().max()
            assert ((got.double() - value).abs() <= 2.0**-8 * value.abs() + noise).all()


def _is_real(a: object) -> bool:
    return isinstance(a, torch.Tensor) and not a.is_complex()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul_is_the_feed_forward_of_z_image(dtype: torch.dtype) -> None:
    from diffusers.models.transformers.transformer_z_image import FeedForward

    torch.manual_seed(0)
    a, b = tensor(B, S, 4 * DH, dtype=dtype) * 3, tensor(B, S, 4 * DH, dtype=dtype)
    assert torch.equal(ops.silu_mul(a, b), FeedForward._forward_silu_gating(None, a, b))
    both = torch.cat((a, b), -1)
    assert torch.equal(ops.silu_mul(*both.chunk(2, -1)), ops.silu_mul(a, b))


def test_silu_mul_rounds_where_it_is_told_to() -> None:
    a, b = tensor(B, S, DH, dtype=BF16) * 3, tensor(B, S, DH, dtype=BF16)
    wide = F.silu(a.float())
    assert torch.equal(ops.silu_mul(a, b, rounding="fp32"), (wide * b).to(BF16))
    assert torch.equal(ops.silu_mul(a, b, silu_dtype=FP32), wide * b)
    assert torch.equal(ops.silu_mul(a.float(), b, silu_dtype=BF16), wide.to(BF16) * b)
    assert torch.equal(ops.silu_mul(a, b.float()), F.silu(a) * b.float())


def test_a_kernel_takes_every_dtype_but_fp64_and_heads_of_multiples_of_8() -> None:
    def fits(op: str, *args: object, **keywords: object) -> bool:
        return OPS[op].call(*args, **keywords).fits_kernel()

    q, k, w, _ = qk(BF16)
    for rotation, keywords in rotations(BF16).values():
        assert fits("qk_norm_rope", q, k, w, w.float(), *rotation, EPS, EPS, **keywords)
        for name in ("norm_dtype", "rope_dtype", "out_dtype"):
            assert not fits("norm_rope", q, w, *rotation, EPS, **{**keywords, name: torch.float64})
    cos = tensor(S, DH, dtype=torch.float64)
    assert not fits("norm_rope", q, w, cos, cos, EPS)
    assert not fits("norm_rope", q[..., :12], None, complex_rotation(S, 6), None, EPS)
    assert fits("silu_mul", q, q.float())
    assert not fits("silu_mul", q, q.double())
    assert not fits("silu_mul", q, q, out_dtype=torch.float64)


# --- errors ----------------------------------------------------------------------------------------------------------

Q, K, W = torch.zeros(B, S, H, DH), torch.zeros(B, S, HK, DH), torch.zeros(DH)
ROTATION = torch.zeros(S, DH // 2, dtype=torch.complex64)
COS = torch.zeros(S, DH)


def _rope(q=Q, k=K, q_weight=W, k_weight=W, rotation=ROTATION, sin=None, **keywords) -> object:
    return ops.qk_norm_rope(q, k, q_weight, k_weight, rotation, sin, EPS, EPS, **keywords)


BAD = {
    "x": lambda: ops.norm_rope(None, W, ROTATION, None, EPS),
    "x.shape": lambda: ops.norm_rope(Q[0], W, ROTATION, None, EPS),
    "x.dtype": lambda: ops.norm_rope(Q.int(), W, ROTATION, None, EPS),
    "weight.shape": lambda: ops.norm_rope(Q, W[:3], ROTATION, None, EPS),
    "eps": lambda: ops.norm_rope.eps_tensor(Q, W, ROTATION, None, torch.zeros(2)),
    "q.shape": lambda: _rope(q=Q[..., :5]),
    "k.shape": lambda: _rope(k=K[:, :3]),
    "k.dtype": lambda: _rope(k=K.int()),
    "k.device": lambda: _rope(k=K.to("meta")),
    "q_weight.shape": lambda: _rope(q_weight=Q),
    "k_weight.dtype": lambda: _rope(k_weight=W.int()),
    "rotation": lambda: _rope(rotation=None),
    "rotation.shape": lambda: _rope(rotation=ROTATION[:, :3]),
    "rotation.dtype": lambda: _rope(rotation=COS.int()),
    "rotation.device": lambda: _rope(rotation=ROTATION.to("meta")),
    "sin.dtype": lambda: _rope(rotation=COS, sin=COS.bfloat16()),
    "sin.shape": lambda: _rope(rotation=COS, sin=COS[:, : DH // 2]),
    "interleaved": lambda: _rope(interleaved=False),
    "rounding": lambda: _rope(rounding="model"),
    "root": lambda: _rope(root="cube"),
    "rope_dtype": lambda: _rope(rope_dtype=torch.int8),
    "out_dtype": lambda: _rope(out_dtype=torch.complex64),
    "q_eps": lambda: ops.qk_norm_rope.eps_tensor(Q, K, W, W, ROTATION, None, torch.tensor(1), torch.tensor(1.0)),
    "k_eps": lambda: ops.qk_norm_rope.eps_tensor(Q, K, W, W, ROTATION, None, torch.tensor(1.0), torch.tensor(1)),
    "a": lambda: ops.silu_mul(None, Q),
    "a.shape": lambda: ops.silu_mul(W, W),
    "b.shape": lambda: ops.silu_mul(Q, K),
    "b.dtype": lambda: ops.silu_mul(Q, Q.int()),
    "silu_dtype": lambda: ops.silu_mul(Q, Q, silu_dtype=torch.bool),
    "rounding of silu_mul": lambda: ops.silu_mul(Q, Q, rounding="native"),
}


@pytest.mark.parametrize("argument", BAD)
def test_a_bad_argument_raises_a_value_error_that_names_it_and_what_was_expected(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument.split(maxsplit=1)[0]} is .*, expected \S"):
        BAD[argument]()


def test_empty_tensors_give_empty_results() -> None:
    q, k = ops.qk_norm_rope(Q[:, :0], K[:, :0], W, W, ROTATION[:0], None, EPS, EPS)
    assert q.shape == (B, 0, H, DH) and k.shape == (B, 0, HK, DH)
    assert ops.silu_mul(Q[:0], Q[:0]).shape == (0, S, H, DH)
