"""A GPU as the ops would see it, that runs their compiled kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, product
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dit_kernels import compile, tickets
from dit_kernels.arguments import Layout
from dit_kernels.compile import Variant, compile_variant
from dit_kernels.families import OPS, rows
from dit_kernels.families.family import Call
from ptx.host import Launch, host_function, launch
from ptx.machine import Machine
from ptx.memory import GlobalMemory
from ptx.program import parse

ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
UNLIKE = ("sm_80", "sm_90a")  # without and with bulk copies; the others run the code of sm_90a, in other tilings


def in_turn(cases: Iterable[Any], archs: Sequence[str] = ARCHS) -> list[tuple[Any, ...]]:
    """(architecture, *case): each case on one architecture, which is another one for the next case."""
    tuples = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [(arch, *case) for arch, case in zip(cycle(archs), tuples)]


def on_two(cases: Iterable[Any], archs: Sequence[str] = ARCHS) -> list[tuple[Any, ...]]:
    """(architecture, *case): each case on sm_90a, and each third also on one of the others in turn. All pairs would
    take minutes."""
    every = list(cases)
    others = [arch for arch in archs if arch != "sm_90a"]
    return [*in_turn(every, ("sm_90a",)), *in_turn(every[::3], others)]


@dataclass(frozen=True)
class Compiled:
    """A kernel as CuTeDSL compiled it."""

    variant: Variant
    ptx: str
    cubin: bytes
    host: tuple[str, ...]

    def edited(self, edit: Callable[[str], str]) -> Compiled:
        """With a change to the PTX, which must be one."""
        ptx = edit(self.ptx)
        assert ptx != self.ptx, "the edit changed nothing"
        return replace(self, ptx=ptx)


@cache
def compiled(arch: str, variant: Variant) -> Compiled:
    """Compiled once in a process, whoever asks."""
    with TemporaryDirectory() as directory:
        kernel = compile_variant(arch, variant, f"--keep-ptx --keep-cubin --dump-dir {directory}")
        return Compiled(variant, kernel.__ptx__, kernel.__cubin__, tuple(host_function(str(kernel.ir_module))))


def run(kernel: Compiled, call: Call, results: tuple[Tensor, ...], numbers: tuple[int, ...]) -> Launch:
    """Runs the kernel of a call, launched with these numbers; results are written in place."""
    family = kernel.variant.family
    program = parse(kernel.ptx)
    memory = GlobalMemory()
    operands = call.operands(results)
    tensors = iter(operands.memory)  # in the order of the layouts
    arguments, written = [], {}
    for argument in family.arguments:
        value = operands.values[argument.name]
        if isinstance(value, Layout):
            t = next(tensors)
            view = t.as_strided(value.shape, value.strides)
            value = _add(memory, argument.name, view, argument.written)
            written |= {argument.name: t} if argument.written else {}
        if value is not None:
            arguments.append(value)
    with mock.patch.object(tickets.COUNTERS, "address", lambda device, stream, batches: memory.add_counters(batches)):
        of_launch = family.of_launch(0, 0, numbers[0])
    memory.freeze()
    what = launch(kernel.host, program, [*arguments, *numbers, *of_launch])
    assert what.threads == program.threads
    Machine(program, what.grid, what.shared_bytes, memory, what.parameters).run()
    for name, t in written.items():
        t.copy_(torch.frombuffer(bytearray(memory.content(name)), dtype=t.dtype).view(t.shape))
    return what


def _add(memory: GlobalMemory, name: str, t: Tensor, result: bool) -> int:
    """Puts a tensor into global memory: only what its indices reach, at an address as aligned as its own."""
    # A dimension of stride 0 has one row.
    sizes = [size if stride else 1 for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    rows = {}
    for index in product(*map(range, sizes)):
        row = t[index].contiguous() if index else t.contiguous()
        offset = sum(i * stride for i, stride in zip(index, t.stride(), strict=False)) * t.element_size()
        size = row.numel() * t.element_size()
        rows[offset] = index, size if result else row.view(torch.uint8).numpy().tobytes()
    return memory.add(name, rows, t.element_size(), t.data_ptr() % 256, result)


@contextmanager
def gpu(arch: str, processors: int, kernel: Callable[[str, Variant], Compiled] = compiled) -> Iterator[None]:
    """Makes `compile.bound` find kernels for `arch` and for CPU tensors, for `call` to run in the interpreter."""
    with (
        mock.patch.object(compile.KERNELS, "get", kernel),
        mock.patch.object(compile, "_arch", return_value=arch),
        mock.patch.object(rows, "processors", return_value=processors),
    ):
        yield


def call(
    op: str, arguments: tuple[Any, ...], place: Callable[[Tensor], Tensor] = lambda t: t, **options: Any
) -> tuple[Tensor, ...]:
    """What torch.ops.dit_kernels.<op> does on a GPU, within `gpu`. op: with its overload. place: gives the memory for a
    result."""
    checked = OPS[op].call(*arguments, **options)
    results = tuple(map(place, checked.empty_results()))
    kernel, numbers = compile.bound(checked.op.family, checked.chain, checked.operands(results))
    run(kernel, checked, results, numbers)
    return results
