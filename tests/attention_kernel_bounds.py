"""The operands of the kernels of norm_rope, qk_norm_rope and silu_mul, and how far results may be from the definition.

Bounds, on random data: of bf16 outputs at least 99.99 % (of fp16 99.9 %) are bit-equal to the definition run on the
same device. Where one differs, it does by at most three steps (ulps) at the magnitude of its pair, which a rotation
keeps, or of silu(a) * b. fp32 outputs are judged by their error against fp64: at most twice that of the definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from kernel_bounds import BF16, DIFFERING, EPS, EPS2, FP32, MANTISSA_BITS, Device, random
from torch import Tensor

from dit_kernels import reference
from dit_kernels.families import OPS

COMPLEX64 = torch.complex64
STEPS = 3  # norm(x) of both of a pair may be off by one, and their products and the sum are rounded again
FLOOR = 2.0**-24

# --- operands -------------------------------------------------------------------------------------------------------


@dataclass
class Heads:
    """The operands of qk_norm_rope; each may be replaced by a view or by None."""

    q: Tensor
    k: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    rotation: Tensor
    sin: Tensor | None

    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k, self.q_weight, self.k_weight, self.rotation, self.sin, EPS, EPS2


def angles(batch: int, tokens: int, pairs: int, device: str = "cpu") -> Tensor:
    return random(batch, tokens, pairs, dtype=FP32, seed=9, device=device) * 3


def heads(
    batch: int,
    tokens: int,
    h: int,
    hk: int,
    d: int,
    dtype: torch.dtype = BF16,
    rotation: torch.dtype = COMPLEX64,
    weight: torch.dtype | None = None,
    interleaved: bool = True,
    device: str = "cpu",
) -> Heads:
    """Random operands with a rotation that all batch items have in common; cosines of both of a pair are equal."""

    def make(*shape: int, dtype: torch.dtype = dtype, seed: int) -> Tensor:
        return random(*shape, dtype=dtype, seed=seed, device=device)

    angle = angles(1, tokens, d // 2, device).double()
    turning: tuple[Tensor, Tensor | None] = (torch.polar(torch.ones_like(angle), angle).to(rotation), None)
    if not rotation.is_complex:
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
        turning = angle.cos().to(rotation), angle.sin().to(rotation)
    q, k = make(batch, tokens, h, d, seed=1) * 2, make(batch, tokens, hk, d, seed=2)
    return Heads(q, k, make(d, dtype=weight or dtype, seed=3), make(d, dtype=weight or dtype, seed=4), *turning)


def heads_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def tokens_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def last_dimension_strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


def misaligned(t: Tensor) -> Tensor:
    return torch.cat((t[..., :1], t), -1)[..., 1:]


def one_for_all(t: Tensor) -> Tensor:
    return t[:1, :1, :1].expand_as(t)


# --- judging --------------------------------------------------------------------------------------------------------


def assert_follows(
    on: Device, result: str, out: Tensor, expected: Tensor, magnitude: Tensor, coarsest: torch.dtype, spare: int = 2
) -> None:
    """Single elements of a small tensor are no measurement of a share: `spare` of them are free."""
    most = math.inf if out.dtype == FP32 else DIFFERING[out.dtype] * out.numel() + spare + math.ceil(2 * on.tied(out))
    on.assert_follows(result, out, expected, magnitude, STEPS, coarsest, most)


def magnitude_of_pairs(x: Tensor, interleaved: bool) -> Tensor:
    """Of each element the length of its pair, which bounds both products that it is the sum of."""
    x = x.float()
    if interleaved:
        return x.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    length = x.unflatten(-1, (2, -1)).norm(dim=-2)
    return torch.cat((length, length), -1)


def judge_heads(
    on: Device, results: tuple[Tensor, ...], definition: Any, exact: Any, interleaved: bool, native: bool
) -> None:
    """definition, exact: calls with the operands as they are, and as fp64."""
    with on.eager():
        expected, exact_results = definition.definition(), exact.definition()
    chains = (definition.chain.q, definition.chain.k)
    for name, out, eager, value, steps in zip("qk", results, expected, exact_results, chains, strict=False):
        norm = steps.norm
        dtypes = {norm.stat, norm.normed, norm.weighted, norm.out, steps.product, steps.rotated, steps.out}
        dtypes.discard(torch.float64)
        if dtypes == {FP32}:
            on.assert_precise(name, out, eager, value, FLOOR)
            continue
        coarsest = min(dtypes, key=MANTISSA_BITS.__getitem__)
        # A statistic in 16 bits that falls the other way takes its head along.
        spare = 2 + (2 * out.shape[-1] if native else 0)
        assert_follows(on, name, out, eager, magnitude_of_pairs(eager, interleaved), coarsest, spare)


def check_heads(on: Device, o: Heads, alone: bool = True, **options: Any) -> tuple[Tensor, ...]:
    """Runs qk_norm_rope, and if `alone` also norm_rope on q, and judges the results."""
    options = {"rounding": "cast_then_weight", "interleaved": True, **options}
    results = on.run("qk_norm_rope", *o.arguments(), **options)
    make = OPS["qk_norm_rope"].call
    wide = [a.double() if isinstance(a, Tensor) and not a.is_complex() else a for a in o.arguments()]
    exact = make(*wide, rounding="fp32", interleaved=options["interleaved"])
    judge_heads(
        on, results, make(*o.arguments(), **options), exact, options["interleaved"], options["rounding"] == "native"
    )
    if alone:
        (q,) = on.run("norm_rope", o.q, o.q_weight, o.rotation, o.sin, EPS, **options)
        assert torch.equal(q, results[0])
    return results


def check_with_bias(
    on: Device, op: str, o: Heads, q_bias: Tensor | None, k_bias: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """Runs qk_norm_rope or qk_norm_part_rope and judges the results. Rotation: of the last tokens, in the latter."""
    options = {"rounding": "cast_then_weight", "interleaved": True, **options}
    given = (*o.arguments(), q_bias, k_bias)
    results = on.run(op, *given, **options)
    wide = [a.double() if isinstance(a, Tensor) and not a.is_complex() else a for a in given]
    exact = OPS[op].call(*wide, rounding="fp32", **{name: options[name] for name in ("interleaved", "norm")})
    definition = OPS[op].call(*given, **options)
    judge_heads(on, results, definition, exact, options["interleaved"], options["rounding"] == "native")
    return results


def check_joined(on: Device, before: Heads, later: Heads, **options: Any) -> tuple[Tensor, ...]:
    """Runs qk_norm_cat_rope on two streams and judges the results. Rotation: that of `later`, for all tokens."""
    options = {"rounding": "cast_then_weight", "interleaved": True, **options}
    weights = later.q_weight, later.k_weight, before.q_weight, before.k_weight
    eps = EPS, EPS2, 10 * EPS, 10 * EPS2
    given = (later.q, later.k, before.q, before.k, *weights, later.rotation, later.sin, *eps)
    results = on.run("qk_norm_cat_rope", *given, **options)
    make = OPS["qk_norm_cat_rope"].call
    wide = [a.double() if isinstance(a, Tensor) and not a.is_complex() else a for a in given]
    exact = make(*wide, rounding="fp32", interleaved=options["interleaved"])
    judge_heads(on, results, make(*given, **options), exact, options["interleaved"], options["rounding"] == "native")
    return results


def check_silu(on: Device, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    (out,) = on.run("silu_mul", a, b, **options)
    with on.eager():
        expected = reference.activation(a, b, "silu", OPS["silu_mul"].call(a, b, **options).chain.steps)
    if out.dtype == FP32:
        exact = torch.nn.functional.silu(a.double()) * b.double()
        if options.get("silu_dtype", a.dtype) == FP32 or options.get("rounding") == "fp32":
            on.assert_precise("out", out, expected, exact, FLOOR)
            return out
    coarsest = min(a.dtype, out.dtype, key=MANTISSA_BITS.__getitem__)
    assert_follows(on, "out", out, expected, expected.float().abs(), coarsest)
    return out


def check_special_numbers(on: Device, device: str = "cpu") -> None:
    """silu of large and special numbers is eager's."""
    a = torch.tensor(
        [-torch.inf, torch.inf, torch.nan, 0.0, -0.0, -80.0, -87.5, -88.5, -88.75, -95.0, -200.0, 88.0, 3e38]
    )
    a = torch.cat((a, torch.linspace(-100, 100, 1011))).to(device).view(1, -1).contiguous()
    for dtype in (BF16, FP32):
        (ours,) = on.run("silu_mul", a.to(dtype), torch.ones_like(a, dtype=dtype))
        eager = torch.nn.functional.silu(a.to(dtype))
        rtol = 2.0**-7 if dtype == BF16 else 2.0**-21
        torch.testing.assert_close(ours, eager, rtol=rtol, atol=2.0**-126, equal_nan=True)
