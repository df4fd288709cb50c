"""The archive of tuned baselines: what every hand-made optimizer reaches on every task of the suite, at its best rate.

Tuning takes hours, so it is done once and kept in ``evaluation/archive``: one compressed JSON file a task, one cell a
baseline. A cell says which code made it, by a hash of the modules that decide its numbers, without their comments,
docstrings and errors; a cell of other code is *stale*, and made anew when the archive is regenerated. Much of that code
may change without changing a number: :func:`confirm` runs the first steps of a stale cell again, all rates and seeds,
and keeps the cell where they are what was measured. Files are written whole after every cell, so an interrupted run
goes on where it was.
"""

from __future__ import annotations

import ast
import concurrent.futures
import dataclasses
import functools
import gzip
import hashlib
import importlib
import inspect
import json
import math
import multiprocessing
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from subspace_meta import geometry, manifolds, optimizers
from subspace_meta.checkpoint import write_atomically
from subspace_meta.evaluation import protocol
from subspace_meta.evaluation.protocol import (
    BASELINES,
    SCHEDULED,
    TIE,
    UNTUNED,
    Baseline,
    Curves,
    EvaluationTask,
    checkpoints_within,
    run_baseline,
    tune,
)
from subspace_meta.geometry import Geometry
from subspace_meta.meta.cost import entries
from subspace_meta.optimizers import Averaging
from subspace_meta.tasks import base as tasks_base
from subspace_meta.tasks import data as tasks_data
from subspace_meta.tasks import references
from subspace_meta.tasks.suite import SuiteTask

FOLDER = Path(__file__).parent / "archive"
KEPT = BASELINES + SCHEDULED + UNTUNED  # what has a cell on every task on which it is defined
SEEDS = 5
DECIMALS = 4
TENSORS = ("log_excess", "metric", "violation", "envelope", "curves", "initial")  # fields of a cell that are tensors


@dataclass(frozen=True)
class Cell:
    """What one baseline reaches on one task.

    Attributes:
        code: hash of the code that made it.
        steps: the measured steps.
        rates: learning rates.
        log_excess, metric: ``(rates, seeds, len(checkpoints))``; +inf where not finite.
        violation: largest at the last step over seeds, one a rate.
        envelope: ``(len(steps),)``, the least over rates of the running minimum of the smoothed mean curve.
        curves: ``(len(checkpoints), len(steps))``, the mean curve of the rate that is best at each checkpoint.
        initial: objective at the start, one a seed.
        reference: the lowest value.
        seconds: CPU seconds that the cell took.
    """

    code: str
    steps: tuple[int, ...]
    rates: tuple[float, ...]
    log_excess: Tensor
    metric: Tensor
    violation: Tensor
    envelope: Tensor
    curves: Tensor
    initial: Tensor
    reference: float
    seconds: float

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The steps at which optimizers are compared."""
        return checkpoints_within(self.steps[-1])

    def best(self, step: int) -> int:
        """Return the index of the best rate at a checkpoint: lowest mean over seeds."""
        return int(self.log_excess[..., self.checkpoints.index(step)].mean(dim=-1).argmin())

    def score(self, step: int) -> float:
        """Return the mean log excess over seeds at a checkpoint, at the best rate there."""
        return float(self.log_excess[self.best(step), :, self.checkpoints.index(step)].mean())

    def score_at(self, rate: float, step: int) -> float:
        """Return the mean log excess over seeds at a checkpoint, at one of the rates."""
        index = min(range(len(self.rates)), key=lambda i: abs(math.log(self.rates[i] / rate)))
        if not math.isclose(self.rates[index], rate, rel_tol=1e-3):
            raise ValueError(f"rate {rate:g} was not run; there are {', '.join(f'{r:.3g}' for r in self.rates)}")
        return float(self.log_excess[index, :, self.checkpoints.index(step)].mean())

    def objective(self, step: int) -> Tensor:
        """Return the objective at a checkpoint at the best rate there, ``(seeds,)``."""
        log_excess = self.log_excess[self.best(step), :, self.checkpoints.index(step)]
        return self.reference + torch.exp(log_excess) * (self.initial - self.reference)


def smoothed_minimum(log_excess: Tensor) -> Tensor:
    """Return the running minimum of curves ``(..., steps)`` smoothed over three measured steps (ends: two)."""
    padded = torch.cat([log_excess[..., :1], log_excess, log_excess[..., -1:]], dim=-1)
    smooth = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
    # The start is known exactly, and not the smoothed value of steps that came later.
    smooth = torch.cat([log_excess[..., :1], smooth[..., 1:]], dim=-1)
    return torch.cummin(smooth, dim=-1).values


def cell_of(curves: Curves, code: str) -> Cell:
    """Condense curves to a cell."""
    checkpoints = curves.checkpoints
    chosen = [curves.steps.index(step) for step in checkpoints]
    mean = curves.log_excess.mean(dim=1)
    return Cell(
        code,
        curves.steps,
        curves.rates,
        curves.log_excess[..., chosen],
        curves.metric,
        curves.violation.amax(dim=-1),
        smoothed_minimum(mean).amin(dim=0),
        torch.stack([mean[curves.best(step)] for step in checkpoints]),
        curves.initial,
        curves.reference,
        curves.seconds,
    )


# --- Which code made it ---


def _is_check(name: str) -> bool:
    """Return whether a function of this name only raises, as the house has it: ``check_shape``, ``_check_rate``."""
    return name.lstrip("_").partition("_")[0] == "check"


def _only_says(node: ast.stmt) -> bool:
    """Return whether a statement changes no number of a run that ends: a docstring, a check, ``if ...: raise``."""
    if isinstance(node, ast.Expr):
        value = node.value
        if isinstance(value, ast.Call):
            return _is_check(
                value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
            )
        return isinstance(value, ast.Constant) and isinstance(value.value, str)
    if isinstance(node, ast.FunctionDef):
        returned = (part.value for part in ast.walk(node) if isinstance(part, ast.Return))
        return _is_check(node.name) and not any(returned)
    return isinstance(node, ast.If) and not node.orelse and all(isinstance(part, ast.Raise) for part in node.body)


def _without_handlers(node: ast.stmt) -> list[ast.stmt]:
    """Return what is tried, where only decompositions that fail are caught: that had ended the run of a cell before."""
    if isinstance(node, ast.Try) and not node.orelse and not node.finalbody:
        caught = [ast.unparse(handler.type) if handler.type else "" for handler in node.handlers]
        if all(name == "torch.linalg.LinAlgError" for name in caught):
            return node.body
    return [node]


class _WithoutRemarks(ast.NodeTransformer):
    """Drops docstrings, errors, and on which device tensors are made: the archive is made on one, the CPU."""

    def visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                kept = (part for statement in statements for part in _without_handlers(statement))
                setattr(node, field, [statement for statement in kept if not _only_says(statement)])
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "device"]
        elif isinstance(node, ast.Raise):
            node.exc = node.cause = None
        elif isinstance(node, ast.ImportFrom):
            node.names = [alias for alias in node.names if not _is_check(alias.name)]
        return node


@functools.cache
def _meaning(source: str) -> str:
    """Return what decides the numbers: the syntax tree without comments, docstrings, errors, devices and layout."""
    return ast.dump(_WithoutRemarks().visit(ast.parse(textwrap.dedent(source))))


@functools.cache
def _meaning_of(code: ModuleType | Callable[..., Any]) -> str:
    return _meaning(inspect.getsource(code))


@functools.cache
def _with_imports(modules: tuple[str, ...], package: ModuleType) -> list[ModuleType]:
    """Return modules, by name, with all that they import from a package by a module's name, ordered by their names."""
    found: dict[str, ModuleType] = {}
    left = list(modules)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = importlib.import_module(name)
            statements = list(ast.walk(ast.parse(inspect.getsource(found[name]))))
            sources = [node.module or "" for node in statements if isinstance(node, ast.ImportFrom)]
            left += [source for source in sources if source.startswith(f"{package.__name__}.")]
    return [found[name] for name in sorted(found)]


def _manifold_modules(where: Geometry) -> list[ModuleType]:
    """Return the modules that decide what the manifolds of a geometry, and their retractions, compute."""
    values: list[Any] = [parameter.manifold for parameter in where.parameters]
    values += [factor for value in values if isinstance(value, manifolds.Product) for factor in value.factors]
    values += [value.retraction for value in values if hasattr(value, "retraction")]
    return _with_imports(tuple({type(value).__module__ for value in values}), manifolds)


DECIDING = (
    protocol.evaluate_rates,
    protocol.run_baseline,
    protocol.at_budgets,
    protocol.tune,
    protocol.measured_steps,
    cell_of,
    smoothed_minimum,
)


def code_hash(task: SuiteTask, baseline: Baseline) -> str:
    """Return a hash of the code that decides a cell: manifolds and geometry, the task, the optimizer, the protocol."""
    optimizer = baseline.make(task.family.problem.geometry, torch.tensor(1e-2))
    methods = (optimizer, optimizer.method) if isinstance(optimizer, Averaging) else (optimizer,)
    modules = [
        *_manifold_modules(task.family.problem.geometry),
        geometry,
        *_with_imports(tuple(type(method).__module__ for method in methods), optimizers),
        tasks_base,
        tasks_data,
        references,
        importlib.import_module(type(task.family).__module__),
    ]
    parts = [_meaning_of(module) for module in modules]
    parts += [_meaning_of(f) for f in (*DECIDING, *([baseline.schedule] if baseline.schedule else []))]
    parts += [
        repr((task.row, tasks_base.describe(task.family), task.horizon, SEEDS, protocol.GRID, protocol.MAX_EXTENSIONS))
    ]
    parts += [f"instance {task.instance}"] if task.instance else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# --- Files ---


def path_of(row: str, folder: Path = FOLDER) -> Path:
    """Return the file of a task."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-") + ".json.gz")


def _rounded(value: Tensor) -> Any:
    if value.ndim == 0:
        number = float(value)
        return (
            float(f"{number:.{DECIMALS}g}" if abs(number) < 1 else f"{number:.{DECIMALS}f}")
            if math.isfinite(number)
            else None
        )
    return [_rounded(part) for part in value]


def _tensor(value: Any) -> Tensor:
    def known(part: Any) -> Any:
        return [known(x) for x in part] if isinstance(part, list) else math.inf if part is None else part

    return torch.tensor(known(value))


def _cell(described: dict[str, Any]) -> Cell:
    fields: dict[str, Any] = {key: _tensor(described[key]) for key in TENSORS}
    fields |= {key: tuple(described[key]) for key in ("steps", "rates")}
    fields |= {key: described[key] for key in ("code", "reference", "seconds")}
    return Cell(**fields)


def load(row: str, folder: Path = FOLDER) -> dict[str, Cell]:
    """Return the cells of a task by baseline; none if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    path = path_of(row, folder)
    if not path.is_file():
        return {}
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        return {name: _cell(described) for name, described in content["cells"].items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a file of the archive, or damaged ({error}); delete it to make it anew"
        ) from error


def save(row: str, cells: dict[str, Cell], folder: Path = FOLDER) -> None:
    """Write the cells of a task, whole or not at all."""
    order = [baseline.name for baseline in KEPT]
    described = {
        name: {
            "code": cell.code,
            "steps": cell.steps,
            "rates": [float(f"{rate:.6g}") for rate in cell.rates],
            **{key: _rounded(getattr(cell, key)) for key in TENSORS},
            "reference": cell.reference,
            "seconds": round(cell.seconds, 1),
        }
        for name, cell in sorted(cells.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1)
    }
    text = json.dumps({"task": row, "seeds": SEEDS, "cells": described}, separators=(",", ":"))
    write_atomically(path_of(row, folder), gzip.compress(text.encode(), mtime=0))


# --- Making it ---


def missing(
    tasks: Sequence[SuiteTask], baselines: Sequence[Baseline] = KEPT, folder: Path = FOLDER
) -> list[tuple[SuiteTask, Baseline]]:
    """Return what is missing or stale, of available tasks and methods that are defined on them; small tasks first."""
    available = sorted((task for task in tasks if task.available), key=lambda t: t.horizon * entries(t.family.problem))
    return [(task, b) for task in available for b in lacking(task, load(task.row, folder), baselines)]


def lacking(task: SuiteTask, cells: Mapping[str, Cell], baselines: Sequence[Baseline] = KEPT) -> list[Baseline]:
    """Return the baselines that are defined on a task and have no cell, or one that other code made."""
    defined = [baseline for baseline in baselines if baseline.defined_on(task.family.problem.geometry)]
    return [b for b in defined if b.name not in cells or cells[b.name].code != code_hash(task, b)]


def make_cell(task: SuiteTask, baseline: Baseline) -> Cell:
    """Tune one baseline on one task; one that needs no tuning is run at its default."""
    torch.set_num_threads(1)
    drawn = EvaluationTask(task.row, task.family, task.instance)
    if baseline in UNTUNED:
        assert baseline.default is not None
        curves = run_baseline(drawn, baseline, (baseline.default,), SEEDS, task.horizon)
    else:
        curves = tune(drawn, baseline, SEEDS, task.horizon)
    return cell_of(curves, code_hash(task, baseline))


CONFIRMED = 50  # steps that a stale cell is run again
IN_REACH = 1.0  # of the best log excess: rates beyond may be chaotic, and only must not have become the best


def confirm(task: SuiteTask, baseline: Baseline, cell: Cell) -> Cell | None:
    """Return a stale cell as one of today's code if that gives its numbers, otherwise ``None``.

    All its rates and seeds are run for the first ``CONFIRMED`` steps. At each checkpoint the mean over seeds of every
    rate within ``IN_REACH`` of the best has to be what it was to half of a tie, and no other rate may be the best.
    """
    torch.set_num_threads(1)
    if cell.steps[-1] != task.horizon or cell.log_excess.shape[1] != SEEDS:
        return None
    horizon = min(CONFIRMED, task.horizon)
    curves = run_baseline(EvaluationTask(task.row, task.family, task.instance), baseline, cell.rates, SEEDS, horizon)
    if not math.isclose(curves.reference, cell.reference, rel_tol=1e-3, abs_tol=1e-6):
        return None
    for step in curves.checkpoints:
        if step in cell.checkpoints:
            new = curves.at(step).mean(dim=-1)
            old = cell.log_excess[..., cell.checkpoints.index(step)].mean(dim=-1)
            reach = (old <= old.amin() + IN_REACH) | (new <= old.amin() + TIE / 2)
            if not bool(((new - old).abs()[reach] <= TIE / 2).all()):
                return None
    return dataclasses.replace(cell, code=code_hash(task, baseline))


def _make_named(task: SuiteTask, name: str, stored: Cell | None) -> tuple[Cell, bool]:
    """Confirm or tune by the baseline's name, what a worker process is told; and say whether it was confirmed."""
    baseline = next(baseline for baseline in KEPT if baseline.name == name)
    confirmed = confirm(task, baseline, stored) if stored is not None else None
    return (make_cell(task, baseline), False) if confirmed is None else (confirmed, True)


def regenerate(
    cells: Sequence[tuple[SuiteTask, Baseline]], jobs: int = 1, folder: Path = FOLDER, confirming: bool = True
) -> Iterator[tuple[SuiteTask, Baseline, Cell, bool]]:
    """Make cells in ``jobs`` processes; write each into its file, then yield it, and whether it was only confirmed.

    With ``confirming`` a stale cell is tuned only if :func:`confirm` says that its numbers are no longer right.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {
            pool.submit(
                _make_named, task, baseline.name, load(task.row, folder).get(baseline.name) if confirming else None
            ): (task, baseline)
            for task, baseline in cells
        }
        try:
            for done in concurrent.futures.as_completed(waiting):
                task, baseline = waiting[done]
                cell, confirmed = done.result()
                save(task.row, {**load(task.row, folder), baseline.name: cell}, folder)
                yield task, baseline, cell, confirmed
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
