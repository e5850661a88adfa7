"""The choice between fused kernels and PyTorch's own, with times that the tests give instead of a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_kernels import kernel_cache, ops, tuning, versions
from dit_kernels.families import OPS
from dit_kernels.families.linear import TILINGS, TRIED
from dit_kernels.tuning import GAIN, LIBRARY, Choice, NotMeasured
from fusion_pass.graph_pass import FusionPass

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Problem:
    """name: what distinguishes problems. results: what each candidate returns; an exception is raised."""

    name: str = "a"
    results: tuple[tuple[str, Any], ...] = ((LIBRARY, 1.0), ("first", 1.0), ("second", 1.0))
    bytes: int = 0

    def candidates(self, device: torch.device, run: Any) -> Mapping[str, Callable[[], Any]]:
        def run(result: Any) -> Any:
            if isinstance(result, Exception):
                raise result
            return torch.full((4, 4), result)

        return {name: lambda result=result: run(result) for name, result in self.results}


class Clock:
    """Stands for the GPU: its times, and how often something was measured."""

    def __init__(self) -> None:
        self.us = {LIBRARY: 100.0, "first": 80.0, "second": 90.0}
        self.measured = 0
        self.name = "H100"
        self.capturing = False

    def time(self, graphs: Mapping[str, Any]) -> dict[str, float]:
        self.measured += 1
        return {name: self.us[name] for name in graphs}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    clock = Clock()
    monkeypatch.setenv("DIT_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    monkeypatch.setattr(tuning, "time_in_turn", clock.time)
    monkeypatch.setattr(tuning, "_graph_of", lambda run: run)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: clock.capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: clock.name)
    return clock


def choice(name: str = "a") -> Choice:
    return tuning.choice(Problem(name), CPU, ops.run)


def kept() -> list[Path]:
    return sorted(kernel_cache.cache_directory().glob("*.json"))


# --- which one is chosen ----------------------------------------------------------------------------------------------

times = st.floats(1.0, 1e6)


@given(times, st.dictionaries(st.text("abc", min_size=1), times))
def test_the_fastest_kernel_is_chosen_if_it_gains_and_the_library_otherwise(
    library: float, fused: dict[str, float]
) -> None:
    chosen = tuning.choose({**fused, LIBRARY: library}, {})
    best = min(fused.values(), default=float("inf"))
    if best / GAIN < library:
        assert chosen.configuration is not None
        assert fused[chosen.configuration] == best
    else:
        assert chosen.configuration is None
    assert chosen.us == {**fused, LIBRARY: library}


def test_the_report_has_every_number(clock: Clock) -> None:
    assert choice().why == "measured: PyTorch's own kernels 100 µs, fused first 80, second 90"
    clock.us["first"] = clock.us["second"] = 99.5
    assert (choice("b").configuration, choice("b").us) == (None, clock.us)


def results(first: Any, second: Any = 1.0) -> Problem:
    return Problem(results=((LIBRARY, 1.0), ("first", first), ("second", second)))


@pytest.mark.parametrize("result", (1.1, float("nan"), RuntimeError("no such kernel")), ids=str)
def test_a_kernel_that_raises_or_is_wrong_is_not_chosen(clock: Clock, result: Any) -> None:
    chosen = tuning.choice(results(result), CPU, ops.run)
    assert chosen.configuration == "second"
    assert list(chosen.us) == [LIBRARY, "second"]
    assert chosen.failed == {"first": "fails" if isinstance(result, Exception) else "wrong"}
    assert chosen.why.endswith("fused second 90, first " + chosen.failed["first"])


def test_where_every_kernel_is_wrong_the_library_is_chosen(clock: Clock) -> None:
    assert tuning.choice(results(1.1, 1.1), CPU, ops.run).configuration is None


@pytest.mark.parametrize(
    "error", (RuntimeError("CUDA error"), ImportError("no module"), OSError("disk full")), ids=repr
)
def test_where_every_kernel_raises_nothing_is_kept_and_the_next_process_measures(
    clock: Clock, error: Exception
) -> None:
    with pytest.raises(NotMeasured, match=str(error)):
        tuning.choice(results(error, error), CPU, ops.run)
    assert (clock.measured, kept()) == (0, [])
    assert choice().configuration == "first"


def test_a_kernel_that_runs_out_of_memory_ends_the_measurement(clock: Clock) -> None:
    with pytest.raises(NotMeasured, match="short"):
        tuning.choice(results(torch.cuda.OutOfMemoryError()), CPU, ops.run)
    assert kept() == []


def test_what_a_measurement_raises_is_raised_once_and_as_it_is(clock: Clock) -> None:
    runs = []

    def library() -> Any:
        runs.append(1)
        raise OSError("no device")

    problem = mock.Mock(bytes=0, candidates=lambda device, run: {LIBRARY: library})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="no device"):
            tuning.choice(problem, CPU, ops.run)
    assert len(runs) == 1


def test_another_order_of_sums_is_not_wrong(clock: Clock) -> None:
    assert tuning.choice(Problem(results=((LIBRARY, 1.0), ("first", 1.001))), CPU, ops.run).configuration == "first"


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_a_problem_is_measured_once_and_read_from_disk_by_the_next_process(clock: Clock) -> None:
    first = choice()
    assert choice() is first
    tuning._CHOSEN.clear()  # as in a new process
    clock.us["first"] = 200.0
    assert choice() == first
    assert (clock.measured, len(kept())) == (1, 1)


@pytest.mark.parametrize("what", ("gpu", "version", "source", "problem"))
def test_another_gpu_version_source_or_problem_is_measured_again(
    clock: Clock, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice()
    if what == "gpu":
        clock.name = "H200"
    elif what == "version":
        monkeypatch.setattr(versions, "installed_version", lambda name: "9.9")
    elif what == "source":
        monkeypatch.setattr(kernel_cache, "source_hash", lambda: "another")
    choice("b" if what == "problem" else "a")
    assert (clock.measured, len(kept())) == (2, 2)


@pytest.mark.parametrize("content", (b"", b"{", b"[]", b"\xff", b'{"configuration": "first"}'), ids=repr)
def test_a_choice_that_cannot_be_read_back_is_made_again(clock: Clock, content: bytes) -> None:
    first = choice()
    (entry,) = kept()
    entry.write_bytes(content)
    tuning._CHOSEN.clear()
    assert choice() == first
    assert entry.read_bytes().startswith(b'{"configuration": "first"')


def test_a_choice_belongs_to_its_owner_and_is_cleared_with_the_kernels(clock: Clock) -> None:
    choice()
    (entry,) = kept()
    assert entry.stat().st_mode & 0o777 == 0o600
    assert kernel_cache.clear().files == 1
    assert not kept()


def test_a_directory_that_others_can_write_to_is_not_used(clock: Clock) -> None:
    kernel_cache.cache_directory().mkdir(parents=True)
    kernel_cache.cache_directory().chmod(0o777)
    with pytest.warns(RuntimeWarning, match="choices are not kept on disk"):
        assert choice().configuration == "first"
    assert not kept()


# --- when nothing is measured ----------------------------------------------------------------------------------------


def test_nothing_is_measured_while_a_graph_is_captured_and_the_choice_is_made_later(clock: Clock) -> None:
    clock.capturing = True
    with pytest.raises(NotMeasured, match="captured"):
        choice()
    clock.capturing = False
    assert choice().configuration == "first"


def test_a_graph_that_was_compiled_without_a_choice_is_not_taken_from_a_cache_later(clock: Clock) -> None:
    """Its key has what could not be measured before it was compiled."""
    first = FusionPass().uuid()
    clock.capturing = True
    for _ in range(2):
        with pytest.raises(NotMeasured):
            choice()
    clock.capturing = False
    second = FusionPass().uuid()
    assert second != first
    choice()
    choice("b")
    assert FusionPass().uuid() == second, "a choice that is made does not change the key"


@pytest.mark.parametrize("problem", (Problem(bytes=501), Problem(results=((LIBRARY, torch.cuda.OutOfMemoryError()),))))
def test_nothing_is_measured_where_the_memory_is_short(clock: Clock, problem: Problem) -> None:
    with pytest.raises(NotMeasured, match="short"):
        tuning.choice(problem, CPU, ops.run)
    assert not kept()
    assert clock.measured == 0


# --- linear layers ---------------------------------------------------------------------------------------------------


def problem(op: str, *args: Any, thorough: bool = False, **options: Any) -> Any:
    with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        call = OPS[op].call(*args, **options)
        return call.op.family.problem(call, thorough)


def operands(tokens: int = 5) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, tokens, 64, dtype=BF16), torch.randn(48, 64, dtype=BF16), torch.randn(48, 64, dtype=BF16))


def test_the_candidates_of_a_linear_layer_compute_the_same() -> None:
    x, gate, up = operands()
    for found in (problem("linear_silu_mul", x, gate, up), problem("linear_gelu", x, gate, approximate="tanh")):
        candidates = found.candidates(CPU, ops.run)
        expected = candidates.pop(LIBRARY)()
        assert expected.shape == (10, 48)
        assert len(candidates) == TRIED
        assert all(torch.equal(run(), expected) for run in candidates.values())


def test_more_configurations_are_tried_if_the_user_asks() -> None:
    assert len(problem("linear_gelu", *operands()[:2], thorough=True).configurations) == len(TILINGS[9])


def test_a_problem_is_that_of_its_sizes_biases_and_rounding() -> None:
    x, gate, up = operands()
    base = repr(problem("linear_silu_mul", x, gate, up))
    assert base == repr(problem("linear_silu_mul", x.clone(), up, gate))
    halves = torch.cat((gate, up)).chunk(2)
    others = [
        problem("linear_silu_mul", operands(6)[0], gate, up),
        problem("linear_silu_mul", x, *halves),
        problem("linear_silu_mul", x, gate, up, rounding="fp32"),
        problem("linear_gelu", x, gate),
        problem("linear_gelu", x, gate, gate[:, 0].contiguous()),
        problem("linear_gelu", x, gate, approximate="tanh"),
    ]
    assert len({base, *map(repr, others)}) == len(others) + 1
