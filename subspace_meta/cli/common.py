"""What the commands share: errors of the user, tables, and the tasks that options name."""

from __future__ import annotations

import fnmatch
import importlib
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from subspace_meta.evaluation import archive
from subspace_meta.evaluation.comparison import QUICK
from subspace_meta.tasks.data import DATA_VARIABLE
from subspace_meta.tasks.held_out import held_out_suite
from subspace_meta.tasks.suite import SuiteTask, evaluation_suite

console = Console(stderr=True)


SUITES = ("full", "quick", "test")
WIDE = 200  # columns that tables of the suite need not to wrap


class UsageError(Exception):
    """The user asked for something that cannot be; the message says what would be right."""


def device_named(name: str) -> torch.device:
    """Return the device that ``--device`` names: cpu, cuda, or cuda:1.

    In a job of ``torchrun``, cuda is the one that has the process's number on its machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is cpu, cuda, or cuda:1 for the second of several, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        there = f"there are {count}, counted from 0" if count else "torch sees none, --device cpu goes without"
        raise UsageError(f"no CUDA device {index if count else 'here'}; {there}")
    return torch.device("cuda", index)


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str], width: int | None = None
) -> None:
    """Print a table, the columns ``left`` flush left; ``width`` is for piped output, which has none of its own."""
    table = Table(title=title)
    for column in header:
        table.add_column(column, justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width).print(table)


def finite_or_null(value: Any) -> Any:
    """Return JSON-ready content with ``None`` for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite_or_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def imported(path: str, what: str) -> Any:
    """Return the object that ``package.module:name`` names."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise UsageError(f"--{what} is package.module:name, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for good: worker processes import it again
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--{what} {path}: {error}") from error


def why_no_compiling() -> str:
    """Return why inner loops cannot be compiled here, and what would help; empty if nothing speaks against it."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "no C++ compiler found (set CXX, or install g++ or clang++)"
    if any(character.isspace() for character in torch.__file__):
        return "torch.compile cannot link below a path with a space, and torch lies there"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h found (install the development files of this Python; Debian: python3-dev)"
    return ""


def _own_tasks(path: str) -> list[SuiteTask]:
    """Return the tasks that a user named, after a look at what they are."""
    tasks = imported(path, "own")
    if not isinstance(tasks, list | tuple) or not all(isinstance(task, SuiteTask) for task in tasks) or not tasks:
        raise UsageError(f"--own {path} must be a list or tuple of SuiteTask, got {tasks!r:.200}")
    files = [archive.path_of(task.row).name for task in tasks]
    if twice := [task.row for task, file in zip(tasks, files, strict=True) if files.count(file) > 1]:
        raise UsageError(
            f"--own {path}: these tasks would share a file of the archive, rename them: {', '.join(twice)}"
        )
    return list(tasks)


def chosen_tasks(suite: str, pattern: str, own: str) -> list[SuiteTask]:
    """Return the tasks that the options mean, those without their data left out with a word.

    The test set is in no other suite: it has to be named.
    """
    if suite not in SUITES:
        raise UsageError(f"there is no suite {suite!r}; there are: {', '.join(SUITES)}")
    if suite == "test" and own:
        raise UsageError("give --own or --suite test, not both")
    tasks = _own_tasks(own) if own else list(held_out_suite() if suite == "test" else evaluation_suite())
    named = [task for task in tasks if own or suite != "quick" or task.row in QUICK]
    exact = [task for task in named if task.row.lower() == pattern.lower()]  # a name may hold what patterns are made of
    matching = exact or [task for task in named if fnmatch.fnmatch(task.row.lower(), pattern.lower())]
    if not matching:
        raise UsageError(f"no task matches {pattern!r}; there are: {'; '.join(task.row for task in named)}")
    available = [task for task in matching if task.available]
    if len(available) < len(matching):
        console.print(
            f"left out, the folder that {DATA_VARIABLE} names does not hold their data: "
            + "; ".join(task.row for task in matching if not task.available)
        )
    if not available:
        raise UsageError(f"the data of these tasks are not there; set {DATA_VARIABLE} to their folder")
    return available
