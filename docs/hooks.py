"""What `mkdocs` does besides turning pages into HTML: formulas, and the two pages that stand outside of docs/."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# They stand at the top of the repository, where GitHub looks for them.
OUTSIDE = "CONTRIBUTING.md", "CHANGELOG.md"
FORMULA = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# GitHub's own form of a formula within a line.
INLINE = re.compile(r"\$`([^`]+)`\$")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand outside of docs/."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links across the border of docs/ to the pages' places in the site, and set formulas as MathML."""
    if page.file.src_uri in OUTSIDE:
        markdown = markdown.replace("](docs/", "](")
    else:
        up = "../" * (page.file.src_uri.count("/") + 1)
        for name in OUTSIDE:
            markdown = markdown.replace(f"]({up}{name}", f"]({up[3:]}{name}")
    # In elements of their own: a line that starts with <math> would become a block.
    markdown = FORMULA.sub(lambda found: f'\n<div class="formula">{formula(found[1], "block")}</div>\n', markdown)
    return INLINE.sub(lambda found: f"<span>{formula(found[1], 'inline')}</span>", markdown)


def formula(latex: str, display: str) -> str:
    """Return MathML, which browsers set without a script; an error in the LaTeX ends the build.

    The converter itself prints unknown commands as they are, and closes open braces.
    """
    mathml = latex2mathml.converter.convert(" ".join(latex.split()), display=display)
    if "\\" in html.unescape(mathml) or latex.count("{") != latex.count("}"):
        raise PluginError(f"not understood as LaTeX: {latex.strip()}")
    return mathml
