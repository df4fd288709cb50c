"""Far outside of what the shipped weights were trained on: longer, larger, on other manifolds, beside RSGD at 1e-2.

``python tests/benchmarks/stress.py`` draws 50 problems with 20 seeds each, a third of them run for 10,000 steps (ten
times the longest horizon of meta-training), a third with 1024 rows for 100 steps (eight times the largest size; 80 on
SPD), a third for 400 steps on manifolds never trained on (Oblique, Stiefel with the canonical metric). Nothing
is tuned. A run counts as better if its loss ends lower, or if both have reached the last digits. Exit code 1 if a value
is not finite.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections import defaultdict

import torch

import subspace_meta as sm
from subspace_meta.evaluation.protocol import FLOOR, EvaluationTask, run_untuned
from subspace_meta.tasks.base import TaskFamily
from subspace_meta.tasks.eigenvalues import LeadingSubspace, RayleighQuotient
from subspace_meta.tasks.graphs import MaxCut
from subspace_meta.tasks.pca import SyntheticPCA
from subspace_meta.tasks.planted import PlantedClassification, PlantedLeastSquares

LAST_DIGITS = math.log(FLOOR)
STEPS = {"10,000 steps": 10000, "1024 rows": 100, "unseen manifold": 400}


def draw(kind: str, generator: torch.Generator) -> TaskFamily:
    """Draw a problem."""

    def between(low: int, high: int) -> int:
        return round(math.exp(math.log(low) + float(torch.rand((), generator=generator)) * math.log(high / low)))

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    batch = between(16, 128)
    if kind == "unseen manifold":
        d, p = between(8, 128), between(2, 4)
        canonical, oblique = sm.StiefelCanonical(), sm.Oblique()
        return one_of(
            SyntheticPCA(d, p, batch, manifold=canonical),
            LeadingSubspace(d, p, 0.7, canonical),
            PlantedLeastSquares(d, p, canonical, batch),
            PlantedLeastSquares(d, p, oblique, batch),
            PlantedLeastSquares(d, p, oblique, 0),
            MaxCut(between(20, 100), between(4, 20)),
        )
    large = kind == "1024 rows"
    d = 1024 if large else between(8, 32)
    half = d // 2
    p = between(2, 64 if large else half)
    manifold = one_of(sm.Stiefel(), sm.Grassmann())
    square = (80, 80, sm.SPD()) if large else (half, half, sm.Rotations())
    return one_of(
        SyntheticPCA(d, p, batch, manifold=manifold),
        LeadingSubspace(d, p, 0.7, manifold),
        RayleighQuotient(d),
        PlantedLeastSquares(d, p, manifold, batch),
        PlantedLeastSquares(d, p, sm.Euclidean(), 0),
        PlantedClassification(d, min(p, 16), batch),
        PlantedLeastSquares(*square, batch),
    )


def main() -> int:
    """Print one line a problem and a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--weights", help="a file; the shipped ones unless given")
    parser.add_argument("--kind", choices=STEPS, help="only these")
    parser.add_argument("--guarded", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights, preset = sm.load_weights(arguments.weights) if arguments.weights else (sm.pretrained(), "base")
    learned = functools.partial(sm.SubspaceOptimizer, weights=weights, preset=preset, guarded=arguments.guarded)
    plain = functools.partial(sm.RSGD, lr=1e-2)

    generator = torch.Generator().manual_seed(4_000_000)
    found: dict[str, list[tuple[bool, bool, float]]] = defaultdict(list)
    for index in range(arguments.problems):
        kind = tuple(STEPS)[index % len(STEPS)]
        family = draw(kind, generator)
        if arguments.kind not in (None, kind):
            continue
        task, steps = EvaluationTask(family.name, family, 4_000_000 + index), STEPS[kind]
        curves, beside = (run_untuned(task, make, arguments.seeds, steps) for make in (learned, plain))
        ends = [found_curves.at(steps).flatten() for found_curves in (curves, beside)]
        finite, violation = bool(torch.isfinite(curves.log_excess).all()), float(curves.violation.max())
        better = (ends[0] < ends[1]) | ((ends[0] <= LAST_DIGITS + 0.7) & (ends[1] <= LAST_DIGITS + 0.7))
        gain = (ends[1].clamp(min=LAST_DIGITS) - ends[0].clamp(min=LAST_DIGITS)).tolist()
        found[kind] += [(finite, bool(b), g) for b, g in zip(better, gain, strict=True)]
        print(
            f"{kind:16} {family.name:40} learned {ends[0].mean():7.2f} RSGD {ends[1].mean():7.2f} better "
            f"{int(better.sum())}/{len(better)} violation {violation:.0e}{'' if finite else ' NOT FINITE'}",
            flush=True,
        )
    runs = [run for part in found.values() for run in part]
    for kind, part in {**found, "all": runs}.items():
        gains = sorted(g for *_, g in part)
        print(
            f"{kind}: {len(part)} runs, not finite {sum(not f for f, *_ in part)}, better "
            f"{sum(b for _, b, _ in part) / len(part):.1%}, lead in log excess: median {gains[len(gains) // 2]:.2f}, "
            f"least {gains[0]:.2f}"
        )
    return int(not all(f for f, *_ in runs))


if __name__ == "__main__":
    sys.exit(main())
