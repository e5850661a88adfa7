"""The disk cache of compiled kernels: what it keeps, what it refuses, and that it never costs a call its kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
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

ARCH = "sm_90a"
BF16 = torch.bfloat16


def variant(d: int = 256) -> Variant:
    row = TensorSpec(BF16, "token", 16)
    stage = Stage("rms", None, stage_steps("fp32", "rms", BF16, None, None, None, None), SCALED)
    return variant_of(FAMILY, NormChain((stage,)), d, x=row, z=row)


def load_or_compile(arch: str, variant: Variant) -> object:
    return kernel_cache.load_or_compile(arch, variant, lambda: kernels.compile_variant(arch, variant))


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
    real, seen = kernels.compile_variant, []

    def counting(arch: str, variant: Variant, options: str = "") -> object:
        seen.append(arch)
        return real(arch, variant, options)

    monkeypatch.setattr(kernels, "compile_variant", counting)
    return seen


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.o"))


def test_a_kernel_is_compiled_once_and_then_loaded(directory: Path, compilations: list[str]) -> None:
    for _ in range(3):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH]
    assert [entry.name for entry in entries(directory)] == [kernel_cache.entry_name(ARCH, variant())]


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
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


def test_a_directory_that_others_can_write_is_never_loaded_from(directory: Path, compilations: list[str]) -> None:
    load_or_compile(ARCH, variant())
    directory.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]


def test_an_entry_that_others_can_write_is_never_loaded(directory: Path, compilations: list[str]) -> None:
    load_or_compile(ARCH, variant())
    entries(directory)[0].chmod(0o666)
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        assert callable(load_or_compile(ARCH, variant()))
    assert compilations == [ARCH, ARCH]


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


def test_of_eight_processes_that_start_at_once_each_gets_the_kernel_and_one_compiles_it(directory: Path) -> None:
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
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    compiled = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    assert sorted(compiled) == ["0\n"] * 7 + ["1\n"]
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
