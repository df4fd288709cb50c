"""The picture of the README: ``python docs/figures.py`` writes ``docs/curves.svg``, in under a minute.

The shipped weights, untuned, beside tuned optimizers of the archive on three tasks of the evaluation suite: real data,
a task never trained on, and one on which tuned momentum wins late. Its title, which browsers do not draw, names the
weights; ``docs/make/quote.py --check`` reads it.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

import subspace_meta as sm
from subspace_meta.evaluation import archive
from subspace_meta.evaluation.protocol import BASELINES, EvaluationTask, run_untuned
from subspace_meta.tasks.suite import evaluation_suite
from subspace_meta.weights import RELEASES

TASKS = {
    "PCA of MNIST 784x10": "PCA of MNIST (real data)",
    "matrix completion 100x5": "matrix completion (a task never trained on)",
    "Rayleigh quotient 200": "Rayleigh quotient (no noise)",
}
TUNED_AT = 100
PEERS = {"RSGD-momentum": "#999999", "RAdam": "#56B4E9"}


def main() -> None:
    """Write the picture."""
    torch.set_num_threads(1)
    # The same picture from the same numbers, with letters as letters.
    mpl.rcParams.update({"svg.hashsalt": "curves", "svg.fonttype": "none"})
    figure, axes = plt.subplots(1, len(TASKS), figsize=(12, 3.4))
    tasks = {task.row: task for task in evaluation_suite()}
    names = [baseline.name for baseline in BASELINES]
    for axis, (row, title) in zip(axes, TASKS.items(), strict=True):
        cells = archive.load(row)
        best = min((name for name in names if name in cells), key=lambda name: cells[name].score(TUNED_AT))
        colours = {**PEERS, best: "#009E73"}
        for name, colour in colours.items():
            cell = cells[name]
            label = f"{name}, tuned" + (", the best of all" if name == best else "")
            axis.plot(cell.steps, cell.curves[cell.checkpoints.index(TUNED_AT)], color=colour, label=label)
        family = tasks[row].family
        ours = run_untuned(
            EvaluationTask(row, family),
            lambda geometry: sm.SubspaceOptimizer(geometry, sm.pretrained()),
            archive.SEEDS,
            max(cell.steps),
        )
        axis.plot(
            ours.steps, ours.log_excess.mean(dim=(0, 1)), color="#D55E00", linewidth=2.4, label="learned, untuned"
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_xlim(0, 200)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("log relative excess loss")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("curves.svg"), metadata={"Date": None, "Title": RELEASES["base"]})


if __name__ == "__main__":
    main()
