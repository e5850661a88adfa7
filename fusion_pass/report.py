"""The report: what a compilation fused, what it missed and why. Also prints it as tables."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

import torch


@dataclass(frozen=True)
class ReportedSite:
    """One row of the report: a fused site, or a norm, rotation or SwiGLU that was missed, with the reason.

    kind: the name of the op; or "norm" if the pass recognised nothing around a norm, "rope" for the rotation of a
    tensor that is not a norm. gate: "tanh" (the op computes the tanh), "given" (the op gets the activated gate) or
    None. scale: "one_plus" (the op adds the 1), "given" (the scale already contains its 1) or None. module: the dotted
    path in the model; of the first norm, if a site has several. source: file:line. shape: the shape of x, with symbols
    as text. rounding: the form. reason: only for a missed site. reason_name: the name of the reason in the closed list
    `Reason`. remark: what a user should know about the rounding of a fused site, or "".
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
    remark: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "shape": list(self.shape), "dtype": _dtype_name(self.dtype)}


def columns(activations: dict[str, str]) -> dict[str, Any]:
    """The columns of a row that show the activations of a site. activations: by the names of the op's arguments."""
    return {name: activations.get(name) for name in ("gate", "scale")}


@dataclass
class FusionReport:
    """What a compilation fused and what it missed. `print(report)` shows tables, in which similar layers share one row.

    fused, missed: lists of ReportedSite. graphs: how many graphs were compiled. calls: how often each graph was called,
    during the one call of the model that `explain` makes. A model that is compiled block by block has one graph for
    each kind of block, and this graph is called for each block of that kind. note: a remark on how the report was made,
    or "".
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
        """One line: the number of fused sites by kind, and of missed ones by reason."""
        fused = _listing(self.counts().items())
        names = [site.reason_name or "" for site in self.missed]
        missed = _listing((name.lower(), names.count(name)) for name in sorted(set(names)))
        return f"fused {len(self.fused)}{fused}, missed {len(self.missed)}{missed}"

    def to_json(self) -> str:
        sites = {"fused": [s.to_dict() for s in self.fused], "missed": [s.to_dict() for s in self.missed]}
        return json.dumps({"graphs": self.graphs, "calls": self.calls, "note": self.note, **sites}, indent=2)

    def __str__(self) -> str:
        from rich.console import Console

        out = _Text()
        Console(file=out, width=_table_width()).print(self)
        text = out.getvalue().rstrip("\n")
        return text.encode(out.encoding, "replace").decode(out.encoding)

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
        remarks = [s.remark for s in self.fused if s.remark]
        counted = [f"{remarks.count(remark)} of the fused sites: {remark}" for remark in dict.fromkeys(remarks)]
        return Group(fused, missed, graphs + called, *map(escape, filter(None, [self.note, *counted])))


class _Text(StringIO):
    """Text that stdout can encode. If its encoding is not UTF-8, as often on Windows, rich draws tables in ASCII."""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # rich reads it
        return getattr(sys.stdout, "encoding", None) or "utf-8"


def _alike(sites: list[ReportedSite]) -> Iterable[tuple[ReportedSite, str, str]]:
    """Groups sites that differ only in the number of their layer.

    Yields for each group: its first site, its module with `*` for the number, and the size of the group as text.
    """
    groups: dict[Any, list[ReportedSite]] = {}
    for site in sites:
        reason = re.sub(r", at \w+$", "", site.reason or "")
        key = replace(site, module=re.sub(r"\.\d+\b", ".*", site.module), reason=reason)
        groups.setdefault(key, []).append(site)
    for pattern, group in groups.items():
        yield (group[0], group[0].module, "") if len(group) == 1 else (pattern, pattern.module, f"×{len(group)}")


def _table_width() -> int:
    """Wide enough that no column wraps to one letter a line, even without a terminal."""
    return max(170, shutil.get_terminal_size().columns)


def _listing(counts: Iterable[tuple[str, int]]) -> str:
    text = ", ".join(f"{name} {count}" for name, count in counts)
    return f" ({text})" if text else ""


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.") if dtype is not None else "-"


def _shape_text(site: ReportedSite) -> str:
    """The shape for a table. A size that is a formula of symbols is shown as `*`; the report itself keeps the
    formula."""
    sizes = (str(size) for size in site.shape)
    return "[" + ", ".join(size if size.isalnum() else "*" for size in sizes) + "]"


def _short(source: str) -> str:
    return source.rsplit("/", 1)[-1]
