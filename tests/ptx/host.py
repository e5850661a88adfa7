"""What the host does before a launch, read off the compiled host code: the grid, the shared memory and the parameters.

CuTeDSL keeps the host function as LLVM dialect. Its arithmetic is straight: the values that a launch consists of are
computed here from the arguments, so that a wrong grid is found like a wrong kernel.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ptx.program import Program, Unsupported

Value = Any  # an int, or for a struct a nested tuple
CONFIGURATION = {(0, 0): "x", (0, 1): "y", (0, 2): "z", (1, 0): "threads", (1, 1): "one", (1, 2): "one", (2,): "shared"}


@dataclass(frozen=True)
class Launch:
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: dict[str, bytes]  # by their names in the PTX


def host_function(module: str) -> list[str]:
    """The lines of the function that launches the kernel."""
    lines = module.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"\s*llvm\.func @cutlass___call__", line))
    end = next(i for i in range(start, len(lines)) if lines[i] == "  }")
    return lines[start:end]


def launch(lines: Sequence[str], program: Program, arguments: Sequence[Any]) -> Launch:
    """What the host function launches, called with these arguments: addresses, numbers; the stream comes last."""
    types = [match[1] for match in _ARGUMENT.finditer(lines[0])]
    if len(types) != len(arguments) + 1:
        raise Unsupported(f"a host function of {len(types)} arguments")
    values: dict[str, Value] = {f"%arg{i}": argument for i, argument in enumerate(arguments)}
    configuration: dict[str, int] = {}
    parameters: list[bytes] = []
    pointers: dict[str, tuple[int, ...]] = {}  # into the configuration
    slots: set[str] = set()  # where the host puts a parameter for the launch to find
    for line in lines[1:]:
        if match := _SLOT.match(line):
            slots.add(match[1])
        elif match := _POINTER.match(line):
            pointers[match[1]] = tuple(int(i) for i in match[2].split(","))[1:]
        elif match := _STORE.match(line):
            source, target, kind = match.groups()
            where = CONFIGURATION.get(pointers.get(target, ()))
            if where is not None and source in values:
                configuration[where] = values[source]
            elif target in slots and kind != "!llvm.ptr":
                parameters.append(_bytes(kind, values.get(source)))
        else:
            _compute(line, values)
    missing = set(CONFIGURATION.values()) - set(configuration)
    if missing or configuration["one"] != 1:
        raise Unsupported(f"a launch whose {sorted(missing)} cannot be read off the host code")
    named = {}
    for parameter, content in zip(program.parameters, parameters, strict=True):
        if len(content) != parameter.size:
            raise Unsupported(f"{parameter.name} has {parameter.size} bytes, the host gives {len(content)}")
        named[parameter.name] = content
    grid = configuration["x"], configuration["y"], configuration["z"]
    return Launch(grid, configuration["threads"], configuration["shared"], named)


_ASSIGNMENT = re.compile(r"\s*(%\d+) = llvm\.(\S+) (.*?)\s*(?:overflow<\w+>\s*)?:")
_CONSTANT = re.compile(r"\s*(%\d+) = llvm\.mlir\.constant\((-?\w+)(?: : i\d+)?\)")
_ARGUMENT = re.compile(r"%arg\d+: (.*?)(?: \{[^}]*\})?(?=, %arg|\) ->|\) attr|\) \{)")
_POISON = re.compile(r"\s*(%\d+) = llvm\.mlir\.poison : (.*\S)")
_CONFIGURED = r"struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"
_POINTER = re.compile(r"\s*(%\d+) = llvm\.getelementptr %\d+\[([\d, ]+)\] : .*" + _CONFIGURED)
_SLOT = re.compile(r"\s*(%\d+) = llvm\.alloca ")
_STORE = re.compile(r"\s*llvm\.store (%\w+), (%\d+) : (.*), !llvm\.ptr$")


def _signed(value: int, bits: int) -> int:
    value %= 2**bits
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def _bits(line: str) -> int:
    """Of the integer that a line computes: the last type that it names."""
    return int(re.findall(r"\bi(\d+)\b", line)[-1])


def _divide(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "sdiv": _divide,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}
_CONVERSIONS = ("sext", "trunc")
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
}


def _compute(line: str, values: dict[str, Value]) -> None:
    """One assignment. What is computed from anything unknown stays unknown: only launch values must be known."""
    if match := _CONSTANT.match(line):
        words = {"true": 1, "false": 0}
        values[match[1]] = words[match[2]] if match[2] in words else int(match[2])
        return
    if match := _POISON.match(line):
        values[match[1]] = _unknown(match[2])
        return
    match = _ASSIGNMENT.match(line)
    if not match:
        return
    name, operation, rest = match.groups()
    operands = [values.get(operand) for operand in re.findall(r"%\w+", rest)]
    if None in operands:
        return
    if operation in _OPERATIONS:
        values[name] = _signed(_OPERATIONS[operation](*operands), _bits(line))
    elif operation == "icmp":
        compare = _COMPARISONS.get(rest.split('"')[1])
        if compare is not None:
            values[name] = int(compare(*operands))
    elif operation == "select":
        condition, yes, no = operands
        values[name] = yes if condition else no
    elif operation in _CONVERSIONS:
        values[name] = _signed(operands[0], _bits(line))
    elif operation == "insertvalue":
        value, structure = operands
        indices = [int(index) for index in re.search(r"\[([\d, ]+)\]", rest)[1].split(",")]  # type: ignore[index]
        values[name] = _with(structure, indices, value)


# --- structs --------------------------------------------------------------------------------------------------------


def _members(kind: str) -> list[str] | None:
    """The members of a struct type, None for any other."""
    match = re.fullmatch(r"(?:!llvm\.)?struct<\((.*)\)>", kind)
    if not match:
        return None
    members, depth, start = [], 0, 0
    for i, c in enumerate(match[1] + ","):
        depth += (c in "<(") - (c in ">)")
        if c == "," and depth == 0:
            members.append(match[1][start:i].strip())
            start = i + 1
    return [member for member in members if member]


def _leaves(kind: str) -> list[str]:
    members = _members(kind)
    return [kind] if members is None else [leaf for member in members for leaf in _leaves(member)]


def _unknown(kind: str) -> Value:
    """A value of that type of which nothing is known yet."""
    members = _members(kind)
    return None if members is None else tuple(_unknown(member) for member in members)


def _with(structure: Value, indices: Sequence[int], value: Value) -> Value:
    if not indices:
        return value
    first, *rest = indices
    return (*structure[:first], _with(structure[first], rest, value), *structure[first + 1 :])


_FORMATS = {"ptr<1>": ("<Q", 8), "i32": ("<i", 4), "i64": ("<q", 8), "f32": ("<f", 4)}


def _bytes(kind: str, value: Value) -> bytes:
    """A value as it lies in memory, each number aligned to its size."""
    flat = _flat(value)
    if None in flat:
        raise Unsupported(f"a kernel parameter {kind} that cannot be read off the host code")
    content = b""
    largest = 1
    for leaf, number in zip(_leaves(kind), flat, strict=True):
        form, size = _FORMATS[leaf.removeprefix("!llvm.")]
        content += bytes(-len(content) % size) + struct.pack(form, number)
        largest = max(largest, size)
    return content + bytes(-len(content) % largest)


def _flat(value: Value) -> list[Any]:
    return [leaf for part in value for leaf in _flat(part)] if isinstance(value, tuple) else [value]
