"""Results that are only joined with other tensors: compiled code lets an op write into its part of the result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_modules import neighbours_rope
from graph_backend import run
from site_modules import diffusers_norm
from test_attention_lowering import freqs
from test_lowering import addresses, assert_equal, compiled, gpu, is_direct, launch_numbers, launched, random
from torch import Tensor
from torch._inductor import config

import fusion_pass.lowering
from dit_kernels import ops as dit_ops
from dit_kernels.direct import DirectCall
from dit_kernels.families import OPS

ops = torch.ops.dit_kernels
B, S, H, D, EPS = 2, 5, 4, 16, 1e-5


pytestmark = pytest.mark.usefixtures("compiled_anew")


def attention(q: Tensor, k: Tensor) -> Tensor:
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k).transpose(1, 2)


def both_streams(text: Tensor, image: Tensor, w: Tensor, *rotations: Tensor) -> Tensor:
    """Qwen-Image: each stream has its own rotation."""
    streams = zip((text, image), rotations, strict=True)
    pairs = [ops.qk_norm_rope(x, x, w, w, rotation, None, EPS, EPS) for x, rotation in streams]
    return attention(*(torch.cat(heads, dim=1) for heads in zip(*pairs, strict=True)))


def one_stream(text: Tensor, image: Tensor, w: Tensor, _: Tensor, rotation: Tensor) -> Tensor:
    """HunyuanVideo: the text is not rotated."""
    q, k = ops.qk_norm_rope(image, image, w, w, rotation, None, EPS, EPS)
    return attention(torch.cat((q, text * 2), dim=1), torch.cat((k, text * 3), dim=1))


def streams(batch: int = B, text: int = 3, image: int = S) -> tuple[Tensor, ...]:
    return random(batch, text, H, D), random(batch, image, H, D), random(D), freqs(text), freqs(image)


def buffers(code: str) -> int:
    """How many tensors the code allocates for heads."""
    return len(re.findall(r" = empty_strided_cpu\(\(\d+, \d+, \d+, \d+\)", code))


@pytest.mark.parametrize(
    ("function", "kernels", "batch"), ((both_streams, 0, 1), (both_streams, 0, 2), (one_stream, 1, 2))
)
def test_nothing_is_copied_into_the_joined_tensors(function: Callable[..., Tensor], kernels: int, batch: int) -> None:
    args = streams(batch)
    got, code = compiled(function, *args)
    assert is_direct(code)
    assert buffers(code) == 2
    assert code.count("async_compile.cpp") == kernels  # the text of HunyuanVideo
    assert code.count(" # alias") == 4
    joined, strides = 3 + S, (0 if batch == 1 else (3 + S) * H * D, H * D, D)
    assert f", {', '.join(map(str, 2 * strides))})):" in code
    assert f"({batch}, {joined}, {H}, {D})" in code
    assert_equal(got, function(*args))


def test_sizes_may_change_without_another_compilation() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(fusion_pass.Backend())
    function = torch.compile(both_streams, backend=counter, dynamic=None)
    for text, image in ((3, 5), (4, 7), (9, 6)):
        args = streams(B, text, image)
        assert_equal(function(*args), both_streams(*args))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dim", (0, 2, -1))
def test_heads_may_be_joined_along_any_dimension(dim: int) -> None:
    def joined(x: Tensor, other: Tensor, rotation: Tensor) -> Tensor:
        return attention(*2 * [torch.cat((other, ops.norm_rope(x, None, rotation, None, EPS), other), dim)])

    args = random(B, S, H, D), random(B, S, H, D), freqs(S)
    got, code = compiled(joined, *args)
    assert is_direct(code)
    assert buffers(code) == 1
    assert_equal(got, joined(*args))


def test_silu_mul_may_be_joined_along_its_rows() -> None:
    """As in FLUX.2's single blocks."""

    def joined(a: Tensor, b: Tensor, other: Tensor) -> Tensor:
        return torch.cat((other, ops.silu_mul(a, b)), -1).view(-1, 3 * D) @ torch.ones(3 * D, D, dtype=a.dtype)

    args = random(B, S, 2 * D), random(B, S, 2 * D), random(B, S, D)
    got, code = compiled(joined, *args)
    assert is_direct(code)
    assert f", ({B}, {S}, {2 * D}), ({S * 3 * D}, {3 * D}, 1), {D})  # alias" in code
    assert_equal(got, joined(*args))


def test_memory_is_used_again_only_when_the_joined_tensor_is_not_needed_any_more() -> None:
    def layers(text: Tensor, image: Tensor, w: Tensor, *rotations: Tensor) -> Tensor:
        for _ in range(3):
            out = both_streams(text, image, w, *rotations)
            text, image = out[:, 3:], (out[:, :3].flatten(2) @ torch.eye(H * D, dtype=out.dtype)).view_as(image)
        return out

    args = streams(1, 3, 3)  # text, image and every result are equally large
    got, code = compiled(layers, *args)
    assert is_direct(code)
    assert_equal(got, layers(*args))


# --- where a copy is made, as before ----------------------------------------------------------------------------------


def read_twice(x: Tensor, other: Tensor, rotation: Tensor) -> Tensor:
    q = ops.norm_rope(x, None, rotation, None, EPS)
    return attention(torch.cat((q, other), 1), q)


def joined_twice(x: Tensor, other: Tensor, rotation: Tensor) -> Tensor:
    q = ops.norm_rope(x, None, rotation, None, EPS)
    return attention(torch.cat((q, other), 1), torch.cat((other, q), 1))


def returned(x: Tensor, other: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    q = ops.norm_rope(x, None, rotation, None, EPS)
    return attention(*2 * [torch.cat((q, other), 1)]), q


def in_another_dtype(x: Tensor, other: Tensor, rotation: Tensor) -> Tensor:
    q = torch.cat((ops.norm_rope(x, None, rotation, None, EPS), other.float()), 1)
    return attention(q, q)


def computed_where_it_is_read(x: Tensor, other: Tensor, rotation: Tensor) -> Tensor:
    return torch.cat((ops.norm_rope(x, None, rotation, None, EPS), other), 1) + 1


def swapped(x: Tensor, other: Tensor, rotation: Tensor) -> Tensor:
    q = ops.norm_rope(x, None, rotation, None, EPS).transpose(1, 2)
    q = torch.cat((q, other.transpose(1, 2)), 2)
    return F.scaled_dot_product_attention(q, q, q)


COPIED = (
    read_twice,
    joined_twice,
    returned,
    in_another_dtype,
    computed_where_it_is_read,
    swapped,
)


@pytest.mark.parametrize("function", COPIED)
def test_a_result_that_has_another_reader_or_layout_has_its_own_memory(function: Callable[..., Any]) -> None:
    args = random(B, S, H, D), random(B, S, H, D), freqs(S)
    got, code = compiled(function, *args)
    assert is_direct(code)
    (call,) = re.findall(r"\.checked\((.*)\)", code)
    own = call.split(", ")[-1]
    assert f"{own} = empty_strided_cpu(({B}, {S}, {H}, {D}), ({S * H * D}, {H * D}, {D}, 1)" in code
    assert_equal(got, function(*args))


def test_the_same_result_twice_in_one_join_is_computed_once() -> None:
    def doubled(x: Tensor, rotation: Tensor) -> Tensor:
        q = ops.norm_rope(x, None, rotation, None, EPS)
        return attention(*2 * [torch.cat((q, q), 1)])

    args = random(B, S, H, D), freqs(S)
    got, code = compiled(doubled, *args)
    assert is_direct(code)
    assert_equal(got, doubled(*args))


def test_a_join_that_inductor_computes_as_one_kernel_copies() -> None:
    args = streams()
    with config.patch(force_pointwise_cat=True):
        got, code = compiled(both_streams, *args)
    assert is_direct(code) and " # alias" not in code
    assert_equal(got, both_streams(*args))


def test_a_result_that_a_kernel_writes_as_a_whole_is_copied() -> None:
    def joined(x: Tensor, other: Tensor) -> Tensor:
        z = ops.norm_scale(x, None, None, other[:, :1], EPS)
        return torch.cat((z, other), 1) @ torch.ones(D, D, dtype=x.dtype)

    args = random(B, S, D), random(B, S, D)
    got, code = compiled(joined, *args)
    assert is_direct(code) and code.count(" # alias") == 2  # of the copies
    assert_equal(got, joined(*args))


def test_a_part_whose_elements_lie_apart_is_checked_at_each_call() -> None:
    """Inductor joins with an image between convolutions in the memory layout of the image."""

    def joined(x: Tensor, other: Tensor, rotation: Tensor) -> Tensor:
        return attention(*2 * [torch.cat((ops.norm_rope(x, None, rotation, None, EPS), other), 1)])

    args = random(B, S, H, D), random(B, S, H, D).to(memory_format=torch.channels_last), freqs(S)
    got, code = compiled(joined, *args)
    assert "DirectCall(" in code and "if not dit_kernel" not in code
    assert_equal(got, joined(*args))


# --- the call itself --------------------------------------------------------------------------------------------------


def test_a_direct_call_launches_with_the_strides_of_its_results() -> None:
    q, k, w, rotation = random(B, S, H, D), random(B, S, H, D), random(D), freqs(1, S)
    joined = random(B, 3 + S, H, D), random(B, H, 3 + S, D).transpose(1, 2)
    op = OPS["qk_norm_rope"]
    given = (*op.filled((q, k, w, None, rotation, None, EPS, EPS)), *(t[:, 3:] for t in joined))
    numbers = launch_numbers(op, given)
    results = [by for t in joined for by in t.stride()[:3]]
    assert list(numbers[-6:]) == results
    call = DirectCall("qk_norm_rope")
    with gpu():
        call.checked(*given)
        assert (launched(call, given, numbers) or ())[: len(given)] == addresses(*op.arranged(given))


def test_results_that_no_kernel_can_write_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rotation, whole = random(B, S, H, D), freqs(1, S), random(B, S, H, 2 * D)
    call = OPS["norm_rope"].call(x, None, rotation, None, EPS)
    ran: list[Tensor] = []

    class Compiler:
        @staticmethod
        def run(family: Any, chain: Any, operands: Any) -> tuple[Any, ...]:
            ran.append(operands.memory[-1])
            ran[-1].fill_(7)
            return print, ()

    monkeypatch.setattr(dit_ops, "has_kernel", lambda call: True)
    monkeypatch.setattr(dit_ops, "_compiler", lambda: Compiler)
    assert dit_ops.run_into(call, (whole[..., ::2],)) is None
    assert ran[0].is_contiguous() and (whole[..., ::2] == 7).all() and not (whole[..., 1::2] == 7).any()
    assert dit_ops.run_into(call, (whole[..., :D],)) is not None
    assert ran[1].data_ptr() == whole.data_ptr()


# --- which sites are fused --------------------------------------------------------------------------------------------


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return neighbours_rope(diffusers_norm(x, None), cos, sin)


def joined_with_text(x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """HunyuanVideo."""
    return attention(*2 * [torch.cat((rotated(x, cos, sin), diffusers_norm(text, None)), 1)])


def joined_heads_first(x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = torch.cat((rotated(x, cos, sin).transpose(1, 2), text.transpose(1, 2)), 2)
    return F.scaled_dot_product_attention(q, q, q)


def joined_in_fp32(x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attention(*2 * [torch.cat((rotated(x, cos, sin), text.float()), 1)])


def joined_and_scaled(x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((rotated(x, cos, sin), text), 1) * 2


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize(
    ("function", "fused"),
    ((joined_with_text, True), (joined_heads_first, False), (joined_in_fp32, False), (joined_and_scaled, False)),
)
def test_a_rotated_norm_is_fused_where_the_op_can_write_into_the_joined_tensor(
    function: Callable[..., Tensor], fused: bool, dynamic: bool
) -> None:
    x, text = random(B, S, H, D), random(B, 3, H, D)
    angles = torch.randn(1, S, 1, D // 2).repeat_interleave(2, -1)
    args = x, text, angles.cos(), angles.sin()
    for t in args:
        torch._dynamo.mark_static(t, 3)
    got, backend = run(function, *args, dynamic=dynamic, strict=True)
    assert_equal(got, function(*args))
    assert [site.kind for site in backend.report.fused] == (["norm_rope"] if fused else [])
    assert ("INLINE" in [site.reason_name for site in backend.report.missed]) != fused
