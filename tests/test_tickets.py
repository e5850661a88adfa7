"""Which counters a launch is given. What they are for runs in tests/ptx and tests/gpu."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from dit_kernels.tickets import BLOCK, CAPTURED, LINE, Counters


@pytest.fixture(autouse=True)
def capturing() -> Iterator[mock.Mock]:
    """Counters that would be on a GPU are on the CPU. Gives the mock that says whether a capture runs."""
    with (
        mock.patch.object(torch, "device", return_value="cpu"),
        mock.patch.object(torch.cuda, "current_stream"),
        mock.patch.object(torch._C, "_cuda_isCurrentStreamCapturing", create=True, return_value=False) as capturing,
    ):
        yield capturing


@pytest.fixture
def tickets() -> Counters:
    return Counters()


def spans(starts: list[int], sizes: list[int]) -> list[set[int]]:
    return [set(range(start, start + 4 * size, 4)) for start, size in zip(starts, sizes, strict=True)]


def test_launches_of_one_stream_share_counters_and_those_of_others_do_not(tickets: Counters) -> None:
    first = tickets.address(0, 7, 2)
    assert tickets.address(0, 7, 1) == first
    assert len({first, tickets.address(0, 8, 1), tickets.address(1, 7, 1)}) == 3


def test_more_batch_items_get_more_counters(tickets: Counters) -> None:
    small = tickets.address(0, 7, 1)
    large = tickets.address(0, 7, BLOCK + 1)
    assert large != small
    assert tickets.address(0, 7, 1) == large
    assert large in [block.data_ptr() for block in tickets.blocks if block.numel() > BLOCK]


def test_each_captured_launch_has_counters_of_its_own(capturing: mock.Mock, tickets: Counters) -> None:
    sizes = [1, 1, 1, LINE + 1, 2, 1]
    starts = [tickets.address(0, 7, sizes[0])]
    capturing.return_value = True
    starts += [tickets.address(0, 7, size) for size in sizes[1:]]
    taken = set.union(*spans(starts, sizes))
    assert len(taken) == sum(sizes)
    (block,) = tickets.blocks
    assert taken <= set(range(block.data_ptr(), block.data_ptr() + 4 * block.numel()))
    assert all((start - starts[0]) % (4 * LINE) == 0 for start in starts)  # no two in one line


def test_nothing_is_allocated_by_the_thread_that_launches_but_in_a_capture_that_finds_nothing(
    capturing: mock.Mock, tickets: Counters
) -> None:
    threads: list[threading.Thread] = []
    zeros = torch.zeros

    def noted(*sizes: int, **options: object) -> torch.Tensor:
        threads.append(threading.current_thread())
        return zeros(*sizes, **options)

    with mock.patch.object(torch, "zeros", noted):
        tickets.address(0, 7, 1)
        tickets.address(0, 8, BLOCK + 1)
        assert len(threads) == 2
        assert threading.current_thread() not in threads
        capturing.return_value = True
        tickets.address(1, 7, 40)
    assert threads[2:] == [threading.current_thread()]
    assert tickets.blocks[-1].numel() == 2 * LINE


def test_a_block_that_is_half_used_by_captures_is_replaced_by_the_next_launch_outside_of_one(
    capturing: mock.Mock, tickets: Counters
) -> None:
    tickets.address(0, 7, 1)
    capturing.return_value = True
    before = tickets.address(0, 7, BLOCK // 2 + 1)
    capturing.return_value = False
    own = tickets.address(0, 7, 1)
    capturing.return_value = True
    after = tickets.address(0, 7, BLOCK)
    assert own == tickets.of_stream[0, 7][0]
    assert len(tickets.blocks) == 2
    assert tickets.blocks[0].data_ptr() < before < tickets.blocks[0].data_ptr() + 4 * BLOCK
    assert after == tickets.blocks[1].data_ptr()


def test_all_counters_are_zero(tickets: Counters) -> None:
    tickets.address(0, 7, 1)
    assert not any(block.any() for block in tickets.blocks)


@pytest.mark.parametrize("batches", (1, LINE + 1, BLOCK))
def test_a_graph_can_capture_hundreds_of_launches_whatever_their_batch_items(
    capturing: mock.Mock, batches: int, tickets: Counters
) -> None:
    tickets.address(0, 7, 1)
    warmed = tickets.address(0, 7, batches)
    capturing.return_value = True
    with mock.patch.object(tickets, "_zeros", side_effect=AssertionError("memory of the graph")):
        starts = [tickets.address(0, 7, batches) for _ in range(CAPTURED)]
    assert len({warmed, *starts}) == 1 + CAPTURED


class Slow(dict):
    """A dictionary that other threads come to read before what was read of it is written back."""

    def get(self, *given: object) -> object:
        found = super().get(*given)
        time.sleep(0.002)
        return found

    def __getitem__(self, key: object) -> object:
        found = super().__getitem__(key)
        time.sleep(0.002)
        return found


def test_threads_that_launch_at_once_on_streams_of_their_own_get_counters_of_their_own(tickets: Counters) -> None:
    threads, rounds, got = 4, 5, set()
    together = threading.Barrier(threads)

    def launch(thread: int) -> None:
        for turn in range(rounds):
            together.wait()
            got.add(tickets.address(0, turn * threads + thread, 1))

    with mock.patch.object(tickets, "free", Slow()):
        running = [threading.Thread(target=launch, args=(i,)) for i in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    assert len(got) == threads * rounds
