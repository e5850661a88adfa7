"""Which counters a launch is given. What they are for runs in tests/ptx and tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from dit_kernels import tickets


@pytest.fixture(autouse=True)
def memory_of_the_cpu() -> Iterator[mock.Mock]:
    """Nothing is known yet, and what would be zeroed on a GPU is on the CPU. Gives the question for a capture."""
    with (
        mock.patch.multiple(tickets, _of_stream={}, _pools={}, _kept=[]),
        mock.patch.object(torch, "device", return_value="cpu"),
        mock.patch.object(torch.cuda, "current_stream"),
        mock.patch.object(torch._C, "_cuda_isCurrentStreamCapturing", create=True, return_value=False) as capturing,
    ):
        yield capturing


def test_launches_of_one_stream_share_counters_and_those_of_others_do_not() -> None:
    first = tickets.address(0, 7, 1)
    assert tickets.address(0, 7, tickets.COUNTERS) == first
    assert len({first, tickets.address(0, 8, 1), tickets.address(1, 7, 1)}) == 3


def test_more_batch_items_get_more_counters_and_the_former_stay_in_memory() -> None:
    small = tickets.address(0, 7, 1)
    large = tickets.address(0, 7, 1000)
    assert large != small
    assert tickets.address(0, 7, 1) == large
    assert {small, large} <= {t.data_ptr() for t in tickets._kept}


def test_each_captured_launch_has_counters_of_its_own(memory_of_the_cpu: mock.Mock) -> None:
    of_stream = tickets.address(0, 7, 1)
    memory_of_the_cpu.return_value = True
    sizes = (1, 1, tickets.COUNTERS + 1, 2, 1)
    starts = [tickets.address(0, 7, size) for size in sizes]
    taken = [set(range(start, start + 4 * size, 4)) for start, size in zip(starts, sizes, strict=True)]
    assert len(set.union(*taken)) == sum(sizes)
    assert of_stream not in set.union(*taken)
    assert all(start % (4 * tickets.COUNTERS) == starts[0] % (4 * tickets.COUNTERS) for start in starts)


def test_a_capture_that_comes_first_or_finds_the_pool_empty_zeroes_memory_of_its_own(
    memory_of_the_cpu: mock.Mock,
) -> None:
    memory_of_the_cpu.return_value = True
    with mock.patch.object(tickets, "_zeros", side_effect=(11, 22)) as zeros:
        assert [tickets.address(0, 7, 1), tickets.address(0, 7, 40)] == [11, 22]
    assert [call.args[1] for call in zeros.mock_calls] == [tickets.COUNTERS, 2 * tickets.COUNTERS]


def test_a_pool_that_is_half_used_is_replaced_before_it_is_empty(memory_of_the_cpu: mock.Mock) -> None:
    tickets.address(0, 7, 1)
    memory_of_the_cpu.return_value = True
    before = tickets.address(0, 7, tickets.POOL // 2 + 1)
    memory_of_the_cpu.return_value = False
    tickets.address(0, 8, 1)
    assert tickets._pools[0][1] == tickets.POOL
    assert any(t.data_ptr() == before for t in tickets._kept)
