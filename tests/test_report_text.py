"""A printed report fits 100 columns, breaks no word, and tells all that the report holds; a notebook shows tables."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import pytest
import torch
import zimage
from graph_backend import GraphBackend
from rich.console import Console
from test_models import compiled, flux2

from fusion_pass.refusal import Reason
from fusion_pass.report import FusionReport, ReportedSite

pytestmark = pytest.mark.xdist_group("report_text")


def of_zimage() -> FusionReport:
    backend = GraphBackend()
    model, inputs = zimage.model(layers=1), zimage.inputs()
    zimage.run(model, inputs)
    zimage.run(torch.compile(model, backend=backend), inputs)
    return backend.report


def of_every_reason() -> FusionReport:
    """Names and shapes of the longest sort, and one missed site for each reason, in a deep wrapper."""
    where = {"source": "/models/transformers/transformer_hunyuan_video15.py:1234", "dtype": torch.bfloat16}
    module = "pipeline.transformer.base_model.model.single_transformer_blocks.{}.attention.processor.norm_added_query"
    site = ReportedSite(
        "norm_tanh_mul_add_norm_scale", "given", "one_plus", module.format(0), shape=(2, 16416, 30, 128),
        rounding="weight_then_cast", **where,
    )  # fmt: skip
    missed = [
        ReportedSite(
            "norm_rope", None, None, module.format(layer), shape=("s0", "s1*s2 + 1", 128), rounding=None,
            reason=f"{reason.value} (detail:\n  of two lines), at rsqrt_{layer}", reason_name=reason.name, **where,
        )
        for reason in Reason
        for layer in range(3)
    ]  # fmt: skip
    return FusionReport([site], missed, graphs=40, calls=[*range(40)], note="a remark\nabout this report " * 8)


MAKE: dict[str, Callable[[], FusionReport]] = {
    "Z-Image": of_zimage,
    "FLUX.2": lambda: compiled(*flux2(1))[1].report,
    "every reason": of_every_reason,
    "nothing": FusionReport,
}


@pytest.fixture(scope="module", params=MAKE)
def report(request: pytest.FixtureRequest) -> FusionReport:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        return MAKE[request.param]()


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def pattern(module: str) -> str:
    return re.sub(r"\.\d+\b", ".*", module)


def words(report: FusionReport) -> set[str]:
    """What a reader looks for: ops, sources, forms, and each word of a reason and of a note."""
    sites = report.fused + report.missed
    whole = {site.kind for site in sites} | {site.source.rsplit("/", 1)[-1] for site in sites}
    whole |= {site.rounding for site in report.fused if site.rounding} | set(report.note.split())
    return whole | {word for site in report.missed for word in Reason[site.reason_name or ""].value.split()}


def test_each_line_fits_100_columns_and_no_word_is_broken(report: FusionReport) -> None:
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert words(report) <= {word.strip("(),:") for line in lines for word in line.split()} | set(str(report).split())
    assert "\x1b" not in str(report)


def test_each_module_is_named_once_for_all_its_layers(report: FusionReport) -> None:
    joined = re.sub(r"\.\n +", ".", str(report))  # paths are folded behind their dots
    for site in report.fused + report.missed:
        assert f" {site.module}" in joined or f" {pattern(site.module)}" in joined


def test_the_numbers_of_sites_add_up(report: FusionReport) -> None:
    text = str(report)
    assert f"Fused: {len(report.fused)}" in text
    assert f"Missed: {len(report.missed)}" in text
    fused, missed = text.split("Missed: ")
    for part, sites in ((fused, report.fused), (missed, report.missed)):
        sources = re.findall(r"\S+\.py:\d+$", part, re.MULTILINE)
        counted = [int(number) for number in re.findall(r" ×(\d+)", part)]
        assert sum(counted) + len(sources) - len(counted) == len(sites)


@pytest.mark.parametrize("width", (1, 20, 60, 80))
def test_a_narrow_terminal_breaks_no_op_and_no_reason(report: FusionReport, width: int) -> None:
    text = report.to_text(width)
    longest = max((len(word) for word in words(report)), default=0)
    assert max(map(len, text.splitlines())) <= max(width, 8 + longest + 40)
    assert {site.kind for site in report.fused + report.missed} <= {word.strip(":") for word in text.split()}


def test_rich_prints_the_same_text_with_bold_titles(report: FusionReport) -> None:
    out = StringIO()
    Console(file=out, width=100, color_system="truecolor", force_terminal=True).print(report)
    text = out.getvalue()
    assert "\x1b[1mFused" in text
    assert [line.rstrip() for line in re.sub(r"\x1b\[\d*m", "", text).splitlines()] == str(report).splitlines()


class Cells(HTMLParser):
    """The cells of each table, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip()


def test_a_notebook_shows_a_table_without_empty_cells(report: FusionReport) -> None:
    cells = Cells()
    cells.feed(report._repr_html_())
    assert len(cells.tables) == bool(report.fused) + bool(report.missed)
    for table in cells.tables:
        assert all(all(row) and len(row) == len(table[0]) for row in table)
    listed = {cell for table in cells.tables for row in table for cell in row}
    assert {site.kind for site in report.fused + report.missed} <= listed


def test_html_in_a_report_is_escaped() -> None:
    site = ReportedSite("norm", None, None, "<b>", "<locals>.py:1", (), None, None, "a < b", "ALONE")
    shown = FusionReport(missed=[site], note="<script>")._repr_html_()
    for text in ("<b>", "<locals>.py:1", "ALONE: a < b", "<script>"):
        assert html.escape(text) in shown
    assert "<script>" not in shown
