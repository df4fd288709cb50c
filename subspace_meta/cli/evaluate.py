"""``subspace-meta evaluate``: an untuned optimizer beside the archive of tuned ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from subspace_meta import live
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.checkpoint import load_weights, write_atomically
from subspace_meta.cli.common import (
    WIDE,
    UsageError,
    chosen_tasks,
    console,
    device_named,
    finite_or_null,
    imported,
    print_table,
)
from subspace_meta.evaluation import archive
from subspace_meta.evaluation.comparison import Comparison, TaskResult, compare, doubts
from subspace_meta.evaluation.page import gaps, markdown, page, scheduled, summary, untuned
from subspace_meta.optimizers.subspace import SubspaceOptimizer
from subspace_meta.tasks.placement import moved
from subspace_meta.weights import FOLDER, RELEASES

TEST_RULE = (
    "This is the test set, for weights that are released: record this use, with its date, in "
    "subspace_meta/weights/MODEL_CARD.md, whatever it says; nothing is chosen by it."
)


def evaluate_command(
    weights: Annotated[
        Path | None, typer.Option(help="A weights file of the learned optimizer.  [default: the shipped one]")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="Instead: package.module:factory, a function of a Geometry that returns an optimizer.")
    ] = "",
    averages: Annotated[
        bool,
        typer.Option("--averages", help="Judge the averages of its iterates that the learned optimizer hands out."),
    ] = False,
    suite: Annotated[
        str,
        typer.Option(
            help="full: all tasks of the suite; quick: ten small ones; test: the test set, for releases only, "
            "each use a line in the model card."
        ),
    ] = "full",
    tasks: Annotated[str, typer.Option(help="Only tasks whose name matches this pattern, *PCA* for instance.")] = "*",
    own: Annotated[
        str, typer.Option(help="package.module:tasks, a sequence of your own SuiteTask, instead of the suite.")
    ] = "",
    folder: Annotated[
        Path,
        typer.Option("--archive", help="Folder of tuned baselines.  [default: the one that ships]", show_default=False),
    ] = archive.FOLDER,
    out: Annotated[Path | None, typer.Option(help="Folder for report.md, report.html and results.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of a tensor operation.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="Where the optimizer runs: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Compare an untuned optimizer with the archive of tuned baselines."""
    torch.set_num_threads(threads)
    if weights is not None and optimizer:
        raise UsageError("give --weights or --optimizer, not both")
    if averages and optimizer:
        raise UsageError(
            "--averages are those of the learned optimizer; sm.Averaging(method) hands out those of another"
        )
    where = device_named(device)
    name, make = _chosen_optimizer(weights or FOLDER / RELEASES["base"], optimizer, averages, where)
    chosen = chosen_tasks(suite, tasks, own)
    if suite == "test":
        console.print(TEST_RULE)
    if out is not None:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out is a folder; {out} is a file")
        out.mkdir(parents=True, exist_ok=True)  # an unwritable place is said now, not after minutes
    results: list[TaskResult] = []
    reasons: list[str] = []
    with live.progress(console, quiet) as progress:
        bar = progress.add_task("evaluating", total=len(chosen), note=chosen[0].row[:44])
        for done, (task, result) in enumerate(compare(name, make, chosen, folder, where), start=1):
            reasons.append(f"{task.row}: {result}") if isinstance(result, str) else results.append(result)
            progress.update(bar, advance=1, note=chosen[min(done, len(chosen) - 1)].row[:44])
    if not results:
        raise UsageError(f"there is nothing to report. {'; '.join(reasons[:3])}")
    notes = [*doubts(results), *(f"left out, {reason}" for reason in reasons)]
    if where.type != "cpu":
        notes.append(
            f"{name} ran on {torch.cuda.get_device_name(where)}, the baselines of the archive on a CPU; seconds of a "
            "step are wall-clock seconds of that device, for both"
        )
    for note in notes:
        console.print(note)
    found = Comparison(name, tuple(results), tuple(notes))
    described = finite_or_null(found.to_json())
    if out is not None:
        write_atomically(out / "results.json", json.dumps(described, indent=1).encode())
        write_atomically(out / "report.md", markdown(found).encode())
        write_atomically(out / "report.html", page(found).encode())
        console.print(f"wrote {out}/report.html, report.md and results.json")
    if as_json:
        typer.echo(json.dumps(described))
    else:
        tables = (
            ("tasks on which it is no worse than the best tuned", summary),
            ("no worse than these, nothing tuned", untuned),
            ("no worse than these, the number of steps known", scheduled),
            ("behind the best tuned (+), or ahead", gaps),
        )
        for title, make_table in tables:
            header, rows = make_table(found)
            print_table(title, header, rows, (header[0], "from", "most to"), WIDE)
    if reasons:
        raise typer.Exit(1)


def _chosen_optimizer(weights: Path, optimizer: str, averages: bool, device: torch.device) -> tuple[str, Any]:
    """Return name and factory of what is evaluated."""
    if optimizer:
        return optimizer, imported(optimizer, "optimizer")
    theta, adapter = load_weights(weights)
    if averages and not isinstance(adapter, BaseAdapter):
        raise UsageError(f"preset {adapter.name!r} makes no averages; leave --averages away")
    theta = moved(theta, device)
    name = f"{weights.stem}, averages" if averages else weights.stem
    return name, lambda geometry: SubspaceOptimizer(geometry, theta, adapter, averaging=averages)
