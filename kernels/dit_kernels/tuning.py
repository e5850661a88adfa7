"""Choices between kernels that are measured on the spot, once for each GPU, shape and dtype, and kept on disk.

A linear layer with its activation can run as one kernel in several tilings, or as cuBLAS's matmuls and the kernel of
the activation behind them. Which of them is fastest depends on the GPU and on the sizes, so each candidate is timed.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dit_kernels import kernel_cache
from dit_kernels.versions import installed_version

LIBRARY = "library"  # the candidate of PyTorch's own matmuls with an activation behind them
GAIN = 0.99  # a fused kernel must take less than this share of the library's time
ROUNDS = 9
ROUND_US = 3000.0  # each candidate is launched for about this long in a round
MOST_CALLS = 20
FREE_SHARE = 0.5  # of the GPU's free memory that operands may take

Run = Callable[[], Any]
RunCall = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Choice:
    """What runs, and by what numbers.

    configuration: of the fused kernel; None if the library is faster. us: the median time of each candidate, in
    microseconds; empty if nothing was measured. why: the reason, in words.
    """

    configuration: str | None
    us: Mapping[str, float]
    why: str


class NotMeasured(Exception):
    """Nothing can be measured now, with the reason."""


class Problem(Protocol):
    """What is measured. Problems with one repr have one choice, on one GPU and with the same versions."""

    @property
    def bytes(self) -> int:
        """How much memory the candidates need."""
        ...

    def candidates(self, device: torch.device, run: RunCall) -> Mapping[str, Run]:
        """What is timed, by name. One of them is LIBRARY; the others are named by their configuration.

        run: runs a call of an op.
        """
        ...


# --- choosing -------------------------------------------------------------------------------------------------------


def choose(us: Mapping[str, float]) -> Choice:
    """The choice that follows from the times of all candidates."""
    fused = {name: time for name, time in us.items() if name != LIBRARY}
    best = min(fused, key=lambda name: fused[name], default=None)
    library = us[LIBRARY]
    if best is None:
        return Choice(None, us, "no fused kernel runs here")
    if fused[best] >= GAIN * library:
        return Choice(None, us, f"it is as fast: {library:.0f} µs, and fused {fused[best]:.0f} µs")
    return Choice(best, us, f"{fused[best]:.0f} µs, and {library:.0f} µs with the activation behind the matmul")


_CHOSEN: dict[str, Choice] = {}  # of this process, by key


def choice(problem: Problem, device: torch.device, run: RunCall) -> Choice:
    """The choice for a problem: of this process, from disk, or measured now. run: runs a call. Raises NotMeasured."""
    name = _name(problem, device)
    if name not in _CHOSEN:
        measured = kernel_cache.kept_json(name, lambda: asdict(choose(measure(problem, device, run))))
        _CHOSEN[name] = Choice(**measured)
    return _CHOSEN[name]


def _name(problem: Problem, device: torch.device) -> str:
    """The name of a choice on disk. It depends on the versions of the libraries whose kernels are compared."""
    packages = [f"{name} {installed_version(name)}" for name in ("torch", "nvidia-cutlass-dsl", "quack-kernels")]
    gpu = torch.cuda.get_device_name(device)
    parts = (*packages, kernel_cache.source_hash(), gpu, str(torch.version.cuda), repr(problem))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() + ".json"


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(problem: Problem, device: torch.device, run: RunCall) -> dict[str, float]:
    """The time of each candidate in microseconds: medians of CUDA graphs that are replayed in turn.

    A candidate that raises is left out; LIBRARY may not raise. Raises NotMeasured while a CUDA graph is captured, or
    where the memory is short.
    """
    if torch.cuda.is_current_stream_capturing():
        raise NotMeasured("a CUDA graph is being captured")
    with _disable_current_modes(), torch.no_grad(), torch.cuda.device(device):
        free, _ = torch.cuda.mem_get_info()
        if problem.bytes > FREE_SHARE * free:
            raise NotMeasured("the GPU's memory is short")
        try:
            return _timed(problem.candidates(device, run))
        except torch.cuda.OutOfMemoryError as error:
            raise NotMeasured("the GPU's memory is short") from error
        finally:
            torch.cuda.empty_cache()  # the model gets the memory back


def _timed(candidates: Mapping[str, Run]) -> dict[str, float]:
    expected = candidates[LIBRARY]()
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, run in candidates.items():
        try:
            if name == LIBRARY or _agree(run(), expected):
                graphs[name] = _graph_of(run)
        except Exception:
            if name == LIBRARY:
                raise
    return time_in_turn(graphs)


def _agree(result: Tensor, expected: Tensor) -> bool:
    """Are two results the same, apart from the order of their sums? A kernel that never ran on such a GPU may be
    wrong."""
    difference = (result.float() - expected.float()).norm()
    return bool(difference <= 1e-2 * expected.float().norm())


def _graph_of(run: Run) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of several calls, and how many: as many as take about ROUND_US."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    calls = max(1, min(MOST_CALLS, int(ROUND_US / max(1.0, start.elapsed_time(end) * 1e3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            run()
    return graph, calls


def time_in_turn(graphs: Mapping[str, tuple[torch.cuda.CUDAGraph, int]]) -> dict[str, float]:
    """Microseconds of one call in each graph: the median of rounds in which each graph is replayed once."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        events = []
        for name, (graph, calls) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events.append((name, calls, start, end))
        torch.cuda.synchronize()
        for name, calls, start, end in events:
            times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}
