"""Print the tables of ``docs/geometry.md``: what a step of any length does in float32.

    python tests/manifolds/measure_long_steps.py

The violation of the result is measured in float64. Steps have full rank or rank one; their length is the spectral norm
(on SPD in whitened coordinates). The worst of ten draws is printed.
"""

from __future__ import annotations

import time

import torch
from manifold_cases import CASES as SMALL
from manifold_cases import (
    SPD,
    Euclidean,
    Grassmann,
    Oblique,
    Rotations,
    Sphere,
    Stiefel,
    StiefelCanonical,
    seeded,
    step_of_norm,
)

LENGTHS = (1.0, 10.0, 1e3, 1e6)
SHOWN = (Stiefel, StiefelCanonical, Grassmann, Rotations, Sphere, Oblique, SPD)


def main() -> None:
    """Print one row per manifold and retraction."""
    torch.set_num_threads(1)
    head = " | ".join(f"{length:g}" for length in LENGTHS)
    print(f"| manifold, retraction | {head} | ms |")
    print("|---" * (len(LENGTHS) + 2) + "|")
    for manifold, _ in SMALL:
        if not isinstance(manifold, SHOWN) or isinstance(manifold, Euclidean):
            continue
        shape = (16, 16) if isinstance(manifold, SPD | Rotations) else (64, 16)
        cells = []
        for length in LENGTHS:
            worst = []
            for rank in (None, 1):
                violations = []
                for seed in range(10):
                    x = manifold.random_point(shape, seeded(seed), torch.float32)
                    y = manifold.retract(x, step_of_norm(manifold, x, length, rank, seed + 100))
                    violations.append(float(manifold.violation(y.double())))
                worst.append(max(violations))
            cells.append(" / ".join(f"{w:.0e}" for w in worst))
        big = (16, 64, 64) if isinstance(manifold, SPD | Rotations) else (16, 256, 64)
        x = manifold.random_point(big, seeded(), torch.float32)
        v = step_of_norm(manifold, x, 0.1)
        manifold.retract(x, v)
        start = time.process_time()
        for _ in range(20):
            manifold.retract(x, v)
        milliseconds = (time.process_time() - start) / 20 * 1e3
        retraction = manifold.retraction
        name = type(retraction).__name__ + (f" {retraction.metric}" if hasattr(retraction, "metric") else "")
        print(f"| {manifold.name}, {name} | {' | '.join(cells)} | {milliseconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
