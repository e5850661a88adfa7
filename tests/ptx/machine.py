"""Runs a kernel: all threads of all CTAs of a small grid at once, each instruction a NumPy operation over the lanes.

Lanes that are at different instructions run in turn, those with the lowest one first, so that a branch joins
again where its ways meet. A lane that waits, at a barrier or for an mbarrier, is passed over until it may go on; if
nobody can go on, that is a deadlock.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ptx import numbers
from ptx.memory import SHARED_BASE, Copy, Fault, GlobalMemory, SharedMemory, Threads
from ptx.numbers import F32, F64, U16, U32, U64, Array
from ptx.program import Instruction, Program, Unsupported

WARP = 32
MBARRIERS = 8  # of one CTA, at most

BOOL, S16, S32, S64 = np.dtype(bool), np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.int64)
_BITS = {1: BOOL, 16: U16, 32: U32, 64: U64}
_TYPES = {"b16": U16, "u16": U16, "b32": U32, "u32": U32, "f32": U32, "b64": U64, "u64": U64, "f64": U64}

RUNNING, AT_BARRIER, AT_MBARRIER, ENDED = range(4)

# --- instructions that only compute ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pure:
    """result = function(*sources), lane by lane; `parts` numbers of these types share a register."""

    function: Callable[..., Array]
    result: np.dtype[Any]
    sources: tuple[np.dtype[Any], ...]
    parts: int = 1


def _shift(function: Callable[[Array, Array], Array], a: Array, by: Array) -> Array:
    """By as many bits as the number has or more: 0."""
    bits = a.dtype.itemsize * 8
    return np.where(by < bits, function(a, np.minimum(by, bits - 1).astype(a.dtype)), a.dtype.type(0))


_shift_left, _shift_right = partial(_shift, np.left_shift), partial(_shift, np.right_shift)


def _divide(a: Array, b: Array) -> Array:
    """Towards zero."""
    if (b == 0).any():
        raise Fault("an integer is divided by zero")
    wide = a.astype(S64), b.astype(S64)
    return (np.sign(wide[0]) * np.sign(wide[1]) * (np.abs(wide[0]) // np.abs(wide[1]))).astype(S32)


def _negated(compare: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    return ~compare(a, b)


def _select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def _multiply_add(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


def _high_product(a: Array, b: Array) -> Array:
    """The upper half of a product of 64-bit numbers."""
    low, half = U64.type(0xFFFFFFFF), U64.type(32)
    a1, a0, b1, b0 = a >> half, a & low, b >> half, b & low
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + (a0 * b1 + (middle & low) >> half)


def _mixed(widen: Callable[[Array], Array]) -> dict[str, Callable[..., Array]]:
    """Instructions that widen their first operands, exactly, on the way into fp32 arithmetic."""
    return {
        "add": lambda a, b: widen(a) + b,
        "sub": lambda a, b: widen(a) - b,
        "fma": lambda a, b, c: numbers.fma_f32(widen(a), widen(b), c),
    }


def _widened(widen: Callable[[Array], Array], compare: Callable[..., Array], a: Array, b: Array) -> Array:
    return compare(widen(a), widen(b))


def _packed_conversion(narrow: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda high, low: narrow(high).astype(U32) << U32.type(16) | narrow(low)


def _to_e4m3x2(high: Array, low: Array) -> Array:
    return numbers.to_e4m3(high).astype(U16) << U16.type(8) | numbers.to_e4m3(low)


def _pure() -> dict[str, Pure]:
    table = {
        "add.f32": Pure(np.add, F32, (F32, F32)),
        "sub.f32": Pure(np.subtract, F32, (F32, F32)),
        "mul.f32": Pure(np.multiply, F32, (F32, F32)),
        "fma.rn.f32": Pure(numbers.fma_f32, F32, (F32, F32, F32)),
        "fma.rm.f32": Pure(numbers.fma_f32_down, F32, (F32, F32, F32)),
        "div.rn.f32": Pure(np.divide, F32, (F32, F32)),
        "mul.f64": Pure(np.multiply, F64, (F64, F64)),
        "neg.f64": Pure(np.negative, F64, (F64,)),
        "fma.rn.f64": Pure(numbers.fma_f64, F64, (F64, F64, F64)),
        "abs.f32": Pure(np.abs, F32, (F32,)),
        "max.NaN.f32": Pure(np.maximum, F32, (F32, F32)),
        "neg.f32": Pure(np.negative, F32, (F32,)),
        "copysign.f32": Pure(lambda sign, a: np.copysign(a, sign), F32, (F32, F32)),
        "ex2.approx.ftz.f32": Pure(numbers.ex2_ftz, F32, (F32,)),
        "rcp.approx.ftz.f32": Pure(numbers.rcp_ftz, F32, (F32,)),
        "rsqrt.approx.f32": Pure(numbers.rsqrt, F32, (F32,)),
        "cvt.f64.f32": Pure(lambda a: a.astype(F64), F64, (F32,)),
        "cvt.rn.f32.f64": Pure(lambda a: a.astype(F32), F32, (F64,)),
        "cvt.sat.f32.f32": Pure(lambda a: np.where(np.isnan(a), F32.type(0), np.clip(a, 0, 1)), F32, (F32,)),
        "sqrt.rn.f32": Pure(np.sqrt, F32, (F32,)),
        "rcp.rn.f32": Pure(np.reciprocal, F32, (F32,)),
        "cvt.f32.bf16": Pure(numbers.from_bf16, F32, (U16,)),
        "cvt.f32.f16": Pure(numbers.from_f16, F32, (U16,)),
        "cvt.rn.bf16.f32": Pure(numbers.to_bf16, U16, (F32,)),
        "cvt.rn.f16.f32": Pure(numbers.to_f16, U16, (F32,)),
        "cvt.rn.bf16x2.f32": Pure(_packed_conversion(numbers.to_bf16), U32, (F32, F32)),
        "cvt.rn.f16x2.f32": Pure(_packed_conversion(numbers.to_f16), U32, (F32, F32)),
        "cvt.rn.satfinite.e4m3x2.f32": Pure(_to_e4m3x2, U16, (F32, F32)),
        "cvt.s64.s32": Pure(lambda a: a.astype(S64), S64, (S32,)),
        "cvt.u64.u32": Pure(lambda a: a.astype(U64), U64, (U32,)),
        "cvt.u32.u64": Pure(lambda a: a.astype(U32), U32, (U64,)),
        "neg.s32": Pure(np.negative, S32, (S32,)),
        "abs.s32": Pure(np.abs, S32, (S32,)),
        "div.s32": Pure(_divide, S32, (S32, S32)),
        "mul.wide.u16": Pure(lambda a, b: a.astype(U32) * b, U32, (U16, U16)),
        "mul.wide.u32": Pure(lambda a, b: a.astype(U64) * b, U64, (U32, U32)),
        "cvt.u16.u32": Pure(lambda a: a.astype(U16), U16, (U32,)),
        "cvt.u32.u16": Pure(lambda a: a.astype(U32), U32, (U16,)),
        "cvt.u64.u16": Pure(lambda a: a.astype(U64), U64, (U16,)),
        "min.u32": Pure(np.minimum, U32, (U32, U32)),
        "max.u32": Pure(np.maximum, U32, (U32, U32)),
        "mul.hi.u16": Pure(lambda a, b: (a.astype(U32) * b >> U32.type(16)).astype(U16), U16, (U16, U16)),
        "mul.hi.u32": Pure(lambda a, b: (a.astype(U64) * b >> U64.type(32)).astype(U32), U32, (U32, U32)),
        "mul.hi.u64": Pure(_high_product, U64, (U64, U64)),
        "mul.wide.s32": Pure(lambda a, b: a.astype(S64) * b, S64, (S32, S32)),
        "shr.u16": Pure(_shift_right, U16, (U16, U32)),
        "shr.u32": Pure(_shift_right, U32, (U32, U32)),
        "selp.f32": Pure(_select, F32, (F32, F32, BOOL)),
        "selp.b16": Pure(_select, U16, (U16, U16, BOOL)),
        "not.pred": Pure(np.logical_not, BOOL, (BOOL,)),
    }
    for name in ("add", "sub", "mul"):
        table[f"{name}.rn.f32"] = table[f"{name}.f32"]
        table[f"{name}.f32x2"] = Pure(table[f"{name}.f32"].function, F32, (F32, F32), 2)
        table[f"{name}.rn.f32x2"] = table[f"{name}.f32x2"]
    table["fma.rn.f32x2"] = Pure(numbers.fma_f32, F32, (F32, F32, F32), 2)
    for name, dtype in {"s16": S16, "s32": S32, "s64": S64}.items():
        table[f"add.{name}"] = Pure(np.add, dtype, (dtype, dtype))
        table[f"sub.{name}"] = Pure(np.subtract, dtype, (dtype, dtype))
        table[f"min.{name}"] = Pure(np.minimum, dtype, (dtype, dtype))
        table[f"max.{name}"] = Pure(np.maximum, dtype, (dtype, dtype))
        table[f"mul.lo.{name}"] = Pure(np.multiply, dtype, (dtype, dtype))
        table[f"mad.lo.{name}"] = Pure(_multiply_add, dtype, (dtype, dtype, dtype))
    for name, dtype in {"b16": U16, "b32": U32, "b64": U64}.items():
        table[f"shl.{name}"] = Pure(_shift_left, dtype, (dtype, U32))
        table[f"selp.{name}"] = Pure(_select, dtype, (dtype, dtype, BOOL))
    for name, dtype in {"pred": BOOL, "b16": U16, "b32": U32, "b64": U64}.items():
        for logic, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
            table[f"{logic}.{name}"] = Pure(function, dtype, (dtype, dtype))
    for name, compare in _COMPARISONS.items():
        for kind, dtype in {"f32": F32, "s16": S16, "s32": S32, "s64": S64, "u16": U16, "u32": U32, "u64": U64}.items():
            table[f"setp.{name}.{kind}"] = Pure(compare, BOOL, (dtype, dtype))
    for name, opposite in _UNORDERED.items():
        table[f"setp.{name}.f32"] = Pure(partial(_negated, _COMPARISONS[opposite]), BOOL, (F32, F32))
    for kind, dtype in {"b16": U16, "b32": U32, "b64": U64}.items():
        table[f"setp.eq.{kind}"] = Pure(np.equal, BOOL, (dtype, dtype))
        table[f"setp.ne.{kind}"] = Pure(np.not_equal, BOOL, (dtype, dtype))
    formats = {
        "bf16": (numbers.from_bf16, numbers.wide_to_bf16),
        "f16": (numbers.from_f16, numbers.to_f16),
    }
    for kind, (widen, narrow) in formats.items():
        for name, function in numbers.arithmetic16(widen, narrow).items():
            sources = (U16,) * (3 if name == "fma" else 2)
            for rounding in {"fma": (".rn",), "max.NaN": ("",)}.get(name, ("", ".rn")):
                table[f"{name}{rounding}.{kind}"] = Pure(function, U16, sources)
                table[f"{name}{rounding}.{kind}x2"] = Pure(function, U16, sources, 2)
        mixed = _mixed(widen)
        for name in ("add", "sub"):
            table[f"{name}.rn.f32.{kind}"] = Pure(mixed[name], F32, (U16, F32))
        table[f"fma.rn.f32.{kind}"] = Pure(mixed["fma"], F32, (U16, U16, F32))
        for name in (*_COMPARISONS, *_UNORDERED):
            table[f"setp.{name}.{kind}"] = Pure(
                partial(_widened, widen, table[f"setp.{name}.f32"].function), BOOL, (U16, U16)
            )
    return table


_COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # of fp32: false for a NaN
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNORDERED = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}  # true for a NaN, and else where these are false
PURE = _pure()


# --- mbarriers ------------------------------------------------------------------------------------------------------


@dataclass
class Mbarrier:
    """Of one phase: the arrivals that are due, the bytes that copies are expected to bring, those they bring."""

    number: int  # among those of its CTA
    count: int
    lane: int  # that initialised it
    epoch: int  # in which it did
    fenced: bool = False  # the initialisation is visible to bulk copies
    due: int = 0
    phase: int = 0
    expected: int = 0
    copied: int = 0

    @property
    def complete(self) -> bool:
        """Can the phase end, once all copies under way have landed?"""
        return self.due == 0 and self.expected == self.copied


# --- the machine ----------------------------------------------------------------------------------------------------

Everyone = slice(None)
Lanes = Any  # an array of lanes, or Everyone
Step = Callable[[Lanes], None]

_MEMORY = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_ACCESS = re.compile(r"(ld|st)\.(global|shared)(\.nc)?((?:\.c[agsv]|\.L[12]::\w+)*)(?:\.v([24]))?\.(\w+)")
_SHUFFLE = re.compile(r"shfl\.sync\.(bfly|idx)\.b32")
_BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
_TRY_WAIT = "mbarrier.try_wait.parity.shared.b64"
_ENDS = ("bra", "bra.uni", "ret", "bar.sync", _TRY_WAIT)


class Machine:
    """One launch. `run` returns when every thread has ended, and raises Fault where the kernel is at fault."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        shared_bytes: int,
        memory: GlobalMemory,
        parameters: dict[str, bytes],
    ):
        self.program, self.memory, self.parameters = program, memory, parameters
        self.threads = threads = Threads(program.threads, grid)
        if program.threads % WARP:
            raise Unsupported(f"CTAs of {program.threads} threads")
        self.lanes = np.arange(threads.size * threads.ctas, dtype=np.int32)
        self.cta = self.lanes // threads.size
        self.shared = SharedMemory(shared_bytes, threads)
        self.at = np.zeros(len(self.lanes), np.int32)  # the instruction that a lane comes to next
        self.state = np.full(len(self.lanes), RUNNING, np.int8)
        self.epoch = np.zeros(len(self.lanes), np.int32)  # how many barriers a lane has passed
        self.seen = np.zeros((len(self.lanes), MBARRIERS), np.int32)  # completed phases
        self.mbarriers: dict[tuple[int, int], Mbarrier] = {}  # by CTA and address
        self.registers: dict[str, Array] = {}
        self.specials = self._specials()
        self._written = {program.register(i, name) for i in program.instructions for name in _targets(i)}
        self.steps = [self._decode(i) for i in program.instructions]
        self.guards = [None if i.guard is None else self._source(i, i.guard, BOOL) for i in program.instructions]
        targets = set(program.labels.values())
        ends = {n + 1 for n, i in enumerate(program.instructions) if i.opcode in _ENDS}
        waits = {n for n, i in enumerate(program.instructions) if i.opcode == _TRY_WAIT}
        self.leaders = targets | ends | waits

    def _specials(self) -> dict[str, Array]:
        x, y, _ = self.threads.grid
        values = {
            "%tid.x": self.lanes % self.threads.size,
            "%laneid": self.lanes % WARP,
            "%ctaid.x": self.cta % x,
            "%ctaid.y": self.cta // x % y,
            "%ctaid.z": self.cta // x // y,
            "%cluster_ctarank": self.lanes * 0,
        }
        return {name: value.astype(U32) for name, value in values.items()}

    # --- scheduling

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while True:
                running = self.state == RUNNING
                if running.any():
                    first = int(self.at[running].min())
                    here = running & (self.at == first)
                    self._run_block(first, Everyone if here.all() else np.flatnonzero(here))
                elif (self.state == ENDED).all():
                    break
                elif not self._release():
                    self._deadlock()
        self._check_end()

    def _run_block(self, number: int, active: Lanes) -> None:
        instructions = self.program.instructions
        while True:
            if number >= len(instructions):
                raise Unsupported("a kernel that does not end in ret")
            instruction = instructions[number]
            self.at[active] = number + 1
            chosen = self._guarded(number, active)
            if chosen is Everyone or len(chosen):
                try:
                    self.steps[number](chosen)
                except Fault as fault:
                    if "line " in str(fault):
                        raise
                    raise Fault(f"{self._first(chosen)}, {instruction}: {fault}") from fault
            number += 1
            if number in self.leaders:
                return

    def _guarded(self, number: int, active: Lanes) -> Lanes:
        read = self.guards[number]
        if read is None:
            return active
        wanted = read(active)
        if self.program.instructions[number].negated:
            wanted = ~wanted
        return active if active is Everyone and wanted.all() else self.lanes[active][wanted]

    def _release(self) -> bool:
        """Lets those go on who wait for what has come; False if that is nobody."""
        released = False
        for cta in range(self.threads.ctas):
            mine = slice(cta * self.threads.size, (cta + 1) * self.threads.size)
            if (self.state[mine] == AT_BARRIER).all():
                self._check_warps(mine)
                self.state[mine] = RUNNING
                self.epoch[mine] += 1
                self.seen[mine] = self.seen[mine].max(0)
                released = True
        waiting = np.flatnonzero(self.state == AT_MBARRIER)
        ready = [lane for lane in waiting if self._completed(*self._waits[int(lane)])]
        self.state[ready] = RUNNING
        return released or bool(ready)

    def _check_warps(self, mine: slice) -> None:
        """bar.sync is aligned: the threads of a warp come to the same one."""
        at = self.at[mine].reshape(-1, WARP)
        divided = at != at[:, :1]
        if divided.any():
            warp, lane = (int(k) for k in np.argwhere(divided)[0])
            first = mine.start + warp * WARP
            raise Fault(
                f"{self.threads.name(first + lane)} is at the barrier of {self._before(first + lane)}, and its warp's "
                f"first thread at that of {self._before(first)}: a barrier that some threads of a warp reach only"
            )

    def _deadlock(self) -> None:
        waiting = np.flatnonzero((self.state == AT_BARRIER) | (self.state == AT_MBARRIER))
        lane = int(waiting[0])
        mine = self.cta == self.cta[lane]
        if self.state[lane] == AT_MBARRIER:
            cta, address, parity = self._waits[lane]
            barrier = self.mbarriers[cta, address]
            raise Fault(
                f"{self.threads.name(lane)}, {self.program.instructions[self.at[lane]]}: waits for ever for the "
                f"mbarrier at byte {address - SHARED_BASE} of shared memory: it is in phase {barrier.phase}, with "
                f"{barrier.due} arrivals due and {barrier.expected - barrier.copied} bytes missing; awaited is the end "
                f"of one of parity {parity}"
            )
        others = np.flatnonzero(mine & (self.state != AT_BARRIER))
        other = int(others[0])
        where = "has ended" if self.state[other] == ENDED else f"waits at {self.program.instructions[self.at[other]]}"
        raise Fault(
            f"{self.threads.name(lane)} waits at the barrier of {self._before(lane)}, which {len(others)} threads of "
            f"its CTA never reach: {self.threads.name(other)} {where}"
        )

    def _before(self, lane: int) -> Instruction:
        return self.program.instructions[self.at[lane] - 1]

    def _check_end(self) -> None:
        for copy in self.shared.copies:
            if not copy.landed:
                name = self.threads.name(copy.lane)
                raise Fault(f"{name}, line {copy.line}: the kernel ends, and nothing waited for this copy")
        self.memory.check_complete()

    def _first(self, lanes: Lanes) -> str:
        return self.threads.name(self.lanes[lanes][0])

    # --- registers

    def _source(self, instruction: Instruction, name: str, dtype: np.dtype[Any]) -> Callable[[Lanes], Array]:
        """What reads an operand: a register, a special register or a constant."""
        found = self.program.register(instruction, name)
        if found is not None:
            key, bits = found
            if bits != (1 if dtype == BOOL else dtype.itemsize * 8):
                raise Unsupported(f"{instruction}: {name} has {bits} bits")
            return partial(self._register, instruction, key, dtype)
        if name in self.specials:
            return lambda active: self.specials[name][active].view(dtype)
        constant = _constant(instruction, name, dtype, self.program.externs)
        return lambda active: np.broadcast_to(constant, self.lanes[active].shape)

    def _part(self, instruction: Instruction, name: str, dtype: np.dtype[Any]) -> Callable[[Lanes], Array]:
        """What is packed. A register that nothing in the program writes is a part that LLVM does not care for."""
        if self.program.register(instruction, name) in self._written or not name.startswith("%r"):
            return self._source(instruction, name, dtype)
        nan = np.array(-1, f"i{dtype.itemsize}").view(dtype)  # shows wherever it matters after all
        return lambda active: np.broadcast_to(nan, self.lanes[active].shape)

    def _register(self, instruction: Instruction, key: str, dtype: np.dtype[Any], active: Lanes) -> Array:
        if key not in self.registers:
            raise Fault(f"{self._first(active)}, {instruction}: nothing ever wrote {key}")
        return self.registers[key][active].view(dtype)

    def _target(self, instruction: Instruction, name: str, bits: int) -> Callable[[Lanes, Array], None]:
        found = self.program.register(instruction, name)
        if found is None or found[1] != bits:
            raise Unsupported(f"{instruction}: {name} is no register of {bits} bits")
        key = found[0]

        def write(active: Lanes, value: Array) -> None:
            register = self.registers.get(key)
            if register is None:
                register = self.registers[key] = np.zeros(len(self.lanes), _BITS[bits])
            register[active] = np.ascontiguousarray(value).view(_BITS[bits])

        return write

    def _address(self, instruction: Instruction, operand: str, dtype: np.dtype[Any]) -> Callable[[Lanes], Array]:
        match = _MEMORY.fullmatch(operand)
        if not match:
            raise Unsupported(f"{instruction}: the address {operand}")
        base, offset = self._source(instruction, match[1], dtype), np.array(int(match[2] or 0), S64).astype(dtype)
        return lambda active: base(active) + offset

    # --- decoding

    def _decode(self, instruction: Instruction) -> Step:
        opcode = instruction.opcode
        if opcode in PURE:
            return self._decode_pure(instruction, PURE[opcode])
        if opcode.startswith("ld.param."):
            return self._decode_parameter(instruction)
        if access := _ACCESS.fullmatch(opcode):
            return self._decode_access(instruction, access)
        if shuffle := _SHUFFLE.fullmatch(opcode):
            return self._decode_shuffle(instruction, shuffle[1])
        decode = self._DECODERS.get(opcode)
        if decode is None:
            raise Unsupported(f"{instruction}: the interpreter does not know {opcode}")
        return decode(self, instruction)

    def _decode_pure(self, instruction: Instruction, pure: Pure) -> Step:
        bits = 1 if pure.result == BOOL else pure.result.itemsize * 8 * pure.parts
        name, *operands = instruction.operands
        if len(operands) != len(pure.sources):
            raise Unsupported(f"{instruction}: {len(operands)} operands")
        write, function, parts = self._target(instruction, name, bits), pure.function, pure.parts
        if parts == 1:
            reads = [self._source(instruction, o, d) for o, d in zip(operands, pure.sources, strict=True)]

            def step(active: Lanes) -> None:
                write(active, function(*[read(active) for read in reads]))

            return step
        whole = _BITS[bits]
        wide = [(self._source(instruction, o, whole), d) for o, d in zip(operands, pure.sources, strict=True)]

        def packed_step(active: Lanes) -> None:
            values = [np.ascontiguousarray(read(active)).view(dtype) for read, dtype in wide]
            write(active, np.ascontiguousarray(function(*values)).view(whole))

        return packed_step

    def _decode_move(self, instruction: Instruction) -> Step:
        """mov, also between one register and several narrower ones."""
        target, source = instruction.operands
        dtype = _TYPES[instruction.opcode.removeprefix("mov.")]
        bits = dtype.itemsize * 8
        if target.startswith("{"):
            names = _vector(target)
            part = _BITS[bits // len(names)]
            # `_` is a part that nobody wants
            writes = {i: self._target(instruction, n, bits // len(names)) for i, n in enumerate(names) if n != "_"}
            read = self._source(instruction, source, dtype)

            def unpack(active: Lanes) -> None:
                parts = np.ascontiguousarray(read(active)).view(part).reshape(-1, len(names))
                for i, write in writes.items():
                    write(active, parts[:, i])

            return unpack
        write = self._target(instruction, target, bits)
        if source.startswith("{"):
            names = _vector(source)
            part = _BITS[bits // len(names)]
            reads = [self._part(instruction, name, part) for name in names]
            return lambda active: write(active, np.stack([read(active) for read in reads], 1).view(dtype)[:, 0])
        read = self._source(instruction, source, dtype)
        return lambda active: write(active, read(active))

    def _decode_parameter(self, instruction: Instruction) -> Step:
        kinds = instruction.opcode.removeprefix("ld.param.").split(".")
        count = int(kinds[0].removeprefix("v")) if len(kinds) == 2 else 1
        match = _MEMORY.fullmatch(instruction.operands[1])
        extended = kinds[-1] == "s32"  # LLVM writes this for a register of 64 bits
        if match is None or match[1] not in self.parameters or not (extended or kinds[-1] in _TYPES):
            raise Unsupported(f"{instruction}: a parameter that the launch does not give")
        dtype, start = S32 if extended else _TYPES[kinds[-1]], int(match[2] or 0)
        content = self.parameters[match[1]][start : start + dtype.itemsize * count]
        if len(content) != dtype.itemsize * count or start % len(content):
            raise Fault(f"{instruction}: outside of the parameter, or misaligned")
        values = np.frombuffer(content, dtype)
        values = values.astype(S64) if extended else values
        names = _vector(instruction.operands[0])
        writes = [self._target(instruction, name, values.itemsize * 8) for name in names]

        def step(active: Lanes) -> None:
            for write, value in zip(writes, values, strict=True):
                write(active, np.broadcast_to(value, self.lanes[active].shape))

        return step

    def _decode_access(self, instruction: Instruction, access: re.Match[str]) -> Step:
        direction, space, nc, _, vector, kind = access.groups()
        if kind not in _TYPES or (nc and (direction, space) != ("ld", "global")):
            raise Unsupported(f"{instruction}: the interpreter does not know {instruction.opcode}")
        dtype, count = _TYPES[kind], int(vector or 1)
        size, what = dtype.itemsize * count, str(instruction)
        address_operand, value_operand = instruction.operands[:: 1 if direction == "st" else -1]
        names = _vector(value_operand)
        address = self._address(instruction, address_operand, U64 if space == "global" else U32)
        if direction == "ld":
            writes = [self._target(instruction, name, dtype.itemsize * 8) for name in names]

            def load(active: Lanes) -> None:
                where, lanes = address(active), self.lanes[active]
                if space == "global":
                    rows = self.memory.load(where, size, (dtype, count), lanes, self.epoch[active], self.threads, what)
                else:
                    rows = self.shared.load(where, size, (dtype, count), lanes, self.epoch[active], self.seen, what)
                for i, write in enumerate(writes):
                    write(active, rows[:, i])

            return load
        reads = [self._source(instruction, name, dtype) for name in names]

        def store(active: Lanes) -> None:
            where, lanes = address(active), self.lanes[active]
            values = np.stack([read(active) for read in reads], 1)
            if space == "global":
                self.memory.store(where, size, values, lanes, self.epoch[active], self.threads, what)
            else:
                self.shared.store(where, size, values, lanes, self.epoch[active], what)

        return store

    def _decode_shuffle(self, instruction: Instruction, mode: str) -> Step:
        target, source, distance, clamp, mask = instruction.operands
        if (clamp, mask) != ("31", "-1") or not distance.isdigit():
            raise Unsupported(f"{instruction}: a shuffle of less than a warp")
        write, read = self._target(instruction, target, 32), self._source(instruction, source, U32)
        lane = np.arange(WARP)
        order = lane ^ int(distance) if mode == "bfly" else np.full(WARP, int(distance))

        def step(active: Lanes) -> None:
            self._check_full_warps(instruction, active)
            write(active, read(active).reshape(-1, WARP)[:, order].reshape(-1))

        return step

    def _decode_reduction(self, instruction: Instruction) -> Step:
        """The largest number of a warp, in all of its lanes."""
        target, source, mask = instruction.operands
        write, read = self._target(instruction, target, 32), self._source(instruction, source, S32)
        mask_of = self._source(instruction, mask, S32)

        def step(active: Lanes) -> None:
            self._check_full_warps(instruction, active)
            if (mask_of(active) != -1).any():
                raise Unsupported(f"{instruction}: a reduction over less than a warp")
            write(active, read(active).reshape(-1, WARP).max(1).repeat(WARP))

        return step

    def _check_full_warps(self, instruction: Instruction, active: Lanes) -> None:
        if active is Everyone:
            return
        here = np.zeros(len(self.lanes), bool)
        here[active] = True
        warps = here.reshape(-1, WARP)
        divided = warps.any(1) & ~warps.all(1)
        if divided.any():
            warp = int(np.argmax(divided))
            present, absent = (warp * WARP + int(np.argmax(warps[warp] == wanted)) for wanted in (True, False))
            where = "has ended" if self.state[absent] == ENDED else f"is at {self._instruction_at(absent)}"
            raise Fault(
                f"{self.threads.name(present)}, {instruction}: waits for all of its warp, of which "
                f"{int((~warps[warp]).sum())} threads are elsewhere: {self.threads.name(absent)} {where}"
            )

    def _instruction_at(self, lane: int) -> Instruction:
        return self.program.instructions[min(int(self.at[lane]), len(self.program.instructions) - 1)]

    # --- control

    def _decode_branch(self, instruction: Instruction) -> Step:
        target = self.program.label(instruction, instruction.operands[0])

        def step(active: Lanes) -> None:
            self.at[active] = target

        return step

    def _decode_return(self, instruction: Instruction) -> Step:
        def step(active: Lanes) -> None:
            self.state[active] = ENDED

        return step

    def _decode_warp_barrier(self, instruction: Instruction) -> Step:
        if instruction.operands != ("-1",):
            raise Unsupported(f"{instruction}: a barrier of some threads only")
        return partial(self._check_full_warps, instruction)

    def _decode_barrier(self, instruction: Instruction) -> Step:
        if instruction.operands != ("0",):
            raise Unsupported(f"{instruction}: a barrier of some threads only")

        def step(active: Lanes) -> None:
            self.state[active] = AT_BARRIER

        return step

    # --- atomics, bulk copies and mbarriers: few threads, so one at a time

    def _decode_count(self, instruction: Instruction) -> Step:
        target, at, last = instruction.operands
        write = self._target(instruction, target, 32)
        address, last_of = self._address(instruction, at, U64), self._source(instruction, last, U32)

        def step(active: Lanes) -> None:
            counted = [
                self.memory.count(int(where), int(limit))
                for where, limit in zip(address(active), last_of(active), strict=True)
            ]
            write(active, np.array(counted, U32))

        return step

    def _decode_mbarrier_init(self, instruction: Instruction) -> Step:
        address = self._address(instruction, instruction.operands[0], U32)
        count = self._source(instruction, instruction.operands[1], U32)
        what = str(instruction)

        def step(active: Lanes) -> None:
            lanes, where = self.lanes[active], address(active)
            words = np.zeros((len(lanes), 1), U64)
            self.shared.store(where, 8, words, lanes, self.epoch[active], what)
            for lane, at, due in zip(lanes, where, count(active), strict=True):
                cta = int(self.cta[lane])
                number = sum(1 for other, _ in self.mbarriers if other == cta)
                if number >= MBARRIERS:
                    raise Unsupported(f"{instruction}: more than {MBARRIERS} mbarriers")
                barrier = Mbarrier(number, int(due), int(lane), int(self.epoch[lane]), due=int(due))
                self.mbarriers[cta, int(at)] = barrier

        return step

    def _decode_fence(self, instruction: Instruction) -> Step:
        def step(active: Lanes) -> None:
            lanes = set(self.lanes[active].tolist())
            for barrier in self.mbarriers.values():
                barrier.fenced |= barrier.lane in lanes

        return step

    def _mbarrier(self, lane: int, address: int, what: Any) -> Mbarrier:
        """The mbarrier at an address, whose initialisation the lane must have seen."""
        barrier = self.mbarriers.get((int(self.cta[lane]), int(address)))
        if barrier is None:
            raise Fault(
                f"{self.threads.name(lane)}, {what}: no mbarrier was initialised at byte {int(address) - SHARED_BASE} "
                "of shared memory"
            )
        if lane != barrier.lane and self.epoch[lane] == barrier.epoch:
            raise Fault(
                f"{self.threads.name(lane)}, {what}: uses the mbarrier at byte {int(address) - SHARED_BASE} of shared "
                f"memory, which {self.threads.name(barrier.lane)} initialised: no barrier between"
            )
        return barrier

    def _decode_arrive(self, instruction: Instruction) -> Step:
        state, at, size = instruction.operands
        write = self._target(instruction, state, 64)
        address, size_of = self._address(instruction, at, U32), self._source(instruction, size, U32)

        def step(active: Lanes) -> None:
            for lane, where, expected in zip(self.lanes[active], address(active), size_of(active), strict=True):
                barrier = self._mbarrier(int(lane), int(where), instruction)
                if barrier.due == 0:
                    raise Fault(
                        f"{self.threads.name(lane)}, {instruction}: arrives at the mbarrier at byte "
                        f"{int(where) - SHARED_BASE} of shared memory once more before anybody has waited for phase "
                        f"{barrier.phase}"
                    )
                barrier.due -= 1
                barrier.expected += int(expected)
            write(active, np.zeros(len(self.lanes[active]), U64))

        return step

    def _decode_bulk_copy(self, instruction: Instruction) -> Step:
        target, source, size, at = instruction.operands
        reads = (
            self._address(instruction, target, U32),
            self._address(instruction, source, U64),
            self._source(instruction, size, U32),
            self._address(instruction, at, U32),
        )

        def step(active: Lanes) -> None:
            for values in zip(self.lanes[active], *(read(active) for read in reads), strict=True):
                self._copy(instruction, *(int(value) for value in values))

        return step

    def _copy(self, instruction: Instruction, lane: int, target: int, source: int, size: int, at: int) -> None:
        who, what = self.threads.name(lane), str(instruction)
        barrier = self._mbarrier(lane, at, instruction)
        if not barrier.fenced:
            raise Fault(f"{who}, {what}: no fence.mbarrier_init after the mbarrier was initialised")
        if size % 16 or source % 16 or target % 16:
            raise Fault(f"{who}, {what}: copies {size} bytes from 0x{source:x}: not all multiples of 16")
        content = self.memory.read_host(source, size, lane, self.threads, what)
        copy = Copy(lane, instruction.line, barrier.number, barrier.phase)
        self.shared.copy_in(target, content, copy, int(self.epoch[lane]), what)
        barrier.copied += size

    def _decode_try_wait(self, instruction: Instruction) -> Step:
        """Lanes that have to wait stay at this instruction."""
        target, at, parity = instruction.operands[:3]  # the fourth is a time: only a hint
        write = self._target(instruction, target, 1)
        address, parity_of = self._address(instruction, at, U32), self._source(instruction, parity, U32)

        def step(active: Lanes) -> None:
            lanes, where, parities = self.lanes[active], address(active), parity_of(active)
            done = np.zeros(len(lanes), bool)
            keys = np.stack([self.cta[lanes], where.astype(S64), parities.astype(S64)], 1)
            for cta, place, wanted in np.unique(keys, axis=0).tolist():
                group = (keys == (cta, place, wanted)).all(1)
                for lane in lanes[group][[0, -1]]:  # both: one may be who initialised it
                    barrier = self._mbarrier(int(lane), place, instruction)
                if self._completed(cta, place, wanted):
                    done |= group
                    self.seen[lanes[group], barrier.number] = barrier.phase
                else:
                    self._wait(lanes[group], (cta, place, wanted))
            write(active, done)

        self._waits: dict[int, tuple[int, int, int]] = {}
        return step

    def _wait(self, lanes: Array, key: tuple[int, int, int]) -> None:
        self.state[lanes] = AT_MBARRIER
        self.at[lanes] -= 1
        self._waits.update((int(lane), key) for lane in lanes)

    def _completed(self, cta: int, address: int, parity: int) -> bool:
        """Has the phase of this parity ended? Copies under way land when somebody waits for them."""
        barrier = self.mbarriers[cta, address]
        if barrier.phase % 2 == parity and barrier.complete:
            for copy in self.shared.copies:
                mine = copy.barrier == barrier.number and copy.lane // self.threads.size == cta
                copy.landed |= mine and copy.phase == barrier.phase
            barrier.phase += 1
            barrier.due, barrier.expected, barrier.copied = barrier.count, 0, 0
        return barrier.phase % 2 != parity

    def _decode_map(self, instruction: Instruction) -> Step:
        """mapa: a CTA is a cluster of its own here, so an address in it is the address itself."""
        target, at, rank = instruction.operands
        write, read = self._target(instruction, target, 32), self._source(instruction, at, U32)
        rank_of = self._source(instruction, rank, U32)

        def step(active: Lanes) -> None:
            if rank_of(active).any():
                raise Fault(f"{self._first(active)}, {instruction}: there is one CTA in a cluster")
            write(active, read(active))

        return step

    _DECODERS: ClassVar[dict[str, Callable[[Machine, Instruction], Step]]] = {
        **dict.fromkeys((f"mov.{kind}" for kind in _TYPES), _decode_move),
        "bra": _decode_branch,
        "bra.uni": _decode_branch,
        "ret": _decode_return,
        "bar.sync": _decode_barrier,
        "bar.warp.sync": _decode_warp_barrier,
        "redux.sync.max.s32": _decode_reduction,
        "atom.global.inc.u32": _decode_count,
        "mbarrier.init.shared.b64": _decode_mbarrier_init,
        "fence.mbarrier_init.release.cluster": _decode_fence,
        "mbarrier.arrive.expect_tx.shared.b64": _decode_arrive,
        _TRY_WAIT: _decode_try_wait,
        _BULK: _decode_bulk_copy,
        "mapa.shared::cluster.u32": _decode_map,
    }


def _targets(instruction: Instruction) -> list[str]:
    return _vector(instruction.operands[0]) if instruction.operands else []


def _vector(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


def _constant(instruction: Instruction, text: str, dtype: np.dtype[Any], externs: frozenset[str]) -> Array:
    if text in externs:
        return np.array(SHARED_BASE, U32).view(dtype)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.array(int("0x" + text[2:], 0), U32).view(dtype)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return np.array(int("0x" + text[2:], 0), U64).view(dtype)
    if re.fullmatch(r"-?\d+|0[xX][0-9a-fA-F]+", text) and dtype.kind in "iu":
        bits = dtype.itemsize * 8
        return np.array(int(text, 0) % 2**bits, f"u{dtype.itemsize}").view(dtype)
    raise Unsupported(f"{instruction}: the operand {text}")
