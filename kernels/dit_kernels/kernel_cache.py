"""The cache of compiled kernels on disk.

The directory is $DIT_KERNELS_CACHE_DIR, or dit_kernels in $XDG_CACHE_HOME or ~/.cache. It holds machine code, so it is
used only if nobody but the user can write to it, and nobody else can put another directory in its place. On Windows,
permissions are not checked. The name of an entry is a hash of everything that determines the kernel: versions, sources,
architecture and variant. An entry ends with a digest of its name and its content. It is read once, so the bytes that
were checked are loaded. An entry that cannot be read back, or that was made under another name, is deleted and compiled
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from dit_kernels.versions import hash_of_sources
from dit_kernels.warn import warn_once

Function = Callable[..., None]

_ENTRY_POINT = "dit_kernel"  # the name under which every entry exports its function
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.(o|json|note)")
_DIGEST_BYTES = 32
_LOCK_SECONDS = 120.0


class Unusable(Exception):
    """The cache cannot be used, or not for this kernel."""


def cache_directory() -> Path:
    chosen = os.environ.get("DIT_KERNELS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "dit_kernels"
    try:
        return Path.home() / ".cache" / "dit_kernels"
    except RuntimeError as error:  # a user ID without a user name, as in some containers
        raise Unusable(f"{error} Set DIT_KERNELS_CACHE_DIR") from error


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
    module = sys.modules.get("cutlass._mlir._mlir_libs._cutlass_ir")
    if module is None:
        raise Unusable("this version of CuTeDSL does not say which compiler it has loaded")
    return Path(module.__file__ or "").name


@cache
def source_hash() -> str:
    """A hash of the sources of this package: kernels, tilings, and the code that chooses them."""
    return hash_of_sources(Path(__file__).parent)


def load_or_compile(arch: str, variant: Any, compile: Callable[[], Function]) -> Function:
    """Loads a kernel from disk, or compiles and stores it. If the cache cannot be used, warns once and compiles."""
    compile = cache(compile)  # so that a kernel that cannot be stored is not compiled twice
    try:
        entry = _open_directory(cache_directory()) / entry_name(arch, variant)
        function = _load(entry)
        if function is not None:
            return function
        # If several processes need the entry, one compiles it; the others wait and load it.
        with FileLock(entry.with_name("lock"), timeout=_LOCK_SECONDS, mode=0o600):
            return _load(entry) or _store(entry, compile())
    # filelock.Timeout is an OSError; filelock raises NotImplementedError on a file system without locks
    except (OSError, Unusable, PackageNotFoundError, NotImplementedError) as error:
        warn_once(f"dit_kernels: kernels are not kept on disk: {error}", RuntimeWarning, subject="kernels on disk")
    return compile()


def kept_json(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A JSON object from disk, or made and stored. If the cache cannot be used, warns once and makes the object.

    name: 64 hexadecimal digits and ".json". As with kernels, an object that cannot be read back is made again, and if
    several processes need the object, one makes it, and the others wait and read it. What `make` raises is raised.
    """
    entry, found = None, None
    with ExitStack() as stack:
        try:
            entry = _open_directory(cache_directory()) / name
            found = _load_json(entry)
            if found is None:
                # Not the lock of the kernels: a kernel may be compiled meanwhile.
                lock = FileLock(entry.with_name("choices.lock"), timeout=_LOCK_SECONDS, mode=0o600)
                stack.enter_context(lock)
                found = _load_json(entry)
        except (OSError, Unusable, NotImplementedError) as error:
            _warn_of_choices(error)
            entry = None
        if found is None:
            found = make()
            if entry is not None:
                try:
                    _write(entry, json.dumps(found).encode())
                except OSError as error:
                    _warn_of_choices(error)
    return found


def note(name: str) -> None:
    """Keeps a note on disk, if that is possible. name: 64 hexadecimal digits and ".note"."""
    with suppress(OSError, Unusable):
        _write(_open_directory(cache_directory()) / name, b"")


def notes() -> list[str]:
    """The names of all notes on disk."""
    with suppress(OSError, Unusable):
        directory = cache_directory()
        _check_usable(directory)
        return [path.name for path, _ in _entries(directory) if path.suffix == ".note"]
    return []


def _warn_of_choices(error: Exception) -> None:
    warn_once(f"dit_kernels: choices are not kept on disk: {error}", RuntimeWarning, subject="choices on disk")


def load_module(path: str, **options: bool) -> Any:
    """CuTeDSL's loader. Imported late: the cache can be looked at, and cleared, where CuTeDSL does not load."""
    from cutlass.cute.runtime import load_module as load

    return load(path, **options)


# --- what is in the cache -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """The entries on disk. problem: why the cache cannot be used; None if it can be."""

    directory: str | None
    files: int
    bytes: int
    problem: str | None


def contents() -> Contents:
    """What the cache holds. Makes no directory and writes nothing."""
    try:
        directory = cache_directory()
    except Unusable as error:
        return Contents(None, 0, 0, str(error))
    sizes: list[int] = []
    problem = None
    try:
        _check_usable(directory)
        sizes = [status.st_size for _, status in _entries(directory)]
    except (OSError, Unusable) as error:
        problem = str(error)
    return Contents(str(directory), len(sizes), sum(sizes), problem)


def clear() -> Contents:
    """Deletes the entries, and nothing else. Returns what is deleted.

    Raises Unusable if others can write to the directory, and OSError if an entry cannot be deleted.
    """
    directory = cache_directory()
    sizes = []
    if directory.exists():
        directory = directory.resolve()
        _check_directory(directory)
        for entry, status in _entries(directory):
            entry.unlink(missing_ok=True)  # follows no link
            sizes.append(status.st_size)
    return Contents(str(directory), len(sizes), sum(sizes), None)


def _entries(directory: Path) -> list[tuple[Path, os.stat_result]]:
    """The entries with their status: regular files, named as entries are, that belong to the user."""
    found = []
    for path in sorted(directory.iterdir()) if directory.exists() else ():
        if _ENTRY_NAME.fullmatch(path.name):
            with suppress(OSError, Unusable):  # it is gone meanwhile; or it is none of ours
                status = path.lstat()
                _check_entry(path, status)
                found.append((path, status))
    return found


def _check_usable(directory: Path) -> None:
    """Raises Unusable or OSError if no kernel can be kept there. A directory that does not exist yet can be made."""
    directory = directory.resolve()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if existing == directory:
        _check_directory(directory)
    elif existing == directory.parent:
        _check_parent(existing)
    if not existing.is_dir():
        raise Unusable(f"{existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Unusable(f"{existing} cannot be written to")


# --- the directory --------------------------------------------------------------------------------------------------


def _open_directory(directory: Path) -> Path:
    """The directory with its symbolic links resolved. It and its parent are made if they do not exist."""
    for missing in (directory.parent, directory):
        missing.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = directory.resolve()
    _check_directory(directory)
    return directory


def _check_directory(directory: Path) -> None:
    """Raises Unusable if others can write to a directory, or can put another one in its place."""
    if not directory.is_dir():
        raise Unusable(f"{directory} is not a directory")
    _check_parent(directory.parent)
    _check_trusted(directory, directory.stat())


def _check_parent(parent: Path) -> None:
    # Who can write to the parent can put another directory in place of ours. In a sticky parent, as /tmp is, only the
    # owners of the two can.
    status = parent.stat()
    _check_trusted(parent, status, owners=(0,), writable=bool(status.st_mode & stat.S_ISVTX))


def _check_trusted(path: Path, status: os.stat_result, owners: tuple[int, ...] = (), writable: bool = False) -> None:
    """Raises Unusable if others can write to a path. owners: who may own it besides the user; writable: others may."""
    user = getattr(os, "geteuid", None)
    if user is None:  # Windows: status tells neither the owner nor who can write
        return
    if status.st_uid not in (user(), *owners):
        raise Unusable(f"{path} belongs to another user")
    if status.st_mode & 0o022 and not writable:
        raise Unusable(f"{path} can be written by others than its owner; run chmod go-w on it")


# --- an entry -------------------------------------------------------------------------------------------------------


def _load(entry: Path) -> Function | None:
    """The function of an entry; None if there is no entry. Deletes an entry that cannot be read back."""
    try:
        code = _checked(entry)
    except FileNotFoundError:
        return None
    if code is not None:
        with _private_copy(code, entry.parent) as path:
            try:
                function: Function = load_module(path, enable_tvm_ffi=True)[_ENTRY_POINT]
                return function
            except Exception as error:  # CuTeDSL's loader may raise anything; the kernel can be compiled again
                message = f"dit_kernels: {entry} does not load and is compiled anew: {error}"
                warn_once(message, RuntimeWarning, subject="a kernel on disk that does not load")
    entry.unlink(missing_ok=True)
    return None


def _read(entry: Path) -> bytes:
    _check_entry(entry, entry.lstat())
    with open(entry, "rb", opener=_open_file) as file:
        _check_entry(entry, os.fstat(file.fileno()))  # again: by now the path may lead to another file
        return file.read()


def _open_file(path: str, flags: int) -> int:
    """Opens a file for `open`: without waiting for a fifo's other end, and, where the system can, following no link."""
    for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    return os.open(path, flags)


def _check_entry(entry: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Unusable(f"{entry} is not a regular file")
    _check_trusted(entry, status)


@contextmanager
def _private_copy(code: bytes, directory: Path) -> Iterator[str]:
    """The path of a copy that nobody else can change: in memory, as Linux offers it, or else in a new directory."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(os.memfd_create("dit_kernel"), "wb"))
            path = f"/proc/self/fd/{file.fileno()}"
            os.stat(path)  # raises OSError where /proc is not mounted
        except (AttributeError, OSError):
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=directory))  # mode 0700
            path = os.path.join(folder, "kernel.o")
            file = stack.enter_context(open(path, "wb"))
        file.write(code)
        file.flush()
        yield path


def _digest(name: str, code: bytes) -> bytes:
    return hashlib.sha256(name.encode() + code).digest()


def _load_json(entry: Path) -> dict[str, Any] | None:
    """The object of an entry; None if there is no entry. Deletes an entry that cannot be read back."""
    try:
        content = _checked(entry)
    except FileNotFoundError:
        return None
    if content is not None:
        found: dict[str, Any] = json.loads(content)
        return found
    entry.unlink(missing_ok=True)
    return None


def _checked(entry: Path) -> bytes | None:
    """The content of an entry; None if its digest is not that of the content."""
    content = _read(entry)
    content, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return content if digest == _digest(entry.name, content) else None


def _write(entry: Path, content: bytes) -> None:
    """Writes an entry, with its digest, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=entry.parent) as scratch:  # mode 0700; on the entry's file system
        draft = Path(scratch) / entry.name
        draft.write_bytes(content + _digest(entry.name, content))
        draft.chmod(0o600)
        os.replace(draft, entry)


def _store(entry: Path, compiled: Any) -> Function:
    with tempfile.TemporaryDirectory(dir=entry.parent) as scratch:  # mode 0700; on the entry's file system
        draft = Path(scratch) / entry.name
        try:
            compiled.export_to_c(str(draft), function_name=_ENTRY_POINT)
        except Exception as error:  # CuTeDSL may raise anything; the kernel itself is compiled
            raise Unusable(f"CuTeDSL does not export a kernel: {error}") from error
        code = draft.read_bytes()
    _write(entry, code)
    return _load(entry) or compiled  # the loaded function costs less to call and to keep than `compiled`
