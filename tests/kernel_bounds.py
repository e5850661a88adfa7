"""The operands of the norms' kernels, and how far their results may be from the definition.

Bounds, on random data: of bf16 outputs at least 99.99 % (of fp16 99.9 %) are bit-equal to the definition run on the
same device. Where one differs, y does by at most two steps (ulps) at the largest magnitude among residual, p and y, and
z, judged from the kernel's own y, by at most four: a last bit of norm(y) passes two more products, and with each
becomes at most twice as many steps, since a product may end at the upper end of a binade whose lower end it came from.
A chain that never rounds is judged by its error against fp64: at most twice that of the definition. Eager computes a
layer norm in one kernel of its own. So any number of its elements may differ, but each by no more than these steps.

tests/gpu judges a GPU by them, and tests/ptx the interpreter of the PTX; a `Device` is what differs between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from dit_kernels import ops, reference
from dit_kernels.chain import Stage
from dit_kernels.rounding import StageSteps

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = ("norm_tanh_mul_add", "norm_tanh_mul_add_norm_scale", "norm_scale")
DUAL = "norm_tanh_mul_add_norm_scale"
MANTISSA_BITS = {BF16: 7, FP16: 10, FP32: 23}
SMALLEST_STEP = {BF16: 2.0**-133, FP16: 2.0**-24, FP32: 2.0**-149}
DIFFERING = {BF16: 1e-4, FP16: 1e-3}
Y_STEPS, Z_STEPS = 2, 4
EPS, EPS2 = 1e-5, 1e-6


# --- operands -------------------------------------------------------------------------------------------------------


def random(*shape: int, dtype: torch.dtype = BF16, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(seed * 7919 + sum(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


@dataclass
class Operands:
    """The tensors of a call of any op; each may be replaced by a view or by None."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    residual: Tensor
    weight2: Tensor | None
    bias2: Tensor | None
    scale: Tensor | None

    def arguments(self, op: str, eps: Any = EPS, eps2: Any = EPS2) -> tuple[Any, ...]:
        if op == "norm_scale":
            return self.x, self.weight, self.bias, self.scale, eps
        first = (self.x, self.weight, self.bias, self.gate, self.residual, eps)
        return first if op == "norm_tanh_mul_add" else (*first, self.weight2, self.bias2, self.scale, eps2)


def operands(
    batch: int, tokens: int, d: int, dtype: torch.dtype = BF16, bias: bool = False, device: str = "cpu", **dtypes: Any
) -> Operands:
    """Random operands, gate and scale (B, 1, D); dtypes: that of single operands."""

    names = ("x", "weight", "bias", "gate", "residual", "weight2", "bias2", "scale")

    def make(name: str, *shape: int) -> Tensor:
        return random(*shape, dtype=dtypes.get(name, dtype), seed=1 + names.index(name), device=device)

    return Operands(
        x=make("x", batch, tokens, d) * 2,
        weight=make("weight", d),
        bias=make("bias", d) if bias else None,
        gate=make("gate", batch, 1, d),
        residual=make("residual", batch, tokens, d),
        weight2=make("weight2", d),
        bias2=make("bias2", d) if bias else None,
        scale=make("scale", batch, 1, d),
    )


# --- the bounds -----------------------------------------------------------------------------------------------------


def step(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` at a magnitude."""
    _, exponent = torch.frexp(magnitude.float())
    steps = torch.ldexp(torch.ones_like(magnitude, dtype=FP32), exponent - 1 - MANTISSA_BITS[dtype])
    return steps.clamp_min(SMALLEST_STEP[dtype])


def assert_follows(
    out: Tensor, expected: Tensor, magnitude: Tensor, steps: int, coarsest: torch.dtype, most: float
) -> None:
    """At most `most` elements differ, each by at most `steps` of dtype `coarsest` at its magnitude."""
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert out.is_contiguous()
    differing = (out != expected) & ~(out.isnan() & expected.isnan())
    distance = (out.float() - expected.float()).abs()[differing]
    off = distance / step(magnitude, coarsest)[differing]
    assert bool((off <= steps).all()), f"off by {float(off.max()):.1f} steps"
    assert int(differing.sum()) <= most, f"{int(differing.sum())} of {out.numel()} differ"


def assert_precise(out: Tensor, eager: Tensor, exact: Tensor, floor: float = 2.0**-25) -> None:
    """The error against fp64 is at most twice eager's, at the worst element and in the mean square.

    floor: the error that is always allowed, as a part of the largest number.
    """
    assert out.dtype == eager.dtype == FP32 and out.shape == exact.shape
    assert out.is_contiguous()
    ours, theirs = (out.double() - exact).abs(), (eager.double() - exact).abs()
    floor *= float(exact.abs().max())
    assert float(ours.max()) <= 2 * float(theirs.max()) + floor
    assert float(ours.square().mean().sqrt()) <= 2 * float(theirs.square().mean().sqrt()) + floor / 16


class Device:
    """Runs the ops, and applies the bounds to a result by its name. This one is the device that the tensors are on."""

    def run(self, op: str, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        results = attrgetter(op)(torch.ops.dit_kernels)(*arguments, **options)
        return results if isinstance(results, tuple) else (results,)

    def eager(self) -> AbstractContextManager[Any]:
        """The context in which the definition is computed."""
        return nullcontext()

    def tied(self, out: Tensor) -> float:
        """How many elements may differ beyond the share and what is spare, because they are ties of one row."""
        return 0.0

    def assert_follows(self, result: str, out: Tensor, *judged_by: Any) -> None:
        assert_follows(out, *judged_by)

    def assert_precise(self, result: str, out: Tensor, *judged_by: Any) -> None:
        assert_precise(out, *judged_by)


# --- judging --------------------------------------------------------------------------------------------------------


def accepted(op: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the op has: norm_scale knows no tanh, norm_tanh_mul_add no add_one."""
    foreign = {
        "norm_scale": {"tanh", "y_dtype", "norm_dtype2"},
        "norm_tanh_mul_add": {"add_one", "z_dtype", "norm_dtype2"},
    }
    return {name: value for name, value in options.items() if name not in foreign.get(op, set())}


def stage_of(op: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Stage:
    """The first stage of a call of a norm op."""
    call = ops.checked_call(getattr(torch.ops.dit_kernels, op).default, *arguments, **options)
    first: Stage = call.chain.stages[0]
    return first


def never_rounds(steps: StageSteps) -> bool:
    """Is every step of a stage fp32, but for tanh(gate) and 1 + scale, which depend on nothing else?"""
    norm = steps.norm
    inner = (norm.stat, norm.normed, norm.weighted, norm.biased, norm.out)
    return all(dtype == FP32 for dtype in (*inner, steps.product, steps.sum, steps.out))


def coarsest_dtype(steps: StageSteps, out: Tensor) -> torch.dtype:
    dtypes = {steps.norm.stat, steps.norm.normed, steps.norm.out, steps.product, out.dtype}
    return min(dtypes, key=MANTISSA_BITS.__getitem__)


def in_fp64(op: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The definition on fp64 operands, without gate or scale still to be activated."""
    wide = (a.double() if isinstance(a, Tensor) else a for a in arguments)
    plain = accepted(op, {"norm": options["norm"], "tanh": False, "add_one": False})
    call = ops.checked_call(getattr(torch.ops.dit_kernels, op).default, *wide, **plain)
    return call.definition()[0]


ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "one_plus": lambda s: 1 + s,
    None: lambda factor: factor,
}


def factor_in_fp64(raw: Tensor | None, stage: Stage) -> Tensor | None:
    """The factor of a stage as it enters the product, as fp64, rounded where the stage rounds it."""
    if raw is None:
        return None
    activation, dtype = ACTIVATIONS[stage.activation], stage.steps.factor
    return activation(raw.double()) if dtype == FP32 else activation(raw.to(dtype)).double()


def judge_y(on: Device, y: Tensor, o: Operands, op: str, eps: float, eps2: float, options: dict[str, Any]) -> None:
    stage = stage_of(op, o.arguments(op, eps, eps2), options)
    expected = reference.stage(o.x, o.weight, o.bias, o.gate, o.residual, eps, stage)
    if never_rounds(stage.steps):
        arguments = (o.x, o.weight, o.bias, factor_in_fp64(o.gate, stage), o.residual, eps)
        on.assert_precise("y", y, expected, in_fp64("norm_tanh_mul_add", arguments, options))
        return
    p = expected.float() - o.residual.float()
    magnitude = torch.maximum(torch.maximum(p.abs(), o.residual.float().abs()), expected.float().abs())
    if o.bias is not None:  # it cancels, as the residual does
        gate = factor_in_fp64(o.gate, stage)
        share = o.bias.float().abs() * (1.0 if gate is None else gate.float().abs())
        magnitude = torch.maximum(magnitude, share.expand_as(magnitude))
    most = may_differ(on, y, options["rounding"], stage.norm)
    on.assert_follows("y", y, expected, magnitude, Y_STEPS, coarsest_dtype(stage.steps, y), most)


def judge_z(
    on: Device,
    z: Tensor,
    read: Tensor,
    parameters: tuple[Tensor | None, ...],
    eps: float,
    options: dict[str, Any],
) -> None:
    """read: what the norm of z reads, x or the kernel's own y; parameters: its weight, bias and scale."""
    arguments = (read, *parameters, eps)
    options = accepted("norm_scale", options)
    stage = stage_of("norm_scale", arguments, options)
    weight, bias, scale = parameters
    expected = reference.stage(read, weight, bias, scale, None, eps, stage)
    if never_rounds(stage.steps):
        wide = (read, weight, bias, factor_in_fp64(scale, stage), eps)
        on.assert_precise("z", z, expected, in_fp64("norm_scale", wide, options))
        return
    magnitude = expected.float().abs()
    if bias is not None:  # it cancels, as a residual does
        share = bias.float().abs() * (1.0 if scale is None else (1 + scale.float()).abs())
        magnitude = torch.maximum(magnitude, share.expand_as(magnitude))
    most = may_differ(on, z, options["rounding"], stage.norm)
    on.assert_follows("z", z, expected, magnitude, Z_STEPS, coarsest_dtype(stage.steps, z), most)


def may_differ(on: Device, out: Tensor, form: str, norm: str) -> float:
    """How many elements may differ from the definition."""
    if norm == "layer" or out.dtype == FP32:
        return math.inf
    # Single elements of a small tensor are no measurement of a share. In `native` a statistic is one 16-bit number,
    # and one that falls the other way takes its row along.
    spare = 2 + (2 * out.shape[-1] if form == "native" else 0)
    return DIFFERING[out.dtype] * out.numel() + spare + on.tied(out)


def judge(
    on: Device,
    op: str,
    o: Operands,
    results: tuple[Tensor, ...],
    eps: float = EPS,
    eps2: float = EPS2,
    **options: Any,
) -> None:
    """Judges the results of an op."""
    options = accepted(op, {"norm": "rms", "rounding": "cast_then_weight", **options})
    with on.eager():
        if op != "norm_scale":
            judge_y(on, results[0], o, op, eps, eps2, options)
        if op == "norm_scale":
            judge_z(on, results[0], o.x, (o.weight, o.bias, o.scale), eps, options)
        elif op == DUAL:
            of_z = {**options, "norm_dtype": options.get("norm_dtype2")}
            judge_z(on, results[1], results[0], (o.weight2, o.bias2, o.scale), eps2, of_z)


def check(on: Device, op: str, o: Operands, eps: float = EPS, eps2: float = EPS2, **options: Any) -> tuple[Tensor, ...]:
    """Runs an op and judges its results; gives them back."""
    options = {"norm": "rms", "rounding": "cast_then_weight", **options}
    results = on.run(op, *o.arguments(op, eps, eps2), **accepted(op, options))
    judge(on, op, o, results, eps, eps2, **options)
    return results
