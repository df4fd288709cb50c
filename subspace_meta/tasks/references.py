"""Reference values where there is no closed form: descent in float64 from a start that is known to be good.

Used when a task is drawn, never inside an inner loop. What makes such a value trustworthy is the start (a planted
solution) or the problem (geodesically convex, or with a certificate that the tests check), not the descent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_meta.geometry import Params
from subspace_meta.tasks.base import Data, Problem

ARMIJO = 1e-4
HALVINGS = 40
STANDSTILL = 10  # steps in a row that gain nothing in float64, after which there is nothing to gain


def descend(problem: Problem, start: Params, data: Data, steps: int = 1000, tolerance: float = 1e-9) -> Params:
    """Minimise the objective of one task by Riemannian gradient descent, in float64.

    Step lengths of Barzilai and Borwein with Armijo's condition, so the objective never rises. Source: Iannazzo and
    Porcelli, "The Riemannian Barzilai-Borwein method with nonmonotone line search and the matrix geometric mean
    computation", IMA J. Numer. Anal. 38 (2018).

    Args:
        problem: what is minimised.
        start: a feasible point.
        data: the task, without a leading dimension.
        steps: largest number of steps.
        tolerance: stop once the gradient is shorter than this times its length at the start. It also stops once the
            objective stands still.
    """
    geometry = problem.geometry
    manifolds = [group.manifold for group in geometry.groups]
    exact = {name: value.double() if value.is_floating_point() else value for name, value in data.items()}

    def evaluate(points: list[Tensor]) -> tuple[float, list[Tensor]]:
        grads, value = torch.func.grad_and_value(problem.objective)(geometry.scatter(points), exact)
        gathered = zip(manifolds, points, geometry.gather(grads), strict=True)
        return float(value), [manifold.riemannian_gradient(x, g) for manifold, x, g in gathered]

    def inner(points: list[Tensor], left: list[Tensor], right: list[Tensor]) -> float:
        parts = zip(manifolds, points, left, right, strict=True)
        return sum(float(manifold.inner(x, u, v).sum()) for manifold, x, u, v in parts)

    points = geometry.gather({name: value.double() for name, value in start.items()})
    value, gradient = evaluate(points)
    square = first = inner(points, gradient, gradient)
    length = 1e-2 / max(square, 1e-30) ** 0.5
    still = 0
    for _ in range(steps):
        if still == STANDSTILL or square <= tolerance * tolerance * first or square == 0.0:
            break
        for _ in range(HALVINGS):
            moves = [-length * g for g in gradient]
            moved = [manifold.retract(x, v) for manifold, x, v in zip(manifolds, points, moves, strict=True)]
            new_value, new_gradient = evaluate(moved)
            if new_value <= value - ARMIJO * length * square:
                break
            length *= 0.5
        else:
            break  # no step descends: the limit of the arithmetic
        old = zip(manifolds, points, moved, gradient, strict=True)
        carried = [manifold.transport(x, y, g) for manifold, x, y, g in old]
        # With s = -length * carried and y = new - carried: |s|^2 / |<s, y>|.
        change = abs(inner(moved, carried, new_gradient) - inner(moved, carried, carried))
        length = length * inner(moved, carried, carried) / change if change > 0.0 else 2.0 * length
        still = still + 1 if value - new_value <= 1e-15 * abs(value) else 0
        points, gradient, value = moved, new_gradient, new_value
        square = inner(points, gradient, gradient)
    return geometry.scatter(points)


def reference_by_descent(problem: Problem, starts: Params, data: Data, steps: int = 300) -> Tensor:
    """Return the objective, ``(count,)``, that :func:`descend` reaches from one start for each task."""
    values = []
    for i in range(len(next(iter(starts.values())))):
        one = {name: value[i].double() if value.is_floating_point() else value[i] for name, value in data.items()}
        params = descend(problem, {name: value[i] for name, value in starts.items()}, one, steps)
        values.append(problem.objective(params, one))
    return torch.stack(values)
