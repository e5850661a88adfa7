"""Kernels whose CTAs each work on whole rows, one after the other.

A CTA may walk over rows of one batch item and keep in registers what the rows share. While it works on a row, the next
rows are loaded, into registers (`persistent_kernel`) or by bulk copies into shared memory (`staged_kernel`, sm_90 and
newer). Otherwise a CTA takes one row (`row_kernel`). The tiling chooses among these kernels and says how many CTAs
share the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.arch.nvvm_wrappers import inline_ptx
from cutlass.cute.nvgpu.cpasync import CopyBulkG2SOp
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.memory import SmemAllocator

from dit_kernels.arguments import PART, PER_ROW, ROW, Role
from dit_kernels.cute.kernel import Kernel
from dit_kernels.cute.quantise import Part, quantise
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.cute.stage import Reader, RowPlace, Writer, row_of
from dit_kernels.cute.tiling import ACCESS_BYTES, RowTiling
from dit_kernels.rounding import QuantSteps


class Shared:
    """What the rows of a batch item share, e.g. factors and weights. By default nothing."""

    def hold(self) -> None:
        """Computes once what is the same for all following rows."""


class RowKernel(Kernel):
    """A kernel whose CTAs work on rows. A subclass computes one row in `run`.

    norms: for how many norms there is room for partial sums.
    """

    norms = 0

    of_launch = (Int32, Int64)  # multiprocessors; address of a counter per batch item, 0 before and after

    def launch(self, operands, batches, tokens, strides, of_launch, stream) -> None:
        processors, tickets = of_launch
        bundle = {
            name: self.tensor(batches, tokens, name, given, strides.get(name)) if name in self.specs else given
            for name, given in operands.items()
        }
        block, schedule = [self.tiling.threads, 1, 1], self.tiling.schedule
        if schedule is None:
            self.row_kernel(bundle).launch(grid=[batches * tokens, 1, 1], block=block, stream=stream)
            return
        # As many CTAs as run at once, divided among the batch items.
        walkers = cutlass.min(cutlass.max(processors * schedule.ctas // batches, 1), tokens)
        kernel = self.staged_kernel if schedule.stages else self.persistent_kernel
        given = walkers * (schedule.stages or 2)
        drawn = cutlass.max(tokens - given, 0)
        kernel(bundle, walkers, given, drawn, tickets).launch(
            grid=[batches, walkers, 1],
            block=block,
            stream=stream,
            min_blocks_per_mp=schedule.ctas,
            preferred_smem_carveout=100,
        )

    def run(self, place: RowPlace, rows: dict[str, Reader], shared: Any, operands, partials) -> None:
        """Computes the row at `place`. partials: one buffer of `partials`."""
        raise NotImplementedError

    def quantise(self, parts: Sequence[Part], operands: dict[str, Any], partials) -> None:
        """Quantises the row that `run` has computed, as the chain says. parts: as `quantise.quantise` takes them."""
        quant = self.chain.quant
        largest = partials[None, 0, self.norms] if isinstance(quant, QuantSteps) else None
        quantise(parts, quant, operands["s"], operands["static_scale"], largest)

    def shared(self, operands: dict[str, Any], place: RowPlace) -> Shared:
        """What the rows of the batch item at `place` share."""
        return Shared()

    def place(self, batch: Int32, token: Int32, thread: Int32) -> RowPlace:
        """Where a thread works."""
        return RowPlace(self.tiling, self.d, batch, token, thread)

    def place_in(self, name: str, place: RowPlace) -> RowPlace:
        """Which vectors a thread reads of the row operand `name`."""
        return place

    def width(self, name: str) -> int:
        """The last dimension of an argument that has a row for each token."""
        return self.d

    def tensor(self, batches: Int32, tokens: Int32, name: str, pointer, strides):
        """An argument as (B, S, D), or, if it broadcasts, (B, 1, D), (D,) or (1, 1, 1). Results are contiguous.

        A number for each row is (B, S).
        """
        spec = self.specs[name]
        if spec is None:
            return None
        if self.roles[name] is PER_ROW:
            return cute.make_tensor(pointer, cute.make_layout((batches, tokens), stride=(Int64(tokens), 1)))
        width = spec.width or self.width(name)
        by_batch, by_token = strides or (Int64(tokens) * width, width)
        layouts = {
            "token": ((batches, tokens, width), (by_batch, by_token, 1)),
            "batch": ((batches, 1, self.d), (by_batch, 0, 1)),
            "column": ((self.d,), (1,)),
            "element": ((1, 1, 1), (0, 0, 1)),
        }
        shape, stride = layouts[spec.walk]
        return cute.make_tensor(pointer, cute.make_layout(shape, stride=stride))

    def writer(self, operands: dict[str, Any], name: str, place: RowPlace) -> Writer:
        return Writer(operands[name], self.specs[name], place)

    def readers(self, operands: dict[str, Any], place: RowPlace, ahead: bool) -> dict[str, Reader]:
        """Readers of the rows of a token."""
        return {
            name: Reader.of(operands[name], self.specs[name], self.place_in(name, place), ahead)
            for name in self.row_names
        }

    def refill(self, ahead: dict[str, Reader], operands: dict[str, Any], place: RowPlace) -> None:
        """Loads the rows of another token into the registers of readers, unless the token is negative."""
        for name, reader in ahead.items():
            reader.refill(Reader.of(operands[name], self.specs[name], self.place_in(name, place)), place.token >= 0)

    def taken(self, ahead: dict[str, Reader], place: RowPlace) -> dict[str, Reader]:
        """Readers of the rows that were loaded ahead, whose registers may be filled again."""
        return {name: reader.taken(self.place_in(name, place)) for name, reader in ahead.items()}

    def staged(self, rings: dict[str, _Ring], place: RowPlace, stage: Int32) -> dict[str, Reader]:
        """Readers of the rows in a stage."""
        return {name: ring.reader(self.place_in(name, place), stage) for name, ring in rings.items()}

    @property
    def roles(self) -> dict[str, Role]:
        return {argument.name: argument.role for argument in self.arguments}

    @property
    def row_names(self) -> list[str]:
        """The names of the row operands that are read."""
        read = (argument for argument in self.arguments if argument.role in (ROW, PART) and not argument.written)
        return [argument.name for argument in read if self.specs[argument.name] is not None]

    @cute.kernel
    def row_kernel(self, operands: dict[str, Any]):
        """A CTA works on one row."""
        row, tokens = cute.arch.block_idx()[0], self.tokens(operands)
        batch = row // tokens
        place = self.place(batch, row - batch * tokens, cute.arch.thread_idx()[0])
        # Every load that can be issued early is issued here, before the first sum waits.
        rows = self.readers(operands, place, self.tiling.resident)
        shared = self.shared(operands, place)
        self.run(place, rows, shared, operands, self.partials(1)[None, None, None, 0])

    @cute.kernel
    def persistent_kernel(self, operands: dict[str, Any], walkers: Int32, given: Int32, drawn: Int32, tickets: Int64):
        """A CTA walks over rows of one batch item. It loads the next row into registers while it works on a row."""
        thread, tokens = cute.arch.thread_idx()[0], self.tokens(operands)
        batch, token, _ = cute.arch.block_idx()
        place = self.place(batch, token, thread)
        following = self.readers(operands, place, True)
        shared = self.shared(operands, place)
        tickets = _Tickets(tickets, batch, walkers, given, drawn)
        token_at = SmemAllocator().allocate_tensor(Int32, cute.make_layout(2))
        draw, row_of_ticket = tickets.draw, tickets.row_of
        ticket = Int32(0)
        if thread == 0:
            ticket = draw(ticket)
        shared.hold()
        # A row with one sum has one barrier. So a fast warp may write its partial sum of the next row while a slow warp
        # still reads those of this row.
        partials = self.partials(2)
        parity, ahead = Int32(0), cutlass.select_(token + walkers < tokens, token + walkers, Int32(-1))
        while token >= 0:
            here = replace(place, token=token)
            rows = self.taken(following, here)
            self.refill(following, operands, replace(place, token=ahead))
            if thread == 0:  # the row after the next: drawing a ticket takes as long as a row
                token_at[parity] = row_of_ticket(ticket)
                ticket = draw(ticket)
            self.run(here, rows, shared, operands, partials[None, None, None, parity])
            if const_expr(self.tiling.warps == 1):
                cute.arch.sync_threads()  # the sums of one warp have no barrier
            token, ahead = ahead, cute.arch.make_warp_uniform(token_at[parity])
            parity = 1 - parity

    @cute.kernel
    def staged_kernel(self, operands: dict[str, Any], walkers: Int32, given: Int32, drawn: Int32, tickets: Int64):
        """A CTA walks over rows of one batch item. Bulk copies load the next rows into shared memory."""
        stages, thread, tokens = self.tiling.schedule.stages, cute.arch.thread_idx()[0], self.tokens(operands)
        batch, walker, _ = cute.arch.block_idx()
        place = self.place(batch, walker, thread)
        allocator = SmemAllocator()
        arrived = allocator.allocate_array(Int64, stages)
        rings = {name: _Ring(allocator, operands[name], self.specs[name], self.tiling) for name in self.row_names}
        token_at = allocator.allocate_tensor(Int32, cute.make_layout(stages))  # the row in each stage; -1: none
        fetch, rows_at = partial(_fetch, tuple(rings.values()), arrived, token_at, batch), partial(self.staged, rings)
        tickets = _Tickets(tickets, batch, walkers, given, drawn)
        draw, row_of_ticket = tickets.draw, tickets.row_of
        ticket = Int32(0)
        if thread == 0:
            for stage in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(arrived + stage, 1)
            cute.arch.mbarrier_init_fence()
            for stage in cutlass.range_constexpr(stages):
                token = walker + stage * walkers
                fetch(cutlass.select_(token < tokens, token, Int32(-1)), stage)
            ticket = draw(ticket)
        shared = self.shared(operands, place)
        shared.hold()
        partials = self.partials(2)
        cute.arch.sync_threads()  # now the mbarriers are initialised
        stage, phase, parity = Int32(0), Int32(0), Int32(0)
        token = token_at[0]
        while token >= 0:
            here = replace(place, token=token)
            cute.arch.mbarrier_wait(arrived + stage, phase)
            self.run(here, rows_at(here, stage), shared, operands, partials[None, None, None, parity])
            cute.arch.sync_threads()  # now no thread reads this stage any more
            if thread == 0:
                fetch(row_of_ticket(ticket), stage)
                ticket = draw(ticket)
            parity = 1 - parity
            stage += 1
            if stage == stages:
                stage = Int32(0)
                phase = 1 - phase
            token = cute.arch.make_warp_uniform(token_at[stage])

    def tokens(self, operands: dict[str, Any]) -> Int32:
        return operands[self.arguments[0].name].shape[1]

    def partials(self, buffers: int) -> cute.Tensor:
        """Shared memory for the partial sums of the warps: (warps, moment, norm, buffer).

        A kernel that computes scales keeps the largest numbers of the warps behind the sums of the norms.
        """
        layout = cute.make_layout((self.tiling.warps, 2, max(1, self.reductions), buffers))
        return SmemAllocator().allocate_tensor(Float32, layout)

    @property
    def reductions(self) -> int:
        """How many norms, and quantisers that compute scales, there are."""
        return self.norms + isinstance(self.chain.quant, QuantSteps)


# --- the rows of a walk ---------------------------------------------------------------------------------------------


class _Ring:
    """The next rows of one operand, in shared memory."""

    def __init__(self, allocator: SmemAllocator, tensor: cute.Tensor, spec: TensorSpec, tiling: RowTiling):
        self.tensor, self.spec, self.d = tensor, spec, tensor.shape[2]
        layout = cute.make_layout((self.d, tiling.schedule.stages))
        self.rows = allocator.allocate_tensor(tensor.element_type, layout, byte_alignment=128)

    def row(self, stage: Int32 | int, vector: int) -> cute.Tensor:
        dtype = self.rows.element_type
        address = self.rows.iterator.toint() + stage * (self.d * dtype.width // 8)
        pointer = cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=ACCESS_BYTES)
        return cute.make_tensor(pointer, cute.make_layout((self.d // vector, vector), stride=(vector, 1)))

    def reader(self, place: RowPlace, stage: Int32) -> Reader:
        return Reader(place, self.row(stage, place.tiling.vector))


@cute.jit
def _fetch(
    rings: cutlass.Constexpr, arrived: cute.Pointer, token_at: cute.Tensor, batch: Int32, token: Int32, stage: Int32
):
    """Starts the copies of a token's rows into a stage, or no copy if the token is negative. Called by one thread."""
    size = sum(ring.d * ring.spec.dtype.itemsize for ring in rings)
    token_at[stage] = token
    if token >= 0:
        cute.arch.mbarrier_arrive_and_expect_tx(arrived + stage, size)
        for ring in rings:
            source, target = row_of(ring.tensor, ring.spec, batch, token, ring.d), ring.row(stage, ring.d)
            bits = ring.d * ring.spec.dtype.itemsize * 8
            atom = cute.make_copy_atom(CopyBulkG2SOp(), source.element_type, num_bits_per_copy=bits)
            cute.copy(atom, source[0, None], target[0, None], mbar_ptr=arrived + stage)


class _Tickets:
    """Which CTA walks over which rows of a batch item. The first `given` rows are divided evenly.

    Multiprocessors are not equally fast, so a CTA that has finished a row draws a ticket for another one. Every CTA
    draws one ticket that means no row. The last of these sets the counter back to 0, for the next launch.
    """

    def __init__(self, counters: Int64, batch: Int32, walkers: Int32, given: Int32, drawn: Int32):
        self.counter, self.walkers, self.given, self.drawn = counters + Int64(batch) * 4, walkers, given, drawn

    def draw(self, ticket: Int32) -> Int32:
        """A new ticket if the given one means a row; otherwise the given one. Pass ticket 0 to draw the first."""
        return _draw(self.counter, self.drawn + self.walkers - 1, ticket, self.drawn)

    def row_of(self, ticket: Int32) -> Int32:
        """The row that a ticket means; -1 if it means no row."""
        return cutlass.select_(ticket < self.drawn, self.given + ticket, Int32(-1))


@cute.jit
def _draw(counter: Int64, last: Int32, ticket: Int32, rows: Int32) -> Int32:
    if ticket < rows:
        ticket = _count(counter, last)
    return ticket


@dsl_user_op
def _count(counter: Int64, last: Int32, *, loc=None, ip=None) -> Int32:
    """Returns the counter and then increments it; after `last` it becomes 0."""
    count = "atom.global.inc.u32 {$w0}, [{$r0}], {$r1};"
    return inline_ptx(count, write_only_types=[Int32], read_only_args=[counter, last], loc=loc, ip=ip)
