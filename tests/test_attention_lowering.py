"""How compiled code calls norm_rope, qk_norm_rope and silu_mul: directly, with views as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_lowering import STREAM, addresses, assert_equal, compiled, gpu, is_direct, launch_numbers, launched, random
from torch import Tensor

import fusion_pass.lowering  # noqa: F401  Inductor's way to call the ops
from dit_kernels.direct import DirectCall
from dit_kernels.families import OPS

ops = torch.ops.dit_kernels
B, S, H, HK, D, EPS = 2, 5, 4, 2, 16, 1e-5


pytestmark = pytest.mark.usefixtures("compiled_anew")


def freqs(*lead: int, dtype: torch.dtype = torch.complex64) -> Tensor:
    angle = torch.randn((*lead, D // 2), dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def qk(packed: Tensor, w: Tensor, *rotation: Tensor | None, **options: Any) -> Any:
    """q and k as views of one projection."""
    q, k, _ = packed.split((H * D, HK * D, HK * D), -1)
    rotation = rotation if len(rotation) == 2 else (*rotation, None)
    return ops.qk_norm_rope(q.unflatten(-1, (H, D)), k.unflatten(-1, (HK, D)), w, w, *rotation, EPS, EPS, **options)


PACKED = (H + 2 * HK) * D


@pytest.mark.parametrize(
    "rotation",
    [
        (freqs(S),),
        (freqs(1, S),),
        (freqs(B, S, 1),),
        (freqs(S, dtype=torch.complex128),),
        (random(B, S, D), random(B, S, D)),
        (random(S, 1, D), random(S, 1, D)),
        (random(S, D // 2).float(), random(S, D // 2).float()),
    ],
    ids=["c64 [S, n]", "c64 [1, S, n]", "c64 [B, S, 1, n]", "c128", "cos and sin", "cos and sin [S, 1, n]", "half"],
)
def test_q_and_k_are_read_where_the_projection_has_left_them(rotation: tuple[Tensor, ...]) -> None:
    args = (random(B, S, PACKED), random(D), *rotation)
    got, code = compiled(qk, *args)
    assert is_direct(code)
    assert f".data_ptr() + {2 * H * D}, " in code
    assert code.count(" = empty_strided_cpu(") == 2
    assert_equal(got, qk(*args))


def test_one_of_q_and_k_alone_is_called_directly() -> None:
    def alone(x: Tensor, rotation: Tensor) -> Tensor:
        return ops.norm_rope(x, None, rotation, None, EPS)

    args = (random(B, S, H, D), freqs(S))
    got, code = compiled(alone, *args)
    assert is_direct(code)
    assert_equal(got, alone(*args))


def test_silu_mul_of_halves_is_called_directly_on_their_buffer() -> None:
    def halves(x: Tensor) -> Tensor:
        a, b = x.mm(torch.eye(2 * D, dtype=x.dtype)).view(B, S, 2 * D).chunk(2, -1)
        return ops.silu_mul(a, b)

    x = random(B * S, 2 * D)
    got, code = compiled(halves, x)
    assert is_direct(code)
    assert f".data_ptr() + {2 * D}, " in code
    assert_equal(got, halves(x))


def test_sizes_may_change_without_another_compilation() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    function, w = torch.compile(qk, backend=counter, dynamic=None), random(D)
    for tokens in (5, 7, 11):
        args = (random(B, tokens, PACKED), w, freqs(tokens))
        assert_equal(function(*args), qk(*args))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "unusual",
    [
        pytest.param(lambda x, r: ops.norm_rope(x[..., ::2], None, r[:, ::2], None, EPS), id="columns apart"),
        pytest.param(
            lambda x, r: ops.norm_rope(x.view(-1)[:240].view(2, 5, 2, 12), None, r[:, :6], None, EPS),
            id="heads that end askew",
        ),
        pytest.param(lambda x, r: ops.norm_rope.eps_tensor(x, None, r, None, r[0, 0].abs()), id="eps as a tensor"),
    ],
)
def test_what_a_kernel_does_not_take_as_it_is_goes_through_the_dispatcher(unusual: Callable[..., Any]) -> None:
    args = random(B, S, H, 2 * D), freqs(S, 2)[:, 0].repeat(1, 2)
    got, code = compiled(unusual, *args)
    assert not is_direct(code)
    assert_equal(got, unusual(*args))


def test_a_direct_call_launches_with_the_addresses_and_numbers_of_its_operands() -> None:
    q, k, w, rotation = random(B, S, H, D), random(B, S, HK, D), random(D), freqs(1, S)
    results = random(B, S, H, D), random(B, S, HK, D)
    cases = {
        "qk_norm_rope": (q, k, w, None, rotation, None, EPS, EPS, None, None, *results),
        "norm_rope": (q, w, rotation, None, EPS, None, results[0]),
        "silu_mul": (q[0], q[1], results[0][0]),
    }
    alone = (q, None, w, None, rotation, None, EPS, 0.0, None, None, results[0], None)
    for name, given in cases.items():
        numbers = launch_numbers(OPS[name], given)
        arguments = alone if name == "norm_rope" else given
        assert tuple(OPS[name].arranged(given)) == arguments
        call = DirectCall(name)
        with gpu():
            call.checked(*given)
            assert launched(call, arguments, numbers) == (*addresses(*arguments), *numbers, STREAM)
