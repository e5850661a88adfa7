"""The ops with a shift, and those that add a residual without a norm, called by hand: their definition and errors."""

from __future__ import annotations

from typing import Any

import pytest
import quantized
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adaln_sites import MATRIX, before_a_quantiser, quantised
from test_adaln_sites import given as operands_of_a_site
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fusion_pass
from dit_kernels import reference
from dit_kernels.families import OPS
from dit_kernels.rounding import QuantSteps

ops = torch.ops.dit_kernels
ADD, DUAL, SCALED = "mul_add_norm_scale", "norm_tanh_mul_add_norm_scale", "norm_scale"
NAMES = (ADD, DUAL, SCALED)
B, S, D, EPS = 2, 3, 16, 1e-6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def arguments(
    op: str,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (B, 1, D),
    modulation: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """By position, the shift last."""
    torch.manual_seed(0)
    x, residual = (torch.randn(B, S, D).to(dtype) for _ in range(2))
    gate, scale, shift = (torch.randn(shape).to(modulation or dtype) for _ in range(3))
    second = (None, None, scale, EPS, shift)
    if op == SCALED:
        return (x, *second)
    return (x, gate, residual, *second) if op == ADD else (x, None, None, gate, residual, EPS, *second)


def eager(op: str, norm: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What a model computes with these operands."""

    def normed(x: Tensor) -> Tensor:
        if norm == "layer":
            return F.layer_norm(x, (D,), eps=EPS)
        return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)

    x, scale, shift = args[0], args[-3], args[-1]
    if op == SCALED:
        return (normed(x) * (1 + scale) + shift,)
    y = args[2] + args[1] * x if op == ADD else args[4] + args[3].tanh() * normed(x)
    return y, normed(y) * (1 + scale) + shift


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@settings(max_examples=40)
@given(
    op=st.sampled_from(NAMES),
    norm=st.sampled_from(("layer", "rms")),
    dtype=st.sampled_from(DTYPES),
    modulation=st.sampled_from(DTYPES),
    shape=st.sampled_from(((D,), (1, 1, D), (B, 1, D), (1, S, D), (B, S, D), (1,))),
)
def test_the_definition_is_eagers_in_every_dtype_and_broadcast(
    op: str, norm: str, dtype: torch.dtype, modulation: torch.dtype, shape: tuple[int, ...]
) -> None:
    args = arguments(op, dtype, shape, modulation)
    for got, expected in zip(tuple_of(getattr(ops, op)(*args, norm=norm)), eager(op, norm, args), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("op", NAMES)
def test_the_shift_may_be_left_out(op: str) -> None:
    *args, shift = arguments(op)
    without, none = (tuple_of(getattr(ops, op)(*given)) for given in (args, (*args, None)))
    shifted = tuple_of(getattr(ops, op)(*args, shift))
    assert all(map(torch.equal, without, none))
    torch.testing.assert_close(without[-1] + shift, shifted[-1])


def test_every_operand_of_the_add_but_the_rows_may_be_absent_and_the_gate_may_have_a_tanh() -> None:
    x, gate, residual, *second = arguments(ADD, torch.bfloat16)
    assert torch.equal(ops.mul_add_norm_scale(x, None, residual, *second)[0], residual + x)
    assert torch.equal(ops.mul_add_norm_scale(x, gate, residual, *second, tanh=True)[0], residual + gate.tanh() * x)


@pytest.mark.parametrize("op", NAMES)
def test_opcheck_passes_and_gradients_are_those_of_the_formula(op: str) -> None:
    overload = getattr(ops, op)
    torch.library.opcheck(overload.default, arguments(op, torch.bfloat16))
    args = [a.double().requires_grad_() if isinstance(a, Tensor) else a for a in arguments(op)]
    assert torch.autograd.gradcheck(lambda *a: overload(*a, norm="layer", rounding="fp32"), args, fast_mode=True)


@pytest.mark.parametrize("op", NAMES)
def test_q_and_s_are_those_of_z(op: str) -> None:
    args = arguments(op, torch.bfloat16)
    *stored, z = tuple_of(getattr(ops, op)(*args))
    q, s = reference.quantised(z, QuantSteps(torch.bfloat16, 448.0, None, None, False, True))
    packet = getattr(ops, f"{op}_quant")
    got = packet(*args)
    assert len(got) == len(stored) + 2
    for a, b in zip(got, (*stored, q, s), strict=True):
        assert torch.equal(a.float(), b.float())
    *given, shift = args
    scale = torch.tensor(0.5)
    kept = packet.static_keep_z(*given, scale, shift)
    assert torch.equal(kept[-2], z)
    assert torch.equal(kept[-1].float(), (z.float() / scale).clamp(-448, 448).to(quantized.FP8).float())


X = torch.randn(B, S, D)
BAD = {
    "gate.shape": lambda: ops.mul_add_norm_scale(X, X[:, :2], X, None, None, None, EPS),
    "residual.shape": lambda: ops.mul_add_norm_scale(X, None, X[:, :1], None, None, None, EPS),
    "shift.shape": lambda: ops.norm_scale(X, None, None, None, EPS, X[:, :2]),
    "shift.device": lambda: ops.norm_scale(X, None, None, None, EPS, X[:, :1].to("meta")),
    "shift.dtype": lambda: ops.norm_scale(X, None, None, None, EPS, X[:, :1].int()),
    "eps": lambda: ops.mul_add_norm_scale(X, None, X, None, None, None, -1.0),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_with_what_came_and_what_was_expected(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*expected"):
        BAD[name]()


def test_each_op_has_the_overloads_of_an_op_that_quantises() -> None:
    names = {name for name in OPS if name.startswith(f"{ADD}_quant")}
    assert names == {f"{ADD}_quant{overload}" for overload in ("", ".keep_z", ".static", ".static_keep_z")}


def test_inductors_code_calls_the_op_directly_and_gives_it_the_shift(compiled_anew: None) -> None:
    model, args = quantised(before_a_quantiser), operands_of_a_site()
    assert MATRIX.dtype == torch.bfloat16
    compiled = torch.compile(model, backend=fusion_pass.Backend(kernels="reference"))
    got, (code,) = run_and_get_code(compiled, *args)
    y, z = model(*args)
    assert torch.equal(got[0], y) and torch.equal(got[1], z)
    assert "DirectCall('mul_add_norm_scale_quant', " in code
