"""The pass and the kernels together, on the GPU: compiled modules against their own eager code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_modules import (
    RopeModule,
    RopeSpec,
    SiluModule,
    SiluSpec,
    complex_rope,
    neighbours_rope,
    rope_inputs,
    rope_specs,
    silu_inputs,
    silu_specs,
)
from graph_backend import run
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from site_modules import SiteModule, Spec, diffusers_norm, inputs, native_norm, specs

import fusion_pass
from dit_kernels.direct import DirectCall
from fusion_pass import Backend, lowering  # noqa: F401  Inductor's way to call the ops

# The share of outputs that may differ from eager's by a rounding, because the kernel sums in another order. A flipped
# 16-bit statistic (`native`) changes a whole row.
MAY_DIFFER = {torch.bfloat16: 5e-4, torch.float16: 5e-3}
# What a matmul makes of the results, by the sum of their magnitudes: one step of it, and of one of them in ten.
SUM_MAY_DIFFER = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 2e-6}
# Each example compiles for seconds: a failing one is reported as it was found, not after minutes of making it smaller.
AS_FOUND = settings(deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


def moved(args: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Moving a view to the GPU would make it contiguous: its base is moved, and the same view taken there."""

    def on_gpu(a: torch.Tensor) -> torch.Tensor:
        if a._base is None:
            return a.cuda()
        base = a._base.cuda()
        if base.is_complex() and not a.is_complex():  # the real part of a table
            base = torch.view_as_real(base)
        return base.as_strided(a.shape, a.stride(), a.storage_offset())

    return [on_gpu(a) for a in args]


def on_gpu(spec: Spec, seed: int = 0) -> tuple[SiteModule, list[torch.Tensor]]:
    torch.manual_seed(seed)
    args = moved(inputs(spec, seed))
    for arg in args:
        torch._dynamo.mark_static(arg, arg.ndim - 1)
    return SiteModule(spec).cuda().eval().requires_grad_(False), args


def assert_follows_eager(got: Iterable[torch.Tensor], eager: Iterable[torch.Tensor], rows: int = 0) -> None:
    """rows: of so many in each tensor every element may differ."""
    for ours, theirs in zip(got, eager, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if ours.dtype != torch.float32 else 1e-4, atol=2e-2)
        if ours.dtype in MAY_DIFFER:
            differing = int((ours != theirs).sum()) - rows * ours.shape[-1]
            assert differing <= 2 + MAY_DIFFER[ours.dtype] * ours.numel()


@settings(AS_FOUND, max_examples=80)
@given(spec=specs(), dynamic=st.sampled_from((False, True)), seed=st.integers(0, 2**16))
def test_a_compiled_site_follows_eager_and_runs_on_a_kernel(spec: Spec, dynamic: bool, seed: int) -> None:
    spec = replace(spec, tokens=spec.tokens * 16)
    module, args = on_gpu(spec, seed)
    got, backend = run(module, *args, dynamic=dynamic, kernels="auto")
    assert [site.kind for site in backend.report.fused] == ([] if spec.kind() is None else [spec.kind()])
    assert_follows_eager(got, module(*args), rows=2 if spec.norm is native_norm else 0)


@settings(AS_FOUND, max_examples=25)  # each compiles a kernel or two
@given(spec=rope_specs(), dynamic=st.sampled_from((False, True)), seed=st.integers(0, 2**16))
@example(spec=RopeSpec(width=64, heads=4, kv_heads=4), dynamic=True, seed=0)  # the number of heads is a symbol, too
def test_a_compiled_attention_follows_eager_and_runs_on_a_kernel(spec: RopeSpec, dynamic: bool, seed: int) -> None:
    spec = replace(spec, tokens=spec.tokens * 16, shown=True)
    args, module = moved(rope_inputs(spec, seed)), RopeModule(spec).cuda().eval().requires_grad_(False)
    for arg in args:
        torch._dynamo.mark_static(arg, arg.ndim - 1)
    if spec.heads != spec.kv_heads:  # which are more, the pass does not ask
        torch._dynamo.mark_static(args[0], 2)
        torch._dynamo.mark_static(args[1], 2)
    (got, *heads), backend = run(module, *args, dynamic=dynamic, kernels="auto")
    assert backend.report.counts() == ({spec.kind(): 1} if spec.width % 8 == 0 else {}), backend.report
    eager, *eager_heads = module(*args)
    assert_follows_eager(heads, eager_heads, rows=2 if spec.norm is native_norm else 0)
    # An element of q is seen in all of its row of the attention, one of k in all rows of its batch item.
    torch.testing.assert_close(got, eager, rtol=2e-2 if got.dtype != torch.float32 else 1e-4, atol=2e-2)


@settings(AS_FOUND, max_examples=40)
@given(spec=silu_specs(), seed=st.integers(0, 2**16))
def test_a_compiled_swiglu_follows_eager_and_runs_on_a_kernel(spec: SiluSpec, seed: int) -> None:
    module, args = SiluModule(spec), moved(silu_inputs(spec, seed))
    got, backend = run(module, *args, kernels="auto")
    assert backend.report.counts() == {"silu_mul": 1}
    a, b = (t.double() for t in args)
    magnitude = (torch.nn.functional.silu(a) * b).abs().sum(-1, keepdim=True)
    distance = (got.double() - module(*args).double()).abs()
    assert bool((distance <= SUM_MAY_DIFFER[got.dtype] * magnitude).all()), (distance / magnitude).max()


@pytest.mark.parametrize("table", (torch.complex64, torch.complex128))
def test_only_one_kernel_runs_between_a_projection_and_its_attention(table: torch.dtype) -> None:
    spec = RopeSpec(width=64, tokens=128, heads=4, kv_heads=4, packed=True, table=table)
    module, args = RopeModule(spec).cuda().eval().requires_grad_(False), moved(rope_inputs(spec))
    compiled = torch.compile(module, backend=Backend(strict=True))
    compiled(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled(*args)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "NormRope" in name]) == 1, kernels
    assert len([name for name in kernels if not name.startswith("Memset")]) == 2, kernels  # and the attention


def two_rotated_streams(
    text: torch.Tensor, image: torch.Tensor, weight: torch.Tensor, text_table: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """As in Qwen-Image."""
    rotated = (complex_rope(diffusers_norm(x, weight), t, t) for x, t in ((text, text_table), (image, table)))
    heads = torch.cat(list(rotated), 1).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)


def test_two_streams_that_are_joined_and_rotated_are_one_kernel() -> None:
    """As in FLUX's double blocks."""
    q, k, q_text, k_text = (torch.randn(2, tokens, 4, 64, device="cuda").bfloat16() for tokens in (128, 128, 40, 40))
    angles = torch.randn(1, 168, 1, 32, device="cuda").repeat_interleave(2, -1)
    args = (q, k, q_text, k_text, angles.cos(), angles.sin())

    def attend(*args: torch.Tensor) -> torch.Tensor:
        q, k, q_text, k_text, cos, sin = args
        streams = (torch.cat([diffusers_norm(x, None) for x in both], 1) for both in ((q_text, q), (k_text, k)))
        q, k = (neighbours_rope(x, cos, sin).transpose(1, 2) for x in streams)
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    got, backend = run(attend, *args, kernels="auto")
    assert backend.report.counts() == {"qk_norm_cat_rope": 1}
    torch.testing.assert_close(got, attend(*args), rtol=2e-2, atol=2e-2)


def test_heads_whose_last_tokens_are_rotated_are_one_kernel() -> None:
    """As in CogVideoX."""
    q, k = torch.randn(2, 2, 168, 4, 64, device="cuda").bfloat16()
    weight, bias = torch.randn(2, 64, device="cuda").bfloat16()
    angles = torch.randn(1, 1, 128, 32, device="cuda").repeat_interleave(2, -1)

    def attend(*args: torch.Tensor) -> torch.Tensor:
        *qk, weight, bias, cos, sin = args
        q, k = (torch.nn.functional.layer_norm(x.transpose(1, 2), (64,), weight, bias) for x in qk)
        for n in (q, k):
            n[:, :, 40:] = neighbours_rope(n[:, :, 40:], cos, sin)
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    args = (q, k, weight, bias, angles.cos(), angles.sin())
    got, backend = run(attend, *args, kernels="auto")
    assert backend.report.counts() == {"qk_norm_part_rope": 1}
    torch.testing.assert_close(got, attend(*args), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_streams_that_are_rotated_and_joined_are_not_copied(mode: str, batch: int) -> None:
    heads = [torch.randn(batch, tokens, 4, 64, device="cuda").bfloat16() for tokens in (40, 128)]
    angles = [torch.randn(1, tokens, 1, 32, device="cuda") for tokens in (40, 128)]
    weight = torch.randn(64, device="cuda").bfloat16()
    args = (*heads, weight, *(torch.polar(torch.ones_like(a), a) for a in angles))
    compiled = torch.compile(two_rotated_streams, backend=Backend(strict=True), mode=mode)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(*args).clone()
    torch.testing.assert_close(got, two_rotated_streams(*args), rtol=2e-2, atol=2e-2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled(*args)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "NormRope" in name]) == 2, kernels
    assert not [name for name in kernels if "cat" in name.lower()], kernels


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_dynamic_shapes_with_eps_as_a_tensor_stay_right_under_cuda_graphs(mode: str) -> None:
    spec = Spec(width=256, tokens=64, gate_shape="chunk")
    module, _ = on_gpu(spec)
    compiled = torch.compile(module, backend=Backend(strict=True), mode=mode, dynamic=True)
    for tokens in (64, 96, 64, 128, 96):
        _, args = on_gpu(replace(spec, tokens=tokens), seed=tokens)
        torch.compiler.cudagraph_mark_step_begin()
        got = tuple(t.clone() for t in compiled(*args))
        assert_follows_eager(got, module(*args))


def test_the_fused_module_runs_one_kernel_and_copies_nothing() -> None:
    """The gate is a chunk of a projection; x is contiguous: no layout kernel, no copy."""
    spec = Spec(width=256, tokens=64, gate_shape="chunk", scale_shape="chunk")
    module, args = on_gpu(spec)
    compiled = torch.compile(module, backend=Backend(strict=True))
    compiled(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled(*args)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels


def two_norms(residual: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor) -> Any:
    y = residual + gate.tanh() * diffusers_norm(x, None)
    return y, (diffusers_norm(y, None) * (1 + scale)).to(x.dtype)


def assert_two_norms_follow_eager(stream: torch.dtype, model: Any, residual: torch.Tensor) -> None:
    x, gate, scale = (
        torch.randn(shape, device="cuda").bfloat16() for shape in ((2, 60, 256), (2, 1, 256), (2, 1, 256))
    )
    args = residual.to(stream), x, gate, scale
    assert fusion_pass.explain(model, *args).counts() == {"norm_tanh_mul_add_norm_scale": 1}
    assert_follows_eager(torch.compile(model, backend=Backend(strict=True))(*args), model(*args))


@pytest.mark.parametrize("stream", (torch.bfloat16, torch.float32), ids=str)
def test_a_stream_that_lies_as_a_convolution_left_it_is_fused_and_follows_eager(stream: torch.dtype) -> None:
    def model(image: torch.Tensor, *others: torch.Tensor) -> Any:
        return two_norms(image.flatten(2).transpose(1, 2), *others)

    assert_two_norms_follow_eager(stream, model, torch.randn(2, 256, 6, 10, device="cuda"))


def test_the_two_norms_of_a_site_may_be_cast_to_different_dtypes() -> None:
    """The second norm of an fp32 stream is cast to fp32, as type_as does it."""
    assert_two_norms_follow_eager(torch.float32, two_norms, torch.randn(2, 60, 256, device="cuda"))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("shape", ((64,), (1, 1, 64), (2, 1, 64), (2, 3, 64), (1,)), ids=str)
def test_opcheck_passes_on_the_gpu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def tensor(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda").to(dtype)

    ops = torch.ops.dit_kernels
    x, residual, weight, gate = tensor(2, 3, 64), tensor(2, 3, 64), tensor(64), tensor(*shape)
    torch.library.opcheck(ops.norm_tanh_mul_add.default, (x, weight, None, gate, residual, 1e-5))
    torch.library.opcheck(ops.norm_scale.default, (x, weight, weight, gate, 1e-5))
    dual = (x, weight, None, gate, residual, 1e-5, None, None, gate, 1e-6)
    torch.library.opcheck(ops.norm_tanh_mul_add_norm_scale.default, dual)
    with_gradients = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in dual]
    torch.library.opcheck(ops.norm_tanh_mul_add_norm_scale.default, with_gradients)


# --- direct calls -----------------------------------------------------------------------------------------------------


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops of the direct calls that checked their operands, one for each check, because they knew no kernel yet."""
    seen: list[str] = []
    checked = DirectCall.checked

    def noted(call: DirectCall, *operands: Any) -> None:
        seen.append(call.op)
        checked(call, *operands)

    monkeypatch.setattr(DirectCall, "checked", noted)
    return seen


def dual_operands(batch: int, tokens: int, skip: int = 0) -> tuple[torch.Tensor, ...]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x = random(batch * tokens * 256 + skip)[skip:].view(batch, tokens, 256)
    return x, random(256), random(batch, 1, 512), random(batch, tokens, 256), random(256)


def dual(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor, r: torch.Tensor, w2: torch.Tensor) -> Any:
    gate, scale = m.split(256, dim=2)
    return torch.ops.dit_kernels.norm_tanh_mul_add_norm_scale(x, w, None, gate, r, 1e-5, w2, None, scale, 1e-6)


def test_a_direct_call_is_looked_at_once_and_computes_what_the_op_does(looked_at: list[str]) -> None:
    function = torch.compile(dual, backend=Backend(), dynamic=None)
    for tokens in (64, 64, 96, 128, 64):
        args = dual_operands(2, tokens)
        for got, expected in zip(function(*args), dual(*args), strict=True):
            assert torch.equal(got, expected)
    assert len(looked_at) == 2  # in the code for 64 tokens, and in that for any number


def test_a_direct_call_takes_an_operand_that_is_not_aligned(looked_at: list[str]) -> None:
    function = torch.compile(dual, backend=Backend(), dynamic=False)
    for skip in (0, 0, 1, 4, 0):
        args = dual_operands(1, 64, skip)
        for got, expected in zip(function(*args), dual(*args), strict=True):
            assert torch.equal(got, expected)
    assert 1 <= len(looked_at) <= 3  # the first call, and those that no copy of Inductor's has aligned


def test_a_direct_call_runs_on_the_current_stream() -> None:
    function, args = torch.compile(dual, backend=Backend(), dynamic=False), dual_operands(1, 64)
    function(*args)
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        results = function(*args)
        done.record()
    assert not done.query()  # what was launched waits behind the sleep
    stream.synchronize()
    for got, expected in zip(results, dual(*args), strict=True):
        assert torch.equal(got, expected)


def test_compiled_code_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: the compiled code runs on one that is not the current one")
    function, args = torch.compile(dual, backend=Backend(), dynamic=False), dual_operands(1, 64)
    there = [t.to("cuda:1") for t in args]
    for _ in range(2):  # the second time the call is known
        for got, expected in zip(function(*there), dual(*args), strict=True):
            assert got.device == torch.device("cuda:1")
            assert torch.equal(got.cpu(), expected.cpu())


def attention(packed: torch.Tensor, w: torch.Tensor, freqs: torch.Tensor, both: torch.Tensor) -> Any:
    q, k, _ = packed.split((6 * 64, 2 * 64, 2 * 64), -1)
    q, k = q.unflatten(-1, (6, 64)), k.unflatten(-1, (2, 64))
    q, k = torch.ops.dit_kernels.qk_norm_rope(q, k, w, w, freqs, None, 1e-5, 1e-6)
    alone = torch.ops.dit_kernels.norm_rope(k, None, freqs, None, 1e-5)
    return q, k, alone, torch.ops.dit_kernels.silu_mul(*both.chunk(2, -1))


def test_direct_calls_of_the_ops_of_attention_compute_what_the_ops_do(looked_at: list[str]) -> None:
    function = torch.compile(attention, backend=Backend(), dynamic=None)
    for tokens in (64, 64, 96, 128, 64):
        angle = torch.randn(tokens, 32, device="cuda")
        packed, both = (torch.randn(2, tokens, d, device="cuda").bfloat16() for d in (640, 512))
        args = packed, torch.randn(64, device="cuda").bfloat16(), torch.polar(torch.ones_like(angle), angle), both
        for got, expected in zip(function(*args), attention(*args), strict=True):
            assert torch.equal(got, expected)
    assert len(looked_at) == 2 * 3
