"""The kernels of a NormChain: one stage, or two over the same row.

    y = residual + tanh(gate) * norm(x)
    z = norm(y) * (1 + scale)

A row that fits in registers (`RowTiling.resident`) is read once. All its loads are issued before the first reduction. y
stays in registers in its stored dtype, and the second norm reads y from there. A wider row is read again in each pass,
mostly from L2.

If the factors are the same for every row of a batch item, a CTA walks over rows of one item and keeps tanh(gate),
1 + scale and the weights in registers. While it works on a row, the next rows are loaded, into registers
(`persistent_kernel`) or by bulk copies into shared memory (`staged_kernel`, sm_90 and newer). Otherwise a CTA takes one
row (`row_kernel`). The tiling chooses among these kernels and says how many CTAs share the rows.
"""

from __future__ import annotations

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

from dit_kernels.arguments import ROW
from dit_kernels.cute.kernel import Kernel
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.cute.stage import Norm, Reader, RowPlace, Writer, factor_of, row_of, write
from dit_kernels.cute.stage import walk as walk_row
from dit_kernels.cute.tiling import ACCESS_BYTES, RowTiling


class ModulatedNormKernel(Kernel):
    """The kernels of a NormChain."""

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

    def tensor(self, batches: Int32, tokens: Int32, name: str, pointer, strides):
        """An argument as (B, S, D), or, if it broadcasts, (B, 1, D), (D,) or (1, 1, 1). Results are contiguous."""
        spec = self.specs[name]
        if spec is None:
            return None
        by_batch, by_token = strides or (Int64(tokens) * self.d, self.d)
        layouts = {
            "token": ((batches, tokens, self.d), (by_batch, by_token, 1)),
            "batch": ((batches, 1, self.d), (by_batch, 0, 1)),
            "column": ((self.d,), (1,)),
            "element": ((1, 1, 1), (0, 0, 1)),
        }
        shape, stride = layouts[spec.walk]
        return cute.make_tensor(pointer, cute.make_layout(shape, stride=stride))

    def readers(self, operands: dict[str, Any], place: RowPlace, ahead: bool) -> dict[str, Reader]:
        """Readers of the rows of a token."""
        return {name: Reader.of(operands[name], self.specs[name], place, ahead) for name in self.row_names}

    def refill(self, ahead: dict[str, Reader], operands: dict[str, Any], place: RowPlace) -> None:
        """Loads the rows of another token into the registers of readers, unless the token is negative."""
        for name, reader in ahead.items():
            reader.refill(Reader.of(operands[name], self.specs[name], place), place.token >= 0)

    @property
    def row_names(self) -> list[str]:
        """The names of the row operands that are read: x, and the terms of the stages."""
        return [a.name for a in self.arguments if a.role is ROW and not a.written and self.specs[a.name] is not None]

    @cute.kernel
    def row_kernel(self, operands: dict[str, Any]):
        """A CTA works on one row."""
        row, tokens = cute.arch.block_idx()[0], operands["x"].shape[1]
        batch = row // tokens
        place = RowPlace(self.tiling, self.d, batch, row - batch * tokens, cute.arch.thread_idx()[0])
        # Every load that can be issued early is issued here, before the first sum waits.
        rows = self.readers(operands, place, self.tiling.resident)
        parameters = _Parameters(self, operands, place)
        self.run(place, rows, parameters, operands, self.partials(1)[None, None, None, 0])

    @cute.kernel
    def persistent_kernel(self, operands: dict[str, Any], walkers: Int32, given: Int32, drawn: Int32, tickets: Int64):
        """A CTA walks over rows of one batch item. It loads the next row into registers while it works on a row."""
        thread, tokens = cute.arch.thread_idx()[0], operands["x"].shape[1]
        batch, token, _ = cute.arch.block_idx()
        place = RowPlace(self.tiling, self.d, batch, token, thread)
        following = self.readers(operands, place, True)
        parameters = _Parameters(self, operands, place)
        tickets = _Tickets(tickets, batch, walkers, given, drawn)
        token_at = SmemAllocator().allocate_tensor(Int32, cute.make_layout(2))
        draw, row_of_ticket = tickets.draw, tickets.row_of
        ticket = Int32(0)
        if thread == 0:
            ticket = draw(ticket)
        parameters.hold()
        # A row with one sum has one barrier. So a fast warp may write its partial sum of the next row while a slow warp
        # still reads those of this row.
        partials = self.partials(2)
        parity, ahead = Int32(0), cutlass.select_(token + walkers < tokens, token + walkers, Int32(-1))
        while token >= 0:
            here = replace(place, token=token)
            rows = _taken(following, here)
            self.refill(following, operands, replace(place, token=ahead))
            if thread == 0:  # the row after the next: drawing a ticket takes as long as a row
                token_at[parity] = row_of_ticket(ticket)
                ticket = draw(ticket)
            self.run(here, rows, parameters, operands, partials[None, None, None, parity])
            if const_expr(self.tiling.warps == 1):
                cute.arch.sync_threads()  # the sums of one warp have no barrier
            token, ahead = ahead, cute.arch.make_warp_uniform(token_at[parity])
            parity = 1 - parity

    @cute.kernel
    def staged_kernel(self, operands: dict[str, Any], walkers: Int32, given: Int32, drawn: Int32, tickets: Int64):
        """A CTA walks over rows of one batch item. Bulk copies load the next rows into shared memory."""
        stages, thread, tokens = self.tiling.schedule.stages, cute.arch.thread_idx()[0], operands["x"].shape[1]
        batch, walker, _ = cute.arch.block_idx()
        place = RowPlace(self.tiling, self.d, batch, walker, thread)
        allocator = SmemAllocator()
        arrived = allocator.allocate_array(Int64, stages)
        rings = {name: _Ring(allocator, operands[name], self.specs[name], self.tiling) for name in self.row_names}
        token_at = allocator.allocate_tensor(Int32, cute.make_layout(stages))  # the row in each stage; -1: none
        fetch, rows_at = partial(_fetch, tuple(rings.values()), arrived, token_at, batch), partial(_staged, rings)
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
        parameters = _Parameters(self, operands, place)
        parameters.hold()
        partials = self.partials(2)
        cute.arch.sync_threads()  # now the mbarriers are initialised
        stage, phase, parity = Int32(0), Int32(0), Int32(0)
        token = token_at[0]
        while token >= 0:
            here = replace(place, token=token)
            cute.arch.mbarrier_wait(arrived + stage, phase)
            self.run(here, rows_at(here, stage), parameters, operands, partials[None, None, None, parity])
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

    def partials(self, buffers: int) -> cute.Tensor:
        """Shared memory for the partial sums of the warps: (warps, moment, norm, buffer)."""
        return SmemAllocator().allocate_tensor(Float32, cute.make_layout((self.tiling.warps, 2, 2, buffers)))

    def run(self, place: RowPlace, rows: dict[str, Reader], parameters: _Parameters, operands, partials) -> None:
        """Computes the chain on the row at `place`."""
        stages = self.chain.stages

        def norm_of(i: int) -> Norm:
            return Norm(stages[i], *parameters.columns[i], place, partials[None, None, i])

        read, norm = rows["x"], norm_of(0)
        moments = walk_row(place.tiling, lambda i: norm.moment(i, read(i)))
        for i, stage in enumerate(stages):
            norm.finish(moments, read, operands[stage.names.eps])
            out = Writer(operands[stage.names.out], self.specs[stage.names.out], place)
            following = norm_of(i + 1) if i + 1 < len(stages) else None
            term = None if stage.names.term is None else rows[stage.names.term]
            moments = write(stage, norm, read, parameters.factors[i], term, out, following)
            read, norm = out, following or norm


class _Parameters:
    """The factors, weights and biases of each stage."""

    def __init__(self, kernel: ModulatedNormKernel, operands: dict[str, Any], place: RowPlace):
        self.stages, self.specs, tiling = kernel.chain.stages, kernel.specs, kernel.tiling
        # A CTA that takes one row does not load the parameters of a later norm ahead. They would take registers that
        # another CTA can use meanwhile.
        ahead = [tiling.ahead and (i == 0 or tiling.schedule is not None) for i in range(len(self.stages))]

        def column(name: str, ahead: bool) -> Reader:
            return Reader.of(operands[name], self.specs[name], place, ahead)

        pairs = list(zip(self.stages, ahead, strict=True))
        self.factors = [factor_of(stage, operands, self.specs, place, early) for stage, early in pairs]
        self.columns = [(column(s.names.weight, early), column(s.names.bias, early)) for s, early in pairs]

    def hold(self) -> None:
        """Activates the factors once, for all following rows."""
        for stage, factor in zip(self.stages, self.factors, strict=True):
            spec = self.specs[stage.names.factor]
            if spec is not None:
                factor.hold(stage.held_dtype(stage.names.factor, spec.dtype))


# --- the rows of a walk ---------------------------------------------------------------------------------------------


def _taken(ahead: dict[str, Reader], place: RowPlace) -> dict[str, Reader]:
    return {name: reader.taken(place) for name, reader in ahead.items()}


def _staged(rings: dict[str, _Ring], place: RowPlace, stage: Int32) -> dict[str, Reader]:
    return {name: ring.reader(place, stage) for name, ring in rings.items()}


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
