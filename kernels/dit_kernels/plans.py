"""Plans: the checks and choices for one call through the dispatcher are kept for similar calls.

Checking a call costs the host several times as much as a launch. A plan is a launch with everything decided, protected
by Dynamo's guards. The guards compare everything that the checks and the choice of a kernel depend on: dtype, device,
sizes, strides, requires_grad and dispatch keys. They do not see forward-mode gradients, and they do not see every mode.
`ops._autograd` checks these first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C._dynamo.guards import TensorGuards

from dit_kernels.arguments import ALIGNMENT
from dit_kernels.families.family import Call, Op

MOST_PLANS = 64  # of an op, for calls whose arguments are of the same types; the latest ones are kept

_PLAIN = (Tensor, torch.nn.Parameter)
_address = Tensor.data_ptr

Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]
Launch = Callable[[tuple[Any, ...], Sequence[Tensor]], Any]


class Plan(NamedTuple):
    """How to run calls that pass the guards."""

    guards: TensorGuards
    launch: Launch


def no_launch(args: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
    """The launch of calls that cannot be planned. Keeping it avoids a second analysis."""


class Plans:
    """The plans of one op on one level of the dispatcher. The dispatch keys that guards compare depend on the level."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.kept: dict[tuple[Any, ...], tuple[Pick, list[Plan]]] = {}

    def run(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Returns the results of a call, by its plan. Returns None if the call must be checked."""
        kept = self.kept.get((is_grad_enabled(), *map(type, args), *options.items()))
        if kept is not None:
            tensors = kept[0](args)
            for guards, launch in kept[1]:
                if guards.check(*tensors):
                    return launch(args, tensors)
        return None

    def knows(self, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Is there a plan for this call?"""
        pick, plans = self.kept.get(_kind(args, options), (tuple, []))
        return any(plan.guards.check(*pick(args)) for plan in plans)

    def keep(self, args: tuple[Any, ...], options: dict[str, Any], launch: Launch) -> None:
        """Keeps the plan for calls like this one."""
        positions = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        tensors = [args[i] for i in positions]
        sizes: Any = [list(t.shape) for t in tensors]  # Dynamo also allows None in these lists, for any size
        strides: Any = [list(t.stride()) for t in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        if guards.check(*tensors):
            plans = self.kept.setdefault(_kind(args, options), (picking(positions), []))[1]
            plans[MOST_PLANS - 1 :] = []
            plans.insert(0, Plan(guards, launch))


def _kind(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What plans are kept by. `Plans.run` spells the same out, to save the call."""
    return (is_grad_enabled(), *map(type, args), *options.items())


def can_be_planned(args: tuple[Any, ...]) -> bool:
    """Can guards check all of these arguments? Guards do not see alignment and do not take the same tensor twice."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if not all(arg is None or arg.__class__ is float or arg.__class__ in _PLAIN for arg in args):
        return False
    if any(torch._is_functional_tensor(t) or t.is_neg() or t.is_conj() for t in tensors):
        return False
    return len(set(map(id, tensors))) == len(tensors) and all(t.numel() and _is_aligned(t) for t in tensors)


def _is_aligned(t: Tensor) -> bool:
    return t.data_ptr() % ALIGNMENT == 0


def make_launch(
    call: Call,
    args: tuple[Any, ...],
    results: Sequence[Tensor],
    function: Callable[..., None],
    numbers: tuple[int, ...],
) -> Launch:
    """A function that runs similar calls with this kernel. `no_launch` if the kernel reads a copy of an argument."""
    read = [arg for arg in args if isinstance(arg, Tensor)]
    memory = call.operands(results).memory
    if sorted(map(_address, memory)) != sorted(map(_address, (*read, *results))):
        return no_launch
    device, metadata = results[0].get_device(), [(tuple(r.shape), r.stride(), r.dtype) for r in results]
    several = len(results) > 1
    empty = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
    current_device, stream_of = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
    of_launch, can_launch = call.op.family.of_launch, call.op.family.can_launch
    arranged, floats_of = arranging(call.op, args)

    def launch(args: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
        if current_device() != device:
            with torch.cuda.device(device):
                return launch(args, tensors)
        addresses = [*map(_address, tensors)]
        if reduce(or_, addresses) % ALIGNMENT:
            return None
        results = [empty(*of_one) for of_one in metadata]  # on the current device
        given = arranged((*addresses, *map(_address, results), *floats_of(args), None, 0.0))
        if not can_launch(given):
            return None
        stream = stream_of(device)
        function(*given, *numbers, *of_launch(device, stream, numbers[0]), stream)
        return tuple(results) if several else results[0]

    return launch


def arranging(op: Op, args: tuple[Any, ...]) -> tuple[Pick, Pick]:
    """Returns two functions.

    The first takes a tuple with the addresses of the tensors, the addresses of the results, the floats, None and 0, in
    this order. It returns the kernel's arguments. The second takes the op's arguments and returns the floats.
    """
    results = len(op.results)
    floats = [i for i, arg in enumerate(args) if arg.__class__ is float]
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
    first_float = len(tensors) + results
    absent = first_float + len(floats)
    places = {i: n for n, i in enumerate(tensors)} | {i: first_float + n for n, i in enumerate(floats)}
    given = [places.get(i) for i in range(len(args))] + [len(tensors) + n for n in range(results)]
    order = [absent if i is None else absent + 1 if i.__class__ is float else i for i in op.arranged(given)]
    return picking(order), picking(floats)


def picking(positions: Sequence[int]) -> Pick:
    """A function that returns the elements of a tuple at these positions, as a tuple."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return itemgetter(slice(positions[0], positions[0] + 1) if positions else slice(0))
