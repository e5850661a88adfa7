"""Mistakes in the Python of the kernels and in their launch: each is found, with a message that leads to it.

At the end, tests of what random data of small sizes do not show: offsets of 32 bits, the divisor of a mean, the eps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from math import prod
from typing import Any
from unittest import mock

import kernel_bounds as bounds
import pytest
import torch
from attention_kernel_bounds import heads
from kernel_bounds import random
from torch import Tensor

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from dit_kernels import compile, tickets
from dit_kernels.arguments import COLUMN, SCALAR, Argument, Layout
from dit_kernels.cute import modulated_norm, reduce, rows, spec, stage
from dit_kernels.cute.tiling import VectorTiling
from dit_kernels.families import OPS
from dit_kernels.families import rows as families_of_rows
from ptx import device
from ptx.device import UNLIKE, compiled, gpu, in_turn
from ptx.host import launch
from ptx.judging import check
from ptx.machine import Machine
from ptx.memory import Fault, GlobalMemory
from ptx.program import parse

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


@pytest.mark.parametrize("arch", UNLIKE)
def test_a_patch_that_changes_nothing_is_no_mistake(arch: str) -> None:
    run(modulated_norm, "write", lambda original, *a: original(*a), arch)


# --- wrong values ---------------------------------------------------------------------------------------------------


def run_with_strides_swapped(kernel_of: Any, arch: str, tokens: int, per_token: bool) -> None:
    """per_token: gate and scale have a row for each token."""
    o = bounds.operands(2, tokens, 2304)
    if per_token:
        o = replace(o, gate=random(2, tokens, 2304, seed=1), scale=random(2, tokens, 2304, seed=2))
    with gpu(arch, 1, kernel_of):
        check(bounds.DUAL, o)


@pytest.mark.parametrize(
    ("arch", "per_token", "name", "result"),
    (
        ("sm_90a", False, "x", "y"),
        ("sm_80", False, "residual", "y"),
        ("sm_90a", False, "gate", "y"),
        ("sm_80", False, "scale", "z"),
        ("sm_80", True, "x", "y"),
        ("sm_90a", True, "residual", "y"),
        ("sm_80", True, "gate", "y"),
        ("sm_90a", True, "scale", "z"),
    ),
)
def test_strides_of_batch_and_token_swapped_are_found(arch: str, per_token: bool, name: str, result: str) -> None:
    """The strides of this operand."""
    original = rows.RowKernel.tensor

    def tensor(kernel, batches, tokens, operand, pointer, strides):  # type: ignore[no-untyped-def]
        return original(kernel, batches, tokens, operand, pointer, strides[::-1] if operand == name else strides)

    mistaken = cache(compiled.__wrapped__)  # one kernel for both numbers of tokens
    with mock.patch.object(rows.RowKernel, "tensor", tensor):
        with pytest.raises(AssertionError, match=VALUE.format(result)):
            run_with_strides_swapped(mistaken, arch, 2, per_token)
        if per_token or name in ("x", "residual"):  # one row for a batch item has a stride of 0 for tokens
            with pytest.raises(Fault, match=WHERE + ".*out of bounds"):
                run_with_strides_swapped(mistaken, arch, 3, per_token)


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


MISTAKES = (
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
)


@pytest.mark.parametrize(
    ("arch", "owner", "name", "wrong", "result"),
    in_turn(MISTAKES, UNLIKE),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mistake_that_changes_values_is_found(arch: str, owner: Any, name: str, wrong: Any, result: str) -> None:
    with pytest.raises(AssertionError, match=VALUE.format(result)):
        run(owner, name, wrong, arch)


@pytest.mark.parametrize("arch", UNLIKE)
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


@pytest.mark.parametrize("arch", UNLIKE)
def test_eps_and_eps2_swapped_are_found(arch: str) -> None:
    with pytest.raises(AssertionError, match=VALUE.format("y")):
        run_with_eps("eps2", "eps", arch)


@pytest.mark.parametrize(("arch", "eps", "result"), (("sm_90a", "eps", "z"), ("sm_80", "eps2", "y")))
def test_one_eps_for_both_norms_is_found(arch: str, eps: str, result: str) -> None:
    with pytest.raises(AssertionError, match=VALUE.format(result)):
        run_with_eps(eps, eps, arch)


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", UNLIKE)
@pytest.mark.parametrize(("more", "message"), ((-1, r"never written, the first at [yz]\[0, \d+, 0\]"), (1, WHERE)))
def test_rows_drawn_one_too_few_or_too_many_are_found(arch: str, more: int, message: str) -> None:
    def tickets(original, self, counters, batch, walkers, given, drawn):  # type: ignore[no-untyped-def]
        original(self, counters, batch, walkers, given, drawn + more)

    with pytest.raises(Fault, match=message):
        run(rows._Tickets, "__init__", tickets, arch, batch=1, tokens=14)


@pytest.mark.parametrize("arch", UNLIKE)
def test_a_row_that_is_drawn_twice_is_found(arch: str) -> None:
    def row_of(original, tickets, ticket):  # type: ignore[no-untyped-def]
        return original(tickets, ticket // 2 * 2)

    with pytest.raises(Fault, match=WHERE + r".*writes y\[0, \d+, \d+\] a second time"):
        run(rows._Tickets, "row_of", row_of, arch, batch=1, tokens=14)


@pytest.mark.parametrize("arch", UNLIKE)
def test_tickets_of_another_batch_item_are_found(arch: str) -> None:
    def tickets(original, self, counters, batch, *others):  # type: ignore[no-untyped-def]
        original(self, counters, Int32(0), *others)

    with pytest.raises(Fault, match=WHERE + "|left counters|never written"):
        run(rows._Tickets, "__init__", tickets, arch, batch=2, tokens=14)


@pytest.mark.parametrize("arch", UNLIKE[1:])
def test_a_copy_of_a_row_behind_the_last_is_found(arch: str) -> None:
    def fetch(original, rings, arrived, token_at, batch, token, stage):  # type: ignore[no-untyped-def]
        original(rings, arrived, token_at, batch, cutlass.select_(token < 0, Int32(5), token), stage)

    with pytest.raises(Fault, match=WHERE + "cp.async.bulk.*out of bounds"):
        run(rows, "_fetch", fetch, arch, batch=1)


@pytest.mark.parametrize("arch", UNLIKE)
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


@pytest.mark.parametrize("arch", UNLIKE)
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
        run(rows.RowKernel, "partials", partials, "sm_80", op)


@pytest.mark.parametrize("arch", UNLIKE[1:])
def test_a_wait_whose_phase_never_turns_is_found(arch: str) -> None:
    def wait(original, barrier, phase):  # type: ignore[no-untyped-def]
        original(barrier, Int32(0))

    with pytest.raises(Fault, match=WHERE + "(ld.shared.*nothing waited|mbarrier.try_wait.*waits for ever)"):
        run(cute.arch, "mbarrier_wait", wait, arch, batch=1, tokens=14)


@pytest.mark.parametrize("arch", UNLIKE[1:])
def test_a_wait_for_another_stage_is_found(arch: str) -> None:
    def fetch(original, rings, arrived, token_at, batch, token, stage):  # type: ignore[no-untyped-def]
        original(rings, arrived, token_at, batch, token, 1 - stage)

    with pytest.raises(Fault, match=WHERE + "(ld.shared.*nothing w|mbarrier.*)"):
        run(rows, "_fetch", fetch, arch, batch=1, tokens=14)


# --- the launch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", UNLIKE)
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


@pytest.mark.parametrize("arch", UNLIKE)
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


# --- offsets of more than 32 bits -----------------------------------------------------------------------------------

BATCHES, BATCH = 8, 7  # so many batch items that one CTA walks over all rows of one, and which one that is


SHARED_BY_ALL = (COLUMN, SCALAR)  # roles without batch items and tokens


class Far:
    """The rows that one CTA reads and writes, for the last tokens of a batch item of a very large call.

    Only these rows are in memory. So a CTA that computes one offset in 32 bits is out of bounds.
    """

    def __init__(self, arch: str, op: str, *arguments: Any, **options: Any) -> None:
        """arguments: of a small call, with the dtypes, widths and broadcasts of the large one."""
        self.call = OPS[op].call(*arguments, **options)
        self.family, given = self.call.op.family, self.call.operands(self.call.empty_results())
        self.values, self.variant = given.values, compile._variant(self.family, self.call.chain, given)
        self.kernel, self.tiling = compiled(arch, self.variant), self.variant.tiling(arch)
        self.row = prod(self.values[self.family.arguments[0].name].shape[2:])
        self.tokens = 2**31 // self.row // 64 * 64 + 64  # a contiguous batch item has more than 2^31 elements
        self.memory = GlobalMemory()

    def of_cta(self) -> tuple[list[int], tuple[int, int]]:
        """The tokens that a CTA works on, the last one among them, and its place in the grid, as (x, y)."""
        last = self.tokens - 1
        if isinstance(self.tiling, VectorTiling):
            tiling, d = self.tiling, self.variant.d
            assert tiling.threads * tiling.vectors * tiling.vector == d, "choose d so that a CTA has one row"
            return [last], (last, BATCH)
        if "rotation" in self.values:
            at = last // self.tiling.tokens
            return [*range(at * self.tiling.tokens, self.tokens)], (at, BATCH)
        if self.tiling.schedule is None:
            return [last], (BATCH * self.tokens + last, 0)
        return [*range(self.tiling.schedule.stages or 2), last], (BATCH, 0)

    def layout(self, number: int, argument: Argument) -> Layout:
        """The argument in the large call: strides that pass 2^31 elements, others for every argument."""
        small = self.values[argument.name]
        batches, tokens, *inner = small.shape
        within = (inner[-1],) if len(inner) == 2 else ()
        if argument.written:
            strides = (self.tokens * prod(inner), prod(inner))
        elif tokens == 1:
            strides = (2**31 + 64 * number, 0)
        else:
            by_token = 2 * max(prod(inner), self.row)
            strides = (self.tokens * by_token + 64 * number, by_token)
        shape = (BATCHES if batches > 1 else 1, self.tokens if tokens > 1 else 1, *inner)
        return Layout(small.dtype, shape, (*strides, *within, 1))

    def add(self, argument: Argument, layout: Layout, tokens: list[int]) -> int:
        """Puts the rows of these tokens into memory; gives the address of the whole."""
        self.memory._end += 2**46  # whatever an offset loses, it is nearest to its own operand, which the message names
        size, width = layout.dtype.itemsize, layout.shape[-1]
        row: Any = width * size if argument.written else bytes(width * size)
        if argument.role in SHARED_BY_ALL:
            return self.memory.add(argument.name, {0: ((), row)}, size, 0, False)
        places = (BATCH,), tokens if layout.shape[1] > 1 else (0,), *map(range, layout.shape[2:-1])
        rows = {}
        for index in product(*places):
            rows[size * sum(i * by for i, by in zip(index, layout.strides, strict=False))] = index, row
        return self.memory.add(argument.name, rows, size, 0, argument.written)

    def run(self) -> None:
        tokens, (x, y) = self.of_cta()
        given, layouts = [], {}
        for number, argument in enumerate(self.family.arguments):
            value = self.values[argument.name]
            if isinstance(value, Layout):
                layout = value if argument.role in SHARED_BY_ALL else self.layout(number, argument)
                layouts[argument.name] = layout
                value = self.add(argument, layout, tokens)
            if value is not None:
                given.append(value)
        numbers = self.family.launch_numbers(layouts)
        with (
            mock.patch.object(tickets.COUNTERS, "address", lambda d, s, batches: self.memory.add_counters(batches)),
            mock.patch.object(families_of_rows, "processors", return_value=1),
        ):
            of_launch = self.family.of_launch(0, 0, BATCHES)
        if of_launch and self.tiling.schedule is not None:  # all rows but the last are drawn already
            self.memory.counters[of_launch[1] + 4 * BATCH] = self.tokens - len(tokens)
        self.memory.freeze()
        program = parse(self.kernel.ptx)
        what = launch(self.kernel.host, program, [*given, *numbers, *of_launch])
        machine = Machine(program, (1, 1, 1), what.shared_bytes, self.memory, what.parameters)
        assert x < what.grid[0] and y < what.grid[1]
        machine.specials["%ctaid.x"][:], machine.specials["%ctaid.y"][:] = x, y
        machine.run()


def far_norms(arch: str, per_token: bool) -> Far:
    o = bounds.operands(2, 3, 2304)
    if per_token:
        o = replace(o, gate=random(2, 3, 2304, seed=1), scale=random(2, 3, 2304, seed=2))
    return Far(arch, bounds.DUAL, *o.arguments(bounds.DUAL))


@pytest.mark.parametrize(
    ("arch", "per_token"),
    (("sm_80", False), ("sm_90a", False), ("sm_90a", True)),
    ids=("rows loaded ahead", "rows by bulk copies", "a row a CTA, gate and scale by token"),
)
def test_no_offset_of_a_norms_operands_and_results_is_computed_in_32_bits(arch: str, per_token: bool) -> None:
    far_norms(arch, per_token).run()


@pytest.mark.parametrize("rotation", (torch.complex64, torch.bfloat16), ids=("complex", "cosines and sines"))
def test_no_offset_of_heads_and_their_rotation_is_computed_in_32_bits(rotation: torch.dtype) -> None:
    o = heads(2, 3, 4, 2, 128, rotation=rotation)
    turning = [None if t is None else torch.cat((t, t)) for t in (o.rotation, o.sin)]
    Far("sm_90a", "qk_norm_rope", *replace(o, rotation=turning[0], sin=turning[1]).arguments()).run()


def test_no_offset_of_silu_mul_is_computed_in_32_bits() -> None:
    Far("sm_90a", "silu_mul", random(2, 3, 4096), random(2, 3, 4096, seed=1)).run()


@pytest.mark.parametrize("arch", ("sm_89", "sm_90a"))
def test_no_offset_of_what_is_quantised_is_computed_in_32_bits(arch: str) -> None:
    o = bounds.operands(2, 3, 2304)
    Far(arch, f"{bounds.DUAL}_quant", *o.arguments(bounds.DUAL)).run()
    Far(arch, "silu_mul_quant", random(2, 3, 4096), random(2, 3, 4096, seed=1)).run()
    Far(arch, "silu_mul_quant.static_keep_z", random(2, 3, 4096), random(2, 3, 4096, seed=1), random()).run()


# --- the divisor of a mean, and the eps -----------------------------------------------------------------------------


def signs(*shape: int) -> Tensor:
    """1 and -1 in turn: the norm of any multiple of them."""
    return torch.ones(shape).unflatten(-1, (-1, 2)).mul(torch.tensor((1.0, -1.0))).flatten(-2)


def assert_is(out: Tensor, expected: float, tolerance: float, what: str) -> None:
    off = (out - expected * signs(*out.shape)).abs().max().item()
    assert off <= tolerance, f"{what} of D = {out.shape[-1]} is off by {off:.2g}"


@pytest.mark.parametrize("d", (3840, 8192))
def test_the_means_of_a_norm_divide_by_d(d: int) -> None:
    """cute/stage.py. In fp32, where even D - 1 instead of a large D changes digits that count."""
    question = "is each sum over the row divided by D? The {} norm"
    with gpu("sm_90a", 1):
        (out,) = device.call("norm_scale", (3 * signs(1, 2, d), None, None, None, 0.0))
        assert_is(out, 1.0, 1e-6, question.format("rms"))
        (out,) = device.call("norm_scale", (100 + 3 * signs(1, 2, d), None, None, None, 0.0), norm="layer")
        assert_is(out, 1.0, 2e-5, question.format("layer"))


@pytest.mark.parametrize("d", (128, 256))
def test_the_mean_of_a_heads_norm_divides_by_d(d: int) -> None:
    """cute/norm_rope.py."""
    with gpu("sm_90a", 1):
        (out,) = device.call("norm_rope", (3 * signs(1, 2, 3, d), None, torch.ones(2, d), torch.zeros(2, d), 0.0))
    assert_is(out, 1.0, 1e-6, "is the sum over a head divided by D? The norm")


def test_each_of_two_norms_adds_its_own_eps() -> None:
    """cute/modulated_norm.py: 3 / sqrt(9 + 16) = 0.6, and of that 0.6 / sqrt(0.36 + 0.64)."""
    x = 3 * signs(1, 2, 3840)
    with gpu("sm_90a", 1):
        y, z = device.call(bounds.DUAL, (x, None, None, None, 0 * x, 16.0, None, None, None, 0.64))
    assert_is(y, 0.6, 1e-6, "is eps added to the mean? y")
    assert_is(z, 0.6, 1e-6, "is eps2 added to the mean? z")


def test_each_of_q_and_k_adds_its_own_eps() -> None:
    """cute/norm_rope.py."""
    q, k = 3 * signs(1, 2, 3, 128), 3 * signs(1, 2, 3, 128)
    with gpu("sm_90a", 1):
        q_out, k_out = device.call(
            "qk_norm_rope", (q, k, None, None, torch.ones(2, 128), torch.zeros(2, 128), 0.0, 16.0)
        )
    assert_is(q_out, 1.0, 1e-6, "is q_eps added to the mean? q")
    assert_is(k_out, 0.6, 1e-6, "is k_eps added to the mean? k")
