"""silu(x @ w_gate) * (x @ w_up) or gelu(x @ w + bias) by quack's GEMM, with the activation where it stores a tile.

For a product, the GEMM multiplies x by one matrix whose rows are those of w_gate and w_up in turn. So each thread has
both numbers of an element of the result. The matrix is a view: its rows are two, one in each weight, times N. Between
the two is the difference of the weights' addresses, which a tensor map takes as a stride if it is positive. So the
weight at the lower address comes first. `up_first` says whether that is w_up.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from quack.cute_dsl_utils import mlir_namedtuple
from quack.epilogue.mixin import ComposableEpiMixin
from quack.epilogue.ops import RowVecLoad, Scalar, TileStore
from quack.gemm_sm90 import GemmSm90
from quack.gemm_sm100 import GemmSm100
from quack.gemm_sm120 import GemmSm120
from quack.rounding import RoundingMode
from quack.tile_scheduler import TileSchedulerOptions

from dit_kernels.cute.activation import activation
from dit_kernels.cute.arith import CUTE_DTYPES, rounded, widen, words_of
from dit_kernels.cute.kernel import Kernel

GEMMS = {9: GemmSm90, 10: GemmSm100, 12: GemmSm120}


class _Epilogue(ComposableEpiMixin):
    """What the two epilogues share. chain: a LinearChain."""

    _extra_param_fields = (
        ("split_k_semaphore", cute.Tensor | None, None),
        ("split_k_workspace", cute.Tensor | None, None),
    )

    def epi_to_underlying_arguments(self, args, *, loc=None, ip=None):
        self.rounding_mode = RoundingMode.RN
        return self.EpilogueParams(**self._epi_ops_to_params_dict(args), split_k_semaphore=None, split_k_workspace=None)


class ProductEpilogue(_Epilogue):
    """act(R(gate)) * R(up), stored as `out`. The accumulator has gate and up in turn, or up and gate if `up_first`."""

    _epi_ops = (Scalar("up_first", dtype=Int32), TileStore("out", gated=True))

    @mlir_namedtuple
    class EpilogueArguments(NamedTuple):
        up_first: Int32 | None = None
        out: cute.Tensor | None = None
        add_to_output: cutlass.Constexpr[bool] = False

    @cute.jit
    def epi_visit_subtile(self, params, epi_loop_tensors, tRS_rD, tRS_rC=None):
        up_first = epi_loop_tensors["up_first"]
        pairs = cute.flat_divide(tRS_rD, cute.make_layout(2))
        even, odd = (rounded_sums(pairs[i, ...], self.chain) for i in (0, 1))
        gate, up = chosen(up_first, odd, even), chosen(up_first, even, odd)
        out = cute.make_rmem_tensor(cute.recast_layout(2, 1, tRS_rD.layout).shape, self.acc_dtype)
        result = widen(activation(gate, up, self.chain))
        flat = cute.make_tensor(out.iterator, cute.make_layout(cute.size(out)))
        flat.store(result)
        return (out,)


class PlainEpilogue(_Epilogue):
    """act(R(sum + bias)), stored as D."""

    _epi_ops = (RowVecLoad("bias"),)

    @mlir_namedtuple
    class EpilogueArguments(NamedTuple):
        bias: cute.Tensor | None = None
        add_to_output: cutlass.Constexpr[bool] = False

    @cute.jit
    def epi_visit_subtile(self, params, epi_loop_tensors, tRS_rD, tRS_rC=None):
        bias = epi_loop_tensors.get("bias")
        if const_expr(bias is not None):
            for i in cutlass.range(cute.size(tRS_rD), unroll_full=True):
                tRS_rD[i] = tRS_rD[i] + bias[i]
        flat = cute.make_tensor(tRS_rD.iterator, cute.make_layout(cute.size(tRS_rD)))
        flat.store(widen(activation(rounded_sums(flat, self.chain), None, self.chain)))
        return ()


def rounded_sums(sums, chain):
    """R(sums), as a vector. sums: registers in fp32."""
    flat = cute.make_rmem_tensor(cute.size(sums), Float32)
    for i in range(cute.size(sums)):
        flat[i] = sums[i]
    return rounded(flat.load(), chain.linear)


def chosen(condition: Int32, a, b):
    """The vector a if the condition is 1, and b if it is 0."""
    left, right = words_of(a), words_of(b)
    result = cute.make_rmem_tensor(a.shape, a.dtype)
    words = cute.recast_tensor(result, Int32)
    for i in range(cute.size(words)):
        words[i] = right[i] ^ ((left[i] ^ right[i]) & -condition)
    return result.load()


class LinearKernel(Kernel):
    """The kernel of a LinearChain."""

    of_launch = (Int32,)  # the number of multiprocessors

    def launch(self, operands, batches, tokens, strides, of_launch, stream) -> None:
        (processors,) = of_launch
        (major, t), k = self.tiling, self.d
        n = self.specs["out"].width or k
        dtype = CUTE_DTYPES[self.specs["x"].dtype]

        def rows(name: str, width: int):
            return cute.make_tensor(
                operands[name], cute.make_layout((tokens, width), stride=(_aligned(strides[name][1]), 1))
            )

        x, out = rows("x", k), rows("out", n)
        if const_expr(operands["w_up"] is not None):
            w, up_first = self.both_weights(operands, strides, n)
            epilogue, arguments, stored = ProductEpilogue, {"up_first": up_first, "out": out}, None
        else:
            w = cute.make_tensor(operands["w"], cute.make_layout((n, k), stride=(_aligned(strides["w"][0]), 1)))
            bias = operands["bias"]
            bias = None if const_expr(bias is None) else cute.make_tensor(bias, cute.make_layout((n,)))
            epilogue, arguments, stored = PlainEpilogue, {"bias": bias}, out
        kind = type(f"{epilogue.__name__}Sm{major}0", (epilogue, GEMMS[major]), {})
        more = {"pingpong": t.pingpong} if major in (9, 12) else {}
        gemm = kind(Float32, dtype, (t.tile_m, t.tile_n), (t.cluster_m, t.cluster_n, 1), **more)
        gemm.chain = self.chain
        gemm(
            x,
            w,
            stored,
            None,
            epilogue.EpilogueArguments(**arguments),
            TileSchedulerOptions(max_active_clusters=processors // (t.cluster_m * t.cluster_n)),
            None,
            stream,
            None,
            None,
        )

    def both_weights(self, operands, strides, n: int):
        """The rows of both weights in turn, and whether the first one is w_up's."""
        gate, up = (operands[name].toint() for name in ("w", "w_up"))
        far = cutlass.max(up - gate, gate - up) // (operands["w"].dtype.width // 8)
        first = cute.make_ptr(
            operands["w"].dtype, cutlass.min(gate, up), cute.AddressSpace.gmem, assumed_align=operands["w"].alignment
        )
        layout = cute.make_layout(((2, n), self.d), stride=((_aligned(far), _aligned(strides["w"][0])), 1))
        return cute.make_tensor(first, layout), Int32(up < gate)


def _aligned(stride: Int64):
    """A stride in elements of 16 bits, which is a multiple of 16 bytes."""
    return cute.assume(stride, divby=8)
