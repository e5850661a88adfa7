"""The operands and the bounds of tests/gpu/test_kernels.py, on the CPU: there is one definition of what is right."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ptx import numbers
from ptx.device import call

_SPEC = importlib.util.spec_from_file_location("gpu_kernel_bounds", Path(__file__).parents[1] / "gpu/test_kernels.py")
assert _SPEC is not None and _SPEC.loader is not None
bounds: Any = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = bounds  # dataclasses look their module up
_SPEC.loader.exec_module(bounds)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def run(op: str, o: Any, **options: Any) -> tuple[Tensor, ...]:
    return call(op, o.arguments(op, bounds.EPS, bounds.EPS2), **options)


bounds.random, bounds.run = random, run

_rsqrt = torch.rsqrt


def rsqrt(x: Tensor) -> Tensor:
    """As eager computes it on a GPU, with the kernels' own instruction, and rounded once to 16 bits."""
    if x.dtype == torch.float64:
        return _rsqrt(x)
    with np.errstate(all="ignore"):
        return torch.from_numpy(numbers.rsqrt(x.float().numpy())).to(x.dtype)


def layer_norm(x: Tensor, _: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As a GPU computes it, (x - mean) * rstd. On the CPU torch computes x * rstd - mean * rstd, which may be NaN."""
    mean = x.double().mean(-1, keepdim=True)
    squares = (x.double() - mean).square().sum(-1, keepdim=True).float()
    n = (x.float() - mean.float()) * _rsqrt(squares / x.shape[-1] + eps)
    n = n if weight is None else n * weight.float()
    return (n if bias is None else n + bias.float()).to(x.dtype)


# --- bounds whose messages lead to the element ----------------------------------------------------------------------

FEW, SMALL_STEPS = 10_000, 8
# In few rows one may meet a tie with all its elements of one mantissa at once, and the last bit of a statistic decides.
TIED = {torch.bfloat16: 1 / 64, torch.float16: 1 / 512}

_follows, _precise = bounds.assert_follows, bounds.assert_precise


def _located(error: AssertionError, out: Tensor, expected: Tensor, unit: Tensor | float) -> AssertionError:
    """The error with the element that is furthest off, in units of `unit`: an index, for the name of a result."""
    distance = (out.double() - expected.double()).abs() / unit
    distance[(out == expected) | (out.isnan() & expected.isnan())] = -1
    distance[distance.isnan()] = torch.inf
    index = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    return AssertionError(f"{list(index)} is {out[index].item()}, by the definition {expected[index].item()}: {error}")


def _finite(out: Tensor, expected: Tensor, *others: Tensor) -> list[Tensor]:
    """All of them where they are finite, zeros elsewhere; there, `out` must be what is expected."""
    finite = expected.isfinite()
    if finite.all() and out.isfinite().all() and all(t.isfinite().all() for t in others):
        return [out, expected, *others]
    if not torch.equal(out[~finite].nan_to_num(0.25), expected[~finite].nan_to_num(0.25)) or out[finite].isinf().any():
        raise _located(AssertionError("not the same NaN and Inf"), out, expected, 1.0)
    for other in others:
        finite = finite & other.isfinite()
    return [t.masked_fill(~finite, 0) for t in (out, expected, *others)]


def assert_follows(out: Tensor, expected: Tensor, magnitude: Tensor, steps: int, coarsest: torch.dtype, *of: Any):
    finite = _finite(out, expected, magnitude)
    share = bounds.DIFFERING.get(out.dtype, 0.0) + TIED.get(out.dtype, 0.0) * out.shape[-1] / out.numel()
    try:
        with mock.patch.dict(bounds.DIFFERING, {out.dtype: share}):
            _follows(*finite, steps, coarsest, *of)
    except AssertionError as error:
        out, expected, magnitude = finite
        raise _located(error, out, expected, bounds.step(magnitude, coarsest)) from error


def assert_precise(out: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Of few elements, eager's worst error is no measure: then some steps of the largest are allowed."""
    out, eager, exact = _finite(out, eager, exact)
    off, eagers = ((t.double() - exact).abs().max().item() for t in (out, eager))
    try:
        if out.numel() >= FEW or off > SMALL_STEPS * 2.0**-24 * exact.abs().max().item():
            _precise(out, eager, exact)
    except AssertionError as error:
        why = AssertionError(f"off by {off:.3g} from fp64 at most, and eager by {eagers:.3g}")
        raise _located(why, out, exact, 1.0) from error


def _named(result: str, judge: Callable[..., None]) -> Callable[..., None]:
    def judged(*arguments: Any, **options: Any) -> None:
        try:
            judge(*arguments, **options)
        except AssertionError as error:
            raise AssertionError(f"{result}{error}") from error

    return judged


bounds.assert_follows, bounds.assert_precise = assert_follows, assert_precise
bounds.judge_y, bounds.judge_z = _named("y", bounds.judge_y), _named("z", bounds.judge_z)


@contextmanager
def _definition(eps: float, eps2: float) -> Iterator[None]:
    with mock.patch.object(torch, "rsqrt", rsqrt), mock.patch.multiple(bounds, EPS=eps, EPS2=eps2):
        yield


def check(op: str, o: Any, eps: float = bounds.EPS, eps2: float = bounds.EPS2, **options: Any) -> tuple[Tensor, ...]:
    """`check` of tests/gpu, within `device.gpu`."""
    with _definition(eps, eps2):
        results: tuple[Tensor, ...] = bounds.check(op, o, **options)
        return results


def check_rows(op: str, o: Any, rows: Iterable[int], eps: float, eps2: float, **options: Any) -> tuple[Tensor, ...]:
    """Runs an op on one batch item and judges these rows, each by itself: one with large numbers would hide others."""
    with _definition(eps, eps2):
        results = run(op, o, **bounds.accepted(op, options))
        for row in rows:
            of_row = tuple(result[:, row : row + 1] for result in results)
            share = dict.fromkeys(bounds.DIFFERING, 1.0)  # a row of equal numbers may meet nothing but ties
            like_gpus = mock.patch.object(F, "layer_norm", layer_norm)
            with like_gpus, mock.patch.multiple(bounds, run=lambda *_, of_row=of_row, **__: of_row, DIFFERING=share):
                part = replace(o, x=o.x[:, row : row + 1], residual=o.residual[:, row : row + 1])
                _named(f"row {row}: ", bounds.check)(op, part, **options)
    return results
