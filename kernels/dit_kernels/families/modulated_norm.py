"""Norms with a factor and a term: term + act(factor) * norm(v), once or twice in a row.

    y = residual + tanh(gate) * norm(x)        or y = residual + gate * x
    z = norm(y) * (1 + scale) + shift
    q, s = quantised(z)

x and residual are [..., S, D]; weight and bias are [D] or None; gate, scale and shift are None or broadcast to x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
from dit_kernels.chain import GATED, SCALED, SECOND, UNNORMED, NormChain, Stage, StageNames
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
        Argument("shift", MODULATION, optional=True, defaulted=True, inlined=True),
        Argument("y", ROW, written=True),
        Argument("z", ROW, written=True),
        *QUANTISED,
    )

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The names of the rows that are read."""
        return tuple(argument.name for argument in self.arguments if argument.role is ROW and not argument.written)

    def check(self, op: Op, named: Named, options: Named) -> None:
        """A layer norm has one spelling of its root."""
        if options["norm"] == "layer" and options["root"] != "rsqrt":
            reject(op.name, "root", repr(options["root"]), "'rsqrt' with norm='layer'")

    def chain(self, op: Op, named: Named, options: Named) -> NormChain:
        assert isinstance(op, NormOp)
        stages: list[Stage] = []
        read = named["x"].dtype
        for names in op.stages:
            norm = options["norm"] if names.has_norm else None
            steps = _steps(
                options["rounding"],
                norm,
                read,
                _dtype(named.get(names.weight)),
                _dtype(named.get(names.bias)),
                _promoting_dtype(named[names.factor]),
                _promoting_dtype(named[names.term]),
                options[names.out_dtype],
                options.get(names.norm_dtype),
                options["root"],
            )
            active = named[names.factor] is not None and options[names.switch]
            stages.append(Stage(norm, names.activation if active else None, steps, names))
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
            weight, bias, factor, term, eps = (named.get(name) for name in (n.weight, n.bias, n.factor, n.term, n.eps))
            # Contiguous, like the returned results: the last bit of the next norm's sums depends on the layout.
            read = reference.stage(read, weight, bias, factor, term, eps, stage).contiguous()
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
            rows = (named.get(name) for name in self.rows)
            dtypes = [t.dtype for t in rows if t is not None] + [stage.steps.out for stage in chain.stages]
            if not can_be_quantised(named["x"].shape[-1], [dtype.itemsize for dtype in dtypes], WIDEST_ROW):
                return False
        return super().fits_kernel(chain, named)

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.modulated_norm import ModulatedNormKernel

        return ModulatedNormKernel

    def tiling(self, chain: NormChain, d: int, specs: Named, arch: str) -> RowTiling:
        rows = [spec for name in self.rows if (spec := specs[name]) is not None]
        modulations = [specs[argument.name] for argument in self.arguments if argument.role is MODULATION]
        walks = all(spec is None or spec.walk != "token" for spec in modulations)
        # A CTA that takes one row loads the parameters of the second norm later.
        loaded = [width for stage in chain.stages[: None if walks else 1] for width in _held_widths(stage, specs)]
        widths = [spec.dtype.itemsize for spec in rows]
        # Of two stages, z takes the registers of y.
        kept = 0 if chain.quant is None or len(chain.stages) > 1 else chain.stages[-1].steps.out.itemsize
        moved = len(rows), len(chain.stages)
        return row_tiling(moved, d, widths, loaded, arch, walks, are_copied_in_bulk(rows, d), kept)


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _promoting_dtype(t: Tensor | None) -> torch.dtype | None:
    """The dtype of an operand in type promotion: a 0-d one does not promote."""
    return None if t is None or t.ndim == 0 else t.dtype


def _held_widths(stage: Stage, specs: Named) -> list[int]:
    """Bytes per element, as a kernel keeps it for many rows, of each parameter that is read as vectors."""
    held = []
    names = stage.names
    for name in (names.weight, names.bias, names.factor, *(() if names.term in FAMILY.rows else (names.term,))):
        spec = specs.get(name)
        if spec is not None and spec.walk != "element":
            held.append(stage.held_dtype(name, spec.dtype).itemsize)
    return held


# --- the ops --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormOp(Op):
    """An op that computes one or more stages in a row."""

    stages: tuple[StageNames, ...] = ()


def _op(name: str, *stages: StageNames) -> NormOp:
    inputs = [n for s in stages for n in (s.weight, s.bias, s.factor, s.term, s.eps) if n]
    inputs.sort(key=lambda name: FAMILY.named[name].defaulted)  # stable: defaulted arguments come last
    options = (
        Option("norm", "str", "rms", NORMS),
        *(Option(stage.switch, "bool", stage.activates) for stage in stages),
        Option("rounding", "str", "cast_then_weight", FORMS),
        *(dtype_option(stage.out_dtype) for stage in stages),
        *(dtype_option(stage.norm_dtype) for stage in stages if stage.has_norm),
        Option("root", "str", "rsqrt", ROOTS),
    )
    return NormOp(name, FAMILY, ("x", *inputs, *(stage.out for stage in stages)), options, stages=stages)


FAMILY = ModulatedNorm()
NORM_TANH_MUL_ADD_NORM_SCALE = _op("norm_tanh_mul_add_norm_scale", GATED, SECOND)
MUL_ADD_NORM_SCALE = _op("mul_add_norm_scale", UNNORMED, SCALED)
NORM_SCALE = _op("norm_scale", SCALED)
OPS = (
    _op("norm_tanh_mul_add", GATED),
    NORM_TANH_MUL_ADD_NORM_SCALE,
    MUL_ADD_NORM_SCALE,
    NORM_SCALE,
    *quantising(NORM_TANH_MUL_ADD_NORM_SCALE, FAMILY),
    *quantising(MUL_ADD_NORM_SCALE, FAMILY),
    *quantising(NORM_SCALE, FAMILY),
)
