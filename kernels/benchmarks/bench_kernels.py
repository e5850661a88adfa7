"""Times every op on the GPU at hand against what else could run in its place.

    python kernels/benchmarks/bench_kernels.py [--only silu_mul] [--modes default,max-autotune] [--json FILE]

Per row of the table, in microseconds: a copy of the same number of bytes (one clone; and two of half the size each),
this package's op, Inductor's kernels for the same PyTorch code (default, max-autotune, emulate_precision_casts), a
Triton kernel with one program a row, and eager. Each is a CUDA graph over operands that rotate through more memory than
L2 holds, outputs kept apart; all variants of a row are replayed in turn in one process, and the median of the rounds
counts. Last, the time of a call on the host, and what a new process waits for (cold_start.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
from fusion_pass import Backend

BYTES_IN_FLIGHT = 300e6  # more than any L2
CALLS = 24  # in one graph, at least
ROUNDS = 25
COLD_STARTS = 5
MODES = ("default", "max-autotune", "emulate")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Run = Callable[[], Any]


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def op_of(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(torch.ops.dit_kernels, name)
    return op


def name_of(op: str, *numbers: int, batch: int, dtype: torch.dtype, extra: str = "") -> str:
    words = [f"B={batch}"] * (batch > 1) + [str(dtype).removeprefix("torch.")] * (dtype != BF16) + [extra] * bool(extra)
    return " ".join([op, *map(str, numbers), *words])


# --- the cases: operands, what they are in eager, and our call of them ----------------------------------------------


@dataclass(frozen=True)
class Case:
    """A gated norm, a norm with a scale, or both."""

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
        extra = " ".join(["per-token"] * self.per_token + ["fp32 rounding"] * (self.rounding == "fp32"))
        return name_of(self.op, self.d, self.tokens, batch=self.batch, dtype=self.dtype, extra=extra)

    def operand_sets(self, count: int) -> list[tuple[Tensor, ...]]:
        b, s, d, dtype = self.batch, self.tokens, self.d, self.dtype
        shared = (random(b, 1, d, dtype=dtype), random(b, 1, d, dtype=dtype))
        weights = (random(d, dtype=dtype), random(d, dtype=dtype))
        return [
            (random(b, s, d, dtype=dtype) * 2, random(b, s, d, dtype=dtype))
            + ((random(b, s, d, dtype=dtype), random(b, s, d, dtype=dtype)) if self.per_token else shared)
            + weights
            for _ in range(count)
        ]

    def eager(self, x: Tensor, r: Tensor, g: Tensor, s: Tensor, w: Tensor, w2: Tensor) -> Any:
        if self.op == "scaled":
            return norm(x, w, 1e-5) * (1 + s)
        y = r + g.tanh() * norm(x, w, 1e-5)
        return y if self.op == "gated" else (y, norm(y, w2, 1e-6) * (1 + s))

    def ours(self, x: Tensor, r: Tensor, g: Tensor, s: Tensor, w: Tensor, w2: Tensor, quant: str = "") -> Any:
        """quant: "_quant" for the op whose last result is in FP8."""
        form = self.rounding
        if self.op == "dual":
            dual = op_of("norm_tanh_mul_add_norm_scale" + quant)
            return dual(x, w, None, g, r, 1e-5, w2, None, s, 1e-6, rounding=form)
        if self.op == "gated":
            return op_of("norm_tanh_mul_add")(x, w, None, g, r, 1e-5, rounding=form)
        return op_of("norm_scale" + quant)(x, w, None, s, 1e-5, rounding=form)


@dataclass(frozen=True)
class HeadCase:
    """q and k: norm and rotation. A complex rotation, 2×2 matrices, or cosines and sines of the halves of a head."""

    heads: int
    kv_heads: int
    d: int
    tokens: int
    batch: int = 1
    dtype: torch.dtype = BF16
    rotation: torch.dtype = torch.complex64
    matrices: bool = False

    @property
    def bytes(self) -> int:
        heads = 2 * self.batch * self.tokens * (self.heads + self.kv_heads) * self.d * self.dtype.itemsize
        numbers = self.tokens * self.d * (4 if self.matrices else 1 if self.rotation.is_complex else 2) // 2
        return heads + numbers * self.rotation.itemsize

    @property
    def name(self) -> str:
        extra = str(self.rotation).removeprefix("torch.") if self.rotation != torch.complex64 else ""
        extra += " matrices" * self.matrices
        numbers = (self.heads, self.kv_heads, self.d, self.tokens)
        return name_of("qk_norm_rope", *numbers, batch=self.batch, dtype=self.dtype, extra=extra)

    def operand_sets(self, count: int) -> list[tuple[Tensor | None, ...]]:
        b, s, d, dtype = self.batch, self.tokens, self.d, self.dtype
        angle = torch.randn((1, s, d // 2), device="cuda", dtype=torch.float64)
        turning: tuple[Tensor, Tensor | None]
        if self.rotation.is_complex:
            turning = torch.polar(torch.ones_like(angle), angle).to(self.rotation), None
        elif self.matrices:
            cos, sin = angle.cos(), angle.sin()
            turning = torch.stack((cos, -sin, sin, cos), -1).flatten(2).to(self.rotation), None
        else:
            angle = torch.cat((angle, angle), -1)
            turning = angle.cos().to(self.rotation), angle.sin().to(self.rotation)
        weights = (random(d, dtype=dtype), random(d, dtype=dtype))
        return [
            (random(b, s, self.heads, d, dtype=dtype), random(b, s, self.kv_heads, d, dtype=dtype), *weights, *turning)
            for _ in range(count)
        ]

    def eager(self, q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, rotation: Tensor, sin: Tensor | None) -> Any:
        return self._turned(norm(q, wq, 1e-5), rotation, sin), self._turned(norm(k, wk, 1e-5), rotation, sin)

    def _turned(self, n: Tensor, rotation: Tensor, sin: Tensor | None) -> Tensor:
        if self.matrices:
            m, pairs = rotation.unflatten(-1, (-1, 2, 2)).unsqueeze(2), n.float().unflatten(-1, (-1, 1, 2))
            return (m[..., 0] * pairs[..., 0] + m[..., 1] * pairs[..., 1]).flatten(3).type_as(n)
        if sin is None:
            pairs = torch.view_as_complex(n.float().reshape(*n.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * rotation.unsqueeze(2)).flatten(3).type_as(n)
        a, b = n.chunk(2, -1)
        return (n * rotation.unsqueeze(2)) + (torch.cat((-b, a), -1) * sin.unsqueeze(2))

    def ours(self, q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, rotation: Tensor, sin: Tensor | None) -> Any:
        op, interleaved = torch.ops.dit_kernels.qk_norm_rope, sin is None
        out_dtype = q.dtype if self.matrices else None
        return op(q, k, wq, wk, rotation, sin, 1e-5, 1e-5, interleaved=interleaved, out_dtype=out_dtype)


@dataclass(frozen=True)
class SiluCase:
    """silu(a) * b; halves: of one tensor."""

    d: int
    tokens: int
    batch: int = 1
    dtype: torch.dtype = BF16
    halves: bool = False

    @property
    def bytes(self) -> int:
        return 3 * self.batch * self.tokens * self.d * self.dtype.itemsize

    @property
    def name(self) -> str:
        extra = "halves" if self.halves else ""
        return name_of("silu_mul", self.d, self.tokens, batch=self.batch, dtype=self.dtype, extra=extra)

    def operand_sets(self, count: int) -> list[tuple[Tensor, ...]]:
        shape = (self.batch, self.tokens, self.d)
        if self.halves:
            return [random(*shape[:2], 2 * self.d, dtype=self.dtype).chunk(2, -1) for _ in range(count)]
        return [(random(*shape, dtype=self.dtype), random(*shape, dtype=self.dtype)) for _ in range(count)]

    def eager(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.silu(a) * b

    def ours(self, a: Tensor, b: Tensor, quant: str = "") -> Any:
        return op_of("silu_mul" + quant)(a, b)


@dataclass(frozen=True)
class AdalnCase:
    """A layer norm with a scale and a shift, as FLUX.1 has it. added: of the sum of a residual and a gated row."""

    d: int
    tokens: int
    added: bool = True
    batch: int = 1
    dtype: torch.dtype = BF16

    @property
    def bytes(self) -> int:
        return (4 if self.added else 2) * self.batch * self.tokens * self.d * self.dtype.itemsize

    @property
    def name(self) -> str:
        op = "mul_add_norm_scale" if self.added else "norm_scale shift"
        return name_of(op, self.d, self.tokens, batch=self.batch, dtype=self.dtype)

    def operand_sets(self, count: int) -> list[tuple[Tensor, ...]]:
        rows, row = (self.batch, self.tokens, self.d), (self.batch, 1, self.d)
        modulation = [random(*row, dtype=self.dtype) for _ in range(3)]
        return [(*(random(*rows, dtype=self.dtype) for _ in range(2)), *modulation) for _ in range(count)]

    def eager(self, x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
        y = residual + gate * x if self.added else x
        z = torch.nn.functional.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return (y, z) if self.added else z

    def ours(self, x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, quant: str = "") -> Any:
        if self.added:
            op = op_of("mul_add_norm_scale" + quant)
            return op(x, gate, residual, None, None, scale, 1e-6, shift, norm="layer")
        return op_of("norm_scale" + quant)(x, None, None, scale, 1e-6, shift, norm="layer")


@dataclass(frozen=True)
class RowCase:
    """What an op that only quantises reads: a row in memory, or GELU and the row that is joined in front of it."""

    gelu: int  # elements of the row that GELU computes
    tokens: int
    before: int = 0  # elements of the row that are in memory
    batch: int = 1
    dtype: torch.dtype = BF16

    @property
    def d(self) -> int:
        return self.before + self.gelu

    @property
    def bytes(self) -> int:
        return 2 * self.batch * self.tokens * self.d * self.dtype.itemsize

    @property
    def name(self) -> str:
        words = ["gelu", self.gelu] * bool(self.gelu) + ["row", self.before] * bool(self.before) + [self.tokens]
        return name_of(*words, batch=self.batch, dtype=self.dtype)

    def operand_sets(self, count: int) -> list[tuple[Tensor, ...]]:
        sizes = [size for size in (self.before, self.gelu) if size]
        shape = (self.batch, self.tokens)
        return [tuple(random(*shape, size, dtype=self.dtype) for size in sizes) for _ in range(count)]

    def eager(self, *rows: Tensor) -> Tensor:
        if not self.gelu:
            return rows[0]
        return torch.cat((*rows[:-1], torch.nn.functional.gelu(rows[-1], approximate="tanh")), -1)

    def ours(self, *rows: Tensor, quant: str = "") -> Any:
        return op_of("gelu_quant")(*rows[::-1], approximate="tanh") if self.gelu else op_of("quant")(*rows)


@dataclass(frozen=True)
class QuantCase:
    """Another case with its last result in FP8, quantised as torchao does it row by row."""

    of: Case | SiluCase | AdalnCase | RowCase

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    @property
    def bytes(self) -> int:
        rows = self.of.batch * self.of.tokens
        return self.of.bytes - rows * self.of.d * (self.dtype.itemsize - 1) + 4 * rows

    @property
    def name(self) -> str:
        return f"{self.of.name} quant"

    def operand_sets(self, count: int) -> list[tuple[Tensor, ...]]:
        return self.of.operand_sets(count)

    def eager(self, *operands: Tensor) -> Any:
        results = self.of.eager(*operands)
        *others, z = results if isinstance(results, tuple) else (results,)
        s = (z.abs().amax(-1, keepdim=True) / 448.0).float()
        return (*others, (z.float() / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), s)

    def ours(self, *operands: Tensor) -> Any:
        return self.of.ours(*operands, quant="_quant")


AnyCase = Case | HeadCase | SiluCase | AdalnCase | QuantCase

ADALN = (
    *(AdalnCase(3072, tokens, added) for added in (True, False) for tokens in (77, 512, 4608)),  # FLUX.1, Qwen-Image
    AdalnCase(3072, 4096, batch=2),
    AdalnCase(2432, 4096),  # SD3.5
    AdalnCase(5120, 32760),  # Wan 14B
)
CASES: list[AnyCase] = [
    *(Case(op, 3840, tokens) for op in ("dual", "gated", "scaled") for tokens in (1056, 4128, 9248, 16416)),
    *(Case("dual", d, 4128) for d in (2304, 2520, 3072, 4608, 8192)),
    *(Case(op, 3072, 4128) for op in ("gated", "scaled")),
    Case("dual", 3840, 4128, batch=2),
    *(Case("dual", 3840, 4128, dtype=dtype) for dtype in (FP16, FP32)),
    *(Case(op, 3840, tokens, per_token=True) for op in ("dual", "gated") for tokens in (1056, 4128)),
    Case("dual", 3840, 4128, per_token=True, rounding="fp32"),
    Case("dual", 3840, 4128, rounding="fp32"),
    *(HeadCase(30, 30, 128, tokens) for tokens in (1056, 4128, 9248, 16416)),  # Z-Image
    HeadCase(24, 8, 96, 4128, rotation=torch.complex128),  # Lumina 2
    HeadCase(18, 18, 256, 4128, rotation=BF16),  # Ideogram 4
    HeadCase(30, 30, 128, 4128, rotation=FP32, matrices=True),  # ComfyUI's Z-Image
    HeadCase(24, 24, 128, 4608, rotation=FP32, matrices=True),  # FLUX.1's own repository
    HeadCase(30, 30, 128, 4128, batch=2),
    *(HeadCase(30, 30, 128, 4128, dtype=dtype) for dtype in (FP16, FP32)),
    *(SiluCase(10240, tokens) for tokens in (1056, 4128, 9248, 16416)),
    SiluCase(10240, 4128, halves=True),
    *(SiluCase(10240, 4128, dtype=dtype) for dtype in (FP16, FP32)),
    *(QuantCase(Case(op, 3840, tokens)) for op in ("dual", "scaled") for tokens in (1056, 4128)),
    *(QuantCase(SiluCase(10240, tokens)) for tokens in (1056, 4128)),
    *(
        QuantCase(RowCase(gelu, tokens, before))
        for gelu, before in ((12288, 0), (12288, 3072))
        for tokens in (512, 4608)
    ),
    *(QuantCase(RowCase(0, tokens, 3072)) for tokens in (1024, 4608)),
    *(make(case) for case in ADALN for make in (lambda case: case, QuantCase)),
]


# --- what is compared -----------------------------------------------------------------------------------------------


def inductor(case: AnyCase, mode: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    if mode == "emulate":
        return torch.compile(case.eager, dynamic=False, options={"emulate_precision_casts": True})
    name = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
    return torch.compile(case.eager, dynamic=False, mode=name)


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


def operand_sets(case: AnyCase) -> list[tuple[Any, ...]]:
    """As many as do not fit into L2 together."""
    return [*case.operand_sets(max(4, int(BYTES_IN_FLIGHT / case.bytes) + 1))]


def measure(case: AnyCase, modes: tuple[str, ...]) -> dict[str, float]:
    sets = operand_sets(case)
    half = case.bytes // case.dtype.itemsize // 2
    copied = [torch.randn(half, device="cuda").to(case.dtype) for _ in sets]
    graphs = {"copy": graph_of([lambda t=t: t.clone() for t in copied])}
    # The clone of two tensors, where as many are read and written: one launch more than an op has.
    graphs["copy of two"] = graph_of([lambda t=t: [part.clone() for part in t.chunk(2)] for t in copied])
    graphs["ours"] = graph_of([lambda t=t: case.ours(*t) for t in sets])
    for mode in modes:
        compiled = inductor(case, mode)
        with torch.no_grad():
            graphs[mode] = graph_of([lambda t=t, f=compiled: f(*t) for t in sets])
    if isinstance(case, Case) and case.rounding != "fp32":
        graphs["triton"] = graph_of([lambda t=t: triton_row.run(case.op, *t) for t in sets])
    graphs["eager"] = graph_of([lambda t=t: case.eager(*t) for t in sets])
    return interleaved(graphs)


COMPILED_CALLS = 20  # of an op in the compiled function whose host time is taken


def host_times() -> dict[str, float]:
    """Microseconds on the host of one call, from torch.ops to launched, and of one call in Inductor's code."""
    ops, tokens = torch.ops.dit_kernels, 64
    x, r, g, s, w, w2 = Case("dual", 3840, tokens).operand_sets(1)[0]
    q, k, wq, wk, rotation, sin = HeadCase(30, 30, 128, tokens).operand_sets(1)[0]
    a, b = SiluCase(10240, tokens).operand_sets(1)[0]
    calls: dict[str, Run] = {
        "x + r": lambda: x + r,
        "dual": lambda: ops.norm_tanh_mul_add_norm_scale(x, w, None, g, r, 1e-5, w2, None, s, 1e-6),
        "gated": lambda: ops.norm_tanh_mul_add(x, w, None, g, r, 1e-5),
        "scaled": lambda: ops.norm_scale(x, w, None, s, 1e-5),
        "qk_norm_rope": lambda: ops.qk_norm_rope(q, k, wq, wk, rotation, sin, 1e-5, 1e-5),
        "silu_mul": lambda: ops.silu_mul(a, b),
    }

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(COMPILED_CALLS):
            x, _ = ops.norm_tanh_mul_add_norm_scale(x, w, None, g, r, 1e-5, w2, None, s, 1e-6)
        return x

    compiled = torch.compile(chain, backend=Backend())
    calls["compiled dual"] = lambda: compiled(x)
    shares = {"compiled dual": COMPILED_CALLS}
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
                best[name] = min(best[name], (time.perf_counter() - start) / 400 / shares.get(name, 1) * 1e6)
                torch.cuda.synchronize()
    return best


def cold_start() -> dict[str, dict[str, float]]:
    """Milliseconds of cold_start.py where every kernel is compiled, and of kernels on disk: medians of processes."""
    script, waits = Path(__file__).with_name("cold_start.py"), []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(1 + COLD_STARTS):
            run = subprocess.run(
                [sys.executable, script],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "DIT_KERNELS_CACHE_DIR": cache},
            )
            waits.append(json.loads(run.stdout))
    first, *others = waits
    return {"compiled": first, "on disk": {name: statistics.median(w[name] for w in others) for name in first}}


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
    parser.add_argument("--host-only", action="store_true", help="the host's share of a call, and nothing else")
    arguments = parser.parse_args()
    if arguments.host_only:
        results = {**environment(), "host_us": host_times()}
        print(json.dumps(results))
        return
    cases = [case for case in CASES if arguments.only in case.name]
    rows: list[dict[str, Any]] = []
    modes = tuple(filter(None, arguments.modes.split(",")))
    console = Console(width=140)
    results = {**environment(), "rows": rows}

    def write() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")

    with Progress(console=console, disable=not console.is_terminal) as progress:
        for case in progress.track(cases, description="timing"):
            if not console.is_terminal:
                console.print(f"{case.name} ...")
            rows.append({"case": case.name, "bytes": case.bytes, "us": measure(case, modes)})
            torch.cuda.empty_cache()
            write()
    console.print(table(rows))
    results["host_us"] = host_times()
    console.print("host, us: " + listed(results["host_us"]))
    results["cold_start_ms"] = cold_start()
    for state, waits in results["cold_start_ms"].items():
        console.print(f"a new process, kernels {state}, ms: {listed(waits)}")
    write()


def listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in numbers.items())


if __name__ == "__main__":
    main()
