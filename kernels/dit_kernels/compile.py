"""Compiled kernels: finds the kernel that a call needs, and keeps the kernels of this process in a table.

`bound` finds the kernel that runs a chain on given operands. `prepare` compiles that kernel ahead of time.

A kernel is compiled for an architecture and a Variant: the chain, D, and for each tensor its dtype, how it broadcasts,
its number of heads and the alignment of its addresses. B, S, strides and eps are run-time arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import cutlass.cute as cute
import torch
import tvm_ffi  # noqa: F401  slow, so imported here, and not by load_module at the first kernel
from cutlass import Float32, Float64, Int32, Int64
from cutlass.cute.runtime import make_fake_stream, make_ptr

from dit_kernels import kernel_cache
from dit_kernels.arguments import EPS
from dit_kernels.cute.arith import CUTE_DTYPES
from dit_kernels.cute.spec import TensorSpec, specs_of
from dit_kernels.families.family import Family, KernelArguments

Function = Callable[..., None]


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for, apart from the architecture. specs: those of the family's tensors, in order."""

    family: Family
    chain: Any
    d: int  # the last dimension of the first operand
    specs: tuple[TensorSpec | None, ...]

    @property
    def named(self) -> dict[str, TensorSpec | None]:
        return {argument.name: spec for argument, spec in zip(self.family.tensors, self.specs, strict=True)}

    def tiling(self, arch: str) -> Any:
        return self.family.tiling(self.chain, self.d, self.named, arch)


# --- what a call needs ----------------------------------------------------------------------------------------------


def bound(family: Family, chain: Any, operands: KernelArguments) -> tuple[Function, tuple[int, ...]]:
    """The kernel that runs a chain on these operands, and the numbers that it is launched with.

    operands: the result of `Call.operands`. Each tensor is bf16, fp16 or fp32, independently of the others; a rotation
    may also be complex. The last stride is 1. The other strides of inputs and of `placed` results are arbitrary;
    other results are contiguous.

    function(*addresses, *numbers, *of_launch, stream) launches the kernel on the current device and never waits for the
    GPU. numbers and of_launch are the family's. The function also takes other tensors, if their dtypes, D, number of
    heads, dimensions of size 1, and alignment of pointers and strides are the same.

    A kernel that is not compiled yet is compiled here. While a CUDA graph is captured, RuntimeError is raised instead.
    """
    index = operands.device.index
    function = KERNELS.get(_arch(0 if index is None else index), _variant(family, chain, operands))
    return function, family.launch_numbers(operands.values)


def run(family: Family, chain: Any, operands: KernelArguments) -> tuple[Function, tuple[int, ...]]:
    """Launches the kernel of a chain on torch's current stream on the operands' device. Returns what `bound` does."""
    function, numbers = bound(family, chain, operands)
    with torch.cuda.device(operands.device):
        device, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
        function(*operands.addresses(), *numbers, *family.of_launch(device, stream, numbers[0]), stream)
    return function, numbers


def prepare(family: Family, chain: Any, operands: KernelArguments) -> None:
    """Compiles the kernel that `bound` will need for these operands, which may be fake tensors with symbolic B and S.

    Pointers are assumed to be aligned to 16 bytes, as torch's allocator aligns them. No guard is added.
    """
    index = operands.device.index
    arch = _arch(torch.cuda.current_device() if index is None else index)
    KERNELS.get(arch, _variant(family, chain, operands))


def _variant(family: Family, chain: Any, operands: KernelArguments) -> Variant:
    d = int(operands.values[family.arguments[0].name].shape[-1])
    return Variant(family, chain, d, specs_of(family.tensors, operands.values, d))


@cache
def _arch(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


class KernelTable:
    """The kernels of a process. Each is compiled once, also if several threads need it."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, Variant], Function] = {}
        self.compiling = threading.Lock()

    def get(self, arch: str, variant: Variant) -> Function:
        """The kernel from this table, from disk, or newly compiled.

        While a CUDA graph is captured, raises RuntimeError if the table does not have the kernel.
        """
        function = self.functions.get((arch, variant))
        if function is not None:
            return function
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "dit_kernels: the kernel for this call is not compiled yet, and nothing can be compiled while a CUDA "
                "graph is captured; run the call once before the capture"
            )
        with self.compiling:
            if (arch, variant) not in self.functions:
                compiled = kernel_cache.load_or_compile(arch, variant, lambda: compile_variant(arch, variant))
                self.functions[arch, variant] = compiled
            return self.functions[arch, variant]


KERNELS = KernelTable()


# --- compilation ----------------------------------------------------------------------------------------------------

# LLVM narrows bf16(fp32(a) * fp32(b)) to a bf16 product, which is the same number. By default ptxas would then contract
# this product and the following sum into one fma, which is a different number: 17% of y differed.
_PTXAS = "-fmad=false"


def compile_variant(arch: str, variant: Variant, options: str = "") -> Any:
    """Compiles a kernel for `arch` (sm_80, sm_90a, ...). Needs neither a GPU nor a driver."""
    family, named = variant.family, variant.named
    kernel = family.kernel()(family.arguments, variant.chain, variant.d, named, variant.tiling(arch))
    arguments = (Float32(0.0) if a.role is EPS else _fake_pointer(named[a.name]) for a in family.arguments)
    numbers = (Int32(0), Int32(0), *(Int64(0) for _ in range(family.numbers)), *(kind(0) for kind in kernel.of_launch))
    return cute.compile(
        kernel,
        *arguments,
        *numbers,
        make_fake_stream(),
        options=f"--gpu-arch {arch} --enable-tvm-ffi --ptxas-options {_PTXAS} {options}",
    )


def _fake_pointer(spec: TensorSpec | None) -> Any:
    if spec is None:
        return None
    real = spec.dtype.to_real()  # a complex number is two real numbers
    dtype, align = Float64 if real == torch.float64 else CUTE_DTYPES[real], spec.access
    return make_ptr(dtype, align, cute.AddressSpace.gmem, assumed_align=align)
