"""The CUDA kernels against the definition on the same GPU: the bounds are those of `kernel_bounds`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import kernel_bounds
import pytest
import torch
from kernel_bounds import BF16, DUAL, EPS, EPS2, FP16, FP32, OPS, Device, Operands
from torch import Tensor

from dit_kernels import ops, tickets
from dit_kernels.rounding import FORMS, NORMS, ROOTS

GPU = Device()
random, operands = (partial(make, device="cuda") for make in (kernel_bounds.random, kernel_bounds.operands))
check = partial(kernel_bounds.check, GPU)


def run(op: str, o: Operands, **options: Any) -> tuple[Tensor, ...]:
    return GPU.run(op, *o.arguments(op), **options)


@pytest.fixture(scope="module", autouse=True)
def own_kernel_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIT_KERNELS_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_op_follows_the_definition_in_every_rounding_form(op: str, form: str, norm: str) -> None:
    check(op, operands(2, 264, 3840), rounding=form, norm=norm)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_op_follows_the_definition_with_every_spelling_of_the_root(op: str, root: str, form: str) -> None:
    check(op, operands(2, 264, 3840), rounding=form, root=root)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ("cast_then_weight", "weight_then_cast", "fp32"))
@pytest.mark.parametrize(
    "dtypes",
    (
        dict(dtype=FP16),
        dict(dtype=FP32),
        dict(weight=FP32, weight2=FP32),
        dict(residual=FP32),
        dict(weight=FP32, weight2=FP32, residual=FP32),
        dict(gate=FP32, scale=FP32),
        dict(x=FP32),
    ),
    ids=("fp16", "fp32", "fp32-weight", "fp32-residual", "fp32-weight-residual", "fp32-gate", "fp32-x"),
)
def test_every_op_follows_the_definition_in_every_dtype(op: str, form: str, dtypes: dict[str, Any]) -> None:
    check(op, operands(2, 100, 2304, **dtypes), rounding=form)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("norm", NORMS)
def test_fp32_models_stay_within_twice_the_error_of_eager(op: str, norm: str) -> None:
    check(op, operands(1, 500, 3840, FP32, bias=True), norm=norm)


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=4)))
def test_each_of_weight_bias_gate_and_scale_may_be_absent(present: tuple[bool, ...]) -> None:
    o = operands(2, 64, 2304, bias=True)
    weight, bias, gate, scale = present
    if not weight:
        o = replace(o, weight=None, weight2=None)
    if not bias:
        o = replace(o, bias=None, bias2=None)
    if not gate:
        o = replace(o, gate=None)
    if not scale:
        o = replace(o, scale=None)
    check(DUAL, o)


@pytest.mark.parametrize("op", OPS)
def test_a_layer_norm_may_have_neither_weight_nor_bias_or_both(op: str) -> None:
    o = operands(2, 64, 3072, bias=True)
    check(op, o, norm="layer")
    check(op, replace(o, weight=None, weight2=None, bias=None, bias2=None), norm="layer")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_a_gate_may_be_activated_and_a_scale_hold_its_one_already(op: str, dtype: torch.dtype) -> None:
    check(op, operands(2, 64, 2304, dtype), tanh=False, add_one=False)


def test_results_take_the_dtypes_that_are_asked_for() -> None:
    o = operands(1, 64, 2304)
    y, z = check(DUAL, o, y_dtype=FP32, z_dtype=FP16)
    assert (y.dtype, z.dtype) == (FP32, FP16)
    (z,) = check("norm_scale", replace(o, weight=o.weight.float()), norm_dtype=BF16, z_dtype=BF16)
    assert z.dtype == BF16


# --- shapes and strides ---------------------------------------------------------------------------------------------

BROADCASTS = ("d", "11d", "b1d", "bsd", "1sd", "one", "0-d", "bs1", "b11")


def broadcast(kind: str, batch: int, tokens: int, d: int, seed: int) -> Tensor:
    letters = {"1": 1, "b": batch, "s": tokens, "d": d}
    shape = {"one": (1,), "0-d": ()}.get(kind) if kind in ("one", "0-d") else tuple(letters[c] for c in kind)
    return random(*shape, seed=seed)


@pytest.mark.parametrize("kind", BROADCASTS)
def test_gate_and_scale_broadcast_as_they_do_in_pytorch(kind: str) -> None:
    sizes = (3, 50, 2304)
    o = replace(operands(*sizes), gate=broadcast(kind, *sizes, 1), scale=broadcast(kind, *sizes, 2))
    check(DUAL, o)


def test_gate_and_scale_may_broadcast_differently() -> None:
    sizes = (3, 50, 2304)
    o = operands(*sizes)
    check(DUAL, replace(o, gate=broadcast("bsd", *sizes, 1), scale=broadcast("d", *sizes, 2)))
    check(DUAL, replace(o, gate=broadcast("one", *sizes, 1), scale=broadcast("1sd", *sizes, 2)))


def test_gate_and_scale_may_be_chunks_of_one_modulation() -> None:
    scale, gate, *_ = random(4, 1, 4 * 2304).chunk(4, dim=-1)
    assert gate.stride(0) == 4 * 2304
    check(DUAL, replace(operands(4, 33, 2304), gate=gate, scale=scale))


def slice_of_a_wider_row(t: Tensor) -> Tensor:
    return torch.cat((t, t + 1), dim=-1)[..., : t.shape[-1]]


def tokens_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def every_second_token(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, dim=1)[:, ::2]


def last_dimension_strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def one_row_for_all(t: Tensor) -> Tensor:
    return t[:1, :1].expand_as(t)


@pytest.mark.parametrize(
    "view", (slice_of_a_wider_row, tokens_first, every_second_token, last_dimension_strided, one_row_for_all)
)
def test_x_residual_gate_and_scale_may_have_any_strides(view: Any) -> None:
    o = operands(2, 40, 2304)
    gate, scale = random(2, 40, 2304, seed=21), random(2, 40, 2304, seed=22)
    strided = replace(o, x=view(o.x), residual=view(o.residual), gate=view(gate), scale=view(scale))
    assert not strided.x.is_contiguous()
    check(DUAL, strided)


@pytest.mark.parametrize("dtype", (BF16, FP32))
@pytest.mark.parametrize("offset", (1, 2, 4))
def test_views_that_are_not_aligned_to_16_bytes_are_read_right(dtype: torch.dtype, offset: int) -> None:
    def shifted(t: Tensor) -> Tensor:
        storage = torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)
        return storage[offset:].view(t.shape).copy_(t)

    o = operands(2, 40, 2304, dtype)
    check(DUAL, Operands(*(t if t is None else shifted(t) for t in vars(o).values())))


def test_a_row_stride_that_breaks_the_alignment_is_read_right() -> None:
    o = operands(2, 40, 2304)
    padded = torch.cat((o.x, o.x[..., :3]), dim=-1)
    check(DUAL, replace(o, x=padded[..., :2304]))


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("batch", "tokens"), [(1, s) for s in (131, 397, 1057, 2376, 2377, 2773, 3171)] + [(3, 925)])
def test_every_row_is_computed_however_the_rows_are_shared_out(op: str, batch: int, tokens: int) -> None:
    check(op, operands(batch, tokens, 3840))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", (1, 32, 1056, 4128, 9248))
def test_the_sizes_of_z_image_follow_the_definition(op: str, tokens: int) -> None:
    check(op, operands(1, tokens, 3840))


@pytest.mark.parametrize("d", (2304, 2520, 3072, 4608, 8192, 12288))
@pytest.mark.parametrize("norm", NORMS)
def test_the_widths_of_other_models_follow_the_definition(d: int, norm: str) -> None:
    check(DUAL, operands(2, 515, d, bias=norm == "layer"), norm=norm)


@pytest.mark.parametrize("d", (1, 7, 333, 2521, 8191, 16384, 16392, 32768, 65536))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", (BF16, FP32))
def test_every_width_follows_the_definition(d: int, norm: str, dtype: torch.dtype) -> None:
    check(DUAL, operands(2, 19, d, dtype), norm=norm)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("d", [7, 333, 2521])
def test_a_cta_that_walks_many_rows_with_a_tail_follows_the_definition(op: str, d: int) -> None:
    check(op, operands(2, 5000, d))


@pytest.mark.parametrize("op", ("norm_tanh_mul_add", "norm_scale"))
@pytest.mark.parametrize("d", (333, 2520, 32768))
def test_single_outputs_of_every_width_follow_the_definition(op: str, d: int) -> None:
    check(op, operands(2, 19, d))


def test_one_kernel_serves_every_batch_and_length() -> None:
    from dit_kernels import compile

    check(DUAL, operands(1, 8, 3072))
    compiled = len(compile.KERNELS.functions)
    for batch, tokens in ((1, 1), (4, 77), (4, 1), (2, 1023)):
        check(DUAL, operands(batch, tokens, 3072))
    assert len(compile.KERNELS.functions) == compiled


def test_leading_dimensions_may_be_any_number() -> None:
    o = operands(6, 20, 2304)
    y, z = run(DUAL, o, norm="rms")
    four = replace(
        o,
        x=o.x.view(2, 3, 20, 2304),
        residual=o.residual.view(2, 3, 20, 2304),
        gate=o.gate.view(2, 3, 1, 2304),
        scale=o.scale.view(2, 3, 1, 2304),
    )
    y4, z4 = run(DUAL, four)
    assert torch.equal(y4.view_as(y), y) and torch.equal(z4.view_as(z), z)
    two = replace(o, x=o.x[0], residual=o.residual[0], gate=o.gate[0], scale=o.scale[0])
    y2, z2 = run(DUAL, two)
    assert torch.equal(y2, y[0]) and torch.equal(z2, z[0])


@pytest.mark.parametrize("op", OPS)
def test_a_call_like_one_before_computes_what_the_first_did(
    op: str, checked_calls: list[str], as_if_first: Callable[[], AbstractContextManager[Any]]
) -> None:
    o = operands(2, 37, 3840)
    o.gate = random(3840)  # is viewed as [1, 1, D] on the way
    with as_if_first():
        first = run(op, o)
    assert checked_calls == [op]
    again = run(op, o)
    assert checked_calls == [op]  # a plan ran the second call
    with as_if_first():
        checked = run(op, o)
    assert checked_calls == [op, op]
    for results in zip(first, again, checked, strict=True):
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert results[0].data_ptr() != results[1].data_ptr()
    moved = replace(o, x=random(2, 37, 3841)[..., 1:], residual=o.residual)
    check(op, moved)


def test_an_empty_x_gives_empty_results() -> None:
    y, z = run(DUAL, operands(2, 0, 2304))
    assert y.shape == z.shape == (2, 0, 2304)


def test_tensors_of_more_than_2_to_the_31_elements_are_addressed_right() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    tokens, d = 600_000, 3840
    row = operands(1, 4, d)
    x, residual = (torch.empty(1, tokens, d, dtype=BF16, device="cuda").normal_() for _ in range(2))
    y, z = run(DUAL, replace(row, x=x, residual=residual))
    limit = 2**31 // d
    for start in (0, limit - 2, tokens - 4):
        rows = slice(start, start + 4)
        part = run(DUAL, replace(row, x=x[:, rows].clone(), residual=residual[:, rows].clone()))
        assert torch.equal(y[:, rows], part[0]) and torch.equal(z[:, rows], part[1])


# --- special values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
@pytest.mark.parametrize("d", (333, 2304, 32768))
def test_nan_inf_and_zero_rows_come_out_as_in_eager(norm: str, dtype: torch.dtype, d: int) -> None:
    o = operands(1, 8, d, dtype)
    nan, inf = float("nan"), float("inf")
    o.x[0, 0, d // 2] = nan
    o.x[0, 1, 0] = inf
    o.x[0, 2, d - 1] = -inf
    o.x[0, 3] = 0
    o.residual[0, 3] = 0
    o.residual[0, 4, 5] = inf
    o.x[0, 5] = torch.finfo(dtype).max
    o.x[0, 6] = torch.finfo(dtype).tiny
    o.gate[0, 0, 3] = inf
    o.gate[0, 0, 4] = -inf
    for result, expected in zip(run(DUAL, o, norm=norm), definition(o, norm), strict=True):
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isinf(), expected.isinf())
        assert torch.equal(result[result.isinf()], expected[expected.isinf()])


def test_a_zero_row_without_eps_is_nan_as_in_eager() -> None:
    o = operands(1, 2, 2304)
    o.x[0, 1] = 0
    (y,) = (torch.ops.dit_kernels.norm_tanh_mul_add(*o.arguments("norm_tanh_mul_add", eps=0.0)),)
    assert bool(y[0, 1].isnan().all()) and not bool(y[0, 0].isnan().any())


def test_an_activated_gate_may_be_infinite() -> None:
    o = operands(1, 4, 333)
    o.gate[...] = float("inf")
    for result, expected in zip(run(DUAL, o, tanh=False), definition(o, "rms", tanh=False), strict=True):
        assert torch.equal(result.isnan(), expected.isnan())


def definition(o: Operands, norm: str, **options: Any) -> tuple[Tensor, ...]:
    op = torch.ops.dit_kernels.norm_tanh_mul_add_norm_scale.default
    return ops.checked_call(op, *o.arguments(DUAL), norm=norm, **options).definition()


# --- streams, devices, graphs, eps ----------------------------------------------------------------------------------


def test_a_call_runs_on_the_current_stream() -> None:
    o = operands(1, 256, 3840)
    expected = run(DUAL, o)
    stream = torch.cuda.Stream()
    x = torch.zeros_like(o.x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on any other stream would read the zeros
        x.copy_(o.x)
        results = run(DUAL, replace(o, x=x))
    stream.synchronize()
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


def test_a_call_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: the kernel runs on one that is not the current one")
    o = operands(1, 64, 3840)
    there = Operands(*(t if t is None else t.to("cuda:1") for t in vars(o).values()))
    for _ in range(2):  # the second call is one like a call before, and skips its checks
        for result, other in zip(run(DUAL, there), run(DUAL, o), strict=True):
            assert result.device == torch.device("cuda:1")
            assert torch.equal(result.cpu(), other.cpu())
    assert torch.cuda.current_device() == 0


def test_a_call_is_captured_into_a_graph_and_replayed_on_new_data() -> None:
    o = operands(1, 256, 3840)
    run(DUAL, o)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(DUAL, o)
    o.x.copy_(random(1, 256, 3840, seed=77))
    graph.replay()
    for result, expected in zip(captured, run(DUAL, o), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("op", OPS)
def test_launches_on_several_streams_and_in_graphs_that_run_at_once_do_not_take_each_others_rows(op: str) -> None:
    o = operands(2, 3000, 3840)
    expected = run(op, o)
    streams = [torch.cuda.Stream() for _ in range(3)]
    graphs, results = [torch.cuda.CUDAGraph() for _ in range(3)], []
    for graph in graphs:  # all captured on one stream, and replayed on others
        with torch.cuda.graph(graph):
            results.append([run(op, o) for _ in range(2)])
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                results.append([run(op, o)])
    torch.cuda.synchronize()
    for outs in itertools.chain.from_iterable(results):
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


def test_more_batch_items_than_multiprocessors_hold_ctas_are_all_computed() -> None:
    check(DUAL, operands(700, 9, 3840))
    check(DUAL, operands(3, 4000, 256))


def test_a_capture_with_no_counters_left_zeroes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    o = operands(1, 4000, 3840)
    expected = run(DUAL, o)
    monkeypatch.setattr(tickets.COUNTERS, "free", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run(DUAL, o)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


def test_a_kernel_that_is_not_compiled_is_refused_under_capture() -> None:
    o = operands(1, 4, 3864)  # a width that no other test has
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        run(DUAL, o)
    torch.cuda.synchronize()
    check(DUAL, o)


@pytest.mark.parametrize("op", OPS)
def test_eps_may_be_a_tensor_on_the_cpu(op: str) -> None:
    o = operands(1, 64, 3840)
    overload = getattr(torch.ops.dit_kernels, op).eps_tensor
    eps, eps2 = (torch.tensor(value, dtype=torch.float64) for value in (EPS, EPS2))
    results = overload(*o.arguments(op, eps, eps2))
    results = results if isinstance(results, tuple) else (results,)
    for result, expected in zip(results, run(op, o), strict=True):
        assert torch.equal(result, expected)


def test_what_is_prepared_on_fake_tensors_is_what_a_call_launches() -> None:
    from torch._subclasses import FakeTensorMode

    from dit_kernels import compile

    o = operands(2, 24, 3880)  # a width that no other test has
    with FakeTensorMode() as mode:
        fakes = Operands(*(t if t is None else mode.from_tensor(t) for t in vars(o).values()))
        op = torch.ops.dit_kernels.norm_tanh_mul_add_norm_scale.default
        ops.prepare(ops.checked_call(op, *fakes.arguments(DUAL)))
    compiled = set(compile.KERNELS.functions)
    assert any(variant.d == 3880 for _, variant in compiled)
    check(DUAL, o)
    assert set(compile.KERNELS.functions) == compiled


def test_kernels_from_the_disk_compute_what_fresh_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_if_first: Callable[[], AbstractContextManager[Any]]
) -> None:
    from dit_kernels import compile

    o, compiled = operands(1, 64, 3840), []
    real = compile.compile_variant
    monkeypatch.setenv("DIT_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile, "compile_variant", lambda *given: compiled.append(given) or real(*given))
    with as_if_first():  # a plan would run the kernel that it knows
        monkeypatch.setattr(compile, "KERNELS", compile.KernelTable())
        expected = run(DUAL, o)
        monkeypatch.setattr(compile, "KERNELS", compile.KernelTable())
        results = run(DUAL, o)
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)
    assert len(compiled) == 1
