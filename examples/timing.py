"""How the demo and the benchmarks measure: times of steps in turn, memory, intervals, and a progress bar."""

from __future__ import annotations

import gc
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from dit_kernels.versions import installed_version

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # those that record CUDA graphs

Inputs = tuple[list[Tensor], Tensor, list[Tensor]]  # latents, timesteps, captions

console = Console(width=max(100, Console().width))  # the tables need that much, also where there is no terminal


class Steps:
    """Tells what a program is doing: with a bar on a terminal, and with one line for each step elsewhere."""

    def __init__(self, bar: Progress, total: int) -> None:
        self.bar, self.task = bar, bar.add_task("", total=total)

    def tell(self, text: str) -> None:
        if console.is_terminal:
            self.bar.update(self.task, description=text)
        else:
            console.print(f"{text} ...", soft_wrap=True)

    def done(self) -> None:
        """One step of the total is done."""
        self.bar.advance(self.task)


@contextmanager
def progress(total: int) -> Iterator[Steps]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Refreshed rarely: the thread that draws would disturb the steps that are timed.
    options = {"console": console, "refresh_per_second": 1, "disable": not console.is_terminal, "transient": True}
    with Progress(*columns, TimeElapsedColumn(), **options) as bar:
        yield Steps(bar, total)


@dataclass
class Result:
    """One way of running the model. Times in milliseconds, memory in bytes; distance and equal are against eager."""

    first_call_s: float
    step_ms: list[float]
    median_ms: float = math.nan
    interval_ms: tuple[float, float] = (math.nan, math.nan)
    peak_bytes: int | None = None
    distance: float | None = None
    equal: float | None = None


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95% confidence interval of the median, from order statistics (from 6 values on): it assumes no distribution."""
    ordered, n = sorted(values), len(values)
    rank = max(1, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return ordered[rank - 1], ordered[n - rank]


def speedup(plain: Sequence[float], fused: Sequence[float]) -> dict[str, Any]:
    """How many times as fast the fused steps are, pair by pair."""
    ratios = [before / after for before, after in zip(plain, fused, strict=True)]
    return {"median": statistics.median(ratios), "interval": median_interval(ratios)}


def run_step(step: Callable[..., Any], inputs: Inputs) -> Tensor:
    """One forward pass, its images flattened into one tensor."""
    torch.compiler.cudagraph_mark_step_begin()
    return torch.cat([image.flatten() for image in step(*inputs, return_dict=False)[0]])


def time_step(step: Callable[..., Any], inputs: Inputs, cuda: bool, steps: int = 1) -> float:
    """Milliseconds of one forward pass: of `steps` passes without a wait between them, divided by their number."""
    if not cuda:
        start = time.perf_counter()
        for _ in range(steps):
            run_step(step, inputs)
        return (time.perf_counter() - start) * 1e3 / steps
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    for _ in range(steps):
        run_step(step, inputs)
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / steps


def first_look(step: Callable[..., Any], inputs: Inputs, mode: str) -> tuple[Result, Tensor]:
    """Runs a variant for the first times: what its first call costs, its peak memory, and its output."""
    cuda = inputs[1].is_cuda
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    output = run_step(step, inputs)
    if cuda:
        torch.cuda.synchronize()
    result = Result(first_call_s=time.perf_counter() - start, step_ms=[])
    if cuda and mode not in GRAPH_MODES:
        # Leaves out what the compilation allocates. A replayed CUDA graph allocates nothing, so its capture is counted.
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 if cuda else 1):
        output = run_step(step, inputs).float()
    if cuda:
        result.peak_bytes = torch.cuda.max_memory_allocated()
    return result, output


def alternate(
    first: Callable[..., Any], second: Callable[..., Any], inputs: Inputs, pairs: int, lead: int = 0, steps: int = 1
) -> list[list[float]]:
    """Milliseconds of each of the two, in turns: first, second, second, first, and so on.

    A GPU at its power limit gives a step the clocks that the steps before it have left, which differ by more than
    what is looked for. So the two take turns, nothing else runs between them, and each follows each equally often.
    lead: steps that run before each one that counts, of the same variant, for the clocks that it gives itself. steps:
    see time_step.
    """
    cuda = inputs[1].is_cuda
    times: list[list[float]] = [[], []]
    for step in (first, second) * (3 if cuda else 0):  # to the clocks of the long run
        run_step(step, inputs)
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            step = (first, second)[which]
            for _ in range(lead):
                run_step(step, inputs)
            times[which].append(time_step(step, inputs, cuda, steps))
    return times


def commit() -> str | None:
    """The commit of this checkout, with -dirty where it is changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: str) -> dict[str, Any]:
    """When and where the numbers of a results file were measured."""
    names = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "triton", "diffusers", "fusion-pass")
    versions = {name: installed_version(name) or None for name in names}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, **versions},
    }
