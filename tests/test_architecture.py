"""The house has floors: a module imports from the floors below its own, never from one above or beside it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "subspace_meta"
FLOORS = (
    ("subspace_kernels", "_tracing", "_version", "live"),
    ("manifolds", "adapter"),
    ("geometry", "reference"),
    ("optimizers", "rules", "tasks"),
    ("checkpoint",),
    ("weights", "meta"),
    ("optim", "evaluation"),
    ("presets", "benchmarks"),
    ("subspace_meta",),  # the names that users see
    ("cli",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def part_of(module: str) -> str:
    """Return the room of a module: the file or folder of the package that it is in."""
    first, _, rest = module.partition(".")
    return (rest.split(".")[0] or first) if first == "subspace_meta" else first


def imports_of(file: Path) -> set[str]:
    """Return the rooms from which a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {part_of(name.name) for name in node.names if name.name.startswith("subspace_")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subspace_"):
            whole = node.module == "subspace_meta"
            names = {f"subspace_meta.{name.name}" if whole else node.module for name in node.names}
            # What is no room is a name of the package itself.
            found |= {room if (room := part_of(name)) in FLOOR else "subspace_meta" for name in names}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_lead_down(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    room = "subspace_meta" if parts == ("__init__",) else parts[0]
    assert room in FLOOR, f"{room} has no floor yet"
    up = {other for other in imports_of(file) - {room} if FLOOR[other] >= FLOOR[room]}
    assert not up, f"{room} is on floor {FLOOR[room]}, and imports from {up}"


def test_the_page_on_the_design_shows_the_floors():
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    drawing = page.partition("## The house")[2].split("```")[1]
    shown = [re.findall(r"[a-z_]+", line.split("  ")[0]) for line in drawing.strip().splitlines()]
    assert shown == [[name for name in names] for names in reversed(FLOORS)]
