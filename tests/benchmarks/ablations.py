"""What each part of the preset ``base`` is worth: the same short meta-training without it, then the evaluation suite.

``python tests/benchmarks/ablations.py`` trains each variant for the same number of outer steps on the distribution of
the release (``paper`` for 1.9 times as many, which take as long) and prints a Markdown table; an hour on one core.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch

import subspace_meta as sm
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.evaluation.comparison import Comparison, compare
from subspace_meta.meta.distribution import training_streams
from subspace_meta.meta.trainer import Trainer, TrainSettings
from subspace_meta.optimizers.subspace import PRESETS
from subspace_meta.tasks.suite import evaluation_suite

VARIANTS = {
    "base": BaseAdapter(),
    "without the orthonormal factor": BaseAdapter(spectral=False),
    "without momentum": BaseAdapter(momentum_decay=0.0),
    "without both (`light`)": PRESETS["light"],
    "10 hidden units instead of 20": BaseAdapter(hidden=10),
}
STEPS = (20, 50, 100, 200, 400)


def train(preset: str, outer_steps: int, longest: int) -> tuple[dict, float]:
    """Return the weights and the CPU seconds."""
    settings = TrainSettings(
        training_streams(), preset, outer_steps, longest=longest, horizon=(40, 1000), warmup=50, seed=0
    )
    trainer, start = Trainer(settings), time.process_time()
    for _ in trainer.run():
        pass
    return trainer.theta, time.process_time() - start


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--outer-steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| | outer steps | CPU seconds | no worse, of 35, after 20 / 50 / 100 / 200 / 400 steps | speed-up, steps |")
    print("|---|---|---|---|---|", flush=True)

    def row(name: str, preset: str, outer_steps: int, longest: int = 160) -> None:
        theta, taken = train(preset, outer_steps, longest)
        make = partial(sm.SubspaceOptimizer, weights=theta, preset=preset)
        found = [result for _, result in compare(name, make, evaluation_suite()) if not isinstance(result, str)]
        comparison = Comparison(name, tuple(found))
        counts = " / ".join(str(comparison.no_worse(step)[0]) for step in STEPS)
        middle, low, high = comparison.speed()
        print(f"| {name} | {outer_steps} | {taken:.0f} | {counts} | {middle:.2f} [{low:.2f}, {high:.2f}] |", flush=True)

    for name, adapter in VARIANTS.items():
        PRESETS[name] = adapter
        row(name, name, arguments.outer_steps)
    row("base, segments of 20 steps only", "base", arguments.outer_steps, longest=20)
    row("`paper`", "paper", round(1.9 * arguments.outer_steps))


if __name__ == "__main__":
    main()
