"""The interpreter as a `Device` of kernel_bounds: it has the bounds of a GPU, and messages that name the element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import kernel_bounds
import numpy as np
import torch
import torch.nn.functional as F
from kernel_bounds import Device, Operands, step
from torch import Tensor

from ptx import numbers
from ptx.device import call

FEW, SMALL_STEPS = 10_000, 8
# In few rows one may meet a tie with all its elements of one mantissa at once, and the last bit of a statistic decides.
TIED = {torch.bfloat16: 1 / 64, torch.float16: 1 / 512}


# --- eager code as a GPU computes it --------------------------------------------------------------------------------


def rsqrt(x: Tensor) -> Tensor:
    """With the kernels' own instruction, and rounded once to 16 bits."""
    if x.dtype == torch.float64:
        return torch.rsqrt(x)
    with np.errstate(all="ignore"):
        return torch.from_numpy(numbers.rsqrt(x.float().numpy())).to(x.dtype)


def complex_product(x: Tensor, y: Tensor) -> Tensor:
    """As CUDA's compiler contracts it."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    fma = numbers.fma_f32 if dtype == torch.complex64 else numbers.fma_f64
    pair = (torch.view_as_real(t.to(dtype)).numpy() for t in torch.broadcast_tensors(x, y))
    (a, b), (c, d) = ((t[..., 0], t[..., 1]) for t in pair)
    parts = np.stack((fma(a, c, -(b * d)), fma(b, c, a * d)), -1)
    return torch.view_as_complex(torch.from_numpy(parts))


def layer_norm(x: Tensor, _: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) * rstd. On the CPU torch computes x * rstd - mean * rstd, which may be NaN."""
    mean = x.double().mean(-1, keepdim=True)
    squares = (x.double() - mean).square().sum(-1, keepdim=True).float()
    n = (x.float() - mean.float()) * torch.rsqrt(squares / x.shape[-1] + eps)
    n = n if weight is None else n * weight.float()
    return (n if bias is None else n + bias.float()).to(x.dtype)


def product_with_reciprocal(x: Tensor, divisor: float) -> Tensor:
    return x * (np.float32(1.0) / np.float32(divisor)).item()


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """ATen's formula in fp32, as CUDA's compiler contracts it; tanh and erf are rounded once."""
    wide = x.float()
    if approximate == "tanh":
        cube = (wide * wide * wide).numpy()
        with np.errstate(all="ignore"):
            inner = torch.from_numpy(numbers.fma_f32(np.full_like(cube, 0.044715), cube, wide.numpy()))
        return (0.5 * wide * (1 + torch.tanh((inner * 0.7978845608028654).double()).float())).to(x.dtype)
    return (wide * 0.5 * (1 + torch.erf((wide * 0.7071067811865476).double()).float())).to(x.dtype)


class LikeCuda(torch.overrides.TorchFunctionMode):
    """Computes as a GPU does: rsqrt, GELU, products of complex numbers, division by a number, on demand layer norms."""

    def __init__(self, layer_norms: bool = False) -> None:
        super().__init__()
        self.layer_norms = layer_norms

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (torch.rsqrt, Tensor.rsqrt):
            function = rsqrt
        elif function in (torch.mul, Tensor.mul) and isinstance(args[0], Tensor) and args[0].is_complex():
            function = complex_product
        elif function in (Tensor.__truediv__, Tensor.div, torch.div) and not isinstance(args[1], Tensor):
            function = product_with_reciprocal
        elif function is F.gelu:
            function = gelu
        elif function is F.layer_norm and self.layer_norms:
            function = layer_norm
        return function(*args, **(kwargs or {}))


# --- the interpreter ------------------------------------------------------------------------------------------------


class Interpreter(Device):
    """Runs ops within `device.gpu`. The messages of its bounds name the element that is furthest off."""

    def run(self, op: str, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        return call(op, arguments, **options)

    def eager(self) -> AbstractContextManager[Any]:
        return LikeCuda()

    def tied(self, out: Tensor) -> float:
        return TIED[out.dtype] * out.shape[-1]

    def assert_follows(
        self,
        result: str,
        out: Tensor,
        expected: Tensor,
        magnitude: Tensor,
        steps: int,
        coarsest: torch.dtype,
        most: float,
    ) -> None:
        try:
            super().assert_follows(result, out, expected, magnitude, steps, coarsest, most)
        except AssertionError as error:
            raise _located(error, result, out, expected, step(magnitude, coarsest)) from error

    def assert_precise(self, result: str, out: Tensor, eager: Tensor, exact: Tensor, *others: Any) -> None:
        off, eagers = ((t.double() - exact).abs().max().item() for t in (out, eager))
        try:
            super().assert_precise(result, out, eager, exact, *others)
        except AssertionError as error:
            why = AssertionError(f"off by {off:.3g} from fp64 at most, and eager by {eagers:.3g}")
            raise _located(why, result, out, exact, 1.0) from error


class NormInterpreter(Interpreter):
    """Its bounds take NaN and Inf."""

    def assert_follows(self, result: str, out: Tensor, expected: Tensor, magnitude: Tensor, *others: Any) -> None:
        super().assert_follows(result, *_finite(result, out, expected, magnitude), *others)

    def assert_precise(self, result: str, out: Tensor, eager: Tensor, exact: Tensor, *others: Any) -> None:
        """Of few elements, eager's worst error is no measure: then some steps of the largest are allowed."""
        out, eager, exact = _finite(result, out, eager, exact)
        off = (out.double() - exact).abs().max().item()
        if out.numel() >= FEW or off > SMALL_STEPS * 2.0**-24 * exact.abs().max().item():
            super().assert_precise(result, out, eager, exact, *others)


class RowInterpreter(NormInterpreter):
    """Judges single rows, which may have extreme numbers."""

    def eager(self) -> AbstractContextManager[Any]:
        return LikeCuda(layer_norms=True)

    def tied(self, out: Tensor) -> float:
        return math.inf  # a row of equal numbers may meet nothing but ties


def _located(error: AssertionError, result: str, out: Tensor, expected: Tensor, unit: Tensor | float) -> AssertionError:
    """The error with the element that is furthest off, in units of `unit`."""
    distance = (out.double() - expected.double()).abs() / unit
    distance[(out == expected) | (out.isnan() & expected.isnan())] = -1
    distance[distance.isnan()] = torch.inf
    index = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    is_and_was = f"{out[index].item()}, by the definition {expected[index].item()}"
    return AssertionError(f"{result}{list(index)} is {is_and_was}: {error}")


def _finite(result: str, out: Tensor, expected: Tensor, *others: Tensor) -> list[Tensor]:
    """All of them where they are finite, zeros elsewhere; there, `out` must be what is expected."""
    finite = expected.isfinite()
    if finite.all() and out.isfinite().all() and all(t.isfinite().all() for t in others):
        return [out, expected, *others]
    if not torch.equal(out[~finite].nan_to_num(0.25), expected[~finite].nan_to_num(0.25)) or out[finite].isinf().any():
        raise _located(AssertionError("not the same NaN and Inf"), result, out, expected, 1.0)
    for other in others:
        finite = finite & other.isfinite()
    return [t.masked_fill(~finite, 0) for t in (out, expected, *others)]


INTERPRETER, ROWS = NormInterpreter(), RowInterpreter()
check = partial(kernel_bounds.check, INTERPRETER)


def check_rows(
    op: str, o: Operands, rows: Iterable[int], eps: float, eps2: float, **options: Any
) -> tuple[Tensor, ...]:
    """Runs an op on one batch item and judges these rows, each by itself: one with large numbers would hide others."""
    accepted = kernel_bounds.accepted(op, options)
    results = INTERPRETER.run(op, *o.arguments(op, eps, eps2), **accepted)
    for row in rows:
        part = replace(o, x=o.x[:, row : row + 1], residual=o.residual[:, row : row + 1])
        with _of_row(row):
            kernel_bounds.judge(ROWS, op, part, tuple(r[:, row : row + 1] for r in results), eps, eps2, **options)
    return results


@contextmanager
def _of_row(row: int) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"row {row}: {error}") from error
