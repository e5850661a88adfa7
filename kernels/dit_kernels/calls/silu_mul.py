"""SwiGLU: silu(a) * b. a and b [..., S, D] of one shape, any strides: halves of one tensor, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_kernels import reference
from dit_kernels.calls.call import (
    KERNEL_DTYPES,
    Call,
    Family,
    Op,
    check_dtypes,
    check_tensor,
    check_word,
    launch_strides,
    reject,
    rows,
    step_dtypes,
)
from dit_kernels.chain import SiluChain
from dit_kernels.rounding import SILU_FORMS, silu_steps


@dataclass(slots=True)
class SiluMulCall(Call):
    """A call of silu_mul."""

    chain: SiluChain
    a: Tensor
    b: Tensor

    def like(self) -> Tensor:
        return self.a

    def empty_results(self) -> tuple[Tensor, ...]:
        return (self.a.new_empty(self.a.shape, dtype=self.chain.steps.out),)

    def definition(self) -> tuple[Tensor, ...]:
        return (reference.silu_mul(self.a, self.b, self.chain.steps).contiguous(),)

    def fits_kernel(self) -> bool:
        return {self.a.dtype, self.b.dtype} | step_dtypes(self.chain.steps) <= set(KERNEL_DTYPES)

    def operands(self, results: tuple[Tensor, ...], read_eps: bool = True) -> tuple[Any, ...]:
        return rows(self.a), rows(self.b), rows(results[0])


def launch_numbers(operands: Mapping[str, Any]) -> tuple[Any, ...]:
    """B, S, and the strides of a and b (B, S, D) by batch item and by token, in elements: 0 where there is one."""
    a, b = operands["a"], operands["b"]
    return (a.shape[0], a.shape[1], *launch_strides(a), *launch_strides(b))


FAMILY = Family(("a", "b", "out"), {"out": "a"}, launch_numbers)

_silu_steps = lru_cache(maxsize=None)(silu_steps)
_chain = lru_cache(maxsize=None)(SiluChain)


def _silu_mul_call(
    a: Tensor,
    b: Tensor,
    *,
    rounding: str = "model",
    silu_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> SiluMulCall:
    op = "silu_mul"
    check_word(op, "rounding", rounding, SILU_FORMS)
    check_dtypes(op, silu_dtype=silu_dtype, out_dtype=out_dtype)
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor):
            reject(op, name, t, "a tensor [..., S, D]")
        check_tensor(op, name, t, a, "a")
    if a.ndim < 2:
        reject(op, "a.shape", list(a.shape), "[..., S, D]")
    if a.shape != b.shape:
        reject(op, "b.shape", list(b.shape), f"{list(a.shape)}, the shape of a")
    return SiluMulCall(_chain(_silu_steps(rounding, a.dtype, b.dtype, silu_dtype, out_dtype)), a, b)


OPS = {
    "silu_mul": Op(
        FAMILY,
        "(Tensor a, Tensor b, *, str rounding='model', ScalarType? silu_dtype=None, ScalarType? out_dtype=None) "
        "-> Tensor",
        _silu_mul_call,
        FAMILY.arguments,
    )
}
