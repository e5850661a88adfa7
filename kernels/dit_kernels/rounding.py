"""The rounding contract, in one place.

Models compute the same arithmetic, e.g. `residual + tanh(gate) * norm(x)` and `norm(y) * (1 + scale)`. They differ in
where they round intermediate values to the storage dtype. This module turns the name of a rounding form and the dtypes
of the operands into the dtype of every single step. The fake implementations take the result dtypes from it, the
PyTorch definition casts by it, and the CUDA kernels use it as compile-time constants. So there is one place where a
rounding can be right or wrong.

R(.) rounds to the dtype of a step. Arithmetic is fp32 (fp64 if x is fp64). rstd = rsqrt(mean(x^2) + eps).

| form             | norm n =                 | found in                                                       |
|------------------|--------------------------|----------------------------------------------------------------|
| cast_then_weight | R(R(x*rstd)*w)           | diffusers' RMSNorm (Z-Image, Lumina 2), Llama order            |
| weight_then_cast | R(x*rstd*w)              | torch.nn.RMSNorm, F.rms_norm, ComfyUI                          |
| native           | every step rounded       | Z-Image's own repository: x^2, mean, +eps, rsqrt, *x, *w       |
| gate_in_fp32     | x*rstd, not rounded      | Mochi: rounds once, after the product with the gate            |
| fp32             | nothing rounded inside   | only on request: rounds each output once                       |

With v = mean(x^2) + eps, models compute the norm in three ways, which differ in the last bit of fp32. "rsqrt" is
x * rsqrt(v), "reciprocal" is x * R(1 / R(sqrt(v))), and "quotient" is x / R(sqrt(v)). `root` names the way. The form
`fp32` always uses rsqrt.

After the norm: t = R(tanh(gate)), p = R(t*n), y = R(residual + p), s = R(1 + scale), z = R(R(norm(y)*s) + shift). The
second norm reads the stored y. Without a norm in front of the gate, p = R(t*x).

Each of these steps is rounded to the dtype that PyTorch's type promotion gives it. So a product with an fp32 gate, and
the sum with it, stay in fp32, as in Wan, and only y is rounded.

A layer norm is F.layer_norm of x itself, with two exceptions. In `weight_then_cast` the model casts x up, calls
F.layer_norm and casts the result back (diffusers' FP32LayerNorm). In `gate_in_fp32` and `fp32` the result is not cast
back.

A norm with a rotation (RoPE) is R(n * rotation) with complex numbers. The product is fp32, or fp64 with a complex128
rotation. With cosines and sines it is R(R(n * cos) + R(turned(n) * sin)). With 2×2 matrices, a pair
(a, b) becomes R(R(m00 * a) + R(m01 * b)) and R(R(m10 * a) + R(m11 * b)). With torch.addcmul, the second product is not
rounded before the sum. SwiGLU is R(R(silu(a)) * b).
GELU is R(a * 0.5 * (1 + erf(a / sqrt(2)))), or with tanh R(0.5 * a * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 * a^3)))).

A quantiser of rows turns z into q (`FP8`) and s (fp32, one number a row):

    a = max |z| of the row, at least `smallest_amax`
    s = R(a / fmax), kept in fp32, at least `smallest_scale`
    q = the cast of z / s, or of z * (1 / s), computed in fp32 and clamped to +-LARGEST if `clamp`

It computes what the model's own operations compute. A row of zeros has s = 0 and q = NaN without a smallest value.

A static quantiser is given one scale s for all rows and returns q alone. `scaling` says what f is and how it is used:

    f = R(s), or R(1 / s)
    q = the cast of R(z / f), or of R(z * f), clamped to +-LARGEST if `clamp`

PyTorch's cast clamps from 2.12 on. Before, it makes NaN of infinity and of what rounds to more than LARGEST.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMS: tuple[str, ...] = ("cast_then_weight", "weight_then_cast", "native", "gate_in_fp32", "fp32")
NORMS: tuple[str, ...] = ("rms", "layer")
ACTIVATIONS: tuple[str, ...] = ("identity", "silu", "gelu", "gelu_tanh")
ACTIVATION_FORMS: tuple[str, ...] = ("model", "fp32")
ROOTS: tuple[str, ...] = ("rsqrt", "reciprocal", "quotient")
SCALINGS: tuple[str, ...] = ("quotient", "reciprocal", "product")  # by a static s: z / s, z * (1 / s), z * s

FP8 = torch.float8_e4m3fn  # the dtype of quantised results
LARGEST = torch.finfo(FP8).max  # 448.0


@dataclass(frozen=True)
class NormSteps:
    """The dtype that each step of a norm is rounded to. The compute dtype (fp32) means that a step is not rounded."""

    stat: torch.dtype  # x^2, mean(x^2), mean + eps and its root; for a layer norm, the input of F.layer_norm
    normed: torch.dtype  # x * rstd
    weighted: torch.dtype  # * weight
    biased: torch.dtype  # + bias
    out: torch.dtype  # the result of the norm, as the rest of the chain reads it
    root: str = "rsqrt"  # how an rms norm computes its rstd: one of ROOTS


@dataclass(frozen=True)
class StageSteps:
    """The dtype of each step of `term + act(factor) * norm(v)`. Without a term, `sum` equals `product`."""

    norm: NormSteps | None  # None: there is no norm
    factor: torch.dtype  # tanh(gate), 1 + scale
    product: torch.dtype  # act(factor) * n
    sum: torch.dtype  # term + product
    out: torch.dtype  # the stored result


@dataclass(frozen=True)
class RotatedSteps:
    """The dtype of each step of `rotate(norm(x))`."""

    norm: NormSteps
    product: torch.dtype  # n * cos and turned(n) * sin; with a complex rotation, the real dtype of the multiplication
    rotated: torch.dtype  # the sum of the two products
    out: torch.dtype  # the stored result


@dataclass(frozen=True)
class ActivationSteps:
    """The dtype of each step of `act(a) * b`. Without b, `product` equals `activated`."""

    activated: torch.dtype  # act(a), computed in fp32
    product: torch.dtype
    out: torch.dtype  # the stored result


@dataclass(frozen=True)
class QuantSteps:
    """How a row is quantised. Every step is computed in fp32, and only the scale and q are rounded to a dtype."""

    scale: torch.dtype  # amax / fmax is rounded to this dtype; the scale is then kept in fp32
    fmax: float  # what the largest absolute value of a row is divided by
    smallest_amax: float | None  # the least amax; None: no least
    smallest_scale: float | None  # the least scale, in fp32; None: no least
    reciprocal: bool  # True: z * (1 / s), where 1 / s is rounded to fp32; False: z / s
    clamp: bool  # to +-LARGEST before the cast, or by the cast
    out: torch.dtype = FP8


@dataclass(frozen=True)
class StaticSteps:
    """How rows are quantised with a given scale. Every step is computed in fp32, and then rounded to its dtype."""

    scaling: str  # one of SCALINGS
    factor: torch.dtype  # the scale, or its reciprocal, is rounded to this dtype
    scaled: torch.dtype  # the quotient or the product is rounded to this dtype
    clamp: bool  # to +-LARGEST before the cast, or by the cast
    out: torch.dtype = FP8


def compute_dtype(x: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp32, or fp64 for an fp64 x. Only the PyTorch definition takes an fp64 x."""
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

    `norm_dtype` is the dtype that the normalised value is cast to. The cast comes before the weight in
    `cast_then_weight`, and at the end in `weight_then_cast` and in layer norms. None follows diffusers in the first
    case (the weight's dtype, or x's without a weight) and PyTorch in the others (x's dtype).
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


def stage_steps(
    form: str,
    norm: str | None,
    x: torch.dtype,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    factor: torch.dtype | None,
    term: torch.dtype | None,
    out_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> StageSteps:
    """The steps of `term + act(factor) * norm(x)`. norm: None for `term + act(factor) * x`.

    factor, term: None if there is none, or if it is 0-d, since a 0-d operand does not promote. Without `out_dtype`, the
    result has the dtype that PyTorch's type promotion gives the chain.
    """
    steps = None if norm is None else norm_steps(form, norm, x, weight, bias, norm_dtype, root)
    read, wide = x if steps is None else steps.out, compute_dtype(x)
    rounds_the_product_once = form == "gate_in_fp32" and steps is not None
    if form == "fp32":
        default = stage_steps("cast_then_weight", norm, x, weight, bias, factor, term, None, norm_dtype).out
        return StageSteps(steps, wide, wide, wide, out_dtype or default)
    if rounds_the_product_once and term is None:
        return StageSteps(steps, wide, wide, wide, out_dtype or norm_dtype or x)
    product = norm_dtype or x if rounds_the_product_once else _promote(read, factor)
    total = _promote(product, term)
    return StageSteps(steps, factor or read, product, total, out_dtype or total)


def rotated_steps(
    form: str,
    x: torch.dtype,
    weight: torch.dtype | None,
    rotation: torch.dtype,
    norm_dtype: torch.dtype | None = None,
    rope_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
    kind: str = "rms",
    bias: torch.dtype | None = None,
) -> RotatedSteps:
    """The steps of `rotate(norm(x))`. rotation: a complex dtype, or the dtype of cos and sin. kind: one of NORMS.

    With a complex rotation, the product is cast to `rope_dtype`. The default is the dtype of the norm, as in
    `x_out.type_as(x)`. With cosines and sines, the products and their sum are rounded to `rope_dtype`. The default is
    the dtype that PyTorch's type promotion gives. Without `out_dtype`, the result has the same dtype.
    """
    norm = norm_steps(form, kind, x, weight, bias, norm_dtype, root)
    if form == "fp32":
        default = rotated_steps(
            "cast_then_weight", x, weight, rotation, norm_dtype, rope_dtype, kind=kind, bias=bias
        ).out
        wide = _promote(compute_dtype(x), rotation.to_real())
        return RotatedSteps(norm, wide, wide, out_dtype or default)
    if rotation.is_complex:
        rotated = rope_dtype or norm.out
        return RotatedSteps(norm, _promote(compute_dtype(x), rotation.to_real()), rotated, out_dtype or rotated)
    rotated = rope_dtype or _promote(norm.out, rotation)
    return RotatedSteps(norm, rotated, rotated, out_dtype or rotated)


def activation_steps(
    form: str,
    a: torch.dtype,
    b: torch.dtype | None = None,
    activated_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> ActivationSteps:
    """The steps of `act(a) * b`. b: None if there is none.

    Defaults: `activated_dtype` is a's dtype, `out_dtype` follows PyTorch's type promotion.
    """
    activated = activated_dtype or a
    product = _promote(activated, b)
    if form == "fp32":
        wide = compute_dtype(product)
        return ActivationSteps(wide, wide, out_dtype or product)
    return ActivationSteps(activated, product, out_dtype or product)
