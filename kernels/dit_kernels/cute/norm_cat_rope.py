"""The rms norms of the heads of two streams, which are joined and rotated. Each head is read and written once.

The kernel is that of `norm_rope.py`, over the tokens of both streams. A thread works on the heads of one token, and so
reads only the tensors of the stream that has the token.
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64
from cutlass.cute.arch.nvvm_wrappers import inline_ptx
from cutlass.cutlass_dsl import dsl_user_op

from dit_kernels.cute.norm_rope import Global, HeadPlace, NormRopeKernel


@dsl_user_op
def _number(condition: Boolean, yes, no, *, loc=None, ip=None):
    """One of two numbers of the same type. As PTX, since LLVM would select between the addresses of two parameters of
    the kernel, and load the parameter through a register."""
    kind = "f32" if type(no) is Float32 else "b64"
    selp = f"selp.{kind} {{$w0}}, {{$r0}}, {{$r1}}, {{$r2}};"
    return inline_ptx(selp, write_only_types=[type(no)], read_only_args=[yes, no, condition], loc=loc, ip=ip)


def _select(condition: Boolean, yes: Global, no: Global, by: Int64 | int = 0) -> Global:
    """One of two tensors of the same dtype and number of heads. by: how far, in elements, `no` starts earlier."""
    spec = min(yes.spec, no.spec, key=lambda spec: spec.access)
    addresses = yes.pointer.toint(), no.pointer.toint() - by * spec.dtype.itemsize
    address = _number(condition, *map(Int64, addresses))
    pointer = cute.make_ptr(yes.pointer.dtype, address, cute.AddressSpace.gmem, assumed_align=spec.access)
    pairs = zip(yes.strides, no.strides, strict=True)
    return Global(pointer, spec, tuple(_number(condition, *map(Int64, strides)) for strides in pairs))


class NormCatRopeKernel(NormRopeKernel):
    """The kernel of a RotatedChain over two streams."""

    def all_tokens(self, tokens: Int32, strides: dict[str, Any]) -> Int32:
        return tokens + Int32(strides["q_before"][0])

    def _is_before(self, strides: dict[str, Any], place: HeadPlace) -> Boolean:
        return place.token < strides["q_before"][0]

    def eps(self, operands: dict[str, Any], strides: dict[str, Any], place: HeadPlace) -> dict[str, Float32]:
        before, later = ({x: operands[f"{x}{stream}_eps"] for x in "qk"} for stream in ("_before", ""))
        condition = self._is_before(strides, place)
        return {x: _number(condition, Float32(before[x]), Float32(later[x])) for x in "qk"}

    def bundle(self, operands: dict[str, Any], strides: dict[str, Any], place: HeadPlace) -> dict[str, Global | None]:
        """For a token of the later stream, the tensors start earlier by the tokens of the other stream: then `token`
        counts the tokens of both."""
        tokens, condition = strides["q_before"][0], self._is_before(strides, place)
        heads_before = {name: numbers[1:] for name, numbers in strides.items() if name.endswith("_before")}
        tensors = super().bundle(operands, strides | heads_before, place)
        for x in "qk":
            before, later = tensors[f"{x}_before"], tensors[x]
            assert before is not None and later is not None
            tensors[x] = _select(condition, before, later, tokens * later.strides[1])
            before, later = tensors[f"{x}_before_weight"], tensors[f"{x}_weight"]
            if before is not None and later is not None:
                tensors[f"{x}_weight"] = _select(condition, before, later)
        return tensors
