"""The cache of compiled kernels on disk.

The directory is $DIT_KERNELS_CACHE_DIR, or dit_kernels in $XDG_CACHE_HOME or ~/.cache. It holds machine code, so it is
used only if nobody but the user can write to it. The name of an entry is a hash of everything that determines the
kernel: versions, sources, architecture and variant. An entry ends with a digest of its name and its content. An entry
that cannot be read back, or that was made under another name, is deleted and compiled again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cutlass.cute.runtime import load_module
from filelock import FileLock

from dit_kernels.warn import warn_once

Function = Callable[..., None]

_ENTRY_POINT = "dit_kernel"  # the name under which every entry exports its function
_DIGEST_BYTES = 32
_LOCK_SECONDS = 120.0


class Untrusted(Exception):
    """There is no cache that only the user can have written."""


def cache_directory() -> Path:
    chosen = os.environ.get("DIT_KERNELS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "dit_kernels"
    try:
        return Path.home() / ".cache" / "dit_kernels"
    except RuntimeError as error:  # a user ID without a user name, as in some containers
        raise Untrusted(f"{error} Set DIT_KERNELS_CACHE_DIR") from error


def entry_name(arch: str, variant: Any) -> str:
    """The file name of a kernel. variant: what the kernel is compiled for. Different variants have different reprs."""
    return hashlib.sha256("\n".join((*_versions(), source_hash(), arch, repr(variant))).encode()).hexdigest() + ".o"


@cache
def _versions() -> tuple[str, ...]:
    """What an entry depends on besides our own sources. An entry has host code, which calls CuTeDSL's libraries."""
    packages = [f"{name} {version(name)}" for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi")]
    return (*packages, f"toolkit {_toolkit()}", platform.system(), platform.machine())


def _toolkit() -> str:
    """Which compiler CuTeDSL has loaded. It has one per major version of CUDA and chooses by the driver's version."""
    return Path(sys.modules["cutlass._mlir._mlir_libs._cutlass_ir"].__file__ or "").name


@cache
def source_hash(package: Path = Path(__file__).parent) -> str:
    """A hash of every source file of a package: kernels, tilings, and the code that chooses them."""
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + source.read_bytes())
    return digest.hexdigest()


def load_or_compile(arch: str, variant: Any, compile: Callable[[], Function]) -> Function:
    """Loads a kernel from disk, or compiles and stores it. Without a usable cache, warns and compiles the kernel."""
    try:
        name, directory = entry_name(arch, variant), _open_directory(cache_directory())
        function = _load(directory / name)
        if function is not None:
            return function
        # If several processes need the entry, one compiles it; the others wait and load it.
        with FileLock(directory / "lock", timeout=_LOCK_SECONDS, mode=0o600):
            return _load(directory / name) or _store(directory / name, compile())
    except (OSError, Untrusted, PackageNotFoundError) as error:  # filelock.Timeout is an OSError
        warn_once(f"dit_kernels: kernels are not kept on disk: {error}", RuntimeWarning)
    return compile()


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
    """The function of an entry; None if there is no entry. Deletes an entry that cannot be read back."""
    try:
        with entry.open("rb") as file:
            _check_trusted(entry, os.fstat(file.fileno()))
            content = file.read()
    except FileNotFoundError:
        return None
    if content[-_DIGEST_BYTES:] == _digest(entry.name, content[:-_DIGEST_BYTES]):
        try:
            function: Function = load_module(str(entry), enable_tvm_ffi=True)[_ENTRY_POINT]
            return function
        except Exception as error:  # CuTeDSL's loader may raise anything; the kernel can be compiled again
            warn_once(f"dit_kernels: {entry} does not load and is compiled anew: {error}", RuntimeWarning)
    entry.unlink(missing_ok=True)
    return None


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()


def _store(entry: Path, compiled: Any) -> Function:
    with tempfile.TemporaryDirectory(dir=entry.parent) as scratch:  # mode 0700; on the entry's file system
        draft = Path(scratch) / entry.name
        compiled.export_to_c(str(draft), function_name=_ENTRY_POINT)
        with draft.open("ab") as file:  # an ELF object is read by its headers, so bytes after it are ignored
            file.write(_digest(entry.name, draft.read_bytes()))
        draft.chmod(0o600)
        os.replace(draft, entry)
    return _load(entry) or compiled  # the loaded function costs less to call and to keep than `compiled`
