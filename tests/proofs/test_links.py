"""Every proven statement keeps its plain proof, its Coq theorems, the code that it is about, and its test.

Nothing here needs Coq: theorems are looked for in the text of the sources. ``proofs/check.py`` compiles them.
"""

from __future__ import annotations

import ast
import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from loading import module_at

ROOT = Path(__file__).resolve().parents[2]
PROOFS = ROOT / "proofs"
STATEMENTS: list[dict[str, Any]] = json.loads((PROOFS / "statements.json").read_text())["statements"]
IDS = [statement["id"] for statement in STATEMENTS]
KINDS = ("machine-checked", "partly machine-checked", "on paper")


@cache
def check() -> ModuleType:
    """The script ``proofs/check.py``: how it reads sources and writes the table."""
    return module_at(PROOFS / "check.py")


@cache
def theorems() -> frozenset[str]:
    """All ``file.v:name`` in the Coq sources."""
    found = check().names_by_file(sorted((PROOFS / "coq").glob("*.v")))
    return frozenset(f"{name}:{statement}" for name, pairs in found.items() for _, statement in pairs)


@cache
def functions(path: str) -> frozenset[str]:
    """The functions of a test file, without importing it."""
    file = ROOT / path
    nodes = ast.parse(file.read_text()).body if file.exists() else []
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef))


def has_code(name: str) -> bool:
    """Whether ``module:object`` can be imported."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True


def lost(statement: dict[str, Any]) -> list[str]:
    """What the statement says it has and has not."""
    missing = []
    markdown = PROOFS / statement["markdown"]
    text = markdown.read_text() if markdown.exists() else ""
    _, heading, section = text.partition(f"\n## {statement['id']}\n")
    section = section.partition("\n## ")[0]
    if not heading:
        missing.append(f"the heading in {statement['markdown']}")
    if "**Claim.**" not in section and "**Geodesics.**" not in section:
        missing.append(f"the claim in {statement['markdown']}")
    missing += [name for name in statement["coq"] if name not in theorems()]
    missing += [name for name in statement["code"] if not has_code(name)]
    path, _, function = statement["test"].partition("::")
    if not statement["test_exists"] or function not in functions(path):
        missing.append(statement["test"])
    if function != f"test_{statement['id']}":
        missing.append("a test of its own name")
    if statement["checked"] not in KINDS or (statement["checked"] == "on paper") == bool(statement["coq"]):
        missing.append("a word for how it is checked that fits its theorems")
    return missing


@pytest.mark.parametrize("statement", STATEMENTS, ids=IDS)
def test_nothing_is_lost(statement: dict[str, Any]) -> None:
    assert not lost(statement)


def test_identifiers_are_distinct() -> None:
    assert len(set(IDS)) == len(IDS)


def test_every_test_has_a_statement() -> None:
    """A test has the name of a statement, or begins with it."""
    files = sorted(Path(__file__).parent.glob("test_*_statements.py"))
    for name in frozenset().union(*(functions(f"tests/proofs/{file.name}") for file in files)):
        assert not name.startswith("test_") or any(name.startswith(f"test_{known}") for known in IDS), name


def test_every_heading_has_a_statement() -> None:
    for path in sorted((PROOFS / "statements").glob("*.md")):
        headings = [line[3:] for line in path.read_text().splitlines() if line.startswith("## ")]
        assert headings == [s["id"] for s in STATEMENTS if s["markdown"] == f"statements/{path.name}"]


def test_the_table_is_that_of_the_statements() -> None:
    """If this fails: ``python3 proofs/check.py --table``."""
    assert check().readme_parts()[1] == check().table_of(PROOFS / "statements.json")


@pytest.mark.parametrize(
    ("field", "planted"),
    [
        ("id", "stiefel_projections"),
        ("markdown", "statements/lost.md"),
        ("markdown", "statements/grassmann.md"),
        ("coq", ["stiefel.v:no_such_theorem"]),
        ("coq", ["lost.v:project_tangent"]),
        ("coq", []),
        ("code", ["subspace_meta.manifolds.stiefel:Stiefel.no_such_method"]),
        ("code", ["subspace_meta.manifolds.no_such_module:Stiefel"]),
        ("test", "tests/proofs/test_manifold_statements.py::test_lost"),
        ("test", "tests/proofs/test_lost.py::test_stiefel_projection"),
        ("test_exists", False),
    ],
)
def test_a_loss_is_seen(field: str, planted: Any) -> None:
    whole = next(statement for statement in STATEMENTS if statement["id"] == "stiefel_projection")
    assert not lost(whole)
    assert lost({**whole, field: planted})
