"""What a new process waits for before it first launches a kernel, in milliseconds, as json.

    python kernels/benchmarks/cold_start.py

Beyond `import torch`: to import fusion_pass, to import CuTeDSL, and the first calls of two ops, whose kernels are
compiled where the cache ($DIT_KERNELS_CACHE_DIR) has none, and loaded from it where it has. bench_kernels.py runs this
in new processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch


def milliseconds(run: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    run(*args)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    waits = {"import": milliseconds(import_module, "fusion_pass")}
    x, residual = (torch.randn(1, 4128, 3840, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate, weight = x[:, :1], x[0, 0]
    torch.cuda.synchronize()
    waits["CuTeDSL"] = milliseconds(import_module, "dit_kernels.compile")
    dual = (x, weight, None, gate, residual, 1e-5, weight, None, gate, 1e-5)
    ops = torch.ops.dit_kernels
    waits["first kernel"] = milliseconds(ops.norm_tanh_mul_add_norm_scale, *dual)
    waits["next kernel"] = milliseconds(ops.norm_scale, x, weight, None, gate, 1e-5)
    print(json.dumps(waits))


if __name__ == "__main__":
    main()
