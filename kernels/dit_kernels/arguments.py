"""The arguments of an op, and their roles.

Generic code never names an argument of an op. It asks the role of the argument: which shape the argument must have, in
which shape and strides a kernel takes it, and how many strides a kernel is launched with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dit_kernels.rounding import LARGEST, SCALINGS

ALIGNMENT = 16  # bytes; every tensor of an unchecked launch is aligned to this
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)

Sizes = Sequence[Any]  # ints or symbols
Equal = Callable[[Any, Any], bool]  # are two sizes equal, as far as is known?
Strided = tuple[tuple[Any, ...], tuple[Any, ...]]  # shape and strides, in elements


# --- roles ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """What an argument is to its op.

    shape: in words, the shape that is expected of the op's first argument. expected: the same for a later argument,
    where {first} is the name of the first argument, {sizes} its shape and {width} its last size. fits(sizes, of_first,
    equal): does the argument have the expected shape? laid(sizes, strides, of_first, equal): the shape and strides in
    which a kernel takes the same memory, or None if it takes a copy. strides: how many of these strides a kernel is
    launched with, starting with the outermost. own_tokens: is a kernel also launched with the number of tokens, which
    is not that of the first argument? may_be_complex: are complex numbers allowed, too?
    """

    name: str
    shape: str
    expected: str
    fits: Callable[[Sizes, Sizes, Equal], bool]
    laid: Callable[[Sizes, Sizes, Sizes, Equal], Strided | None]
    strides: int = 0
    own_tokens: bool = False
    may_be_complex: bool = False


def _fits_row(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    return len(sizes) >= 2 and _same(sizes, first, equal)


def _lay_row(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    lead, last = _merged(sizes[:-2], strides[:-2], equal), _dense(sizes, strides, equal)
    if lead is None or last is None:
        return None
    return (lead[0], sizes[-2], sizes[-1]), (lead[1], strides[-2], last)


def _fits_part(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    return len(sizes) >= 2 and _same(sizes[:-1], first[:-1], equal)


def _fits_per_row(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    return len(sizes) >= 2 and _same(sizes, (*first[:-1], 1), equal)


def _fits_modulation(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    pairs = zip(reversed(sizes), reversed(first), strict=False)
    return len(sizes) <= len(first) and all(equal(m, n) or equal(m, 1) for m, n in pairs)


def _lay_modulation(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    if all(equal(size, 1) for size in sizes):
        return (1, 1, 1), (0, 0, 1)
    missing = max(len(first), 3) - len(sizes)
    sizes, strides = (*missing * [1], *sizes), (*missing * [0], *strides)
    if len(sizes) > 3 and not all(equal(size, 1) for size in sizes[:-2]):
        ones = [equal(size, 1) for size in sizes[:-2]]
        sizes = (*(n if one else m for one, m, n in zip(ones, sizes, first, strict=False)), *sizes[-2:])
        strides = (*(0 if one else by for one, by in zip(ones, strides, strict=False)), *strides[-2:])
    return _lay_row(sizes, strides, first, equal) if equal(sizes[-1], first[-1]) else None


def _fits_column(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    return len(sizes) == 1 and equal(sizes[0], first[-1])


def _lay_column(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    return (tuple(sizes), (1,)) if _dense(sizes, strides, equal) else None


def _fits_heads(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    if len(sizes) != 4 or sizes[3] % 2:
        return False
    return _same((*sizes[:2], sizes[3]), (*first[:2], first[3]), equal)


def _fits_heads_before(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    return len(sizes) == 4 and not sizes[3] % 2 and equal(sizes[0], first[0]) and equal(sizes[3], first[3])


def _lay_heads(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    last = _dense(sizes, strides, equal)
    return None if last is None else (tuple(sizes), (*strides[:-1], last))


def _fits_table(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    table = _lay_table(sizes, len(sizes) * [1], first, equal)
    if table is None:
        return False
    (batch, tokens, _), _ = table
    return equal(tokens, first[1]) and (equal(batch, 1) or equal(batch, first[0]))


def _lay_table(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    if not 2 <= len(sizes) <= 4 or _dense(sizes, strides, equal) is None:
        return None
    if len(sizes) == 4 or (len(sizes) == 3 and not equal(sizes[1], first[1])):
        if not equal(sizes[-2], 1):
            return None
        sizes, strides = (*sizes[:-2], sizes[-1]), (*strides[:-2], strides[-1])
    return (*(3 - len(sizes)) * (1,), *sizes), (*(3 - len(sizes)) * (0,), *strides)


def _fits_later_table(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    table = _lay_later_table(sizes, len(sizes) * [1], first, equal)
    return table is not None and (equal(table[0][0], 1) or equal(table[0][0], first[0]))


def _lay_later_table(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    """The number of tokens is not known, so the middle of three dimensions is always that of the tokens."""
    tokens = sizes[1 if len(sizes) > 2 else 0] if len(sizes) > 1 else None
    return _lay_table(sizes, strides, (first[0], tokens, *first[2:]), equal)


def _fits_scalar(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    return all(equal(size, 1) for size in sizes)


def _lay_scalar(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    return (1, 1, 1), (0, 0, 1)


def _fits_joined_table(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    table = _lay_joined_table(sizes, len(sizes) * [1], first, equal)
    return table is not None and (equal(table[0][0], 1) or equal(table[0][0], first[0]))


def _lay_joined_table(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    """Two streams have at least two tokens, so a middle dimension of 1 is that of the heads."""
    tokens = sizes[0] if len(sizes) == 3 and equal(sizes[1], 1) else sizes[1 if len(sizes) > 2 else 0]
    return _lay_table(sizes, strides, (first[0], tokens, *first[2:]), equal)


def _lay_tokens(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    lead, last = _merged(sizes[:-1], strides[:-1], equal), _dense(sizes, strides, equal)
    return None if lead is None or last is None else ((1, lead[0], sizes[-1]), (0, lead[1], last))


def _fits_matrix(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    return len(sizes) == 2 and equal(sizes[1], first[-1])


def _lay_matrix(sizes: Sizes, strides: Sizes, first: Sizes, equal: Equal) -> Strided | None:
    return None if (last := _dense(sizes, strides, equal)) is None else (tuple(sizes), (strides[0], last))


def _fits_bias(sizes: Sizes, first: Sizes, equal: Equal) -> bool:
    return len(sizes) == 1


def _no_tensor(*_: Any) -> Any:
    raise TypeError("an eps has no shape and no strides")


def _same(a: Sizes, b: Sizes, equal: Equal) -> bool:
    return len(a) == len(b) and all(map(equal, a, b))


def _dense(sizes: Sizes, strides: Sizes, equal: Equal) -> int | None:
    """The stride of the last dimension: 1, or None if the elements of a row are not contiguous."""
    return 1 if equal(strides[-1], 1) or equal(sizes[-1], 1) else None


def _merged(sizes: Sizes, strides: Sizes, equal: Equal) -> tuple[Any, Any] | None:
    """The size and stride of several dimensions merged into one; None if they have no common stride."""
    size, stride = 1, 0
    for n, by in zip(reversed(sizes), reversed(strides), strict=True):
        if equal(n, 1):
            continue
        if not equal(size, 1) and not equal(by, stride * size):
            return None
        size, stride = (n, by) if equal(size, 1) else (size * n, stride)
    return size, stride


# A tensor whose rows an op reads or writes: [..., S, D]. A kernel takes it as (B, S, D).
ROW = Role("row", "[..., S, D]", "{sizes}, the shape of {first}", _fits_row, _lay_row, 2)
# Another part of the rows that an op writes: [..., S, E], where E may differ from D. A kernel takes it as (B, S, E).
PART = Role(
    "part",
    "[..., S, E]",
    "{sizes}, the shape of {first}, except for the last dimension",
    _fits_part,
    _lay_row,
    2,
)
# A gate or a scale, which broadcasts along tokens or batch items. A kernel takes it as (1|B, 1|S, D), or, if it is one
# element, as (1, 1, 1).
MODULATION = Role(
    "modulation",
    "[..., S, D] or one that broadcasts to it",
    "a shape that broadcasts to that of {first}, {sizes}",
    _fits_modulation,
    _lay_modulation,
    2,
)
# A number for each row, as the scales of quantised rows: [..., S, 1]. A kernel takes it as (B, S, 1).
PER_ROW = Role("row number", "[..., S, 1]", "one number for each row of {first}, {sizes}", _fits_per_row, _lay_row, 2)
# A weight or a bias: [D].
COLUMN = Role("column", "[D]", "[{width}], the last dimension of {first}", _fits_column, _lay_column)
# Query or key heads: [B, S, H, Dh].
HEADS = Role(
    "heads",
    "[B, S, H, Dh] with an even Dh",
    "[B, S, H, Dh] with the B, S and Dh of {first}, {sizes}",
    _fits_heads,
    _lay_heads,
    3,
)
# The rotation of each token: [S, n], [1|B, S, n], [S, 1, n] or [1|B, S, 1, n]. A kernel takes it as (1|B, S, n).
TABLE = Role(
    "table",
    "[S, n]",
    "[S, n], [1 or B, S, n], [S, 1, n] or [1 or B, S, 1, n]; {first} is {sizes}",
    _fits_table,
    _lay_table,
    2,
    may_be_complex=True,
)
# One element on the device, as a static scale. A kernel takes it as (1, 1, 1).
SCALAR = Role("scalar", "[]", "one element", _fits_scalar, _lay_scalar)
# The heads of the tokens that come before those of the first argument: [B, S', H, Dh]. A kernel takes S', too.
HEADS_BEFORE = Role(
    "heads before",
    "[B, S', H, Dh] with an even Dh",
    "[B, S', H, Dh] with the B and Dh of {first}, {sizes}",
    _fits_heads_before,
    _lay_heads,
    3,
    own_tokens=True,
)
# The rotation of each token of two streams: a table for S' + S tokens.
JOINED_TABLE = Role(
    "joined table",
    "[S' + S, n]",
    "[S' + S, n], [1 or B, S' + S, n], [S' + S, 1, n] or [1 or B, S' + S, 1, n]; {first} is {sizes}",
    _fits_joined_table,
    _lay_joined_table,
    2,
    may_be_complex=True,
)
# The rotation of the last tokens: a table for S' of the S tokens. A kernel takes S', too.
LATER_TABLE = Role(
    "later table",
    "[S', n]",
    "[S', n], [1 or B, S', n] or [1 or B, S', 1, n], with S' up to S; {first} is {sizes}",
    _fits_later_table,
    _lay_later_table,
    2,
    own_tokens=True,
    may_be_complex=True,
)
# The tokens that a linear layer reads, or those that it writes: [..., S, K]. A kernel takes them as (1, tokens, K).
TOKENS = Role(
    "tokens", "[..., S, K]", "{sizes}, the shape of {first}, except for the last dimension", _fits_part, _lay_tokens, 2
)
# The weight of a linear layer: [N, K], as nn.Linear stores it.
MATRIX = Role("matrix", "[N, K]", "[N, {width}], with the last dimension of {first}", _fits_matrix, _lay_matrix, 1)
# The bias of a linear layer: [N].
BIAS = Role("layer bias", "[N]", "[N]", _fits_bias, _lay_column)
# A number that is not negative, or one floating-point element on the CPU.
EPS = Role("eps", "", "a number >= 0, or one floating-point element on the CPU", _no_tensor, _no_tensor)


@dataclass(frozen=True)
class Argument:
    """One argument of a family of ops.

    optional: the argument may be None. defaulted: it may also be left out; the defaulted arguments of an op come last.
    written: the argument is a result. placed: a kernel is launched with the strides of this result, which may be a part
    of a larger tensor; other results are contiguous. inlined: Inductor's own code computes the argument in the kernel
    that reads it, if it can.
    """

    name: str
    role: Role
    optional: bool = False
    defaulted: bool = False
    written: bool = False
    placed: bool = False
    inlined: bool = False

    @property
    def is_tensor(self) -> bool:
        return self.role is not EPS

    @property
    def strides(self) -> int:
        """How many strides a kernel is launched with: none for a result that is always contiguous."""
        return self.role.strides if self.placed or not self.written else 0

    def is_written_to(self, result: Tensor, first: Sizes) -> bool:
        """Does a kernel write to this result where it is? first: the sizes of the op's first argument."""
        if not self.placed:
            return result.is_contiguous()
        return self.role.laid(result.shape, result.stride(), first, known_equal) is not None

    @property
    def numbers(self) -> int:
        """How many numbers a kernel is launched with: the strides, after the number of tokens if it is its own."""
        return self.strides + self.role.own_tokens

    @property
    def schema_type(self) -> str:
        """The type in an op's schema. `{eps}` stands for the type of an eps."""
        return "{eps}" if self.role is EPS else "Tensor?" if self.optional else "Tensor"


@dataclass(frozen=True)
class Option:
    """A keyword argument of an op.

    words: the allowed values of a string; empty for other types. A number must be positive and finite.
    """

    name: str
    kind: str  # its type in the op's schema
    default: Any
    words: tuple[str, ...] = ()


def dtype_option(name: str) -> Option:
    return Option(name, "ScalarType?", None)


# How an op quantises rows: the fields of rounding.QuantSteps.
QUANT_OPTIONS = (
    dtype_option("s_dtype"),
    Option("fmax", "float", LARGEST),
    Option("smallest_amax", "float?", None),
    Option("smallest_scale", "float?", None),
    Option("reciprocal", "bool", False),
    Option("clamp", "bool", True),
)
# How an op quantises with a static scale: the fields of rounding.StaticSteps.
STATIC_OPTIONS = (
    Option("scaling", "str", SCALINGS[0], SCALINGS),
    dtype_option("factor_dtype"),
    dtype_option("scaled_dtype"),
    Option("clamp", "bool", True),
)


# --- what a kernel takes --------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A tensor as a kernel takes it. address: of its first element; 0 if the address is not known, but is aligned."""

    dtype: torch.dtype
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    address: int = 0

    def launch_numbers(self, argument: Argument, equal: Equal) -> list[Any]:
        """The numbers that a kernel is launched with. A stride is 0 along a dimension of size 1."""
        pairs = zip(self.shape[: argument.strides], self.strides, strict=False)
        tokens = [self.shape[1]] if argument.role.own_tokens else []
        return [*tokens, *(0 if equal(size, 1) else by for size, by in pairs)]


def known(condition: Any) -> bool:
    """Is a condition on sizes true for all values of the symbols? Adds no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def known_equal(a: Any, b: Any) -> bool:
    """Are two sizes equal for all values of the symbols?"""
    return known(a == b)


def differ(a: Any, b: Any) -> bool:
    """Do two sizes differ for all values of the symbols?"""
    return known(a != b)


def perhaps_equal(a: Any, b: Any) -> bool:
    """Could two sizes be equal for some values of the symbols?"""
    return not differ(a, b)


def laid(argument: Argument, t: Tensor, first: Sizes) -> tuple[Layout, Tensor]:
    """A tensor as a kernel takes it, and the tensor that holds its memory: `t`, or a copy if no view of `t` will do."""
    found = argument.role.laid(t.shape, t.stride(), first, known_equal)
    if found is None:
        t = _expanded(t, first).contiguous() if argument.role is MODULATION else t.contiguous()
        found = argument.role.laid(t.shape, t.stride(), first, known_equal)
        assert found is not None
    address = 0 if isinstance(t, FakeTensor) else t.data_ptr()
    return Layout(t.dtype, *found, address), t


def _expanded(t: Tensor, first: Sizes) -> Tensor:
    """Expands a modulation to all batch items and all elements, but not along tokens if all tokens share it."""
    tokens = t.shape[-2:-1] or (1,)
    return t.expand(*first[:-2], *tokens, first[-1])


def number(eps: float | Tensor) -> float:
    return eps if isinstance(eps, float) else float(eps)


# --- checks ---------------------------------------------------------------------------------------------------------


def reject(op: str, name: str, got: object, expected: str) -> NoReturn:
    raise ValueError(f"{op}: {name} is {got}, expected {expected}")


def check_argument(op: str, name: str, argument: Argument, given: Any, first_name: str, first: Any) -> None:
    """Raises ValueError unless `given` fits the role of its argument.

    The message names the argument, the given value and what was expected. name and first_name: the op's names for this
    argument and for its first one. No guard is added on a symbolic size: sizes that are not known of a fake tensor are
    checked when the op runs.
    """
    if given is None and argument.optional:
        return
    role = argument.role
    if role is EPS:
        _check_eps(op, name, given)
        return
    if not isinstance(given, Tensor):
        reject(op, name, given, f"a tensor of shape {role.shape}")
    dtypes = (*DTYPES, *COMPLEX) if role.may_be_complex else DTYPES
    check_tensor(op, name, given, first_name, first, dtypes)
    if not role.fits(given.shape, first.shape, perhaps_equal):
        sizes = list(first.shape)
        later = role.expected.format(first=first_name, sizes=sizes, width=sizes[-1] if sizes else 1)
        reject(op, f"{name}.shape", list(given.shape), role.shape if given is first else later)


def check_tensor(
    op: str, name: str, t: Tensor, first_name: str, first: Tensor, dtypes: Sequence[torch.dtype] = DTYPES
) -> None:
    """Raises ValueError unless t is a strided tensor of one of these dtypes, on the device of the first argument."""
    if t.layout != torch.strided:
        reject(op, f"{name}.layout", t.layout, "torch.strided")
    if t.dtype not in dtypes:
        reject(op, f"{name}.dtype", t.dtype, _listed(dtypes))
    if t.device != first.device:
        reject(op, f"{name}.device", t.device, f"{first.device}, the device of {first_name}")


def _check_eps(op: str, name: str, eps: Any) -> None:
    if not isinstance(eps, Tensor | int | float | torch.SymFloat | torch.SymInt):
        reject(op, name, eps, EPS.expected)
    if isinstance(eps, int | float) and not eps >= 0:  # NaN, too
        reject(op, name, eps, EPS.expected)
    if isinstance(eps, Tensor) and (eps.device.type != "cpu" or eps.numel() != 1 or not eps.is_floating_point()):
        reject(op, name, f"a {eps.dtype} tensor of shape {list(eps.shape)} on {eps.device}", EPS.expected)


def check_option(op: str, option: Option, given: Any) -> None:
    """Raises ValueError unless the option allows `given`. The message names the option and what was expected."""
    if option.words and given not in option.words:
        reject(op, option.name, repr(given), ", ".join(map(repr, option.words)))
    if option.kind == "ScalarType?" and given is not None and given not in DTYPES:
        reject(op, option.name, given, _listed(DTYPES))
    if option.kind.startswith("float") and given is not None and not 0 < given < math.inf:  # NaN, too
        reject(op, option.name, given, "a positive number")


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last
