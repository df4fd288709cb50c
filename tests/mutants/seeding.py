"""Seeded errors: apply each to a temporary copy, run its tests against the copy, and say which survive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("subspace_meta", "kernels", "tests")


class Mutant(NamedTuple):
    """One seeded error: the name by which it is chosen, where, what is replaced by what, and what kind it is."""

    name: str
    file: str
    original: str
    mutated: str
    kind: str = ""


def hunt(
    mutants: Sequence[Mutant], tests_of: Callable[[str], Sequence[str]], required: float, chosen: Sequence[str]
) -> int:
    """Run all mutants of the ``chosen`` names (all names if empty); return the exit code.

    Args:
        mutants: of which those of the chosen names are run.
        tests_of: the tests of a name, as paths below ``tests``; the first failure ends a run, so cheap ones come first.
        required: share that has to be killed.
        chosen: names.
    """
    names = list(dict.fromkeys(mutant.name for mutant in mutants))
    unknown = [name for name in chosen if name not in names]
    if unknown:
        print(f"no mutant is called {', '.join(unknown)}; there are: {', '.join(names)}")
        return 2
    picked = [mutant for mutant in mutants if not chosen or mutant.name in chosen]
    stale = outdated(picked)
    for mutant in stale:
        print(f"{mutant.file}: {mutant.original!r} is no longer in the source; renew this mutant")
    if stale:
        return 1
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        _copy(folder)
        plain = list(dict.fromkeys(test for mutant in picked for test in tests_of(mutant.name)))
        if not _pass(folder, plain):
            print("the tests fail without any mutant")
            return 1
        for number, mutant in enumerate(picked, start=1):
            path = folder / mutant.file
            source = path.read_text()
            path.write_text(source.replace(mutant.original, mutant.mutated))
            start = time.monotonic()
            killed = not _pass(folder, tests_of(mutant.name))
            path.write_text(source)
            status = "killed  " if killed else "SURVIVED"
            took = f"{time.monotonic() - start:.0f} s"
            print(
                f"{number:3d}/{len(picked)} {status} {mutant.name}: {mutant.kind or mutant.file} [{took}]", flush=True
            )
            if not killed:
                survivors.append(mutant)
    rate = 1.0 - len(survivors) / len(picked)
    print(f"{len(picked) - len(survivors)} of {len(picked)} killed ({100 * rate:.1f} %)")
    for mutant in survivors:
        print(f"survivor in {mutant.file}: {mutant.original!r} -> {mutant.mutated!r} ({mutant.kind})")
    return 0 if rate >= required else 1


def outdated(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Return those whose original is not in the source."""
    return [mutant for mutant in mutants if mutant.original not in (ROOT / mutant.file).read_text()]


def _copy(folder: Path) -> None:
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests" / "test_copy.py").write_text(
        "import subspace_kernels\nimport subspace_meta\n\n\ndef test_the_copy_is_what_runs():\n"
        f"    assert subspace_meta.__file__.startswith({str(folder)!r})\n"
        f"    assert subspace_kernels.__file__.startswith({str(folder)!r})\n"
    )


def _pass(folder: Path, tests: Sequence[str]) -> bool:
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    environment = dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(folder / "cache"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    command += ["tests/test_copy.py", *(f"tests/{test}" for test in tests)]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if "test_the_copy_is_what_runs" in finished.stdout:
        raise RuntimeError("the tests do not run against the copy\n" + finished.stdout)
    # 1: a test failed; 2: a module cannot be imported; below zero: native code crashed.
    if finished.returncode > 2:
        raise RuntimeError(finished.stdout + finished.stderr)
    return finished.returncode == 0
