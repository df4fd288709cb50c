"""From curves to one table: what every optimizer reached at every checkpoint, as text, Markdown and JSON."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspace_meta._version import __version__
from subspace_meta.evaluation.protocol import (
    CHECKPOINTS,
    QUICK_BASELINES,
    TIE,
    Curves,
    EvaluationTask,
    placed,
    run_untuned,
    tune,
)
from subspace_meta.geometry import Geometry
from subspace_meta.optimizers.base import Optimizer

LEARNED = "Subspace (untuned)"


@dataclass
class Results:
    """Curves of every method on every task, and what the table says of them.

    Attributes:
        curves: ``[row][method]`` -> curves, one per instance.
        horizon: steps of each run.
        seeds: runs per instance.
    """

    horizon: int
    seeds: int
    curves: dict[str, dict[str, list[Curves]]] = field(default_factory=dict)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The checkpoints within the horizon."""
        return tuple(step for step in CHECKPOINTS if 10 <= step <= self.horizon)

    def score(self, row: str, method: str, step: int) -> float:
        """Return the mean log excess at a step, each instance at its best rate there, over instances and seeds."""
        return sum(float(c.at(step)[c.best(step)].mean()) for c in self.curves[row][method]) / len(
            self.curves[row][method]
        )

    def rates(self, row: str, method: str, step: int) -> list[float]:
        """Return the chosen learning rate of each instance."""
        return [c.rates[c.best(step)] for c in self.curves[row][method]]

    def verdict(self, row: str, step: int) -> str:
        """Return ``"better"``, ``"tie"`` or ``"worse"``: the learned optimizer against the best baseline."""
        best = min(self.score(row, method, step) for method in self.curves[row] if method != LEARNED)
        difference = self.score(row, LEARNED, step) - best
        return "tie" if abs(difference) <= TIE else "better" if difference < 0 else "worse"

    def band(self, row: str, method: str) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
        """Return steps, mean, lowest and highest log excess over instances and seeds.

        A baseline is shown at the rate of each instance that is best at step 50 (or at the horizon, if shorter).
        """
        shown = min(50, self.horizon)
        runs = torch.cat([c.log_excess[c.best(shown)] for c in self.curves[row][method]])
        steps = self.curves[row][method][0].steps
        return steps, runs.mean(dim=0), runs.amin(dim=0), runs.amax(dim=0)

    def largest_violation(self) -> float:
        """Return the largest constraint violation of the learned optimizer at the end of a run."""
        return max(float(c.violation.max()) for methods in self.curves.values() for c in methods[LEARNED])

    def share_finite(self) -> float:
        """Return the share of the learned optimizer's runs without a non-finite objective."""
        runs = [torch.isfinite(c.log_excess).all(dim=-1) for methods in self.curves.values() for c in methods[LEARNED]]
        return float(torch.cat([r.reshape(-1) for r in runs]).float().mean())

    def to_json(self) -> dict[str, Any]:
        """Return everything that the table shows, and where it was measured."""
        return {
            "environment": environment(),
            "measure": "mean log((f - f*)/(f0 - f*)); baselines at the best learning rate per checkpoint and instance",
            "checkpoints": list(self.checkpoints),
            "seeds": self.seeds,
            "problems": [
                {
                    "problem": row,
                    "instances": len(methods[LEARNED]),
                    "methods": {
                        method: {
                            "log_excess": [self.score(row, method, step) for step in self.checkpoints],
                            "rates": [self.rates(row, method, step) for step in self.checkpoints],
                            "metric": float(torch.stack([c.metric[..., -1].mean() for c in methods[method]]).mean())
                            if method == LEARNED
                            else None,
                            "cpu_seconds": sum(c.seconds for c in methods[method]),
                        }
                        for method in methods
                    },
                    "verdict": {str(step): self.verdict(row, step) for step in self.checkpoints},
                }
                for row, methods in self.curves.items()
            ],
            "largest_violation": self.largest_violation(),
            "share_finite": self.share_finite(),
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows: problem, step, one column a method, verdict."""
        methods = list(next(iter(self.curves.values())))
        header = ["problem", "step", *methods, "against the best"]
        rows = []
        for row in self.curves:
            for step in self.checkpoints:
                cells = []
                for method in methods:
                    text = f"{self.score(row, method, step):.2f}"
                    if method != LEARNED:
                        chosen = sorted(set(self.rates(row, method, step)))
                        low, high = f"{chosen[0]:.0e}", f"{chosen[-1]:.0e}"
                        text += f" @{low}" if low == high else f" @{low}..{high}"
                    cells.append(text)
                rows.append([row if step == self.checkpoints[0] else "", str(step), *cells, self.verdict(row, step)])
        return header, rows

    def markdown(self) -> str:
        """Return the table as Markdown."""
        header, rows = self.table()
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for cells in rows:
            marked = [f"**{c}**" if header[i] == LEARNED and cells[-1] == "better" else c for i, c in enumerate(cells)]
            lines.append("| " + " | ".join(marked) + " |")
        return "\n".join(lines)


def evaluate_suite(
    tasks: Sequence[EvaluationTask],
    make: Callable[[Geometry], Optimizer],
    seeds: int = 5,
    horizon: int = 200,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Results]]:
    """Evaluate an untuned optimizer against all baselines; yield a label after each run, with the results so far.

    All runs are on ``device``, where the tensors of ``make`` have to lie; results are on the CPU.
    """
    results = Results(horizon, seeds)
    for task in (placed(task, device) for task in tasks):
        methods = results.curves.setdefault(task.row, {})
        for baseline in QUICK_BASELINES:
            methods.setdefault(baseline.name, []).append(tune(task, baseline, seeds, horizon).on_cpu())
            yield f"{task.row}: {baseline.name}", results
        methods.setdefault(LEARNED, []).append(run_untuned(task, make, seeds, horizon).on_cpu())
        yield f"{task.row}: {LEARNED}", results


def environment() -> dict[str, str]:
    """Return date, machine, versions and, in a checkout, the commit."""
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {threads}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "subspace_meta": __version__,
        "commit": _commit(),
    }


def in_words(environment: Mapping[str, str]) -> str:
    """Return what :func:`environment` returns as a phrase."""
    return ", ".join(f"{key} {value}" for key, value in environment.items())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"
    return done.stdout.strip()
