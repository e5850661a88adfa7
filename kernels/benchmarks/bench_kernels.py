"""Times every op on the GPU at hand against what else could run in its place.

    python kernels/benchmarks/bench_kernels.py [--only dual] [--modes default,max-autotune] [--json FILE]

Per row of the table, in microseconds: a copy of the same number of bytes (one clone; and two of half the size each),
this package's op, Inductor's kernels for the same PyTorch code (default, max-autotune, emulate_precision_casts), a
Triton kernel with one program a row, and eager. Each is a CUDA graph over operands that rotate through more memory than
L2 holds, outputs kept apart; all variants of a row are replayed in turn in one process, and the median of the rounds
counts. Last, the time of a call on the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import triton_row
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import dit_kernels  # noqa: F401  registers torch.ops.dit_kernels

BYTES_IN_FLIGHT = 300e6  # more than any L2
CALLS = 24  # in one graph, at least
ROUNDS = 25
MODES = ("default", "max-autotune", "emulate")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    op: str  # dual, gated, scaled
    d: int
    tokens: int
    batch: int = 1
    dtype: torch.dtype = BF16
    per_token: bool = False  # gate and scale are [B, S, D], not [B, 1, D]
    rounding: str = "cast_then_weight"

    @property
    def bytes(self) -> int:
        rows = {"dual": 4, "gated": 3, "scaled": 2}[self.op]
        rows += {"dual": 2, "gated": 1, "scaled": 1}[self.op] if self.per_token else 0
        return rows * self.batch * self.tokens * self.d * self.dtype.itemsize

    @property
    def name(self) -> str:
        extra = [f"B={self.batch}"] * (self.batch > 1) + [str(self.dtype).removeprefix("torch.")] * (self.dtype != BF16)
        extra += ["per-token"] * self.per_token + ["fp32 rounding"] * (self.rounding == "fp32")
        return " ".join([self.op, str(self.d), str(self.tokens), *extra])


CASES = [
    *(Case(op, 3840, tokens) for op in ("dual", "gated", "scaled") for tokens in (1056, 4128, 9248, 16416)),
    *(Case("dual", d, 4128) for d in (2304, 2520, 3072, 4608, 8192)),
    *(Case(op, 3072, 4128) for op in ("gated", "scaled")),
    Case("dual", 3840, 4128, batch=2),
    *(Case("dual", 3840, 4128, dtype=dtype) for dtype in (FP16, FP32)),
    *(Case("dual", 3840, tokens, per_token=True) for tokens in (1056, 4128)),
    Case("dual", 3840, 4128, rounding="fp32"),
]


# --- what is compared -----------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def gated(x: Tensor, r: Tensor, g: Tensor, s: Tensor, w: Tensor, w2: Tensor) -> Tensor:
    return r + g.tanh() * norm(x, w, 1e-5)


def scaled(x: Tensor, r: Tensor, g: Tensor, s: Tensor, w: Tensor, w2: Tensor) -> Tensor:
    return norm(x, w, 1e-5) * (1 + s)


def dual(x: Tensor, r: Tensor, g: Tensor, s: Tensor, w: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    y = gated(x, r, g, s, w, w2)
    return y, norm(y, w2, 1e-6) * (1 + s)


EAGER: dict[str, Callable[..., Any]] = {"dual": dual, "gated": gated, "scaled": scaled}


def ours(case: Case, x: Tensor, r: Tensor, g: Tensor, s: Tensor, w: Tensor, w2: Tensor) -> Any:
    ops, form = torch.ops.dit_kernels, case.rounding
    if case.op == "dual":
        return ops.norm_tanh_mul_add_norm_scale(x, w, None, g, r, 1e-5, w2, None, s, 1e-6, rounding=form)
    if case.op == "gated":
        return ops.norm_tanh_mul_add(x, w, None, g, r, 1e-5, rounding=form)
    return ops.norm_scale(x, w, None, s, 1e-5, rounding=form)


def inductor(case: Case, mode: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    if mode == "emulate":
        return torch.compile(EAGER[case.op], dynamic=False, options={"emulate_precision_casts": True})
    name = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
    return torch.compile(EAGER[case.op], dynamic=False, mode=name)


def operand_sets(case: Case) -> list[tuple[Tensor, ...]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(case.dtype)

    b, s, d = case.batch, case.tokens, case.d
    count = max(4, int(BYTES_IN_FLIGHT / case.bytes) + 1)
    shared = (random(b, 1, d), random(b, 1, d))
    weights = (random(d), random(d))
    return [
        (random(b, s, d) * 2, random(b, s, d))
        + ((random(b, s, d), random(b, s, d)) if case.per_token else shared)
        + weights
        for _ in range(count)
    ]


# --- timing ---------------------------------------------------------------------------------------------------------


def graph_of(calls: list[Run]) -> tuple[torch.cuda.CUDAGraph, int]:
    """One graph over all calls, and how many it holds; every output has memory of its own."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph, repeats = torch.cuda.CUDAGraph(), -(-CALLS // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            kept = [call() for call in calls]
            del kept
    return graph, repeats * len(calls)


def interleaved(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]]) -> dict[str, float]:
    """Microseconds of one call of each, the median of rounds in which each is replayed once."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    warm = next(iter(graphs.values()))[0]
    for _ in range(ROUNDS):
        warm.replay()  # so that the first that is timed starts on a busy GPU, too
        events = {}
        for name, (graph, _) in graphs.items():
            events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[name][0].record()
            graph.replay()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1e3 / graphs[name][1])
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: Case, modes: tuple[str, ...]) -> dict[str, float]:
    sets = operand_sets(case)
    half = case.bytes // case.dtype.itemsize // 2
    copied = [torch.randn(half, device="cuda").to(case.dtype) for _ in sets]
    graphs = {"copy": graph_of([lambda t=t: t.clone() for t in copied])}
    # The clone of two tensors, where as many are read and written: one launch more than an op has.
    graphs["copy of two"] = graph_of([lambda t=t: [part.clone() for part in t.chunk(2)] for t in copied])
    graphs["ours"] = graph_of([lambda t=t: ours(case, *t) for t in sets])
    for mode in modes:
        compiled = inductor(case, mode)
        with torch.no_grad():
            graphs[mode] = graph_of([lambda t=t, f=compiled: f(*t) for t in sets])
    if case.rounding != "fp32":
        graphs["triton"] = graph_of([lambda t=t: triton_row.run(case.op, *t) for t in sets])
    graphs["eager"] = graph_of([lambda t=t: EAGER[case.op](*t) for t in sets])
    return interleaved(graphs)


def host_times() -> dict[str, float]:
    """Microseconds on the host of one call, nothing waited for."""
    case = Case("dual", 3840, 64)
    operands = operand_sets(case)[0]
    calls: dict[str, Run] = {"x + r": lambda: operands[0] + operands[1]}
    for op in EAGER:
        calls[op] = lambda op=op: ours(Case(op, 3840, 64), *operands)
    best: dict[str, float] = dict.fromkeys(calls, float("inf"))
    with torch.no_grad():
        for _ in range(7):
            for name, call in calls.items():
                for _ in range(50):
                    call()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(400):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / 400 * 1e6)
                torch.cuda.synchronize()
    return best


# --- the command ----------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    result = Table("case", *names, "ours / copy", "fastest other / ours")
    for row in rows:
        us = row["us"]
        others = [value for name, value in us.items() if name not in ("copy", "copy of two", "ours")]
        cells = [f"{us[name]:.2f}" if name in us else "" for name in names]
        result.add_row(row["case"], *cells, f"{us['ours'] / us['copy']:.3f}", f"{min(others) / us['ours']:.2f}")
    return result


def environment() -> dict[str, str]:
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True, cwd=here)
    packages = {name: version(name) for name in ("torch", "triton", "nvidia-cutlass-dsl")}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "gpu": torch.cuda.get_device_name(), "commit": git.stdout.strip() or "unknown", **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--modes", default=",".join(MODES), help="of Inductor; fewer compile in less time")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    cases, rows = [case for case in CASES if arguments.only in case.name], []
    modes = tuple(filter(None, arguments.modes.split(",")))
    console = Console(width=140)
    with Progress(console=console) as progress:
        for case in progress.track(cases, description="timing"):
            rows.append({"case": case.name, "bytes": case.bytes, "us": measure(case, modes)})
            torch.cuda.empty_cache()
            if arguments.json:
                arguments.json.write_text(json.dumps({**environment(), "rows": rows, "host_us": {}}, indent=1) + "\n")
    console.print(table(rows))
    host = host_times()
    console.print("host, us: " + ", ".join(f"{name} {value:.1f}" for name, value in host.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({**environment(), "rows": rows, "host_us": host}, indent=1) + "\n")


if __name__ == "__main__":
    main()
