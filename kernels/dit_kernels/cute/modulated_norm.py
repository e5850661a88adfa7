"""The kernels of a NormChain: one stage, or two over the same row.

    y = residual + tanh(gate) * norm(x)        or y = residual + gate * x
    z = norm(y) * (1 + scale) + shift
    q, s = quantised(z)

A row that fits in registers (`RowTiling.resident`) is read once. All its loads are issued before the first reduction. y
stays in registers in its stored dtype, and the second norm reads y from there. So does z if it is quantised. A wider
row is read again in each pass, mostly from L2, and is not quantised.

If the factors and the shift are the same for every row of a batch item, a CTA walks over rows of one item and keeps
tanh(gate), 1 + scale, shift and the weights in registers. Otherwise a CTA takes one row.
"""

from __future__ import annotations

from typing import Any

from dit_kernels.cute.rows import RowKernel, Shared
from dit_kernels.cute.stage import Kept, NoNorm, Norm, Reader, RowPlace, factor_of, write


class ModulatedNormKernel(RowKernel):
    """The kernels of a NormChain."""

    norms = 2

    def shared(self, operands: dict[str, Any], place: RowPlace) -> Shared:
        return _Parameters(self, operands, place)

    def run(self, place: RowPlace, rows: dict[str, Reader], parameters: _Parameters, operands, partials) -> None:
        """Computes the chain on the row at `place`."""
        stages = self.chain.stages

        def norm_of(i: int) -> Norm | NoNorm:
            if stages[i].norm is None:
                return NoNorm()
            return Norm(stages[i], *parameters.columns[i], place, partials[None, None, i])

        read, norm = rows["x"], norm_of(0)
        moments = norm.moments(read)
        for i, stage in enumerate(stages):
            norm.finish(moments, read, operands.get(stage.names.eps))
            stored = operands[stage.names.out] is not None
            out = self.writer(operands, stage.names.out, place) if stored else Kept(place)
            following = norm_of(i + 1) if i + 1 < len(stages) else None
            term = rows.get(stage.names.term, parameters.terms[i])
            moments = write(stage, norm, read, parameters.factors[i], term, out, following)
            read, norm = out, following or norm
        if self.chain.quant is not None:
            self.quantise([(read, self.writer(operands, "q", place))], operands, partials)


class _Parameters(Shared):
    """The factors, weights, biases and shifts of each stage."""

    def __init__(self, kernel: ModulatedNormKernel, operands: dict[str, Any], place: RowPlace):
        self.stages, self.specs, tiling = kernel.chain.stages, kernel.specs, kernel.tiling
        # A CTA that takes one row does not load the parameters of a later norm ahead. They would take registers that
        # another CTA can use meanwhile.
        ahead = [tiling.ahead and (i == 0 or tiling.schedule is not None) for i in range(len(self.stages))]

        def parameter(name: str, ahead: bool) -> Reader:
            return Reader.of(operands.get(name), self.specs.get(name), place, ahead)

        pairs = list(zip(self.stages, ahead, strict=True))
        self.factors = [factor_of(stage, operands, self.specs, place, early) for stage, early in pairs]
        self.columns = [(parameter(s.names.weight, early), parameter(s.names.bias, early)) for s, early in pairs]
        rows = kernel.row_names
        self.terms = [None if s.names.term in rows else parameter(s.names.term, early) for s, early in pairs]

    def hold(self) -> None:
        """Activates the factors once, for all following rows."""
        for stage, factor in zip(self.stages, self.factors, strict=True):
            spec = self.specs[stage.names.factor]
            if spec is not None:
                factor.hold(stage.held_dtype(stage.names.factor, spec.dtype))
