"""What a running command shows: a bar in a terminal, lines in a log, nothing when quiet; TensorBoard if installed."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from subspace_meta import live

FIGURES = {"outer_step": 3, "family": "PCA", "outer_loss": -1.5, "gradient_norm": 0.2}


def shown(monkeypatch: pytest.MonkeyPatch, quiet: bool, terminal: bool, seconds_a_step: float) -> str:
    clock = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    with live.progress(console, quiet) as progress:
        bar = progress.add_task("training", total=6, note="")
        for _ in range(6):
            clock[0] += seconds_a_step
            progress.update(bar, advance=1, note="loss 1.0")
    return file.getvalue()


def test_a_log_has_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, quiet=False, terminal=False, seconds_a_step=11.0).splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["training", "1/6"], ["training", "4/6"]]
    assert lines[0].endswith("s")
    assert "loss 1.0" in lines[0]
    assert len(lines) == 3, "and the finished bar"


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "training 1/6" not in shown(monkeypatch, quiet=False, terminal=True, seconds_a_step=60.0)


def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, quiet=True, terminal=False, seconds_a_step=60.0) == ""


class Writer:
    """Stands for TensorBoard's writer."""

    made: list[Writer] = []  # noqa: RUF012 (what the test looks at)

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


def test_figures_go_to_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with live.tensorboard(tmp_path, 2) as write:
        write(FIGURES)
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path), 2, True)
    assert sorted(writer.scalars) == [
        ("gradient_norm", 0.2, 3),
        ("outer_loss", -1.5, 3),
        ("outer_loss of/PCA", -1.5, 3),
    ]


def test_without_tensorboard_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with live.tensorboard(tmp_path / "there", 0) as write:
        write(FIGURES)
    assert not (tmp_path / "there").exists()
