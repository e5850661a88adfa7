"""What was fused, what was missed and why: the record that a compilation leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from io import StringIO
from typing import Any

import torch
from torch.fx import Node


class Reason(str, Enum):
    """Why something in the graph was not fused; the list is closed."""

    ALONE = "no residual add, scale or rotation of a known form stands around it as its only reader"
    FOLLOWED = "a shift, a product or the like follows the scale, which Inductor computes in the same kernel"
    LAYER_NORM = "a LayerNorm that is not written as F.layer_norm"
    DIMENSION = "the mean does not run over the last dimension only"
    NOT_NORMALISED = "what is squared is not what is normalised"
    MEAN = "what its root is taken of is not what torch.mean makes of the squares, plus eps"
    ROOT = "eps or a factor stands on its root, not under it"
    ESCAPES = "a value inside the site is used outside it"
    KINDS = "its two norms are of different kinds"
    ROUNDING = "its casts fit no rounding form"
    WIDTH = "the last dimension is not static"
    SHAPE = "shape or broadcast not proven"
    DTYPE = "a dtype that the ops do not take"
    DEVICE = "its operands are on different devices"
    EPS = "eps is neither a constant nor a 0-d floating-point tensor on the CPU"
    ORDER = "an operand of the site is computed from its result"
    LAYOUT = "the op would have its rows lie otherwise in memory, which shows in what is read from them"
    MUTATION = "a mutation or a stream switch stands between its nodes"
    TRAINING = (
        "a training graph, whose backward reads the values inside the site; where no gradient is wanted, run the model "
        "under torch.no_grad() or torch.inference_mode()"
    )
    UNNORMED = "what is rotated is not an RMSNorm of each head"
    HEADS = (
        "what is rotated is not [B, S, H, Dh], or its rotation is not one row for each token, the same for all heads"
    )
    INLINE = "Inductor computes it in the kernel that reads it, or writes it into the tensor that it becomes a part of"
    SILU = "a silu that is not written as F.silu, and rounds otherwise"
    PER_TOKEN = "an operand for each token that Inductor computes inside its own kernel"
    NO_KERNEL = "no kernel can run here"
    UNFIT = "no kernel takes its dtypes and sizes"
    ERROR = "an internal error of the pass; nothing was changed"


# What is no site of ours, or is left to Inductor on purpose: nothing to warn of, nothing to raise for.
BY_DESIGN = frozenset(
    {
        Reason.ALONE,
        Reason.FOLLOWED,
        Reason.LAYER_NORM,
        Reason.DIMENSION,
        Reason.NOT_NORMALISED,
        Reason.MEAN,
        Reason.ROOT,
        Reason.KINDS,
        Reason.PER_TOKEN,
        Reason.UNNORMED,
        Reason.HEADS,
        Reason.INLINE,
        Reason.SILU,
        Reason.UNFIT,
    }
)


class Refused(Exception):
    """Something that looks like a site, and what keeps it from being one."""

    def __init__(self, reason: Reason, node: Node | None = None, detail: str = "", kind: str | None = None) -> None:
        self.reason, self.node, self.detail, self.kind = reason, node, detail, kind
        self.site: Any = None  # the sites.site.Site, where one was found, and then not proven or not eligible
        super().__init__(self.text())

    def text(self) -> str:
        text = self.reason.value
        if self.detail:
            text += f" ({self.detail})"
        return f"{text}, at {self.node.name}" if self.node is not None else text


@dataclass(frozen=True)
class ReportedSite:
    """One norm, rotation or SwiGLU of a compiled graph: the site that it became part of, or why it became part of none.

    kind: the name of the op; or "norm" where nothing around a norm was recognised, "rope" for a rotation of what is no
    norm. A site that has several norms is named by the first. gate: "tanh", "given" or None;
    scale: "one_plus", "given" or None. module: dotted path in the model; source: file:line. shape: of x, symbols as
    text. rounding: the form. reason: only of a missed site; reason_name: its name in the closed list `Reason`.
    """

    kind: str
    gate: str | None
    scale: str | None
    module: str
    source: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype | None
    rounding: str | None
    reason: str | None = None
    reason_name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "shape": list(self.shape), "dtype": _dtype_name(self.dtype)}


@dataclass
class FusionReport:
    """What a compilation fused and what it missed. `print(report)` is a table, with one row for layers that are alike.

    fused, missed: lists of ReportedSite. graphs: how many graphs were compiled; calls: how often each of them was
    called, in the one call of the model that `explain` makes. A model that is compiled block by block has one graph for
    each kind of block, which is called for each block of the kind. note: what else is to be known of it, or "".
    """

    fused: list[ReportedSite] = field(default_factory=list)
    missed: list[ReportedSite] = field(default_factory=list)
    graphs: int = 0
    calls: list[int] = field(default_factory=list)
    note: str = ""

    def merge(self, other: FusionReport) -> None:
        self.fused += other.fused
        self.missed += other.missed
        self.graphs += other.graphs
        self.calls += other.calls

    def counts(self) -> dict[str, int]:
        """The number of fused sites of each kind."""
        kinds = [site.kind for site in self.fused]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def summary(self) -> str:
        """One line: the counts of what was fused, and of what was missed by reason."""
        fused = _listing(self.counts().items())
        names = [site.reason_name or "" for site in self.missed]
        missed = _listing((name.lower(), names.count(name)) for name in sorted(set(names)))
        return f"fused {len(self.fused)}{fused}, missed {len(self.missed)}{missed}"

    def to_json(self) -> str:
        sites = {"fused": [s.to_dict() for s in self.fused], "missed": [s.to_dict() for s in self.missed]}
        return json.dumps({"graphs": self.graphs, "calls": self.calls, "note": self.note, **sites}, indent=2)

    def __str__(self) -> str:
        from rich.console import Console

        out = StringIO()
        Console(file=out, width=_table_width()).print(self)
        return out.getvalue().rstrip("\n")

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        fused = Table(title=f"Fused: {len(self.fused)}", title_justify="left", show_header=bool(self.fused))
        for name in ("op", "gate", "scale", "rounding", "shape", "dtype", "module", "", "source"):
            fused.add_column(name, overflow="fold", no_wrap=name in ("op", "module"))
        for s, module, count in _alike(self.fused):
            cells = (s.gate or "-", s.scale or "-", s.rounding or "-", escape(_shape_text(s)), _dtype_name(s.dtype))
            fused.add_row(s.kind, *cells, module, count, _short(s.source))
        missed = Table(title=f"Missed: {len(self.missed)}", title_justify="left", show_header=bool(self.missed))
        for name in ("what", "module", "", "shape", "reason", "source"):
            missed.add_column(name, overflow="fold", no_wrap=name in ("what", "module"))
        for s, module, count in _alike(self.missed):
            missed.add_row(s.kind, module, count, escape(_shape_text(s)), s.reason, _short(s.source))
        graphs = f"{self.graphs} graph{'' if self.graphs == 1 else 's'} compiled"
        called = f", called in turn {', '.join(f'{count}×' for count in self.calls)}" if self.calls else ""
        return Group(fused, missed, graphs + called, *filter(None, [self.note]))


def _alike(sites: list[ReportedSite]) -> Iterable[tuple[ReportedSite, str, str]]:
    """One row for the layers of a stack whose sites differ in nothing but the number: the first of them, its module
    with `*` for the number, and how many they are."""
    groups: dict[Any, list[ReportedSite]] = {}
    for site in sites:
        reason = re.sub(r", at \w+$", "", site.reason or "")
        key = replace(site, module=re.sub(r"\.\d+\b", ".*", site.module), reason=reason)
        groups.setdefault(key, []).append(site)
    for pattern, group in groups.items():
        yield (group[0], group[0].module, "") if len(group) == 1 else (pattern, pattern.module, f"×{len(group)}")


def _table_width() -> int:
    """Wide enough that no column wraps to one letter a line, also where there is no terminal."""
    return max(170, shutil.get_terminal_size().columns)


def _listing(counts: Iterable[tuple[str, int]]) -> str:
    text = ", ".join(f"{name} {count}" for name, count in counts)
    return f" ({text})" if text else ""


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.") if dtype is not None else "-"


def _shape_text(site: ReportedSite) -> str:
    """A size that is a formula of several symbols is shown as `*`; the report itself has it whole."""
    sizes = (str(size) for size in site.shape)
    return "[" + ", ".join(size if size.isalnum() else "*" for size in sizes) + "]"


def _short(source: str) -> str:
    return source.rsplit("/", 1)[-1]


def module_path(node: Node) -> str:
    """The dotted path, in the model, of the module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    path = path.rpartition(".__self__")[2]  # a compiled forward that hooks wrap is reached through their closures
    path = re.sub(r"^[LG]\['\w+'\]", "", path)
    path = re.sub(r"\.__dict__\['_modules'\]", "", path)
    path = re.sub(r"\._modules\b|\['_modules'\]", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return path.lstrip(".")


def source_line(node: Node) -> str:
    """file:line of the innermost line of the user's code, outside torch itself, that a node was traced from."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    torch_root = os.path.dirname(torch.__file__) + os.sep
    outside = [frame for frame in frames if not frame[0].startswith(torch_root)] or frames
    return ":".join(outside[-1]) if outside else ""


def symbolic_shape(node: Node) -> tuple[int | str, ...]:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in val.shape)
