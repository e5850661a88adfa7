"""The disk cache of compiled kernels: what it keeps, what it refuses, and that it never costs a call its kernel."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from kernel_variants import variant as variant_of

from dit_kernels import compile as kernels
from dit_kernels import kernel_cache, warn
from dit_kernels.chain import SCALED, NormChain, Stage
from dit_kernels.compile import Variant
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.families.modulated_norm import FAMILY
from dit_kernels.rounding import stage_steps

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has other owners, modes and kinds of files")
root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give a file away")

ARCH = "sm_90a"
BF16 = torch.bfloat16


def variant(d: int = 256) -> Variant:
    row = TensorSpec(BF16, "token", 16)
    stage = Stage("rms", None, stage_steps("fp32", "rms", BF16, None, None, None, None), SCALED)
    return variant_of(FAMILY, NormChain((stage,)), d, x=row, z=row)


compiled_once = cache(
    kernels.compile_variant
)  # the tests are about what is kept of a kernel: one compilation serves all


@pytest.fixture(autouse=True)
def _compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compile_variant", compiled_once)


def load_or_compile(arch: str, variant: Variant) -> object:
    return kernel_cache.load_or_compile(arch, variant, lambda: kernels.compile_variant(arch, variant))


def loads(*sizes: int) -> bool:
    """Is there a kernel for each of these D in turn?"""
    return all(callable(load_or_compile(ARCH, variant(d))) for d in sizes)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory that does not exist yet."""
    path = tmp_path / "kernels"
    monkeypatch.setenv("DIT_KERNELS_CACHE_DIR", str(path))
    warn.warn_once.cache_clear()
    yield path
    warn.warn_once.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures of the compilations that happen."""
    seen = []

    def counting(arch: str, variant: Variant) -> object:
        seen.append(arch)
        return compiled_once(arch, variant)

    monkeypatch.setattr(kernels, "compile_variant", counting)
    return seen


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.o"))


def test_a_kernel_is_compiled_once_and_then_loaded(directory: Path, compilations: list[str]) -> None:
    for _ in range(3):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH]
    assert [entry.name for entry in entries(directory)] == [kernel_cache.entry_name(ARCH, variant())]


@posix
def test_directory_and_entries_belong_to_the_user_alone(directory: Path) -> None:
    load_or_compile(ARCH, variant())
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in directory.iterdir()} == {0}


def test_nothing_but_entries_and_the_lock_is_left_behind(directory: Path) -> None:
    load_or_compile(ARCH, variant())
    assert {path.name for path in directory.iterdir()} <= {kernel_cache.entry_name(ARCH, variant()), "lock"}


@pytest.mark.parametrize("damage", ["cut short", "changed", "emptied", "not an object"])
def test_a_corrupt_entry_is_thrown_away_and_compiled_anew(
    directory: Path, compilations: list[str], damage: str
) -> None:
    load_or_compile(ARCH, variant())
    (entry,) = entries(directory)
    good = entry.read_bytes()
    middle = len(good) // 2
    entry.write_bytes(
        {
            "cut short": good[:middle],
            "changed": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "emptied": b"",
            "not an object": b"x" * 100,
        }[damage]
    )
    assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]
    assert kernel_cache._load(entry) is not None


def test_an_entry_that_the_loader_refuses_is_thrown_away_and_compiled_anew(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_compile(ARCH, variant())
    real, calls = kernel_cache.load_module, []

    def failing_once(path: str, **options: bool) -> object:
        calls.append(path)
        if len(calls) == 1:
            raise RuntimeError("made by another version")
        return real(path, **options)

    monkeypatch.setattr(kernel_cache, "load_module", failing_once)
    with pytest.warns(RuntimeWarning, match="compiled anew"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]


def test_an_entry_under_the_name_of_another_is_never_loaded(directory: Path, compilations: list[str]) -> None:
    load_or_compile("sm_80", variant())
    (foreign,) = entries(directory)
    foreign.rename(directory / kernel_cache.entry_name(ARCH, variant()))
    assert callable(load_or_compile(ARCH, variant()))
    assert compilations == ["sm_80", ARCH]


@root
def test_an_entry_of_another_user_is_never_loaded(directory: Path, compilations: list[str]) -> None:
    load_or_compile(ARCH, variant())
    os.chown(entries(directory)[0], 12345, -1)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]


def test_an_entry_of_another_version_stays_and_is_not_loaded(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_compile(ARCH, variant())
    monkeypatch.setattr(kernel_cache, "_versions", lambda: ("nvidia-cutlass-dsl 99",))
    load_or_compile(ARCH, variant())
    assert compilations == [ARCH, ARCH]
    assert len(entries(directory)) == 2


@posix
def test_a_directory_that_others_can_write_is_never_loaded_from(directory: Path, compilations: list[str]) -> None:
    load_or_compile(ARCH, variant())
    directory.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]


@posix
def test_an_entry_that_others_can_write_is_never_loaded(directory: Path, compilations: list[str]) -> None:
    load_or_compile(ARCH, variant())
    entries(directory)[0].chmod(0o666)
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]


@posix
def test_a_directory_of_another_user_is_never_loaded_from(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_compile(ARCH, variant())
    monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]


def test_a_directory_that_cannot_be_made_costs_one_warning_and_no_kernel(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIT_KERNELS_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    with pytest.warns(RuntimeWarning, match="not kept on disk"):
        assert callable(load_or_compile(ARCH, variant()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert callable(load_or_compile(ARCH, variant(512)))


def test_a_directory_that_cannot_be_written_costs_one_warning_and_no_kernel(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(kernel_cache, "FileLock", refused)
    with pytest.warns(RuntimeWarning, match="read-only file system"):
        assert callable(load_or_compile(ARCH, variant()))
    assert entries(directory) == []


def test_of_two_processes_that_start_at_once_each_gets_the_kernel_and_one_compiles_it(directory: Path) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "from test_kernel_cache import ARCH, kernels, load_or_compile, variant\n"
        "compiled, real = [], kernels.compile_variant\n"
        "kernels.compile_variant = lambda *args: compiled.append(1) or real(*args)\n"
        "assert callable(load_or_compile(ARCH, variant()))\n"
        "print(len(compiled))\n"
    )
    path = ":".join((str(Path(__file__).parent), *(p for p in sys.path if p)))
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program, path]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    compiled = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(compiled) == ["0\n", "1\n"]
    assert len(entries(directory)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_cache._load(entries(directory)[0]) is not None


def test_the_name_of_an_entry_depends_on_arch_variant_versions_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        kernel_cache.entry_name(ARCH, variant()),
        kernel_cache.entry_name("sm_80", variant()),
        kernel_cache.entry_name(ARCH, variant(512)),
    ]
    for what, value in (("_versions", ("nvidia-cutlass-dsl 0",)), ("source_hash", "another")):
        with monkeypatch.context() as patch:
            patch.setattr(kernel_cache, what, lambda value=value: value)
            names.append(kernel_cache.entry_name(ARCH, variant()))
    assert len(set(names)) == len(names)
    assert names[0] == kernel_cache.entry_name(ARCH, variant())


@posix
def test_a_user_without_a_home_costs_one_warning_and_no_kernel(
    compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DIT_KERNELS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=KeyError("no such user")))
    warn.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="DIT_KERNELS_CACHE_DIR"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH]


def test_a_kernel_that_cannot_be_stored_costs_one_warning_and_is_compiled_once(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names another temporary file each time, and CuTeDSL may raise anything."""
    errors = iter([RuntimeError("no space for /a"), OSError("no space for /b"), KeyError("c")])
    real = kernels.compile_variant

    def failing_export(*_: object, **__: object) -> None:
        raise next(errors)

    def without_export(arch: str, variant: Variant) -> object:
        compiled = real(arch, variant)
        monkeypatch.setattr(type(compiled), "export_to_c", failing_export)
        return compiled

    monkeypatch.setattr(kernels, "compile_variant", without_export)
    with pytest.warns(RuntimeWarning, match="no space for /a") as given:
        assert loads(256, 512, 1024)
    assert len(given) == 1
    assert compilations == [ARCH] * 3
    assert entries(directory) == []


def test_a_file_system_without_locks_costs_one_warning_and_no_kernel(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "FileLock", mock.Mock(side_effect=NotImplementedError("no flock")))
    with pytest.warns(RuntimeWarning, match="no flock"):
        assert callable(load_or_compile(ARCH, variant()))


def test_a_cutedsl_that_does_not_name_its_compiler_costs_one_warning_and_no_kernel(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernel_cache._toolkit

    def renamed() -> str:
        with mock.patch.object(sys, "modules", {"cutlass": None}):
            return real()

    monkeypatch.setattr(kernel_cache, "_toolkit", renamed)
    kernel_cache._versions.cache_clear()
    with pytest.warns(RuntimeWarning, match="which compiler"):
        assert callable(load_or_compile(ARCH, variant()))
    kernel_cache._versions.cache_clear()


# --- entries that are no files, and entries that change meanwhile ---------------------------------------------------


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends a test that hangs."""

    def hangs(*_: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put_link(entry: Path) -> None:
    """A link to a good entry."""
    good = entry.replace(entry.with_suffix(".elsewhere"))
    entry.symlink_to(good)


def put_fifo(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry, 0o600)


def put_directory(entry: Path) -> None:
    entry.unlink()
    entry.mkdir(mode=0o700)


def put_socket(entry: Path) -> None:
    entry.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(entry.parent)  # the path of a socket may have 107 bytes
        server.bind(entry.name)
        os.chdir(here)
    entry.chmod(0o600)


KINDS_OF_FILES = pytest.mark.parametrize("put", [put_fifo, put_link, put_directory, put_socket])


@posix
@KINDS_OF_FILES
def test_an_entry_that_is_no_regular_file_costs_one_warning_and_no_kernel(
    directory: Path, compilations: list[str], alarm: None, put: Callable[[Path], None]
) -> None:
    load_or_compile(ARCH, variant())
    put(entries(directory)[0])
    with pytest.warns(RuntimeWarning, match="is not a regular file") as given:
        assert loads(256, 256)
    assert len(given) == 1
    assert compilations == [ARCH] * 3


@posix
@KINDS_OF_FILES
def test_an_entry_that_becomes_something_else_before_it_is_opened_is_not_loaded(
    directory: Path,
    compilations: list[str],
    alarm: None,
    monkeypatch: pytest.MonkeyPatch,
    put: Callable[[Path], None],
) -> None:
    load_or_compile(ARCH, variant())
    real = kernel_cache._check_entry

    def check_then_swap(entry: Path, status: os.stat_result) -> None:
        real(entry, status)
        monkeypatch.setattr(kernel_cache, "_check_entry", real)
        put(entry)

    monkeypatch.setattr(kernel_cache, "_check_entry", check_then_swap)
    with pytest.warns(RuntimeWarning, match="not kept on disk"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]


# --- looking and clearing ---------------------------------------------------------------------------------------------


def test_contents_counts_the_kernels_and_clear_deletes_them(directory: Path, compilations: list[str]) -> None:
    assert kernel_cache.contents() == kernel_cache.Contents(str(directory), 0, 0, None)
    assert not directory.exists()  # to look makes no directory
    assert loads(256)
    (entry,) = entries(directory)
    held = kernel_cache.Contents(str(directory), 1, entry.stat().st_size, None)
    assert kernel_cache.contents() == held
    assert kernel_cache.clear() == held
    assert entries(directory) == []
    assert loads(256)
    assert compilations == [ARCH, ARCH]


@posix
def test_clear_deletes_regular_files_that_are_named_as_entries_and_nothing_else(
    directory: Path, tmp_path: Path
) -> None:
    directory.mkdir(mode=0o700)
    outside = tmp_path / "outside.o"
    outside.write_bytes(b"x" * 50)
    kept = ["lock", "notes.txt", "f" * 63 + ".o", "g" * 64 + ".o", "f" * 64 + ".old"]
    for name in (*kept, "0" * 64 + ".o"):
        (directory / name).write_bytes(b"x" * 10)
        (directory / name).chmod(0o600)
    (directory / ("1" * 64 + ".o")).symlink_to(outside)
    (directory / ("2" * 64 + ".o")).mkdir(mode=0o700)
    os.mkfifo(directory / ("3" * 64 + ".o"), 0o600)
    before = {path.name for path in directory.iterdir()}
    assert kernel_cache.clear() == kernel_cache.Contents(str(directory), 1, 10, None)
    assert before - {path.name for path in directory.iterdir()} == {"0" * 64 + ".o"}
    assert outside.read_bytes() == b"x" * 50


@posix
@pytest.mark.parametrize("which", ("directory", "parent"))
def test_a_directory_that_others_can_write_is_neither_used_nor_cleared(
    directory: Path, tmp_path: Path, which: str
) -> None:
    directory.mkdir(mode=0o700)
    entry = directory / ("0" * 64 + ".o")
    entry.touch(mode=0o600)
    (directory if which == "directory" else tmp_path).chmod(0o777)
    assert "can be written by others" in (kernel_cache.contents().problem or "")
    with pytest.raises(kernel_cache.Unusable, match="can be written by others"):
        kernel_cache.clear()
    assert entry.exists()
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("memory", [True, False], ids=["in memory", "in a directory"])
def test_what_was_checked_is_loaded_also_if_the_entry_changes_meanwhile(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch, memory: bool
) -> None:
    load_or_compile(ARCH, variant())
    (entry,) = entries(directory)
    good, real, loaded = entry.read_bytes(), kernel_cache.load_module, []

    def swap_then_load(path: str, **options: bool) -> object:
        entry.write_bytes(b"another kernel")
        loaded.append((Path(path).parent, Path(path).read_bytes()))
        return real(path, **options)

    monkeypatch.setattr(kernel_cache, "load_module", swap_then_load)
    if not memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert callable(load_or_compile(ARCH, variant()))
    ((folder, code),) = loaded
    assert good == code + kernel_cache._digest(entry.name, code)
    assert folder != directory and (folder == Path("/proc/self/fd")) == (memory and hasattr(os, "memfd_create"))
    assert compilations == [ARCH]
    assert {path.name for path in directory.iterdir()} <= {entry.name, "lock"}  # the copy is gone


# --- the parent of the directory ------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_whose_parent_others_can_write_is_never_loaded_from(
    tmp_path: Path, directory: Path, compilations: list[str], mode: int
) -> None:
    load_or_compile(ARCH, variant())
    tmp_path.chmod(mode)
    with pytest.warns(RuntimeWarning, match=f"{tmp_path} can be written by others") as given:
        assert loads(256, 256)
    assert len(given) == 1
    assert compilations == [ARCH] * 3


@posix
def test_the_parent_of_a_directory_is_that_behind_a_link(
    tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    (tmp_path / "open" / "kernels").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    directory.symlink_to(tmp_path / "open" / "kernels")
    with pytest.warns(RuntimeWarning, match="open can be written by others"):
        assert callable(load_or_compile(ARCH, variant()))


@posix
def test_a_sticky_parent_that_others_can_write_is_trusted(
    tmp_path: Path, directory: Path, compilations: list[str]
) -> None:
    tmp_path.chmod(0o1777)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loads(256, 256)
    assert compilations == [ARCH]


@root
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_a_directory_whose_parent_belongs_to_another_user_is_never_loaded_from(
    tmp_path: Path, directory: Path, compilations: list[str], mode: int
) -> None:
    load_or_compile(ARCH, variant())
    tmp_path.chmod(mode)
    os.chown(tmp_path, 12345, -1)
    with pytest.warns(RuntimeWarning, match=f"{tmp_path} belongs to another user"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]


@posix
def test_a_parent_that_does_not_exist_is_made_so_that_only_the_user_can_write_to_it(
    tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setenv("DIT_KERNELS_CACHE_DIR", str(tmp_path / "grandparent" / "parent" / "kernels"))
    before = os.umask(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert loads(256, 256)
    finally:
        os.umask(before)
    assert (tmp_path / "grandparent" / "parent").stat().st_mode & 0o777 == 0o700
    assert compilations == [ARCH]


# --- Windows --------------------------------------------------------------------------------------------------------

NOT_ON_WINDOWS = (
    *("chown", "fchmod", "fchown", "fork", "geteuid", "getuid", "lchown", "memfd_create", "mkfifo", "uname"),
    *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK"),
)


def test_the_cache_works_without_what_windows_does_not_have(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, everything seems to belong to user 0, and to be writable by everybody."""
    windows = SimpleNamespace(**{name: what for name, what in vars(os).items() if name not in NOT_ON_WINDOWS})
    monkeypatch.setattr(kernel_cache, "os", windows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert callable(load_or_compile(ARCH, variant()))
        directory.chmod(0o777)
        entries(directory)[0].chmod(0o666)
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH]
    assert {path.name for path in directory.iterdir()} <= {kernel_cache.entry_name(ARCH, variant()), "lock"}


@posix
@pytest.mark.parametrize("name", ["geteuid", "memfd_create", "O_NOFOLLOW", "O_CLOEXEC"])
def test_the_cache_works_without_each_of_them(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(os, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loads(256, 256)
    assert compilations == [ARCH]


@posix
@pytest.mark.parametrize("missing", ["the system call", "/proc"])
def test_without_files_in_memory_an_entry_is_loaded_from_a_copy(
    directory: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    patched = SimpleNamespace(**vars(os))
    refused = mock.Mock(side_effect=PermissionError("not permitted"))
    setattr(patched, "memfd_create" if missing == "the system call" else "stat", refused)
    monkeypatch.setattr(kernel_cache, "os", patched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loads(256, 256)
    assert refused.called
    assert compilations == [ARCH]


# --- names ----------------------------------------------------------------------------------------------------------


def test_the_name_of_an_entry_depends_on_which_compiler_cutedsl_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_cache._versions.cache_clear()
    here = kernel_cache.entry_name(ARCH, variant())
    assert f"toolkit {kernel_cache._toolkit()}" in kernel_cache._versions()
    assert any(name in kernel_cache._toolkit() for name in ("cu12", "cu13"))
    loaded = mock.Mock(__file__="/elsewhere/_cutlass_ir.cu11.so")
    monkeypatch.setitem(sys.modules, "cutlass._mlir._mlir_libs._cutlass_ir", loaded)
    kernel_cache._versions.cache_clear()
    assert kernel_cache.entry_name(ARCH, variant()) != here
    kernel_cache._versions.cache_clear()


def test_the_versions_in_a_name_are_those_of_cutedsl_and_tvm_ffi() -> None:
    assert any(part.startswith("nvidia-cutlass-dsl ") for part in kernel_cache._versions())
    assert any(part.startswith("apache-tvm-ffi ") for part in kernel_cache._versions())


def test_the_directory_is_the_chosen_one_or_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIT_KERNELS_CACHE_DIR", "/chosen")
    assert kernel_cache.cache_directory() == Path("/chosen")
    monkeypatch.delenv("DIT_KERNELS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_cache.cache_directory() == tmp_path / "dit_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernel_cache.cache_directory() == tmp_path / ".cache" / "dit_kernels"
