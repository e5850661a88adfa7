"""Activations of rows: silu(a) * b (SwiGLU), stored or quantised.

a and b are [..., S, D] with any strides, e.g. halves of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from dit_kernels import reference
from dit_kernels.arguments import ROW, Argument, Option, dtype_option
from dit_kernels.chain import SiluChain
from dit_kernels.cute.tiling import WIDEST_PLAIN_ROW, RowTiling, VectorTiling, plain_row_tiling, vector_tiling
from dit_kernels.families.family import Family, Named, Op, Shaped, quant_options, quantised_results
from dit_kernels.families.rows import QUANTISED, RowFamily, can_be_quantised, quantising
from dit_kernels.rounding import SILU_FORMS, silu_steps

_steps = lru_cache(maxsize=None)(silu_steps)


class Activation(Family):
    """Computes a SiluChain, element by element."""

    arguments: tuple[Argument, ...] = (
        Argument("a", ROW, inlined=True),
        Argument("b", ROW, inlined=True),
        Argument("out", ROW, written=True, placed=True),
    )

    def chain(self, op: Op, named: Named, options: Named) -> SiluChain:
        a, b = named["a"].dtype, named["b"].dtype
        steps = _steps(options["rounding"], a, b, options["silu_dtype"], options["out_dtype"])
        if not op.quantises:
            return SiluChain(steps)
        return SiluChain(steps, quant_options(options, steps.out), keeps="out" in op.arguments)

    def results(self, chain: SiluChain, named: Named) -> tuple[Shaped, ...]:
        return ((named["a"].shape, chain.steps.out),)

    def definition(self, chain: SiluChain, named: Named) -> tuple[Tensor, ...]:
        return (reference.silu_mul(named["a"], named["b"], chain.steps),)

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.activation import SiluMulKernel

        return SiluMulKernel

    def tiling(self, chain: SiluChain, d: int, specs: Named, arch: str) -> VectorTiling | RowTiling:
        return vector_tiling(d, min(specs[name].dtype.itemsize for name in ("a", "b")))


class QuantisedActivation(RowFamily, Activation):
    """Computes a SiluChain and quantises it, row by row."""

    arguments = (*Activation.arguments, *QUANTISED)

    def results(self, chain: SiluChain, named: Named) -> tuple[Shaped, ...]:
        assert chain.quant is not None
        stored = super().results(chain, named) if chain.keeps else ()
        return (*stored, *quantised_results(named["a"].shape, chain.quant))

    def definition(self, chain: SiluChain, named: Named) -> tuple[Tensor, ...]:
        assert chain.quant is not None
        (z,) = super().definition(chain, named)
        quantised = reference.quantised(z, chain.quant, named.get("static_scale"))
        return (z, *quantised) if chain.keeps else quantised

    def fits_kernel(self, chain: SiluChain, named: Named) -> bool:
        widths = [named["a"].dtype.itemsize, named["b"].dtype.itemsize, chain.steps.out.itemsize]
        fits = can_be_quantised(named["a"].shape[-1], widths, WIDEST_PLAIN_ROW)
        return fits and super().fits_kernel(chain, named)

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.activation import SiluMulQuantKernel

        return SiluMulQuantKernel

    def tiling(self, chain: SiluChain, d: int, specs: Named, arch: str) -> RowTiling:
        return plain_row_tiling(d, [specs[name].dtype.itemsize for name in ("a", "b")])


_OPTIONS = (Option("rounding", "str", "model", SILU_FORMS), dtype_option("silu_dtype"), dtype_option("out_dtype"))
SILU_MUL = Op("silu_mul", Activation(), ("a", "b", "out"), _OPTIONS)
OPS = (SILU_MUL, *quantising(SILU_MUL, QuantisedActivation()))
