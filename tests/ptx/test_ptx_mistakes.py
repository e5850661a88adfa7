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

from dit_kernels.cute import modulated_norm, reduce, spec, stage
from ptx import device
from ptx.device import ARCHS, compiled, gpu
from ptx.judging import check
from ptx.memory import Fault

WHERE = r"thread \d+ of CTA \(\d+, \d+, \d+\), line \d+, `"
VALUE = r"{}\[\d+, \d+, \d+\] is \S+, by the definition \S+: (off by \S+ steps|\d+ of \d+ differ)"


def run(
    owner: Any,
    name: str,
    wrong: Callable[..., Any],
    arch: str,
    op: str = bounds.DUAL,
    o: bounds.Operands | None = None,
    eps: float = bounds.EPS,
    eps2: float = bounds.EPS2,
    **sizes: int,
) -> None:
    """Compiles with `wrong(original, ...)` for a function of the kernels, and judges."""
    original = getattr(owner, name)

    def replaced(*arguments: Any, **options: Any) -> Any:
        return wrong(original, *arguments, **options)

    with mock.patch.object(owner, name, replaced), gpu(arch, 1, compiled.__wrapped__):
        check(op, o or bounds.operands(**{"batch": 2, "tokens": 5, "d": 2304, **sizes}), eps, eps2)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_patch_that_changes_nothing_is_no_mistake(arch: str) -> None:
    run(modulated_norm, "write", lambda original, *a: original(*a), arch)


# --- wrong values ---------------------------------------------------------------------------------------------------


def run_with_strides_swapped(swapped: str, arch: str, tokens: int, per_token: bool) -> None:
    """Swaps the strides of batch and token of this operand. per_token: gate and scale have a row for each token."""

    def tensor(original, kernel, batches, tokens, name, pointer, strides):  # type: ignore[no-untyped-def]
        return original(kernel, batches, tokens, name, pointer, strides[::-1] if name == swapped else strides)

    o = bounds.operands(2, tokens, 2304)
    if per_token:
        o = replace(o, gate=random(2, tokens, 2304, seed=1), scale=random(2, tokens, 2304, seed=2))
    run(modulated_norm.ModulatedNormKernel, "tensor", tensor, arch, o=o)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize(("name", "result"), (("x", "y"), ("residual", "y"), ("gate", "y"), ("scale", "z")))
def test_strides_of_batch_and_token_swapped_are_found(arch: str, name: str, result: str, per_token: bool) -> None:
    with pytest.raises(AssertionError, match=VALUE.format(result)):
        run_with_strides_swapped(name, arch, 2, per_token)
    if per_token or name in ("x", "residual"):  # one row for a batch item has a stride of 0 for tokens
        with pytest.raises(Fault, match=WHERE + ".*out of bounds"):
            run_with_strides_swapped(name, arch, 3, per_token)


def weights_swapped(original, parameters, *others):  # type: ignore[no-untyped-def]
    original(parameters, *others)
    (weight, bias), (weight2, bias2) = parameters.columns
    parameters.columns = [(weight2, bias), (weight, bias2)]


def weight_of_the_first_norm_in_both(original, parameters, *others):  # type: ignore[no-untyped-def]
    original(parameters, *others)
    parameters.columns[1] = parameters.columns[0]


def gate_and_scale_swapped(original, parameters, *others):  # type: ignore[no-untyped-def]
    original(parameters, *others)
    parameters.factors.reverse()


def scale_of_another_batch_item(original, parameters, kernel, operands, place):  # type: ignore[no-untyped-def]
    original(parameters, kernel, operands, place)
    elsewhere, scaled = replace(place, batch=1 - place.batch), kernel.chain.stages[1]
    parameters.factors[1] = stage.factor_of(scaled, operands, kernel.specs, elsewhere, kernel.tiling.ahead)


def tanh_left_out(original, of, *others):  # type: ignore[no-untyped-def]
    return original(replace(of, activation=None) if of.activation == "tanh" else of, *others)


def one_left_out(original, of, *others):  # type: ignore[no-untyped-def]
    return original(replace(of, activation=None) if of.activation == "one_plus" else of, *others)


def residual_read_from_x(original, kernel, place, rows, *others):  # type: ignore[no-untyped-def]
    original(kernel, place, {**rows, "residual": rows["x"]}, *others)


def product_not_rounded(original, of, *others):  # type: ignore[no-untyped-def]
    wrong = replace(of, steps=replace(of.steps, product=torch.float32))
    return original(wrong if of.names.out == "y" else of, *others)


def product_of_z_without_its_scale(original, of, norm, values, factor, *others):  # type: ignore[no-untyped-def]
    return original(of, norm, values, factor if of.names.out == "y" else lambda i: None, *others)


def norm_not_rounded(original, x, mean, rstd, weight, bias, steps):  # type: ignore[no-untyped-def]
    return original(x, mean, rstd, weight, bias, replace(steps, normed=torch.float32))


def sum_without_the_first_vector(original, place, i, value):  # type: ignore[no-untyped-def]
    return Float32(cutlass.select_(place.thread == 0, Float32(0.0), original(place, i, value)))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("owner", "name", "wrong", "result"),
    (
        (modulated_norm._Parameters, "__init__", weights_swapped, "y"),
        (modulated_norm._Parameters, "__init__", weight_of_the_first_norm_in_both, "z"),
        (modulated_norm._Parameters, "__init__", gate_and_scale_swapped, "y"),
        (modulated_norm._Parameters, "__init__", scale_of_another_batch_item, "z"),
        (modulated_norm, "factor_of", tanh_left_out, "y"),
        (modulated_norm, "factor_of", one_left_out, "z"),
        (modulated_norm.ModulatedNormKernel, "run", residual_read_from_x, "y"),
        (modulated_norm, "write", product_not_rounded, "y"),
        (modulated_norm, "write", product_of_z_without_its_scale, "z"),
        (stage, "normed", norm_not_rounded, "y"),
        (stage.RowPlace, "counted", sum_without_the_first_vector, "y"),
    ),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mistake_that_changes_values_is_found(arch: str, owner: Any, name: str, wrong: Any, result: str) -> None:
    with pytest.raises(AssertionError, match=VALUE.format(result)):
        run(owner, name, wrong, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_second_norm_of_y_before_it_is_rounded_is_found(arch: str) -> None:
    def write(original, of, *others):  # type: ignore[no-untyped-def]
        unrounded = replace(of, steps=replace(of.steps, sum=torch.float32, out=torch.float32))
        return original(unrounded if of.names.out == "y" else of, *others)

    def store(writer, i, value):  # type: ignore[no-untyped-def]
        place, stored = writer.place, value.to(writer.row.element_type)
        stage.store(stored, writer.in_memory(i), place.inside(i))
        writer.fragments.append(stage._packed(value, torch.float32))
        return writer.fragments[-1]

    wrong = mock.patch.object(stage.Writer, "store", store)
    with wrong, pytest.raises(AssertionError, match=VALUE.format("z")):
        run(modulated_norm, "write", write, arch)


def run_with_eps(first: str, second: str, arch: str) -> None:
    """The two norms take these two operands as their eps, which should be "eps" and "eps2"."""

    def chain(original, kernel, place, rows, parameters, operands, partials):  # type: ignore[no-untyped-def]
        operands = {**operands, "eps": operands[first], "eps2": operands[second]}
        original(kernel, place, rows, parameters, operands, partials)

    run(modulated_norm.ModulatedNormKernel, "run", chain, arch, eps=1e-5, eps2=1e-1, batch=1, tokens=2)


@pytest.mark.parametrize("arch", ARCHS)
def test_eps_and_eps2_swapped_are_found(arch: str) -> None:
    with pytest.raises(AssertionError, match=VALUE.format("y")):
        run_with_eps("eps2", "eps", arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("eps", "result"), (("eps", "z"), ("eps2", "y")))
def test_one_eps_for_both_norms_is_found(arch: str, eps: str, result: str) -> None:
    with pytest.raises(AssertionError, match=VALUE.format(result)):
        run_with_eps(eps, eps, arch)


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("more", "message"), ((-1, r"never written, the first at [yz]\[0, \d+, 0\]"), (1, WHERE)))
def test_rows_drawn_one_too_few_or_too_many_are_found(arch: str, more: int, message: str) -> None:
    def tickets(original, self, counters, batch, walkers, given, drawn):  # type: ignore[no-untyped-def]
        original(self, counters, batch, walkers, given, drawn + more)

    with pytest.raises(Fault, match=message):
        run(modulated_norm._Tickets, "__init__", tickets, arch, batch=1, tokens=14)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_row_that_is_drawn_twice_is_found(arch: str) -> None:
    def row_of(original, tickets, ticket):  # type: ignore[no-untyped-def]
        return original(tickets, ticket // 2 * 2)

    with pytest.raises(Fault, match=WHERE + r".*writes y\[0, \d+, \d+\] a second time"):
        run(modulated_norm._Tickets, "row_of", row_of, arch, batch=1, tokens=14)


@pytest.mark.parametrize("arch", ARCHS)
def test_tickets_of_another_batch_item_are_found(arch: str) -> None:
    def tickets(original, self, counters, batch, *others):  # type: ignore[no-untyped-def]
        original(self, counters, Int32(0), *others)

    with pytest.raises(Fault, match=WHERE + "|left counters|never written"):
        run(modulated_norm._Tickets, "__init__", tickets, arch, batch=2, tokens=14)


@pytest.mark.parametrize("arch", ARCHS[1:])
def test_a_copy_of_a_row_behind_the_last_is_found(arch: str) -> None:
    def fetch(original, rings, arrived, token_at, batch, token, stage):  # type: ignore[no-untyped-def]
        original(rings, arrived, token_at, batch, cutlass.select_(token < 0, Int32(5), token), stage)

    with pytest.raises(Fault, match=WHERE + "cp.async.bulk.*out of bounds"):
        run(modulated_norm, "_fetch", fetch, arch, batch=1)


@pytest.mark.parametrize("arch", ARCHS)
def test_operands_less_aligned_than_the_kernel_expects_are_found(arch: str) -> None:
    o = bounds.operands(1, 2, 2304)
    storage, spec_of = random(2 * 2304 + 1, seed=1), spec.spec_of
    with (
        mock.patch.object(spec, "spec_of", lambda *a: replace(spec_of(*a), access=16)),
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
        run(stage, "cta_sum", lambda _, *a: sum_with_warp_idx_in_a_branch(*a), arch)


@pytest.mark.parametrize("op", ("norm_scale", "norm_tanh_mul_add"))
def test_sums_of_two_rows_in_one_buffer_are_found_where_one_barrier_is_between(op: str) -> None:
    def partials(original, kernel, buffers):  # type: ignore[no-untyped-def]
        one, warps = original(kernel, 1), kernel.tiling.warps
        layout = cute.make_layout((warps, 2, 2, buffers), stride=(1, warps, 2 * warps, 0))
        return cute.make_tensor(one.iterator, layout)

    # On sm_80: rows that bulk copies bring have one more barrier.
    with pytest.raises(Fault, match=WHERE + "(ld|st).shared.*of shared memory, which.*no barrier between"):
        run(modulated_norm.ModulatedNormKernel, "partials", partials, "sm_80", op)


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
        run(modulated_norm, "_fetch", fetch, arch, batch=1, tokens=14)


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
