"""Choices between kernels that are measured on the spot, once for each GPU, shape and dtype, and kept on disk.

A linear layer with its activation can run as one kernel in several tilings, or as cuBLAS's matmuls and the kernel of
the activation behind them. Which of them is fastest depends on the GPU and on the sizes, so each candidate is timed.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dit_kernels import kernel_cache
from dit_kernels.versions import generator_versions

LIBRARY = "library"  # the candidate of PyTorch's own matmuls with an activation behind them
GAIN = 0.99  # a fused kernel must take less than this share of the library's time
ROUNDS = 9
ROUND_US = 3000.0  # each candidate is launched for about this long in a round
MOST_CALLS = 20
ROWS_COMPARED = 1024  # at once
FREE_SHARE = 0.5  # of the GPU's free memory that operands may take

Run = Callable[[], Any]
RunCall = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Choice:
    """What runs, and by what numbers.

    configuration: of the fused kernel; None if the library is as fast. us: the median time of each candidate, in
    microseconds. failed: the candidates that did not run or were wrong, and how.
    """

    configuration: str | None
    us: Mapping[str, float]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """The times and failures, in words."""
        words = [f"{name} {time:.0f}" for name, time in self.us.items() if name != LIBRARY]
        words += [f"{name} {how}" for name, how in self.failed.items()]
        library = f"PyTorch's own kernels {self.us[LIBRARY]:.0f} µs"
        return f"measured: {library}, fused {', '.join(words)}"


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


def choose(us: Mapping[str, float], failed: Mapping[str, str]) -> Choice:
    """The choice that follows from the times of the candidates that run."""
    best = min(us, key=lambda name: us[name] if name == LIBRARY else us[name] / GAIN)
    return Choice(None if best == LIBRARY else best, us, failed)


_CHOSEN: dict[str, Choice] = {}  # of this process, by key


def choice(problem: Problem, device: torch.device, run: RunCall) -> Choice:
    """The choice for a problem: of this process, from disk, or measured now. run: runs a call. Raises NotMeasured."""
    name = _name(problem, device)
    if name not in _CHOSEN:
        try:
            measured = kernel_cache.kept_json(f"{name}.json", lambda: asdict(choose(*measure(problem, device, run))))
        except Exception:
            kernel_cache.note(f"{name}.note")
            raise
        _CHOSEN[name] = Choice(**measured)
    return _CHOSEN[name]


def not_measured() -> str:
    """What could not be measured so far, as a hash. It is a part of the key of compiled graphs. So a graph without a
    choice is not taken from a cache by the next process, which may be able to measure."""
    return hashlib.sha256("".join(kernel_cache.notes()).encode()).hexdigest()


def _name(problem: Problem, device: torch.device) -> str:
    """A hash that names a choice on disk. It depends on the versions of the libraries whose kernels are compared."""
    gpu = torch.cuda.get_device_name(device)
    parts = (*generator_versions(), kernel_cache.source_hash(), gpu, str(torch.version.cuda), repr(problem))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(problem: Problem, device: torch.device, run: RunCall) -> tuple[dict[str, float], dict[str, str]]:
    """The time of each candidate in microseconds: medians of CUDA graphs that are replayed in turn. And the candidates
    that failed, with the reason.

    Raises NotMeasured while a CUDA graph is captured, where the memory is short, or if no fused kernel runs: the reason
    may be gone the next time.
    """
    if torch.cuda.is_current_stream_capturing():
        raise NotMeasured("a CUDA graph is being captured")
    with _disable_current_modes(), torch.no_grad(), torch.cuda.device(device):
        free, _ = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if problem.bytes > FREE_SHARE * free:
            raise NotMeasured("the GPU's memory is short")
        try:
            return _timed(problem.candidates(device, run))
        except torch.cuda.OutOfMemoryError as error:
            raise NotMeasured("the GPU's memory is short") from error
        finally:
            torch.cuda.empty_cache()  # the model gets the memory back


def _timed(candidates: Mapping[str, Run]) -> tuple[dict[str, float], dict[str, str]]:
    expected = candidates[LIBRARY]()
    graphs = {LIBRARY: _graph_of(candidates[LIBRARY])}
    failed: dict[str, str] = {}
    raised: list[str] = []
    for name, run in candidates.items():
        if name == LIBRARY:
            continue
        try:
            if _agree(run(), expected):
                graphs[name] = _graph_of(run)
            else:
                failed[name] = "wrong"
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            failed[name] = "fails"
            raised.append(f"{type(error).__name__}: {error}")
    if raised and len(graphs) == 1:
        raise NotMeasured(raised[0])
    return time_in_turn(graphs), failed


def _agree(result: Tensor, expected: Tensor) -> bool:
    """Are two results the same, apart from the order of their sums? A kernel may be wrong on some GPU."""
    pairs = zip(result.split(ROWS_COMPARED), expected.split(ROWS_COMPARED), strict=True)  # in parts, to save memory
    off, size = 0.0, 0.0
    for part, right in pairs:
        off += float((part - right).float().square().sum())
        size += float(right.float().square().sum())
    return off <= 1e-4 * size


def _graph_of(run: Run) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of several calls, and how many: as many as take about ROUND_US."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    calls = max(1, min(MOST_CALLS, int(ROUND_US / max(1.0, start.elapsed_time(end) * 1e3))))
    graph = torch.cuda.CUDAGraph()
    # On a stream of the current device: torch.cuda.graph keeps one stream for all devices.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
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
