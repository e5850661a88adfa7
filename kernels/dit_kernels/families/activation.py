"""Activations of rows: silu(a) * b (SwiGLU), stored or quantised, and gelu(a) and x itself, quantised.

a and b are [..., S, D] with any strides, e.g. halves of one tensor. A quantised row may start with the elements of
another tensor, before: [..., S, E].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_kernels import reference
from dit_kernels.arguments import PART, QUANT_OPTIONS, ROW, Argument, Option, dtype_option, known, reject
from dit_kernels.chain import ActivationChain
from dit_kernels.cute.tiling import (
    WIDEST_JOINED_ROW,
    WIDEST_PLAIN_ROW,
    RowTiling,
    VectorTiling,
    plain_row_tiling,
    vector_tiling,
)
from dit_kernels.families.family import Family, Named, Op, Shaped, quant_options, quantised_results
from dit_kernels.families.rows import FP8_GRAIN, QUANTISED, RowFamily, can_be_quantised, quantising
from dit_kernels.rounding import ACTIVATION_FORMS, ActivationSteps, activation_steps

_steps = lru_cache(maxsize=None)(activation_steps)


def steps_of(options: Named, a: torch.dtype, b: torch.dtype | None) -> ActivationSteps:
    """The steps of act(a) * b that the options of an op describe. b: None if there is no product."""
    out = options.get("out_dtype")
    activated = options.get("silu_dtype", out)  # without a product, the activation is rounded once
    return _steps(options.get("rounding", "model"), a, b, activated, out)


class Activation(Family):
    """Computes an ActivationChain, element by element."""

    arguments: tuple[Argument, ...] = (
        Argument("a", ROW, inlined=True),
        Argument("b", ROW, inlined=True),
        Argument("out", ROW, written=True, placed=True),
    )

    def chain(self, op: Op, named: Named, options: Named) -> ActivationChain:
        assert isinstance(op, ActivationOp)
        b = named.get("b")
        steps = steps_of(options, named["a"].dtype, None if b is None else b.dtype)
        if not op.quantises:
            return ActivationChain(op.act(options), steps)
        return ActivationChain(op.act(options), steps, quant_options(options, steps.out), keeps="out" in op.arguments)

    def results(self, chain: ActivationChain, named: Named) -> tuple[Shaped, ...]:
        return ((named["a"].shape, chain.steps.out),)

    def definition(self, chain: ActivationChain, named: Named) -> tuple[Tensor, ...]:
        return (reference.activation(named["a"], named.get("b"), chain.act, chain.steps),)

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.activation import ActivationKernel

        return ActivationKernel

    def tiling(self, chain: ActivationChain, d: int, specs: Named, arch: str) -> VectorTiling | RowTiling:
        return vector_tiling(d, min(specs[name].dtype.itemsize for name in ("a", "b")))


class QuantisedActivation(RowFamily, Activation):
    """Computes an ActivationChain and quantises the row [before, result], or the result alone.

    before: [..., S, E] in the dtype of the result.
    """

    arguments = (
        *Activation.arguments[:2],
        Argument("before", PART, optional=True, defaulted=True, inlined=True),
        *Activation.arguments[2:],
        *QUANTISED,
    )

    def check(self, op: Op, named: Named, options: Named) -> None:
        """Both parts of a row have one dtype."""
        before, out = named.get("before"), self.chain(op, named, options).steps.out
        if before is not None and before.dtype != out:
            reject(op.name, "before.dtype", before.dtype, f"{out}, the dtype of the result")

    def results(self, chain: ActivationChain, named: Named) -> tuple[Shaped, ...]:
        assert chain.quant is not None
        stored = super().results(chain, named) if chain.keeps else ()
        *sizes, d = named["a"].shape
        return (*stored, *quantised_results((*sizes, d + _width(named.get("before"))), chain.quant))

    def definition(self, chain: ActivationChain, named: Named) -> tuple[Tensor, ...]:
        assert chain.quant is not None
        (z,) = super().definition(chain, named)
        before = named.get("before")
        row = z if before is None else torch.cat((before, z), -1)
        quantised = reference.quantised(row, chain.quant, named.get("static_scale"))
        return (z, *quantised) if chain.keeps else quantised

    def fits_kernel(self, chain: ActivationChain, named: Named) -> bool:
        d, more, joined = named["a"].shape[-1], _width(named.get("before")), named.get("before") is not None
        read = (named.get(name) for name in ("a", "b", "before"))
        widths = [t.dtype.itemsize for t in read if t is not None] + [chain.steps.out.itemsize]
        fits = can_be_quantised(d + more, widths, WIDEST_JOINED_ROW if joined else WIDEST_PLAIN_ROW)
        if joined:
            fits = fits and known(d % FP8_GRAIN == 0) and known(more > 0)
        return fits and super().fits_kernel(chain, named)

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.activation import QuantisedActivationKernel

        return QuantisedActivationKernel

    def tiling(self, chain: ActivationChain, d: int, specs: Named, arch: str) -> RowTiling:
        rows = [spec for name in ("a", "b", "before") if (spec := specs[name]) is not None]
        before = specs["before"]
        return plain_row_tiling(d, [spec.dtype.itemsize for spec in rows], 0 if before is None else before.width or d)


def _width(part: Tensor | None) -> Any:
    """The elements of a row of a part; 0 if there is none."""
    return 0 if part is None else part.shape[-1]


# --- the ops --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationOp(Op):
    """An op that applies an activation. activation: "identity", "silu" or "gelu"."""

    activation: str = ""

    def act(self, options: Named) -> str:
        """The activation of a call: one of rounding.ACTIVATIONS."""
        return f"{self.activation}_tanh" if options.get("approximate") == "tanh" else self.activation


_ROUNDING, _OUT = Option("rounding", "str", "model", ACTIVATION_FORMS), dtype_option("out_dtype")
_SILU = (_ROUNDING, dtype_option("silu_dtype"), _OUT)
_GELU = (Option("approximate", "str", "none", ("none", "tanh")), _ROUNDING, _OUT)
_PLAIN, _QUANTISED = Activation(), QuantisedActivation()
SILU_MUL = ActivationOp("silu_mul", _PLAIN, ("a", "b", "out"), _SILU, activation="silu")
GELU = ActivationOp("gelu", _PLAIN, ("a", "out"), _GELU, activation="gelu")  # no op: Inductor's kernel is as fast
OPS = (
    SILU_MUL,
    *quantising(SILU_MUL, _QUANTISED, ("before",)),
    *quantising(GELU, _QUANTISED, ("before",)),
    ActivationOp(
        "quant", _QUANTISED, ("a", "q", "s"), QUANT_OPTIONS, {"a": "x"}, quantises=True, activation="identity"
    ),
)
