"""One call of an op, checked: what every family of ops does with its arguments before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)


class Call:
    """The checked arguments of one call. A family of ops says what they are and how they are computed."""

    chain: Hashable  # what the call computes, apart from the sizes

    def like(self) -> Tensor:
        """The operand that says on which device the call runs."""
        raise NotImplementedError

    def empty_results(self) -> tuple[Tensor, ...]:
        """Fresh contiguous results, in order."""
        raise NotImplementedError

    def definition(self) -> tuple[Tensor, ...]:
        """The results, by dit_kernels.reference."""
        raise NotImplementedError

    def fits_kernel(self) -> bool:
        """Does the family's kernel take these dtypes and sizes?"""
        raise NotImplementedError

    def operands(self, results: tuple[Tensor, ...], read_eps: bool = True) -> tuple[Any, ...]:
        """What dit_kernels.compile.bound takes behind the chain: views where they do, else copies; results last.

        With `read_eps` false, an eps is 0 instead of the content of a tensor.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Family:
    """What the kernels of a family are launched with."""

    arguments: tuple[str, ...]  # operands, then results
    results: dict[str, str]  # and the operands whose shapes they have
    launch_numbers: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # B, S and strides of operands, by their names
    of_launch: Callable[[int, int, int], tuple[int, ...]] = lambda device, stream, batches: ()  # what each launch needs


@dataclass(frozen=True)
class Op:
    """An op, and which arguments of its family's kernels it has."""

    family: Family
    schema: str  # `{eps}` stands for the type of an eps
    make_call: Callable[..., Call]
    arguments: tuple[str, ...]  # those given by position, then the results, by the names that the family has for them

    @cached_property
    def _order(self) -> tuple[int, ...]:
        absent = len(self.arguments)
        return tuple(
            self.arguments.index(name) if name in self.arguments else absent + ("eps" in name)
            for name in self.family.arguments
        )

    def arranged(self, given: Sequence[Any]) -> list[Any]:
        """The arguments of the kernel, of values for `arguments`: None, or for an eps 0, where the op has none."""
        every = (*given, None, 0.0)
        return [every[i] for i in self._order]


@cache
def step_dtypes(steps: Any) -> frozenset[torch.dtype]:
    """The dtypes that the steps of a chain are rounded to."""
    if isinstance(steps, torch.dtype):
        return frozenset({steps})
    nested = [getattr(steps, field.name) for field in fields(steps)] if is_dataclass(steps) else []
    return frozenset().union(*map(step_dtypes, nested))


# --- checking -------------------------------------------------------------------------------------------------------


def reject(op: str, name: str, got: object, expected: str) -> NoReturn:
    raise ValueError(f"{op}: {name} is {got}, expected {expected}")


def check_tensor(
    op: str, name: str, t: Tensor, like: Tensor, reference: str = "x", dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    """A strided tensor of one of these dtypes, on the device of `like`, which is the argument `reference`."""
    if t.layout != torch.strided:
        reject(op, f"{name}.layout", t.layout, "torch.strided")
    if t.dtype not in dtypes:
        reject(op, f"{name}.dtype", t.dtype, _listed(dtypes))
    if t.device != like.device:
        reject(op, f"{name}.device", t.device, f"{like.device}, the device of {reference}")


def check_row(op: str, name: str, t: Tensor | None, x: Tensor, reference: str = "x") -> None:
    """weight and bias: one number for each element of the last dimension."""
    if t is None:
        return
    check_tensor(op, name, t, x, reference)
    if t.ndim != 1 or t.shape[0] != x.shape[-1]:
        reject(op, f"{name}.shape", list(t.shape), f"[{x.shape[-1]}], the last dimension of {reference}")


def check_eps(op: str, name: str, eps: float | Tensor) -> None:
    if eps is None:
        reject(op, name, eps, "a number, or one floating-point element on the CPU")
    if isinstance(eps, Tensor) and (eps.device.type != "cpu" or eps.numel() != 1 or not eps.is_floating_point()):
        got = f"a {eps.dtype} tensor of shape {list(eps.shape)} on {eps.device}"
        reject(op, name, got, "one floating-point element on the CPU")


def check_word(op: str, name: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        reject(op, name, repr(word), ", ".join(map(repr, words)))


def check_dtypes(op: str, **dtypes: torch.dtype | None) -> None:
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in DTYPES:
            reject(op, name, dtype, _listed(DTYPES))


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}"


# --- what kernels take ----------------------------------------------------------------------------------------------


def dtype_of(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def number(eps: float | Tensor) -> float:
    return eps if isinstance(eps, float) else float(eps)


def row(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def rows(t: Tensor) -> Tensor:
    """[..., S, D] as [B, S, D] with a last dimension of stride 1; a copy only where a view cannot do it."""
    if t.ndim != 3:
        t = t.reshape(-1, *t.shape[-2:]) if t.ndim > 3 else t.unsqueeze(0)
    return dense(t)


def dense(t: Tensor) -> Tensor:
    """With a last dimension of stride 1; a copy only where it has another."""
    return t if t.stride(-1) == 1 else t.contiguous()


def launch_strides(t: Any, dimensions: int = 2) -> list[Any]:
    """Strides by the first dimensions (batch item, token, head), in elements: 0 where there is one, or `t` is absent.

    Of tensors, and of whatever else has a shape and stride().
    """
    if t is None:
        return [0] * dimensions
    return [0 if size == 1 else by for size, by in zip(t.shape[:dimensions], t.stride()[:dimensions], strict=True)]
