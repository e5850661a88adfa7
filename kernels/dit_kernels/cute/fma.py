"""a * b + c, rounded once. For the places that want an fma; nothing else may be contracted."""

from __future__ import annotations

from cutlass import Float32, Float64
from cutlass.cute.arch.nvvm_wrappers import inline_ptx
from cutlass.cutlass_dsl import dsl_user_op


@dsl_user_op
def fma32(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    fma = "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};"
    return inline_ptx(fma, write_only_types=[Float32], read_only_args=[a, b, c], loc=loc, ip=ip)


@dsl_user_op
def fma64(a: Float64, b: Float64, c: Float64, *, loc=None, ip=None) -> Float64:
    fma = "fma.rn.f64 {$w0}, {$r0}, {$r1}, {$r2};"
    return inline_ptx(fma, write_only_types=[Float64], read_only_args=[a, b, c], loc=loc, ip=ip)
