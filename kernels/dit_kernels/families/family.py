"""A family of ops, one op of a family, and one checked call: the code that all families share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from dit_kernels.arguments import (
    EPS,
    KERNEL_DTYPES,
    QUANT_OPTIONS,
    Argument,
    Equal,
    Layout,
    Option,
    check_argument,
    check_option,
    known_equal,
    laid,
    number,
)
from dit_kernels.rounding import FP8, QuantSteps, StaticSteps

FP8_CAPABILITY = (8, 9)  # the first compute capability with conversions to FP8
# From 2.12 on, PyTorch's cast to FP8 clamps (pytorch/pytorch#178817). Before, it makes NaN of what is too large.
CAST_SATURATES = torch.__version__ >= "2.12"

EPS_TENSOR = "eps_tensor"  # ends the name of an overload that reads eps from a tensor

Named = Mapping[str, Any]  # the arguments of a call, by the family's names; None for absent ones
Shaped = tuple[Sequence[Any], torch.dtype]  # shape and dtype of a result


class Family:
    """Ops that share one kernel template. A subclass adds what is specific; the roles of `arguments` give the rest.

    arguments: the kernel's arguments in order, operands first, then results. Device, width and sizes are those of the
    first one. grain: the rows of a result that is a part of a larger tensor start at multiples of so many elements.
    """

    arguments: tuple[Argument, ...]
    grain = 1

    def __repr__(self) -> str:
        return type(self).__name__  # part of the name of a kernel on disk

    @cached_property
    def named(self) -> dict[str, Argument]:
        return {argument.name: argument for argument in self.arguments}

    @cached_property
    def tensors(self) -> tuple[Argument, ...]:
        """The tensors among the arguments. A kernel is compiled for their specs."""
        return tuple(argument for argument in self.arguments if argument.is_tensor)

    @cached_property
    def numbers(self) -> int:
        """How many numbers of its arguments a kernel is launched with."""
        return sum(argument.numbers for argument in self.arguments)

    def check(self, op: Op, named: Named, options: Named) -> None:
        """Raises ValueError if arguments that are each valid do not fit together."""

    def chain(self, op: Op, named: Named, options: Named) -> Hashable:
        """What a call computes, apart from the sizes: everything that the definition and the kernel must know."""
        raise NotImplementedError

    def results(self, chain: Any, named: Named) -> tuple[Shaped, ...]:
        """The shape and dtype of each result."""
        raise NotImplementedError

    def definition(self, chain: Any, named: Named) -> tuple[Tensor, ...]:
        """The results, computed in plain PyTorch by dit_kernels.reference."""
        raise NotImplementedError

    def fits_kernel(self, chain: Any, named: Named) -> bool:
        """Does the kernel take these dtypes and sizes? By default, it takes the dtypes in KERNEL_DTYPES."""
        tensors = (named.get(argument.name) for argument in self.tensors)
        dtypes = {t.dtype for t in tensors if t is not None} | step_dtypes(chain)
        quantises = FP8 in dtypes
        return dtypes - {FP8} <= set(KERNEL_DTYPES) and (not quantises or quantises_on(named[self.arguments[0].name]))

    def kernel(self) -> Callable[..., Any]:
        """The class of the kernel, a subclass of dit_kernels.cute.kernel.Kernel. Imports cutlass."""
        raise NotImplementedError

    def tiling(self, chain: Any, d: int, specs: Named, arch: str) -> Any:
        """How a kernel distributes its work over threads. specs: by name, the TensorSpec of each tensor, or None."""
        raise NotImplementedError

    def missing(self, device: torch.device) -> str | None:
        """Why this family has no kernel on a GPU that other kernels run on; None if it has one."""
        return None

    def problem(self, call: Call, thorough: bool) -> Any:
        """What decides whether the kernel of a call is used, and in which configuration: a tuning.Problem.

        None if the kernel is used wherever it fits. thorough: try more configurations. The sizes of the call may be
        symbols. Raises tuning.NotMeasured.
        """
        return None

    def can_launch(self, given: Sequence[Any]) -> bool:
        """Does the kernel take these addresses? given: its arguments, with the address of each tensor, which is aligned
        to 16 bytes."""
        return True

    def can_run(self, operands: KernelArguments) -> bool:
        """Does the kernel take these operands and results, wherever they are in memory?"""
        return self.can_launch(operands.addresses())

    def of_launch(self, device: int, stream: int, batches: int) -> tuple[int, ...]:
        """Numbers that are determined again for each launch."""
        return ()

    def launch_numbers(self, layouts: Mapping[str, Layout | None], equal: Equal = known_equal) -> tuple[Any, ...]:
        """The numbers that a kernel is launched with: B, S, and `Layout.launch_numbers` of each argument.

        They are 0 for an absent operand. layouts: those of the arguments that have strides.
        """
        numbers: list[Any] = []
        for argument in self.arguments:
            layout = layouts.get(argument.name) if argument.strides else None
            numbers += argument.numbers * [0] if layout is None else layout.launch_numbers(argument, equal)
        first = layouts[self.arguments[0].name]
        assert first is not None
        return (first.shape[0], first.shape[1], *numbers)


@dataclass(frozen=True)
class Op:
    """An op: which arguments of its family it has, and its keyword arguments.

    name: for an op that is an overload of another one, the names of both, with a dot between. arguments: the family's
    names, first of the arguments given by position, then of the results. called: maps a family's name to the op's own
    name, if they differ. quantises: one of the results is in FP8; such an op has no gradient.
    """

    name: str
    family: Family
    arguments: tuple[str, ...]
    options: tuple[Option, ...]
    called: Mapping[str, str] = field(default_factory=dict)
    quantises: bool = False

    @cached_property
    def inputs(self) -> tuple[Argument, ...]:
        """The arguments given by position."""
        named = self.family.named
        return tuple(named[name] for name in self.arguments if not named[name].written)

    @cached_property
    def results(self) -> tuple[Argument, ...]:
        named = self.family.named
        return tuple(named[name] for name in self.arguments if named[name].written)

    @cached_property
    def roles(self) -> dict[str, Argument]:
        """The arguments given by position, keyed by the op's own names."""
        return {self.own_name(argument.name): argument for argument in self.inputs}

    def own_name(self, name: str) -> str:
        """The op's own name for an argument of its family."""
        return self.called.get(name, name)

    @property
    def has_eps(self) -> bool:
        return any(argument.role is EPS for argument in self.inputs)

    def registered_name(self, eps_tensor: bool = False) -> str:
        """The name of the op with that of its overload. eps_tensor: of the overload that reads eps from a tensor."""
        if not eps_tensor:
            return self.name
        return f"{self.name}{'_' if '.' in self.name else '.'}{EPS_TENSOR}"

    def overload(self, eps_tensor: bool = False) -> torch._ops.OpOverload:
        """The overload of torch.ops.dit_kernels that calls the op."""
        packet, _, name = self.registered_name(eps_tensor).partition(".")
        found: torch._ops.OpOverload = getattr(getattr(torch.ops.dit_kernels, packet), name or "default")
        return found

    @property
    def has_rounding(self) -> bool:
        """Does the op compute anything that a rounding form changes?"""
        return any(option.name == "rounding" for option in self.options)

    def schema(self, eps: str = "float?") -> str:
        """The op's schema without its name. eps: the type of an eps; None is accepted there, and rejected by `call`."""
        given = [
            f"{argument.schema_type.format(eps=eps)} {name}{'=None' if argument.defaulted else ''}"
            for name, argument in self.roles.items()
        ]
        given += ["*", *(f"{option.kind} {option.name}={option.default!r}" for option in self.options)]
        results = ", ".join("Tensor" for _ in self.results)
        return f"({', '.join(given)}) -> {results if len(self.results) == 1 else f'({results})'}"

    def filled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All arguments given by position. The dispatcher drops defaults at the end; they are added here."""
        return (*args, *(len(self.inputs) - len(args)) * (None,))

    def call(self, *args: Any, **options: Any) -> Call:
        """The checked call. Raises ValueError, which names a bad argument, the given value and what was expected."""
        args = tuple(_plain(given) for given in self.filled(args))
        named = {argument.name: given for argument, given in zip(self.inputs, args, strict=True)}
        (first_name, _), first = next(iter(self.roles.items())), args[0]
        for (name, argument), given in zip(self.roles.items(), args, strict=True):
            check_argument(self.name, name, argument, given, first_name, first)
        chosen = {option.name: options.get(option.name, option.default) for option in self.options}
        for option in self.options:
            check_option(self.name, option, chosen[option.name])
        self.family.check(self, named, chosen)
        for argument in self.inputs:
            if argument.role is EPS and isinstance(eps := named[argument.name], Tensor):
                named[argument.name] = eps.reshape(())  # one of more dimensions would broadcast
        return Call(self, self.family.chain(self, named, chosen), named)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        absent = len(self.arguments)
        return tuple(
            self.arguments.index(argument.name) if argument.name in self.arguments else absent + (argument.role is EPS)
            for argument in self.family.arguments
        )

    def arranged(self, given: Sequence[Any]) -> list[Any]:
        """Orders values for `arguments` as the kernel takes them. An argument that the op lacks is None, an eps 0."""
        every = (*given, None, 0.0)
        return [every[i] for i in self._order]


@dataclass(frozen=True, eq=False)
class Call:
    """The checked arguments of one call of an op, keyed by the names of its family."""

    op: Op
    chain: Any
    named: dict[str, Any]

    @property
    def first(self) -> Tensor:
        """The first argument. The call runs on its device."""
        t: Tensor = self.named[self.op.arguments[0]]
        return t

    def empty_results(self) -> tuple[Tensor, ...]:
        """Newly allocated contiguous results, in order."""
        shaped = self.op.family.results(self.chain, self.named)
        return tuple(self.first.new_empty(shape, dtype=dtype) for shape, dtype in shaped)

    def definition(self) -> tuple[Tensor, ...]:
        """The results, computed by dit_kernels.reference and made contiguous."""
        return tuple(result.contiguous() for result in self.op.family.definition(self.chain, self.named))

    def fits_kernel(self) -> bool:
        """Does the family's kernel take these dtypes and sizes?"""
        return self.op.family.fits_kernel(self.chain, self.named)

    def operands(self, results: Sequence[Tensor], read_eps: bool = True) -> KernelArguments:
        """The arguments of the kernel. If `read_eps` is false, eps is 0 and no eps tensor is read."""
        written = {argument.name: t for argument, t in zip(self.op.results, results, strict=True)}
        values: dict[str, Layout | float | None] = {}
        memory: list[Tensor] = []
        for argument in self.op.family.arguments:
            given = written.get(argument.name, self.named.get(argument.name))
            if argument.role is EPS:
                values[argument.name] = 0.0 if given is None or not read_eps else number(given)
            elif given is None:
                values[argument.name] = None
            else:
                values[argument.name], kept = laid(argument, given, self.first.shape)
                memory.append(kept)
        return KernelArguments(self.first.device, values, tuple(memory))


@dataclass(frozen=True)
class KernelArguments:
    """The arguments of one kernel, in its order: a Layout, a number, or None. memory: the tensors of the layouts."""

    device: torch.device
    values: dict[str, Any]
    memory: tuple[Tensor, ...]

    def addresses(self) -> list[Any]:
        """The arguments that a kernel is launched with: for a tensor, its address."""
        return [value.address if isinstance(value, Layout) else value for value in self.values.values()]


def quantises_on(t: Tensor) -> bool:
    """Can a kernel write FP8 on the device of this tensor?"""
    return t.device.type == "cuda" and torch.cuda.get_device_capability(t.device) >= FP8_CAPABILITY


def quant_options(options: Named, z: torch.dtype) -> QuantSteps | StaticSteps:
    """The steps of the quantiser that the options of an op describe. z: the dtype of what is quantised."""
    clamp = options["clamp"] or CAST_SATURATES
    if "scaling" in options:
        factor, scaled = (options[name] or torch.float32 for name in ("factor_dtype", "scaled_dtype"))
        return StaticSteps(options["scaling"], factor, scaled, clamp)
    given = {option.name: options[option.name] for option in QUANT_OPTIONS} | {"clamp": clamp}
    return QuantSteps(given.pop("s_dtype") or z, **given)


def quantised_results(shape: Sequence[Any], steps: QuantSteps | StaticSteps) -> tuple[Shaped, ...]:
    """The shape and dtype of q, and with QuantSteps those of s. shape: that of what is quantised."""
    q = (shape, steps.out)
    return (q,) if isinstance(steps, StaticSteps) else (q, ((*shape[:-1], 1), torch.float32))


def _plain(given: Any) -> Any:
    """A tensor of a subclass that does not dispatch by itself, as a plain tensor: dispatch modes know no subclass."""
    dispatch = getattr(type(given), "__torch_dispatch__", None)
    is_plain = type(given) in (Tensor, torch.nn.Parameter) or not isinstance(given, Tensor)
    return given if is_plain or dispatch is not torch._C._disabled_torch_dispatch_impl else given.as_subclass(Tensor)


@cache
def step_dtypes(steps: Any) -> frozenset[torch.dtype]:
    """The dtypes that the steps of a chain are rounded to."""
    if isinstance(steps, torch.dtype):
        return frozenset({steps})
    if isinstance(steps, tuple):
        return frozenset().union(*map(step_dtypes, steps))
    nested = [getattr(steps, f.name) for f in fields(steps)] if is_dataclass(steps) else []
    return frozenset().union(*map(step_dtypes, nested))
