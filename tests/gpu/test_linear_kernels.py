"""Linear layers with their activation, on the GPU: the bits of eager code, where the order of a sum does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_kernels import ops, tuning
from dit_kernels.families import OPS
from dit_kernels.families.linear import TILINGS, TRIED, has_quack

BF16, FP16 = torch.bfloat16, torch.float16
pytestmark = pytest.mark.skipif(not has_quack(), reason="quack-kernels is not installed")


def integers(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """Eighths of integers: products and sums are exact in fp32, so every order of a sum gives one number."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(-8, 9, shape, device="cuda", generator=generator).to(dtype) / 8


def test_many_sums_of_these_numbers_need_the_rounding_in_front_of_the_activation() -> None:
    sums = F.linear(integers(1, 77, 256).float(), integers(1360, 256, seed=1).float())
    assert (sums != sums.bfloat16()).float().mean() > 0.2
    wide = call("linear_gelu", integers(1, 77, 256), integers(1360, 256, seed=1), rounding="fp32")
    assert (wide != call("linear_gelu", integers(1, 77, 256), integers(1360, 256, seed=1))).any()


def call(op: str, *args: Any, **options: Any) -> Tensor:
    assert ops.has_kernel(OPS[op].call(*args, **options))
    result: Tensor = getattr(torch.ops.dit_kernels, op)(*args, **options)
    return result


def tilings() -> list[str]:
    return [str(t) for t in TILINGS[torch.cuda.get_device_capability()[0]]] if torch.cuda.is_available() else []


@pytest.mark.parametrize("configuration", ["", *tilings()])
@pytest.mark.parametrize("tokens", (2, 77, 128, 1056))
@pytest.mark.parametrize("dtype", (BF16, FP16))
def test_silu_mul_follows_eager_code(dtype: torch.dtype, tokens: int, configuration: str) -> None:
    x = integers(1, tokens, 256, dtype=dtype)
    gate, up = integers(1360, 256, dtype=dtype, seed=1), integers(1360, 256, dtype=dtype, seed=2)
    for w, v in ((gate, up), (up, gate)):  # either weight may lie first in memory
        expected = F.silu(F.linear(x, w)) * F.linear(x, v)
        assert (call("linear_silu_mul", x, w, v, configuration=configuration) == expected).float().mean() > 0.9995


@pytest.mark.parametrize("configuration", ["", *tilings()])
@pytest.mark.parametrize("tokens", (2, 77, 128, 1056))
@pytest.mark.parametrize("approximate", ("none", "tanh"))
@pytest.mark.parametrize("biased", (False, True))
def test_gelu_has_the_bits_of_eager_code(biased: bool, approximate: str, tokens: int, configuration: str) -> None:
    x, w = integers(1, tokens, 256), integers(1360, 256, seed=1)
    bias = integers(1360, seed=2) if biased else None
    sums = F.linear(x, w, bias)
    result = call("linear_gelu", x, w, bias, approximate=approximate, configuration=configuration)
    assert torch.equal(*(t[usual(sums, approximate)] for t in (result, F.gelu(sums, approximate=approximate))))


def usual(sums: Tensor, approximate: str) -> Tensor:
    """Where GELU has the bits of eager code: with erf, 7 numbers of bf16 between -3 and -5.5 have not."""
    return (sums > -3) | (sums < -5.5) if approximate == "none" else torch.ones_like(sums, dtype=torch.bool)


@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_the_gelu_of_every_bf16_number_is_that_of_eager_code(approximate: str) -> None:
    """The first column of x has all numbers, and each row of w takes this column."""
    numbers = torch.arange(2**16, dtype=torch.int32, device="cuda").to(torch.int16).view(BF16)
    numbers = numbers[numbers.isfinite()]
    x, w = torch.zeros(len(numbers), 8, device="cuda", dtype=BF16), torch.zeros(16, 8, device="cuda", dtype=BF16)
    x[:, 0], w[:, 0] = numbers, 1
    expected = F.gelu(numbers, approximate=approximate)[:, None].expand(-1, 16)
    same = call("linear_gelu", x, w, approximate=approximate) == expected
    assert same[usual(numbers, approximate)].all()
    assert (~same[:, 0]).sum() <= 7


def test_silu_of_every_bf16_number_is_that_of_silu_mul() -> None:
    numbers = torch.arange(2**16, dtype=torch.int32, device="cuda").to(torch.int16).view(BF16)
    numbers = numbers[numbers.isfinite()]
    x, gate, up = (torch.zeros(n, 8, device="cuda", dtype=BF16) for n in (len(numbers), 16, 16))
    x[:, 0], x[:, 1], gate[:, 0], up[:, 1] = numbers, 1.5, 1, 1
    expected = torch.ops.dit_kernels.silu_mul(numbers[:, None], torch.full_like(numbers, 1.5)[:, None])
    assert torch.equal(call("linear_silu_mul", x, gate, up), expected.expand(-1, 16))


def test_the_halves_of_one_weight_are_read_where_they_are() -> None:
    x, w = integers(2, 100, 256), integers(2 * 512, 256, seed=1)
    up, gate = w.chunk(2)
    expected = F.silu(F.linear(x, gate)) * F.linear(x, up)
    assert torch.equal(call("linear_silu_mul", x, gate, up), expected)


def test_rows_with_a_stride_are_read_where_they_are() -> None:
    x, w = integers(3, 100, 512)[..., :256], integers(512, 256, seed=1)
    assert torch.equal(call("linear_gelu", x, w, approximate="tanh"), F.gelu(F.linear(x, w), approximate="tanh"))


def test_a_result_is_written_into_its_part_of_a_larger_tensor() -> None:
    x, w = integers(2, 100, 256), integers(512, 256, seed=1)
    joined = torch.zeros(2, 100, 768, device="cuda", dtype=BF16)
    ops.run_into(OPS["linear_gelu"].call(x, w, approximate="tanh"), (joined[..., 256:],))
    assert torch.equal(joined[..., 256:], F.gelu(F.linear(x, w), approximate="tanh"))
    assert not joined[..., :256].any()


@pytest.mark.parametrize("shifted", ("x", "w", "bias", "out"))
def test_operands_that_are_not_aligned_give_the_definitions_result(shifted: str) -> None:
    def placed(name: str, t: Tensor) -> Tensor:
        if name != shifted:
            return t
        memory = torch.empty(t.numel() + 4, device="cuda", dtype=BF16)
        return memory[4:].view(t.shape).copy_(t)

    x, w, bias = integers(2, 100, 256), integers(512, 256, seed=1), integers(512, seed=2)
    out = placed("out", torch.zeros(2, 100, 512, device="cuda", dtype=BF16))
    given = OPS["linear_gelu"].call(placed("x", x), placed("w", w), placed("bias", bias), approximate="tanh")
    ops.run_into(given, (out,))
    assert torch.equal(out, F.gelu(F.linear(x, w, bias), approximate="tanh"))


def test_a_choice_is_measured_and_its_kernel_is_faster_or_the_library_runs() -> None:
    x, w = torch.randn(1, 4096, 3072, device="cuda").to(BF16), torch.randn(12288, 3072, device="cuda").to(BF16)
    given = OPS["linear_gelu"].call(x, w, approximate="tanh")
    us, failed = tuning.measure(given.op.family.problem(given, False), x.device, ops.run)
    assert failed == {}
    assert len(us) == 1 + TRIED
    assert all(100 < time < 10_000 for time in us.values())


def test_results_do_not_change_from_run_to_run() -> None:
    x, w = torch.randn(300, 1024, device="cuda").to(BF16), torch.randn(2048, 1024, device="cuda").to(BF16)
    first = call("linear_gelu", x, w)
    assert all(torch.equal(call("linear_gelu", x, w), first) for _ in range(5))
