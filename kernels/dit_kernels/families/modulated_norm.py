"""Norms with a factor and a term: term + act(factor) * norm(v), once or twice in a row.

    y = residual + tanh(gate) * norm(x)
    z = norm(y) * (1 + scale)
    q, s = quantised(z)

x and residual are [..., S, D]; weight and bias are [D] or None; gate and scale are None or broadcast to x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_kernels import reference
from dit_kernels.arguments import (
    COLUMN,
    EPS,
    MODULATION,
    ROW,
    Argument,
    Option,
    dtype_option,
    reject,
)
from dit_kernels.chain import GATED, SCALED, SECOND, NormChain, Stage, StageNames
from dit_kernels.cute.tiling import WIDEST_ROW, RowTiling, row_tiling
from dit_kernels.families.family import Named, Op, Shaped, quant_options, quantised_results
from dit_kernels.families.rows import QUANTISED, RowFamily, are_copied_in_bulk, can_be_quantised, quantising
from dit_kernels.rounding import FORMS, NORMS, ROOTS, stage_steps

_steps = lru_cache(maxsize=None)(stage_steps)


class ModulatedNorm(RowFamily):
    """Computes a NormChain over one row. An op has a result for each stage; q and s in place of the last or behind it,
    if it quantises."""

    arguments = (
        Argument("x", ROW),
        Argument("weight", COLUMN, optional=True),
        Argument("bias", COLUMN, optional=True),
        Argument("gate", MODULATION, optional=True, inlined=True),
        Argument("residual", ROW),
        Argument("eps", EPS),
        Argument("weight2", COLUMN, optional=True),
        Argument("bias2", COLUMN, optional=True),
        Argument("scale", MODULATION, optional=True, inlined=True),
        Argument("eps2", EPS),
        Argument("y", ROW, written=True),
        Argument("z", ROW, written=True),
        *QUANTISED,
    )

    def check(self, op: Op, named: Named, options: Named) -> None:
        """A layer norm has one spelling of its root."""
        if options["norm"] == "layer" and options["root"] != "rsqrt":
            reject(op.name, "root", repr(options["root"]), "'rsqrt' with norm='layer'")

    def chain(self, op: Op, named: Named, options: Named) -> NormChain:
        assert isinstance(op, NormOp)
        stages: list[Stage] = []
        read = named["x"].dtype
        for names in op.stages:
            factor = named[names.factor]
            steps = _steps(
                options["rounding"],
                options["norm"],
                read,
                _dtype(named[names.weight]),
                _dtype(named[names.bias]),
                None if factor is None or factor.ndim == 0 else factor.dtype,
                None if names.term is None else named[names.term].dtype,
                options[names.out_dtype],
                options[names.norm_dtype],
                options["root"],
            )
            active = factor is not None and options[names.switch]
            stages.append(Stage(options["norm"], names.activation if active else None, steps, names))
            read = steps.out
        if not op.quantises:
            return NormChain(tuple(stages))
        return NormChain(tuple(stages), quant_options(options, read), keeps=op.stages[-1].out in op.arguments)

    def results(self, chain: NormChain, named: Named) -> tuple[Shaped, ...]:
        shape = named["x"].shape
        stored = tuple((shape, stage.steps.out) for stage in chain.stages)
        if chain.quant is None:
            return stored
        return (*stored[: None if chain.keeps else -1], *quantised_results(shape, chain.quant))

    def definition(self, chain: NormChain, named: Named) -> tuple[Tensor, ...]:
        results, read = [], named["x"]
        for stage in chain.stages:
            n = stage.names
            term = None if n.term is None else named[n.term]
            # Contiguous, like the returned results: the last bit of the next norm's sums depends on the layout.
            read = reference.stage(
                read, named[n.weight], named[n.bias], named[n.factor], term, named[n.eps], stage
            ).contiguous()
            results.append(read)
        if chain.quant is None:
            return tuple(results)
        quantised = reference.quantised(read, chain.quant, named.get("static_scale"))
        return (*results[: None if chain.keeps else -1], *quantised)

    def fits_kernel(self, chain: NormChain, named: Named) -> bool:
        # A 0-d operand does not promote. With a dtype other than x's, it makes a different chain, seen in no model.
        modulations = (named.get(argument.name) for argument in self.arguments if argument.role is MODULATION)
        scalars = (t for t in modulations if t is not None and t.ndim == 0)
        if not all(t.dtype == named["x"].dtype for t in scalars):
            return False
        if chain.quant is not None:
            x, *terms = (named[name] for name in ("x", *(stage.names.term for stage in chain.stages)) if name)
            dtypes = [t.dtype for t in (x, *terms)] + [stage.steps.out for stage in chain.stages]
            if not can_be_quantised(x.shape[-1], [dtype.itemsize for dtype in dtypes], WIDEST_ROW):
                return False
        return super().fits_kernel(chain, named)

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.modulated_norm import ModulatedNormKernel

        return ModulatedNormKernel

    def tiling(self, chain: NormChain, d: int, specs: Named, arch: str) -> RowTiling:
        rows = [spec for a in self.arguments if a.role is ROW and not a.written and (spec := specs[a.name]) is not None]
        factors = [specs[stage.names.factor] for stage in chain.stages]
        walks = all(spec is None or spec.walk != "token" for spec in factors)
        # A CTA that takes one row loads the parameters of the second norm later.
        loaded = [width for stage in chain.stages[: None if walks else 1] for width in _held_widths(stage, specs)]
        widths = [spec.dtype.itemsize for spec in rows]
        # Of two stages, z takes the registers of y.
        kept = 0 if chain.quant is None or len(chain.stages) > 1 else chain.stages[-1].steps.out.itemsize
        moved = len(rows), len(chain.stages)
        return row_tiling(moved, d, widths, loaded, arch, walks, are_copied_in_bulk(rows, d), kept)


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _held_widths(stage: Stage, specs: Named) -> list[int]:
    """Bytes per element, as a kernel keeps it for many rows, of each parameter that is read as vectors."""
    held = []
    for name in (stage.names.weight, stage.names.bias, stage.names.factor):
        spec = specs[name]
        if spec is not None and spec.walk != "element":
            held.append(stage.held_dtype(name, spec.dtype).itemsize)
    return held


# --- the ops --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormOp(Op):
    """An op that computes one or more stages in a row."""

    stages: tuple[StageNames, ...] = ()


def _op(name: str, *stages: StageNames) -> NormOp:
    inputs = [n for s in stages for n in (s.weight, s.bias, s.factor, s.term, s.eps) if n is not None]
    options = (
        Option("norm", "str", "rms", NORMS),
        *(Option(stage.switch, "bool", True) for stage in stages),
        Option("rounding", "str", "cast_then_weight", FORMS),
        *(dtype_option(stage.out_dtype) for stage in stages),
        *(dtype_option(stage.norm_dtype) for stage in stages),
        Option("root", "str", "rsqrt", ROOTS),
    )
    return NormOp(name, FAMILY, ("x", *inputs, *(stage.out for stage in stages)), options, stages=stages)


FAMILY = ModulatedNorm()
NORM_TANH_MUL_ADD_NORM_SCALE = _op("norm_tanh_mul_add_norm_scale", GATED, SECOND)
NORM_SCALE = _op("norm_scale", SCALED)
OPS = (
    _op("norm_tanh_mul_add", GATED),
    NORM_TANH_MUL_ADD_NORM_SCALE,
    NORM_SCALE,
    *quantising(NORM_TANH_MUL_ADD_NORM_SCALE, FAMILY),
    *quantising(NORM_SCALE, FAMILY),
)
