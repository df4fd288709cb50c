"""What the site does beside what mkdocs does: pages from elsewhere, links that leave ``docs/``, formulas.

The pages are written for a code host, where a link may lead to any file of the repository. On the site a link to a page
or an example that the site has leads there; a link to another file is left out, and its text stays.
Formulas become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<![\w\]])(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def elsewhere() -> dict[str, str]:
    """Return the pages that lie outside of ``docs/``: path in the repository -> path on the site."""
    pages = {
        "CHANGELOG.md": "changelog.md",
        "CONTRIBUTING.md": "contributing.md",
        "subspace_meta/weights/MODEL_CARD.md": "model_card.md",
        "proofs/README.md": "proofs/index.md",
    }
    pages |= {f"proofs/statements/{page.name}": f"proofs/{page.name}" for page in ROOT.glob("proofs/statements/*.md")}
    pages |= {f"examples/{file.name}": f"examples/{file.stem}.md" for file in ROOT.glob("examples/*.py")}
    return pages


def place_of(path: str) -> str | None:
    """Return where the site has a file of the repository, if it does."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return elsewhere().get(path)


def rewritten(text: str, source: str, page: str) -> str:
    """Return a page with its links as the site needs them.

    Args:
        text: its Markdown.
        source: where it lies in the repository; links are relative to that.
        page: where the site has it.
    """

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        words = LINK.sub(link, words)
        file, mark, anchor = target.partition("#")
        if not file or "://" in target:
            return f"{picture}[{words}]({target})"
        there = place_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), file)))
        if there is None:
            return words
        return f"{picture}[{words}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{mark}{anchor})"

    # In code a link is none, but a link may have code as its text.
    codes: list[str] = []

    def hidden(match: re.Match[str]) -> str:
        codes.append(match.group())
        return f"\0{len(codes) - 1}\0"

    done = LINK.sub(link, CODE.sub(hidden, text))
    return re.sub(r"\0(\d+)\0", lambda match: codes[int(match.group(1))], done)


def as_page(source: str) -> str:
    """Return a file of the repository as a page: Markdown as it is, code in a block."""
    text = (ROOT / source).read_text("utf-8")
    if source.endswith(".md"):
        return text
    title = posixpath.basename(source)
    return f"# {title}\n\n`{source}` in the repository.\n\n```python\n{text}```\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere."""
    from mkdocs.structure.files import File

    for source, page in elsewhere().items():
        file = File.generated(config, page, content=rewritten(as_page(source), source, page))
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of ``docs/``, and give formulas with a line of their own air."""
    path = page.file.src_uri
    if path not in elsewhere().values():
        markdown = rewritten(markdown, f"docs/{path}", path)
    return re.sub(r"^\$\$.*\$\$$", r"\n\g<0>\n", markdown, flags=re.MULTILINE)


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        display = "inline" if match[1] == "span" else "block"
        return str(convert(html.unescape(match[2]), display=display))

    return FORMULA.sub(formula, content)
