"""A norm, for one vector: what the vector adds to a sum over the row, and its normalised value.

Plain Python: these functions run while a kernel is traced. Values are those of `arith`. mean is None in an rms norm.
Any parameter may be None.
"""

from __future__ import annotations

import cutlass.cute as cute
import torch
from cutlass import Float32

from dit_kernels.cute.arith import add, product, rounded, total, widen
from dit_kernels.rounding import NormSteps


def sum_of(value) -> Float32:
    return widen(value).reduce(cute.ReductionOp.ADD, init_val=0.0, reduction_profile=0)


def square(x, mean, stat: torch.dtype):
    centred = x if mean is None else widen(x) - mean
    return product(centred, centred, stat)


def rstd_of(mean_square: Float32, eps: Float32, root: str, stat: torch.dtype) -> Float32:
    """The number that x is multiplied by, or divided by if root is "quotient"."""
    v = rounded(add(rounded(mean_square, stat), eps), stat)
    if root == "rsqrt":
        return rounded(cute.math.rsqrt(v), stat)
    root_of_v = rounded(cute.math.sqrt(v), stat)
    return root_of_v if root == "quotient" else rounded(Float32(1.0) / root_of_v, stat)


def normed(x, mean, rstd, weight, bias, steps: NormSteps):
    x = widen(x)
    centred = x if mean is None else x - mean
    n = rounded(centred / rstd if steps.root == "quotient" else centred * rstd, steps.normed)
    if weight is not None:
        n = product(n, weight, steps.weighted)
    if bias is not None:
        # In eager, too, a layer norm is one kernel, which contracts.
        contracts = mean is not None and steps.biased == torch.float32
        n = widen(n) + widen(bias) if contracts else total(n, bias, steps.biased)
    return rounded(n, steps.out)
