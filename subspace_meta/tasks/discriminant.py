"""Linear discriminant analysis by the trace ratio.

minimise tr(X^T S_w X) / tr(X^T S_t X) over X in Gr(d, p), with the scatter within classes S_w and the total scatter
S_t, both with a ridge: a share of the variance, between 0 and 1. The ridge is the variance of an entry; with a much
smaller one the ratio is best in directions of hardly any variance, which tell no class from another. Source: Ngo,
Bellalij, Saad, "The trace ratio optimization problem", SIAM Review 54 (2012), whose Newton iteration gives the global
minimum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Grassmann
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, once_per_task, repeat
from subspace_meta.tasks.classification import split

RIDGE = 1.0


def trace_ratio(params: Params, batch: Batch) -> Tensor:
    """Return tr(X^T S_w X) / tr(X^T S_t X)."""
    x = params["x"]
    return (x * (batch["within"] @ x)).sum() / (x * (batch["total"] @ x)).sum()


def nearest_mean_accuracy(params: Params, data: Data) -> Tensor:
    """Return the share of test samples whose nearest class mean, in the subspace, is the right one."""
    x = params["x"]
    samples, means = data["test_inputs"] @ x, data["means"] @ x
    # argmin |s - m|^2 = argmax s.m - |m|^2 / 2
    scores = samples @ means.mT - 0.5 * means.square().sum(dim=-1)
    return (scores.argmax(dim=-1) == data["test_labels"]).float().mean()


@functools.cache
def trace_ratio_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Grassmann()})
    return Problem(geometry, trace_ratio, trace_ratio, nearest_mean_accuracy)


def least_trace_ratio(within: Tensor, total: Tensor, p: int, iterations: int = 30) -> Tensor:
    """Return the minimum for ``(d, d)`` matrices by Newton's iteration, which converges from everywhere."""
    ratio = within.trace() / total.trace()
    for _ in range(iterations):
        x = torch.linalg.eigh(within - ratio * total)[1][:, :p]
        ratio = trace_ratio({"x": x}, {"within": within, "total": total})
    return ratio


@dataclass(frozen=True)
class TraceRatio(TaskFamily):
    """Discriminant subspace of a labelled data set. The reference is the global minimum, the metric a test accuracy.

    Attributes:
        source: name of the data set, for tables.
        load: cached function that returns inputs ``(n, d)`` and labels ``(n,)``; every fifth sample is the test set.
        p: dimension of the subspace.
    """

    source: str
    load: Callable[[], tuple[Tensor, Tensor]]
    p: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"trace-ratio discriminant of {self.source} {self.load()[0].shape[1]}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return trace_ratio_problem(self.load()[0].shape[1], self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the scatters, once a task."""
        inputs, labels, test_inputs, test_labels = split(*self.load())
        inputs = inputs.double()
        one_hot = F.one_hot(labels).double()
        means = (one_hot.mT @ inputs) / one_hot.sum(dim=0)[:, None]
        deviation = inputs - one_hot @ means
        ridge = RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64, device=inputs.device)
        within = deviation.mT @ deviation / len(inputs) + ridge
        centred = inputs - inputs.mean(dim=0)
        total = centred.mT @ centred / len(inputs) + ridge
        values = {
            "within": within.float(),
            "total": total.float(),
            "means": means.float(),
            "test_inputs": test_inputs,
            "test_labels": test_labels,
            "reference": least_trace_ratio(within, total, self.p).float(),
        }
        return once_per_task(values, count)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the scatters at every step."""
        return repeat(data, ("within", "total"), steps)
