"""Loss curves with bands over seeds, and performance profiles, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from subspace_meta.checkpoint import write_atomically
from subspace_meta.evaluation.comparison import PEER, Comparison
from subspace_meta.evaluation.predecessor import Record
from subspace_meta.evaluation.report import LEARNED, Results

# Okabe and Ito's palette, distinguishable with colour-blindness; the learned optimizer is the one that stands out.
COLOURS = ("#999999", "#56B4E9", "#009E73", "#D55E00")


def plot_curves(results: Results, path: Path) -> None:
    """Write one panel per problem: mean over seeds and instances, band from lowest to highest."""
    plt = _pyplot()

    rows = list(results.curves)
    columns = min(2, len(rows))
    height = -(-len(rows) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(6.2 * columns, 4.0 * height), squeeze=False)
    for axis, row in zip(axes.flat, rows, strict=False):
        for method, colour in zip(results.curves[row], COLOURS, strict=False):
            steps, mean, low, high = results.band(row, method)
            label = method if method == LEARNED else f"{method} (tuned at step {min(50, results.horizon)})"
            axis.plot(steps, mean, color=colour, label=label, linewidth=2.4 if method == LEARNED else 1.4)
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(row, fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylabel("log relative excess loss")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    write_atomically(path, _png(figure))


def plot_training(records: list[dict[str, float]], path: Path) -> None:
    """Write the outer loss over outer steps, raw and smoothed (running mean of 25)."""
    plt = _pyplot()

    steps = [record["outer_step"] for record in records]
    losses = [record["outer_loss"] for record in records]
    smooth = [sum(losses[max(0, i - 24) : i + 1]) / len(losses[max(0, i - 24) : i + 1]) for i in range(len(losses))]
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(steps, losses, color="#56B4E9", alpha=0.4, linewidth=0.8, label="outer loss of one segment")
    axis.plot(steps, smooth, color="#D55E00", label="running mean of 25")
    axis.set_xlabel("outer step")
    axis.set_ylabel("mean log relative excess loss")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    write_atomically(path, _png(figure))


def plot_profile(comparison: Comparison) -> bytes:
    """Return a PNG: the share of runs whose speed-up over the tuned peer is at least so much."""
    plt = _pyplot()

    thresholds = 10 ** torch.linspace(-1.0, 1.5, 200, dtype=torch.float64)
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(thresholds, comparison.profile(thresholds), color=COLOURS[-1], linewidth=2.2)
    axis.axvline(1.0, color=COLOURS[0], linewidth=1)
    axis.set_xscale("log")
    axis.set_xticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
    axis.minorticks_off()
    axis.set_ylim(0, 1)
    axis.set_xlabel(f"speed-up over tuned {PEER}, in steps")
    axis.set_ylabel("share of runs with at least that")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return _png(figure)


def plot_tasks(comparison: Comparison) -> bytes:
    """Return a PNG: one panel a task; the optimizer with its band over seeds, and the best baseline at every step."""
    plt = _pyplot()

    columns = 4
    height = -(-len(comparison.results) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4.2 * columns, 3.0 * height), squeeze=False)
    for axis, result in zip(axes.flat, comparison.results, strict=False):
        runs = result.curves.log_excess[0]
        steps = result.curves.steps
        axis.plot(steps, runs.mean(dim=0), color=COLOURS[-1], linewidth=2.0, label=comparison.name)
        axis.fill_between(steps, runs.amin(dim=0), runs.amax(dim=0), color=COLOURS[-1], alpha=0.15, linewidth=0)
        envelope = torch.stack([cell.envelope for cell in result.tuned.values()]).amin(dim=0)
        axis.plot(steps, envelope, color="black", linewidth=1.0, label="best tuned baseline at each step")
        axis.plot(steps, result.cells[PEER].envelope, color=COLOURS[1], linewidth=1.0, label=f"tuned {PEER}")
        told = [(step, min(found.values())) for step in result.compared if (found := result.scheduled(step))]
        if told:
            axis.plot(*zip(*told, strict=True), "k.", markersize=5, label="best tuned schedule that ends there")
        axis.set_title(result.task.row, fontsize=9)
        axis.set_xscale("symlog", linthresh=10)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(comparison.results) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=7)
    figure.supxlabel("step")
    figure.supylabel("log relative excess loss")
    figure.tight_layout()
    return _png(figure)


def plot_predecessor(records: Sequence[Record]) -> bytes:
    """Return a PNG: one panel a task, the matrix LSTM and the subspace optimizer before and after meta-training."""
    plt = _pyplot()

    rows = list(dict.fromkeys(record["task"] for record in records))
    colours = dict(zip(dict.fromkeys(record["optimizer"] for record in records), COLOURS[1::2], strict=False))
    figure, axes = plt.subplots(1, len(rows), figsize=(5.6 * len(rows), 4.0), squeeze=False)
    for axis, row in zip(axes.flat, rows, strict=True):
        for record in records:
            if record["task"] == row:
                style = "-" if record["training"] == "after" else ":"
                label = f"{record['optimizer']}, {record['training']} meta-training"
                axis.plot(record["steps"], record["log_excess"], style, color=colours[record["optimizer"]], label=label)
        axis.set_title(row, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("log relative excess loss")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    return _png(figure)


def _pyplot() -> Any:
    """Return pyplot, drawing into memory; imported only when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    _pyplot().close(figure)
    return buffer.getvalue()
