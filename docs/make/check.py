"""Check a built site: every link leads to a page and an anchor that are there, and nothing is loaded from elsewhere.

python docs/make/check.py site
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

OUTSIDE = re.compile(r"(?:https?:)?//")


class Page(HTMLParser):
    """What a page links to, what it loads, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag != "a":
            self.loads += [values[name] for name in ("src", "href", "data", "poster") if name in values]
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", values.get("style", ""))


def known(anchor: str, anchors: set[str]) -> bool:
    """Return whether a page has an anchor; those with "__" are the theme's own marks, of what a script opens."""
    return not anchor or anchor.startswith("__") or unquote(anchor) in anchors


def problems(site: Path) -> list[str]:
    """Return what is wrong, a line for each."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        if path.name == "404.html":  # served for any address, so its links are absolute
            continue
        found += [f"{name} loads {target}" for target in page.loads if OUTSIDE.match(target)]
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file():
                found.append(f"{name} links to {target}, which is not there")
            elif there in pages and not known(parts.fragment, pages[there].anchors):
                found.append(f"{name} links to {target}, an anchor that is not there")
    for path in sorted(site.rglob("*.css")):
        loads = re.findall(r"url\(['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", path.read_text("utf-8"))
        targets = [target for pair in loads for target in pair if target]
        found += [f"{path.relative_to(site)} loads {target}" for target in targets if OUTSIDE.match(target)]
    return found


def main(site: Path) -> int:
    """Print the problems; return how many there are, at most 1."""
    found = problems(site.resolve())
    pages = len(list(site.rglob("*.html")))
    summary = f"{site}: {pages} pages, all links lead somewhere, nothing is loaded from elsewhere"
    print("\n".join(found) if found else summary)
    return min(len(found), 1) if pages else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
