"""The CUDA kernels of norm_rope, qk_norm_rope and silu_mul against the definition run on the same GPU.

Bounds, on random data: of bf16 outputs at least 99.99 % (of fp16 99.9 %) are bit-equal. Where one differs, it does by
at most three steps (ulps) at the magnitude of its pair, which a rotation keeps, or of silu(a) * b. fp32 outputs are
judged by their error against fp64: at most twice that of the definition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_kernels import ops, reference
from dit_kernels.rounding import FORMS, ROOTS, SILU_FORMS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPLEX64, COMPLEX128 = torch.complex64, torch.complex128
DIFFERING = {BF16: 1e-4, FP16: 1e-3}
MANTISSA_BITS = {BF16: 7, FP16: 10, FP32: 23}
SMALLEST_STEP = {BF16: 2.0**-133, FP16: 2.0**-24, FP32: 2.0**-149}
STEPS = 3  # norm(x) of both of a pair may be off by one, and their products and the sum are rounded again
EPS, EPS2 = 1e-5, 1e-6
DEVICE = "cuda"


@pytest.fixture(scope="module", autouse=True)
def own_kernel_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIT_KERNELS_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


def call(op: str, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    results = getattr(torch.ops.dit_kernels, op)(*args, **options)
    return results if isinstance(results, tuple) else (results,)


# --- operands -------------------------------------------------------------------------------------------------------


def random(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed * 7919 + sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


@dataclass
class Heads:
    """The operands of qk_norm_rope; each may be replaced by a view or by None."""

    q: Tensor
    k: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    rotation: Tensor
    sin: Tensor | None

    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k, self.q_weight, self.k_weight, self.rotation, self.sin, EPS, EPS2


def angles(batch: int, tokens: int, pairs: int) -> Tensor:
    return random(batch, tokens, pairs, dtype=FP32, seed=9) * 3


def heads(
    batch: int,
    tokens: int,
    h: int,
    hk: int,
    d: int,
    dtype: torch.dtype = BF16,
    rotation: torch.dtype = COMPLEX64,
    weight: torch.dtype | None = None,
    interleaved: bool = True,
) -> Heads:
    """Random operands with a rotation that all batch items have in common; cosines of both of a pair are equal."""
    angle = angles(1, tokens, d // 2).double()
    turning: tuple[Tensor, Tensor | None] = (torch.polar(torch.ones_like(angle), angle).to(rotation), None)
    if not rotation.is_complex:
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
        turning = angle.cos().to(rotation), angle.sin().to(rotation)
    q, k = random(batch, tokens, h, d, dtype=dtype, seed=1) * 2, random(batch, tokens, hk, d, dtype=dtype, seed=2)
    return Heads(q, k, random(d, dtype=weight or dtype, seed=3), random(d, dtype=weight or dtype, seed=4), *turning)


# --- judging --------------------------------------------------------------------------------------------------------


def step(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` at a magnitude."""
    _, exponent = torch.frexp(magnitude.float())
    steps = torch.ldexp(torch.ones_like(magnitude, dtype=FP32), exponent - 1 - MANTISSA_BITS[dtype])
    return steps.clamp_min(SMALLEST_STEP[dtype])


def assert_follows(out: Tensor, expected: Tensor, magnitude: Tensor, coarsest: torch.dtype, spare: int = 2) -> None:
    """The two bounds; single elements of a small tensor are no measurement of a share: `spare` of them are free."""
    assert out.dtype == expected.dtype and out.shape == expected.shape and out.is_contiguous()
    differing = (out != expected) & ~(out.isnan() & expected.isnan())
    off = ((out.float() - expected.float()).abs() / step(magnitude, coarsest))[differing]
    assert bool((off <= STEPS).all()), f"off by {float(off.max()):.1f} steps"
    if out.dtype != FP32:
        most = DIFFERING[out.dtype] * out.numel() + spare
        assert int(differing.sum()) <= most, f"{int(differing.sum())} of {out.numel()} differ"


def assert_precise(out: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The error against fp64 is at most twice eager's, at the worst element and in the mean square."""
    assert out.dtype == eager.dtype == FP32 and out.shape == exact.shape and out.is_contiguous()
    ours, theirs = (out.double() - exact).abs(), (eager.double() - exact).abs()
    floor = float(exact.abs().max()) * 2.0**-24
    assert float(ours.max()) <= 2 * float(theirs.max()) + floor
    assert float(ours.square().mean().sqrt()) <= 2 * float(theirs.square().mean().sqrt()) + floor / 16


def magnitude_of_pairs(x: Tensor, interleaved: bool) -> Tensor:
    """Of each element the length of its pair, which bounds both products that it is the sum of."""
    x = x.float()
    if interleaved:
        return x.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    length = x.unflatten(-1, (2, -1)).norm(dim=-2)
    return torch.cat((length, length), -1)


def judge_heads(results: tuple[Tensor, ...], definition: Any, exact: Any, interleaved: bool, native: bool) -> None:
    """definition, exact: calls with the operands as they are, and as fp64."""
    expected, exact_results = definition.definition(), exact.definition()
    chains = (definition.chain.q, definition.chain.k)
    for out, eager, value, steps in zip(results, expected, exact_results, chains, strict=False):
        norm = steps.norm
        dtypes = {norm.stat, norm.normed, norm.weighted, norm.out, steps.product, steps.rotated, steps.out}
        dtypes.discard(torch.float64)
        if dtypes == {FP32}:
            assert_precise(out, eager, value)
            continue
        coarsest = min(dtypes, key=MANTISSA_BITS.__getitem__)
        # A statistic in 16 bits that falls the other way takes its head along.
        assert_follows(
            out, eager, magnitude_of_pairs(eager, interleaved), coarsest, 2 + (2 * out.shape[-1] if native else 0)
        )


def check_heads(o: Heads, **options: Any) -> tuple[Tensor, ...]:
    """Runs qk_norm_rope, and norm_rope on q alone, and judges the results."""
    options = {"rounding": "cast_then_weight", "interleaved": True, **options}
    results = call("qk_norm_rope", *o.arguments(), **options)
    make = ops.OPS["qk_norm_rope"].make_call
    wide = [a.double() if isinstance(a, Tensor) and not a.is_complex() else a for a in o.arguments()]
    exact = make(*wide, rounding="fp32", interleaved=options["interleaved"])
    judge_heads(
        results, make(*o.arguments(), **options), exact, options["interleaved"], options["rounding"] == "native"
    )
    (alone,) = call("norm_rope", o.q, o.q_weight, o.rotation, o.sin, EPS, **options)
    assert torch.equal(alone, results[0])
    return results


def check_silu(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    (out,) = call("silu_mul", a, b, **options)
    expected = reference.silu_mul(a, b, ops.OPS["silu_mul"].make_call(a, b, **options).chain.steps)
    if out.dtype == FP32:
        exact = torch.nn.functional.silu(a.double()) * b.double()
        if options.get("silu_dtype", a.dtype) == FP32 or options.get("rounding") == "fp32":
            assert_precise(out, expected, exact)
            return out
    assert_follows(out, expected, expected.float().abs(), min(a.dtype, out.dtype, key=MANTISSA_BITS.__getitem__))
    return out


# --- heads: what is computed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rotation", (COMPLEX64, COMPLEX128))
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
def test_a_complex_rotation_follows_the_definition(form: str, rotation: torch.dtype, dtype: torch.dtype) -> None:
    check_heads(heads(2, 264, 30, 30, 128, dtype, rotation), rounding=form, out_dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("interleaved", (True, False))
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
def test_a_real_rotation_follows_the_definition(form: str, interleaved: bool, dtype: torch.dtype) -> None:
    o = heads(2, 264, 18, 18, 256, dtype, dtype, interleaved=interleaved)
    check_heads(o, rounding=form, interleaved=interleaved, out_dtype=dtype)


@pytest.mark.parametrize("interleaved", (True, False))
def test_a_real_rotation_in_fp32_of_16_bit_heads_follows_the_definition(interleaved: bool) -> None:
    o = heads(2, 264, 24, 24, 128, BF16, FP32, interleaved=interleaved)
    check_heads(o, rope_dtype=FP32, out_dtype=BF16, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", (True, False))
@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_one_cosine_a_pair_follows_the_definition(interleaved: bool, dtype: torch.dtype) -> None:
    o = heads(2, 40, 6, 2, 128, dtype, dtype)
    angle = angles(1, 40, 64)
    o = replace(o, rotation=angle.cos().to(dtype), sin=angle.sin().to(dtype))
    check_heads(o, interleaved=interleaved)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
def test_every_spelling_of_the_root_follows_the_definition(root: str, dtype: torch.dtype) -> None:
    check_heads(heads(2, 264, 30, 30, 128, dtype), root=root)


@pytest.mark.parametrize("rotation", (COMPLEX64, BF16))
def test_weights_may_be_fp32_or_absent(rotation: torch.dtype) -> None:
    o = heads(2, 100, 6, 2, 128, BF16, rotation, weight=FP32)
    check_heads(o, out_dtype=BF16)
    check_heads(o)
    check_heads(replace(o, q_weight=None, k_weight=None))
    check_heads(replace(o, q_weight=None), norm_dtype=BF16, out_dtype=BF16)


# --- heads: shapes and strides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", (8, 16, 24, 40, 64, 72, 80, 96, 104, 120, 128, 160, 192, 256, 384, 512))
@pytest.mark.parametrize("interleaved", (True, False))
@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_every_width_of_a_head_follows_the_definition(d: int, interleaved: bool, dtype: torch.dtype) -> None:
    check_heads(heads(2, 19, 6, 2, d, dtype, dtype, interleaved=interleaved), interleaved=interleaved)
    if interleaved:
        check_heads(heads(2, 19, 6, 2, d, dtype, COMPLEX64))


@pytest.mark.parametrize("numbers", ((1, 1), (3, 1), (5, 5), (7, 3), (16, 2), (24, 8), (28, 4), (40, 40), (64, 8)))
def test_any_number_of_heads_follows_the_definition(numbers: tuple[int, int]) -> None:
    check_heads(heads(2, 33, *numbers, 128))
    check_heads(heads(2, 33, *numbers, 64, BF16, BF16, interleaved=False), interleaved=False)


@pytest.mark.parametrize("tokens", (1, 2, 3, 1056, 4128))
def test_any_number_of_tokens_follows_the_definition(tokens: int) -> None:
    check_heads(heads(2, tokens, 6, 6, 128))
    check_heads(heads(1, tokens, 2, 1, 64))


def test_heads_may_be_views_of_a_packed_projection() -> None:
    o, (h, hk, d) = heads(2, 50, 6, 2, 128), (6, 2, 128)
    packed = random(2, 50, (h + 2 * hk) * d)
    q, k, _ = packed.split((h * d, hk * d, hk * d), -1)
    o = replace(o, q=q.unflatten(-1, (h, d)), k=k.unflatten(-1, (hk, d)))
    results = check_heads(o)
    again = check_heads(replace(o, q=o.q.contiguous(), k=o.k.contiguous()))
    assert all(map(torch.equal, results, again))


def heads_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def tokens_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def last_dimension_strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


def misaligned(t: Tensor) -> Tensor:
    return torch.cat((t[..., :1], t), -1)[..., 1:]


def one_for_all(t: Tensor) -> Tensor:
    return t[:1, :1, :1].expand_as(t)


@pytest.mark.parametrize("view", (heads_first, tokens_first, last_dimension_strided, misaligned, one_for_all))
@pytest.mark.parametrize("interleaved", (True, False))
def test_heads_may_have_any_strides(view: Any, interleaved: bool) -> None:
    o = heads(3, 20, 6, 2, 96, BF16, BF16, interleaved=interleaved)
    check_heads(replace(o, q=view(o.q), k=view(o.k)), interleaved=interleaved)


@pytest.mark.parametrize("rotation", (COMPLEX64, COMPLEX128, BF16))
def test_the_rotation_may_be_each_batch_items_own_and_have_any_strides(rotation: torch.dtype) -> None:
    o = heads(3, 20, 6, 2, 96, BF16, rotation)
    own = [None if t is None else torch.cat((t, -t, t.flip(1))) for t in (o.rotation, o.sin)]
    check_heads(replace(o, rotation=own[0], sin=own[1]))
    for view in (tokens_first, last_dimension_strided, misaligned):
        views = [None if t is None else view(t) for t in own]
        check_heads(replace(o, rotation=views[0], sin=views[1]))
    check_heads(replace(o, rotation=own[0][:, :, None], sin=None if own[1] is None else own[1][:, :, None]))


def test_a_conjugate_rotation_turns_the_other_way() -> None:
    o = heads(2, 20, 6, 2, 64)
    o = replace(o, rotation=o.rotation.conj())
    first, again = check_heads(o), check_heads(o)
    resolved = check_heads(replace(o, rotation=o.rotation.resolve_conj()))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, resolved, strict=True))


@pytest.mark.parametrize("options", (dict(d=12), dict(d=520), dict(d=64, rope_dtype=torch.float64)))
def test_widths_and_dtypes_that_no_kernel_is_made_for_run_the_definition(options: dict[str, Any]) -> None:
    o = heads(2, 20, 6, 2, options["d"])
    options = {name: value for name, value in options.items() if name != "d"}
    results = call("qk_norm_rope", *o.arguments(), **options)
    expected = ops.OPS["qk_norm_rope"].make_call(*o.arguments(), **options).definition()
    assert all(map(torch.equal, results, expected))


def test_empty_heads_give_empty_results() -> None:
    q, k = call("qk_norm_rope", *heads(2, 0, 6, 2, 64).arguments())
    assert q.shape == (2, 0, 6, 64) and k.shape == (2, 0, 2, 64)


def test_one_kernel_serves_every_batch_and_length() -> None:
    from dit_kernels import compile

    check_heads(heads(2, 8, 6, 2, 128))
    compiled = len(compile._functions)
    for batch, tokens in ((1, 1), (4, 77), (4, 1), (2, 1023)):
        check_heads(heads(batch, tokens, 6, 2, 128))
    assert len(compile._functions) == compiled


def test_heads_of_more_than_2_to_the_31_elements_are_addressed_right() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    tokens = 2**31 // (24 * 128) + 100
    o = heads(1, 4, 24, 1, 128)
    q = torch.empty((1, tokens, 24, 128), dtype=BF16, device="cuda")
    q[:, -4:] = o.q
    rotation = torch.ones((1, tokens, 64), dtype=COMPLEX64, device="cuda")
    rotation[:, -4:] = o.rotation
    (turned,) = call("norm_rope", q, o.q_weight, rotation, None, EPS)
    (expected,) = call("norm_rope", o.q, o.q_weight, o.rotation, None, EPS)
    assert torch.equal(turned[:, -4:], expected)


# --- silu -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SILU_FORMS)
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
@pytest.mark.parametrize("d", (1, 7, 333, 2520, 10240))
def test_silu_mul_follows_the_definition(form: str, dtype: torch.dtype, d: int) -> None:
    check_silu(random(2, 133, d, dtype=dtype, seed=1) * 3, random(2, 133, d, dtype=dtype, seed=2), rounding=form)


def test_silu_mul_follows_the_definition_in_mixed_dtypes() -> None:
    a, b = random(2, 60, 512, seed=1) * 3, random(2, 60, 512, seed=2)
    check_silu(a, b.float())
    check_silu(a, b, silu_dtype=FP32)
    check_silu(a, b, silu_dtype=FP32, out_dtype=BF16)
    check_silu(a.float(), b, silu_dtype=BF16, out_dtype=BF16)


@pytest.mark.parametrize("d", (512, 520, 333))
def test_silu_mul_takes_halves_of_one_tensor_and_any_strides(d: int) -> None:
    both = random(3, 50, 2 * d) * 3
    check_silu(*both.chunk(2, -1))
    a, b = random(3, 50, d, seed=1), random(3, 50, d, seed=2)
    for view in (tokens_first, last_dimension_strided, misaligned):
        check_silu(view(a), b)
        check_silu(a, view(b))
    check_silu(a[0], b[0])
    check_silu(a.unflatten(1, (5, 10)), b.unflatten(1, (5, 10)))
    check_silu(a[:1, :1].expand_as(a), b)


def test_silu_of_large_and_special_numbers_is_eagers() -> None:
    a = torch.tensor(
        [-torch.inf, torch.inf, torch.nan, 0.0, -0.0, -80.0, -87.5, -88.5, -88.75, -95.0, -200.0, 88.0, 3e38]
    )
    a = torch.cat((a, torch.linspace(-100, 100, 1011))).to(DEVICE).view(1, -1).contiguous()
    for dtype in (BF16, FP32):
        (ours,) = call("silu_mul", a.to(dtype), torch.ones_like(a, dtype=dtype))
        eager = torch.nn.functional.silu(a.to(dtype))
        rtol = 2.0**-7 if dtype == BF16 else 2.0**-21
        torch.testing.assert_close(ours, eager, rtol=rtol, atol=2.0**-126, equal_nan=True)


@pytest.mark.parametrize("tokens", (1, 1056, 4128))
def test_silu_mul_of_any_number_of_tokens_follows_the_definition(tokens: int) -> None:
    check_silu(random(1, tokens, 10240, seed=1) * 3, random(1, tokens, 10240, seed=2))


# --- calls ----------------------------------------------------------------------------------------------------------


def everything() -> dict[str, tuple[Any, ...]]:
    o = heads(2, 37, 6, 2, 128)
    return {
        "qk_norm_rope": o.arguments(),
        "norm_rope": (o.q, o.q_weight, o.rotation, None, EPS),
        "silu_mul": (random(2, 37, 640, seed=1), random(2, 37, 640, seed=2)),
    }


OPS = ("qk_norm_rope", "norm_rope", "silu_mul")


@pytest.mark.parametrize("op", OPS)
def test_a_call_like_one_before_computes_what_the_first_did(op: str) -> None:
    arguments = everything()[op]
    ops._plans.clear()
    first = call(op, *arguments)
    assert ops._plans
    again = call(op, *arguments)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("op", OPS)
def test_a_cuda_graph_replays_a_call_on_new_data(op: str) -> None:
    arguments = everything()[op]
    call(op, *arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(op, *arguments)
    arguments[0].copy_(arguments[0].flip(0))
    arguments[1].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, call(op, *arguments)))


@pytest.mark.parametrize("op", OPS)
def test_a_call_runs_on_the_current_stream(op: str) -> None:
    arguments = everything()[op]
    expected = call(op, *arguments)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        moved = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        results = call(op, *moved)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("op", OPS[:2])
def test_eps_as_a_tensor_is_eps_as_a_number(op: str) -> None:
    arguments = everything()[op]
    as_tensors = [torch.tensor(a) if isinstance(a, float) else a for a in arguments]
    results = getattr(torch.ops.dit_kernels, op).eps_tensor(*as_tensors)
    assert all(map(torch.equal, results if isinstance(results, tuple) else (results,), call(op, *arguments)))
