"""The report: what a compilation fused, what it missed and why. Also prints it, as text and as HTML."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, NamedTuple

import torch

WIDTH = 100  # columns of a printed report, or fewer in a narrower terminal
_INDENT = "    "
_TITLE = "bold"


@dataclass(frozen=True)
class ReportedSite:
    """One row of the report: a fused site, or a norm, rotation or SwiGLU that was missed, with the reason.

    kind: the name of the op; or "norm" if the pass recognised nothing around a norm, "rope" for the rotation of a
    tensor that is not a norm, "residual_add" for a residual add of something that is not a norm. gate: "tanh" (the op
    computes the tanh), "given" (the op gets the activated gate) or None. scale: "one_plus" (the op adds the 1), "given"
    (the scale already contains its 1) or None. module: the dotted path in the model; of the first norm, if a site has
    several. source: file:line. shape: the shape of x, with symbols as text. rounding: the form. reason: only for a
    missed site. reason_name: the name of the member of `Reason`. remark: what a user should know about the rounding of
    a fused site, or "".
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
        """The fields as a dict for JSON: the shape is a list, the dtype a string without "torch."."""
        return {**self.__dict__, "shape": list(self.shape), "dtype": _dtype_name(self.dtype)}


def columns(activations: dict[str, str]) -> dict[str, Any]:
    """The columns of a row that show the activations of a site. activations: by the names of the op's arguments."""
    return {name: activations.get(name) for name in ("gate", "scale")}


@dataclass
class FusionReport:
    """What a compilation fused and what it missed. Similar layers share one row.

    `print(report)` shows text of at most 100 columns. A notebook shows two tables.

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
        """Adds the sites, graphs and calls of another report to this one."""
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
        """The whole report as JSON."""
        sites = {"fused": [s.to_dict() for s in self.fused], "missed": [s.to_dict() for s in self.missed]}
        return json.dumps({"graphs": self.graphs, "calls": self.calls, "note": self.note, **sites}, indent=2)

    def to_text(self, width: int = WIDTH) -> str:
        """The report as plain text. Lines are folded at spaces, and paths of modules at dots, to fit the width."""
        return "\n".join(line for line, _ in self._lines(width))

    def __str__(self) -> str:
        text = self.to_text(min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns))
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # often not UTF-8 on Windows, into a file
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace("×", "x").encode(encoding, "replace").decode(encoding)
        return text

    def __rich__(self) -> Any:
        return _Styled(self)

    def _repr_html_(self) -> str:
        """Two tables, for a notebook."""
        fused = [
            (s.kind, s.gate or "-", s.scale or "-", s.rounding or "-", _shape_text(s), _dtype_name(s.dtype))
            + (module, str(count), _short(s.source))
            for s, module, count in _alike(self.fused)
        ]
        missed = [
            (s.kind, module, str(count), _shape_text(s), _reason(s), _short(s.source))
            for s, module, count in _alike(self.missed)
        ]
        fused_names = ("op", "gate", "scale", "rounding", "shape", "dtype", "module", "sites", "source")
        missed_names = ("what", "module", "sites", "shape", "reason", "source")
        parts = [
            _html_table(f"Fused: {len(self.fused)}", fused_names, fused),
            _html_table(f"Missed: {len(self.missed)}", missed_names, missed),
        ]
        return "\n".join(parts + [f"<p>{escape(remark)}</p>" for remark in self._remarks()])

    def _lines(self, width: int) -> Iterator[tuple[str, str]]:
        """Each line with its style in rich."""
        total = f"Fused: {len(self.fused)}{_listing(self.counts().items())}"
        yield from ((line, _TITLE) for line in _folded(total, width))
        kinds = [site.kind for site in self.fused]
        yield from _section(sorted(self.fused, key=lambda s: kinds.index(s.kind)), _variant, lambda site: "", width)
        yield "", ""
        yield f"Missed: {len(self.missed)}", _TITLE
        yield from _section(self.missed, _reason, lambda site: site.kind, width)
        yield "", ""
        for remark in self._remarks():
            yield from ((line, "") for line in _folded(remark, width))

    def _remarks(self) -> list[str]:
        """How many graphs there were, and what else a reader should know."""
        graphs = f"{self.graphs} graph{'' if self.graphs == 1 else 's'} compiled"
        called = f", called in turn {', '.join(f'{count}×' for count in self.calls)}" if self.calls else ""
        remarks = [s.remark for s in self.fused if s.remark]
        counted = [f"{remarks.count(remark)} of the fused sites: {remark}" for remark in dict.fromkeys(remarks)]
        return [graphs + called, *filter(None, [self.note]), *counted]


# --- the printed report -----------------------------------------------------------------------------------------------


@dataclass
class _Styled:
    """A report for rich, which tells how wide its console is."""

    report: FusionReport

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        for line, style in self.report._lines(min(WIDTH, options.max_width)):
            yield Text(line, style)


class _Group(NamedTuple):
    """Sites that differ only in the number of their layer: the first one, their module with `*` for the number, and how
    many there are."""

    site: ReportedSite
    module: str
    size: int


def _alike(sites: list[ReportedSite]) -> list[_Group]:
    groups: dict[Any, list[ReportedSite]] = {}
    for site in sites:
        key = replace(site, module=re.sub(r"\.\d+\b", ".*", site.module), reason=_reason(site))
        groups.setdefault(key, []).append(site)
    return [
        _Group(group[0], group[0].module if len(group) == 1 else pattern.module, len(group))
        for pattern, group in groups.items()
    ]


def _section(
    sites: list[ReportedSite], title: Callable[[ReportedSite], str], name: Callable[[ReportedSite], str], width: int
) -> Iterator[tuple[str, str]]:
    """For all sites of one title: the title, and an aligned row for each group of similar sites.

    A row has the name of the site, if it is not in the title, its module with the number of sites, its shape and its
    source. Where the rows are too wide, shape and source have a line of their own.
    """
    titled: dict[str, list[tuple[str, ...]]] = {}
    for site, module, count in _alike(sites):
        where = (name(site), module or "-", f"×{count}" if count > 1 else "")
        titled.setdefault(title(site), []).append((*where, _shape_text(site), _short(site.source)))
    for text, rows in titled.items():
        yield "", ""
        yield from ((line, _TITLE) for line in _folded(text, width))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        fits = len(_INDENT) + sum(size + 2 for size in widths if size) - 2 <= width
        for row in rows:
            if fits:
                cells = (cell.ljust(size) for cell, size in zip(row, widths, strict=True) if size)
                yield (_INDENT + "  ".join(cells)).rstrip(), ""
                continue
            for part, indent in ((row[:3], _INDENT), (row[3:], 2 * _INDENT)):
                yield from ((line, "") for line in _folded("  ".join(filter(None, part)), width, indent))


def _folded(text: str, width: int, indent: str = "") -> Iterator[str]:
    """Lines of at most `width`, folded at spaces. A word that is too long for a line is folded behind its dots."""
    line = ""
    for word in re.findall(r"\S+\s*", re.sub(r"\s*\n\s*", " ", text)):
        fits = len(indent + word.rstrip()) <= width
        for piece in [word] if fits else re.findall(r"[^.]*\.|[^.]+", word):
            if line and len(indent + line + piece.rstrip()) > width:
                yield (indent + line).rstrip()
                line = ""
            line += piece
    yield (indent + line).rstrip()


def _variant(site: ReportedSite) -> str:
    """The op, and what a site shares with all sites that become the same kernel but for their sizes."""
    named = {"gate": site.gate, "scale": site.scale, "rounding": site.rounding}
    parts = [f"{name} {value}" for name, value in named.items() if value] + [_dtype_name(site.dtype)]
    return f"{site.kind}: {', '.join(parts)}"


def _reason(site: ReportedSite) -> str:
    """The name of the reason and the reason, without the node, which differs from layer to layer."""
    reason = re.sub(r", at \w+$", "", site.reason or "")
    return f"{site.reason_name}: {reason}" if site.reason_name else reason


def _html_table(title: str, names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(tag: str, cells: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    if not rows:
        return f"<p><b>{escape(title)}</b></p>"
    body = "\n".join([line("th", names), *(line("td", row) for row in rows)])
    return f"<table>\n<caption>{escape(title)}</caption>\n{body}\n</table>"


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
