"""How well noise is told from what the optimizer sees, and the gate that is fitted to it; five CPU minutes.

``python tests/benchmarks/noise_gate.py base [FILE ...] [--write FILE --power 0.5 --from-step 20]`` runs the weights on
families of the training distribution and on the development suite, and regresses whether the mini-batches differ from
step to step on what the adapter's ``noise.*`` meta-parameters look at: the matrix's features, and the means of what the
network remembers. It prints the area under the ROC curve of streams that were held out, and of the suite, which was
not fitted; ``--write`` gives the first weights this gate, and steps that grow by (t / from-step)^power where there is
noise: a start for training. Several weights: runs of all of them, since a gate changes what it sees.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from subspace_kernels import Layout, column_means, row_means
from torch import Tensor

import subspace_meta as sm
from subspace_meta.adapter import base
from subspace_meta.adapter.network import Weights
from subspace_meta.checkpoint import load_weights, save_weights
from subspace_meta.meta.distribution import training_streams
from subspace_meta.tasks.base import TaskFamily
from subspace_meta.tasks.suite import evaluation_suite
from subspace_meta.weights import RELEASES, located

STEPS, TASKS, FAMILIES = 200, 4, 6  # families of a stream at most
SEEN_AT = (6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 65, 80, 100, 125, 150, 199)
RANGES = ((6, 10), (10, 25), (25, 60), (60, 120), (120, 200))
RIDGE = 1e-3
LARGEST = 600  # rows; larger tasks of the suite take minutes


class Run(NamedTuple):
    """One run: which stream, whether batches differ, and what was seen, ``(steps, matrices, features)``."""

    stream: int
    noisy: bool
    seen: Tensor


class Sight(base.BaseAdapter):
    """The adapter, and a record of what its gate looks at."""

    def _noise(  # type: ignore[override]  # static where nothing is kept
        self, weights: Weights, state: base.BaseState, seen: Tensor, layout: Layout
    ) -> Tensor:
        memory = row_means(state.hidden[:, : layout.rows], layout), column_means(state.hidden[:, layout.rows :], layout)
        RECORD.append(torch.cat([seen, *memory]).mT.clone())
        return base.BaseAdapter._noise(weights, state, seen, layout)


RECORD: list[Tensor] = []


def run(family: TaskFamily, weights: Weights, adapter: Sight, stream: int, seed: int) -> Run:
    """Run the weights on some tasks of a family."""
    generator = torch.Generator().manual_seed(seed)
    data = family.draw(generator, TASKS)
    params = family.init(data, generator)
    batches = family.sample(data, generator, STEPS)
    optimizer = sm.SubspaceOptimizer(family.problem.geometry.stacked(TASKS), weights, adapter)
    state = optimizer.init(params)
    RECORD.clear()
    for t in range(STEPS):
        batch = {name: value[t] for name, value in batches.items()}
        grads = torch.func.vmap(torch.func.grad(family.problem.loss))(params, batch)
        params, state = optimizer.update(grads, state, params)
    noisy = any(not torch.equal(value[0], value[1]) for value in batches.values())
    return Run(stream, noisy, torch.stack(RECORD).double())


def training_runs(weights: Weights, adapter: Sight) -> Iterator[Run]:
    """Yield runs on families of every stream."""
    for number, stream in enumerate(training_streams()):
        for index, family in enumerate(stream.families[:FAMILIES]):
            yield run(family, weights, adapter, number, 77 * number + index)


def suite_runs(weights: Weights, adapter: Sight) -> Iterator[Run]:
    """Yield runs on the tasks of the development suite."""
    for task in evaluation_suite():
        if task.available and max(g.shape[-2] for g in task.family.problem.geometry.groups) <= LARGEST:
            yield run(task.family, weights, adapter, 0, 1_000_003)


class Table(NamedTuple):
    """What was seen at some steps, one line a matrix; every run has the same weight at each."""

    seen: np.ndarray
    noisy: np.ndarray
    weight: np.ndarray
    step: np.ndarray
    stream: np.ndarray


def table(runs: list[Run]) -> Table:
    """Return the lines of runs that stayed finite."""
    lines = [(r, t, r.seen[t]) for r in runs if bool(r.seen.isfinite().all()) for t in SEEN_AT]
    counts = [len(seen) for _, _, seen in lines]

    def repeated(values: list[float]) -> np.ndarray:
        return np.repeat(np.array(values), counts)

    return Table(
        torch.cat([seen for _, _, seen in lines]).numpy(),
        repeated([r.noisy for r, _, _ in lines]).astype(bool),
        repeated([1 / count for count in counts]),
        repeated([t for _, t, _ in lines]),
        repeated([r.stream for r, _, _ in lines]),
    )


def fitted(lines: Table, chosen: np.ndarray) -> LogisticRegression:
    """Regress noise on what was seen; both classes count the same."""
    weight, noisy = lines.weight[chosen], lines.noisy[chosen]
    weight = np.where(noisy, weight / weight[noisy].sum(), weight / weight[~noisy].sum())
    return LogisticRegression(C=0.5 / RIDGE, max_iter=2000).fit(lines.seen[chosen], noisy, sample_weight=weight)


def areas(lines: Table, evidence: np.ndarray) -> str:
    """Return the area under the ROC curve for ranges of steps."""
    found = []
    for low, high in RANGES:
        now = (low <= lines.step) & (lines.step < high)
        found.append(roc_auc_score(lines.noisy[now], evidence[now], sample_weight=lines.weight[now]))
    return " / ".join(f"{area:.3f}" for area in found)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("weights", nargs="+", help=f"files, or {', '.join(RELEASES)}")
    options.add_argument("--write", type=Path, help="where the first weights with the gate go")
    options.add_argument("--power", type=float, default=0.5, help="of t, by which steps grow where there is noise")
    options.add_argument("--from-step", type=float, default=20.0, help="step at which they are as they were")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    loaded = [load_weights(located(name)) for name in chosen.weights]
    sources = [(weights, Sight(**dataclasses.asdict(adapter))) for weights, adapter in loaded]
    lines = table([one for source in sources for one in training_runs(*source)])
    evidence = np.empty(len(lines.seen))
    for stream in np.unique(lines.stream):
        out = lines.stream == stream
        evidence[out] = fitted(lines, ~out).decision_function(lines.seen[out])
    print(f"steps {', '.join(f'{low}-{high}' for low, high in RANGES)}")
    print(f"streams held out: {areas(lines, evidence)}")
    gate = fitted(lines, np.ones(len(lines.seen), dtype=bool))
    suite = table([one for source in sources for one in suite_runs(*source)])
    print(f"development suite: {areas(suite, gate.decision_function(suite.seen))}")
    if chosen.write:
        weights, adapter = loaded[0]
        skips = weights["noise.skip"].numel()
        slopes = torch.tensor(gate.coef_[0] / base.NOISE_SLOPE, dtype=torch.float32)
        weights["noise.skip"], weights["noise.hidden"] = slopes[:skips], slopes[skips:].reshape(2, -1)
        weights["noise.bias"] = torch.tensor(gate.intercept_[0] / base.NOISE_SLOPE, dtype=torch.float32)
        weights["length.gauge"][-1] += chosen.power
        weights["length.skip"][-1] -= chosen.power * math.log(chosen.from_step)
        save_weights(chosen.write, weights, adapter, {"noise_gate": chosen.weights, "power": chosen.power})


if __name__ == "__main__":
    main()
