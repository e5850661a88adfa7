"""Sphinx's settings. `make docs` builds the site, and needs no network for it."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

project = "fusion-pass"
copyright = "the authors of fusion-pass"
(release,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fusion-pass {release}"
html_show_copyright = False

myst_heading_anchors = 3  # links such as performance.md#z-image
smartquotes = False  # docstrings quote Python values
default_role = "code"  # docstrings mark code with single backticks

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_display_short_literal_types = True
# Other projects' objects have no page here.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|enum|rich|pathlib|fx)\b.*"),
    ("py:.*", r"(Any|Callable|Sequence|Node|GraphModule|Iterable)"),
]

# Pages whose text is a file elsewhere in the repository.
ELSEWHERE = {
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "experiments": ROOT / "kernels/benchmarks/NOTES.md",
    "security": ROOT / "SECURITY.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^):#]+)(#[^)]*)?\)")


def read(app: Sphinx, page: str, content: list[str]) -> None:
    """Reads a page, or its file in ELSEWHERE. Links to files of the repository become what the site needs."""
    path = ELSEWHERE.get(page, Path(app.srcdir, f"{page}.md"))
    app.env.note_dependency(str(path))
    pages = {file: name for name, file in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], (path.parent / match[2]).resolve(), match[3] or ""
        if target in pages:
            return f"[{text}]({pages[target]}.md{anchor})"
        outside = Path(app.srcdir) not in target.parents
        if outside and (target.is_dir() or target.suffix == ".md"):  # the site has no page for it
            return f"{text} (`{target.relative_to(ROOT).as_posix()}`)"
        return f"[{text}]({os.path.relpath(target, app.srcdir)}{anchor})"

    content[0] = LINK.sub(link, path.read_text())


def setup(app: Sphinx) -> None:
    app.connect("source-read", read)
