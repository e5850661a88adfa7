"""What `python -m fusion_pass` tells: versions, GPUs, whether the kernels can run, and the cache of kernels."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Any

import torch

from dit_kernels import kernel_cache
from dit_kernels.ops import kernels_missing
from dit_kernels.versions import installed_version

PACKAGES = (
    "fusion-pass",
    "torch",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "quack-kernels",
    "triton",
    "diffusers",
    "torchao",
)


def why_no_kernels() -> str | None:
    """Why the kernels cannot run on the current GPU, or that there is no GPU; None if they can run."""
    return kernels_missing(torch.device("cuda"))


def environment() -> dict[str, Any]:
    """All of it, for json. A version is None if the package is not installed."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) or None for name in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "backend_is_registered": any(e.name == "fusion_pass" for e in entry_points(group="torch_dynamo_backends")),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "kernels_missing": why_no_kernels(),
        "kernel_cache": asdict(kernel_cache.contents()),
    }


def _gpu(index: int) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(index)
    missing = kernels_missing(torch.device("cuda", index))
    name = torch.cuda.get_device_name(index)
    return {"name": name, "compute_capability": f"{major}.{minor}", "kernels_missing": missing}


def as_text(found: dict[str, Any]) -> str:
    """The environment, one line for each fact."""
    cache = found["kernel_cache"]
    rows = [(name, version or "not installed") for name, version in found["versions"].items() if name != "cuda"]
    rows.append(("CUDA of torch", found["versions"]["cuda"] or "none: this torch is built for the CPU"))
    if not found["backend_is_registered"]:
        rows.append(("backend name", 'torch.compile does not know "fusion_pass": install the package with pip'))
    for index, gpu in enumerate(found["gpus"]):
        rows.append((f"GPU {index}", f"{gpu['name']}, compute capability {gpu['compute_capability']}"))
        rows.append(("", _can_run(gpu["kernels_missing"])))
    if not found["gpus"]:
        rows.append(("kernels", _can_run(found["kernels_missing"])))
    rows.append(("kernel cache", cache["directory"] or "none"))
    rows.append(("", f"{cache['files']} files, {size_text(cache['bytes'])}"))
    rows.append(("", "can be used" if cache["problem"] is None else f"cannot be used: {cache['problem']}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def size_text(size: int) -> str:
    return f"{size} bytes" if size < 10**6 else f"{size / 10**6:.1f} MB"


def _can_run(missing: str | None) -> str:
    return "the kernels can run" if missing is None else f"the kernels cannot run: {missing}"
