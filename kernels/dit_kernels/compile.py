"""Compiled kernels: which one a call needs, the table of those in this process, and the cache of those on disk.

`bound` finds the kernel that runs a chain on tensors; `prepare` compiles ahead what such operands will need.

A kernel is compiled for an architecture and a Variant: the chain, D, and of each operand its dtype, how it broadcasts
and what its addresses are multiples of. B, S, strides and eps are run-time arguments.

The disk cache is $DIT_KERNELS_CACHE_DIR, or dit_kernels in $XDG_CACHE_HOME or ~/.cache. What it holds is machine code,
so it is used only where nobody but the user can write. The name of an entry is a hash of all that shapes it: versions,
sources, arch, variant. An entry ends in a digest of its name and itself; one that does not read back, or was made under
another name, is thrown away and compiled anew.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import load_module, make_fake_stream, make_ptr
from filelock import FileLock
from torch import Tensor

from dit_kernels.chain import Chain
from dit_kernels.cute.norm_gate import CUTE_DTYPES, NormGate, Operand, Operands, held_dtype
from dit_kernels.cute.tiling import ACCESS_BYTES, RowTiling, row_tiling
from dit_kernels.direct import launch_numbers

Function = Callable[..., None]
Facts = tuple[torch.dtype, str, int]  # the fields of an Operand


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for, apart from the architecture."""

    chain: Chain
    d: int
    operands: Operands

    def tiling(self, arch: str) -> RowTiling:
        o, chain = self.operands, self.chain
        rows = [t for t in (o.x, o.residual) if t is not None]
        others = {n: getattr(o, n) for n in ("weight", "bias", "gate", "weight2", "bias2", "scale")}
        held = [held_dtype(chain, o, n) for n, t in others.items() if t is not None and t.walk != "element"]
        walks = all(t is None or t.walk != "token" for t in others.values())
        aligned = all(t.access == ACCESS_BYTES and self.d * t.dtype.itemsize % ACCESS_BYTES == 0 for t in rows)
        return row_tiling(
            self.d,
            [t.dtype.itemsize for t in rows],
            [dtype.itemsize for dtype in held if dtype is not None],
            arch,
            walks,
            aligned,
            product=_widest_product(chain),
        )


def _widest_product(chain: Chain) -> str:
    products = {steps.product for steps in (chain.gated, chain.scaled) if steps is not None}
    return "fp32" if torch.float32 in products else "fp16" if torch.float16 in products else "bf16"


# --- what a call needs ----------------------------------------------------------------------------------------------

_kernels: dict[tuple[Any, ...], Function] = {}  # by what `bound` can read off its arguments cheaply
_functions: dict[tuple[str, Variant], Function] = {}
_compiling = threading.Lock()


def bound(
    chain: Chain,
    x: Tensor,  # (B, S, D)
    weight: Tensor | None,  # (D,)
    bias: Tensor | None,  # (D,)
    gate: Tensor | None,  # (1|B, 1|S, D) or (1, 1, 1)
    residual: Tensor | None,  # (B, S, D)
    eps: float,
    weight2: Tensor | None,  # (D,)
    bias2: Tensor | None,  # (D,)
    scale: Tensor | None,  # as gate
    eps2: float,
    y: Tensor | None,  # (B, S, D), contiguous
    z: Tensor | None,  # (B, S, D), contiguous
) -> tuple[Function, tuple[int, ...]]:
    """The kernel that runs a chain on these tensors, and the numbers that it is launched with.

    function(x, ..., z, *numbers, stream) launches it on the current device, a tensor given by its address, and never
    waits for the GPU. It takes all tensors that agree with these in dtype, D, which dimensions are 1, and in what
    pointers and strides are multiples of; the numbers are `launch_numbers` and the number
    of processors.

    bf16, fp16 or fp32, each tensor its own; the last stride is 1, the others of inputs are any. A kernel that is not
    compiled yet is compiled here, except under CUDA graph capture: RuntimeError.
    """
    d, device = x.shape[2], x.get_device()
    key = (
        chain,
        device,
        d,
        _row_facts(x),
        weight if weight is None else _facts(weight, d),
        bias if bias is None else _facts(bias, d),
        gate if gate is None else _facts(gate, d),
        residual if residual is None else _row_facts(residual),
        weight2 if weight2 is None else _facts(weight2, d),
        bias2 if bias2 is None else _facts(bias2, d),
        scale if scale is None else _facts(scale, d),
        y if y is None else _row_facts(y),
        z if z is None else _row_facts(z),
    )
    function = _kernels.get(key)
    if function is None:
        function = _kernels[key] = _function(_arch(device), _variant(chain, d, *key[3:]))
    return function, (*launch_numbers(x, residual, gate, scale), processors(device))


def run(chain: Chain, *operands: Any) -> None:
    """Runs the kernel of a chain on the operands of `bound`, on torch's current stream of the device of x."""
    function, rest = bound(chain, *operands)
    addresses = [t.data_ptr() if isinstance(t, Tensor) else t for t in operands]
    device = operands[0].get_device()
    with torch.cuda.device(device):
        function(*addresses, *rest, torch.cuda.current_stream(device).cuda_stream)


def prepare(
    chain: Chain,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight2: Tensor | None,
    bias2: Tensor | None,
    scale: Tensor | None,
    eps2: float,
    y: Tensor | None,
    z: Tensor | None,
) -> None:
    """Compiles what `bound` with these arguments will ask for: fake CUDA tensors with symbolic B and S will do.

    Pointers are taken to be multiples of 16 bytes, as torch's allocator makes them; no guard is added.
    """
    d = int(x.shape[2])
    index = x.device.index
    arch = _arch(torch.cuda.current_device() if index is None else index)
    facts = [
        None if t is None else _fake_facts(t, d, row=name in ("x", "residual", "y", "z"))
        for name, t in zip(_NAMES, (x, weight, bias, gate, residual, weight2, bias2, scale, y, z), strict=True)
    ]
    _function(arch, _variant(chain, d, *facts))


_NAMES = tuple(field.name for field in fields(Operands))


def _variant(chain: Chain, d: int, *facts: Facts | None) -> Variant:
    return Variant(chain, d, Operands(*(f if f is None else Operand(*f) for f in facts)))  # type: ignore[arg-type]


def _access(bits: int) -> int:
    """The widest access that is aligned at every multiple of what was or-ed together, in bytes."""
    bits |= ACCESS_BYTES
    return bits & -bits


def _row_facts(t: Tensor) -> Facts:
    batches, tokens, _ = t.shape
    by_batch, by_token, _ = t.stride()
    strides = (by_batch if batches != 1 else 0) | (by_token if tokens != 1 else 0)
    return t.dtype, "token", _access(t.data_ptr() | strides * t.element_size())


def _facts(t: Tensor, d: int) -> Facts:
    if t.ndim == 1:
        return t.dtype, "column", _access(t.data_ptr())
    if t.shape[2] != d:
        return t.dtype, "element", t.element_size()
    if t.shape[1] != 1:
        return _row_facts(t)
    by_batch = t.stride(0) if t.shape[0] != 1 else 0
    return t.dtype, "batch", _access(t.data_ptr() | by_batch * t.element_size())


def _fake_facts(t: Tensor, d: int, row: bool) -> Facts:
    """`_row_facts` and `_facts` of a tensor whose sizes and strides may be symbols."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    def is_one(size: Any) -> bool:
        return bool(statically_known_true(size == 1))

    if t.ndim == 1:
        return t.dtype, "column", ACCESS_BYTES
    if not row and d != 1 and is_one(t.shape[2]):
        return t.dtype, "element", t.element_size()
    access = ACCESS_BYTES
    for size, stride in zip(t.shape[:2], t.stride()[:2], strict=True):
        while not is_one(size) and not statically_known_true(stride * t.element_size() % access == 0):
            access //= 2
    return t.dtype, "batch" if not row and is_one(t.shape[1]) else "token", access


@cache
def _arch(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
_PTXAS = "--ptxas-options -fmad=false"


def compile_variant(arch: str, variant: Variant, options: str = "") -> Any:
    """Compiles for `arch` (sm_80, sm_90a, ...); needs neither a GPU nor a driver."""
    kernel = NormGate(variant.chain, variant.d, variant.operands, variant.tiling(arch))
    pointers = {name: _fake_pointer(getattr(variant.operands, name)) for name in _NAMES}
    p, number = pointers.get, [Int32(0), Int32(0), *(Int64(0) for _ in range(8)), Int32(0)]
    return cute.compile(
        kernel,
        *(p("x"), p("weight"), p("bias"), p("gate"), p("residual"), Float32(0.0)),
        *(p("weight2"), p("bias2"), p("scale"), Float32(0.0), p("y"), p("z"), *number),
        make_fake_stream(),
        options=f"--gpu-arch {arch} --enable-tvm-ffi {_PTXAS} {options}",
    )


def _fake_pointer(operand: Operand | None) -> Any:
    if operand is None:
        return None
    dtype, align = CUTE_DTYPES[operand.dtype], operand.access
    return make_ptr(dtype, align, cute.AddressSpace.gmem, assumed_align=align)


# --- the disk cache -------------------------------------------------------------------------------------------------

_ENTRY_POINT = "norm_gate"  # the name under which every entry exports its function
_DIGEST_BYTES = 32
_LOCK_SECONDS = 120.0


class Untrusted(Exception):
    """Somebody other than the user may have written there."""


def cache_directory() -> Path:
    chosen = os.environ.get("DIT_KERNELS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_kernels"


def entry_name(arch: str, variant: Variant) -> str:
    return hashlib.sha256("\n".join((*_versions(), _source_hash(), arch, repr(variant))).encode()).hexdigest() + ".o"


@cache
def _versions() -> tuple[str, ...]:
    """What an entry depends on beside our own sources: it is host code, too, that calls the libraries of CuTeDSL."""
    packages = [f"{name} {version(name)}" for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi")]
    return (*packages, f"cuda {(torch.version.cuda or 'none').split('.')[0]}", platform.system(), platform.machine())


@cache
def _source_hash() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in (here / "compile.py", *sorted((here / "cute").glob("*.py"))):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def _load_or_compile(arch: str, variant: Variant) -> Function:
    """From disk; else compiled, and put there. A cache that cannot be used costs a warning, never the kernel."""
    name = entry_name(arch, variant)
    try:
        directory = _open_directory(cache_directory())
        function = _load(directory / name)
        if function is not None:
            return function
        # Of several processes that need the entry, one compiles it and the others wait and load it.
        with FileLock(directory / "lock", timeout=_LOCK_SECONDS, mode=0o600):
            return _load(directory / name) or _compile_into(directory / name, arch, variant)
    except (OSError, Untrusted) as error:  # filelock.Timeout is an OSError
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
