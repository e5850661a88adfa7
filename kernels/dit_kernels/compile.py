"""Compiled kernels: which one a call needs, the table of those in this process, and the cache of those on disk.

`bound` finds the kernel that runs a chain on tensors; `prepare` compiles ahead what such operands will need.

A kernel is compiled for an architecture and a Variant: the chain, D, and of each operand its dtype, how it broadcasts,
its number of heads and what its addresses are multiples of. B, S, strides and eps are run-time arguments. The families
of kernels, of which the type of a chain tells one, are listed in _KERNELS.

The disk cache is $DIT_KERNELS_CACHE_DIR, or dit_kernels in $XDG_CACHE_HOME or ~/.cache. What it holds is machine code,
so it is used only where nobody but the user can write. The name of an entry is a hash of all that shapes it: versions,
sources, arch, variant. An entry ends in a digest of its name and itself; one that does not read back, or was made under
another name, is thrown away and compiled anew.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cutlass.cute as cute
import torch
import tvm_ffi  # noqa: F401  here, with all that takes long to import, and not in load_module, at the first kernel
from cutlass import Float32, Float64, Int32, Int64
from cutlass.cute.runtime import load_module, make_fake_stream, make_ptr
from filelock import FileLock
from torch import Tensor

from dit_kernels.calls import norm_gate as norm_gate_call
from dit_kernels.calls import norm_rope as norm_rope_call
from dit_kernels.calls import silu_mul as silu_mul_call
from dit_kernels.calls.call import Family
from dit_kernels.chain import Chain, RotatedChain, SiluChain
from dit_kernels.cute.arith import CUTE_DTYPES
from dit_kernels.cute.heads import HeadTiling, head_tiling
from dit_kernels.cute.norm_gate import NormGate, Operands, held_dtype
from dit_kernels.cute.norm_rope import NormRope, RopeOperands
from dit_kernels.cute.operand import Operand
from dit_kernels.cute.silu_mul import SiluMul, SiluOperands, VectorTiling, vector_tiling
from dit_kernels.cute.tiling import ACCESS_BYTES, RowTiling, row_tiling

Function = Callable[..., None]
Facts = tuple[Any, ...]  # the fields of an Operand


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for, apart from the architecture."""

    chain: Any  # of the type that _KERNELS knows its family by
    d: int  # the last dimension of the first operand
    operands: Any  # the Operands of the family

    def tiling(self, arch: str) -> Any:
        return _KERNELS[type(self.chain)].tiling(self, arch)


@dataclass(frozen=True)
class Kernels:
    """A family of kernels, to compile and to launch."""

    family: Family
    kernel: Callable[..., Any]  # of chain, d, operands and tiling; called with what the family is launched with
    operands: Callable[..., Any]  # an Operand, or None, for each tensor among the family's arguments
    tiling: Callable[[Variant, str], Any]  # for an architecture
    strides: int  # among the launch numbers, behind B and S
    broadcast: tuple[str, ...] = ()  # operands that a kernel is compiled to read once for several tokens or elements
    of_launch: tuple[Any, ...] = ()  # the CuTe types of what the family gives each launch

    def facts(self, named: Mapping[str, Any], of: Callable[[Any, bool, int], Facts]) -> tuple[Facts | None, ...]:
        """What is compiled for, of each operand that is a tensor; None of those that are absent."""
        d = int(named[self.family.arguments[0]].shape[-1])
        present = ((name, t) for name, t in named.items() if "eps" not in name)
        return tuple(None if t is None else of(t, name in self.broadcast, d) for name, t in present)


# --- what a call needs ----------------------------------------------------------------------------------------------

_kernels: dict[tuple[Any, ...], Function] = {}  # by what `bound` can read off its arguments cheaply
_functions: dict[tuple[str, Variant], Function] = {}
_compiling = threading.Lock()


def bound(chain: Any, *operands: Any) -> tuple[Function, tuple[int, ...]]:
    """The kernel that runs a chain on these operands, and the numbers that it is launched with.

    operands: those of the chain's family (`Family.arguments`), as `Call.operands` gives them: tensors, None for those
    that are absent, eps. bf16, fp16 or fp32, each tensor its own, a rotation also complex; the last stride is 1, the
    others of inputs are any; results are contiguous.

    function(*operands, *numbers, *of_launch, stream) launches it on the current device, a tensor given by its address,
    and never waits for the GPU. It takes all tensors that agree with these in dtype, D, number of heads, which
    dimensions are 1, and in what pointers and strides are multiples of; numbers and of_launch are what the family says.
    A kernel that is not compiled yet is compiled here, except under CUDA graph capture: RuntimeError.
    """
    kernels = _KERNELS[type(chain)]
    named = dict(zip(kernels.family.arguments, operands, strict=True))
    device, d = operands[0].get_device(), operands[0].shape[-1]
    key = (chain, device, d, *kernels.facts(named, _facts))
    function = _kernels.get(key)
    if function is None:
        function = _kernels[key] = _function(_arch(device), _variant(kernels, chain, d, key[3:]))
    return function, kernels.family.launch_numbers(named)


def run(chain: Any, *operands: Any) -> None:
    """Runs the kernel of a chain on the operands of `bound`, on torch's current stream of the device of the first."""
    function, numbers = bound(chain, *operands)
    addresses = [t.data_ptr() if isinstance(t, Tensor) else t for t in operands]
    device = operands[0].get_device()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        of_launch = _KERNELS[type(chain)].family.of_launch(device, stream, numbers[0])
        function(*addresses, *numbers, *of_launch, stream)


def prepare(chain: Any, *operands: Any) -> None:
    """Compiles what `bound` with these arguments will ask for: fake CUDA tensors with symbolic B and S will do.

    Pointers are taken to be multiples of 16 bytes, as torch's allocator makes them; no guard is added.
    """
    kernels = _KERNELS[type(chain)]
    named = dict(zip(kernels.family.arguments, operands, strict=True))
    d, index = int(operands[0].shape[-1]), operands[0].device.index
    arch = _arch(torch.cuda.current_device() if index is None else index)
    _function(arch, _variant(kernels, chain, d, kernels.facts(named, _fake_facts)))


def _variant(kernels: Kernels, chain: Any, d: int, facts: Sequence[Facts | None]) -> Variant:
    return Variant(chain, d, kernels.operands(*(f if f is None else Operand(*f) for f in facts)))


def _access(bits: int) -> int:
    """The widest access that is aligned at every multiple of what was or-ed together, in bytes."""
    bits |= ACCESS_BYTES
    return bits & -bits


def _facts(t: Tensor, broadcasts: bool, d: int) -> Facts:
    """The fields of the Operand that a tensor is, in a kernel for rows of d elements."""
    if t.ndim == 1:
        return t.dtype, "column", _access(t.data_ptr())
    if broadcasts and t.shape[2] != d:
        return t.dtype, "element", t.element_size()
    strides = 0
    for size, by in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        strides |= by if size != 1 else 0
    walk = "batch" if broadcasts and t.shape[1] == 1 else "token"
    return t.dtype, walk, _access(t.data_ptr() | strides * t.element_size()), *t.shape[2:-1]


def _fake_facts(t: Tensor, broadcasts: bool, d: int) -> Facts:
    """`_facts` of a tensor whose sizes and strides may be symbols."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    def is_one(size: Any) -> bool:
        return bool(statically_known_true(size == 1))

    if t.ndim == 1:
        return t.dtype, "column", ACCESS_BYTES
    if broadcasts and d != 1 and is_one(t.shape[2]):
        return t.dtype, "element", t.element_size()
    access = ACCESS_BYTES
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        while not is_one(size) and not statically_known_true(stride * t.element_size() % access == 0):
            access //= 2
    walk = "batch" if broadcasts and is_one(t.shape[1]) else "token"
    return t.dtype, walk, access, *(int(heads) for heads in t.shape[2:-1])


@cache
def _arch(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def _function(arch: str, variant: Variant) -> Function:
    function = _functions.get((arch, variant))
    if function is not None:
        return function
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dit_kernels: the kernel for this call is not compiled yet, and nothing can be compiled while a CUDA graph "
            "is captured; run the call once before the capture"
        )
    with _compiling:
        function = _functions.get((arch, variant))
        if function is None:
            function = _functions[arch, variant] = _load_or_compile(arch, variant)
    return function


# --- compilation ----------------------------------------------------------------------------------------------------


# LLVM narrows bf16(fp32(a) * fp32(b)) to a bf16 product, which is the same number; ptxas would then contract the
# product and the sum after it into one fma, which is not: 17% of y differed.
_PTXAS = "-fmad=false"


def compile_variant(arch: str, variant: Variant, options: str = "") -> Any:
    """Compiles for `arch` (sm_80, sm_90a, ...); needs neither a GPU nor a driver."""
    kernels = _KERNELS[type(variant.chain)]
    arguments = (
        Float32(0.0) if "eps" in name else _fake_pointer(getattr(variant.operands, name))
        for name in kernels.family.arguments
    )
    return cute.compile(
        kernels.kernel(variant.chain, variant.d, variant.operands, variant.tiling(arch)),
        *arguments,
        *(Int32(0), Int32(0), *(Int64(0) for _ in range(kernels.strides))),
        *(kind(0) for kind in kernels.of_launch),
        make_fake_stream(),
        options=f"--gpu-arch {arch} --enable-tvm-ffi --ptxas-options {_PTXAS} {options}",
    )


def _fake_pointer(operand: Operand | None) -> Any:
    if operand is None:
        return None
    real = operand.dtype.to_real()  # a complex number is two real ones
    dtype, align = Float64 if real == torch.float64 else CUTE_DTYPES[real], operand.access
    return make_ptr(dtype, align, cute.AddressSpace.gmem, assumed_align=align)


# --- the families ---------------------------------------------------------------------------------------------------


def _row_tiling(variant: Variant, arch: str) -> RowTiling:
    o, chain = variant.operands, variant.chain
    rows = [t for t in (o.x, o.residual) if t is not None]
    walks = all(t is None or t.walk != "token" for t in (o.gate, o.scale))
    loaded = ["weight", "bias", "gate", "weight2", "bias2", "scale"]
    if chain.op == "dual" and not walks:  # of one row, what the second norm takes is loaded later
        loaded = loaded[:3]
    present = [name for name in loaded if (t := getattr(o, name)) is not None and t.walk != "element"]
    held = [held_dtype(chain, o, name) for name in present]
    aligned = all(t.access == ACCESS_BYTES and variant.d * t.dtype.itemsize % ACCESS_BYTES == 0 for t in rows)
    return row_tiling(
        chain.op,
        variant.d,
        [t.dtype.itemsize for t in rows],
        [dtype.itemsize for dtype in held if dtype is not None],
        arch,
        walks,
        aligned,
    )


def _head_tiling(variant: Variant, arch: str) -> HeadTiling:
    o = variant.operands
    dtypes = [t.dtype for t in (o.q, o.k) if t is not None]
    heads = (o.q.heads, 0 if o.k is None else o.k.heads)
    parts = 1 if variant.chain.interleaved else 2
    return head_tiling(variant.d, heads, min(dtype.itemsize for dtype in dtypes), parts)


def _vector_tiling(variant: Variant, arch: str) -> VectorTiling:
    return vector_tiling(variant.d, min(t.dtype.itemsize for t in (variant.operands.a, variant.operands.b)))


_KERNELS: dict[type, Kernels] = {
    Chain: Kernels(
        norm_gate_call.FAMILY,
        NormGate,
        Operands,
        _row_tiling,
        strides=8,
        broadcast=("gate", "scale"),
        of_launch=(Int32, Int64),
    ),
    RotatedChain: Kernels(norm_rope_call.FAMILY, NormRope, RopeOperands, _head_tiling, strides=10),
    SiluChain: Kernels(silu_mul_call.FAMILY, SiluMul, SiluOperands, _vector_tiling, strides=4),
}


# --- the disk cache -------------------------------------------------------------------------------------------------

_ENTRY_POINT = "dit_kernel"  # the name under which every entry exports its function
_DIGEST_BYTES = 32
_LOCK_SECONDS = 120.0


class Untrusted(Exception):
    """There is no place where nobody but the user can have written."""


def cache_directory() -> Path:
    chosen = os.environ.get("DIT_KERNELS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "dit_kernels"
    try:
        return Path.home() / ".cache" / "dit_kernels"
    except RuntimeError as error:  # a user without a name, as in some containers
        raise Untrusted(f"{error} Set DIT_KERNELS_CACHE_DIR") from error


def entry_name(arch: str, variant: Variant) -> str:
    return hashlib.sha256("\n".join((*_versions(), _source_hash(), arch, repr(variant))).encode()).hexdigest() + ".o"


@cache
def _versions() -> tuple[str, ...]:
    """What an entry depends on beside our own sources: it is host code, too, that calls the libraries of CuTeDSL."""
    packages = [f"{name} {version(name)}" for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi")]
    return (*packages, f"toolkit {_toolkit()}", platform.system(), platform.machine())


def _toolkit() -> str:
    """Which of its compilers CuTeDSL has loaded: one for each major version of CUDA, chosen by that of the driver."""
    return Path(sys.modules["cutlass._mlir._mlir_libs._cutlass_ir"].__file__ or "").name


@cache
def _source_hash() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    folders = (here / "cute", here / "calls")  # device code, and what it is called with
    for source in (here / "compile.py", *(path for folder in folders for path in sorted(folder.glob("*.py")))):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def _load_or_compile(arch: str, variant: Variant) -> Function:
    """From disk; else compiled, and put there. A cache that cannot be used costs a warning, never the kernel."""
    try:
        name, directory = entry_name(arch, variant), _open_directory(cache_directory())
        function = _load(directory / name)
        if function is not None:
            return function
        # Of several processes that need the entry, one compiles it and the others wait and load it.
        with FileLock(directory / "lock", timeout=_LOCK_SECONDS, mode=0o600):
            return _load(directory / name) or _compile_into(directory / name, arch, variant)
    except (OSError, Untrusted, PackageNotFoundError) as error:  # filelock.Timeout is an OSError
        _warn_once(f"dit_kernels: kernels are not kept on disk: {error}")
    return compile_variant(arch, variant)


def _open_directory(directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_trusted(directory, directory.stat())
    return directory


def _check_trusted(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise Untrusted(f"{path} belongs to another user")
    if status.st_mode & 0o022:
        raise Untrusted(f"{path} can be written by others than its owner")


def _load(entry: Path) -> Function | None:
    """The function of an entry; None where there is none. One that does not read back is deleted."""
    try:
        with entry.open("rb") as file:
            _check_trusted(entry, os.fstat(file.fileno()))
            content = file.read()
    except FileNotFoundError:
        return None
    if content[-_DIGEST_BYTES:] == _digest(entry.name, content[:-_DIGEST_BYTES]):
        try:
            return load_module(str(entry), enable_tvm_ffi=True)[_ENTRY_POINT]
        except Exception as error:  # whatever the loader of CuTeDSL makes of it, a kernel can be compiled anew
            _warn_once(f"dit_kernels: {entry} does not load and is compiled anew: {error}")
    entry.unlink(missing_ok=True)
    return None


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()


def _compile_into(entry: Path, arch: str, variant: Variant) -> Function:
    compiled = compile_variant(arch, variant)
    with tempfile.TemporaryDirectory(dir=entry.parent) as scratch:  # mode 0700; a rename within one file system
        draft = Path(scratch) / entry.name
        compiled.export_to_c(str(draft), function_name=_ENTRY_POINT)
        with draft.open("ab") as file:  # an ELF object is read by its headers: what follows it is not seen
            file.write(_digest(entry.name, draft.read_bytes()))
        draft.chmod(0o600)
        os.replace(draft, entry)
    return _load(entry) or compiled  # what is loaded is the bare function: it costs less to call and to keep


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
