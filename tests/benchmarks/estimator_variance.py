"""Variance of evolution strategies against the number of truncations, on quadratics; writes a figure.

    python tests/benchmarks/estimator_variance.py variance.png

A fixed horizon is cut into more and more segments. The estimates of one inner problem are summed over its segments;
shown are the variance of one antithetic pair relative to the squared gradient of the loss smoothed by one perturbation,
and the distance of the mean from that gradient. Two schedules of the step size: a constant one, where all segments
matter alike, and 1/t^2, where the first ones decide and all later losses hang on them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import subspace_meta as sm
from subspace_meta.meta.estimators import EvolutionStrategies, PersistentES, Segment, SinglePerturbationES
from subspace_meta.meta.unroll import InnerLoop
from subspace_meta.tasks import Problem

STEPS, DIMENSION, SIGMA = 32, 8, 0.1
PIECES = (1, 2, 4, 8, 16, 32)
KINDS = (EvolutionStrategies, PersistentES, SinglePerturbationES)
SCHEDULES = {"constant": 0.0, "1/t^2": 2.0}


def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return 0.5 * batch["rate"] * (batch["h"] * params["x"].square()).sum()


def objective(params: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    return 0.5 * (data["h"] * params["x"].square()).sum()


def make(geometry: sm.Geometry, theta: dict[str, Tensor]) -> sm.RSGD:
    return sm.RSGD(geometry, theta["log_lr"].exp())


def over_horizon(objectives: Tensor) -> Tensor:
    return objectives.sum(0) / STEPS


LOOP = InnerLoop(Problem(sm.Geometry.from_rules({"x": torch.empty(DIMENSION)}), loss, objective), make, compiled=False)


def estimates(kind: type, power: float, pieces: int, calls: int, pairs: int) -> Tensor:
    """Independent estimates of one inner problem, ``(calls,)``."""
    estimator = kind(LOOP, SIGMA, pairs)
    h = torch.logspace(-2, 0, DIMENSION, dtype=torch.float64)[None]
    theta = {"log_lr": torch.tensor(math.log(0.1), dtype=torch.float64)}
    params = {"x": torch.ones(1, DIMENSION, dtype=torch.float64)}
    rates = torch.arange(1, STEPS + 1, dtype=torch.float64)[:, None] ** -power
    parts = rates.chunk(pieces)
    random, found = torch.Generator().manual_seed(0), []
    for _ in range(calls):
        carry, total = estimator.start(theta, params, random), 0.0
        for rate in parts:
            segment = Segment({"h": h.expand(len(rate), 1, DIMENSION), "rate": rate}, {"h": h}, over_horizon)
            estimate = estimator(theta, segment, carry, random)
            carry, total = estimate.carry, total + float(estimate.gradient["log_lr"])
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path, help="where to write the PNG")
    parser.add_argument("--calls", type=int, default=60, help="estimates per point")
    parser.add_argument("--pairs", type=int, default=100, help="antithetic pairs per estimate")
    arguments = parser.parse_args()
    figure, rows = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    print(f"{'schedule':10}{'estimator':24}{'segments':>9}{'variance':>12}{'mean off by':>13}")
    for axes, (schedule, power) in zip(rows, SCHEDULES.items(), strict=True):
        target = float(estimates(SinglePerturbationES, power, 1, 10, 10_000).mean())
        for kind in KINDS:
            found = [estimates(kind, power, k, arguments.calls, arguments.pairs) for k in PIECES]
            variance = [arguments.pairs * float(values.var()) / target**2 for values in found]
            bias = [abs(float(values.mean()) / target - 1) for values in found]
            for row in zip(PIECES, variance, bias, strict=True):
                print(f"{schedule:10}{kind.__name__:24}{row[0]:9d}{row[1]:12.3g}{row[2]:13.3g}", flush=True)
            for axis, values in zip(axes, (variance, bias), strict=True):
                axis.plot(PIECES, values, "o-", label=kind.__name__)
        for axis, label in zip(axes, ("variance of a pair / gradient²", "|mean / gradient - 1|"), strict=True):
            axis.set(xscale="log", yscale="log", title=f"{schedule} step size", ylabel=label)
            axis.set_xlabel(f"segments of a horizon of {STEPS} steps")
    rows[0, 0].legend()
    figure.savefig(arguments.figure, dpi=150)


if __name__ == "__main__":
    main()
