"""How compiled code calls the ops: what is emitted, and that a direct call launches what a call of the op would."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fusion_pass
from dit_kernels import ops, tickets
from dit_kernels.arguments import laid
from dit_kernels.direct import DirectCall
from dit_kernels.families import OPS, rows
from dit_kernels.families.family import Op
from fusion_pass import Backend, lowering

D, EPS = 32, 1e-5
PROCESSORS, COUNTERS, STREAM = 132, 4096, 7
bf16 = torch.bfloat16
DUAL = torch.ops.dit_kernels.norm_tanh_mul_add_norm_scale
GATED = torch.ops.dit_kernels.norm_tanh_mul_add
SCALED = torch.ops.dit_kernels.norm_scale
ADDED = torch.ops.dit_kernels.mul_add_norm_scale


pytestmark = pytest.mark.usefixtures("compiled_anew")


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(bf16)


def compiled(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str]:
    """The result of Inductor's code, and the code."""
    torch._dynamo.reset()
    result, codes = run_and_get_code(torch.compile(function, backend=Backend(), **options), *args)
    return result, "\n".join(codes)


def is_direct(code: str) -> bool:
    through_dispatcher = "torch.ops.dit_kernels" in code.split("def call")[1]
    assert through_dispatcher != ("DirectCall(" in code)
    return not through_dispatcher


def assert_equal(got: Any, expected: Any) -> None:
    got, expected = (r if isinstance(r, tuple) else (r,) for r in (got, expected))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def dual(x: Tensor, w: Tensor, gate: Tensor, residual: Tensor, w2: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return DUAL(x, w, None, gate, residual, EPS, w2, None, scale, EPS)


def operands(*lead: int) -> tuple[Tensor, ...]:
    modulation = random(lead[0], 1, 2 * D)
    gate, scale = modulation.split(D, dim=2)  # views of one buffer, as in a model
    return random(*lead, D), random(D), gate, random(*lead, D), random(D), scale


def test_every_op_is_called_directly_into_buffers_that_inductor_allocates() -> None:
    x, w, gate, residual, w2, scale = operands(2, 5)
    calls = {
        "dual": (dual, (x, w, gate, residual, w2, scale)),
        "gated": (lambda x, w, g, r: GATED(x, w, None, g, r, EPS), (x, w, gate, residual)),
        "scaled": (lambda x, w, s: SCALED(x, w, None, s, EPS), (x, w, scale)),
        "bare": (lambda x, r: GATED(x, None, None, None, r, EPS, tanh=False), (x, residual)),
        "4-D": (lambda x, w, r: GATED(x[None], w, None, None, r[None], EPS), (x, w, residual)),
    }
    for function, args in calls.values():
        got, code = compiled(function, *args)
        assert is_direct(code)
        assert code.count(" = empty_strided_cpu(") == 1 + (function is dual)
        assert_equal(got, function(*args))


def test_a_view_is_given_as_its_buffer_and_an_offset() -> None:
    x, w, _, residual, w2, _ = operands(2, 5)

    def modulated(x: Tensor, w: Tensor, m: Tensor, residual: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        gate, scale = m.mm(torch.eye(2 * D, dtype=bf16)).view(2, 1, 2 * D).split(D, dim=2)
        return dual(x, w, gate, residual, w2, scale)

    args = (x, w, random(2, 2 * D), residual, w2)
    got, code = compiled(modulated, *args)
    assert is_direct(code)
    assert f".data_ptr() + {2 * D}, " in code
    fast_path = next(line for line in code.splitlines() if line.lstrip().startswith("if not dit_kernel_"))
    assert "reinterpret_tensor" not in fast_path
    assert_equal(got, modulated(*args))


def test_sizes_may_change_without_another_compilation() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(Backend())
    function = torch.compile(lambda x, w, r: GATED(x, w, None, None, r, EPS, tanh=False), backend=counter, dynamic=None)
    w = random(D)
    for tokens in (5, 7, 11, 13):
        x, residual = random(2, tokens, D), random(2, tokens, D)
        assert_equal(function(x, w, residual), GATED(x, w, None, None, residual, EPS, tanh=False))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "unusual",
    [
        pytest.param(lambda x, w, r: GATED(x[..., ::2], w[::2], None, None, r[..., ::2], EPS), id="columns apart"),
        pytest.param(
            lambda x, w, r: GATED(x.view(-1)[:300].view(2, 5, 30), w[:30], None, None, r[..., :30], EPS),
            id="rows that end askew",
        ),
        pytest.param(lambda x, w, r: GATED.eps_tensor(x, w, None, None, r, w[:1].abs()), id="eps as a tensor"),
        pytest.param(lambda x, w, r: GATED(x, w, None, x[..., :1], r, EPS), id="a gate for each token"),
    ],
)
def test_what_a_kernel_does_not_take_as_it_is_goes_through_the_dispatcher(unusual: Callable[..., Any]) -> None:
    args = random(2, 5, D), random(D), random(2, 5, D)
    got, code = compiled(unusual, *args)
    assert not is_direct(code)
    assert_equal(got, unusual(*args))


def test_on_a_gpu_rows_that_lie_apart_are_copied_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual lies as a convolution leaves it: [B, D, S]. The add in front of the copy is in the same kernel. On a
    CPU, such rows go through the dispatcher, as the columns above."""

    def added(x: Tensor, gate: Tensor, images: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return ADDED(x, gate, (images + bias[:, None]).mT, None, None, scale, EPS, norm="layer")

    args = random(2, 5, D), random(D), random(2, D, 5), random(D), random(D)
    monkeypatch.setattr(lowering, "_sums_as_they_lie", lambda device: False)
    got, code = compiled(added, *args)
    assert is_direct(code)
    assert code.split("def call")[1].count("cpp_fused") == 1
    assert_equal(got, added(*args))


@pytest.mark.parametrize("step", ["_layouts", "_realized", "empty_strided", "_stored"])
def test_an_error_in_the_lowering_costs_a_warning_and_the_dispatcher(
    step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise AttributeError("renamed")

    monkeypatch.setattr(lowering, step, broken)
    args = operands(2, 5)
    with caplog.at_level(logging.WARNING, "fusion_pass"):
        got, code = compiled(dual, *args)
    assert not is_direct(code)
    assert "AttributeError: renamed" in caplog.text
    assert_equal(got, dual(*args))


def test_a_call_on_a_stream_of_its_own_goes_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "stream", lambda node: 1)
    args = operands(2, 5)
    got, code = compiled(dual, *args)
    assert not is_direct(code)
    assert_equal(got, dual(*args))


def in_a_branch(x: Tensor, w: Tensor, s: Tensor, which: Tensor) -> Tensor:
    return torch.cond(
        which,
        lambda x, w, s: SCALED(x, w, None, s, EPS) + 1,
        lambda x, w, s: SCALED(x * 2, w, None, s, EPS) - 1,
        (x, w, s),
    )


@torch.compiler.nested_compile_region
def region(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return SCALED(x, w, None, s, EPS) * 2


def in_a_region_of_its_own(x: Tensor, w: Tensor, s: Tensor, which: Tensor) -> Tensor:
    return region(region(x, w, s), w, s)


def copied_back_into_what_was_read(x: Tensor, w: Tensor, s: Tensor, which: Tensor) -> Tensor:
    y = GATED(x, w, None, None, x * 2, EPS, tanh=False)
    x.copy_(y)
    return y + 1


def changed_in_place(x: Tensor, w: Tensor, s: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    z = SCALED(x, w, None, s, EPS).add_(1)
    return z, z.view(-1)


@pytest.mark.parametrize(
    "function", (in_a_branch, in_a_region_of_its_own, copied_back_into_what_was_read, changed_in_place)
)
@pytest.mark.parametrize("which", (True, False))
def test_a_direct_call_is_right_wherever_its_operands_and_results_come_from_and_go(
    function: Callable[..., Any], which: bool
) -> None:
    x, w, s = random(2, 5, D), random(D), random(2, 1, D)
    eager_x, compiled_x = x.clone(), x.clone()
    expected = function(eager_x, w, s, torch.tensor(which))
    got, code = compiled(function, compiled_x, w, s, torch.tensor(which), fullgraph=True)
    assert "DirectCall(" in code
    assert_equal(got, expected)
    assert torch.equal(compiled_x, eager_x)


def test_code_for_other_dtypes_is_another_source() -> None:
    def scaled(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return SCALED(x, w, None, scale, EPS, rounding="fp32", z_dtype=bf16)

    x, w, _, _, _, scale = operands(2, 5)
    lines = []
    for weight in (w, w.float()):
        _, code = compiled(scaled, x, weight, scale)
        lines.append(next(line for line in code.splitlines() if "= DirectCall(" in line))
    assert lines[0] != lines[1]


def test_under_plain_inductor_whose_caches_do_not_know_our_version_the_op_goes_through_the_dispatcher() -> None:
    args = operands(2, 5)
    for options, direct in ((None, False), (fusion_pass.inductor_options(), True)):
        torch._dynamo.reset()
        got, codes = run_and_get_code(torch.compile(dual, options=options), *args)
        assert is_direct("\n".join(codes)) == direct
        assert_equal(got, dual(*args))


def test_a_cpp_wrapper_calls_the_op_through_the_dispatcher() -> None:
    args = operands(2, 5)
    got, code = compiled(dual, *args, options={"cpp_wrapper": True})
    assert "DirectCall" not in code
    assert_equal(got, dual(*args))


# --- the call itself, with a kernel that only notes what it is launched with ------------------------------------------


class Launched(Exception):
    """The arguments of a launch."""


def launch(*args: Any) -> None:
    raise Launched(args)


@contextmanager
def gpu() -> Iterator[None]:
    """CPU tensors are taken for those of a GPU whose kernels are all `launch`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "run_into", lambda call, results: (launch, ()) if results[0].numel() else None)
        patch.setattr(rows, "processors", lambda device: PROCESSORS)
        patch.setattr(tickets.COUNTERS, "address", lambda device, stream, batches: COUNTERS)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
        yield


def addresses(*given: Any) -> tuple[Any, ...]:
    return tuple(t.data_ptr() if isinstance(t, Tensor) else t for t in given)


def launch_numbers(op: Op, given: tuple[Any, ...]) -> tuple[int, ...]:
    """The numbers that the kernel is launched with, for the op's arguments."""
    pairs = zip((*op.inputs, *op.results), given, strict=True)
    layouts = {a.name: laid(a, t, given[0].shape)[0] for a, t in pairs if isinstance(t, Tensor)}
    return op.family.launch_numbers(layouts)


def launched(call: DirectCall, given: tuple[Any, ...], numbers: tuple[int, ...]) -> tuple[Any, ...] | None:
    """What a call launches with these arguments of a kernel, tensors by their addresses."""
    try:
        assert not call(addresses(*given), numbers)
    except Launched as arguments:
        return arguments.args[0]
    return None


@given(data=st.data())
def test_a_direct_call_launches_with_the_addresses_and_numbers_of_its_operands(data: st.DataObject) -> None:
    b, s, wide = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.booleans())

    def broadcast() -> Tensor:
        return random(data.draw(st.sampled_from([1, b])), data.draw(st.sampled_from([1, s])), 2 * D)[..., D:]

    x, residual = (random(b, s, 2 * D if wide else D)[..., :D] for _ in range(2))
    gate, scale = broadcast(), broadcast()
    tensors = (
        x,
        random(D),
        None,
        gate,
        residual,
        EPS,
        random(D),
        None,
        scale,
        EPS,
        None,
        random(b, s, D),
        random(b, s, D),
    )
    numbers = launch_numbers(OPS["norm_tanh_mul_add_norm_scale"], tensors)
    strides = [
        0 if size == 1 else by
        for t in (x, gate, residual, scale)
        for size, by in zip(t.shape[:2], t.stride()[:2], strict=True)
    ]
    assert numbers == (b, s, *strides, 0, 0)  # there is no shift
    call = DirectCall("norm_tanh_mul_add_norm_scale")
    with gpu():
        assert launched(call, tensors, numbers) is None  # the first time everything is looked at
        call.checked(*tensors)
        assert launched(call, tensors, numbers) == (*addresses(*tensors), *numbers, PROCESSORS, COUNTERS, STREAM)


@pytest.mark.parametrize("askew", [0, 1, 3, 4, 6, 8, 11, 12])
def test_a_direct_call_leaves_an_operand_that_is_not_aligned_to_the_checks(askew: int) -> None:
    x, w, gate, residual, w2, scale = operands(2, 5)
    tensors: list[Any] = [x, w, None, gate, residual, EPS, w2, None, scale, EPS, None, random(2, 5, D), random(2, 5, D)]
    numbers = launch_numbers(OPS["norm_tanh_mul_add_norm_scale"], tuple(tensors))
    call = DirectCall("norm_tanh_mul_add_norm_scale")
    with gpu():
        call.checked(*tensors)
        assert launched(call, tuple(tensors), numbers) is not None
        moved = tensors[askew]
        tensors[askew] = random(moved.numel() + 1)[1:].view(moved.shape)
        assert launched(call, tuple(tensors), numbers) is None
        unaligned = DirectCall("norm_tanh_mul_add_norm_scale")
        unaligned.checked(*tensors)
        assert unaligned.function is None


def test_a_direct_call_launches_nothing_for_no_rows() -> None:
    x, w, gate, residual, w2, scale = operands(2, 5)
    tensors = (x, w, None, gate, residual, EPS, w2, None, scale, EPS, None, random(2, 5, D), random(2, 5, D))
    call = DirectCall("norm_tanh_mul_add_norm_scale")
    with gpu():
        call.checked(*tensors)
        _, _, *strides = launch_numbers(OPS["norm_tanh_mul_add_norm_scale"], tensors)
        assert launched(call, tensors, (2, 0, *strides)) is None
