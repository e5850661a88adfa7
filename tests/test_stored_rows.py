"""Rows in memory that a quantiser reads: the op quant, and where it is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import quantized
import torch
import torch.nn.functional as F
from graph_backend import needs_casts, run
from graph_checks import assert_equal
from quantized import Quantise
from torch import Tensor

from dit_kernels import ops
from dit_kernels.families import OPS
from fusion_pass.kinds import quant

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
S, D = quant.FEWEST_ROWS, 16
Model = Callable[..., Tensor]


def rows(*sizes: int) -> Tensor:
    return torch.randn(*sizes).to(BF16)


def read(q: Tensor, s: Tensor) -> Tensor:
    weight = torch.eye(D).to(FP8).T.contiguous().T
    return torch._scaled_mm(
        q.reshape(-1, D), weight, s.reshape(-1, 1), torch.ones(1, D), out_dtype=BF16, use_fast_accum=True
    )


def after_attention(quantise: Quantise) -> Model:
    def model(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return read(*quantise(F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)))

    return model


def after_a_matmul(quantise: Quantise) -> Model:
    return lambda x: read(*quantise(x @ torch.eye(D, dtype=BF16)))


def of_an_input(quantise: Quantise) -> Model:
    return lambda x: read(*quantise(x))


@needs_casts
@pytest.mark.parametrize(
    ("make", "quantise"),
    [
        *((make, quantized.torchao) for make in (after_attention, after_a_matmul)),
        *((of_an_input, q) for q in quantized.ROW_WISE),
    ],
)
def test_rows_in_memory_are_quantised_by_one_op_and_bit_equal_to_eager(
    make: Callable[[Quantise], Model], quantise: Quantise
) -> None:
    model, x = make(quantise), rows(1, S, D)
    got, backend = run(model, x, strict=True)
    assert_equal(got, model(x))
    assert [site.kind for site in backend.report.fused] == ["quant"]
    assert not backend.report.missed


@needs_casts
@pytest.mark.parametrize("tokens", (S // 2 - 1, S // 2))
def test_a_symbolic_number_of_rows_counts_as_in_the_call_that_is_compiled(tokens: int) -> None:
    x = rows(2, tokens, D)
    got, backend = run(after_a_matmul(quantized.torchao), x, dynamic=True)
    assert_equal(got, after_a_matmul(quantized.torchao)(x))
    assert backend.report.counts() == ({"quant": 1} if tokens == S // 2 else {})


def pointwise_before(x: Tensor) -> Tensor:
    return read(*quantized.torchao((x @ torch.eye(D, dtype=BF16)).sin()))


def a_copy_before(x: Tensor) -> Tensor:
    """Heads before tokens in memory: Inductor's kernel reads them in the new order."""
    return read(*quantized.torchao(x.unflatten(-1, (2, -1)).transpose(1, 2).contiguous().transpose(1, 2).flatten(2)))


def one_scale_for_all(x: Tensor) -> Tensor:
    s = (x.abs().amax() / 448.0).float()
    return read((x.float() / s).clamp(-448.0, 448.0).to(FP8), s.expand(x.shape[0], x.shape[1], 1).contiguous())


@pytest.mark.parametrize("model", (pointwise_before, a_copy_before, one_scale_for_all))
def test_rows_that_are_not_in_memory_and_other_quantisers_are_left_to_inductor(model: Model) -> None:
    x = rows(1, S, D)
    got, backend = run(model, x, strict=True)
    assert_equal(got, model(x))
    assert not backend.report.fused
    assert not backend.report.missed


def test_a_few_rows_are_left_to_inductor() -> None:
    model, x = of_an_input(quantized.torchao), rows(1, S - 1, D)
    got, backend = run(model, x, strict=True)
    assert_equal(got, model(x))
    assert not backend.report.fused


def test_the_op_is_opchecked_and_its_result_is_that_of_the_definition() -> None:
    x = rows(2, 5, 32)
    torch.library.opcheck(torch.ops.dit_kernels.quant.default, (x,))
    q, s = torch.ops.dit_kernels.quant(x)
    expected, scale = quantized.torchao(x)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(s, scale)
    with pytest.raises(RuntimeError, match="quant: a gradient is needed"):
        torch.ops.dit_kernels.quant(x.requires_grad_())
    assert ops.checked_call(torch.ops.dit_kernels.quant.default, x.detach()).op is OPS["quant"]
