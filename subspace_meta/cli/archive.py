"""``subspace-meta archive``: tuned baselines, made where they are missing or stale."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated

import typer

from subspace_meta import live
from subspace_meta.cli.common import UsageError, chosen_tasks, console
from subspace_meta.evaluation import archive


def archive_command(
    suite: Annotated[
        str,
        typer.Option(help="full: all tasks of the suite; quick: ten small ones; test: the test set."),
    ] = "full",
    tasks: Annotated[str, typer.Option(help="Only tasks whose name matches this pattern.")] = "*",
    baselines: Annotated[str, typer.Option(help="Only baselines whose name matches this pattern.")] = "*",
    own: Annotated[
        str, typer.Option(help="package.module:tasks, a sequence of your own SuiteTask, instead of the suite.")
    ] = "",
    folder: Annotated[
        Path,
        typer.Option("--archive", "--folder", help="Where it lies.  [default: the one that ships]", show_default=False),
    ] = archive.FOLDER,
    jobs: Annotated[int, typer.Option(help="Processes side by side.", min=1)] = 1,
    again: Annotated[
        bool, typer.Option("--again", help="Tune stale ones anew, without looking whether their numbers still hold.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is missing or stale.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Tune every baseline on every task, where that is missing or was done by other code; hours, goes on if stopped.

    What other code has tuned is first run for 50 steps, and kept if these are what was measured.
    """
    chosen = [b for b in archive.KEPT if fnmatch.fnmatch(b.name.lower(), baselines.lower())]
    if not chosen:
        raise UsageError(f"no baseline matches {baselines!r}; there are: {', '.join(b.name for b in archive.KEPT)}")
    try:
        todo = archive.missing(chosen_tasks(suite, tasks, own), chosen, folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    typer.echo(f"missing or stale: {len(todo)}")
    if dry_run or not todo:
        for task, baseline in todo:
            typer.echo(f"{task.row}: {baseline.name}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with live.progress(console, quiet) as progress:
        bar = progress.add_task("tuning", total=len(todo), note="")
        kept = 0
        for task, baseline, _, confirmed in archive.regenerate(todo, jobs, folder, not again):
            kept += confirmed
            progress.update(bar, advance=1, note=f"{task.row[:30]}: {baseline.name}")
    typer.echo(f"tuned: {len(todo) - kept}, found as they were: {kept}")
