"""The guide and the docstrings: Python blocks run, links lead somewhere, public names have examples that are right."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlenet
from fastlenet import fusion

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
# A folder of its own (Triton kernels) or no module to look at; fastlenet.__main__ would run.
MODULES = [
    name
    for path, prefix in ((fastlenet.__path__, "fastlenet."), (fusion.__path__, "fastlenet.fusion."))
    for _, name, package in pkgutil.iter_modules(path, prefix)
    if not package and not name.endswith("__main__")
]
PUBLIC = [
    *(("fastlenet", name) for name in fastlenet.__all__ if callable(getattr(fastlenet, name))),
    *(("fastlenet.functional", name) for name in fastlenet.functional.__all__),
    *(("fastlenet.graphs", name) for name in fastlenet.graphs.__all__),
]


# Objects that public functions return or take by name.
RETURNED = (
    "fastlenet.fusion.explain.Explanation",
    "fastlenet.fusion.explain.Site",
    "fastlenet.fusion.backend.compile_graph",
)
# PyTorch's precision switches cannot be put back: once set, torch.export refuses convolutions in that process.
OWN_PROCESS = ("precision",)
# Compilers run in these for seconds.
SLOW = ("fuse", "recipes")
# Its blocks need what `make hub` makes: tests/test_hub.py runs them.
ELSEWHERE = ("hub",)


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path, monkeypatch):
    """Whatever an example writes goes away, and so does its logging."""
    monkeypatch.chdir(tmp_path)
    logger = fastlenet.backend.__globals__["logger"]
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.cheap
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.wide if page.stem in SLOW else ())
        for page in PAGES
        if page.stem not in ELSEWHERE and PYTHON.search(page.read_text(encoding="utf-8"))
    ],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_python_blocks_run(page):
    """One after the other, as a reader would type them."""
    text = page.read_text(encoding="utf-8")
    code, written = "", 0
    for found in PYTHON.finditer(text):
        # Each block on the lines where it stands, so that an error names the page's own line.
        line = text.count("\n", 0, found.start(1))
        code += "\n" * (line - written) + found.group(1)
        written = line + found.group(1).count("\n")
    if page.stem in OWN_PROCESS:
        subprocess.run([sys.executable, "-c", code], check=True)
    else:
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_pages_show_what_they_print(capsys):
    """The table in the guide is the one that its block prints."""
    text = (ROOT / "docs" / "fuse.md").read_text(encoding="utf-8")
    block = next(found.group(1) for found in PYTHON.finditer(text) if "class Shared" in found.group(1))
    exec(block, {"torch": torch, "nn": torch.nn, "fastlenet": fastlenet})
    assert f"```\n{capsys.readouterr().out}```" in text


@pytest.mark.cheap
@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = HEADING.findall(target.read_text(encoding="utf-8"))
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, link


def _public_names():
    return [f"{module}.{name}" for module, name in PUBLIC]


def test_reference_has_every_public_name():
    """Each stands in the API page once, under the name that users know."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: (\S+)$(?:\n    options:\n      heading: (\S+)$)?", text, re.MULTILINE)
    assert sorted(heading or name for name, heading in listed) == sorted([*_public_names(), *RETURNED])


@pytest.mark.wide
def test_site_builds(tmp_path):
    """Strictly: a broken link, formula or docstring is an error. Docstrings and formulas are in it, and every page."""
    for name in ("mkdocs", "mkdocstrings", "material", "latex2mathml"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    html = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    for page in PAGES:
        name = page.relative_to(ROOT / "docs" if "docs" in page.parts else ROOT).as_posix()
        assert name.replace("README.md", "index.html").replace(".md", ".html") in html
    headings = re.findall(r'class="doc doc-heading"[^>]*>\s*(?:<span[^>]*>)?\s*([\w.]+)', html["api.html"])
    assert set(_public_names()) <= set(headings)
    assert html["operators.html"].count('display="block"') == (ROOT / "docs" / "operators.md").read_text().count(
        "```math"
    )
    # Pages load nothing from elsewhere.
    loads = re.compile(r"""<(?:script|img|link|iframe)[^>]*(?:src|href)=["']?https?://""")
    assert not [name for name, text in html.items() if loads.search(text)]


@pytest.mark.cheap
@pytest.mark.parametrize("name", ["fastlenet", *MODULES])
def test_docstring_examples(name):
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(module, optionflags=flags)
    assert failed == 0


@pytest.mark.cheap
@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda part: part.removeprefix("fastlenet."))
def test_public_names_have_examples(module, name):
    thing = getattr(importlib.import_module(module), name)
    assert ">>> " in inspect.getdoc(thing)


def test_figures_are_those_of_their_script(tmp_path):
    """The script draws every figure that is there; what its text looks like depends on matplotlib's version."""
    pytest.importorskip("matplotlib")
    folder = ROOT / "docs" / "figures"
    subprocess.run([sys.executable, str(folder / "make.py"), str(tmp_path)], check=True)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert drawn.keys() == {path.name for path in folder.glob("*.svg")}
    for name, text in drawn.items():
        labels = re.findall(r"<text[^>]*>([^<]*)<", text)
        assert labels
        assert labels == re.findall(r"<text[^>]*>([^<]*)<", (folder / name).read_text(encoding="utf-8"))
