"""Mistakes in the Python of the kernels and in their launch: each is found, with a message that leads to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import kernel_bounds as bounds
import pytest
import torch
from kernel_bounds import random

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from dit_kernels import compile
from dit_kernels.cute import arith, norm_gate, reduce
from ptx import device
from ptx.device import ARCHS, compiled, gpu
from ptx.judging import check
from ptx.memory import Fault

WHERE = r"thread \d+ of CTA \(\d+, \d+, \d+\), line \d+, `"
VALUE = r"{}\[\d+, \d+, \d+\] is \S+, by the definition \S+: (off by \S+ steps|\d+ of \d+ differ)"


def run(owner: Any, name: str, wrong: Callable[..., Any], arch: str, op: str = bounds.DUAL, **sizes: int) -> None:
    """Compiles with `wrong(original, ...)` for a function of the kernels, and judges."""
    original = getattr(owner, name)

    def replaced(*arguments: Any, **options: Any) -> Any:
        return wrong(original, *arguments, **options)

    with mock.patch.object(owner, name, replaced), gpu(arch, 1, compiled.__wrapped__):
        check(op, bounds.operands(**{"batch": 2, "tokens": 5, "d": 2304, **sizes}))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_patch_that_changes_nothing_is_no_mistake(arch: str) -> None:
    run(norm_gate, "_gated", lambda original, *a: original(*a), arch)


# --- wrong values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_strides_of_batch_and_token_swapped_are_found(arch: str) -> None:
    def of_x(original, kernel, batches, tokens, name, pointer, by_batch=0, by_token=0):  # type: ignore[no-untyped-def]
        strides = (by_token, by_batch) if name == "x" else (by_batch, by_token)
        return original(kernel, batches, tokens, name, pointer, *strides)

    with pytest.raises(AssertionError, match=VALUE.format("y")):
        run(norm_gate.NormGate, "tensor", of_x, arch, tokens=2)
    with pytest.raises(Fault, match=WHERE + ".*out of bounds"):
        run(norm_gate.NormGate, "tensor", of_x, arch, tokens=3)


def weights_swapped(original, parameters, kernel, place, gate, scale, weight, bias, weight2, bias2):  # type: ignore[no-untyped-def]
    original(parameters, kernel, place, gate, scale, weight2, bias, weight, bias2)


def scale_of_another_batch_item(original, parameters, kernel, place, gate, scale, *others):  # type: ignore[no-untyped-def]
    original(parameters, kernel, place, gate, scale, *others)
    elsewhere = replace(place, batch=1 - place.batch)
    parameters.scale = norm_gate._Modulation.of(scale, kernel.operands.scale, elsewhere, kernel.tiling.ahead)
    parameters.scale.activate = parameters._add_one


def residual_read_from_x(original, kernel, place, values, residuals, *others):  # type: ignore[no-untyped-def]
    original(kernel, place, values, values, *others)


def product_not_rounded(original, n, gate, residual, steps):  # type: ignore[no-untyped-def]
    return original(n, gate, residual, replace(steps, product=torch.float32))


def product_of_z_without_its_scale(original, n, scale, steps):  # type: ignore[no-untyped-def]
    return original(n, None, steps)


def norm_not_rounded(original, x, mean, rstd, weight, bias, steps):  # type: ignore[no-untyped-def]
    return original(x, mean, rstd, weight, bias, replace(steps, normed=torch.float32))


def sum_without_the_first_vector(original, place, i, value):  # type: ignore[no-untyped-def]
    return Float32(cutlass.select_(place.thread == 0, Float32(0.0), original(place, i, value)))


def tanh_left_out(original, parameters, gate):  # type: ignore[no-untyped-def]
    return gate


def one_left_out(original, parameters, scale):  # type: ignore[no-untyped-def]
    return scale


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("owner", "name", "wrong", "result"),
    (
        (norm_gate._Parameters, "__init__", weights_swapped, "y"),
        (norm_gate._Parameters, "__init__", scale_of_another_batch_item, "z"),
        (norm_gate._Parameters, "_tanh", tanh_left_out, "y"),
        (norm_gate._Parameters, "_add_one", one_left_out, "z"),
        (norm_gate.NormGate, "run", residual_read_from_x, "y"),
        (norm_gate, "_gated", product_not_rounded, "y"),
        (norm_gate, "_scaled", product_of_z_without_its_scale, "z"),
        (norm_gate, "normed", norm_not_rounded, "y"),
        (norm_gate._Place, "counted", sum_without_the_first_vector, "y"),
    ),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mistake_that_changes_values_is_found(arch: str, owner: Any, name: str, wrong: Any, result: str) -> None:
    with pytest.raises(AssertionError, match=VALUE.format(result)):
        run(owner, name, wrong, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_second_norm_of_y_before_it_is_rounded_is_found(arch: str) -> None:
    def gated(original, n, gate, residual, steps):  # type: ignore[no-untyped-def]
        return arith.total(residual, arith.widen(arith.product(n, gate, steps.product)), torch.float32)

    def store(writer, i, value):  # type: ignore[no-untyped-def]
        place, stored = writer.place, value.to(writer.row.element_type)
        norm_gate.store(stored, writer.in_memory(i), place.inside(i))
        writer.fragments.append(norm_gate._packed(value, torch.float32))
        return writer.fragments[-1]

    wrong = mock.patch.object(norm_gate._Writer, "store", store)
    with wrong, pytest.raises(AssertionError, match=VALUE.format("z")):
        run(norm_gate, "_gated", gated, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_eps_and_eps2_swapped_are_found(arch: str) -> None:
    def swapped(kernel, place, values, residuals, parameters, eps, eps2, *others):  # type: ignore[no-untyped-def]
        run_chain(kernel, place, values, residuals, parameters, eps2, eps, *others)

    run_chain = norm_gate.NormGate.run
    wrong = mock.patch.object(norm_gate.NormGate, "run", swapped)
    with wrong, gpu(arch, 1, compiled.__wrapped__), pytest.raises(AssertionError, match=VALUE.format("y")):
        check(bounds.DUAL, bounds.operands(1, 2, 2304), eps=1e-5, eps2=1e-1)


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("more", "message"), ((-1, r"never written, the first at [yz]\[0, \d+, 0\]"), (1, WHERE)))
def test_rows_drawn_one_too_few_or_too_many_are_found(arch: str, more: int, message: str) -> None:
    def tickets(original, self, counters, batch, walkers, given, drawn):  # type: ignore[no-untyped-def]
        original(self, counters, batch, walkers, given, drawn + more)

    with pytest.raises(Fault, match=message):
        run(norm_gate._Tickets, "__init__", tickets, arch, batch=1, tokens=14)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_row_that_is_drawn_twice_is_found(arch: str) -> None:
    def row_of(original, tickets, ticket):  # type: ignore[no-untyped-def]
        return original(tickets, ticket // 2 * 2)

    with pytest.raises(Fault, match=WHERE + r".*writes y\[0, \d+, \d+\] a second time"):
        run(norm_gate._Tickets, "row_of", row_of, arch, batch=1, tokens=14)


@pytest.mark.parametrize("arch", ARCHS)
def test_tickets_of_another_batch_item_are_found(arch: str) -> None:
    def tickets(original, self, counters, batch, *others):  # type: ignore[no-untyped-def]
        original(self, counters, Int32(0), *others)

    with pytest.raises(Fault, match=WHERE + "|left counters|never written"):
        run(norm_gate._Tickets, "__init__", tickets, arch, batch=2, tokens=14)


@pytest.mark.parametrize("arch", ARCHS[1:])
def test_a_copy_of_a_row_behind_the_last_is_found(arch: str) -> None:
    def fetch(original, rings, arrived, token_at, batch, token, stage):  # type: ignore[no-untyped-def]
        original(rings, arrived, token_at, batch, cutlass.select_(token < 0, Int32(5), token), stage)

    with pytest.raises(Fault, match=WHERE + "cp.async.bulk.*out of bounds"):
        run(norm_gate, "_fetch", fetch, arch, batch=1)


@pytest.mark.parametrize("arch", ARCHS)
def test_operands_less_aligned_than_the_kernel_expects_are_found(arch: str) -> None:
    o = bounds.operands(1, 2, 2304)
    storage = random(2 * 2304 + 1, seed=1)
    with (
        mock.patch.object(compile, "_access", return_value=16),
        gpu(arch, 1),
        pytest.raises(Fault, match=WHERE + r".*(misaligned|multiples of 16)"),
    ):
        check(bounds.DUAL, replace(o, x=storage[1:].view(1, 2, 2304)))


# --- threads that do not agree --------------------------------------------------------------------------------------


@cute.jit
def sum_with_warp_idx_in_a_branch(value: Float32, partials: cute.Tensor) -> Float32:
    value = reduce.warp_sum(value)
    lane = cute.arch.lane_idx()
    if lane == 0:
        partials[cute.arch.make_warp_uniform(cute.arch.warp_idx())] = value
    cute.arch.sync_threads()
    value = Float32(0.0)
    if lane < cute.size(partials):
        value = partials[lane]
    return reduce.warp_sum(value)


@pytest.mark.parametrize("arch", ARCHS)
def test_warp_idx_under_a_branch_of_one_lane_is_found(arch: str) -> None:
    with pytest.raises(Fault, match=WHERE + "shfl.sync.*waits for all of its warp, of which 31 threads are elsewhere"):
        run(norm_gate, "cta_sum", lambda _, *a: sum_with_warp_idx_in_a_branch(*a), arch)


@pytest.mark.parametrize("op", ("norm_scale", "norm_tanh_mul_add"))
def test_sums_of_two_rows_in_one_buffer_are_found_where_one_barrier_is_between(op: str) -> None:
    def partials(original, kernel, stages):  # type: ignore[no-untyped-def]
        one, warps = original(kernel, 1), kernel.tiling.warps
        layout = cute.make_layout((warps, 2, 2, stages), stride=(1, warps, 2 * warps, 0))
        return cute.make_tensor(one.iterator, layout)

    with pytest.raises(Fault, match=WHERE + "(ld|st).shared.*of shared memory, which.*no barrier between"):
        run(norm_gate.NormGate, "partials", partials, "sm_80", op)  # rows that bulk copies bring have one more barrier


@pytest.mark.parametrize("arch", ARCHS[1:])
def test_a_wait_whose_phase_never_turns_is_found(arch: str) -> None:
    def wait(original, barrier, phase):  # type: ignore[no-untyped-def]
        original(barrier, Int32(0))

    with pytest.raises(Fault, match=WHERE + "(ld.shared.*nothing waited|mbarrier.try_wait.*waits for ever)"):
        run(cute.arch, "mbarrier_wait", wait, arch, batch=1, tokens=14)


@pytest.mark.parametrize("arch", ARCHS[1:])
def test_a_wait_for_another_stage_is_found(arch: str) -> None:
    def fetch(original, rings, arrived, token_at, batch, token, stage):  # type: ignore[no-untyped-def]
        original(rings, arrived, token_at, batch, token, 1 - stage)

    with pytest.raises(Fault, match=WHERE + "(ld.shared.*nothing w|mbarrier.*)"):
        run(norm_gate, "_fetch", fetch, arch, batch=1, tokens=14)


# --- the launch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("axis", ("batch", "rows"))
def test_a_grid_one_cta_short_is_found(arch: str, axis: str) -> None:
    def short(*arguments: Any) -> Any:
        what = device_launch(*arguments)
        x, y, z = what.grid
        return replace(what, grid=(x - 1, y, z) if axis == "batch" else (x, y - 1, z))

    device_launch = device.launch
    with (
        mock.patch.object(device, "launch", short),
        gpu(arch, 1),
        pytest.raises(Fault, match=r"never written, .*[yz]\[|left counters"),
    ):
        check(bounds.DUAL, bounds.operands(2, 5, 2304))


@pytest.mark.parametrize("arch", ARCHS)
def test_too_little_shared_memory_is_found(arch: str) -> None:
    def little(*arguments: Any) -> Any:
        what = device_launch(*arguments)
        return replace(what, shared_bytes=what.shared_bytes - 16)

    device_launch = device.launch
    with (
        mock.patch.object(device, "launch", little),
        gpu(arch, 1),
        pytest.raises(Fault, match=WHERE + ".*which has.*out"),
    ):
        check(bounds.DUAL, bounds.operands(2, 5, 2304))
