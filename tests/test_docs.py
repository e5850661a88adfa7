"""The documentation: it builds without a warning, its tables are current, and its links and examples are right."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_backend import GraphBackend, run
from graph_checks import tensors

from fusion_pass import eligibility
from fusion_pass.refusal import BY_DESIGN, Reason
from fusion_pass.report import FusionReport, ReportedSite

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# --- the site ---------------------------------------------------------------------------------------------------------


def build(source: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """Builds the site as `make docs` does: every warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-c", str(DOCS), str(source), str(to)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in tmp_path.glob("*.html")}
    (tables,) = re.findall(r"<table.*?</table>", (tmp_path / "faq.html").read_text(), re.DOTALL)
    assert "CuTeDSL" in tables, "the page has its generated table"
    assert "relu_mul" in (tmp_path / "contributing.html").read_text(), "the page has the text of CONTRIBUTING.md"


DEAD = {
    "[a page](nowhere.md)": "nowhere.md",
    "[a heading](#no-heading)": "no-heading",
    "[a file](nowhere.json)": "nowhere.json",
    "```{toctree}\nno-page\n```": "nonexisting document 'no-page'",
}


def test_dead_links_and_missing_pages_fail_the_build(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "index.md").write_text("\n\n".join(["# Title", *DEAD]) + "\n")
    done = build(source, tmp_path / "site")
    assert done.returncode != 0
    for warning in DEAD.values():
        assert warning in done.stderr


# --- links and code in the files that GitHub shows --------------------------------------------------------------------

SHOWN_BY_GITHUB = sorted(
    [*(ROOT / f"{n}.md" for n in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")), *DOCS.glob("*.md")]
)
LINKS = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path, text: str) -> list[str]:
    dead = []
    for link in LINKS.findall(text):
        target, _, anchor = link.partition("#")
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file = path.parent / target if target else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", SHOWN_BY_GITHUB, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files_and_headings(path: Path) -> None:
    assert dead_links(path, path.read_text()) == []


def test_dead_relative_links_are_found() -> None:
    text = "[a](nowhere.md) [b](CHANGELOG.md#nowhere) [c](CHANGELOG.md#unreleased) ![d](docs) [e](#nowhere)"
    assert dead_links(ROOT / "README.md", text) == ["nowhere.md", "CHANGELOG.md#nowhere", "#nowhere"]


WHOLE = [path for path in SHOWN_BY_GITHUB if path.name != "CONTRIBUTING.md"]  # whose code is parts of files


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_code_is_python(path: Path) -> None:
    for block in python_blocks(path.read_text()):
        ast.parse(block)


# --- generated tables -------------------------------------------------------------------------------------------------


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_plot_are_what_the_results_give() -> None:
    generate = generator()
    used = {name for page in generate.pages() for _, name, _ in generate.BLOCK.findall(page.read_text())}
    assert used == set(generate.BLOCKS), "each table has a place, and each place has a table"
    stale = [path for path, text in generate.expected().items() if path.read_text() != text]
    assert stale == [], "run make docs"


def test_the_pages_have_every_model_and_number_of_the_results() -> None:
    generate = generator()
    rows = generate.results("h100_zoo.json")["rows"]
    usual = generate.usual_rows()
    kinds = {(row["title"], row["precision"]) for row in rows}
    assert {(row["title"], row["precision"]) for row in usual} == kinds, "the README has each model and precision"
    for page, shown in ((ROOT / "docs/performance.md", rows), (ROOT / "README.md", usual)):
        text = page.read_text()
        for row in shown:
            line = next(line for line in text.splitlines() if line.startswith(f"| {generate.zoo_label(row)} |"))
            low, high = row["speedup"]["interval_999"]
            assert f"{row['speedup']['median']:.3f} ({low:.3f} to {high:.3f})" in line
            assert f"{row['torch.compile']['distance']:.4f} → {row['fusion_pass']['distance']:.4f}" in line


def test_a_changed_number_is_found() -> None:
    generate = generator()
    text = (ROOT / "README.md").read_text()
    (number,) = re.findall(r"\| Z-Image \|.*\| ([\d.]+) \(", text)
    changed = text.replace(number, "9.999")
    assert changed != text
    assert generate.filled(ROOT / "README.md", changed) == text


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


# --- the reasons ------------------------------------------------------------------------------------------------------

REPORT = (DOCS / "report.md").read_text()
SECTIONS: dict[str, str] = dict(re.findall(r"^### ([A-Z_]+)\n(.*?)(?=^### |\Z)", REPORT, re.DOTALL | re.MULTILINE))
WITHOUT_EXAMPLE = {Reason.DEVICE, Reason.MUTATION, Reason.ERROR}  # no code of a model causes them by itself


OF_KERNELS = {Reason.NO_KERNEL, Reason.ORDER, Reason.PER_TOKEN, Reason.UNFIT}  # or seen only where kernels are chosen


def test_every_reason_has_an_entry_with_its_text_and_what_to_do() -> None:
    assert set(SECTIONS) == {reason.name for reason in Reason}
    for reason in Reason:
        section = SECTIONS[reason.name]
        assert f"> {reason.value}\n" in section, reason
        assert ("By design." in section) == (reason in BY_DESIGN), reason
        assert "\nTo do: " in section, reason
        assert bool(python_blocks(section)) == (reason not in WITHOUT_EXAMPLE), reason


@pytest.mark.parametrize("reason", [r for r in Reason if r not in WITHOUT_EXAMPLE], ids=lambda r: r.name)
def test_the_example_of_a_reason_causes_it(reason: Reason, monkeypatch: pytest.MonkeyPatch) -> None:
    code: dict[str, Any] = {"torch": torch, "F": F}
    (norm,) = (block for block in python_blocks(REPORT) if block.startswith("def norm("))
    (example,) = python_blocks(SECTIONS[reason.name])
    exec(norm + example, code)
    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (2, 1, 16))
    if reason is Reason.TRAINING:
        backend = GraphBackend()
        torch.compile(code["block"], backend=backend)(*(a.requires_grad_() for a in args))
    elif reason is Reason.WIDTH:
        _, backend = run(code["block"], *(a.clone() for a in args), dynamic=True)
    else:
        if reason is not Reason.NO_KERNEL:
            monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)
        kernels = "auto" if reason in OF_KERNELS else "reference"
        _, backend = run(code["block"], *args, kernels=kernels)
    remarked = any(reason.value in site.remark for site in backend.report.fused)
    assert remarked or reason.name in {site.reason_name for site in backend.report.missed}


def test_the_summary_on_the_page_is_what_a_report_prints() -> None:
    (shown,) = re.findall(r"^fused \d.*$", REPORT, re.MULTILINE)
    run = generator().results("h200_examples.json")["lora_offload"]

    def sites(kind: str, reason_name: str | None, count: int) -> list[ReportedSite]:
        return count * [ReportedSite(kind, None, None, "", "", (), None, None, None, reason_name)]

    fused = [site for kind, count in run["fused"].items() for site in sites(kind, None, count)]
    missed = [site for name, count in run["missed"].items() for site in sites("", name.upper(), count)]
    assert FusionReport(fused, missed).summary() == shown


# --- CONTRIBUTING -----------------------------------------------------------------------------------------------------

SHOWN = ("tests/toy_family.py", "tests/toy_kind.py", "tests/test_structure.py", "kernels/dit_kernels/rounding.py")


def unindented(code: str) -> str:
    """Lines without indentation and without empty lines between them: a page shows parts of classes."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip()) + "\n"


def test_the_code_in_contributing_is_in_the_files_that_it_explains() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python")
    sources = "\n".join(unindented((ROOT / name).read_text()) for name in SHOWN)
    for block in blocks:
        assert f"\n{unindented(block)}" in sources, block
