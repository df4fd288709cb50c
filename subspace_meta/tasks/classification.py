"""Linear classification with orthonormal weights: softmax regression with X in St(d, classes), no bias.

minimise the mean cross-entropy of softmax(s X^T z) over X in St(d, c). The logit scale s is part of the problem (an
orthonormal classifier cannot grow its own). The model is an ``nn.Module`` and enters through
``torch.func.functional_call``, as a user's would. Source of the task: the face recognition experiment of the subspace
adaptation paper (arXiv 2501.15235, section 5) and of its predecessors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_indices


class OrthonormalClassifier(nn.Module):
    """Logits z X of inputs ``(B, d)``; the weight ``x`` ``(d, classes)`` has orthonormal columns."""

    def __init__(self, d: int, classes: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.empty(d, classes, device=device))

    def forward(self, z: Tensor) -> Tensor:
        """Return logits ``(B, classes)``."""
        return z @ self.x


def _cross_entropy(model: nn.Module, params: Params, inputs: Tensor, one_hot: Tensor) -> Tensor:
    logits = torch.func.functional_call(model, params, (inputs,))
    # With one-hot targets the loss has no gather, whose second derivative would be a scatter.
    return -(F.log_softmax(logits, dim=-1) * one_hot).sum() / inputs.shape[0]


@functools.cache
def classification_problem(d: int, classes: int) -> Problem:
    """Return the problem of one size."""
    model = OrthonormalClassifier(d, classes, device="meta")
    geometry = Geometry.from_rules(dict(model.named_parameters()), {"x": Stiefel()})

    def loss(params: Params, batch: Batch) -> Tensor:
        return _cross_entropy(model, params, batch["z"], batch["one_hot"])

    def objective(params: Params, data: Data) -> Tensor:
        return _cross_entropy(model, params, data["inputs"], data["one_hot"])

    def accuracy(params: Params, data: Data) -> Tensor:
        logits = torch.func.functional_call(model, params, (data["test_inputs"],))
        return (logits.argmax(dim=-1) == data["test_labels"]).float().mean()

    return Problem(geometry, loss, objective, accuracy)


@dataclass(frozen=True)
class OrthonormalClassification(TaskFamily):
    """Softmax regression with an orthonormal weight on a fixed data set.

    Attributes:
        source: name of the data set, for tables.
        load: cached function that returns inputs ``(n, d)`` and labels ``(n,)``; every fifth sample is the test set.
        classes: number of classes.
        log10_logit_scale: the inputs are multiplied by 10^u, u uniform between these bounds for every task.
        rotate: give every task its own random rotation of the input space and permutation of the classes, and, for the
            objective, its own random subset of ``objective_size`` samples.
    """

    source: str
    load: Callable[[], tuple[Tensor, Tensor]]
    classes: int
    batch_size: int = 64
    log10_logit_scale: tuple[float, float] = (0.5, 0.5)
    rotate: bool = False
    objective_size: int = 256

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"orthonormal classification of {self.source} {self.load()[0].shape[1]}x{self.classes}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return classification_problem(self.load()[0].shape[1], self.classes)

    def _split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs, labels = self.load()
        test = torch.arange(len(inputs)) % 5 == 4
        return inputs[~test], labels[~test], inputs[test], labels[test]

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return rotations, scales and the samples of the objective."""
        inputs, labels, test_inputs, test_labels = self._split()
        d = inputs.shape[1]
        low, high = self.log10_logit_scale
        scale = 10 ** (low + (high - low) * torch.rand(count, generator=generator))[:, None, None]
        if self.rotate:
            frame = Stiefel().random_point((count, d, d), generator) * scale
            order = torch.stack([torch.randperm(self.classes, generator=generator) for _ in range(count)])
            chosen = torch.stack(
                [torch.randperm(len(inputs), generator=generator)[: self.objective_size] for _ in range(count)]
            )
        else:
            frame = torch.eye(d) * scale
            order = torch.arange(self.classes).expand(count, self.classes)
            chosen = torch.arange(len(inputs)).expand(count, len(inputs))
        return {
            "frame": frame,
            "order": order,
            "inputs": inputs[chosen] @ frame,
            "one_hot": self._one_hot(labels[chosen], order),
            "test_inputs": test_inputs @ frame,
            "test_labels": order.gather(1, test_labels.expand(count, -1)),
            "reference": torch.zeros(count),
        }

    def _one_hot(self, labels: Tensor, order: Tensor) -> Tensor:
        """Return permuted one-hot labels; ``labels`` ``(..., count, n)``, ``order`` ``(count, classes)``."""
        permuted = order.expand(*labels.shape[:-2], *order.shape).gather(-1, labels)
        return F.one_hot(permuted, self.classes).float()

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw rows of the training part."""
        inputs, labels, _, _ = self._split()
        indices = draw_indices(len(inputs), (steps, len(data["reference"]), self.batch_size), generator)
        return {"z": inputs[indices] @ data["frame"], "one_hot": self._one_hot(labels[indices], data["order"])}

    def measured(self, data: Data) -> Data:
        """Return everything but rotations and permutations, which are applied already."""
        return {name: value for name, value in data.items() if name not in ("frame", "order")}
