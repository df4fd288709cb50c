"""What a running command shows: a progress bar in a terminal, lines in a log, curves in TensorBoard if installed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Left

LINE_SECONDS = 30.0


class _Live(Progress):
    """A bar; where it cannot move (continuous integration, a file), a line every half a minute instead."""

    printed = 0.0

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See ``Progress.update``."""
        super().update(task_id, **changes)
        if self.disable or self.console.is_terminal or time.monotonic() - self.printed < LINE_SECONDS:
            return
        self.printed = time.monotonic()
        task = self._tasks[task_id]
        where = f"{task.completed:.0f}/{task.total:.0f}"
        self.console.print(
            f"{task.description} {where} {task.fields['note']}, {task.elapsed or 0.0:.0f} s", soft_wrap=True
        )


@contextmanager
def progress(console: Console, quiet: bool) -> Iterator[Progress]:
    """Show tasks that have a field ``note``; nothing if ``quiet``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Left(elapsed_when_finished=False),
    )
    with _Live(*columns, console=console, disable=quiet, refresh_per_second=4) as shown:
        yield shown


@contextmanager
def tensorboard(folder: Path, first_step: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes the figures of an outer step as scalars; one that does nothing without TensorBoard.

    Args:
        folder: where the event files go.
        first_step: what an earlier run wrote from this step on is hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda figures: None
        return
    with SummaryWriter(str(folder), purge_step=first_step) as writer:

        def write(figures: Mapping[str, Any]) -> None:
            step, family = figures["outer_step"], figures["family"]
            for name, value in figures.items():
                if name not in ("outer_step", "family"):
                    writer.add_scalar(name, value, step)
            writer.add_scalar(f"outer_loss of/{family}", figures["outer_loss"], step)

        yield write
