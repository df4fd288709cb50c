"""The docstrings of this library as Markdown: roles of other tools become code, tables become tables."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")
SECTION = re.compile(r"(?:Args|Attributes|Raises|Returns|Yields):")
TOGETHER = re.compile(r"^    (\w+(?:, \w+)+): (.*)$", re.MULTILINE)  # arguments that are described together
RULE = re.compile(r"=+(?:\s+=+)+")


def table(lines: list[str]) -> list[str]:
    """Return a table that is drawn with rules of ``=`` as Markdown; a line without a first cell goes on above."""
    starts = [match.start() for match in re.finditer(r"=+", lines[0])]
    blocks: list[list[list[str]]] = [[]]
    for line in lines[1:]:
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        if RULE.fullmatch(line.strip()):
            blocks.append([])
        elif blocks[-1] and not cells[0]:
            blocks[-1][-1] = [f"{above} {below}".strip() for above, below in zip(blocks[-1][-1], cells, strict=True)]
        else:
            blocks[-1].append(cells)
    *headers, body = (block for block in blocks if block)
    header = headers[0][0] if headers else [""] * len(starts)
    rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, ["---"] * len(starts), *body)]
    return ["", *(f"| {row} |" for row in rows), ""]


def with_tables(text: str) -> str:
    """Return text with its tables as those of Markdown."""
    lines, done = text.splitlines(), []
    rules = [i for i, line in enumerate(lines) if RULE.fullmatch(line.strip())]
    position = 0
    while rules:
        first = rules.pop(0)
        if first < position:
            continue
        # A table has two rules, or three with a header; it ends where the next line is none of it.
        inside = [i for i in rules if all(lines[first:i])][:2]
        last = inside[-1]
        done += [*lines[position:first], *table(lines[first : last + 1])]
        position = last + 1
    return "\n".join([*done, *lines[position:]])


def escaped(text: str) -> str:
    """Return text outside of code with what Markdown would take for tags and links: inner products and matrices."""
    done, in_section = [], False
    for line in text.split("\n"):
        in_section = bool(SECTION.fullmatch(line)) or (in_section and not line[:1].strip())
        code = line.startswith("    ") and not in_section  # formulas on lines of their own
        done.append(line if code else line.replace("<", "&lt;").replace("[", "&#91;"))
    return "\n".join(done)


def plain(text: str) -> str:
    """Return a docstring as Markdown shows it right."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = with_tables(ROLE.sub(lambda match: f"`{match[1]}`", text))
    text = TOGETHER.sub(lambda match: "\n".join(f"    {name}: {match[2]}" for name in match[1].split(", ")), text)
    parts = re.split(r"(``[^`]+``|`[^`\n]+`)", text)
    return "".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))


class PlainDocstrings(griffe.Extension):
    """Brings every docstring into Markdown before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
