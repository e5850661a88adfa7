"""The operands and the bounds of tests/gpu/test_kernels.py, on the CPU: there is one definition of what is right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

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
    return call(op, o.arguments(op), **options)


bounds.random, bounds.run = random, run

_rsqrt = torch.rsqrt


def rsqrt(x: Tensor) -> Tensor:
    """As a GPU computes it: rounded once. On the CPU, torch rounds the square root of a 16-bit number, too."""
    return _rsqrt(x.float()).to(x.dtype) if x.dtype.itemsize == 2 else _rsqrt(x)


def check(op: str, o: Any, **options: Any) -> tuple[Tensor, ...]:
    """`check` of tests/gpu, within `device.gpu`."""
    with mock.patch.object(torch, "rsqrt", rsqrt):
        results: tuple[Tensor, ...] = bounds.check(op, o, **options)
        return results
