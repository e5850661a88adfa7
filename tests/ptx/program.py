"""PTX text as instructions. `machine` understands the operands of an instruction, or refuses them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Unsupported(Exception):
    """PTX that the interpreter does not know: it is never skipped."""


@dataclass(frozen=True)
class Instruction:
    line: int  # in the PTX text, from 1
    text: str
    guard: str | None  # the predicate register of "@%p1" or "@!%p1"
    negated: bool
    opcode: str
    operands: tuple[str, ...]
    scope: tuple[int, ...]  # the braces it is in: names declared there are its own

    def __str__(self) -> str:
        return f"line {self.line}, `{self.text}`"


@dataclass(frozen=True)
class Parameter:
    name: str
    size: int


@dataclass
class Program:
    """One kernel."""

    name: str
    parameters: list[Parameter]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[tuple[int, ...], str], int] = field(default_factory=dict)  # (scope, name) -> instruction
    widths: dict[tuple[tuple[int, ...], str], int] = field(default_factory=dict)  # register or prefix of many -> bits
    externs: frozenset[str] = frozenset()  # arrays whose size the launch gives

    def label(self, instruction: Instruction, name: str) -> int:
        for scope in _outwards(instruction.scope):
            if (scope, name) in self.labels:
                return self.labels[scope, name]
        raise Unsupported(f"{instruction}: no label {name}")

    def register(self, instruction: Instruction, name: str) -> tuple[str, int] | None:
        """(a name for it that is unique in the program, bits); a predicate has 1 bit. None if `name` is no register."""
        prefix = name.rstrip("0123456789")
        for scope in _outwards(instruction.scope):
            for declared in (name, prefix + "<>"):
                if (scope, declared) in self.widths:
                    return f"{name}{scope or ''}", self.widths[scope, declared]
        return None


def _outwards(scope: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [scope[:length] for length in range(len(scope), -1, -1)]


_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.\w+[^{]*)?)\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+\.global\s+\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?"
)
_EXTERN = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]\s*;")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "f32": 32, "b64": 64}
_SIZES = {"b8": 1, "f32": 4, "u32": 4, "u64": 8}


def parse(text: str) -> Program:
    """The one kernel of a module."""
    text = re.sub(r"//[^\n]*", "", text)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise Unsupported(f"{len(entries)} kernels in one module")
    (entry,) = entries
    parameters = []
    for kind, name, count in _PARAMETER.findall(entry[2]):
        if kind not in _SIZES:
            raise Unsupported(f"a kernel parameter of type .{kind}")
        parameters.append(Parameter(name, _SIZES[kind] * int(count or 1)))
    threads = re.fullmatch(r"\.reqntid (\d+), 1, 1\s*(?:\.minnctapersm \d+\s*)?", entry[3])
    if not threads:
        raise Unsupported(f"a kernel with {entry[3].strip()!r}")
    program = Program(entry[1], parameters, int(threads[1]), externs=frozenset(_EXTERN.findall(text)))
    _parse_body(program, text, entry.end())
    return program


def _parse_body(program: Program, text: str, at: int) -> None:
    scope: tuple[int, ...] = ()
    scopes = 0
    while True:
        at += len(text[at:]) - len(text[at:].lstrip()) if text[at].isspace() else 0
        if text[at] == "{":
            scopes += 1
            scope = (*scope, scopes)
            at += 1
        elif text[at] == "}":
            if not scope:
                return
            scope = scope[:-1]
            at += 1
        elif label := _LABEL.match(text, at):
            program.labels[scope, label[1]] = len(program.instructions)
            at = label.end()
        else:
            end = text.index(";", at)
            _parse_statement(program, text[at:end], text.count("\n", 0, at) + 1, scope)
            at = end + 1


def _parse_statement(program: Program, statement: str, line: int, scope: tuple[int, ...]) -> None:
    statement = " ".join(statement.split())
    if declaration := _DECLARATION.fullmatch(statement):
        kind, names = declaration.groups()
        for name in names.split(","):
            program.widths[scope, re.sub(r"<\d+>", "<>", name.strip())] = _WIDTHS[kind]
        return
    match = _STATEMENT.fullmatch(statement)
    if not match:
        raise Unsupported(f"line {line}, `{statement}`: not an instruction that the parser knows")
    negated, guard, opcode, rest = match.groups()
    operands = tuple(o.strip() for o in re.split(r",(?![^{]*\})", rest)) if rest else ()
    program.instructions.append(Instruction(line, statement + ";", guard, bool(negated), opcode, operands, scope))
