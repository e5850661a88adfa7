"""Hypothesis over what a call may bring: dtypes of its own for each operand, strides, eps, operands that are absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kernel_bounds as bounds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import random
from torch import Tensor

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from dit_kernels.rounding import FORMS, NORMS
from ptx.device import ARCHS, gpu
from ptx.judging import check, check_rows

Pick = Callable[..., Any]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (1, 7, 64, 333, 2304, 2520, 3840)
EPSILONS = (0.0, 1e-12, 1e-6, 1e-5, 1e-3, 1e-1)
NAMES = ("x", "weight", "bias", "gate", "residual", "weight2", "bias2", "scale")


def picks(data: st.DataObject) -> Pick:
    return lambda *choices: data.draw(st.sampled_from(choices))


def strided(pick: Pick, t: Tensor) -> Tensor:
    """`t` with gaps between rows and between batch items, or with the tokens outermost, and aligned to anything."""
    if t.ndim == 1:
        return strided(pick, t.view(1, 1, -1))[0, 0]
    batch, tokens, d = t.shape
    start, by_row = pick(0, 1, 2, 4, 8), d + pick(0, 1, 2, 4, 8, 24)
    strides = (by_row, by_row * batch, 1) if pick(False, True) else (by_row * tokens + pick(0, 1, 8), by_row, 1)
    end = start + 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    return torch.full((end,), torch.nan, dtype=t.dtype).as_strided(t.shape, strides, start).copy_(t)


def modulation(pick: Pick, batch: int, tokens: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    shapes = ((d,), (1, 1, d), (batch, 1, d), (batch, tokens, d), (1, tokens, d), (1, 1, 1))
    return random(*pick(*shapes), dtype=dtype, seed=seed)


def operands(pick: Pick, norm: str) -> Any:
    """Each operand of its own dtype and strides, and the parameters there or not."""
    widths = WIDTHS[norm == "layer" :]  # of one element a layer norm is 0, or the noise of torch's code for CPUs
    sizes = pick(1, 2), pick(1, 2, 5), pick(*widths)
    mixed = pick(False, True)
    dtype = pick(*DTYPES)
    dtypes = {name: pick(*DTYPES) if mixed else dtype for name in NAMES}
    o = bounds.operands(*sizes, bias=True)
    for name in NAMES:
        setattr(o, name, getattr(o, name).to(dtypes[name]))
    o.gate = modulation(pick, *sizes, dtypes["gate"], seed=1)
    o.scale = modulation(pick, *sizes, dtypes["scale"], seed=2)
    if norm == "rms":  # the bounds of y do not expect a bias that cancels
        o.bias, o.bias2 = o.bias / 16, o.bias2 / 16
    for group in (("weight", "weight2"), ("bias", "bias2"), ("gate",), ("scale",)):
        if pick(False, False, True):  # absent
            for name in group:
                setattr(o, name, None)
    if pick(False, True):
        for name in NAMES:
            if getattr(o, name) is not None:
                setattr(o, name, strided(pick, getattr(o, name)))
    return o


def call_options(pick: Pick, norm: str) -> dict[str, Any]:
    dtypes = {name: pick(None, None, *DTYPES) for name in ("y_dtype", "z_dtype", "norm_dtype", "norm_dtype2")}
    flags = {"tanh": pick(True, False), "add_one": pick(True, False)}
    return {"norm": norm, "rounding": pick(*FORMS), **flags, **dtypes}


@settings(max_examples=24, derandomize=True, report_multiple_bugs=False)
@given(data=st.data())
def test_whatever_a_call_brings_follows_the_definition(data: st.DataObject) -> None:
    pick = picks(data)
    norm = pick(*NORMS)
    o, options = operands(pick, norm), call_options(pick, norm)
    with gpu(pick(*ARCHS), pick(1, 2)):
        check(pick(*bounds.OPS), o, eps=pick(*EPSILONS), eps2=pick(*EPSILONS), **options)


def extremes(dtype: torch.dtype) -> tuple[float, ...]:
    limits = torch.finfo(dtype)
    subnormal = limits.tiny * limits.eps
    return torch.nan, torch.inf, -torch.inf, 0.0, subnormal, -limits.tiny * 0.75, limits.tiny, limits.max, -limits.max


def spoil(pick: Pick, row: Tensor, whole: bool = True) -> None:
    """Puts an extreme value into an element, a part or the whole of a row."""
    step = pick(len(row), 3, 1) if whole else pick(len(row), 3)
    start = pick(0, len(row) // 2, len(row) - 1) if step > 1 else 0
    row[start::step] = pick(*extremes(row.dtype))


def uniform(pick: Pick, norm: str, tokens: int) -> Any:
    o = bounds.operands(1, tokens, pick(333, 2304, 2520), pick(*DTYPES), bias=norm == "layer")
    return replace(o, gate=pick(None, o.gate), weight=pick(None, o.weight) if norm == "rms" else o.weight)


@settings(max_examples=12, derandomize=True, report_multiple_bugs=False)
@given(data=st.data())
def test_rows_of_extreme_values_are_those_of_eager_and_leave_the_others_alone(data: st.DataObject) -> None:
    pick = picks(data)
    norm, op = pick(*NORMS), pick(*bounds.OPS)
    o, rows = uniform(pick, norm, 7), range(1, 6)
    options = {"norm": norm, "rounding": pick(*FORMS), "eps": pick(*EPSILONS), "eps2": pick(*EPSILONS)}
    spoiled = replace(o, x=o.x.clone(), residual=o.residual.clone())
    for row in rows:
        for t in pick((spoiled.x,), (spoiled.residual,), (spoiled.x, spoiled.residual)):
            # Of equal numbers a layer norm is 0, or the noise of their mean.
            spoil(pick, t[0, row], whole=norm == "rms" or t is spoiled.residual)
    with gpu(pick(*ARCHS), 1):
        before, after = check(op, o, **options), check_rows(op, spoiled, rows, **options)
    for result, expected in zip(after, before, strict=True):
        assert torch.equal(result[:, ::6], expected[:, ::6])


@settings(max_examples=12, derandomize=True, report_multiple_bugs=False)
@given(data=st.data())
def test_parameters_of_extreme_values_are_those_of_eager_and_leave_other_columns_alone(
    data: st.DataObject,
) -> None:
    pick = picks(data)
    norm, op = pick(*NORMS), pick(*bounds.OPS)
    o = uniform(pick, norm, 2)
    options = {"norm": norm, "rounding": pick(*FORMS), "eps": pick(*EPSILONS), "eps2": pick(*EPSILONS)}
    options |= {"tanh": pick(True, False), "add_one": pick(True, False)}
    present = [name for name in NAMES if name not in ("x", "residual") and getattr(o, name) is not None]
    spoiled = replace(o, **{name: getattr(o, name).clone() for name in present})
    columns = torch.ones(o.x.shape[2], dtype=torch.bool)
    for name in sorted({pick(*present) for _ in range(3)}):
        row = getattr(spoiled, name).view(-1)
        spoil(pick, row)
        columns &= row == getattr(o, name).view(-1)
    with gpu(pick(*ARCHS), 1):
        before, after = check(op, o, **options), check_rows(op, spoiled, (0, 1), **options)
    assert torch.equal(after[0][..., columns], before[0][..., columns])
