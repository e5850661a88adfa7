"""The gated norm, the scaled norm, and both over one row.

    y = residual + tanh(gate) * norm(x)
    z = norm(y) * (1 + scale)

A row that fits in registers (`RowTiling.resident`) is read once: every load is issued before the first reduction, y
stays in registers in its stored dtype, and the second norm reads it from there. A wider row is walked in passes that
read it again, from L2 for the most part.

Where gate and scale are the same for every row of a batch item, a CTA walks rows of one item and keeps tanh(gate),
1 + scale and the weights in registers; while it works on a row the next ones come in, into registers
(`persistent_kernel`) or by bulk copies into shared memory (`staged_kernel`, sm_90 and newer). Elsewhere a CTA takes one
row (`row_kernel`). Which of them, and how the rows are shared out, is the tiling's to say.

All arithmetic is fp32. Where it is rounded in between is not decided here: `rounding.py` gives the dtype of each step,
and a step is a conversion to that dtype and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.arch.nvvm_wrappers import inline_ptx
from cutlass.cute.nvgpu.cpasync import CopyBulkG2SOp
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.memory import SmemAllocator

from dit_kernels.chain import Chain
from dit_kernels.cute.arith import product, rounded, total, widen
from dit_kernels.cute.norm import normed, rstd_of, square, sum_of
from dit_kernels.cute.operand import Operand
from dit_kernels.cute.reduce import cta_sum
from dit_kernels.cute.tiling import ACCESS_BYTES, RowTiling
from dit_kernels.cute.vectors import load, load_into, store
from dit_kernels.rounding import GatedSteps, NormSteps, ScaledSteps


@dataclass(frozen=True)
class Operands:
    """The tensors of one kernel, by the names of `NormGate.__call__`."""

    x: Operand
    weight: Operand | None = None
    bias: Operand | None = None
    gate: Operand | None = None
    residual: Operand | None = None
    weight2: Operand | None = None
    bias2: Operand | None = None
    scale: Operand | None = None
    y: Operand | None = None
    z: Operand | None = None


# --- one vector -----------------------------------------------------------------------------------------------------
# Plain Python: these run while a kernel is traced. Values are those of `arith`, and any parameter may be None.


def _gated(n, gate, residual, steps: GatedSteps):
    """y = residual + gate * n, as it is stored; gate may be a single element."""
    p = rounded(n, steps.product) if gate is None else product(n, gate, steps.product)
    return rounded(total(residual, p, steps.sum), steps.y)


def _scaled(n, scale, steps: ScaledSteps):
    """z = n * scale, as it is stored; scale may be a single element."""
    z = rounded(n, steps.product) if scale is None else product(n, scale, steps.product)
    return rounded(z, steps.z)


# --- memory ---------------------------------------------------------------------------------------------------------


@cute.jit
def _row_of(tensor: cute.Tensor, operand: cutlass.Constexpr, batch: Int32, token: Int32, vector: cutlass.Constexpr):
    """The row that (batch, token) reads or writes, as (D / vector, vector)."""
    address = tensor.iterator.toint()
    if const_expr(operand.walk in ("token", "batch")):
        offset = Int64(batch) * tensor.stride[0]  # offsets pass 2^31
        if const_expr(operand.walk == "token"):
            offset += Int64(token) * tensor.stride[1]
        address += offset * (tensor.element_type.width // 8)
    pointer = cute.make_ptr(tensor.element_type, address, cute.AddressSpace.gmem, assumed_align=operand.access)
    d = tensor.shape[cute.rank(tensor) - 1]
    return cute.make_tensor(pointer, cute.make_layout((d // vector, vector), stride=(vector, 1)))


def _packed(value, dtype: torch.dtype) -> cute.Tensor:
    value = rounded(value, dtype)
    fragment = cute.make_rmem_tensor(value.shape, value.dtype)
    fragment.store(value)
    return fragment


@dataclass(frozen=True)
class _Place:
    """Where a thread stands: its row, and its vectors in it."""

    tiling: RowTiling
    d: int
    batch: Int32
    token: Int32
    thread: Int32

    def index(self, i):
        """Which vector of the row is this thread's vector i."""
        return self.thread + i * self.tiling.threads

    def inside(self, i):
        """Is vector i in the row? Known while tracing where the tiling has no tail."""
        return self.index(i) * self.tiling.vector < self.d if self.tiling.tail else True

    def counted(self, i, value: Float32) -> Float32:
        """What vector i adds to a sum over the row: nothing from outside, whatever its zeros have become."""
        inside = self.inside(i)
        return value if inside is True else Float32(cutlass.select_(inside, value, Float32(0.0)))


class _Reader:
    """This thread's vectors of one operand: loaded ahead and kept, or loaded when asked for."""

    def __init__(self, place: _Place, row: cute.Tensor | None, element: Float32 | None = None, ahead: bool = False):
        self.place, self.row, self.element = place, row, element
        self.fragments = [self._load(i) for i in range(place.tiling.vectors)] if ahead and row is not None else []

    @classmethod
    def of(cls, tensor: cute.Tensor | None, operand: Operand | None, place: _Place, ahead: bool = False):
        """A reader of a tensor in global memory."""
        if operand is None:
            return cls(place, None)
        if operand.walk == "element":
            return cls(place, None, tensor[0, 0, 0].to(Float32))
        return cls(place, _row_of(tensor, operand, place.batch, place.token, place.tiling.vector), None, ahead)

    def in_memory(self, i) -> Callable[[], cute.Tensor]:
        return lambda: self.row[self.place.index(i), None]

    def _load(self, i) -> cute.Tensor:
        return load(self.in_memory(i), self.place.tiling.vector, self.row.element_type, self.place.inside(i))

    def __call__(self, i):
        """Vector i, a scalar for a single element, or None for an absent operand."""
        if self.row is None:
            return self.element
        return (self.fragments[i] if self.fragments else self._load(i)).load()


def held_dtype(chain: Chain, operands: Operands, name: str) -> torch.dtype | None:
    """The dtype that a parameter is kept in for many rows: a gate and a scale are kept as they enter the product."""
    operand = getattr(operands, name)
    if operand is None:
        return None
    if name == "gate" and chain.tanh:
        return chain.gated.gate
    if name == "scale" and chain.add_one:
        return chain.scaled.scale
    return operand.dtype


def _identity(value):
    return value


class _Modulation(_Reader):
    """A gate or scale as it enters the product: activated when read, or once and for all by `hold`."""

    activate: Callable[[Any], Any] = staticmethod(_identity)

    def __call__(self, i):
        value = super().__call__(i)
        return None if value is None else self.activate(value)

    def hold(self, dtype: torch.dtype) -> None:
        """Activates what was loaded ahead, and keeps it packed in the dtype that the activation is rounded to."""
        if self.element is not None:
            self.element = self.activate(self.element)
        self.fragments = [_packed(self(i), dtype) for i in range(len(self.fragments))]
        self.activate = _identity


class _Writer(_Reader):
    """This thread's vectors of a result: stored, and kept packed where the row is resident, so that they read back."""

    def __init__(self, tensor: cute.Tensor, operand: Operand, place: _Place):
        super().__init__(place, _row_of(tensor, operand, place.batch, place.token, place.tiling.vector))

    def store(self, i, value) -> cute.Tensor:
        fragment = store(value, self.in_memory(i), self.place.inside(i))
        if self.place.tiling.resident:
            self.fragments.append(fragment)
        return fragment


@cute.jit
def _walk(tiling: cutlass.Constexpr, visit: cutlass.Constexpr) -> Float32:
    """The sum of visit(i) over this thread's vectors, in order."""
    total = Float32(0.0)
    if const_expr(tiling.resident):
        for i in cutlass.range_constexpr(tiling.vectors):
            total += visit(i)
    else:
        for i in cutlass.range(tiling.vectors):
            total += visit(i)
    return total


# --- a norm over the row --------------------------------------------------------------------------------------------


class _Norm:
    """A norm whose statistics are known once `finish` has summed over the CTA.

    `moment` is what a vector of the row adds to the first sum: its squares, or for a layer norm its share of the mean,
    x / D, since a sum of large elements would overflow where eager's running mean does not.
    """

    def __init__(self, kind: str, steps: NormSteps, weight: _Reader, bias: _Reader, place: _Place, partials):
        self.layer, self.steps, self.partials = kind == "layer", steps, partials  # partials: (warps, 2)
        # F.layer_norm computes in fp32 whatever it is called on.
        self.stat = torch.float32 if self.layer else steps.stat
        self.weight, self.bias, self.place = weight, bias, place
        self.mean = self.rstd = None

    def moment(self, i, value) -> Float32:
        place = self.place
        part = widen(value) * Float32(1.0 / place.d) if self.layer else square(value, None, self.stat)
        return place.counted(i, sum_of(part))

    def finish(self, moments: Float32, values: _Reader, eps: Float32) -> None:
        """moments: this thread's; values: the row. A mean is a product with 1/D, as in torch.mean."""
        place, stat = self.place, self.stat
        if self.layer:
            self.mean = mean = cta_sum(moments, self.partials[None, 0])
            moments = _walk(place.tiling, lambda i: place.counted(i, sum_of(square(values(i), mean, stat))))
        mean_square = cta_sum(moments, self.partials[None, 1]) * Float32(1.0 / place.d)
        self.rstd = rstd_of(mean_square, eps, self.steps.root, stat)

    def __call__(self, i, value):
        """The normalised vector i."""
        return normed(value, self.mean, self.rstd, self.weight(i), self.bias(i), self.steps)


# --- the kernels ----------------------------------------------------------------------------------------------------


class NormGate:
    """One member of the family: a chain for one D and one layout of its operands."""

    def __init__(self, chain: Chain, d: int, operands: Operands, tiling: RowTiling):
        self.chain, self.d, self.operands, self.tiling = chain, d, operands, tiling

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        weight: cute.Pointer | None,
        bias: cute.Pointer | None,
        gate: cute.Pointer | None,
        residual: cute.Pointer | None,
        eps: Float32,
        weight2: cute.Pointer | None,
        bias2: cute.Pointer | None,
        scale: cute.Pointer | None,
        eps2: Float32,
        y: cute.Pointer | None,
        z: cute.Pointer | None,
        batches: Int32,
        tokens: Int32,
        x_batch: Int64,  # strides in elements, 0 where the operand is broadcast; those of y and z are contiguous
        x_token: Int64,
        residual_batch: Int64,
        residual_token: Int64,
        gate_batch: Int64,
        gate_token: Int64,
        scale_batch: Int64,
        scale_token: Int64,
        processors: Int32,  # streaming multiprocessors of the device
        tickets: Int64,  # the address of a counter for each batch item, all 0 before the launch and after it
        stream,
    ):
        rows = partial(self.tensor, batches, tokens)
        x = rows("x", x, x_batch, x_token)
        residual = rows("residual", residual, residual_batch, residual_token)
        gate = rows("gate", gate, gate_batch, gate_token)
        scale = rows("scale", scale, scale_batch, scale_token)
        weight, bias = rows("weight", weight), rows("bias", bias)
        weight2, bias2 = rows("weight2", weight2), rows("bias2", bias2)
        y, z = (rows(name, t, Int64(tokens) * self.d, self.d) for name, t in (("y", y), ("z", z)))
        block, schedule = [self.tiling.threads, 1, 1], self.tiling.schedule
        if const_expr(schedule is None):
            self.row_kernel(x, weight, bias, gate, residual, eps, weight2, bias2, scale, eps2, y, z).launch(
                grid=[batches * tokens, 1, 1], block=block, stream=stream
            )
        else:
            # As many CTAs as run at once, shared out among the batch items.
            walkers = cutlass.min(cutlass.max(processors * schedule.ctas // batches, 1), tokens)
            kernel = self.staged_kernel if const_expr(schedule.stages) else self.persistent_kernel
            given = walkers * (schedule.stages or 2)
            drawn = cutlass.max(tokens - given, 0)
            operands = (x, weight, bias, gate, residual, eps, weight2, bias2, scale, eps2, y, z)
            kernel(*operands, walkers, given, drawn, tickets).launch(
                grid=[batches, walkers, 1],
                block=block,
                stream=stream,
                min_blocks_per_mp=schedule.ctas,
                preferred_smem_carveout=100,
            )

    def tensor(self, batches: Int32, tokens: Int32, name: str, pointer, by_batch: Any = 0, by_token: Any = 0):
        """An operand as (B, S, D), or as it is broadcast: (B, 1, D), (D,), (1, 1, 1)."""
        operand = getattr(self.operands, name)
        if operand is None:
            return None
        layouts = {
            "token": ((batches, tokens, self.d), (by_batch, by_token, 1)),
            "batch": ((batches, 1, self.d), (by_batch, 0, 1)),
            "column": ((self.d,), (1,)),
            "element": ((1, 1, 1), (0, 0, 1)),
        }
        shape, stride = layouts[operand.walk]
        return cute.make_tensor(pointer, cute.make_layout(shape, stride=stride))

    @cute.kernel
    def row_kernel(
        self,
        x: cute.Tensor,
        weight: cute.Tensor | None,
        bias: cute.Tensor | None,
        gate: cute.Tensor | None,
        residual: cute.Tensor | None,
        eps: Float32,
        weight2: cute.Tensor | None,
        bias2: cute.Tensor | None,
        scale: cute.Tensor | None,
        eps2: Float32,
        y: cute.Tensor | None,
        z: cute.Tensor | None,
    ):
        """One CTA, one row."""
        row = cute.arch.block_idx()[0]
        batch = row // x.shape[1]
        place = _Place(self.tiling, self.d, batch, row - batch * x.shape[1], cute.arch.thread_idx()[0])
        # Every load that can be is issued here, before the first sum waits.
        values = _Reader.of(x, self.operands.x, place, self.tiling.resident)
        residuals = _Reader.of(residual, self.operands.residual, place, self.tiling.resident)
        parameters = _Parameters(self, place, gate, scale, weight, bias, weight2, bias2)
        self.run(place, values, residuals, parameters, eps, eps2, y, z, self.partials(1)[None, None, None, 0])

    @cute.kernel
    def persistent_kernel(
        self,
        x: cute.Tensor,
        weight: cute.Tensor | None,
        bias: cute.Tensor | None,
        gate: cute.Tensor | None,
        residual: cute.Tensor | None,
        eps: Float32,
        weight2: cute.Tensor | None,
        bias2: cute.Tensor | None,
        scale: cute.Tensor | None,
        eps2: Float32,
        y: cute.Tensor | None,
        z: cute.Tensor | None,
        walkers: Int32,
        given: Int32,
        drawn: Int32,
        tickets: Int64,
    ):
        """A CTA walks rows of one batch item and loads the next one into registers while it works on one."""
        thread, tokens = cute.arch.thread_idx()[0], x.shape[1]
        batch, token, _ = cute.arch.block_idx()
        place = _Place(self.tiling, self.d, batch, token, thread)
        next_values = _Reader.of(x, self.operands.x, place, True)
        next_residuals = _Reader.of(residual, self.operands.residual, place, True)
        parameters = _Parameters(self, place, gate, scale, weight, bias, weight2, bias2)
        tickets = _Tickets(tickets, batch, walkers, given, drawn)
        token_at = SmemAllocator().allocate_tensor(Int32, cute.make_layout(2))
        draw, row_of = tickets.draw, tickets.row_of
        ticket = Int32(0)
        if thread == 0:
            ticket = draw(ticket)
        parameters.hold()
        # A row with one sum has one barrier: a fast warp may be at the next row's while a slow one reads this one's.
        partials = self.partials(2)
        parity, ahead = Int32(0), cutlass.select_(token + walkers < tokens, token + walkers, Int32(-1))
        while token >= 0:
            here = replace(place, token=token)
            values = _taken(next_values, here)
            residuals = _taken(next_residuals, here)
            there = replace(place, token=ahead)
            _refill(next_values.fragments, _Reader.of(x, self.operands.x, there), ahead >= 0)
            _refill(next_residuals.fragments, _Reader.of(residual, self.operands.residual, there), ahead >= 0)
            if thread == 0:  # the row after next: a ticket takes as long to come as a row
                token_at[parity] = row_of(ticket)
                ticket = draw(ticket)
            self.run(here, values, residuals, parameters, eps, eps2, y, z, partials[None, None, None, parity])
            if const_expr(self.tiling.warps == 1):
                cute.arch.sync_threads()  # its sums have no barrier
            token, ahead = ahead, cute.arch.make_warp_uniform(token_at[parity])
            parity = 1 - parity

    @cute.kernel
    def staged_kernel(
        self,
        x: cute.Tensor,
        weight: cute.Tensor | None,
        bias: cute.Tensor | None,
        gate: cute.Tensor | None,
        residual: cute.Tensor | None,
        eps: Float32,
        weight2: cute.Tensor | None,
        bias2: cute.Tensor | None,
        scale: cute.Tensor | None,
        eps2: Float32,
        y: cute.Tensor | None,
        z: cute.Tensor | None,
        walkers: Int32,
        given: Int32,
        drawn: Int32,
        tickets: Int64,
    ):
        """A CTA walks rows of one batch item; bulk copies bring the next ones into shared memory."""
        stages, thread, tokens = self.tiling.schedule.stages, cute.arch.thread_idx()[0], x.shape[1]
        batch, walker, _ = cute.arch.block_idx()
        place = _Place(self.tiling, self.d, batch, walker, thread)
        allocator = SmemAllocator()
        arrived = allocator.allocate_array(Int64, stages)
        xs = _Ring(allocator, x, self.operands.x, self.tiling)
        rs = _Ring(allocator, residual, self.operands.residual, self.tiling)
        token_at = allocator.allocate_tensor(Int32, cute.make_layout(stages))  # the row in each stage; -1: none
        fetch, values_at, residuals_at = partial(_fetch, (xs, rs), arrived, token_at, batch), xs.reader, rs.reader
        tickets = _Tickets(tickets, batch, walkers, given, drawn)
        draw, row_of = tickets.draw, tickets.row_of
        ticket = Int32(0)
        if thread == 0:
            for stage in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(arrived + stage, 1)
            cute.arch.mbarrier_init_fence()
            for stage in cutlass.range_constexpr(stages):
                token = walker + stage * walkers
                fetch(cutlass.select_(token < tokens, token, Int32(-1)), stage)
            ticket = draw(ticket)
        parameters = _Parameters(self, place, gate, scale, weight, bias, weight2, bias2)
        parameters.hold()
        partials = self.partials(2)
        cute.arch.sync_threads()  # the barriers are initialised
        stage, phase, parity = Int32(0), Int32(0), Int32(0)
        token = token_at[0]
        while token >= 0:
            here = replace(place, token=token)
            cute.arch.mbarrier_wait(arrived + stage, phase)
            values, residuals = values_at(here, stage), residuals_at(here, stage)
            self.run(here, values, residuals, parameters, eps, eps2, y, z, partials[None, None, None, parity])
            cute.arch.sync_threads()  # nobody reads this stage any more
            if thread == 0:
                fetch(row_of(ticket), stage)
                ticket = draw(ticket)
            parity = 1 - parity
            stage += 1
            if stage == stages:
                stage = Int32(0)
                phase = 1 - phase
            token = cute.arch.make_warp_uniform(token_at[stage])

    def partials(self, stages: int) -> cute.Tensor:
        """The partial sums of the warps, (warps, moment, norm, stage)."""
        return SmemAllocator().allocate_tensor(Float32, cute.make_layout((self.tiling.warps, 2, 2, stages)))

    def run(self, place: _Place, values, residuals, parameters, eps, eps2, y, z, partials) -> None:
        """The chain on the row at `place`."""
        chain, operands, p = self.chain, self.operands, parameters
        steps = chain.gated or chain.scaled
        norm = _Norm(chain.norm, steps.norm, p.weight, p.bias, place, partials[None, None, 0])
        norm.finish(_walk(place.tiling, lambda i: norm.moment(i, values(i))), values, eps)
        if chain.gated is None:
            _write_z(chain, norm, values, p.scale, _Writer(z, operands.z, place))
            return
        stored = _Writer(y, operands.y, place)
        if chain.scaled is None:
            _write_y(chain, norm, values, p.gate, residuals, stored, None)
            return
        norm2 = _Norm(chain.norm, chain.scaled.norm, p.weight2, p.bias2, place, partials[None, None, 1])
        total = _write_y(chain, norm, values, p.gate, residuals, stored, norm2)
        norm2.finish(total, stored, eps2)
        _write_z(chain, norm2, stored, p.scale, _Writer(z, operands.z, place))


class _Parameters:
    """Every operand but x and residual."""

    def __init__(self, kernel: NormGate, place: _Place, gate, scale, weight, bias, weight2, bias2):
        self.chain, self.operands = chain, operands = kernel.chain, kernel.operands
        ahead = kernel.tiling.ahead
        # Of one row only, what the second norm takes is not loaded before it is read: it would take the registers that
        # another CTA fills meanwhile.
        later = ahead and (chain.op != "dual" or kernel.tiling.schedule is not None)
        self.gate = _Modulation.of(gate, operands.gate, place, ahead)
        self.scale = _Modulation.of(scale, operands.scale, place, later)
        if chain.tanh:
            self.gate.activate = self._tanh
        if chain.add_one:
            self.scale.activate = self._add_one
        self.weight = _Reader.of(weight, operands.weight, place, ahead)
        self.bias = _Reader.of(bias, operands.bias, place, ahead)
        self.weight2 = _Reader.of(weight2, operands.weight2, place, later)
        self.bias2 = _Reader.of(bias2, operands.bias2, place, later)

    def _tanh(self, gate):
        return rounded(cute.math.tanh(widen(gate)), self.chain.gated.gate)

    def _add_one(self, scale):
        return rounded(widen(scale) + 1.0, self.chain.scaled.scale)

    def hold(self) -> None:
        """Activates gate and scale once, for all the rows to come."""
        for name in ("gate", "scale"):
            dtype = held_dtype(self.chain, self.operands, name)
            if dtype is not None:
                getattr(self, name).hold(dtype)


class _Tickets:
    """Who walks which rows of a batch item, its first `given` rows apart, which are shared out evenly.

    Multiprocessors are not equally fast, so whoever is done with a row draws a ticket for another one. Every CTA draws
    one ticket that is no row; with the last of them the counter is back at 0, for the next launch.
    """

    def __init__(self, counters: Int64, batch: Int32, walkers: Int32, given: Int32, drawn: Int32):
        self.counter, self.walkers, self.given, self.drawn = counters + Int64(batch) * 4, walkers, given, drawn

    def draw(self, ticket: Int32) -> Int32:
        """A new ticket for one that stands for a row; one that does not is kept. Ticket 0 will do for the first."""
        return _draw(self.counter, self.drawn + self.walkers - 1, ticket, self.drawn)

    def row_of(self, ticket: Int32) -> Int32:
        """The row that a ticket stands for, -1 for none."""
        return cutlass.select_(ticket < self.drawn, self.given + ticket, Int32(-1))


@cute.jit
def _draw(counter: Int64, last: Int32, ticket: Int32, rows: Int32) -> Int32:
    if ticket < rows:
        ticket = _count(counter, last)
    return ticket


@dsl_user_op
def _count(counter: Int64, last: Int32, *, loc=None, ip=None) -> Int32:
    """The counter, which is then one more, or 0 again behind `last`."""
    count = "atom.global.inc.u32 {$w0}, [{$r0}], {$r1};"
    return inline_ptx(count, write_only_types=[Int32], read_only_args=[counter, last], loc=loc, ip=ip)


class _Ring:
    """The next rows of one operand in shared memory; nothing where the operand is absent."""

    def __init__(
        self, allocator: SmemAllocator, tensor: cute.Tensor | None, operand: Operand | None, tiling: RowTiling
    ):
        self.tensor, self.operand, self.tiling = tensor, operand, tiling
        if operand is not None:
            self.d = tensor.shape[2]
            layout = cute.make_layout((self.d, tiling.schedule.stages))
            self.rows = allocator.allocate_tensor(tensor.element_type, layout, byte_alignment=128)

    def row(self, stage: Int32 | int, vector: int) -> cute.Tensor:
        dtype = self.rows.element_type
        address = self.rows.iterator.toint() + stage * (self.d * dtype.width // 8)
        pointer = cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=ACCESS_BYTES)
        return cute.make_tensor(pointer, cute.make_layout((self.d // vector, vector), stride=(vector, 1)))

    def reader(self, place: _Place, stage: Int32) -> _Reader:
        return _Reader(place, None if self.operand is None else self.row(stage, place.tiling.vector))


@cute.jit
def _fetch(
    rings: cutlass.Constexpr, arrived: cute.Pointer, token_at: cute.Tensor, batch: Int32, token: Int32, stage: Int32
):
    """Starts the copies of a token's rows into a stage; of none where the token is negative. In one thread."""
    present = [ring for ring in rings if ring.operand is not None]
    size = sum(ring.d * ring.operand.dtype.itemsize for ring in present)
    token_at[stage] = token
    if token >= 0:
        cute.arch.mbarrier_arrive_and_expect_tx(arrived + stage, size)
        for ring in present:
            source, target = _row_of(ring.tensor, ring.operand, batch, token, ring.d), ring.row(stage, ring.d)
            bits = ring.d * ring.operand.dtype.itemsize * 8
            atom = cute.make_copy_atom(CopyBulkG2SOp(), source.element_type, num_bits_per_copy=bits)
            cute.copy(atom, source[0, None], target[0, None], mbar_ptr=arrived + stage)


def _taken(ahead: _Reader, place: _Place) -> _Reader:
    """A reader of the row that was loaded ahead, whose registers may be filled again."""
    reader = _Reader(place, ahead.row)
    for fragment in ahead.fragments:
        copy = cute.make_rmem_tensor(fragment.shape, fragment.element_type)
        copy.store(fragment.load())
        reader.fragments.append(copy)
    return reader


def _refill(fragments: list[cute.Tensor], reader: _Reader, wanted: Boolean) -> None:
    """Loads the row of `reader` into `fragments`, which hold another."""
    for i, fragment in enumerate(fragments):
        inside = reader.place.inside(i)
        load_into(fragment, reader.in_memory(i), wanted if inside is True else wanted & inside)


def _write_y(chain: Chain, norm: _Norm, values: _Reader, gates, residuals: _Reader, y: _Writer, norm2):
    """Writes y; this thread's moments of y as it is stored, for the norm that reads it next, if one does."""

    def visit(i) -> Float32:
        fragment = y.store(i, _gated(norm(i, values(i)), gates(i), residuals(i), chain.gated))
        return Float32(0.0) if norm2 is None else norm2.moment(i, fragment.load())

    return _walk(y.place.tiling, visit)


def _write_z(chain: Chain, norm: _Norm, values: _Reader, scales, z: _Writer) -> None:
    def visit(i) -> Float32:
        z.store(i, _scaled(norm(i, values(i)), scales(i), chain.scaled))
        return Float32(0.0)

    _walk(z.place.tiling, visit)
