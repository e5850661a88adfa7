"""`python -m fusion_pass` tells what it finds: versions, GPUs, whether kernels can run and why not, and the cache."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
import torch
from processes import run_python

from dit_kernels import ops
from fusion_pass import __main__ as command
from fusion_pass import environment

NO_GPU = "no CUDA GPU is available"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two kernels, of 30 bytes together."""
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    for digit, size in (("0", 10), ("1", 20)):
        entry = folder / (digit * 64 + ".o")
        entry.write_bytes(b"x" * size)
        entry.chmod(0o600)
    monkeypatch.setenv("DIT_KERNELS_CACHE_DIR", str(folder))
    return folder


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["fusion_pass", *arguments])
    command.main()
    return capsys.readouterr().out


def test_the_command_names_the_versions_the_cache_and_why_no_kernel_runs(cache: Path, tmp_path: Path) -> None:
    text = run_python(tmp_path, "-m", "fusion_pass")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert f"python {platform.python_version()}" in lines
    assert f"torch {torch.__version__}" in lines
    assert f"kernels the kernels cannot run: {NO_GPU}" in lines
    assert f"kernel cache {cache}" in lines
    assert lines[-2:] == ["2 files, 30 bytes", "can be used"]


def test_json_holds_the_same(cache: Path, capsys, monkeypatch) -> None:
    found = json.loads(run(capsys, monkeypatch, "--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["apache-tvm-ffi"]
    assert (found["gpus"], found["kernels_missing"]) == ([], NO_GPU)
    assert found["kernel_cache"] == {"directory": str(cache), "files": 2, "bytes": 30, "problem": None}


def test_clear_cache_deletes_the_kernels_and_says_how_many_bytes(cache: Path, capsys, monkeypatch) -> None:
    assert run(capsys, monkeypatch, "--clear-cache") == f"deleted 2 kernels in {cache}: 30 bytes freed\n"
    assert list(cache.iterdir()) == []
    assert json.loads(run(capsys, monkeypatch, "--clear-cache", "--json"))["deleted"]["files"] == 0


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_an_error_is_one_line_and_the_cache_stays(cache: Path, capsys, monkeypatch) -> None:
    cache.chmod(0o777)
    with pytest.raises(SystemExit) as stopped:
        run(capsys, monkeypatch, "--clear-cache")
    assert str(stopped.value) == f"error: {cache} can be written by others than its owner; run chmod go-w on it"
    assert len(list(cache.iterdir())) == 2
    assert "cannot be used" in run(capsys, monkeypatch).splitlines()[-1]


def test_each_gpu_is_listed_with_its_compute_capability_and_whether_kernels_run(monkeypatch) -> None:
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[getattr(device, "index", device) or 0]
    )
    monkeypatch.setattr(ops, "_compiler", lambda: None)
    ops.kernels_missing.cache_clear()
    try:
        lines = [" ".join(line.split()) for line in environment.as_text(environment.environment()).splitlines()]
    finally:
        ops.kernels_missing.cache_clear()
    start = lines.index("GPU 0 card 0, compute capability 9.0")
    assert lines[start + 1 : start + 4] == [
        "the kernels can run",
        "GPU 1 card 1, compute capability 7.5",
        "the kernels cannot run: compute capability 7.5 is older than 8.0",
    ]
