"""The CUDA kernels of the ops of heads, and of silu_mul, against the definition run on the same GPU.

The bounds are those of `attention_kernel_bounds`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import attention_kernel_bounds as bounds
import kernel_bounds
import pytest
import torch
from attention_kernel_bounds import heads_first, last_dimension_strided, misaligned, one_for_all, tokens_first
from kernel_bounds import BF16, EPS, FP16, FP32, Device
from torch import Tensor

from dit_kernels.families import OPS
from dit_kernels.rounding import ACTIVATION_FORMS, FORMS, ROOTS

COMPLEX64, COMPLEX128 = torch.complex64, torch.complex128

GPU = Device()
call = GPU.run
random, heads, angles = (partial(make, device="cuda") for make in (kernel_bounds.random, bounds.heads, bounds.angles))
check_heads, check_silu = partial(bounds.check_heads, GPU), partial(bounds.check_silu, GPU)


@pytest.fixture(scope="module", autouse=True)
def own_kernel_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIT_KERNELS_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numbers", ((24, 24, 128), (48, 48, 128), (2, 1, 64)))
def test_two_streams_follow_the_definition(numbers: tuple[int, int, int], form: str) -> None:
    before, later, both = (heads(2, tokens, *numbers, BF16, FP32) for tokens in (100, 259, 359))
    before = replace(before, q=before.q * 3, k=before.k * -2, q_weight=before.k_weight, k_weight=before.q_weight)
    later = replace(later, rotation=both.rotation, sin=both.sin)
    bounds.check_joined(GPU, before, later, rounding=form, rope_dtype=FP32, out_dtype=BF16)
    narrow = replace(later, q=misaligned(later.q), k=heads_first(later.k))
    bounds.check_joined(GPU, before, narrow, rounding=form, rope_dtype=FP32, out_dtype=BF16)


@pytest.mark.parametrize("op", ("qk_norm_rope", "qk_norm_part_rope"))
@pytest.mark.parametrize("numbers", ((48, 48, 64), (32, 32, 128), (2, 1, 24)))
@pytest.mark.parametrize("interleaved", (True, False))
def test_layer_norms_follow_the_definition(op: str, numbers: tuple[int, int, int], interleaved: bool) -> None:
    """CogVideoX's and CogView4's heads; without a text in qk_norm_rope."""
    first = 226 if op == "qk_norm_part_rope" else 0
    o = heads(2, 1226, *numbers, BF16, FP32, interleaved=interleaved)
    o = replace(o, q=o.q + 1, rotation=o.rotation[:, first:], sin=o.sin[:, first:])
    options = dict(norm="layer", interleaved=interleaved, rope_dtype=FP32, out_dtype=BF16)
    bounds.check_with_bias(GPU, op, o, o.k_weight, o.q_weight, **options)
    bounds.check_with_bias(GPU, op, replace(o, q=misaligned(o.q), k=heads_first(o.k)), None, o.q_weight, **options)


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
    expected = OPS["qk_norm_rope"].call(*o.arguments(), **options).definition()
    assert all(map(torch.equal, results, expected))


def test_empty_heads_give_empty_results() -> None:
    q, k = call("qk_norm_rope", *heads(2, 0, 6, 2, 64).arguments())
    assert q.shape == (2, 0, 6, 64) and k.shape == (2, 0, 2, 64)


def test_one_kernel_serves_every_batch_and_length() -> None:
    from dit_kernels import compile

    check_heads(heads(2, 8, 6, 2, 128))
    compiled = len(compile.KERNELS.functions)
    for batch, tokens in ((1, 1), (4, 77), (4, 1), (2, 1023)):
        check_heads(heads(batch, tokens, 6, 2, 128))
    assert len(compile.KERNELS.functions) == compiled


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


@pytest.mark.parametrize("form", ACTIVATION_FORMS)
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
    bounds.check_special_numbers(GPU, "cuda")


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


NAMES = ("qk_norm_rope", "norm_rope", "silu_mul")


@pytest.mark.parametrize("op", NAMES)
def test_a_call_like_one_before_computes_what_the_first_did(
    op: str, checked_calls: list[str], as_if_first: Callable[[], AbstractContextManager[Any]]
) -> None:
    arguments = everything()[op]
    with as_if_first():
        first = call(op, *arguments)
    assert checked_calls == [op]
    again = call(op, *arguments)
    assert checked_calls == [op]  # a plan ran the second call
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("op", NAMES)
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


@pytest.mark.parametrize("op", NAMES)
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


@pytest.mark.parametrize("op", NAMES[:2])
def test_eps_as_a_tensor_is_eps_as_a_number(op: str) -> None:
    arguments = everything()[op]
    as_tensors = [torch.tensor(a) if isinstance(a, float) else a for a in arguments]
    results = getattr(torch.ops.dit_kernels, op).eps_tensor(*as_tensors)
    assert all(map(torch.equal, results if isinstance(results, tuple) else (results,), call(op, *arguments)))
