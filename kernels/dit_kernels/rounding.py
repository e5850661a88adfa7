"""The rounding contract, said once.

Every fused op is the same arithmetic, `residual + tanh(gate) * norm(x)` and `norm(y) * (1 + scale)`; what tells one
model's code from another's is where intermediate values are rounded to the storage dtype. This module turns the name of
a rounding form and the dtypes of the operands into the dtype of every single step. The fake implementations read the
result dtypes off it, the PyTorch definition casts by it, and the CUDA kernels take it as their compile-time constants,
so that there is one place where a rounding can be right or wrong.

R(.) rounds to the dtype of a step; arithmetic is fp32 (fp64 where x is fp64); rstd = rsqrt(mean(x^2) + eps).

| form             | norm n =                 | found in                                                       |
|------------------|--------------------------|----------------------------------------------------------------|
| cast_then_weight | R(R(x*rstd)*w)           | diffusers' RMSNorm (Z-Image, Lumina 2), Llama order            |
| weight_then_cast | R(x*rstd*w)              | torch.nn.RMSNorm, F.rms_norm, ComfyUI                          |
| native           | every step rounded       | Z-Image's own repository: x^2, mean, +eps, rsqrt, *x, *w       |
| gate_in_fp32     | x*rstd, not rounded      | Mochi: the product with the gate is rounded, once              |
| fp32             | nothing rounded inside   | on request: one rounding at each output                        |

rstd is spelled in three ways, which differ in the last bit of fp32: rsqrt(v); "reciprocal", R(1 / R(sqrt(v))), times x
as well; and "quotient", x / R(sqrt(v)). `root` says which; in `fp32` all are rsqrt.

After the norm: t = R(tanh(gate)), p = R(t*n), y = R(residual + p), s = R(1 + scale), z = R(norm(y)*s). The second norm
reads the y that is stored. A layer norm is F.layer_norm itself, but in `weight_then_cast`, where the model casts x up,
calls F.layer_norm and casts back (diffusers' FP32LayerNorm), and in `gate_in_fp32` and `fp32`, where it is not cast.

Of a norm that is rotated (RoPE): with complex numbers R(n * rotation), the product in fp32, or fp64 with a complex128
rotation; with real ones R(R(n * cos) + R(turned(n) * sin)). Of SwiGLU: R(R(silu(a)) * b).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Form = Literal["cast_then_weight", "weight_then_cast", "native", "gate_in_fp32", "fp32"]
FORMS: tuple[str, ...] = get_args(Form)
NORMS: tuple[str, ...] = ("rms", "layer")
SILU_FORMS: tuple[str, ...] = ("model", "fp32")
ROOTS: tuple[str, ...] = ("rsqrt", "reciprocal", "quotient")


@dataclass(frozen=True)
class NormSteps:
    """The dtype that each step of a norm is rounded to; the compute dtype (fp32) means that a step is not rounded."""

    stat: torch.dtype  # x^2, mean(x^2), mean + eps and its root; of a layer norm, what F.layer_norm is called on
    normed: torch.dtype  # x * rstd
    weighted: torch.dtype  # * weight
    biased: torch.dtype  # + bias
    out: torch.dtype  # the norm as the chain around it reads it
    root: str = "rsqrt"  # how an rms norm spells its rstd: one of ROOTS


@dataclass(frozen=True)
class GatedSteps:
    """The dtype of each step of `y = residual + tanh(gate) * norm(x)`."""

    norm: NormSteps
    gate: torch.dtype  # tanh(gate)
    product: torch.dtype  # tanh(gate) * n
    sum: torch.dtype  # residual + product
    y: torch.dtype  # y as it is stored


@dataclass(frozen=True)
class ScaledSteps:
    """The dtype of each step of `z = norm(x) * (1 + scale)`."""

    norm: NormSteps
    scale: torch.dtype  # 1 + scale
    product: torch.dtype  # n * (1 + scale)
    z: torch.dtype  # z as it is stored


@dataclass(frozen=True)
class RotatedSteps:
    """The dtype of each step of `rotate(norm(x))`."""

    norm: NormSteps
    product: torch.dtype  # n * cos and turned(n) * sin; of complex numbers, the real dtype that they are multiplied in
    rotated: torch.dtype  # the sum of the two
    out: torch.dtype  # as it is stored


@dataclass(frozen=True)
class SiluSteps:
    """The dtype of each step of `silu(a) * b`."""

    silu: torch.dtype  # silu(a), which is fp32 inside
    product: torch.dtype
    out: torch.dtype  # as it is stored


def compute_dtype(x: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp32, or fp64 for an fp64 x (only the PyTorch definition takes that)."""
    return torch.float64 if x == torch.float64 else torch.float32


def _promote(a: torch.dtype, b: torch.dtype | None) -> torch.dtype:
    return a if b is None else torch.promote_types(a, b)


def norm_steps(
    form: str,
    norm: str,
    x: torch.dtype,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    norm_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> NormSteps:
    """The steps of one norm.

    `norm_dtype` is what the normalised value is cast to: before the weight in `cast_then_weight`, at the end in
    `weight_then_cast` and for layer norms. None is what diffusers does in the first case (the weight's dtype, or x's
    where there is no weight) and what PyTorch does in the others (x's dtype).
    """
    wide = compute_dtype(x)
    root = "rsqrt" if norm == "layer" or form == "fp32" else root
    if form in ("fp32", "gate_in_fp32"):
        return NormSteps(wide, wide, wide, wide, wide, root)
    if form == "weight_then_cast":
        return NormSteps(wide, wide, wide, wide, norm_dtype or x, root)
    if norm == "layer":
        return NormSteps(x, wide, wide, wide, norm_dtype or x)
    stat = x if form == "native" else wide
    normed = x if form == "native" else norm_dtype or weight or x
    weighted = _promote(normed, weight)
    biased = _promote(weighted, bias)
    return NormSteps(stat, normed, weighted, biased, biased, root)


def gated_steps(
    form: str,
    norm: str,
    x: torch.dtype,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    gate: torch.dtype | None,
    residual: torch.dtype,
    y_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> GatedSteps:
    """The steps of `residual + tanh(gate) * norm(x)`; `gate` is None where there is no gate, or where it is 0-d (a 0-d
    operand does not promote). Without `y_dtype`, y has the dtype that PyTorch's promotion gives the chain."""
    if form == "fp32":
        wide = compute_dtype(x)
        default = gated_steps("cast_then_weight", norm, x, weight, bias, gate, residual, None, norm_dtype).y
        return GatedSteps(norm_steps(form, norm, x, weight, bias), wide, wide, wide, y_dtype or default)
    steps = norm_steps(form, norm, x, weight, bias, norm_dtype, root)
    product = norm_dtype or x if form == "gate_in_fp32" else _promote(steps.out, gate)
    total = _promote(product, residual)
    return GatedSteps(steps, gate or steps.out, product, total, y_dtype or total)


def scaled_steps(
    form: str,
    norm: str,
    x: torch.dtype,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    scale: torch.dtype | None,
    z_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> ScaledSteps:
    """The steps of `norm(x) * (1 + scale)`; `scale` and the default of `z_dtype` as `gate` and `y_dtype` above."""
    steps = norm_steps(form, norm, x, weight, bias, norm_dtype, root)
    if form == "fp32":
        wide = compute_dtype(x)
        default = scaled_steps("cast_then_weight", norm, x, weight, bias, scale, None, norm_dtype).z
        return ScaledSteps(steps, wide, wide, z_dtype or default)
    if form == "gate_in_fp32":
        wide = compute_dtype(x)
        return ScaledSteps(steps, wide, wide, z_dtype or norm_dtype or x)
    product = _promote(steps.out, scale)
    return ScaledSteps(steps, scale or steps.out, product, z_dtype or product)


def rotated_steps(
    form: str,
    x: torch.dtype,
    weight: torch.dtype | None,
    rotation: torch.dtype,
    norm_dtype: torch.dtype | None = None,
    rope_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> RotatedSteps:
    """The steps of `rotate(norm(x))`, the norm an rms norm; `rotation` is complex, or the dtype of cos and sin.

    `rope_dtype` is what a complex product is cast to, by default the dtype of the norm, as in `x_out.type_as(x)`; and
    what real products and their sum are rounded to, by default what PyTorch's promotion gives. Without `out_dtype`, the
    result has that dtype, too.
    """
    norm = norm_steps(form, "rms", x, weight, None, norm_dtype, root)
    if form == "fp32":
        default = rotated_steps("cast_then_weight", x, weight, rotation, norm_dtype, rope_dtype).out
        wide = _promote(compute_dtype(x), rotation.to_real())
        return RotatedSteps(norm, wide, wide, out_dtype or default)
    if rotation.is_complex:
        rotated = rope_dtype or norm.out
        return RotatedSteps(norm, _promote(compute_dtype(x), rotation.to_real()), rotated, out_dtype or rotated)
    rotated = rope_dtype or _promote(norm.out, rotation)
    return RotatedSteps(norm, rotated, rotated, out_dtype or rotated)


def silu_steps(
    form: str,
    a: torch.dtype,
    b: torch.dtype,
    silu_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> SiluSteps:
    """The steps of `silu(a) * b`: `silu_dtype` is a's by default, `out_dtype` what PyTorch's promotion gives."""
    silu = silu_dtype or a
    product = _promote(silu, b)
    if form == "fp32":
        wide = compute_dtype(product)
        return SiluSteps(wide, wide, out_dtype or product)
    return SiluSteps(silu, product, out_dtype or product)
