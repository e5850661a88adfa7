"""Times linear layers with their activation: as one kernel in each tiling, and as cuBLAS with a kernel behind it.

    python kernels/benchmarks/bench_linear.py [--only silu_mul] [--modes default,max-autotune] [--json FILE]

Per row, in microseconds: the matmuls alone, the matmuls with Inductor's kernel behind them, for SwiGLU also with this
package's, and the fused kernel in each tiling. Last, which share of the results is bit-equal to that of the matmul and
the activation apart, on random data. The timing is that of bench_kernels.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_kernels
import torch
from bench_kernels import environment, graph_of, interleaved, op_of, random
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from dit_kernels.families.linear import TILINGS

SETS = 3  # of operands, in turn: each set is larger than L2
# A call takes a millisecond, not microseconds.
bench_kernels.CALLS, bench_kernels.ROUNDS = 6, 15


@dataclass(frozen=True)
class LinearCase:
    """silu(x @ gate) * (x @ up), or gelu(x @ w + bias). x is [1, tokens, k], a weight [n, k]."""

    activation: str  # silu_mul, gelu, gelu_tanh
    tokens: int
    k: int
    n: int
    halves: bool = False  # gate and up are halves of one weight
    model: str = ""

    @property
    def name(self) -> str:
        return f"{self.activation} {self.tokens} {self.k} {self.n}{' halves' * self.halves} ({self.model})"

    @property
    def gated(self) -> bool:
        return self.activation == "silu_mul"

    @property
    def approximate(self) -> str:
        return "tanh" if self.activation == "gelu_tanh" else "none"

    def operand_sets(self) -> list[tuple[Tensor, ...]]:
        def weights() -> tuple[Tensor, ...]:
            if self.halves:
                return (random(2 * self.n, self.k) / self.k**0.5).chunk(2)
            return tuple(random(self.n, self.k) / self.k**0.5 for _ in range(2))

        return [
            (random(1, self.tokens, self.k), *(weights() if self.gated else (weights()[0], random(self.n))))
            for _ in range(SETS)
        ]

    def matmuls(self, x: Tensor, w: Tensor, other: Tensor) -> Any:
        return (linear(x, w), linear(x, other)) if self.gated else linear(x, w, other)

    def eager(self, x: Tensor, w: Tensor, other: Tensor) -> Tensor:
        if self.gated:
            return silu(linear(x, w)) * linear(x, other)
        return gelu(linear(x, w, other), approximate=self.approximate)

    def behind(self, x: Tensor, w: Tensor, other: Tensor) -> Tensor:
        result: Tensor = op_of("silu_mul")(linear(x, w), linear(x, other))
        return result

    def fused(self, configuration: str, x: Tensor, w: Tensor, other: Tensor) -> Tensor:
        options = {"configuration": configuration}
        if not self.gated:
            options["approximate"] = self.approximate
        result: Tensor = op_of("linear_silu_mul" if self.gated else "linear_gelu")(x, w, other, **options)
        return result


CASES = [
    *(LinearCase("silu_mul", tokens, 3840, 10240, model="Z-Image") for tokens in (128, 1056, 2336, 4128, 8256, 9248)),
    *(LinearCase("gelu_tanh", tokens, 3072, 12288, model="FLUX.1") for tokens in (512, 4096, 4608)),
    LinearCase("gelu_tanh", 1024, 3072, 12288, model="Qwen-Image"),
    LinearCase("gelu_tanh", 4096, 2432, 9728, model="SD3.5"),
    LinearCase("gelu_tanh", 333, 2432, 9728, model="SD3.5, text"),
    LinearCase("gelu_tanh", 6144, 4096, 16384, model="LTX-2"),
    LinearCase("gelu_tanh", 4992, 2048, 8192, model="LTX-Video"),
    LinearCase("gelu_tanh", 32760, 1536, 8960, model="Wan 1.3B"),
    LinearCase("gelu_tanh", 32760, 5120, 13824, model="Wan 14B"),
    LinearCase("gelu_tanh", 4352, 2048, 8192, model="HunyuanVideo-1.5"),
    LinearCase("silu_mul", 4096, 6144, 18432, halves=True, model="FLUX.2"),
    LinearCase("silu_mul", 512, 6144, 18432, halves=True, model="FLUX.2, text"),
    LinearCase("gelu", 4096, 1920, 7680, model="CogVideoX"),
    LinearCase("silu_mul", 4352, 2304, 9216, model="Lumina 2"),
]


def measure(case: LinearCase, tilings: list[str], modes: list[str]) -> dict[str, float]:
    sets = case.operand_sets()
    graphs = {"matmuls": graph_of([lambda t=t: case.matmuls(*t) for t in sets])}
    for mode in modes:
        torch._dynamo.reset()
        name = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
        compiled = torch.compile(case.eager, dynamic=False, mode=name)
        with torch.no_grad():
            graphs[mode] = graph_of([lambda t=t, f=compiled: f(*t) for t in sets])
    if case.gated:
        graphs["silu_mul"] = graph_of([lambda t=t: case.behind(*t) for t in sets])
    for tiling in tilings:
        graphs[tiling] = graph_of([lambda t=t, c=tiling: case.fused(c, *t) for t in sets])
    return interleaved(graphs)


def equal_shares(case: LinearCase, tilings: list[str]) -> dict[str, float]:
    """The share of results with the bits of eager's, by tiling."""
    operands = case.operand_sets()[0]
    expected = case.eager(*operands)
    return {tiling: float((case.fused(tiling, *operands) == expected).float().mean()) for tiling in tilings}


def table(rows: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    result = Table("case", *names, "best / behind", "bits equal")
    for row in rows:
        cells = [f"{row['us'][name]:.0f}" if name in row["us"] else "" for name in names]
        result.add_row(row["case"], *cells, f"{row['ratio']:.3f}", f"{min(row['equal'].values()):.4%}")
    return result


def compile_ahead(cases: list[LinearCase], tilings: list[str]) -> None:
    """Compiles all kernels in several processes, for the cache on disk: one after the other takes minutes."""
    program = Path(__file__).with_name("compile_linear.py")
    lines = {
        f"linear_silu_mul {case.k} {case.n} configuration={tiling}"
        if case.gated
        else f"linear_gelu {case.k} {case.n} configuration={tiling},approximate={case.approximate}"
        for case in cases
        for tiling in tilings
    }
    jobs = sorted(lines)
    count = max(1, min(len(jobs), (os.cpu_count() or 2) - 2))
    running = [subprocess.Popen([sys.executable, program, *jobs[i::count]]) for i in range(count)]
    for process in running:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--modes", default="default", help="of Inductor")
    parser.add_argument("--tilings", help="separated by commas, as 128x192/2x1/pingpong (those that are tuned)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    known = [str(tiling) for tiling in TILINGS[torch.cuda.get_device_capability()[0]]]
    tilings = arguments.tilings.split(",") if arguments.tilings else known
    console, rows = Console(width=200), []
    results: dict[str, Any] = {**environment(), "rows": rows}
    cases = [case for case in CASES if arguments.only in case.name]
    compile_ahead(cases, tilings)
    for case in cases:
        us = measure(case, tilings, arguments.modes.split(","))
        others = [us[name] for name in us if name != "matmuls" and name not in tilings]
        ratio = min(us[tiling] for tiling in tilings) / min(others)
        rows.append({"case": case.name, "us": us, "ratio": ratio, "equal": equal_shares(case, tilings)})
        console.print(f"{case.name}: {ratio:.3f}")
        torch.cuda.empty_cache()
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(rows))


if __name__ == "__main__":
    main()
