"""Published experiments in small: what methods without a rate, and steps of random submanifolds, are claimed to do.

``python tests/benchmarks/published.py`` (float64, one thread; ``--repetitions 2`` for a glance) repeats

* *Rayleigh quotient*: the leading eigenvector of B B^T / d, d = 1000 and B of d x (d + 100) standard normal entries, on
  the sphere, and *PCA of wine*: the first component of the standardised data on Grassmann, both by full gradients for
  5,000 steps. RSGD and RAdam at 20 rates from 1e-8 to 1e6, and the three methods without a rate at 20 initial distances
  of the same range (Dodd, Sharrock, Nemeth, "Learning-rate-free stochastic optimization over Riemannian manifolds",
  ICML 2024, sections 5.1 and 5.2; settings of its published code, daniel-dodd/riemannian_dog). Here the Rayleigh
  quotient has d = 300 unless ``--full``.
* *PCA by random submanifolds*: f = -tr(X^T A X) / 2 on the orthogonal frames of 200 x 150 (2000 x 1500 with
  ``--full``), A with eigenvalues that fall exponentially by 1000 (Han, Poirion, Takeda, ICML 2025, section 7.1); RSGD
  and RSDM by seconds, each at its best of seven rates.

Regrets below 1e-7 of the start's are shown as that.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import subspace_meta as sm
from subspace_meta.evaluation.protocol import Curves, EvaluationTask, evaluate_rates
from subspace_meta.manifolds import CholeskyQR, Manifold
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, once_per_task, repeat
from subspace_meta.tasks.data import wine

RATES = tuple(10 ** (-8 + 14 * i / 19) for i in range(20))
SHOWN = (100, 1000, 5000)


def quadratic(params: dict[str, Tensor], batch: Batch) -> Tensor:
    return -0.5 * (params["x"] * (batch["matrix"] @ params["x"])).sum()


def angle(params: dict[str, Tensor], data: Data) -> Tensor:
    """Return the angle between the line of x and the leading eigenvector's."""
    cosine = (params["x"] * data["leading"]).sum().abs()
    sine = torch.linalg.vector_norm(params["x"] - data["leading"] * (params["x"] * data["leading"]).sum())
    return torch.atan2(sine, cosine)


@functools.cache
def quadratic_problem(d: int, manifold: Manifold) -> Problem:
    geometry = sm.Geometry.from_rules({"x": torch.empty(d, 1, dtype=torch.float64)}, {"x": manifold})
    return Problem(geometry, quadratic, quadratic, angle)


@dataclass(frozen=True)
class Leading(TaskFamily):
    """The leading eigenvector of one matrix, by full gradients."""

    name: str  # type: ignore[misc]
    manifold: Manifold
    matrix: Callable[[], Tensor]
    d: int

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        return quadratic_problem(self.d, self.manifold)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        matrix = self.matrix()
        values, vectors = torch.linalg.eigh(matrix)
        one = {"matrix": matrix, "leading": vectors[:, -1:], "reference": -0.5 * values[-1]}
        return once_per_task(one, count)

    def init(self, data: Data, generator: torch.Generator) -> dict[str, Tensor]:
        count = len(data["reference"])
        x = torch.randn(count, self.d, 1, generator=generator, dtype=torch.float64)
        return {"x": x / torch.linalg.vector_norm(x, dim=-2, keepdim=True)}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        return repeat(data, ("matrix",), steps)


@functools.cache
def wishart(d: int) -> Tensor:
    root = torch.randn(d, d + 100, generator=torch.Generator().manual_seed(42), dtype=torch.float64)
    return root @ root.mT / d


@functools.cache
def wine_correlations() -> Tensor:
    """Return twice the second moments of the standardised data, so that the loss is minus the explained variance."""
    z = wine()[0].double()
    z = (z - z.mean(dim=0)) / z.std(dim=0, correction=0)
    return 2.0 * z.mT @ z / len(z)


METHODS: dict[str, Callable[[sm.Geometry, Tensor], sm.Optimizer]] = {
    "RSGD": lambda g, lr: sm.RSGD(g, lr),
    "RAdam": lambda g, lr: sm.RAdam(g, lr),
    **{
        name: lambda g, initial, name=name: sm.RDoG(g, variant=name, initial=initial)
        for name in ("RDoG", "RDoWG", "NRDoG")
    },
}
PUBLISHED_INITIAL = 1e-6


def rates_experiment(family: TaskFamily, repetitions: int, steps: int) -> None:
    """Print, for each method, the best setting, and over which range of settings it comes within a factor of ten."""
    shown = [step for step in SHOWN if step <= steps]
    print(f"\n{family.name}: regret f - f* (angle to the solution), mean of {repetitions} starts, {steps} steps")
    print("| method | setting | " + " | ".join(f"@{step}" for step in shown) + " | settings that end near the best |")
    print("|---|---|" + "---|" * (len(shown) + 1))
    for name, make in METHODS.items():
        curves = evaluate_rates(EvaluationTask(family.name, family), make, RATES, repetitions, steps)
        ends = curves.objective(steps).sub(curves.reference).mean(dim=1)
        best = int(ends.nan_to_num(math.inf).argmin())
        # Below 1e-9 of the start everything is solved.
        near = [rate for rate, end in zip(RATES, ends, strict=True) if end <= 10 * ends[best] + 1e-6]
        usual = name in ("RSGD", "RAdam")
        span = f"{len(near)} of 20: {near[0]:.0e} to {near[-1]:.0e}"
        print(f"| {name} | {'best rate' if usual else 'best distance'} {RATES[best]:.1e} | "
              + " | ".join(entry(curves, best, step) for step in shown) + f" | {span} |")  # fmt: skip
        if not usual:
            untuned = evaluate_rates(
                EvaluationTask(family.name, family), make, (PUBLISHED_INITIAL,), repetitions, steps
            )
            print(f"| {name} | as published, 1e-6 | " + " | ".join(entry(untuned, 0, step) for step in shown) + " | |")


def entry(curves: Curves, index: int, step: int) -> str:
    regret = float((curves.objective(step)[index] - curves.reference).mean())
    return f"{regret:.1e} ({float(curves.metric[index, :, curves.checkpoints.index(step)].mean()):.1e})"


def submanifold_experiment(d: int, p: int, seconds: float) -> None:
    """Print the gap that RSGD and RSDM reach in equal times, each at its best of seven rates."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    values = 1000.0 ** -torch.linspace(0.0, 1.0, d)
    matrix = (basis * values) @ basis.mT
    optimum = float(-0.5 * values[:p].double().sum())
    geometry = sm.Geometry.from_rules({"x": torch.empty(d, p)}, {"x": sm.Stiefel(CholeskyQR())})
    start = geometry.initialize(generator)
    gradient = torch.func.grad_and_value(lambda params: quadratic(params, {"matrix": matrix}))
    makers = {
        "RSGD": lambda lr: sm.RSGD(geometry, lr),
        f"RSDM, permutation, r = {d // 3}": lambda lr: sm.RSDM(geometry, lr, d // 3),
        f"RSDM, orthogonal, r = {d // 3}": lambda lr: sm.RSDM(geometry, lr, d // 3, sampling="orthogonal"),
    }
    marks = [seconds / 8, seconds / 4, seconds / 2, seconds]
    print(f"\nPCA {d} x {p}: (f - f*) / |f*| after CPU seconds, and steps")
    print("| method | rate | " + " | ".join(f"{mark:g} s" for mark in marks) + " | steps |")
    print("|---|---|" + "---|" * (len(marks) + 1))
    for name, make in makers.items():
        found = []
        for rate in (0.1, 0.32, 1.0, 3.2, 10.0, 32.0, 100.0):
            optimizer = make(rate)
            params, state, steps, gaps = start, optimizer.init(start), 0, []
            began = time.process_time()
            while len(gaps) < len(marks):
                grads, value = gradient(params)
                params, state = optimizer.update(grads, state, params, value)
                steps += 1
                if time.process_time() - began >= marks[len(gaps)]:
                    # RSDM has no retraction in R^d: its rounding would take it below the optimum.
                    feasible = geometry.project(params)
                    gaps.append((float(quadratic(feasible, {"matrix": matrix})) - optimum) / -optimum)
            found.append((gaps[-1] if math.isfinite(gaps[-1]) else math.inf, rate, gaps, steps))
        _, rate, gaps, steps = min(found)
        print(f"| {name} | {rate:g} | " + " | ".join(f"{gap:.1e}" for gap in gaps) + f" | {steps} |")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--steps", type=int, default=5000)
    options.add_argument("--seconds", type=float, default=8.0, help="of each run of the last experiment")
    options.add_argument("--full", action="store_true", help="the published sizes")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    d = 1000 if chosen.full else 300
    size = (2000, 1500) if chosen.full else (200, 150)
    torch.set_default_dtype(torch.float64)
    rates_experiment(Leading("PCA of wine", sm.Grassmann(), wine_correlations, 13), chosen.repetitions, chosen.steps)
    rates_experiment(
        Leading(f"Rayleigh quotient {d}", sm.Sphere(), functools.partial(wishart, d), d),
        chosen.repetitions,
        chosen.steps,
    )
    torch.set_default_dtype(torch.float32)
    submanifold_experiment(*size, chosen.seconds)


if __name__ == "__main__":
    main()
