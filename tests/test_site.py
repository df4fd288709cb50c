"""The documentation site: what it lists is all there is. ``make docs`` builds it; nothing here needs its packages."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from loading import module_at

import subspace_meta as sm
from subspace_meta import manifolds, meta, optim, tasks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^::: (\S+)\n    options:\n      members: \[([^\]]*)\]$", re.MULTILINE)


def load(name: str) -> ModuleType:
    return module_at(DOCS / "make" / f"{name}.py")


hooks, checks = load("hooks"), load("check")


def documented() -> list[tuple[str, Any]]:
    """What the reference has: names and values, each from the module that a page names."""
    found = []
    for page in sorted((DOCS / "api").glob("*.md")):
        text = page.read_text("utf-8")
        assert len(BLOCK.findall(text)) == text.count("\n::: "), f"{page.name} has a block that is not read here"
        for module, members in BLOCK.findall(text):
            found += [(name, getattr(importlib.import_module(module), name)) for name in members.split(", ")]
    return found


@pytest.mark.parametrize("package", [sm, optim, manifolds, tasks], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package: ModuleType) -> None:
    there = documented()
    missing = [
        name
        for name in package.__all__
        if not any(name == other and getattr(package, name) is value for other, value in there)
    ]
    assert not missing


def test_the_reference_has_each_name_once() -> None:
    names = [name for name, _ in documented()]
    assert len(names) == len(set(names))


def test_the_reference_names_its_pages() -> None:
    index = (DOCS / "api" / "index.md").read_text("utf-8")
    pages = {page.name for page in (DOCS / "api").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\((\w+\.md)\)", index)) == pages
    assert meta.__name__ in index
    for name in {*sm.__all__} - {"__version__"}:
        assert re.search(rf"`(?:\w+\.)?{name}`", index), name


def test_the_navigation_has_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[\w/]+\.md\b", nav)
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | {
        *hooks.elsewhere().values()
    }


@pytest.mark.parametrize(
    ("source", "page", "text", "expected"),
    [
        ("docs/a.md", "a.md", "[b](b.md#c)", "[b](b.md#c)"),
        ("docs/tutorial/a.md", "tutorial/a.md", "[b](../b.md)", "[b](../b.md)"),
        ("docs/a.md", "a.md", "[up](#up)", "[up](#up)"),
        ("docs/a.md", "a.md", "[paper](https://arxiv.org/abs/2501.15235)", "[paper](https://arxiv.org/abs/2501.15235)"),
        ("docs/a.md", "a.md", "[proofs](../proofs/README.md#table)", "[proofs](proofs/index.md#table)"),
        ("docs/a.md", "a.md", "[`resnet.py`](../examples/resnet.py)", "[`resnet.py`](examples/resnet.md)"),
        ("docs/a.md", "a.md", "see [`base`](../subspace_meta/optimizers/base.py).", "see `base`."),
        ("proofs/README.md", "proofs/index.md", "[x](statements/stiefel.md#x)", "[x](stiefel.md#x)"),
        ("proofs/README.md", "proofs/index.md", "[`stiefel.v`](coq/stiefel.v): `x`", "`stiefel.v`: `x`"),
        ("CONTRIBUTING.md", "contributing.md", "[install](README.md#install)", "[install](index.md#install)"),
        ("README.md", "index.md", "![curves](docs/curves.svg)", "![curves](curves.svg)"),
        ("docs/a.md", "a.md", "`[b](../b.py)`\n```\n[b](../b.py)\n```", "`[b](../b.py)`\n```\n[b](../b.py)\n```"),
    ],
)
def test_links_on_the_site(source: str, page: str, text: str, expected: str) -> None:
    assert hooks.rewritten(text, source, page) == expected


def test_a_bad_site_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#there">b</a><img src="x.svg">')
    (tmp_path / "b.html").write_text('<b id="there"></b><a href="https://example.org">x</a><a href="a.html#top">a</a>')
    (tmp_path / "x.svg").touch()
    assert checks.problems(tmp_path) == []
    (tmp_path / "a.html").write_text(
        '<script src="https://example.org/x.js"></script><a href="c.html">c</a><a href="b.html#here">b</a>'
    )
    (tmp_path / "x.css").write_text('@import "https://example.org/y.css"; a { background: url(//example.org/z.png) }')
    assert set(checks.problems(tmp_path)) == {
        "a.html loads https://example.org/x.js",
        "a.html links to c.html, which is not there",
        "a.html links to b.html#here, an anchor that is not there",
        "b.html links to a.html#top, an anchor that is not there",
        "x.css loads https://example.org/y.css",
        "x.css loads //example.org/z.png",
    }


def test_docstrings_become_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    plain = load("docstrings").plain
    assert plain("See :meth:`update`, <u, v> and ``a < b``.") == "See `update`, &lt;u, v> and ``a < b``."
    assert plain("With [A, B][C]:\n\n    X < [Y]") == "With &#91;A, B]&#91;C]:\n\n    X < [Y]"
    assert plain("Args:\n    x, y: see <u>.\n\nText.") == "Args:\n    x: see &lt;u>.\n    y: see &lt;u>.\n\nText."
    assert plain("Example:\n    >>> [1]") == "Examples:\n    >>> [1]"
    rule = "====  ======"
    drawn = [rule, "name  what", rule, "a     |x| in", "      words", "b     y", rule, "on"]
    table = ["", "| name | what |", "| --- | --- |", "| a | \\|x\\| in words |", "| b | y |", "", "on"]
    assert plain("\n".join(drawn)) == "\n".join(table)
    assert plain("==  ==\na   b\n==  ==") == "\n|  |  |\n| --- | --- |\n| a | b |\n"
