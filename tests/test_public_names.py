"""What the package promises to whoever imports it: documented names, and no heavy imports."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import subspace_kernels

import subspace_meta as sm

# What a user of the optimizer does not need: command line, plots, data sets, kernels.
HEAVY = ("typer", "rich", "matplotlib", "sklearn", "skimage", "mlxtend", "triton")
FILES = sorted(path for package in (sm, subspace_kernels) for path in Path(package.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("name", sm.__all__)
def test_public_names_are_documented(name):
    value = getattr(sm, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        doc = inspect.getdoc(value) or ""
        assert len(doc) > 10
        assert not doc.startswith(f"{name}("), "the docstring that dataclasses make is none"


def test_all_is_complete_and_has_no_strangers():
    public = {
        name
        for name, value in vars(sm).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert public | {"__version__"} == set(sm.__all__)


@pytest.mark.parametrize("path", FILES, ids=[f"{p.parent.name}/{p.name}" for p in FILES])
def test_everything_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module"
    stack = [(tree, "")]
    while stack:
        node, prefix = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                name = f"{prefix}{child.name}"
                public = not any(part.startswith("_") for part in name.split("."))
                assert not public or ast.get_docstring(child), name
                if isinstance(child, ast.ClassDef):
                    stack.append((child, f"{name}."))


def test_importing_the_package_imports_nothing_heavy():
    code = f"""
import subspace_meta, subspace_meta.reference, subspace_meta.meta.trainer, subspace_meta.tasks, subspace_meta.manifolds
import sys
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_can_be_imported():
    for module in pkgutil.walk_packages(sm.__path__, "subspace_meta."):
        importlib.import_module(module.name)


def test_imports_go_one_way():
    """A module imports only from its own layer and those below; the order is that of the design."""
    layers = [
        {"_version", "_tracing"},
        {"manifolds"},
        {"geometry", "adapter"},
        {"optimizers", "checkpoint", "weights", "reference", "rules"},
        {"optim"},
        {"tasks", "meta"},
        {"evaluation", "presets", "benchmarks", "live", "cli", "__main__"},
    ]
    level = {name: i for i, layer in enumerate(layers) for name in layer}
    root = Path(sm.__file__).parent
    for path in root.rglob("*.py"):
        here = path.relative_to(root).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subspace_meta."):
                there = node.module.split(".")[1]
                assert level[there] <= level[here], f"{path.relative_to(root)} imports {node.module}"
    for path in Path(subspace_kernels.__file__).parent.rglob("*.py"):
        assert "subspace_meta." not in "".join(
            line for line in path.read_text(encoding="utf-8").splitlines(True) if "import" in line.split()[:1]
        )
