"""The gated norms: y = residual + tanh(gate) * norm(x), z = norm(y) * (1 + scale), and both at once.

x and residual [..., S, D]; weight and bias [D] or None; gate and scale None or anything that broadcasts to x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_kernels import reference, tickets
from dit_kernels.calls.call import (
    KERNEL_DTYPES,
    Call,
    Family,
    Op,
    check_dtypes,
    check_eps,
    check_row,
    check_tensor,
    check_word,
    dense,
    dtype_of,
    launch_strides,
    number,
    reject,
    row,
    rows,
)
from dit_kernels.chain import Chain
from dit_kernels.rounding import FORMS, NORMS, ROOTS, gated_steps, scaled_steps


@dataclass(slots=True)
class NormGateCall(Call):
    """A call of any op of the family; what an op does not have is None."""

    chain: Chain
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    residual: Tensor | None
    eps: float | Tensor
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    scale: Tensor | None = None
    eps2: float | Tensor = 0.0

    def like(self) -> Tensor:
        return self.x

    def empty_results(self) -> tuple[Tensor, ...]:
        gated, scaled = self.chain.gated, self.chain.scaled
        dtypes = ([gated.y] if gated is not None else []) + ([scaled.z] if scaled is not None else [])
        return tuple(self.x.new_empty(self.x.shape, dtype=dtype) for dtype in dtypes)

    def definition(self) -> tuple[Tensor, ...]:
        results = []
        read, weight, bias, eps = self.x, self.weight, self.bias, self.eps
        if self.chain.gated is not None:
            assert self.residual is not None
            # Contiguous, as it is returned: the sums of the second norm depend on it, in the last bit.
            read = reference.gated(read, weight, bias, self.gate, self.residual, eps, self.chain).contiguous()
            results.append(read)
            weight, bias, eps = self.weight2, self.bias2, self.eps2
        if self.chain.scaled is not None:
            results.append(reference.scaled(read, weight, bias, self.scale, eps, self.chain))
        return tuple(r.contiguous() for r in results)

    def fits_kernel(self) -> bool:
        # A 0-d operand does not promote: of another dtype than x, it makes a chain of its own, seen in no model.
        scalars = [t for t in (self.gate, self.scale) if t is not None and t.ndim == 0]
        same = all(t.dtype == self.x.dtype for t in scalars)
        others = (self.weight, self.bias, self.gate, self.residual, self.weight2, self.bias2, self.scale)
        return same and all(t.dtype in KERNEL_DTYPES for t in (self.x, *others) if t is not None)

    def operands(self, results: tuple[Tensor, ...], read_eps: bool = True) -> tuple[Any, ...]:
        y = results[0] if self.chain.gated is not None else None
        z = results[-1] if self.chain.scaled is not None else None
        return (
            rows(self.x),
            row(self.weight),
            row(self.bias),
            _broadcast(self.gate, self.x),
            None if self.residual is None else rows(self.residual),
            number(self.eps) if read_eps else 0.0,
            row(self.weight2),
            row(self.bias2),
            _broadcast(self.scale, self.x),
            number(self.eps2) if read_eps else 0.0,
            None if y is None else rows(y),
            None if z is None else rows(z),
        )


def _broadcast(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A gate or scale as [1 or B, 1 or S, D], or [1, 1, 1]."""
    if t is None:
        return None
    if t.numel() == 1:
        return t.reshape(1, 1, 1)
    if t.shape[-1] != x.shape[-1]:
        t = t.expand(*t.shape[:-1], x.shape[-1])
    if x.ndim > 3 and any(size != 1 for size in t.shape[:-2]):
        t = t.expand(*x.shape[:-2], *t.shape[-2:]).reshape(-1, *t.shape[-2:])
    elif t.ndim > 3:
        t = t.reshape(1, *t.shape[-2:])
    while t.ndim < 3:
        t = t.unsqueeze(0)
    return dense(t)


@cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _of_launch(device: int, stream: int, batches: int) -> tuple[int, ...]:
    return processors(device), tickets.address(device, stream, batches)


def _launch_numbers(operands: Mapping[str, Any]) -> tuple[Any, ...]:
    """B, S, and the strides of these by batch item and by token, in elements: 0 where an operand has one or is absent.

    Of tensors (B, S, D) as dit_kernels.compile.bound takes them, and of whatever else has a shape and stride().
    """
    x = operands["x"]
    strides = [by for name in ("x", "residual", "gate", "scale") for by in launch_strides(operands.get(name))]
    return (x.shape[0], x.shape[1], *strides)


FAMILY = Family(
    ("x", "weight", "bias", "gate", "residual", "eps", "weight2", "bias2", "scale", "eps2", "y", "z"),
    {"y": "x", "z": "x"},
    _launch_numbers,
    _of_launch,
)


# --- checking -------------------------------------------------------------------------------------------------------


def _check_broadcast(op: str, name: str, t: Tensor | None, x: Tensor) -> None:
    """gate and scale: anything that broadcasts to x."""
    if t is None:
        return
    check_tensor(op, name, t, x)
    pairs = zip(reversed(t.shape), reversed(x.shape), strict=False)
    fits = t.ndim <= x.ndim and all(a == b or a == 1 for a, b in pairs)
    if not fits:
        reject(op, f"{name}.shape", list(t.shape), f"one that broadcasts to the shape of x, {list(x.shape)}")


def _check_words(op: str, norm: str, rounding: str, root: str, **dtypes: torch.dtype | None) -> None:
    check_word(op, "norm", norm, NORMS)
    check_word(op, "rounding", rounding, FORMS)
    check_word(op, "root", root, ROOTS)
    check_dtypes(op, **dtypes)


def _check_x(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        reject(op, "x", x, "a tensor [..., S, D]")
    if x.ndim < 2:
        reject(op, "x.shape", list(x.shape), "[..., S, D]")
    check_tensor(op, "x", x, x)


def _check_residual(op: str, residual: Tensor, x: Tensor) -> None:
    if not isinstance(residual, Tensor):
        reject(op, "residual", residual, "a tensor of the shape of x")
    check_tensor(op, "residual", residual, x)
    if residual.shape != x.shape:
        reject(op, "residual.shape", list(residual.shape), f"{list(x.shape)}, the shape of x")


# --- arguments to a call --------------------------------------------------------------------------------------------


def _promoting(t: Tensor | None) -> torch.dtype | None:
    """The dtype with which an operand takes part in promotion: none for a 0-d one."""
    return None if t is None or t.ndim == 0 else t.dtype


_gated_steps = lru_cache(maxsize=None)(gated_steps)
_scaled_steps = lru_cache(maxsize=None)(scaled_steps)
_chain = lru_cache(maxsize=None)(Chain)


def _gated_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor,
    eps: float | Tensor,
    *,
    norm: str = "rms",
    tanh: bool = True,
    rounding: str = "cast_then_weight",
    y_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
    op: str = "norm_tanh_mul_add",
) -> NormGateCall:
    _check_words(op, norm, rounding, root, y_dtype=y_dtype, norm_dtype=norm_dtype)
    _check_x(op, x)
    check_row(op, "weight", weight, x)
    check_row(op, "bias", bias, x)
    _check_broadcast(op, "gate", gate, x)
    _check_residual(op, residual, x)
    check_eps(op, "eps", eps)
    steps = _gated_steps(
        rounding,
        norm,
        x.dtype,
        dtype_of(weight),
        dtype_of(bias),
        _promoting(gate),
        residual.dtype,
        y_dtype,
        norm_dtype,
        root,
    )
    return NormGateCall(_chain(norm, tanh, True, steps, None), x, weight, bias, gate, residual, eps)


def _scaled_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float | Tensor,
    *,
    norm: str = "rms",
    add_one: bool = True,
    rounding: str = "cast_then_weight",
    z_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> NormGateCall:
    op = "norm_scale"
    _check_words(op, norm, rounding, root, z_dtype=z_dtype, norm_dtype=norm_dtype)
    _check_x(op, x)
    check_row(op, "weight", weight, x)
    check_row(op, "bias", bias, x)
    _check_broadcast(op, "scale", scale, x)
    check_eps(op, "eps", eps)
    steps = _scaled_steps(
        rounding, norm, x.dtype, dtype_of(weight), dtype_of(bias), _promoting(scale), z_dtype, norm_dtype, root
    )
    return NormGateCall(_chain(norm, True, add_one, None, steps), x, weight, bias, None, None, eps, scale=scale)


def _dual_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor,
    eps: float | Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    scale: Tensor | None,
    eps2: float | Tensor,
    *,
    norm: str = "rms",
    tanh: bool = True,
    add_one: bool = True,
    rounding: str = "cast_then_weight",
    y_dtype: torch.dtype | None = None,
    z_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    norm_dtype2: torch.dtype | None = None,
    root: str = "rsqrt",
) -> NormGateCall:
    op = "norm_tanh_mul_add_norm_scale"
    first = _gated_call(
        x,
        weight,
        bias,
        gate,
        residual,
        eps,
        norm=norm,
        tanh=tanh,
        rounding=rounding,
        y_dtype=y_dtype,
        norm_dtype=norm_dtype,
        root=root,
        op=op,
    )
    check_dtypes(op, z_dtype=z_dtype, norm_dtype2=norm_dtype2)
    check_row(op, "weight2", weight2, x)
    check_row(op, "bias2", bias2, x)
    _check_broadcast(op, "scale", scale, x)
    check_eps(op, "eps2", eps2)
    gated = first.chain.gated
    assert gated is not None
    steps = _scaled_steps(
        rounding, norm, gated.y, dtype_of(weight2), dtype_of(bias2), _promoting(scale), z_dtype, norm_dtype2, root
    )
    chain = _chain(norm, tanh, add_one, gated, steps)
    return NormGateCall(chain, x, weight, bias, gate, residual, eps, weight2, bias2, scale, eps2)


# --- the ops --------------------------------------------------------------------------------------------------------

_NORM_DTYPE, _ROOT = "ScalarType? norm_dtype=None", "str root='rsqrt'"
_NORM = ("x", "weight", "bias")
_GATED = (*_NORM, "gate", "residual", "eps")

OPS = {
    "norm_tanh_mul_add": Op(
        FAMILY,
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? gate, Tensor residual, {eps} eps, *, str norm='rms', "
        f"bool tanh=True, str rounding='cast_then_weight', ScalarType? y_dtype=None, {_NORM_DTYPE}, {_ROOT}) -> Tensor",
        _gated_call,
        (*_GATED, "y"),
    ),
    "norm_tanh_mul_add_norm_scale": Op(
        FAMILY,
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? gate, Tensor residual, {eps} eps, Tensor? weight2, "
        "Tensor? bias2, Tensor? scale, {eps} eps2, *, str norm='rms', bool tanh=True, bool add_one=True, "
        "str rounding='cast_then_weight', ScalarType? y_dtype=None, ScalarType? z_dtype=None, "
        f"{_NORM_DTYPE}, ScalarType? norm_dtype2=None, {_ROOT}) -> (Tensor, Tensor)",
        _dual_call,
        FAMILY.arguments,
    ),
    "norm_scale": Op(
        FAMILY,
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, {eps} eps, *, str norm='rms', bool add_one=True, "
        f"str rounding='cast_then_weight', ScalarType? z_dtype=None, {_NORM_DTYPE}, {_ROOT}) -> Tensor",
        _scaled_call,
        (*_NORM, "scale", "eps", "z"),
    ),
}
